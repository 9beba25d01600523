import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from jepa_world.data.clips import hold_out, load_clips, square
from jepa_world.data.video import read_video, write_video
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
def spoiled(folder, tmp_path):
    """Return a copy of the folder's first video as several files, some of them spoiled."""

    def make(*contents):
        whole = (folder / "left" / "a.mp4").read_bytes()
        for i, content in enumerate(contents):
            path = tmp_path / "mixed" / f"{i:02d}.mp4"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(whole if content is None else content)
        return tmp_path / "mixed"

    return make


def test_the_folder_a_file_lies_in_is_its_class(clips):
    assert clips.names == tuple(
        f"{n}.mp4" for n in ("left/a", "left/b", "left/c", "right/d", "right/e")
    )
    assert clips.classes["class"].tolist() == [0, 0, 0, 1, 1]
    assert clips.class_names == {"class": ("left", "right")} and clips.skipped == ()


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
