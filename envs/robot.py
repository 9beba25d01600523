"""Robot: any arm, hand or gripper of MuJoCo Menagerie, brought to the posture of the goal picture.

The robots come with the package `mujoco-menagerie`, which fetches each when it is first asked for.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco's names come from a compiled module without stubs)

from importlib import import_module
from typing import Any

import numpy as np

from jepa_world.envs import Quantity
from jepa_world.envs.tasks import Scene, Task, known_options, light, shifted

import mujoco  # isort: skip  (after tasks, which chooses OpenGL)

STEP = 0.1  # seconds of a step of the environment
RATE = 0.1  # how far an action of 1 moves what is asked of an actuator, of half its range
SPREAD = 0.4  # of half the range, how far from home starts and goals are drawn
SETTLE = 20  # steps in which a posture comes to rest
DISTANCE = 1.6  # of the cameras from the middle, in units of the robot's extent
VIEWS = {"robot_front": ((1, 0, 0), (0, 1, 0)), "robot_side": ((0, -1, 0), (1, 0, 0))}


class RobotEnv(Task):
    """A robot on its base; the goal is a picture of it in another posture.

    Observation: (size, size, 6) bytes, from the front (y to the right) and from the right (x to the
    right). Action: one number in [-1, 1] for every actuator, held for 0.1 s: how what is asked of
    it changes, 1 being a twentieth of its range; 0 asks for the same again. Reward: minus the
    distance to the goal: of all bodies of the robot, the farthest from its place there, in metres.
    An episode never terminates.

    `info`: "goal" (like an observation), "success" (no body farther than `tolerance` metres),
    "state" (float64: joints in radians or metres, then their rates), "proprio" (float32: what is
    asked of the actuators, in [-1, 1] of their ranges), "configuration" (the joints and that),
    "factors" (the values of all).

    `reset(options={"start": ..., "goal": ...})` sets what is asked of the actuators, in [-1, 1],
    and the posture that this settles to from the robot's home, or everything, as in
    "configuration". What is left out is drawn uniformly around home. `factors`: "light" and
    "cameras" (a shift of both along x, y and z, in metres).

    Raises:
        ValueError: the package lacks the robot, cannot fetch it, or it is none of this kind: with a
            free base, without actuators, or with one of no stated range.

    Example:
        env = envs.make("franka_emika_panda", size=32)
    """

    def __init__(
        self,
        robot: str,
        *,
        size: int = 64,
        tolerance: float = 0.05,
        factors: Any = None,
        render_mode: str | None = None,
    ):
        model = _with_views(robot)
        _check(robot, model)
        may_vary = {
            "light": light(model),
            "cameras": shifted(model.cam_pos[-len(VIEWS) :], 0.03 * model.stat.extent),
        }
        substeps, views = max(1, round(STEP / model.opt.timestep)), tuple(VIEWS)
        super().__init__(
            Scene(model, size=size, substeps=substeps, factors=may_vary, camera=views),
            actions=model.nu,
            budget=30,
            tolerance=tolerance,
            factors=factors,
            render_mode=render_mode,
        )
        self._low, high = model.actuator_ctrlrange.T
        self._half = (high - self._low) / 2
        self._home, self._asked = self._at_home()
        self._still = self._asked
        self._kinematics = mujoco.MjData(model)
        self._goal_bodies = np.zeros((model.nbody, 3))
        joints = [model.joint(number) for number in range(model.njnt)]
        slide = [joint.type[0] == mujoco.mjtJoint.mjJNT_SLIDE for joint in joints]
        names = [joint.name or f"joint {joint.id}" for joint in joints]
        self.quantities = {
            "state": (
                *(_quantity(name, s) for name, s in zip(names, slide, strict=True)),
                *(
                    Quantity(f"{name} rate", "m/s" if s else "rad/s")
                    for name, s in zip(names, slide, strict=True)
                ),
            )
        }

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Place the robot at rest at the start, and picture the goal.

        Raises:
            ValueError: an option that is unknown, of another shape, or beyond its limit.
        """
        super().reset(seed=seed)
        options = known_options(options, "start", "goal", "factors")
        drawn = self._still + self.np_random.uniform(-SPREAD, SPREAD, (2, len(self._still)))
        drawn = drawn.clip(-1.0, 1.0)  # both, so that giving one keeps the other
        goal, _ = self._posture("goal", options.get("goal", drawn[1]))
        start, self._asked = self._posture("start", options.get("start", drawn[0]))
        self._scene.vary(options.get("factors", self._factors), self.np_random.spawn(1)[0])
        self._goal_bodies = self._bodies(goal)
        self._goal_picture = self._scene.place(goal)
        self._observation = self._scene.place(start)
        return self._observation, self._info()

    def goal_distance(self) -> float:
        """Return how far the farthest body is from its place in the goal now, in metres."""
        return float(self._distances(self._scene.data.qpos))

    def goal_distances(self, actions: np.ndarray) -> np.ndarray:
        """Return the distance in metres after every action of sequences (s, h, a), as (s, h).

        Starts from the present state, which is left as it was; nothing is rendered.
        """
        actions = np.asarray(actions, np.float64)
        asked, given = self._asked, np.empty_like(actions)
        for step in range(actions.shape[1]):
            asked = _moved(asked, actions[:, step])
            given[:, step] = self._control(asked)
        positions = self._scene.imagine(given)
        return np.apply_along_axis(self._distances, -1, positions)

    def _given(self, action: np.ndarray) -> np.ndarray:
        action = np.asarray(action, np.float64)
        if action.shape != self._asked.shape or not np.isfinite(action).all():
            return action  # which the scene refuses
        self._asked = _moved(self._asked, action)
        return self._control(self._asked)

    def _control(self, asked: np.ndarray) -> np.ndarray:
        return self._low + (asked + 1.0) * self._half

    def _at_home(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the joints at home, the model's first key, and what is asked there."""
        model = self._scene.model
        keyed = model.nkey > 0
        control = model.key_ctrl[0] if keyed else np.zeros(model.nu)
        joints = model.key_qpos[0] if keyed else model.qpos0
        return joints.copy(), ((control - self._low) / self._half - 1.0).clip(-1.0, 1.0)

    def _posture(self, name: str, value: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return the joints and what is asked of the actuators, of a reset option."""
        value, model = np.asarray(value, np.float64), self._scene.model
        asked = value[-model.nu :]
        if (
            value.shape not in ((model.nu,), (model.nq + model.nu,))
            or not np.isfinite(value).all()
            or np.abs(asked).max() > 1.0
        ):
            raise ValueError(
                f"{name} is {value!r}, expected {model.nu} numbers in [-1, 1] for the actuators, "
                f"or the {model.nq + model.nu} of info['configuration']"
            )
        if len(value) > model.nu:
            return value[: model.nq], asked
        data = mujoco.MjData(model)
        data.qpos[:], data.ctrl[:] = self._home, self._control(asked)
        mujoco.mj_step(model, data, SETTLE * self._scene.substeps)
        return data.qpos.copy(), asked

    def _bodies(self, joints: np.ndarray) -> np.ndarray:
        self._kinematics.qpos[:] = joints
        mujoco.mj_kinematics(self._scene.model, self._kinematics)
        return self._kinematics.xpos.copy()

    def _distances(self, joints: np.ndarray) -> np.ndarray:
        return np.linalg.norm(self._bodies(joints) - self._goal_bodies, axis=-1).max()

    def _measured(self) -> dict[str, Any]:
        data = self._scene.data
        return {
            "state": np.concatenate([data.qpos, data.qvel]),
            "proprio": self._asked.astype(np.float32),
            "configuration": np.concatenate([data.qpos, self._asked]),
        }


def _moved(asked: np.ndarray, action: np.ndarray) -> np.ndarray:
    return (asked + RATE * action.clip(-1.0, 1.0)).clip(-1.0, 1.0)


def _quantity(name: str, slides: bool) -> Quantity:
    return Quantity(name, "m") if slides else Quantity(name, "rad", 2 * np.pi)


def _with_views(robot: str) -> mujoco.MjModel:
    """Return the compiled scene of a robot with a camera before it and one at its right."""
    menagerie = import_module("mujoco_menagerie")
    try:
        spec = menagerie.get(robot).spec()
    except (menagerie.MenagerieError, OSError) as error:
        raise ValueError(f"robot {robot!r} cannot be fetched: {error}") from error
    stat = spec.compile().stat
    for name, (towards, right) in VIEWS.items():
        place = stat.center + DISTANCE * stat.extent * np.array(towards)
        spec.worldbody.add_camera(name=name, pos=place, xyaxes=[*right, 0, 0, 1])
    return spec.compile()


def _check(robot: str, model: mujoco.MjModel) -> None:
    kinds = (mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE)
    if not np.isin(model.jnt_type, kinds).all():
        raise ValueError(f"robot {robot!r} has a free base or ball joints")
    if model.nu == 0 or not model.actuator_ctrllimited.all():
        raise ValueError(f"robot {robot!r} has no actuators, or one of no stated range (ctrlrange)")
