import doctest
import io
import pickle
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from PIL import Image

import jepa_world.data.trajectories
from jepa_world.data.trajectories import Trajectories, write_shard
from jepa_world.data.video import write_video
from jepa_world.registry import UserError


def episode(frames, seed, size=8):
    generator = np.random.default_rng(seed)
    action = generator.standard_normal((frames, 2)).astype(np.float32)
    action[-1] = 0.0
    return {
        "pixels": generator.integers(0, 256, (frames, size, size, 3), dtype=np.uint8),
        "action": action,
        "state": generator.standard_normal((frames, 4)),
    }


EPISODES = [episode(frames, seed) for seed, frames in enumerate((5, 9, 3, 7))]
FIRST_FRAMES = np.array([0, 5, 14, 17])


@pytest.fixture
def store(tmp_path):
    write_shard(tmp_path / "shard-00000.h5", EPISODES[:3])
    write_shard(tmp_path / "shard-00001.h5", EPISODES[3:])
    return tmp_path


def foreign(path, **columns):
    """Write a file as another tool would; a column given as None is left out."""
    rows = {name: np.concatenate([e[name] for e in EPISODES]) for name in EPISODES[0]}
    lengths = np.array([len(e["action"]) for e in EPISODES])
    index = {"ep_len": lengths, "ep_offset": np.cumsum(lengths) - lengths}
    with h5py.File(path, "w") as file:
        for name, column in (rows | index | columns).items():
            if column is not None:
                file[name] = column
    return path


def assert_same_windows(left, right, length=3):
    np.testing.assert_array_equal(left.windows(length), right.windows(length))
    ours = left.read(left.windows(length), length)
    theirs = right.read(right.windows(length), length)
    for name in ("pixels", "action", "state"):
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_examples_in_docstrings_hold():
    assert doctest.testmod(jepa_world.data.trajectories).failed == 0


def test_what_is_written_is_read(store):
    data = Trajectories(store)
    assert (data.num_episodes, data.action_dim, data.frame_shape) == (4, 2, (8, 8, 3))
    np.testing.assert_array_equal(data.lengths, [5, 9, 3, 7])
    for first, expected in zip(FIRST_FRAMES, EPISODES, strict=True):
        batch = data.read(np.array([first]), length=len(expected["action"]))
        for name, column in expected.items():
            np.testing.assert_array_equal(batch[name][0], column)
            assert batch[name].dtype == column.dtype


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (4, 1), (3, 2), (8, 1)])
def test_windows_are_all_those_within_an_episode(store, length, stride):
    data = Trajectories(store)
    span = (length - 1) * stride + 1
    expected = [
        first + offset
        for first, frames in zip(FIRST_FRAMES, data.lengths, strict=True)
        for offset in range(frames - span + 1)
    ]
    np.testing.assert_array_equal(data.windows(length, stride), expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_files_and_cache_give_the_same_batches(store, stride):
    cached, from_files = Trajectories(store), Trajectories(store, cache_bytes=0)
    starts = np.random.default_rng(0).permutation(cached.windows(3, stride))
    ours, theirs = (data.read(starts, 3, stride) for data in (cached, from_files))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_stride_puts_the_actions_between_two_frames_side_by_side(store):
    batch = Trajectories(store).read(np.array([5, 8]), length=3, stride=3)
    action, pixels = EPISODES[1]["action"], EPISODES[1]["pixels"]
    np.testing.assert_array_equal(batch["pixels"][0], pixels[[0, 3, 6]])
    np.testing.assert_array_equal(batch["action"][0, 1], action[3:6].reshape(-1))
    beyond = np.concatenate([action[6:9], np.zeros((0, 2))]).reshape(-1)
    np.testing.assert_array_equal(batch["action"][0, 2], beyond)


def test_actions_beyond_the_end_of_an_episode_are_zero(store):
    batch = Trajectories(store).read(np.array([14]), length=2, stride=2)
    np.testing.assert_array_equal(batch["action"][0, 1], np.zeros(4))


def test_datasets_that_are_also_read_lie_in_front(store, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_shard(other / "shard-00000.h5", [episode(6, 9)])
    data = Trajectories(store, also=[other])
    assert data.lengths.tolist() == [6, 5, 9, 3, 7] and f"and {other}" in data.origin
    batch = data.read(np.array([0, 6]), 5)
    for name, rows in batch.items():
        np.testing.assert_array_equal(rows[0], episode(6, 9)[name][:5])
        np.testing.assert_array_equal(rows[1], EPISODES[0][name])
    assert data.split(0.2)[1].lengths.tolist() == [7]


@pytest.mark.parametrize("what", ["env", "action", "size", "incomplete", "missing"])
def test_datasets_of_another_kind_are_not_read_together(store, tmp_path_factory, what):
    other = tmp_path_factory.mktemp("other") / "data"
    rows = episode(6, 9, size=16 if what == "size" else 8)
    if what == "action":
        rows["action"] = np.zeros((6, 3), np.float32)
    settings = {"env": "b", "episodes": 2 if what == "incomplete" else 1}
    if what != "missing":
        other.mkdir()
        (other / "dataset.yaml").write_text(yaml.safe_dump({"settings": settings}))
        write_shard(other / "shard-00000.h5", [rows])
    named = {"settings": {"env": "a" if what == "env" else "b"}}
    (store / "dataset.yaml").write_text(yaml.safe_dump(named))
    message = {
        "env": "was collected in 'b', .* in 'a'",
        "action": r"has rows of \(3,\) where .* has \(2,\)",
        "size": "frames",
        "incomplete": "holds 1 of 2 episodes",
        "missing": "does not exist",
    }
    with pytest.raises(UserError, match=message[what]):
        Trajectories(store, also=[other])


def test_split_holds_out_the_last_episodes_and_leaves_no_frame_twice(store):
    training, held_out = Trajectories(store).split(0.25)
    assert (training.num_episodes, held_out.num_episodes) == (3, 1)
    np.testing.assert_array_equal(held_out.lengths, [7])
    both = np.concatenate([training.windows(1), held_out.windows(1)])
    np.testing.assert_array_equal(both, np.arange(24))


def test_action_statistics_are_those_of_the_steps_of_the_split(store):
    training, _ = Trajectories(store).split(0.25)
    steps = np.concatenate([e["action"][:-1] for e in EPISODES[:3]])
    np.testing.assert_allclose(training.action_mean, steps.mean(0), rtol=1e-5)
    np.testing.assert_allclose(training.action_std, steps.std(0), rtol=1e-5)


def test_columns_asked_for_are_those_of_the_batch(store):
    batch = Trajectories(store, columns=["state"]).read(np.array([0]), 2)
    assert set(batch) == {"state"}


@pytest.mark.parametrize("cache_bytes", [0, 2**30])
def test_a_pickled_reader_reads_on(store, cache_bytes):
    data = Trajectories(store, cache_bytes=cache_bytes)
    data.read(data.windows(3)[:1], 3)
    assert_same_windows(pickle.loads(pickle.dumps(data)), data)


def test_jpeg_frames_are_close(tmp_path):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    frames = np.broadcast_to(ramp[:, None], (4, 64, 64, 3)).copy()
    smooth = {"pixels": frames, "action": np.zeros((4, 2), np.float32)}
    write_shard(tmp_path / "shard-00000.h5", [smooth], jpeg=True)
    data = Trajectories(tmp_path, cache_bytes=0)
    assert data.frame_shape == (64, 64, 3)
    read = data.read(np.array([0]), 4)["pixels"][0]
    assert np.abs(read.astype(int) - frames).max() <= 3


def test_jpeg_frames_are_what_pillow_opens(tmp_path):
    write_shard(tmp_path / "a.h5", EPISODES[:1], jpeg=True)
    with h5py.File(tmp_path / "a.h5") as file:
        column: Any = file["pixels"]
        stored = column[0].tobytes()
    with Image.open(io.BytesIO(stored)) as picture:
        assert (picture.format, picture.size) == ("JPEG", (8, 8))


def test_foreign_file_reads_like_the_store(store, tmp_path_factory):
    path = foreign(tmp_path_factory.mktemp("foreign") / "expert.h5", ep_offset=None)
    assert_same_windows(Trajectories(path), Trajectories(store))


def test_foreign_channels_first_and_nan_at_episode_ends_read_like_the_store(
    store, tmp_path_factory
):
    pixels = np.concatenate([e["pixels"] for e in EPISODES]).transpose(0, 3, 1, 2)
    action = np.concatenate([e["action"] for e in EPISODES])
    action[FIRST_FRAMES[1:] - 1] = np.nan
    folder = tmp_path_factory.mktemp("foreign")
    foreign(folder / "expert.h5", pixels=pixels, action=action.astype(np.float64))
    for cache_bytes in (0, 2**30):
        assert_same_windows(Trajectories(folder, cache_bytes=cache_bytes), Trajectories(store))


def test_folder_of_videos_reads(tmp_path):
    for name, seed in (("b", 1), ("a", 0)):
        colours = np.random.default_rng(seed).integers(0, 256, (6, 1, 1, 3))
        frames = np.broadcast_to(colours, (6, 32, 32, 3)).astype(np.uint8)
        write_video(tmp_path / f"{name}.mp4", frames, fps=10)
        np.savez(tmp_path / f"{name}.npz", action=np.full((5, 2), seed, np.float32))
    cached, from_files = Trajectories(tmp_path), Trajectories(tmp_path, cache_bytes=0)
    np.testing.assert_array_equal(cached.lengths, [6, 6])
    batch = from_files.read(np.array([2, 7]), 3)
    np.testing.assert_array_equal(batch["pixels"], cached.read(np.array([2, 7]), 3)["pixels"])
    np.testing.assert_array_equal(batch["action"][:, 0, 0], [0, 1])
    np.testing.assert_array_equal(cached.read(np.array([5]), 1)["action"], [[[0, 0]]])


def changed(name, row, value):
    column = np.concatenate([e[name] for e in EPISODES])
    column[row] = value
    return {name: column}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            changed("action", (6, 1), np.nan),
            r"1 of 4 episodes .*: episode 1 \(action is not finite in row 1\)",
        ),
        (changed("state", 17, np.inf), r"episode 3 \(state is not finite in row 0\)"),
        ({"action": None}, "no column 'action'; columns there: pixels, state"),
        ({"ep_len": None}, "HDF5 of no layout known here: it has action, .*; expected ep_len"),
        (
            {"ep_len": np.array([5, 9, 3]), "ep_offset": None},
            "action has 24 rows, its episodes 17 frames",
        ),
        ({"action": np.zeros((23, 2))}, "action has 23 rows, its episodes 24 frames"),
        ({"ep_len": np.array([5, 9, 0, 10])}, "episode 2 has no frames"),
        ({"ep_len": np.zeros(0, int)}, "has no episodes"),
        ({"ep_offset": np.array([0, 6, 14, 17])}, "ep_offset does not follow from ep_len"),
        (
            {"pixels": np.zeros((24, 8, 8, 3))},
            "no column of pictures, which are bytes .*; columns there: action, pixels, state",
        ),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, columns, message):
    path = foreign(tmp_path / "bad.h5", **columns)
    with pytest.raises(UserError, match=message) as refused:
        Trajectories(path)
    assert "bad.h5" in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_column_that_was_asked_for_is_named(store):
    with pytest.raises(UserError, match="no column 'proprio'; columns there: action"):
        Trajectories(store, columns=["pixels", "proprio"])


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.9])
def test_a_truncated_shard_is_named(store, kept):
    shard = store / "shard-00001.h5"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(UserError, match=r"shard-00001\.h5 is damaged or cut short"):
        Trajectories(store)


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        Trajectories(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no \.h5 file"):
        Trajectories(tmp_path)


def test_an_unfinished_collection_is_refused(store):
    (store / "dataset.yaml").write_text(yaml.safe_dump({"settings": {"episodes": 9}}))
    with pytest.raises(UserError, match="4 of 9 episodes: an interrupted command"):
        Trajectories(store)
    for shard in store.glob("*.h5"):
        shard.unlink()
    with pytest.raises(UserError, match="0 of 9 episodes: an interrupted command"):
        Trajectories(store)


def test_shards_of_different_frames_are_refused(store):
    write_shard(store / "shard-00002.h5", [episode(4, 9, size=16)])
    with pytest.raises(UserError, match=r"shard-00002.h5 has frames \(16, 16, 3\)"):
        Trajectories(store)


def test_a_video_without_its_actions_is_refused(tmp_path):
    write_video(tmp_path / "a.mp4", np.zeros((3, 16, 16, 3), np.uint8), fps=10)
    with pytest.raises(UserError, match=r"no a\.npz beside it"):
        Trajectories(tmp_path)
    np.savez(tmp_path / "a.npz", action=np.zeros((9, 2)))
    with pytest.raises(UserError, match="action has 9 rows"):
        Trajectories(tmp_path)


def test_one_episode_cannot_be_split(tmp_path):
    write_shard(tmp_path / "a.h5", EPISODES[:1])
    with pytest.raises(UserError, match="too few to hold one out"):
        Trajectories(tmp_path).split(0.1)
