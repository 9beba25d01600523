"""Data that is wrong: a run goes past little of it, says what it skipped, and stops at much."""

import gzip
import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
import time
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from jepa_world.data import clips as clips_module
from jepa_world.data.clips import load_clips
from jepa_world.data.files import Skipped, inside, leaves, most_bad
from jepa_world.data.images import load_images, read_idx
from jepa_world.data.trajectories import Trajectories, write_shard
from jepa_world.data.video import read_video, write_video
from jepa_world.processes import ProcessDied, map_in_processes
from jepa_world.registry import UserError

SMALL = (
    *("--steps", 3, "--batch-size", 8, "--log-every", 1, "--checkpoint-every", 3),
    *("--precision", "no", "--clips.size", 16, "--clips.frames", 4, "--clips.fps", 4),
    *("--encoder.dim", 32, "--encoder.depth", 1, "--encoder.heads", 2, "--encoder.patch", 4),
    *("--masked-predictor.width", 16, "--masked-predictor.depth", 1),
)


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    """Twenty videos of noise, in one folder."""
    folder = tmp_path_factory.mktemp("twenty")
    random = np.random.default_rng(0)
    for number in range(20):
        frames = random.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
        write_video(folder / f"{number:02d}.mp4", frames, fps=4)
    return folder


@pytest.fixture
def videos(twenty, tmp_path):
    return shutil.copytree(twenty, tmp_path / "videos")


def cut_short(file):
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])


def test_the_rule_is_a_share_and_a_tenth_of_small_sets():
    assert [most_bad(n) for n in (0, 9, 10, 99, 1000, 2000)] == [0, 0, 1, 9, 10, 20]
    assert most_bad(1000, 0.5) == 500 and most_bad(10**6, 0.0) == 0


def test_processes_tell_each_other_what_they_skipped(tmp_path):
    one, two = (Skipped(20, record=tmp_path / "skipped.jsonl") for _ in range(2))
    one.add("a", "it is empty")
    two.add("b", "it is\nempty")
    two.add("b", "again")
    assert list(two.reasons) == ["b", "a"] and two.results()["skipped"]["count"] == 2
    with pytest.raises(UserError, match=r"3 of 20 files cannot be used, more than 1.00%: a \(it"):
        one.add("c", "it is empty")


@pytest.mark.parametrize("workers", [0, 1])
def test_training_goes_past_a_bad_video_and_names_it(call, videos, tmp_path, workers):
    cut_short(videos / "03.mp4")
    words = (*SMALL, "--data", videos, "--run-dir", tmp_path / "run", "--clips.workers", workers)
    ended = call("train_vjepa", *words)
    assert ended.code == 0, ended.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["skipped"]["count"] == 1 and "03.mp4" in results["skipped"]["first"]
    assert "1 of 20 videos" in ended.stdout and "03.mp4" in ended.stdout
    assert not list((tmp_path / "run").glob("reading-*"))


def test_training_stops_at_more_bad_videos_than_are_allowed(call, videos, tmp_path):
    for number in range(3):
        cut_short(videos / f"0{number}.mp4")
    words = (*SMALL, "--data", videos, "--run-dir", tmp_path / "run")
    complaint = call("train_vjepa", *words).stderr.splitlines()[-1]
    assert "3 of 20 videos" in complaint and "cannot be used, more than 1.00%" in complaint
    words = (*words[:-1], tmp_path / "more", "--clips.bad-share", 0.2)
    assert call("train_vjepa", *words).code == 0


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_reader_that_is_lost_ends_the_run_and_its_file_is_named(
    call, videos, tmp_path, monkeypatch, how
):
    main, open_video = os.getpid(), clips_module.open_video

    def lose(source, **words):
        if os.getpid() == main:
            return open_video(source, **words)
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3600)

    monkeypatch.setattr(clips_module, "open_video", lose)  # the reader is a fork of this process
    words = (*SMALL, "--data", videos, "--run-dir", tmp_path / "run", "--clips.workers", 1)
    ended = call("train_vjepa", *words, "--clips.patience", 3)
    complaint = ended.stderr.splitlines()[-1]
    assert ended.code == 2 and "a process that reads data was lost" in complaint
    assert ".mp4'" in complaint and "take that file out" in complaint
    assert not multiprocessing.active_children()  # the command would wait for them


def test_a_run_of_images_names_what_it_skipped(call, tmp_path):
    random = np.random.default_rng(0)
    for number in range(60):
        kind = tmp_path / "pictures" / str(number % 2)
        kind.mkdir(parents=True, exist_ok=True)
        shape = (16 + number % 3, 16, 3) if number % 5 else (16, 16)  # of several sizes, and grey
        pixels = random.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(kind / f"{number}.png")
    cut_short(tmp_path / "pictures" / "0" / "30.png")
    words = ("--data", tmp_path / "pictures", "--image-size", 16, "--steps", 2, "--batch-size", 8)
    words += ("--encoder.width", 16)
    ended = call("train_lejepa", *words, "--precision", "no", "--run-dir", tmp_path / "run")
    assert ended.code == 0, ended.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["skipped"]["count"] == 1 and "0/30.png" in results["skipped"]["first"]


def episode(frames, seed):
    random = np.random.default_rng(seed)
    return {
        "pixels": random.integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8),
        "action": random.uniform(-1, 1, (frames, 2)).astype(np.float32),
    }


@pytest.fixture
def store(tmp_path):
    """Twelve shards of two episodes each, as JPEG."""
    for number in range(12):
        pair = [episode(6, 2 * number), episode(5, 2 * number + 1)]
        write_shard(tmp_path / "store" / f"shard-{number:05d}.h5", pair, jpeg=True)
    return tmp_path / "store"


@pytest.fixture(autouse=True)
def folder_of_the_store(tmp_path):
    (tmp_path / "store").mkdir()


def test_a_shard_that_cannot_be_opened_is_left_out_and_two_are_too_many(store):
    cut_short(store / "shard-00003.h5")
    data = Trajectories(store)
    assert data.num_episodes == 22 and list(data.skipped.reasons) == ["shard-00003.h5"]
    with pytest.raises(UserError, match=r"shard-00003\.h5 is damaged or cut short"):
        Trajectories(store, bad_share=0)
    cut_short(store / "shard-00007.h5")
    with pytest.raises(UserError, match=r"2 of 12 files .*shard-00003.*shard-00007"):
        Trajectories(store)


def test_a_world_model_is_trained_on_what_is_whole_of_a_share_that_is_allowed(
    store, tiny_words, tmp_path, call
):
    for number in (3, 7, 9):
        cut_short(store / f"shard-{number:05d}.h5")
    words = (*tiny_words, "--steps", 1, "--data", store, "--run-dir", tmp_path / "run")
    assert "of 12 files" in call("train_world_model", *words).complaint()
    ended = call("train_world_model", *words, "--bad-share", -1)
    assert ended.complaint() == "train_world_model: --bad-share is -1.0: give at least 0"
    assert call("train_world_model", *words, "--bad-share", 0.3).code == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["skipped"]["count"] == 3


def test_a_description_of_a_store_whose_settings_are_none_is_refused(store):
    (store / "dataset.yaml").write_text("settings:\n")
    with pytest.raises(UserError, match=r"dataset.yaml' has the settings None: expected keys"):
        Trajectories(store)


def test_an_episode_with_nan_is_left_out_of_windows_and_statistics(store):
    with h5py.File(store / "shard-00000.h5", "r+") as file:
        column: Any = file["action"]
        column[7] = np.nan
    data = Trajectories(store)
    assert data.num_episodes == 23 and np.isfinite(data.action_std).all()
    starts = data.windows(3)
    assert not np.isin(np.arange(6, 11), starts).any()
    assert np.isfinite(data.read(starts, 3)["action"]).all()
    assert data.skipped.reasons == {"episode 1": "action is not finite in row 1"}


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_a_window_whose_frames_cannot_be_read_is_replaced_by_the_same_one_always(
    store, cache_bytes
):
    with h5py.File(store / "shard-00001.h5", "r+") as file:
        column: Any = file["pixels"]
        column[2] = np.frombuffer(b"no picture", np.uint8)
    data, again = (Trajectories(store, cache_bytes=cache_bytes) for _ in range(2))
    starts = data.windows(3)
    batch, other = data.read(starts, 3), again.read(starts[::-1], 3)
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name][::-1])
    assert list(data.skipped.reasons) == ["episode 2"]
    good = np.flatnonzero((starts < 11) | (starts >= 17))
    alone = data.read(starts[good], 3)
    np.testing.assert_array_equal(alone["pixels"], batch["pixels"][good])
    part = Trajectories(store, cache_bytes=cache_bytes)._subset(np.array([2]))
    with pytest.raises(UserError, match="that is all of one part"):
        part.read(np.array([11]), 3)


def test_a_world_model_trains_past_a_bad_episode(call, store, tiny_words, tmp_path):
    with h5py.File(store / "shard-00001.h5", "r+") as file:
        column: Any = file["pixels"]
        column[2] = np.frombuffer(b"no picture", np.uint8)
    words = (*tiny_words, "--data", store, "--run-dir", tmp_path / "run", "--encoder.stages", 1)
    ended = call("train_world_model", *words)
    assert ended.code == 0, ended.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["skipped"]["count"] == 1 and "episode 2" in results["skipped"]["first"]


def test_rows_that_lie_in_another_file_are_refused(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(range(256)) * 16)
    write_shard(tmp_path / "good.h5", [episode(5, 0), episode(5, 1)])
    for name, spoil in {"external": external, "link": link, "virtual": virtual}.items():
        shutil.copy(tmp_path / "good.h5", tmp_path / f"{name}.h5")
        with h5py.File(tmp_path / f"{name}.h5", "r+") as file:
            del file["action"]
            spoil(file, tmp_path)
        with pytest.raises(UserError, match=r"lies in another file|has no column 'action'"):
            Trajectories(tmp_path / f"{name}.h5")


def external(file, folder):
    where = [(str(folder / "secret"), 0, 80)]
    file.create_dataset("action", (10, 2), np.float32, external=where)


def link(file, folder):
    file["action"] = h5py.ExternalLink(str(folder / "good.h5"), "action")


def virtual(file, folder):
    layout = h5py.VirtualLayout((10, 2), np.float32)
    layout[:] = h5py.VirtualSource(str(folder / "good.h5"), "action", (10, 2))
    file.create_virtual_dataset("action", layout)


def test_a_column_that_is_larger_than_memory_is_refused(tmp_path):
    write_shard(tmp_path / "a.h5", [episode(5, 0), episode(5, 1)])
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file.create_dataset("state", (10**9, 10**6), np.float32, chunks=(1, 1000))
    with pytest.raises(UserError, match=r"state takes .* GiB, more than this machine has"):
        Trajectories(tmp_path / "a.h5")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a", "a/../../b", "..\\a", "\\a", "a\0b", "c/../.."]
)
def test_a_name_that_leads_out_is_seen(name, tmp_path):
    assert leaves(name) and not leaves("a/b..c/.d")
    with pytest.raises(ValueError, match="leads out"):
        inside(tmp_path, name)


def test_a_template_is_filled_in_with_names_and_widths_alone(tmp_path):
    words = {"chunk_index": 3, "video_key": "a.b"}
    name = "videos/{video_key}/chunk-{chunk_index:03d}/{chunk_index}.mp4"
    assert inside(tmp_path, name, **words) == tmp_path / "videos/a.b/chunk-003/3.mp4"
    for wrong in ("{chunk_index:>999999999}", "{chunk_index.__class__}", "{video_key!r}"):
        with pytest.raises(ValueError, match="is no template"):
            inside(tmp_path, wrong, **words)
    with pytest.raises(ValueError, match="leads out"):
        inside(tmp_path, "{video_key}/a", video_key="../..")


def test_no_name_leads_out_of_the_folder_of_a_list(twenty, tmp_path):
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "list.csv").write_text("path\n../videos/00.mp4\n")
    with pytest.raises(UserError, match="its name leads out of the folder of the list"):
        load_clips(lists / "list.csv")
    (lists / "list.csv").write_text(f"path\n{twenty / '00.mp4'}\n")
    assert len(load_clips(lists / "list.csv")) == 1


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{0}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile good.mp4\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    ],
    ids=["hls", "concat", "sdp"],
)
def test_a_video_that_is_a_list_of_files_is_not_followed(twenty, tmp_path, text):
    shutil.copy(twenty / "00.mp4", tmp_path / "good.mp4")
    (tmp_path / "evil.mp4").write_text(text.format(tmp_path / "good.mp4"))
    with pytest.raises(UserError, match=r"evil\.mp4 cannot be read"):
        read_video(tmp_path / "evil.mp4")


@pytest.mark.parametrize("read", [load_images, load_clips])
def test_a_tar_whose_sizes_lie_is_refused(twenty, tmp_path, read):
    member = tarfile.TarInfo("a/b.mp4" if read is load_clips else "a/b.png")
    member.size = 10
    head = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    for size in (-1024, 10**12):
        head[124:136] = size.to_bytes(12, "big", signed=True)  # as GNU writes what is large
        if size > 0:
            head[124] = 0x80
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        (tmp_path / "evil.tar").write_bytes(bytes(head) + bytes(2048))
        with pytest.raises(UserError, match=r"evil\.tar"):
            read(tmp_path / "evil.tar")


def test_an_idx_file_that_unpacks_to_more_than_it_announces_is_refused(tmp_path):
    head = b"\0\0\x08\x01" + (7).to_bytes(4, "big")
    (tmp_path / "bomb").write_bytes(gzip.compress(head + bytes(10**7)))
    with pytest.raises(UserError, match=r"announces 7 bytes \(7,\) and holds more"):
        read_idx(tmp_path / "bomb")
    (tmp_path / "huge").write_bytes(b"\0\0\x08\x04" + b"\xff" * 16)
    with pytest.raises(UserError, match="GiB, more than this machine has"):
        read_idx(tmp_path / "huge")


def test_pictures_of_every_mode_are_read(tmp_path):
    modes = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F")
    for number, mode in enumerate(modes * 2):
        file = tmp_path / f"{number}.{'tiff' if mode in ('CMYK', 'F', 'I') else 'png'}"
        Image.new(mode, (20 + number, 16)).save(file)
    train, test = load_images(tmp_path, size=16)
    assert len(train) + len(test) == 20 and not train.skipped


def test_a_compressed_array_of_zeros_is_not_unpacked_into_all_memory(tmp_path):
    path, rows = tmp_path / "bomb.npz", 20
    numbers = {"actions": np.zeros((rows, 2)), "terminals": np.arange(rows) % 10 == 9}
    np.savez_compressed(path, observations=np.zeros((rows, 16, 16, 3), np.uint8), **numbers)
    import zipfile

    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        head = io.BytesIO()
        lie = {"descr": "<f8", "fortran_order": False, "shape": (rows, 10**12)}
        np.lib.format.write_array_header_1_0(head, lie)
        archive.writestr("state.npy", head.getvalue() + bytes(1000))
    with pytest.raises(UserError, match=r"state takes .* GiB, more than this machine has"):
        Trajectories(path)


def die_at_three(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_what_a_process_of_a_pool_died_of_is_named():
    done = map_in_processes(die_at_three, range(8), workers=2)
    with pytest.raises(ProcessDied) as died:
        list(done)
    assert 3 in died.value.items and len(died.value.items) <= 2
