"""Arm: a seven-joint arm, seen from two sides, brings its tip to where the goal picture shows it.

The kinematics are the Franka Panda's (`panda.py`, `arm.xml`). Metres from the base, x forward, y
left, z up. Of one view alone the depth would be a guess, so a frame holds two, one behind the other
in the channels: from the front (y to the right, z up) and from the right (x to the right, z up).
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco's names come from a compiled module without stubs)

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from jepa_world.envs import Quantity, panda
from jepa_world.envs.tasks import Factor, Scene, Task, color, known_options, light, scaled, shifted

import mujoco  # isort: skip  (after tasks, which chooses OpenGL)

STEP, SUBSTEPS = 0.1, 10  # seconds of a step of the environment, and what it is made of
VIEWS = ("front", "side")
TIP_SPEED = 0.4  # m/s of an action of 1 along an axis: 4 cm a step
JOINT_SPEED = 1.5  # rad/s of an action of 1 in the joint variant
BOX = np.array([[0.32, -0.30, 0.05], [0.60, 0.30, 0.45]])  # where the tip is led and drawn, metres
SPREAD = np.array([0.8, 0.4, 0.6, 0.4, 0.6, 0.5, 0.6])  # rad from rest, of joint angles drawn
PLAIN = ("table", "wall", "base", "hand")  # materials whose colour does not vary over all colours
FAR = 0.10  # metres; the tip moves less in a step
CLEAR = 0.05  # metres above the table, of a tip drawn
FINGER = 0.02  # metres; how far each finger is open where nothing is held
JOINTS = tuple(Quantity(f"joint {number}", "rad", 2 * np.pi) for number in range(1, 8))
JOINT_RATES = tuple(Quantity(f"{joint.name} rate", "rad/s") for joint in JOINTS)
TIP = tuple(Quantity(f"tip {axis}", "m") for axis in "xyz")


class ArmEnv(Task):
    """A Panda arm over a table; the goal is a picture of the arm with its tip at another place.

    Observation: (size, size, 6) bytes, two views. Action: numbers in [-1, 1], held for 0.1 s. With
    `control="tip"` three of them ask the tip for up to 0.4 m/s along x, y and z, the hand held
    down, within a box of 0.28 x 0.60 x 0.40 m; with `control="joint"` seven ask the joints for up
    to 1.5 rad/s. 0 rests. Reward: minus the distance of the tip to the goal's tip, in metres. An
    episode never terminates; joint angles and speeds stay within the published limits.

    `info`: "goal" (like an observation), "success" (tip within `tolerance` metres of the goal's
    tip), "state" (seven joint angles in rad, their rates in rad/s; float64), "proprio" (the tip in
    metres, the joint angles; float32), "configuration" (the joint angles), "factors" (the values of
    all).

    `reset(options={"start": ..., "goal": ...})` sets either joint angles (seven, radians) or the
    place of the tip (three, metres), to which the hand comes held down. What is left out is drawn
    uniformly: the place of the tip within the box, or joint angles around rest. `factors` of the
    options, or of the constructor for all episodes, vary the picture ("random", or a value or
    "random" by name): "light", "table_color", "wall_color", "upper_color", "lower_color",
    "wrist_color", "tip_color" (red, green, blue), "cameras" (shift of both in metres along x, y and
    z), "zoom", "width" (scale of the links).

    Example:
        >>> env = ArmEnv(size=32)
        >>> observation, info = env.reset(seed=0, options={"goal": (0.5, 0.2, 0.3)})
        >>> info["goal"].shape, info["success"]
        ((32, 32, 6), False)
        >>> observation, reward, terminated, truncated, info = env.step(np.zeros(3, np.float32))
    """

    quantities: dict[str, tuple[Quantity, ...]] = {  # noqa: RUF012
        "state": (*JOINTS, *JOINT_RATES),
        "proprio": (*TIP, *JOINTS),
    }

    def __init__(
        self,
        *,
        control: str = "tip",
        size: int = 64,
        tolerance: float = 0.02,
        factors: Any = None,
        render_mode: str | None = None,
    ):
        if control not in ("tip", "joint"):
            raise ValueError(f"control is {control!r}, expected 'tip' or 'joint'")
        self._by_tip = control == "tip"
        super().__init__(
            arm_scene("arm.xml", size=size, without=("left_finger", "right_finger")),
            actions=3 if self._by_tip else 7,
            budget=20,
            tolerance=tolerance,
            factors=factors,
            render_mode=render_mode,
        )
        self._goal_tip = np.zeros(3)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Place the arm at rest at the start, and picture the goal.

        Raises:
            ValueError: an option that is unknown, of another shape, or out of the arm's reach.
        """
        super().reset(seed=seed)
        options = known_options(options, "start", "goal", "factors")
        draw = self._draw_place if self._by_tip else self._draw_angles
        drawn = [
            draw(self.np_random),
            draw(self.np_random),
        ]  # both, so that giving one keeps the other
        goal = configuration("goal", options.get("goal", drawn[1]))
        start = configuration("start", options.get("start", drawn[0]))
        self._scene.vary(options.get("factors", self._factors), self.np_random.spawn(1)[0])
        self._goal_tip = panda.chain(goal)[0]
        self._goal_picture = self._scene.place([*goal, FINGER, FINGER])
        self._observation = self._scene.place([*start, FINGER, FINGER])
        self._scene.data.act[:] = FINGER
        return self._observation, self._info()

    def goal_distance(self) -> float:
        """Return the distance of the tip to the goal's tip now, in metres."""
        tip = panda.chain(self._scene.data.qpos[:7])[0]
        return float(np.linalg.norm(tip - self._goal_tip))

    def goal_distances(self, actions: np.ndarray) -> np.ndarray:
        """Return the distance in metres after every action of sequences (s, h, a), as (s, h).

        Starts from the present state, which is left as it was; nothing is rendered.
        """
        actions = np.clip(np.asarray(actions, np.float64), -1.0, 1.0)
        angles = self._scene.imagine_controlled(actions, self._control)[..., :7]
        return np.linalg.norm(panda.chain(angles)[0] - self._goal_tip, axis=-1)

    def implausible(self, generator: np.random.Generator) -> dict[str, np.ndarray]:
        """Picture what cannot come next: the arm elsewhere, in another colour, and gone."""
        angles = self._scene.data.qpos[:7]
        here, draw = panda.chain(angles)[0], self._draw_place if self._by_tip else self._draw_angles
        there = angles
        while np.linalg.norm(panda.chain(there)[0] - here) < FAR:
            there = configuration("elsewhere", draw(generator))
        materials = ("upper", "lower", "wrist", "hand", "tip")
        return self._scene.implausible([*there, FINGER, FINGER], materials, generator)

    def _given(self, action: np.ndarray) -> np.ndarray:
        action = within_bounds(action, self.action_space)
        self._scene.data.qacc_warmstart[:] = 0.0  # as in imagine_controlled
        return self._control(self._scene.data.qpos, action)

    def _control(self, positions: np.ndarray, action: np.ndarray) -> np.ndarray:
        """Return what actions (..., a) ask at positions (..., nq): arm and fingers (..., 9)."""
        angles = positions[..., :7]
        arm = lead_tip(angles, action, BOX) if self._by_tip else turn_joints(angles, action)
        return np.concatenate([arm, np.zeros((*arm.shape[:-1], 2))], -1)

    def _draw_place(self, generator: np.random.Generator) -> np.ndarray:
        return generator.uniform(*BOX)

    def _draw_angles(self, generator: np.random.Generator) -> np.ndarray:
        while True:
            angles = panda.REST + generator.uniform(-SPREAD, SPREAD)
            if panda.chain(angles)[0][2] > CLEAR:
                return angles

    def _measured(self) -> dict[str, Any]:
        angles = self._scene.data.qpos[:7]
        return {
            "state": np.concatenate([angles, self._scene.data.qvel[:7]]),
            "proprio": np.concatenate([panda.chain(angles)[0], angles]).astype(np.float32),
            "configuration": angles.copy(),
        }


def arm_scene(
    xml: str, *, size: int, without: tuple[str, ...], views: tuple[str, ...] = VIEWS
) -> Scene:
    """Return the scene of arm.xml, or of a file that includes it, without the geoms named.

    `views` are the cameras of a frame, one behind the other in the channels.
    """
    model = mujoco.MjModel.from_xml_path(str(Path(__file__).with_name(xml)))
    for name in without:
        model.geom(name).matid = -1
        model.geom(name).rgba = 0.0
    return Scene(model, size=size, substeps=SUBSTEPS, factors=_factors(model), camera=views)


def _factors(model: mujoco.MjModel) -> dict[str, Factor]:
    links = np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE)
    shown = [model.mat(index).name for index in sorted(set(model.geom_matid) - {-1})]
    colors = {f"{name}_color": color(model, name) for name in shown if name not in PLAIN}
    return {
        "light": light(model),
        **{f"{name}_color": color(model, name, 0.6, 1.0) for name in ("table", "wall")},
        **colors,
        "cameras": shifted(model.cam_pos, 0.03),
        "zoom": scaled(0.95, 1.1, model.cam_fovy),
        "width": scaled(0.75, 1.25, *(model.geom_size[link, :1] for link in links)),
    }


def lead_tip(angles: np.ndarray, action: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Return joint velocities (..., 7) for an action of the tip (..., 3), which stays in a box."""
    tip = panda.chain(angles)[0]
    there = np.clip(tip + STEP * TIP_SPEED * action, *box)
    return _within_limits(angles, panda.follow(angles, (there - tip) / STEP))


def turn_joints(angles: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Return joint velocities (..., 7) for an action of the joints (..., 7).

    All are zero where they would bring the hand down onto the table.
    """
    speeds = _within_limits(angles, JOINT_SPEED * action)
    tip, rotation, _ = panda.chain(angles + STEP * speeds)
    lowest = np.minimum(tip[..., 2] - 0.03, tip[..., 2] - panda.TIP * rotation[..., 2, 2] - 0.08)
    height = panda.chain(angles)[0][..., 2]
    return np.where((lowest > 0.0)[..., None] | (tip[..., 2] > height)[..., None], speeds, 0.0)


def _within_limits(angles: np.ndarray, speeds: np.ndarray) -> np.ndarray:
    low, high = panda.LOW + panda.MARGIN, panda.HIGH - panda.MARGIN
    return np.clip(speeds, (low - angles) / STEP, (high - angles) / STEP)


def within_bounds(action: np.ndarray, space: gymnasium.Space[Any]) -> np.ndarray:
    """Return an action within its bounds.

    Raises:
        ValueError: an action of another shape, or one that is not finite.
    """
    action = np.asarray(action)
    (count,) = space.shape or (0,)
    if action.shape != (count,) or not np.isfinite(action).all():
        raise ValueError(f"action is {action!r}, expected {count} finite numbers in [-1, 1]")
    return np.clip(action.astype(np.float64), -1.0, 1.0)


def configuration(name: str, value: Any) -> np.ndarray:
    """Return the joint angles (7,) that a reset option names: themselves, or the tip's place.

    Raises:
        ValueError: neither, out of the limits, or out of reach.
    """
    value = np.asarray(value, np.float64)
    if value.shape == (3,) and np.isfinite(value).all():
        try:
            return panda.posture(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if value.shape == (7,) and ((value >= panda.LOW) & (value <= panda.HIGH)).all():
        return value
    raise ValueError(
        f"{name} is {value!r}, expected seven joint angles in radians within the limits of "
        "panda.py, or the place of the tip: three numbers, in metres from the base"
    )
