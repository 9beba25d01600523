import doctest

import numpy as np
import pytest

import jepa_world.data.motion
from jepa_world.data.clips import load_clips
from jepa_world.data.motion import MOTIONS, letters, motion_clips, write_motion_clips


def clip(name, seed=0, frames=16):
    """Return the clip of one letter in a motion."""
    items = letters(1, seed=2).pixels[..., 0]
    return motion_clips(items, np.array([MOTIONS.index(name)]), seed=seed, frames=frames)[0, ..., 0]


def centre(frames):
    """Return the places of the brightness on the torus, as angles of rows and of columns."""
    angle = 2 * np.pi * (np.arange(48) + 0.5) / 48
    turned = np.exp(1j * angle)
    rows, columns = frames.sum(2) @ turned, frames.sum(1) @ turned
    return np.angle(rows), np.angle(columns)


def moved(angles):
    """Return the movement between frames, the short way round."""
    return np.angle(np.exp(1j * np.diff(angles)))


def test_examples_in_docstrings_hold():
    assert doctest.testmod(jepa_world.data.motion).failed == 0


@pytest.mark.parametrize(
    ("name", "rows", "columns"), [("left", 0, -1), ("right", 0, 1), ("up", -1, 0), ("down", 1, 0)]
)
def test_an_item_goes_where_its_motion_says(name, rows, columns):
    step = 2 * np.pi * 2 / 48  # two pixels of the torus
    down, right = (moved(angles) for angles in centre(clip(name).astype(float)))
    np.testing.assert_allclose(down, rows * step, atol=0.03)
    np.testing.assert_allclose(right, columns * step, atol=0.03)


def test_what_turns_or_stays_does_not_move():
    for name in ("static", "clockwise", "counterclockwise"):
        for angles in centre(clip(name).astype(float)):
            assert np.abs(moved(angles)).max() < 0.15, name
    assert (clip("static") == clip("static")[:1]).all()
    assert not (clip("clockwise")[0] == clip("clockwise")[1]).all()


def test_what_turns_comes_round_in_thirty_frames():
    frames = clip("clockwise", frames=31).astype(int)
    assert np.abs(frames[30] - frames[0]).max() <= 1
    backwards = clip("counterclockwise", frames=31).astype(int)
    assert np.abs(backwards[30 - 4] - frames[4]).max() <= 1


def test_growing_is_shrinking_backwards_and_comes_round():
    grown, shrunk = (clip(name, frames=17).astype(int) for name in ("grow", "shrink"))
    assert np.abs(grown[16] - grown[0]).max() <= 1
    assert np.abs(grown[5] - shrunk[16 - 5]).max() <= 1


def test_a_single_frame_does_not_tell_the_motion():
    """The first frames of all motions are the same: places, angles and sizes are drawn alike."""
    first = [clip(name)[0] for name in MOTIONS]
    assert all((frame == first[0]).all() for frame in first)


def test_letters_are_told_apart_and_no_two_are_alike():
    images = letters(200, seed=0)
    assert set(images.classes["class"]) == set(range(10))
    assert len(np.unique(images.pixels.reshape(200, -1), axis=0)) == 200
    assert (images.pixels.max((1, 2, 3)) > 100).all()


def test_written_clips_are_read_with_their_labels(tmp_path):
    listed = write_motion_clips(tmp_path / "train", letters(12, seed=0), seed=0)
    clips = load_clips(listed)
    assert len(clips) == 12 and sorted(clips.classes) == ["content", "motion"]
    assert set(clips.class_names["motion"]) == set(MOTIONS)
    pixels = clips.read_middle(np.arange(12), frames=16, fps=8.0, size=48)
    number = clips.class_names["motion"].index("static")
    still = pixels[clips.classes["motion"] == number].astype(int)
    assert len(still) and np.abs(still - still[:, :1]).max() < 12
    others = pixels[clips.classes["motion"] != number].astype(int)
    assert (np.abs(others - others[:, :1]).max((1, 2, 3, 4)) > 50).all()
