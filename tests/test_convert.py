import foreign_layouts as layouts
import h5py
import numpy as np
import pytest
import yaml
from test_layouts import EPISODES, SOME, assert_same_episodes, spoil, whole

from jepa_world.data.trajectories import Trajectories


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def source(tmp_path):
    return layouts.write_robomimic(tmp_path / "demo.hdf5", EPISODES)


@pytest.fixture
def convert(call):
    return lambda source, to, *words: call(
        "convert", "--data", source, "--to", to, "--workers", 1, *words
    )


def assert_same_data(made, source):
    """Assert that all the rows of both are equal, to the bit."""
    np.testing.assert_array_equal(made.lengths, source.lengths)
    for number in range(made.num_episodes):
        ours, theirs = whole(made, number), whole(source, number)
        for name in ("pixels", "action"):
            np.testing.assert_array_equal(ours[name], theirs[name])


@pytest.mark.parametrize("target", ["store", "lewm.h5"])
@pytest.mark.parametrize(("name", "write"), SOME)
def test_what_is_converted_is_what_the_source_holds(convert, tmp_path, name, write, target):
    source = write(tmp_path / f"source_{name}", EPISODES)
    ended = convert(source, tmp_path / target)
    assert ended.code == 0, ended.stderr
    last = f"11 episodes, 69 frames of 32x48x3: {tmp_path / target}"
    assert ended.stdout.splitlines()[-1] == last
    made = Trajectories(tmp_path / target, cache_bytes=0)
    assert made.layout == "LeWorldModel"
    assert_same_data(made, Trajectories(source))


def test_a_file_for_leworldmodel_has_its_columns(convert, source, tmp_path):
    convert(source, tmp_path / "lewm.h5")
    with h5py.File(tmp_path / "lewm.h5") as file:
        assert {"pixels", "action", "state", "ep_len", "ep_offset"} <= set(file)
        pixels = file["pixels"]
        assert isinstance(pixels, h5py.Dataset)
        assert pixels.chunks == (1, 32, 48, 3) and pixels.dtype == np.uint8
        np.testing.assert_array_equal(file["ep_len"], layouts.lengths(EPISODES))
        assert not np.isnan(np.asarray(file["action"])).any()


def test_a_store_says_where_it_came_from_and_keeps_the_other_columns(convert, source, tmp_path):
    convert(source, tmp_path / "store")
    description = yaml.safe_load((tmp_path / "store" / "dataset.yaml").read_text())
    settings = description["settings"]
    assert (settings["source"], settings["layout"]) == (str(source), "robomimic")
    assert settings["columns"]["pixels"] == "obs/agentview_image"
    names = ["action", "obs.robot0_joint_pos", "rewards"]
    made = Trajectories(tmp_path / "store", columns=names)
    np.testing.assert_allclose(description["action"]["mean"], made.action_mean, rtol=1e-6)
    rows = whole(made, 10)
    np.testing.assert_array_equal(rows["obs.robot0_joint_pos"], EPISODES[10]["state"])


def test_columns_that_are_to_be_kept_are_those_of_the_result(convert, source, tmp_path):
    convert(source, tmp_path / "store", "--keep", "dones", "--columns.action", "states")
    with h5py.File(tmp_path / "store" / "shard-00000.h5") as file:
        names = {"pixels", "action", "state", "dones", "ep_len", "ep_offset"}
        assert set(file) == names
    made = Trajectories(tmp_path / "store")
    np.testing.assert_array_equal(whole(made, 4)["action"], EPISODES[4]["state"])
    complaint = convert(source, tmp_path / "other", "--keep", "done").complaint()
    assert "no column 'done'; columns there: actions, dones" in complaint


def test_frames_are_scaled_and_stored_as_jpeg(convert, source, tmp_path):
    ended = convert(source, tmp_path / "store", "--image-size", 16, "--jpeg")
    assert ended.code == 0, ended.stderr
    made = Trajectories(tmp_path / "store")
    assert made.frame_shape == (16, 16, 3)
    for number in (0, 10):
        expected = EPISODES[number]["pixels"][:, :16, :16]
        np.testing.assert_allclose(whole(made, number)["pixels"].astype(int), expected, atol=4)


def test_grey_frames_are_stored_as_jpeg_and_six_channels_are_not(convert, tmp_path):
    source = layouts.write_d4rl(tmp_path / "d4rl.hdf5", EPISODES)
    pixels = np.concatenate([e["pixels"] for e in EPISODES])
    spoil(source, observations=pixels[..., 0])
    assert convert(source, tmp_path / "grey", "--jpeg").code == 0
    made = Trajectories(tmp_path / "grey")
    read = made.read(np.array([4]), 1)["pixels"][0]
    np.testing.assert_allclose(read.astype(int), pixels[4:5, ..., :1], atol=3)
    spoil(source, observations=np.concatenate([pixels, pixels], -1))
    ended = convert(source, tmp_path / "two", "--jpeg")
    assert ended.code == 2 and "6 channels, JPEG has 1 or 3" in ended.stderr


def test_a_converted_store_converts_back_unchanged(convert, tmp_path, tiny_data):
    convert(tiny_data, tmp_path / "again")
    made, before = Trajectories(tmp_path / "again"), Trajectories(tiny_data)
    assert made.env == before.env
    assert_same_data(made, before)
    np.testing.assert_array_equal(whole(made, 1)["proprio"], whole(before, 1)["proprio"])


def test_an_interrupted_conversion_is_finished_as_if_never_interrupted(convert, source, tmp_path):
    words = ("--shard-episodes", 4)
    convert(source, tmp_path / "whole", *words)
    convert(source, tmp_path / "halves", *words)
    folder = tmp_path / "halves"
    description = yaml.safe_load((folder / "dataset.yaml").read_text())
    del description["action"]
    (folder / "dataset.yaml").write_text(yaml.safe_dump(description))
    (folder / "shard-00002.h5").unlink()
    (folder / "shard-00001.h5").rename(folder / "shard-00001.h5.partial")
    kept = (folder / "shard-00000.h5").stat().st_mtime_ns
    assert convert(source, folder, *words).code == 0
    assert contents(folder) == contents(tmp_path / "whole")
    assert (folder / "shard-00000.h5").stat().st_mtime_ns == kept


def test_a_complete_result_is_left_as_it_is(convert, source, tmp_path):
    convert(source, tmp_path / "store")
    before = contents(tmp_path / "store")
    assert convert(source, tmp_path / "store").code == 0
    assert contents(tmp_path / "store") == before


def test_two_processes_write_what_one_writes(call, convert, source, tmp_path):
    convert(source, tmp_path / "one")
    ended = call("convert", "--data", source, "--to", tmp_path / "two", "--workers", 2)
    assert ended.code == 0, ended.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize(
    ("to", "words", "message"),
    [
        ("there.h5", (), "there.h5 is there already: nothing is overwritten, name another --to"),
        ("full", (), "holds other files and no dataset.yaml: give an empty folder"),
        ("made", ("--jpeg",), "made holds a dataset with jpeg False, not True"),
        ("new.h5", ("--jpeg",), "LeWorldModel reads no JPEG"),
        ("new", ("--image-size", 0), "--image-size is 0: give at least 1"),
        ("new", ("--columns.pixels", "front"), "'front' is no column of pictures"),
        ("demo.hdf5", (), "lie in each other: name another --to"),
        ("there.h5/new", (), "cannot be written"),
    ],
)
def test_nothing_good_is_overwritten(convert, source, tmp_path, to, words, message):
    (tmp_path / "there.h5").write_bytes(b"good")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    convert(source, tmp_path / "made")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    complaint = convert(source, tmp_path / to, *words).complaint()
    assert complaint.startswith("convert: ") and message in complaint
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before == after


@pytest.mark.parametrize("to", ["store", "lewm.h5"])
def test_a_source_that_turns_out_damaged_leaves_nothing_half(convert, tmp_path, to):
    source = layouts.write_minari(tmp_path / "minari", EPISODES, jpeg=True)
    with h5py.File(source / "data" / "main_data.hdf5", "r+") as file:
        pixels = file["episode_7/observations/pixels"]
        assert isinstance(pixels, h5py.Dataset)
        pixels[2] = np.frombuffer(b"no picture", np.uint8)
    ended = convert(source, tmp_path / to, "--shard-episodes", 3)
    assert ended.code == 2 and "main_data.hdf5 is damaged" in ended.stderr.splitlines()[-1]
    made = {path.name for path in tmp_path.rglob("*") if path.parent.name != "data"}
    whole = (
        {"store", "dataset.yaml", "shard-00000.h5", "shard-00001.h5"} if to == "store" else set()
    )
    assert made == {"minari", "data"} | whole


def test_the_result_reads_as_the_episodes(convert, source, tmp_path):
    convert(source, tmp_path / "store", "--shard-episodes", 3)
    assert_same_episodes(Trajectories(tmp_path / "store", cache_bytes=0))
