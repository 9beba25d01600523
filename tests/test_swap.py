"""A user's own predictor, the README's, in a folder with `envs/` and `predictors/` of its own."""

import json
import re
import shutil
from pathlib import Path

import pytest

from jepa_world.checkpoint import load_tensors

ROOT = Path(__file__).resolve().parents[1]
BUDGET = ("--episodes", 2, "--budget", 2, "--horizon", 3, "--planner.samples", 8)
OWN_ENV = """
import gymnasium
from jepa_world.envs.reach import ReachEnv

class OwnEnv(ReachEnv):
    def __init__(self, **options):
        super().__init__(size=32, **options)

gymnasium.register("Own-v0", entry_point="own_env:OwnEnv", max_episode_steps=50)
"""


def readme_predictor():
    """Return the README's example predictor."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if block.startswith("# my_predictor.py")]
    return block


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's folder: their module, and packages with the names of ours."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "my_predictor.py").write_text(
        "from predictors.helper import PLACE\n" + readme_predictor() + "\nassert PLACE == 32\n"
    )
    for name in ("envs", "predictors"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("")
        (folder / name / "helper.py").write_text("PLACE = 32\n")
    (folder / "own_env.py").write_text(OWN_ENV)
    return folder


@pytest.fixture(scope="module")
def trained(home, shell, tiny_data, tiny_words):
    words = ["--predictor", "my_predictor:MyPredictor", "--predictor.width", "32"]
    words += ["--data", tiny_data, "--run-dir", "runs/mine", *flags_but(tiny_words, "--predictor")]
    ended = shell("train_world_model.py", *words, cwd=home)
    assert ended.code == 0, ended.stderr
    return home / "runs" / "mine"


def flags_but(words, prefix):
    """Return the flags and values whose flag does not begin so."""
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for pair in pairs if not pair[0].startswith(prefix) for word in pair]


def test_it_is_trained_from_the_command_line(trained):
    weights, _ = load_tensors(trained / "checkpoint" / "model.safetensors")
    assert weights["predictor.f.0.weight"].shape == (32, 8 + 2)


def test_it_is_planned_with_only_when_it_is_trusted(trained, home, shell):
    words = ("--checkpoint", "runs/mine", "--run-dir", "runs/plan", *BUDGET)
    complaint = shell("plan.py", *words, cwd=home).complaint()
    assert complaint.endswith("add --trust my_predictor") and not (home / "runs/plan").exists()
    ended = shell("plan.py", *words, "--trust", "my_predictor", cwd=home)
    assert ended.code == 0, ended.stderr
    assert json.loads((home / "runs/plan/results.json").read_text())["success_end"]["n"] == 2


def test_it_is_used_from_python_as_well(trained, home, monkeypatch):
    import torch

    from jepa_world import Agent, load_world_model
    from jepa_world.envs import make
    from jepa_world.planners.cem import CEM

    monkeypatch.syspath_prepend(str(home))
    model, description = load_world_model(trained, trusted=("my_predictor",))
    env = make("reach", size=description["observation_shape"][2])
    observation, info = env.reset(seed=0)
    agent = Agent(model, CEM(-torch.ones(2), torch.ones(2), 3, samples=8), torch.zeros(3, 2))
    agent.reset(torch.from_numpy(info["goal"])[None])
    action = agent.act(torch.from_numpy(observation)[None])
    assert env.action_space.contains(action[0].numpy())
    env.close()


def test_an_env_of_ones_own_is_collected_trained_on_and_planned_in(home, shell, tiny_words):
    def run(*words):
        ended = shell(*words, cwd=home)
        assert ended.code == 0, ended.stderr

    own = ("--env", "own_env:Own-v0")
    run("collect.py", *own, "--episodes", 4, "--steps", 12, "--workers", 1, "--data", "data/own")
    run("train_world_model.py", *tiny_words, "--data", "data/own", "--run-dir", "runs/own")
    run("plan.py", *own, "--checkpoint", "runs/own", "--run-dir", "runs/own_plan", *BUDGET)
    complaint = shell("plan.py", "--checkpoint", "runs/own", *BUDGET, cwd=home).complaint()
    assert "trained for env 'own_env:Own-v0', not for 'reach'" in complaint


def test_nothing_of_the_users_folder_is_touched_but_runs_and_data(trained, home):
    made = {path.name for path in home.iterdir() if path.suffix != ".pyc"}
    assert made <= {"my_predictor.py", "own_env.py", "envs", "predictors", "runs", "data"} | {
        "__pycache__"
    }
    shutil.rmtree(home / "__pycache__", ignore_errors=True)
