import io
import tarfile
from typing import Any

import numpy as np
import pytest
import torch

from jepa_world.data.clips import hold_out, load_clips, square
from jepa_world.data.video import write_video
from jepa_world.registry import UserError

CLIP = {"frames": 4, "fps": 10, "size": 32}
FPS, COUNT = 20, 30


def counting(offset=0, count=COUNT, height=48, width=64):
    """Return frames whose brightness tells their number."""
    levels = np.arange(count) * 6 + 30 + offset
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).astype(np.uint8)


def numbers_of(pixels, offset=0):
    """Return the numbers of the frames (... hh ww 3) that `counting` made."""
    return np.round((pixels.mean((-1, -2, -3)) - 30 - offset) / 6).astype(int)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of three and two videos."""
    made = tmp_path_factory.mktemp("videos")
    for name in ("left/a", "left/b", "left/c", "right/d", "right/e"):
        write_video(made / f"{name}.mp4", counting(), fps=FPS)
    return made


@pytest.fixture
def clips(folder):
    return load_clips(folder)


@pytest.fixture
def mixed(folder, tmp_path):
    """Make a folder of copies of a video; in the place of None, and of given bytes elsewhere."""

    def make(*contents):
        whole = (folder / "left" / "a.mp4").read_bytes()
        (tmp_path / "mixed").mkdir()
        for i, content in enumerate(contents):
            path = tmp_path / "mixed" / f"{i:02d}.mp4"
            path.write_bytes(whole if content is None else content)
        return tmp_path / "mixed"

    return make


def test_the_folder_a_file_lies_in_is_its_class(clips):
    assert clips.names == tuple(
        f"{n}.mp4" for n in ("left/a", "left/b", "left/c", "right/d", "right/e")
    )
    assert clips.classes["class"].tolist() == [0, 0, 0, 1, 1]
    assert clips.class_names == {"class": ("left", "right")} and not clips.skipped


def test_a_clip_has_the_frames_of_its_times(clips):
    pixels = clips.read(np.array([0, 3]), **CLIP, seed=0, step=0)
    assert pixels.shape == (2, 4, 32, 32, 3) and pixels.dtype == np.uint8
    numbers = numbers_of(pixels)
    assert np.all(np.diff(numbers, axis=1) == 2) and numbers.min() >= 0 and numbers.max() < COUNT


def test_a_clip_is_a_function_of_seed_step_and_sample_alone(clips):
    together = clips.read(np.arange(5), **CLIP, seed=3, step=7)
    alone = clips.read(np.array([4, 1]), **CLIP, seed=3, step=7)
    np.testing.assert_array_equal(alone, together[[4, 1]])
    begins = {
        tuple(numbers_of(clips.read(np.arange(5), **CLIP, seed=seed, step=step))[:, 0])
        for seed, step in [(3, 7), (3, 8), (4, 7)]
    }
    assert len(begins) == 3


def test_beginnings_are_uniform_over_the_video(clips):
    begins = np.array(
        [numbers_of(clips.read(np.array([0]), **CLIP, seed=0, step=s))[0, 0] for s in range(60)]
    )
    last = COUNT - 4 * FPS // 10
    assert begins.min() <= 2 and begins.max() >= last - 2 and begins.max() <= last
    assert abs(begins.mean() - last / 2) < 3


def test_the_middle_clip_is_in_the_middle(clips):
    numbers = numbers_of(clips.read_middle(np.array([0, 4]), **CLIP))
    np.testing.assert_array_equal(numbers, [[11, 13, 15, 17]] * 2)


def test_the_last_frame_of_a_short_video_is_repeated(clips):
    numbers = numbers_of(clips.read(np.array([0]), frames=8, fps=4, size=16, seed=0, step=0))
    assert numbers.tolist() == [[0, 5, 10, 15, 20, 25, 29, 29]]


def test_clips_from_memory_are_those_from_files(clips):
    cached = clips.cached(size=32)
    for step in range(4):
        words = {**CLIP, "seed": 1, "step": step}
        expected = clips.read(np.arange(5), **words)
        np.testing.assert_array_equal(cached.read(np.arange(5), **words), expected)
    some = cached.take(np.array([4, 0]))
    np.testing.assert_array_equal(some.read_middle(np.arange(2), **CLIP)[0],
                                  clips.read_middle(np.array([4]), **CLIP)[0])  # fmt: skip


def test_a_cache_says_what_it_cannot_do(clips):
    with pytest.raises(UserError, match="more than 200000 bytes: raise the limit, lower the size"):
        clips.cached(size=32, at_most=200_000)
    with pytest.raises(UserError, match="clips of 16 pixels were asked for, 32 are in memory"):
        clips.cached(size=32).read_middle(np.array([0]), frames=2, fps=5, size=16)


def test_taking_and_holding_out_keep_names_and_labels_together(clips):
    some = clips.take(np.array([3, 0]))
    assert some.names == ("right/d.mp4", "left/a.mp4") and len(some) == 2
    assert some.classes["class"].tolist() == [1, 0]
    kept, held = hold_out(clips, share=0.4)
    assert held.names == ("left/a.mp4", "right/e.mp4") and len(kept) == 3
    assert hold_out(clips, share=0.4)[1].names == held.names


def test_a_video_that_cannot_be_read_is_named_and_replaced(mixed, caplog):
    clips = load_clips(mixed(None, b"garbage" * 99, *[None] * 8))
    words = {**CLIP, "seed": 0, "step": 0}
    pixels, drawn = clips.draw(np.arange(3), **words)
    assert drawn[1] != 1 and drawn[[0, 2]].tolist() == [0, 2]
    assert list(clips.skipped.reasons) == ["01.mp4"] and "'01.mp4' cannot be read" in caplog.text
    assert np.all(np.diff(numbers_of(pixels), axis=1) == 2)
    alone, again = clips.draw(np.array([1]), **words)
    assert again[0] == drawn[1] and len(clips.skipped) == 1
    np.testing.assert_array_equal(alone[0], pixels[1])
    assert clips.draw_middle(np.array([1]), **CLIP)[1][0] != 1


def test_a_cache_leaves_out_what_cannot_be_read(mixed):
    cached = load_clips(mixed(None, b"garbage" * 99, *[None] * 8)).cached(size=16)
    assert len(cached) == 9 and "01.mp4" not in cached.names
    assert list(cached.skipped.reasons) == ["01.mp4"]


def test_a_cut_video_is_replaced_where_it_does_not_decode(folder, mixed):
    whole = (folder / "left" / "a.mp4").read_bytes()
    clips = load_clips(mixed(None, whole[: len(whole) // 2], *[None] * 8))
    assert clips.draw(np.array([1]), **CLIP, seed=0, step=0)[1].tolist() != [1]


def test_too_many_that_cannot_be_read_end_in_one_line(mixed):
    clips = load_clips(mixed(None, *[b"garbage"] * 14))
    with pytest.raises(
        UserError, match=r"2 of 15 videos of .* cannot be used, more than 1.00%: 01.mp4 .*02.mp4"
    ):
        clips.read(np.arange(15), **CLIP, seed=0, step=0)


def test_empty_files_are_skipped_and_named(mixed):
    clips = load_clips(mixed(None, b"", None, b"", *[None] * 16))
    assert len(clips) == 18
    assert clips.skipped.reasons == {"01.mp4": "it is empty", "03.mp4": "it is empty"}


def test_links_that_lead_nowhere_are_skipped_and_folders_are_no_videos(mixed):
    folder = mixed(*[None] * 9)
    (folder / "gone.mp4").symlink_to(folder / "nothing")
    (folder / "folder.mp4").mkdir()
    clips = load_clips(folder)
    assert len(clips) == 9 and clips.skipped.reasons == {"gone.mp4": "it does not exist"}


def test_what_holds_no_video_is_refused(mixed, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no videos in .*empty': looked for .*mp4"):
        load_clips(tmp_path / "empty")
    with pytest.raises(
        UserError, match=r"no videos at .*nowhere': give a folder, a tar, or a list"
    ):
        load_clips(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"1 of 2 .*cannot be used, .*: 01.mp4 \(it is empty\)"):
        load_clips(mixed(b"garbage", b""))


def pack(path, folder, *, names=None, mode: Any = "w"):
    with tarfile.open(path, mode) as archive:
        for file in sorted(folder.rglob("*.mp4")):
            name = file.relative_to(folder).as_posix()
            member = tarfile.TarInfo((names or {}).get(name, name))
            member.size = file.stat().st_size
            archive.addfile(member, io.BytesIO(file.read_bytes()))
    return path


def test_a_tar_is_the_folder_it_was_made_of(folder, clips, tmp_path):
    packed = load_clips(pack(tmp_path / "videos.tar", folder))
    assert packed.names == clips.names and packed.class_names == clips.class_names
    words = {**CLIP, "seed": 0, "step": 0}
    for backend in ("pyav", "decord"):
        read = load_clips(tmp_path, backend=backend).read(np.arange(5), **words)
        np.testing.assert_array_equal(read, clips.read(np.arange(5), **words))


def test_a_compressed_or_broken_tar_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="cannot be read as a tar of videos that is not compressed"):
        load_clips(pack(tmp_path / "videos.tar.gz", folder, mode="w:gz"))
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match="cannot be read as a tar"):
        load_clips(tmp_path / "broken.tar")


def test_no_name_leads_out_of_a_tar(folder, tmp_path):
    out = {"left/a.mp4": "../../a.mp4", "left/b.mp4": "/tmp/b.mp4", "left/c.mp4": "x/../../c.mp4"}
    path = pack(tmp_path / "evil.tar", folder, names=out)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("right/link.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, str(folder / "left" / "a.mp4")
        archive.addfile(link)
    clips = load_clips(path, bad_share=0.6)
    assert clips.names == ("right/d.mp4", "right/e.mp4") and len(clips.skipped) == 3
    assert "its name leads out" in clips.skipped.reasons["../../a.mp4"]


def test_a_list_has_paths_and_labels(folder):
    text = "left/a.mp4 3\nright/d.mp4\t10\n\nright/e.mp4 3\n"
    (folder / "list.txt").write_text(text)
    clips = load_clips(folder / "list.txt")
    assert clips.names == ("left/a.mp4", "right/d.mp4", "right/e.mp4")
    assert clips.classes["class"].tolist() == [3, 10, 3] and clips.class_names == {}
    (folder / "list.txt").write_text(text.replace("3", "jump up").replace("10", "sit"))
    clips = load_clips(folder / "list.txt")
    assert clips.classes["class"].tolist() == [0, 1, 0]
    assert clips.class_names == {"class": ("jump up", "sit")}


def test_a_list_may_lack_labels_and_files(folder, tmp_path):
    (tmp_path / "list.txt").write_text(f"{folder}/left/a.mp4\nwith space.mp4\n")
    (tmp_path / "with space.mp4").write_bytes((folder / "left" / "b.mp4").read_bytes())
    clips = load_clips(tmp_path / "list.txt")
    assert len(clips) == 2 and clips.classes == {}
    (tmp_path / "list.txt").write_text(f"{folder}/left/a.mp4 up\nnone.mp4 down\n")
    found = load_clips(tmp_path / "list.txt", bad_share=0.5)
    assert found.skipped.reasons == {"none.mp4": "it does not exist"}
    (tmp_path / "list.txt").write_text(f"{folder}/left/a.mp4 up\nnone.mp4\n")
    with pytest.raises(UserError, match=r"'none.mp4' has no label, others have"):
        load_clips(tmp_path / "list.txt")


def test_a_csv_has_columns_of_classes_and_numbers(folder):
    path = folder / "table.csv"
    path.write_text("motion,path,speed,label\nup,left/a.mp4,0.5,7\ndown,right/d.mp4,2,9\n")
    clips = load_clips(path)
    assert clips.names == ("left/a.mp4", "right/d.mp4")
    assert {k: v.tolist() for k, v in clips.classes.items()} == {"motion": [1, 0], "label": [7, 9]}
    assert clips.class_names == {"motion": ("down", "up")}
    assert clips.values["speed"].tolist() == [[0.5], [2.0]]
    path.write_text("file,label\nleft/a.mp4,7\n")
    with pytest.raises(UserError, match="no column `path` in its first line"):
        load_clips(path)
    path.write_text("path,label\nleft/a.mp4\n")
    with pytest.raises(UserError, match="row 2 has 1 columns, expected 2"):
        load_clips(path)


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_of_a_loader_read_what_one_process_reads(clips, context):
    words = {**CLIP, "seed": 5, "step": 2}
    expected = clips.read(np.arange(5), **words)  # readers used here first
    batches = torch.utils.data.DataLoader(
        Reading(clips, words),
        batch_size=None,
        sampler=[[0, 1], [2, 3], [4]],
        num_workers=2,
        multiprocessing_context=context,
    )
    np.testing.assert_array_equal(torch.cat(list(batches)).numpy(), expected)


class Reading(torch.utils.data.Dataset):
    """Whole batches of clips; `index` is the number of a batch."""

    def __init__(self, clips, words):
        self.clips, self.words = clips, words

    def __getitem__(self, index):
        return self.clips.read(np.array(index), **self.words)


def test_frames_are_cut_to_their_middle_square():
    frames = np.zeros((2, 8, 12, 3), np.uint8)
    frames[:, :, 2:10] = 200
    np.testing.assert_array_equal(square(frames, 8), np.full((2, 8, 8, 3), 200))
    np.testing.assert_array_equal(square(frames, 4), np.full((2, 4, 4, 3), 200))
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[:, None, None] * 4, (1, 64, 64, 3))
    np.testing.assert_allclose(square(ramp.copy(), 16)[0, :, 0, 0], np.arange(16) * 16 + 6, atol=3)


def test_beginnings_do_not_depend_on_the_library(clips, folder):
    words = {**CLIP, "seed": 2, "step": 0}
    with_decord = load_clips(folder, backend="decord").read(np.arange(5), **words)
    np.testing.assert_array_equal(with_decord, clips.read(np.arange(5), **words))
