"""Reach: a two-link arm, seen from above, brings its tip to where the goal picture shows it.

The forward kinematics of the tip, with links of l = 0.20 m: x = l cos q1 + l cos(q1 + q2), and y
the same with sines: metres from the shoulder, x to the right in the picture, y up.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco's names come from a compiled module without stubs)

from pathlib import Path
from typing import Any

import numpy as np

from jepa_world.envs import Quantity
from jepa_world.envs.tasks import (
    Factor,
    Scene,
    Task,
    camera,
    color,
    known_options,
    light,
    scaled,
    zoom,
)

import mujoco  # isort: skip  (after tasks, which chooses OpenGL)

LINK = 0.20  # metres, both links
SUBSTEPS = 5  # of 0.02 s: one step of the environment is 0.1 s
LOW, HIGH = np.array([-np.pi, 0.0]), np.array([np.pi, 2.6])  # joint angles drawn at reset, rad
SLACK = 0.15  # rad; the elbow's limits are a little soft, and a state seen there can be set again
TORQUE = 1.0  # N m of an action of 1 in the torque variant
FAR = 0.25  # metres; the tip moves less in a step


class ReachEnv(Task):
    """A two-link arm on a table; the goal is a picture of the arm at another configuration.

    Observation: (size, size, 3) bytes. Action: two numbers in [-1, 1]; with `control="velocity"` an
    action of 1 asks a joint for 3 rad/s, reached well within the step of 0.1 s, and 0 rests; with
    `control="torque"` 1 is 1 N m, against damping. Reward: minus the distance of the tip to the
    goal's tip, in metres. An episode never terminates.

    `info`: "goal" (like an observation), "success" (tip within `tolerance` metres of the goal's
    tip), "state" (q1, q2 in rad, their rates in rad/s; float64), "proprio" (cos q1, sin q1, cos q2,
    sin q2; float32), "configuration" (q1, q2 in rad), "factors" (the values of all).

    `reset(options={"start": (q1, q2), "goal": (q1, q2)})` sets joint angles in radians; what is
    left out is drawn uniformly within the joints' limits (the shoulder turns without limit).
    `factors` of the options, or of the constructor for all episodes, vary the picture ("random", or
    a value or "random" by name): "light", "table_color", "upper_color", "lower_color", "tip_color"
    (red, green, blue), "camera" (shift in metres along x and y), "zoom", "width" (scale of links
    and tip).

    Example:
        >>> env = ReachEnv(size=32)
        >>> observation, info = env.reset(seed=0, options={"goal": (0.5, 1.0)})
        >>> info["goal"].shape, info["success"]
        ((32, 32, 3), False)
        >>> observation, reward, terminated, truncated, info = env.step(np.zeros(2, np.float32))
    """

    quantities: dict[str, tuple[Quantity, ...]] = {  # noqa: RUF012
        "state": (
            Quantity("shoulder", "rad", 2 * np.pi),
            Quantity("elbow", "rad", 2 * np.pi),
            Quantity("shoulder rate", "rad/s"),
            Quantity("elbow rate", "rad/s"),
        )
    }

    def __init__(
        self,
        *,
        control: str = "velocity",
        size: int = 64,
        tolerance: float = 0.05,
        factors: Any = None,
        render_mode: str | None = None,
    ):
        if control not in ("velocity", "torque"):
            raise ValueError(f"control is {control!r}, expected 'velocity' or 'torque'")
        model = mujoco.MjModel.from_xml_path(str(Path(__file__).with_name("reach.xml")))
        if control == "torque":
            model.actuator_gainprm[:, 0] = TORQUE
            model.actuator_biasprm[:] = 0.0
        super().__init__(
            Scene(model, size=size, substeps=SUBSTEPS, factors=_factors(model)),
            actions=2,
            budget=15,
            tolerance=tolerance,
            factors=factors,
            render_mode=render_mode,
        )
        self._goal_tip = np.zeros(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Place the arm at rest at the start, and picture the goal.

        Raises:
            ValueError: an option that is unknown, of another shape, or beyond its limit.
        """
        super().reset(seed=seed)
        options = known_options(options, "start", "goal", "factors")
        drawn = self.np_random.uniform(
            LOW, HIGH, (2, 2)
        )  # both, so that giving one keeps the other
        goal = _configuration("goal", options.get("goal", drawn[1]))
        start = _configuration("start", options.get("start", drawn[0]))
        self._scene.vary(options.get("factors", self._factors), self.np_random.spawn(1)[0])
        self._goal_tip = tip(goal)
        self._goal_picture = self._scene.place(goal)
        self._observation = self._scene.place(start)
        return self._observation, self._info()

    def goal_distance(self) -> float:
        """Return the distance of the tip to the goal's tip now, in metres."""
        return float(np.linalg.norm(tip(self._scene.data.qpos) - self._goal_tip))

    def goal_distances(self, actions: np.ndarray) -> np.ndarray:
        """Return the distance in metres after every action of sequences (s, h, 2), as (s, h).

        Starts from the present state, which is left as it was; nothing is rendered.
        """
        return np.linalg.norm(tip(self._scene.imagine(actions)) - self._goal_tip, axis=-1)

    def implausible(self, generator: np.random.Generator) -> dict[str, np.ndarray]:
        """Picture what cannot come next: the arm elsewhere, in another colour, and gone."""
        here = tip(self._scene.data.qpos)
        while np.linalg.norm(tip(there := generator.uniform(LOW, HIGH)) - here) < FAR:
            pass
        return self._scene.implausible(there, ("upper", "lower", "tip"), generator)

    def _measured(self) -> dict[str, Any]:
        angles = self._scene.data.qpos
        proprio = np.stack([np.cos(angles), np.sin(angles)], axis=-1).reshape(4)
        return {
            "state": np.concatenate([angles, self._scene.data.qvel]),
            "proprio": proprio.astype(np.float32),
            "configuration": angles.copy(),
        }


def _factors(model: mujoco.MjModel) -> dict[str, Factor]:
    widths = [model.geom(name).size[:1] for name in ("hub", "upper", "lower", "tip")]
    colors = {f"{name}_color": color(model, name) for name in ("upper", "lower", "tip")}
    return {
        "light": light(model),
        "table_color": color(model, "table", 0.6, 1.0),
        **colors,
        "camera": camera(model, 0.04),
        "zoom": zoom(model),
        "width": scaled(0.75, 1.25, *widths),
    }


def tip(angles: np.ndarray) -> np.ndarray:
    """Return the tip (..., 2), metres from the shoulder, of joint angles (..., 2) in radians."""
    shoulder, both = angles[..., 0], angles[..., 0] + angles[..., 1]
    return LINK * np.stack(
        [np.cos(shoulder) + np.cos(both), np.sin(shoulder) + np.sin(both)], axis=-1
    )


def _configuration(name: str, angles: Any) -> np.ndarray:
    angles = np.asarray(angles, np.float64)
    if (
        angles.shape != (2,)
        or not np.isfinite(angles).all()
        or not (LOW[1] - SLACK <= angles[1] <= HIGH[1] + SLACK)
    ):
        raise ValueError(
            f"{name} is {angles!r}, expected two joint angles in radians, the elbow within "
            f"{LOW[1]} to {HIGH[1]}"
        )
    return angles
