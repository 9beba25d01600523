"""Shards: every sample once, in the order of the seed, by any number of processes and workers."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ON_CPU
from PIL import Image

from jepa_world.commands.image_training import open_shards
from jepa_world.data.clips import stream_clips
from jepa_world.data.files import Member, Skipped
from jepa_world.data.images import SUFFIXES, Pictures, stream_images
from jepa_world.data.shards import Shards, count_samples, find_shards, is_sharded
from jepa_world.data.video import SUFFIXES as VIDEO_SUFFIXES
from jepa_world.data.video import write_video
from jepa_world.registry import UserError
from jepa_world.training import make_accelerator, sharded_index

ROOT = Path(__file__).resolve().parents[1]
SIZES = (9, 4, 11, 1, 8, 7, 12, 8)  # 60 samples
PICTURES = frozenset(SUFFIXES)


def picture(number):
    """Return a PNG whose colour is its number."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (number // 256, number % 256, 77)).save(file, "png")
    return file.getvalue()


def numbers_of(pixels):
    return (pixels[:, 0, 0, 0].astype(int) * 256 + pixels[:, 0, 0, 1]).tolist()


def pack(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder, sizes=SIZES, labels=True):
    """Write shards of pictures as webdataset does: key.png, key.cls, key.json."""
    number = 0
    for shard, size in enumerate(sizes):
        members = {}
        for _ in range(size):
            key = f"{number:06d}"
            members[f"{key}.cls"] = str(number % 3).encode()
            members[f"{key}.json"] = json.dumps({"class": "unused"}).encode()
            members[f"{key}.png"] = picture(number)
            number += 1
        kept = {n: c for n, c in members.items() if labels or n.endswith(".png")}
        pack(folder / f"shard-{shard:06d}.tar", kept)
    return folder


def counted(folder, suffixes=PICTURES, **options):
    paths = find_shards(folder)
    return Shards.of(paths, [count_samples(p, suffixes) for p in paths], suffixes, **options)


def pictures_of(shards, **options):
    return Pictures(shards, 8, Skipped(len(shards), "pictures"), **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def test_a_pattern_a_list_and_a_folder_of_tars_are_the_same_shards(folder, tmp_path):
    names = [f"shard-{number:06d}.tar" for number in range(8)]
    (tmp_path / "shards.txt").write_text("".join(f"{folder / name}\n" for name in names))
    given = [folder, folder / "shard-{000000..000007}.tar", folder / "*.tar"]
    for data in (*given, tmp_path / "shards.txt"):
        assert is_sharded(data)
        assert [path.name for path in find_shards(data)] == names
    assert find_shards(Path("a-{08..10}/{1..2}.tar"))[:3] == tuple(
        Path(name) for name in ("a-08/1.tar", "a-08/2.tar", "a-09/1.tar")
    )


def test_what_is_listed_elsewhere_is_not_sharded(folder, tmp_path):
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "list.txt").write_text("a.mp4\n")
    for data in (tmp_path, tmp_path / "list.txt", folder / "shard-000000.tar", Path("shapes")):
        assert not is_sharded(data)
    with pytest.raises(UserError, match="stands for no tar and no folder"):
        find_shards(tmp_path / "*.tar")
    with pytest.raises(UserError, match="give rising numbers"):
        find_shards(tmp_path / "{9..1}.tar")
    (tmp_path / "one").mkdir()
    pack(tmp_path / "one" / "a.tar", {"a.png": picture(0)})
    assert not is_sharded(tmp_path / "one")
    (tmp_path / "list.txt").write_text("../x.tar\n")
    with pytest.raises(UserError, match=r"names '\.\./x\.tar', outside its folder"):
        find_shards(tmp_path / "list.txt")


def test_samples_of_webdataset_are_read_by_number_with_their_labels(folder):
    shards = counted(folder)
    assert len(shards) == 60 and shards.sizes.tolist() == list(SIZES) and not shards.refused
    pixels, drawn = pictures_of(shards).draw(np.arange(60), seed=0, step=0)
    assert numbers_of(pixels) == drawn.tolist() == list(range(60))
    assert [shards.label(sample) for sample in (0, 1, 59)] == ["0", "1", "2"]
    assert shards.names[9] == "shard-000001.tar/000009.png"


def test_a_key_ends_at_the_first_dot_and_has_one_picture(tmp_path):
    names = ("a/0.png", "a/0.seg.png", "a/1.jpg", "a/1.png", "a/2.left.png", "a/.hidden.png")
    path = pack(tmp_path / "x.tar", dict.fromkeys((*names, "a/0.json"), b"{}"))
    count = count_samples(path, PICTURES)
    assert count.samples == 3 and list(count.refused) == ["a/1.png"]
    shards = Shards.of([path], [count], PICTURES)
    assert list(shards.names) == ["x.tar/a/0.png", "x.tar/a/1.jpg", "x.tar/a/2.left.png"]
    assert shards.label(0) == "a"


def test_names_that_lead_out_and_links_are_no_samples(tmp_path):
    names = {"../a.png": b"x", "/tmp/b.png": b"x", "c/../../d.png": b"x", "e.png": picture(1)}
    path = pack(tmp_path / "evil.tar", names)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    shards = counted(path.parent / "*.tar")
    assert list(shards.names) == ["evil.tar/e.png"]
    assert set(shards.refused) == {f"evil.tar/{name}" for name in names if name != "e.png"}


@pytest.mark.parametrize("cut", ["in a member", "between members"])
def test_a_truncated_tar_is_named_and_skipped(tmp_path, cut):
    write_shards(tmp_path, (5,) * 12, labels=False)
    path = tmp_path / "shard-000003.tar"
    with tarfile.open(path) as archive:
        end = archive.getmembers()[2].offset
    path.write_bytes(path.read_bytes()[: end + 600 * (cut == "in a member")])
    shards = counted(tmp_path)
    assert len(shards) == 55 and list(shards.refused) == [str(path)]
    assert shards.refused[str(path)].startswith("it cannot be read: ")
    with pytest.raises(UserError, match=r"1 of 12 shards cannot be used.*shard-000003\.tar"):
        counted(tmp_path, bad_share=0)


def test_a_damaged_sample_is_named_and_replaced_by_the_same_one_always(tmp_path):
    members = {f"{number:02d}.png": picture(number) for number in range(20)}
    members["07.png"] = b"no picture"
    shards = counted(pack(tmp_path / "x.tar", members).parent / "*.tar")
    pictures = pictures_of(shards)
    pixels, drawn = pictures.draw(np.arange(20), seed=0, step=3)
    assert drawn[7] != 7 and np.delete(drawn, 7).tolist() == [n for n in range(20) if n != 7]
    assert numbers_of(pixels) == drawn.tolist()
    assert list(pictures.skipped.reasons) == ["x.tar/07.png"]
    assert pictures.draw(np.array([7]), seed=0, step=3)[1].tolist() == [drawn[7]]


def test_a_shard_that_changed_since_it_was_counted_is_told(tmp_path):
    shards = counted(write_shards(tmp_path, (5, 5)))
    pack(tmp_path / "shard-000001.tar", {"0.png": picture(0)})
    with pytest.raises(UserError, match=r"shard-000001.tar' has 1 samples, 5 when it was counted"):
        pictures_of(shards).draw(np.array([7]), seed=0, step=0)


def test_a_tree_of_folders_is_read_without_a_list_of_its_files(tmp_path):
    for number in range(12):
        file = tmp_path / "photos" / f"{number % 3}" / "deep" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number))
    (tmp_path / "photos" / "note.txt").write_text("no picture")
    data = tmp_path / "photos" / "**"
    assert is_sharded(data)
    shards = counted(data)
    assert shards.sizes.tolist() == [4, 4, 4] and shards.label(0) == "deep"
    pixels, _ = pictures_of(shards).draw(np.arange(12), seed=0, step=0)
    assert sorted(numbers_of(pixels)) == list(range(12))


def test_every_sample_comes_once_an_epoch_in_every_epoch():
    random = np.random.default_rng(0)
    for _ in range(100):
        sizes = random.integers(1, 20, random.integers(1, 12))
        total = int(sizes.sum())
        batch_size = int(random.integers(1, total + 1))
        order = sharded_index(sizes, batch_size, 0, np.arange(3 * total)).reshape(3, total)
        assert (np.sort(order) == np.arange(total)).all()
        assert total < 8 or len(np.unique(order, axis=0)) == 3


def test_the_order_is_of_the_seed_and_any_part_of_it_is_found_alone():
    sizes = np.full(50, 20)
    whole = sharded_index(sizes, 16, 3, np.arange(2000))
    assert (whole != sharded_index(sizes, 16, 4, np.arange(2000))).any()
    late = np.array([1777, 12, 999, 1000])
    np.testing.assert_array_equal(sharded_index(sizes, 16, 3, late), whole[late])


def test_a_batch_has_samples_of_many_shards_and_a_process_reads_few():
    sizes, batch = np.full(64, 100), 32
    steps = np.arange(200)[:, None] * batch + np.arange(batch)
    shards = sharded_index(sizes, batch, 0, steps.ravel()).reshape(200, batch) // 100
    assert all(len(set(step)) > batch * 0.9 for step in shards)
    own = [set(shards[:, 8 * process : 8 * process + 8].ravel()) for process in range(4)]
    assert sum(map(len, own)) <= 64 + 4  # a lane's end and the next one's beginning share a shard


def test_tables_that_are_open_are_bounded_and_each_is_read_once(tmp_path, monkeypatch):
    shards = counted(write_shards(tmp_path, (20,) * 24, labels=False))
    reads = []
    found = Shards._read_table
    monkeypatch.setattr(Shards, "_read_table", lambda s, p, n: reads.append(p) or found(s, p, n))
    batch, share = 8, np.arange(4)  # a process of two
    lanes = Shards(shards.paths, shards.sizes, shards.suffixes, most_open=6)
    for step in range(60):
        for sample in sharded_index(shards.sizes, batch, 0, step * batch + share):
            assert isinstance(lanes[int(sample)], Member)
            assert len(lanes.opened) <= 6
    assert len(reads) == len(set(reads)) <= 13


def test_held_out_shards_are_not_trained_on_and_have_the_labels_of_the_rest(folder):
    streamed, fit, test = stream_images(counted(folder), size=8)
    kept = {number for name in streamed.shards.names for number in [int(name[-10:-4])]}
    assert len(kept) + len(test) == 60 and not kept & set(numbers_of(test.pixels))
    assert set(numbers_of(fit.pixels)) <= kept
    for part in (fit, test):
        labels = part.classes["class"]
        assert labels.tolist() == [number % 3 for number in numbers_of(part.pixels)]
    with pytest.raises(UserError, match="is the only shard: give two"):
        stream_images(counted(folder / "shard-000000*.tar"), size=8)


def grey_videos(folder, sizes=SIZES):
    """Write shards of videos whose brightness is their number: 3 levels each from 30 on."""
    number = 0
    for shard, size in enumerate(sizes):
        members = {}
        for _ in range(size):
            write_video(folder / "one.mp4", np.full((6, 16, 16, 3), 30 + 3 * number, np.uint8), 10)
            members[f"{number:04d}.mp4"] = (folder / "one.mp4").read_bytes()
            members[f"{number:04d}.json"] = json.dumps({"label": "ab"[number % 2]}).encode()
            number += 1
        pack(folder / "shards" / f"{shard}.tar", members)
    (folder / "one.mp4").unlink()
    return folder / "shards"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return grey_videos(tmp_path_factory.mktemp("videos"))


def test_clips_of_shards_are_cut_when_they_are_read(videos):
    streamed, fit, test = stream_clips(counted(videos, frozenset(VIDEO_SUFFIXES)))
    assert len(streamed) + len(test) == 60 and fit.class_names == {"class": ("a", "b")}
    pixels = streamed.read(np.array([3, 40]), frames=2, fps=5, size=16, seed=0, step=0)
    found = np.round((pixels.mean((1, 2, 3, 4)) - 30) / 3).astype(int)
    assert found.tolist() == [int(streamed.names[i][-8:-4]) for i in (3, 40)]
    assert test.classes["class"].tolist() == [int(name[-8:-4]) % 2 for name in test.names]


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import numpy as np, torch
from torch import nn
from jepa_world.commands.image_training import Read, open_shards
from jepa_world.commands.train_vjepa import ClipFlags, Reader, TrainVjepa
from jepa_world.data.clips import Clips
from jepa_world.data.files import Member, Skipped
from jepa_world.data.images import SUFFIXES, Pictures
from jepa_world.data.video import SUFFIXES as VIDEO_SUFFIXES
from jepa_world.methods.world_model import Output
from jepa_world.training import Training, make_accelerator, train

kind, data, folder, stop, workers = sys.argv[1], *map(Path, sys.argv[2:4]), *map(int, sys.argv[4:6])

class Counting(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.file = (folder / f"seen-{rank}").open("a")

    def forward(self, batch, step):
        pixels = batch["pixels"].flatten(1, -2).double()
        if kind == "pictures":
            ids = (256 * pixels[:, 0, 0] + pixels[:, 0, 1]).long().tolist()
        else:
            ids = ((pixels.mean((1, 2)) - 30) / 3).round().long().tolist()
        for number in ids:
            self.file.write(f"{step} {number}\\n")
        self.file.flush()
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return Output(self.w.square(), {}, torch.randn(4, 2))

accelerator = make_accelerator("no", "none", folder)
how = dict(steps=15, batch_size=8, seed=5, log_every=20, checkpoint_every=20)
resume = (folder / "checkpoint" / "training.safetensors").exists()
suffixes = SUFFIXES if kind == "pictures" else VIDEO_SUFFIXES
shards = open_shards(data, suffixes, 8, 0.01, accelerator)
skipped = Skipped(len(shards), kind)
if kind == "pictures":
    config = Training(**how, resume=resume)
    read = Read(Pictures(shards, 8, skipped), 5)
else:
    config = TrainVjepa(**how, resume=resume, clips=ClipFlags(frames=2, fps=5, size=16))
    read = Reader(Clips(shards.names, shards, skipped=skipped), None, config)
train(Counting(accelerator.process_index), read, len(shards), config, accelerator=accelerator,
      run_dir=folder, sizes=shards.sizes, workers=workers)
"""


def launch(folder, kind, data, *, processes, workers, stop=99):
    """Run two epochs of 60 samples in batches of 8; return what was seen: step -> numbers."""
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += [f"--nproc_per_node={processes}", folder / "script.py", kind, data, folder]
    environment = os.environ | ON_CPU | {"OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*map(str, [*line, stop, workers])], env=environment, capture_output=True, text=True
    )
    seen = {}
    for process in range(processes):
        for text in (folder / f"seen-{process}").read_text().splitlines():
            step, number = map(int, text.split())
            seen.setdefault(step, []).append(number)
    return done, seen


@pytest.mark.parametrize("kind", ["pictures", pytest.param("videos", marks=pytest.mark.slow)])
def test_two_processes_of_two_workers_see_every_sample_once_an_epoch_and_resume_within_a_shard(
    kind, folder, videos, tmp_path
):
    """Stopped after step 4, in the middle of shards; the numbers come from decoded pixels."""
    data = folder if kind == "pictures" else videos
    done, first = launch(tmp_path / "run", kind, data, processes=2, workers=2, stop=4)
    assert "stopped after step 5 of 15" in done.stderr and sorted(first) == list(range(5))
    done, seen = launch(tmp_path / "run", kind, data, processes=2, workers=2)
    assert done.returncode == 0, done.stderr
    assert sorted(seen) == list(range(15)) and all(len(step) == 8 for step in seen.values())
    stream = [number for step in range(15) for number in seen[step]]
    assert sorted(stream) == sorted([*range(60), *range(60)])
    assert sorted(stream[:56]) == sorted(set(stream[:56]))  # the first 7 steps: one epoch
    expected = sharded_index(np.array(SIZES), 8, 5, np.arange(120)).reshape(15, 8)
    for step in range(15):
        assert sorted(seen[step]) == sorted(expected[step].tolist())


def test_counting_is_divided_and_known_to_all(folder):
    shards = open_shards(folder, SUFFIXES, 8, 0.01, make_accelerator("no", "none", folder))
    assert shards.sizes.tolist() == list(SIZES) and shards.most_open == 10


def test_commands_train_on_shards(call, folder, videos, tmp_path):
    few = ("--steps", 3, "--batch-size", 8, "--checkpoint-every", 2, "--precision", "no")
    words = (*few, "--data", folder / "shard-{000000..000007}.tar", "--run-dir", tmp_path / "i")
    words += ("--image-size", 16, "--encoder.width", 16, "--reading.workers", 1)
    done = call("train_lejepa", *words)
    assert done.code == 0, done.stderr
    results = json.loads((tmp_path / "i" / "results.json").read_text())
    assert results["probe"]["trained"].keys() == {"linear class"}
    words = (*few, "--data", videos, "--run-dir", tmp_path / "v", "--clips.size", 16)
    words += ("--clips.frames", 2, "--clips.fps", 5, "--encoder.dim", 32, "--encoder.depth", 1)
    words += ("--encoder.heads", 2, "--encoder.patch", 4, "--masked-predictor.width", 16)
    done = call("train_vjepa", *words, "--clips.workers", 1)
    assert done.code == 0, done.stderr
    results = json.loads((tmp_path / "v" / "results.json").read_text())
    assert results["probe"]["trained"].keys() == {"class"}
    words = (*words, "--data", videos / "*.tar", "--clips.cache")
    assert "shards are not listed" in call("train_vjepa", *words).complaint()
