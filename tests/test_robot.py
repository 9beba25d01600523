"""A robot of MuJoCo Menagerie's package is an environment as others are."""

import numpy as np
import pytest

from jepa_world import envs
from jepa_world.envs import EnvError
from jepa_world.testing import check_env

ARM = """
<mujoco model="arm">
  <compiler angle="radian"/>
  <option timestep="0.005" integrator="implicitfast"/>
  <worldbody>
    <body name="base">
      <geom type="cylinder" size="0.08 0.1" pos="0 0 0.1"/>
      <body name="upper" pos="0 0 0.25">
        <joint name="turn" axis="0 0 1" range="-2 2" damping="2" armature="0.1"/>
        <geom type="capsule" size="0.04" fromto="0 0 0 0.3 0 0" mass="1"/>
        <body name="lower" pos="0.3 0 0">
          <joint name="bend" axis="0 1 0" range="-1.5 1.5" damping="2" armature="0.1"/>
          <geom type="capsule" size="0.03" fromto="0 0 0 0.3 0 0" mass="0.5"/>
        </body>
      </body>
    </body>
    BASE
  </worldbody>
  <actuator>
    <position joint="turn" kp="80" CTRL/>
    <position joint="bend" kp="80" ctrlrange="-1.5 1.5"/>
  </actuator>
  <keyframe><key qpos="0.5 -0.5 KEY" ctrl="0.5 -0.5"/></keyframe>
</mujoco>
"""
SCENE = """
<mujoco>
  <include file="lite6.xml"/>
  <statistic center="0 0 0.3" extent="1"/>
  <worldbody><light pos="0 0 2"/><geom type="plane" size="0 0 1"/></worldbody>
</mujoco>
"""
FREE = '<body name="box" pos="0 0 1"><freejoint/><geom size="0.1"/></body>'
menagerie = pytest.importorskip("mujoco_menagerie")


def lay_out(root, *, base="", control='ctrlrange="-2 2"', key="") -> None:
    """Write a robot where the package looks for those that were fetched."""
    folder = root / "ufactory_lite6"
    folder.mkdir(exist_ok=True)
    robot = ARM.replace("BASE", base).replace("CTRL", control).replace("KEY", key)
    for entry in menagerie.get(folder.name).entry_points:
        (folder / entry.file).write_text(SCENE if entry.kind == "scene" else robot)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MENAGERIE_ROOT", str(tmp_path))
    lay_out(tmp_path)
    return tmp_path


def test_keeps_the_contract_and_reaches_a_goal_that_is_asked_for(root):
    env = envs.make("ufactory_lite6", size=24).unwrapped
    check_env(env)
    _, info = env.reset(seed=0, options={"start": (0.0, 0.0), "goal": (0.5, -0.5)})
    assert not info["success"] and [q.name for q in env.quantities["state"]][:2] == ["turn", "bend"]
    for step in range(20):
        *_, info = env.step(np.array([1.0, -1.0]) * (step < 5))
    assert info["success"] and info["proprio"] == pytest.approx([0.5, -0.5])
    assert info["state"][:2] == pytest.approx([1.0, -0.75], abs=0.1), "half of each range"
    for wrong in ((1.5, 0.0), (0.0,), (np.nan, 0.0)):
        with pytest.raises(ValueError, match=r"goal is .* expected 2 numbers in \[-1, 1\]"):
            env.reset(options={"goal": wrong})
    env.close()


def test_starts_and_goals_differ_by_seed_and_lie_around_home(root):
    env = envs.make("ufactory_lite6", size=24).unwrapped
    states = np.stack([env.reset(seed=seed)[1]["state"][:2] for seed in range(8)])
    assert states.std(0).min() > 0.1 and np.abs(states.mean(0) - [0.5, -0.5]).max() < 0.5
    env.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": FREE, "key": "0 0 1 1 0 0 0"}, "free base"),
        ({"control": ""}, "no stated range"),
    ],
)
def test_a_robot_of_another_kind_is_refused_in_a_line(root, change, message):
    lay_out(root, **change)
    with pytest.raises(EnvError, match=message) as caught:
        envs.make("ufactory_lite6")
    assert "\n" not in str(caught.value)


def test_a_robot_that_cannot_be_fetched_or_is_unknown_is_told_in_a_line(root):
    with pytest.raises(EnvError, match="'franka_emika_panda' cannot be fetched") as caught:
        envs.make("franka_emika_panda")
    assert "\n" not in str(caught.value)
    with pytest.raises(EnvError, match="nearest: ufactory_lite6"):
        envs.make("ufactory_lite7")
