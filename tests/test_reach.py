import ctypes
import doctest
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jepa_world
import jepa_world.envs as envs
from jepa_world.envs import reach as reach_module
from jepa_world.envs import rendering


@pytest.fixture
def reach():
    env = envs.make("reach").unwrapped
    yield env
    env.close()


def python(code, **variables):
    command = [sys.executable, "-W", "error", "-c", code]
    root = str(Path(jepa_world.__file__).parents[1])
    environment = {**os.environ, "MUJOCO_GL": "", "PYTHONPATH": root, **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("module", [envs, reach_module, rendering], ids=lambda m: m.__name__)
def test_examples_in_docstrings_hold(module):
    assert doctest.testmod(module).failed == 0


def test_same_seed_same_episode(reach):
    other = envs.make("reach")
    for env in (reach, other):
        env.reset(seed=3)
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 2)).astype(np.float32)
    for action in actions:
        ours, theirs = reach.step(action), other.step(action)
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[4]["state"], theirs[4]["state"])
        np.testing.assert_array_equal(ours[4]["goal"], theirs[4]["goal"])


def test_start_and_goal_are_set_and_a_goal_reached_looks_like_its_picture(reach):
    observation, info = reach.reset(seed=0, options={"start": (0.3, 1.0), "goal": (0.3, 1.0)})
    np.testing.assert_array_equal(info["state"], [0.3, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(
        info["proprio"], [np.cos(0.3), np.sin(0.3), np.cos(1.0), np.sin(1.0)], rtol=1e-6
    )
    np.testing.assert_array_equal(observation, info["goal"])
    assert info["success"] is True and reach.goal_distance() == 0.0


def test_giving_the_start_keeps_the_goal_of_the_seed(reach):
    _, free = reach.reset(seed=5)
    _, set_start = reach.reset(seed=5, options={"start": (0.0, 1.0)})
    np.testing.assert_array_equal(free["goal"], set_start["goal"])


def test_distance_reward_and_success_agree_in_metres(reach):
    straight_up, straight_right = (np.pi / 2, 0.0), (0.0, 0.0)
    reach.reset(options={"start": straight_right, "goal": straight_up})
    assert reach.goal_distance() == pytest.approx(0.4 * np.sqrt(2))
    _, reward, terminated, truncated, info = reach.step(np.zeros(2, np.float32))
    assert reward == pytest.approx(-0.4 * np.sqrt(2))
    assert (terminated, truncated, info["success"]) == (False, False, False)


def test_servo_reaches_the_asked_velocity_in_a_step_and_then_rests(reach):
    reach.reset(options={"start": (0.0, 1.0)})
    *_, info = reach.step(np.array([1.0, -0.4], np.float32))
    np.testing.assert_allclose(info["state"][2:], [3.0, -1.2], rtol=0.02)
    reach.step(np.zeros(2, np.float32))
    *_, before = reach.step(np.zeros(2, np.float32))
    *_, after = reach.step(np.zeros(2, np.float32))
    np.testing.assert_allclose(after["state"][:2], before["state"][:2], atol=1e-4)


def test_arm_pressed_against_the_elbow_limit_rests(reach):
    _, info = reach.reset(options={"start": (0.0, 2.3)})
    for _ in range(15):
        *_, info = reach.step(np.array([0.0, 1.0], np.float32))
    assert 2.5 < info["state"][1] < 2.75
    np.testing.assert_allclose(info["state"][2:], 0.0, atol=0.02)


def test_torque_variant_has_inertia_and_damping():
    env = envs.make("reach_torque")
    env.reset(options={"start": (0.0, 0.0)})
    speeds = [env.step(np.array([1.0, 0.0]))[4]["state"][2] for _ in range(10)]
    assert speeds[0] < speeds[2] < speeds[5] < 3.0
    coasting = [env.step(np.zeros(2))[4]["state"][2] for _ in range(30)]
    assert coasting[0] > 0.5 and abs(coasting[-1]) < 0.01


@pytest.mark.parametrize("name", ["reach", "reach_torque"])
def test_simulated_distances_are_those_of_stepping_and_leave_the_state(name):
    env = envs.make(name).unwrapped
    assert isinstance(env, reach_module.ReachEnv)
    env.reset(seed=1, options={"start": (0.0, 2.2)})
    env.step(np.array([0.5, 1.0]))
    candidates = np.random.default_rng(0).uniform(-1, 1, (6, 7, 2)).astype(np.float32)
    candidates[0] = [0.2, 1.0]  # against the limit of the elbow
    simulated = env.goal_distances(candidates)
    stepped = []
    for action in candidates[0]:
        env.step(action)
        stepped.append(env.goal_distance())
    np.testing.assert_allclose(simulated[0], stepped, atol=1e-12)


def test_a_quarter_turn_of_the_shoulder_turns_the_picture(reach):
    pictures = [reach.reset(options={"start": (q, 1.1)})[0] for q in (0.4, 0.4 + np.pi / 2)]
    turned = np.rot90(pictures[0]).astype(int)  # counter-clockwise, like a positive angle
    assert np.abs(turned - pictures[1]).mean() < 0.5
    assert np.abs(pictures[0].astype(int) - pictures[1]).mean() > 5.0


def test_links_and_tip_are_visible_and_told_apart_in_every_pose(reach):
    for seed in range(20):
        picture = reach.reset(seed=seed)[0].astype(int)
        red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
        upper = (blue > 120) & (red < 80)
        lower = (red > 190) & (green > 110) & (blue < 90)
        tip = (red > 150) & (green < 60)
        assert upper.sum() >= 15 and lower.sum() >= 15 and tip.sum() >= 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"begin": (0, 0)}, "unknown reset options.*known: start, goal, factors"),
        ({"start": (0, 0, 0)}, "start is .*two joint angles"),
        ({"goal": (0, 3.0)}, "goal is .*elbow within"),
        ({"goal": (float("nan"), 0)}, "goal is"),
    ],
)
def test_refuses_bad_reset_options(reach, options, message):
    with pytest.raises(ValueError, match=message):
        reach.reset(options=options)


@pytest.mark.parametrize("action", [np.zeros(3), np.array([np.nan, 0.0])])
def test_refuses_bad_actions(reach, action):
    reach.reset(seed=0)
    with pytest.raises(ValueError, match="2 finite numbers"):
        reach.step(action)


def test_unknown_env_names_the_nearest_and_the_known():
    with pytest.raises(envs.EnvError, match=r"'rech'; nearest: reach; known: reach, reach_torque"):
        envs.make("rech")
    with pytest.raises(envs.EnvError, match="no_such_module"):
        envs.make("no_such_module:Reach-v0")


def test_unknown_option_is_named():
    with pytest.raises(envs.EnvError, match="sise"):
        envs.make("reach", sise=32)


def test_an_env_of_a_module_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_env_module.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('Mine-v0', entry_point='jepa_world.envs.reach:ReachEnv')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert envs.make("my_env_module:Mine-v0", size=16).reset(seed=0)[0].shape == (16, 16, 3)


def test_registering_imports_nothing_heavy():
    code = "import sys, jepa_world.envs; print({'mujoco', 'torch'} & set(sys.modules))"
    assert python(code).stdout == "set()\n"


def test_opengl_is_chosen_even_when_mujoco_was_imported_first():
    code = "import mujoco, jepa_world.envs as e; print(e.make('reach').reset(seed=0)[0].shape)"
    result = python(code, DISPLAY="")
    assert result.stdout == "(64, 64, 3)\n", result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="MUJOCO_GL is chosen on Linux only")
def test_missing_opengl_is_one_line_that_names_the_package():
    try:
        ctypes.CDLL("libOSMesa.so.8")
        pytest.skip("OSMesa is installed")
    except OSError:
        pass
    code = (
        "import jepa_world.envs as e\n"
        "try: e.make('reach')\n"
        "except e.EnvError as error: print(error)"
    )
    lines = python(code, MUJOCO_GL="osmesa").stdout.splitlines()
    assert len(lines) == 1 and "libegl1" in lines[0] and "libosmesa6" in lines[0]
