import importlib.util
import json
import pickle
import shutil
import sys
from functools import partial
from typing import Any

import av
import foreign_layouts as layouts
import h5py
import numpy as np
import pytest

from jepa_world.data.trajectories import Trajectories
from jepa_world.registry import UserError

needs_pyarrow = pytest.mark.skipif(
    not importlib.util.find_spec("pyarrow"), reason="needs pyarrow, as jepa-world[parquet] brings"
)
LENGTHS = (5, 7, 6, 9, 5, 6, 8, 5, 7, 6, 5)  # more than ten: demo_10 comes behind demo_9


def episode(frames, seed, size=32):
    """Return an episode every frame of which has a colour of its own."""
    generator = np.random.default_rng(seed)
    level = 20 + 8 * np.arange(frames)[:, None, None, None] + 10 * seed
    pixels = np.broadcast_to(level, (frames, size, size + 16, 3)).astype(np.uint8)
    pixels = pixels + np.array([0, 30, 15], np.uint8)
    action = generator.uniform(-1, 1, (frames, 2)).astype(np.float32)
    action[-1] = 0.0
    state = generator.standard_normal((frames, 4)).astype(np.float32)
    return {"pixels": pixels, "action": action, "state": state}


EPISODES = [episode(frames, seed) for seed, frames in enumerate(LENGTHS)]


def has_av1():
    try:
        return bool(av.Codec("libsvtav1", "w"))
    except ValueError:
        return False


def with_marks(written, *marks):
    return [pytest.param(*pair, id=name, marks=marks) for name, pair in written.items()]


av1 = partial(layouts.write_lerobot_v3, codec="libsvtav1")
VARIANTS = {
    "Minari, JPEG": ("minari_jpeg", partial(layouts.write_minari, jpeg=True)),
    "OGBench, stored": ("stored.npz", partial(layouts.write_ogbench, compressed=False)),
}
ARROW_VARIANTS = {
    "Minari (parquet)": ("minari_parquet", partial(layouts.write_minari_arrow, kind="parquet")),
    "LeRobot v2.1, PNG": ("lerobot2_png", partial(layouts.write_lerobot_v2, embedded=True)),
    "LeRobot v3.0, PNG": ("lerobot3_png", partial(layouts.write_lerobot_v3, embedded=True)),
}
SOME = [*with_marks(layouts.PLAIN), *with_marks(layouts.ARROW, needs_pyarrow)]
ALL = [
    *SOME,
    *with_marks(VARIANTS),
    *with_marks(ARROW_VARIANTS, needs_pyarrow),
    *with_marks(
        {"LeRobot v3.0, AV1": ("lerobot3_av1", av1)},
        needs_pyarrow,
        pytest.mark.skipif(not has_av1(), reason="no encoder of AV1"),
    ),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write the episodes in a layout, once for all tests that only read them."""
    folder = tmp_path_factory.mktemp("layouts")

    def write_once(name, write):
        path = folder / name
        return path if path.exists() else write(path, EPISODES)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVT_LOG", "0")
        yield write_once


def whole(data, number):
    """Return all rows of an episode."""
    first = np.array([data.lengths[:number].sum()])
    return {name: rows[0] for name, rows in data.read(first, int(data.lengths[number])).items()}


def assert_same_episodes(data, expected=EPISODES):
    np.testing.assert_array_equal(data.lengths, [len(e["action"]) for e in expected])
    for number, one in enumerate(expected):
        rows = whole(data, number)
        np.testing.assert_array_equal(rows["action"], one["action"])
        np.testing.assert_allclose(rows["pixels"].astype(int), one["pixels"], atol=5)
        if "state" in rows:
            np.testing.assert_array_equal(rows["state"], one["state"])


@pytest.mark.parametrize("cache_bytes", [0, 2**30], ids=["files", "memory"])
@pytest.mark.parametrize(("name", "write"), ALL)
def test_a_layout_holds_the_episodes_that_were_written(written, name, write, cache_bytes):
    data = Trajectories(written(name, write), cache_bytes=cache_bytes)
    assert (data.frame_shape, data.action_dim) == ((32, 48, 3), 2)
    assert_same_episodes(data)


@pytest.mark.parametrize(("name", "write"), ALL)
def test_random_windows_are_those_of_memory(written, name, write):
    path = written(name, write)
    cached, from_files = Trajectories(path), Trajectories(path, cache_bytes=0)
    for length, stride in ((4, 1), (2, 2)):
        starts = np.random.default_rng(0).permutation(cached.windows(length, stride))[:12]
        ours, theirs = (data.read(starts, length, stride) for data in (cached, from_files))
        for column in ours:
            np.testing.assert_array_equal(ours[column], theirs[column])


@pytest.mark.parametrize(("name", "write"), ALL)
def test_a_pickled_reader_of_a_layout_reads_on(written, name, write):
    data = Trajectories(written(name, write), cache_bytes=0)
    data.read(np.array([0]), 3)
    assert_same_episodes(pickle.loads(pickle.dumps(data)))


@pytest.mark.parametrize(("name", "write"), SOME)
def test_a_world_model_trains_on_a_layout_as_it_is(
    written, tiny_words, call, tmp_path, name, write
):
    path, folder = written(name, write), tmp_path / "run"
    ended = call("train_world_model", *tiny_words, "--data", path, "--run-dir", folder)
    assert ended.code == 0, ended.stderr
    results = json.loads((folder / "results.json").read_text())
    assert np.isfinite(results["loss"]) and str(path) in ended.stdout


def test_flags_name_the_columns_that_are_trained_on(written, tiny_words, call, tmp_path):
    path = written(*layouts.PLAIN["robomimic"])
    words = ("--columns.pixels", "obs/robot0_eye_in_hand_image", "--columns.action", "states")
    words = (*tiny_words, "--data", path, *words, "--run-dir", tmp_path / "run")
    ended = call("train_world_model", *words)
    assert ended.code == 0, ended.stderr
    assert "pixels from obs/robot0_eye_in_hand_image, action from states" in ended.stdout
    config = tmp_path / "run" / "config.yaml"
    again = call("train_world_model", "--config", config, "--run-dir", tmp_path / "again")
    assert again.code == 0 and "action from states" in again.stdout


def test_a_camera_that_is_named_is_the_one_that_is_read(written):
    path = written(*layouts.PLAIN["robomimic"])
    data = Trajectories(path, pixels="obs/robot0_eye_in_hand_image", action="states")
    np.testing.assert_array_equal(whole(data, 3)["pixels"], EPISODES[3]["pixels"][:, ::-1])
    np.testing.assert_array_equal(whole(data, 3)["action"], EPISODES[3]["state"])


@pytest.mark.parametrize("layout", ["robomimic", "D4RL"])
def test_compressed_chunks_of_many_frames_read_as_well(written, tmp_path, layout):
    source, target = written(*layouts.PLAIN[layout]), tmp_path / "small.hdf5"
    with h5py.File(source) as old, h5py.File(target, "w") as new:

        def copy(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset):
                options: Any = {"compression": "gzip", "chunks": True} if item.ndim == 4 else {}
                new.create_dataset(name, data=item[()], **options)

        old.visititems(copy)
    assert_same_episodes(Trajectories(target, cache_bytes=0))


def test_grey_and_channels_first_pictures_read(tmp_path):
    pixels = np.concatenate([e["pixels"] for e in EPISODES])
    for name, stored, expected in (
        ("grey", pixels[..., 0], pixels[..., :1]),
        ("first", pixels.transpose(0, 3, 1, 2), pixels),
    ):
        path = layouts.write_d4rl(tmp_path / f"{name}.hdf5", EPISODES)
        with h5py.File(path, "r+") as file:
            del file["observations"]
            file["observations"] = stored
        data = Trajectories(path, cache_bytes=0)
        assert data.frame_shape == expected.shape[1:]
        np.testing.assert_array_equal(data.read(np.array([3]), 2)["pixels"][0], expected[3:5])


def test_jpegs_that_happen_to_have_one_length_read(tmp_path):
    path = layouts.write_minari(tmp_path / "minari", EPISODES)
    with h5py.File(path / "data" / "main_data.hdf5", "r+") as file:
        for number, one in enumerate(EPISODES):
            jpeg = np.frombuffer(layouts.as_jpeg(one["pixels"][0]), np.uint8)
            del file[f"episode_{number}/observations/pixels"]
            file[f"episode_{number}/observations/pixels"] = np.stack([jpeg] * len(one["pixels"]))
    frames = whole(Trajectories(path), 2)["pixels"]
    np.testing.assert_allclose(frames.astype(int), EPISODES[2]["pixels"][[0] * 6], atol=5)


def test_steps_behind_the_last_mark_are_an_episode(tmp_path):
    path = layouts.write_d4rl(tmp_path / "d4rl.hdf5", EPISODES)
    with h5py.File(path, "r+") as file:
        timeouts: Any = file["timeouts"]
        timeouts[-1] = False
    assert_same_episodes(Trajectories(path))


def test_the_compact_form_of_ogbench_reads_alike(tmp_path):
    with np.load(layouts.write_ogbench(tmp_path / "a.npz", EPISODES)) as file:
        arrays = dict(file)
    ends = arrays["terminals"].astype(np.float32)
    arrays["valids"] = 1 - ends
    arrays["terminals"] = np.minimum(ends + np.append(ends[1:], 1), 1)
    np.savez(tmp_path / "compact.npz", **arrays)
    assert_same_episodes(Trajectories(tmp_path / "compact.npz"))


def test_a_folder_of_files_is_one_dataset(tmp_path):
    layouts.write_robomimic(tmp_path / "a.hdf5", EPISODES[:4])
    layouts.write_robomimic(tmp_path / "b.hdf5", EPISODES[4:])
    assert_same_episodes(Trajectories(tmp_path))
    layouts.write_d4rl(tmp_path / "c.hdf5", EPISODES[:1])
    with pytest.raises(UserError, match=r"a\.hdf5 is robomimic, c\.hdf5 is D4RL: give one file"):
        Trajectories(tmp_path)


def spoil(path, **changes):
    """Change datasets of an HDF5 file by name, `/` written as two underscores; None deletes."""
    with h5py.File(path, "r+") as file:
        for name, value in changes.items():
            del file[name.replace("__", "/")]
            if value is not None:
                file[name.replace("__", "/")] = value


N = sum(LENGTHS)
NAN = np.full((5, 2), np.nan)


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("robomimic", {"data__demo_0": None}, None),
        ("robomimic", {"data__demo_3__obs": None}, "no 'data/demo_3/obs/agentview_image', which"),
        ("robomimic", {"data__demo_0__obs": None}, "no 'data/demo_0/obs'; there: actions, dones"),
        ("robomimic", {"data": 3}, "has no group demo_0"),
        ("robomimic", {"data__demo_1__actions": None}, "no 'data/demo_1/actions'"),
        (
            "robomimic",
            {"data__demo_1__obs__agentview_image": np.zeros((3, 32, 48, 3), np.uint8)},
            "data/demo_1/obs/agentview_image has 3 rows, expected 7: one a frame",
        ),
        (
            "robomimic",
            {"data__demo_0__actions": NAN, "data__demo_1__actions": np.full((7, 2), np.nan)},
            r"2 of 11 episodes .*: episode 0 \(actions is not finite in row 0\), episode 1",
        ),
        ("D4RL", {"actions": None}, "no 'actions'; there: infos, metadata, observations"),
        ("D4RL", {"terminals": None}, "no 'terminals'"),
        ("D4RL", {"actions": np.zeros((N - 2, 2))}, f"actions has {N - 2} rows, its .* {N} frames"),
        ("D4RL", {"timeouts": np.zeros(N + 1)}, f"{N} observations, but {N + 1} marks of an end"),
        ("D4RL", {"observations": np.zeros((N, 5))}, "no column of pictures, which are bytes"),
        ("D4RL", {"actions": np.full(N, b"up")}, "column 'actions' is .S2, expected numbers"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_one_line(tmp_path, layout, changes, message):
    name, write = layouts.PLAIN[layout]
    path = write(tmp_path / name, EPISODES)
    spoil(path, **changes)
    if message is None:
        assert Trajectories(path).num_episodes == len(EPISODES) - 1
        return
    with pytest.raises(UserError, match=message) as refused:
        Trajectories(path)
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_minari_without_its_file_or_an_observation_is_refused(tmp_path):
    path = layouts.write_minari(tmp_path / "minari", EPISODES)
    spoil(path / "data" / "main_data.hdf5", episode_0__observations=None)
    with pytest.raises(UserError, match="no 'episode_0/observations'; there: actions, rewards"):
        Trajectories(path)
    (path / "data" / "main_data.hdf5").unlink()
    with pytest.raises(UserError, match=r"'hdf5' storage, and main_data\.hdf5 is not there"):
        Trajectories(path)


def test_ogbench_of_states_or_without_ends_is_refused(tmp_path):
    numbers: dict[str, Any] = {"observations": np.zeros((9, 3)), "actions": np.zeros((9, 2))}
    np.savez(tmp_path / "a.npz", **numbers)
    with pytest.raises(UserError, match=r"a\.npz has no 'terminals'; there: actions, obs"):
        Trajectories(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", **numbers, terminals=np.zeros(9))
    with pytest.raises(UserError, match="no column of pictures"):
        Trajectories(tmp_path / "a.npz")


def test_a_column_that_is_named_wrongly_is_refused_with_those_there_are(written):
    path = written(*layouts.PLAIN["robomimic"])
    with pytest.raises(UserError, match=r"'front' is no column of pictures.* those there: obs/age"):
        Trajectories(path, pixels="front")
    with pytest.raises(UserError, match="'states' is no column of pictures"):
        Trajectories(path, pixels="states")
    with pytest.raises(UserError, match="no column 'torque'; columns there: actions, dones"):
        Trajectories(path, action="torque")


def test_what_is_no_dataset_is_refused_with_what_would_be_one(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"notes\.txt is no dataset: expected \.h5 \.hdf5 \.npz"):
        Trajectories(tmp_path / "notes.txt")
    with pytest.raises(UserError, match=r"no main_data\.hdf5 \(Minari\) and no meta/info\.json"):
        Trajectories(tmp_path)
    np.savez(tmp_path / "ep_len.npz", np.array([3]))
    with pytest.raises(UserError, match="stable-worldmodel's folder of pictures or videos"):
        Trajectories(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.6, 0.95])
@pytest.mark.parametrize(("name", "write"), ALL)
def test_a_file_that_is_cut_short_is_named_unless_all_is_there(
    written, tmp_path, name, write, kept
):
    source = written(name, write)
    files = [source] if source.is_file() else [f for f in source.rglob("*") if f.is_file()]
    biggest = max(files, key=lambda file: file.stat().st_size).relative_to(source.parent)
    copy = shutil.copytree if source.is_dir() else shutil.copy
    copy(source, tmp_path / name)
    cut = tmp_path / biggest
    cut.write_bytes(cut.read_bytes()[: int(kept * cut.stat().st_size)])
    try:
        assert_same_episodes(Trajectories(tmp_path / name, bad_share=0))
    except UserError as refused:
        assert str(tmp_path / name) in str(refused) and "\n" not in str(refused)
    else:
        assert kept == 0.95 and biggest.suffix == ".mp4"  # what follows the last frame


def rewrite_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@needs_pyarrow
@pytest.mark.parametrize("layout", ["LeRobot v2.1", "LeRobot v3.0"])
def test_a_folder_of_lerobot_that_lacks_something_is_refused(tmp_path, layout):
    name, write = layouts.ARROW[layout]
    path = write(tmp_path / name, EPISODES)
    info = path / "meta" / "info.json"
    rewrite_json(info, codebase_version="v1.6")
    with pytest.raises(UserError, match=r"is LeRobot v1\.6; read are v2\.0, v2\.1, v3\.0"):
        Trajectories(path)
    rewrite_json(info, codebase_version=layout.split()[1])
    video = sorted(path.rglob("*.mp4"))[1]
    video.rename(video.with_suffix(".gone"))
    with pytest.raises(UserError, match=rf"{video.name} does not exist"):
        whole(Trajectories(path, bad_share=0), 2)
        whole(Trajectories(path, bad_share=0), 1)
    parquet = sorted((path / "data").rglob("*.parquet"))[2]
    parquet.unlink()
    with pytest.raises(UserError, match=rf"{parquet.name} is missing"):
        Trajectories(path)
    info.write_text("{")
    with pytest.raises(UserError, match=r"info\.json.* cannot be read as JSON"):
        Trajectories(path)


@needs_pyarrow
def test_lerobot_v2_0_is_read_as_its_successor_is(tmp_path):
    """It differs in files of statistics only, which are not read."""
    path = layouts.write_lerobot_v2(tmp_path / "lerobot", EPISODES)
    newer = Trajectories(path)
    rewrite_json(path / "meta" / "info.json", codebase_version="v2.0")
    older = Trajectories(path)
    assert (newer.layout, older.layout) == ("LeRobot v2.1", "LeRobot v2.0")
    windows = newer.windows(4)[::7]
    expected = newer.read(windows, 4)
    for name, rows in older.read(windows, 4).items():
        np.testing.assert_array_equal(rows, expected[name])


@needs_pyarrow
def test_a_folder_of_lerobot_without_episodes_or_parts_of_its_head_is_refused(tmp_path):
    path = layouts.write_lerobot_v2(tmp_path / "lerobot", EPISODES)
    features = json.loads((path / "meta" / "info.json").read_text())["features"]
    rewrite_json(path / "meta" / "info.json", features=features | {"action": {"shape": [2]}})
    with pytest.raises(UserError, match=r"info\.json is damaged or cut short \('dtype'\)"):
        Trajectories(path)
    (path / "meta" / "episodes.jsonl").write_text("")
    with pytest.raises(UserError, match="has no episodes"):
        Trajectories(path)


@needs_pyarrow
def test_rows_that_are_not_those_of_the_episodes_are_refused(tmp_path):
    path = layouts.write_lerobot_v2(tmp_path / "lerobot", EPISODES)
    file = path / "meta" / "episodes.jsonl"
    file.write_text(file.read_text().replace('"length": 7', '"length": 8'))
    with pytest.raises(UserError, match=rf"rows of data/ \({N}\) are not those of .* \({N + 2}\)"):
        Trajectories(path)


def test_a_filter_that_is_missing_is_named_with_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    path = layouts.write_leworldmodel(tmp_path / "lewm.h5", EPISODES)
    with h5py.File(path, "r+") as file:
        del file["pixels"]
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((1, 32, 48, 3))
        properties.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, ())  # Blosc
        space = h5py.h5s.create_simple((N, 32, 48, 3))
        h5py.h5d.create(file.id, b"pixels", h5py.h5t.STD_U8LE, space, properties)
    with pytest.raises(UserError, match=r"/pixels is compressed by filter 32001 .*hdf5plugin"):
        Trajectories(path)


def test_pyarrow_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "meta").mkdir()
    info = {"codebase_version": "v2.1", "features": {}, "fps": 10, "chunks_size": 1000}
    (tmp_path / "meta" / "info.json").write_text(json.dumps(info | {"data_path": "a.parquet"}))
    (tmp_path / "meta" / "episodes.jsonl").write_text('{"episode_index": 0, "length": 3}')
    with pytest.raises(UserError, match=r"pip install 'jepa-world\[parquet\]'"):
        Trajectories(tmp_path)
