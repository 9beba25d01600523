"""Environments of others keep the contract of ours, and run through every command."""

import json
import sys

import gymnasium
import numpy as np
import pytest

from jepa_world import envs
from jepa_world.testing import check_env

pytest.importorskip("imageio", reason="Gymnasium's MuJoCo environments import it")


@pytest.fixture(params=["Reacher-v5", "Pusher-v5", "Hopper-v5"])
def env(request):
    env = envs.make(request.param, size=32)
    yield env.unwrapped
    env.close()


def test_keeps_the_contract(env):
    check_env(env)


@pytest.mark.parametrize(("name", "body"), [("Reacher-v5", "fingertip"), ("Pusher-v5", "object")])
def test_goals_are_what_the_environment_asks_for(name, body):
    env = envs.make(name, size=16).unwrapped
    for seed in range(10):
        _, info = env.reset(seed=seed)
        target = env.inner.get_body_com("target" if body == "fingertip" else "goal")
        asked = np.linalg.norm((env.inner.get_body_com(body) - target)[:2])
        assert env.goal_distance() == pytest.approx(asked, abs=1e-3)
        assert not info["success"]


def test_a_goal_of_any_other_environment_is_where_its_own_actions_lead():
    env = envs.make("Walker2d-v5", size=16, ahead=16).unwrapped
    env.reset(seed=0)
    far = env.goal_distance()
    near = envs.make("Walker2d-v5", size=16, ahead=1).unwrapped
    near.reset(seed=0)
    assert 0.0 < near.goal_distance() < far


def test_bodies_say_what_counts():
    env = envs.make("Hopper-v5", size=16, bodies=("torso",)).unwrapped
    env.reset(seed=0)
    torso = env.inner.get_body_com("torso").copy()
    _, info = env.reset(seed=0, options={"start": env.reset(seed=0)[1]["state"]})
    np.testing.assert_array_equal(env.inner.get_body_com("torso"), torso)
    assert env.goal_distance() > 0.0 and not info["success"]
    with pytest.raises(envs.EnvError, match=r"no bodies \['tail'\]; known: torso, "):
        envs.make("Hopper-v5", bodies=("tail",))


def test_actions_are_stretched_to_the_bounds_of_the_environment():
    env = envs.make("Pusher-v5", size=16)
    assert env.action_space == gymnasium.spaces.Box(-1.0, 1.0, (7,), np.float32)
    inner = env.unwrapped.inner
    env.reset(seed=0)
    env.step(np.full(7, 0.5, np.float32))
    np.testing.assert_allclose(inner.data.ctrl, 0.5 * inner.action_space.high)


def test_a_time_limit_is_the_environments_or_the_one_asked_for():
    for options, steps in (({}, 50), ({"max_episode_steps": 3}, 3)):
        env = envs.make("Reacher-v5", size=16, **options)
        env.reset(seed=0)
        ends = [env.step(np.zeros(2, np.float32))[3] for _ in range(steps)]
        assert ends == [False] * (steps - 1) + [True]


def test_an_unknown_option_is_named():
    with pytest.raises(envs.EnvError, match="sise"):
        envs.make("Reacher-v5", sise=32)


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio", None)
    for module in [name for name in sys.modules if name.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(envs.EnvError, match=r"imageio.*pip install 'jepa-world\[gymnasium\]'"):
        envs.make("Reacher-v5")


@pytest.mark.parametrize("name", ["Reacher-v5", "Pusher-v5"])
def test_a_world_model_of_a_foreign_environment_is_trained_and_plans(
    call, tiny_words, tmp_path, name
):
    flags = ("--steps", 8, "--image-size", 32, "--workers", 1, "--data", tmp_path / "data")
    assert call("collect", "--env", name, "--episodes", 6, *flags).code == 0
    trained = call(
        *("train_world_model", *tiny_words, "--data", tmp_path / "data"),
        *("--run-dir", tmp_path / "model"),
    )
    assert trained.code == 0, trained.stderr
    ended = call(
        *("evaluate", "--env", name, "--checkpoint", tmp_path / "model", "--episodes", 2),
        *("--budget", 3, "--horizon", 2, "--planner.samples", 8, "--planner.iterations", 2),
        *("--run-dir", tmp_path / "evaluation"),
    )
    assert ended.code == 0, ended.stderr
    results = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert {"random_floor", "simulator_ceiling"} <= set(results)
    assert results["tolerance"] == {"Reacher-v5": 0.02, "Pusher-v5": 0.05}[name]


@pytest.mark.filterwarnings("ignore")  # of gymnasium about OGBench's spaces, of dm_control
def test_ogbench_shows_its_goal_and_success_at_every_step():
    pytest.importorskip("ogbench")
    env = envs.make("ogbench:visual-cube-single-v0")
    observation, info = env.reset(seed=0)
    assert observation.shape == info["goal"].shape == (64, 64, 3) and info["success"] is False
    goal = info["goal"].copy()
    observation, *_, info = env.step(env.action_space.sample())
    np.testing.assert_array_equal(info["goal"], goal)
    assert info["success"] is False


def test_ogbench_that_is_missing_is_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ogbench", None)
    with pytest.raises(envs.EnvError, match=r"pip install 'jepa-world\[ogbench\]'"):
        envs.make("ogbench:visual-cube-single-v0")
