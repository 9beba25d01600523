import json

import foreign_layouts as layouts
import h5py
import numpy as np
import pytest
from PIL import Image
from test_layouts import EPISODES, SOME, spoil


@pytest.fixture
def inspect(call, tmp_path):
    """Inspect a dataset; return how it ended, the results and whether there is a contact sheet."""

    def run(data, *words):
        folder = tmp_path / "inspected"
        ended = call("inspect", "--data", data, "--run-dir", folder, *words)
        assert ended.code == 0, ended.stderr
        results = json.loads((folder / "results.json").read_text())
        return ended.stdout, results, folder / "contact_sheet.png"

    return run


@pytest.mark.parametrize(("name", "write"), SOME)
def test_a_layout_is_shown_with_its_episodes_and_a_contact_sheet(inspect, tmp_path, name, write):
    words = ("--episodes", 2, "--frames", 3)
    stdout, results, sheet = inspect(write(tmp_path / name, EPISODES), *words)
    assert "11 episodes, 69 frames" in stdout and "5 to 9 frames, median 6" in stdout
    assert "train_world_model reads" in stdout
    assert results["lengths"] == [len(e["action"]) for e in EPISODES]
    assert [32, 48, 3] in results["pictures"].values()
    with Image.open(sheet) as picture:
        drawn = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for number in (0, 10):  # the first and the last episode are among those drawn
        colour = EPISODES[number]["pixels"][0, 0, 0].astype(int)
        assert (np.abs(drawn - colour).max(1) <= 4).sum() > 1000


def test_statistics_are_those_of_the_columns(inspect, tmp_path):
    path = layouts.write_robomimic(tmp_path / "demo.hdf5", EPISODES)
    stdout, results, _ = inspect(path)
    action = np.concatenate([e["action"] for e in EPISODES]).astype(np.float64)
    found = results["columns"]["actions"]
    for name, expected in (
        ("least", action.min(0)),
        ("mean", action.mean(0)),
        ("most", action.max(0)),
        ("std", action.std(0)),
    ):
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)
    assert (found["row"], found["type"], found["rows_not_finite"]) == ([2], "float32", 0)
    (line,) = [line for line in stdout.splitlines() if line.startswith("actions")]
    assert f"{action.min():.4g}" in line and f"{action.max():.4g}" in line


def test_a_dataset_that_training_refuses_is_shown_with_the_reason(inspect, tmp_path):
    path = layouts.write_robomimic(tmp_path / "demo.hdf5", EPISODES)
    with h5py.File(path, "r+") as file:
        actions = file["data/demo_2/actions"]
        assert isinstance(actions, h5py.Dataset)
        actions[1:3, 0] = np.nan
        other = file["data/demo_4/actions"]
        assert isinstance(other, h5py.Dataset)
        other[0] = np.nan
    stdout, results, sheet = inspect(path)
    assert results["columns"]["actions"]["rows_not_finite"] == 3
    assert np.isfinite(results["columns"]["actions"]["mean"]).all() and sheet.exists()
    assert "would refuse it: " in stdout and "episode 2 (actions is not finite in row 1)" in stdout


def test_a_dataset_without_pictures_has_no_contact_sheet(inspect, tmp_path):
    path = layouts.write_d4rl(tmp_path / "d4rl.hdf5", EPISODES)
    spoil(path, observations=np.zeros((69, 11)))
    stdout, results, sheet = inspect(path)
    assert not sheet.exists() and results["pictures"] == {}
    assert "no column of pictures, which are bytes (height, width, channels)" in stdout


def test_the_camera_that_is_named_is_drawn(inspect, tmp_path):
    path = layouts.write_robomimic(tmp_path / "demo.hdf5", EPISODES)
    words = ("--columns.pixels", "obs/robot0_eye_in_hand_image", "--episodes", 2, "--frames", 2)
    _, results, sheet = inspect(path, *words)
    assert results["contact_sheet"]["column"] == "obs/robot0_eye_in_hand_image"
    with Image.open(sheet) as picture:
        assert picture.width < 600


def test_what_is_not_there_ends_in_one_line(call, tmp_path):
    complaint = call("inspect", "--data", tmp_path / "nowhere").complaint()
    assert complaint.startswith("inspect: ") and "nowhere does not exist" in complaint
