import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

import jepa_world
from jepa_world.commands.collect import Collect, collect
from jepa_world.data.trajectories import Trajectories
from jepa_world.policies import smooth_actions
from jepa_world.registry import UserError

SMALL = Collect(episodes=5, steps=6, shard_episodes=2, workers=1, image_size=16)


def into(folder, **changes):
    return dataclasses.replace(SMALL, data=folder, **changes)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return collect(into(tmp_path_factory.mktemp("collect") / "reach"))


def test_a_dataset_is_what_was_asked_for(dataset):
    data = Trajectories(dataset)
    assert (data.num_episodes, data.frame_shape, data.action_dim) == (5, (16, 16, 3), 2)
    assert (data.lengths == 7).all() and data.env == "jepa_world/Reach-v0"
    np.testing.assert_allclose(data.metadata["action"]["std"], data.action_std)
    assert {"jepa_world", "mujoco"} <= data.metadata["versions"].keys()


def test_an_action_leads_from_its_frame_to_the_next(dataset):
    batch = Trajectories(dataset).read(np.array([0, 7, 14]), length=7)
    moved = np.diff(batch["state"][..., :2], axis=1)  # rad in a step of 0.1 s
    asked = 0.25 * batch["action"][:, :-1]
    assert np.corrcoef(moved.ravel(), asked.ravel())[0, 1] > 0.95
    assert (batch["action"][:, -1] == 0).all()


def test_the_number_of_processes_changes_nothing(dataset, tmp_path):
    assert contents(collect(into(tmp_path / "two", workers=2))) == contents(dataset)


def test_an_interrupted_collection_is_finished_as_if_never_interrupted(dataset, tmp_path):
    folder = collect(into(tmp_path / "reach"))
    description = yaml.safe_load((folder / "dataset.yaml").read_text())
    del description["action"]
    (folder / "dataset.yaml").write_text(yaml.safe_dump(description))
    (folder / "shard-00002.h5").unlink()
    (folder / "shard-00001.h5").rename(folder / "shard-00001.h5.partial")
    kept = (folder / "shard-00000.h5").stat().st_mtime_ns
    collect(into(folder))
    assert contents(folder) == contents(dataset)
    assert (folder / "shard-00000.h5").stat().st_mtime_ns == kept


def test_a_killed_collection_is_finished_as_if_never_killed(tmp_path):
    many = {"episodes": 30, "steps": 20, "image_size": 32}
    config = (
        f"Collect(data=Path({str(tmp_path / 'killed')!r}), shard_episodes=2, workers=1, **{many})"
    )
    code = (
        "from pathlib import Path\n"
        "from jepa_world.commands.collect import Collect, collect\n"
        f"collect({config})"
    )
    root = Path(jepa_world.__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "killed" / "shard-00001.h5").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    killed = collect(into(tmp_path / "killed", **many))
    assert contents(killed) == contents(collect(into(tmp_path / "whole", **many)))


def test_a_complete_dataset_is_left_as_it_is(dataset):
    before = contents(dataset)
    collect(into(dataset))
    assert contents(dataset) == before


def test_another_seed_is_another_dataset(dataset, tmp_path):
    other = Trajectories(collect(into(tmp_path / "seed", seed=1, episodes=1)))
    ours = Trajectories(dataset).read(np.array([0]), 7)
    theirs = other.read(np.array([0]), 7)
    assert not np.allclose(ours["state"], theirs["state"])


def test_actions_are_smooth_bounded_and_rest_exactly_at_the_asked_share():
    generator = np.random.default_rng(0)
    actions = smooth_actions(generator, 100_000, 2, correlation=0.8, spread=0.3, still=0.2)
    assert np.abs(actions).max() <= 1.0
    still = (actions == 0).all(1)
    assert still.mean() == pytest.approx(0.2, abs=0.02)
    ends = still[:-1] & ~still[1:]
    assert still.sum() / ends.sum() == pytest.approx(5.0, rel=0.1)
    moving = ~still[:-1] & ~still[1:]
    first, second = actions[:-1][moving], actions[1:][moving]
    assert first.std() == pytest.approx(0.3, rel=0.05)
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(("env", "policy"), [("reach", "random"), ("rooms", "guided")])
def test_who_acts_is_the_guide_where_there_is_one_and_is_recorded(tmp_path, env, policy):
    left_open = collect(into(tmp_path / "open", env=env, episodes=2))
    named = collect(into(tmp_path / "named", env=env, episodes=2, policy=policy))
    shards = [(folder / "shard-00000.h5").read_bytes() for folder in (left_open, named)]
    assert shards[0] == shards[1]
    for folder in (left_open, named):
        assert yaml.safe_load((folder / "dataset.yaml").read_text())["policy"] == policy


def test_an_expert_goes_where_random_actions_do_not_and_rests_at_the_asked_share(tmp_path):
    options = {"env": "rooms", "episodes": 3, "steps": 40}
    folder = collect(into(tmp_path / "expert", policy="expert", still=0.1, **options))
    state = Trajectories(folder).read(np.array([0, 41, 82]), 41)["state"]
    side = np.sign(state[:, [0, -1], 0] - state[:, [0, -1], 4])
    assert (side[:, 0] != side[:, 1]).all()  # start and goal lie in different rooms


def test_factors_are_drawn_for_every_episode_and_leave_the_motion(dataset, tmp_path):
    folder = collect(into(tmp_path / "varied", factors=("light", "table_color")))
    plain, varied = (Trajectories(path).read(np.array([0, 7]), 7) for path in (dataset, folder))
    np.testing.assert_array_equal(plain["state"], varied["state"])
    corner = varied["pixels"][:, :, 0, 0]
    assert (corner[:, :1] == corner).all() and (corner[0] != corner[1]).any()
    collect(into(folder, factors=("light", "table_color")))  # complete: left as it is
    with pytest.raises(UserError, match=r"with factors \['light', 'table_color'\], not None"):
        collect(into(folder))


def test_an_env_that_ends_early_gives_shorter_episodes(tmp_path, monkeypatch):
    (tmp_path / "short_env.py").write_text(
        "import gymnasium, numpy as np\n"
        "class Short(gymnasium.Env):\n"
        "    observation_space = gymnasium.spaces.Box(0, 255, (4, 4, 3), np.uint8)\n"
        "    action_space = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        super().reset(seed=seed)\n"
        "        self.left = 3\n"
        "        return np.full((4, 4, 3), self.left, np.uint8), {}\n"
        "    def step(self, action):\n"
        "        self.left -= 1\n"
        "        frame = np.full((4, 4, 3), self.left, np.uint8)\n"
        "        return frame, 0.0, self.left == 0, False, {}\n"
        "gymnasium.register('Short-v0', entry_point=Short)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = into(tmp_path / "short", env="short_env:Short-v0", image_size=None)
    data = Trajectories(collect(config))
    assert (data.lengths == 4).all() and data.action_dim == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": 0}, "episodes is 0, expected at least 1"),
        ({"steps": 0}, "steps is 0"),
        ({"correlation": 1.0}, r"expected correlation in \[0, 1\)"),
        ({"env": "rech"}, "unknown env 'rech'; nearest: reach"),
        ({"env": "CartPole-v1", "image_size": None}, "expected byte images"),
        ({"policy": "guided"}, "policy 'guided' needs an environment with a method `guide`"),
        ({"factors": ("lihgt",)}, r"unknown factors \['lihgt'\]; known: light"),
    ],
)
def test_bad_settings_are_refused_in_one_line_and_leave_nothing(tmp_path, changes, message):
    folder = tmp_path / "data"
    with pytest.raises(UserError, match=message) as refused:
        collect(into(folder, **changes))
    assert "\n" not in str(refused.value) and not folder.exists()


def test_a_dataset_of_other_settings_is_refused_not_overwritten(dataset):
    before = contents(dataset)
    with pytest.raises(UserError, match="holds a dataset with steps 6, not 7"):
        collect(into(dataset, steps=7))
    assert contents(dataset) == before


def test_a_folder_of_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds other files and no dataset\.yaml"):
        collect(into(tmp_path))


def test_an_unfinished_dataset_of_another_simulator_version_is_refused(dataset, tmp_path):
    description = yaml.safe_load((dataset / "dataset.yaml").read_text())
    del description["action"]
    description["versions"]["mujoco"] = "1.0"
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(description))
    with pytest.raises(UserError, match="was begun with"):
        collect(into(tmp_path))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        collect(into(tmp_path / "file" / "reach"))


def test_a_collecting_process_does_not_import_torch():
    code = "import sys, jepa_world.commands.collect; print('torch' in sys.modules)"
    root = Path(jepa_world.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.stdout == "False\n", result.stderr
