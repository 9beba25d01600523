"""Cube: an arm with two fingers carries a cube to where the goal picture shows it.

The arm and its axes are those of `arm.py`: metres from the base, x forward, y left, z up. Its two
views are nearer, so that the fingers, which close along y, are seen to be open or closed.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco's names come from a compiled module without stubs)

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jepa_world.envs import Quantity, panda
from jepa_world.envs.arm import (
    JOINT_RATES,
    JOINTS,
    STEP,
    TIP,
    TIP_SPEED,
    arm_scene,
    lead_tip,
    within_bounds,
)
from jepa_world.envs.tasks import Task, known_options

VIEWS = ("near_front", "near_side")
FINGER_SPEED = 0.15  # m/s of each finger, of an action of 1: open to closed in 3 steps
HALF = 0.02  # metres, half an edge of the cube
FIELD = np.array([[0.36, -0.22], [0.56, 0.22]])  # where the cube is drawn, metres
BOX = np.array([[0.32, -0.30, 0.02], [0.60, 0.30, 0.35]])  # where the tip is led, metres
HOME = np.array([0.42, 0.0, 0.25])  # the tip at reset
OPEN = 0.04  # metres, a finger that is open; one that holds the cube is HALF
FAR = 0.10  # metres; the cube moves less in a step
ABOVE = 0.12  # metres above the cube, where the hand comes from and goes to


class CubeEnv(Task):
    """A Panda arm with two fingers over a cube; the goal is a picture of the cube elsewhere.

    Observation: (size, size, 6) bytes, two views. Action: four numbers in [-1, 1], held for 0.1 s:
    the velocity of the tip along x, y and z, 1 being 0.4 m/s, and the fingers, 1 closing each at
    0.15 m/s and -1 opening it. 0 rests, and keeps hold of what is held. The hand stays pointing
    down, within a box of 0.28 x 0.60 x 0.33 m. Reward: minus the distance of the cube to the goal's
    cube, in metres. An episode never terminates.

    `info`: "goal" (like an observation: the cube at its goal, held by the fingers, as where a
    demonstration of carrying ends), "success" (the cube within `tolerance` metres of the goal's),
    "state" (float64: seven joint angles, two fingers in metres, the cube's place in metres and its
    quaternion, then the rates of them all), "proprio" (float32: the tip in metres, the opening of a
    finger in metres), "configuration" (the first sixteen of the state and what is asked of the two
    fingers), "factors" (the values of all).

    `reset(options={"start": ..., "goal": ...})` sets the place of the cube on the table, x and y in
    metres, or everything, as in "configuration". What is left out is drawn uniformly in front of
    the arm. `factors` are those of `ArmEnv`, but "cube_color" and "finger_color" in place
    of "tip_color".

    Example:
        >>> env = CubeEnv(size=32)
        >>> observation, info = env.reset(seed=0, options={"goal": (0.5, 0.1)})
        >>> info["goal"].shape, info["success"]
        ((32, 32, 6), False)
        >>> for action, _ in zip(env.expert(np.random.default_rng(0)), range(60)):
        ...     *_, info = env.step(action)
        >>> info["success"]
        True
    """

    quantities: dict[str, tuple[Quantity, ...]] = {  # noqa: RUF012
        "state": (
            *JOINTS,
            *(Quantity(f"{side} finger", "m") for side in ("left", "right")),
            *(Quantity(f"cube {axis}", "m") for axis in "xyz"),
            *(Quantity(f"cube quaternion {axis}", "1") for axis in "wxyz"),
            *JOINT_RATES,
            *(Quantity(f"{side} finger rate", "m/s") for side in ("left", "right")),
            *(Quantity(f"cube {axis} rate", "m/s") for axis in "xyz"),
            *(Quantity(f"cube turn {axis}", "rad/s") for axis in "xyz"),
        ),
        "proprio": (*TIP, Quantity("left finger", "m")),
    }

    def __init__(
        self,
        *,
        size: int = 64,
        tolerance: float = 0.04,
        factors: Any = None,
        render_mode: str | None = None,
    ):
        super().__init__(
            arm_scene("cube.xml", size=size, without=("ball",), views=VIEWS),
            actions=4,
            budget=50,
            tolerance=tolerance,
            factors=factors,
            render_mode=render_mode,
        )
        self._home = panda.posture(HOME)
        self._goal_cube = np.zeros(3)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Place the cube at the start, the hand at rest above the table, and picture the goal.

        Raises:
            ValueError: an option that is unknown or of another shape, or a goal out of reach.
        """
        super().reset(seed=seed)
        options = known_options(options, "start", "goal", "factors")
        drawn = self.np_random.uniform(
            FIELD[0], FIELD[1], (2, 2)
        )  # both, so that giving one keeps the other
        goal = self._whole("goal", options.get("goal", drawn[1]), held=True)
        start = self._whole("start", options.get("start", drawn[0]), held=False)
        self._scene.vary(options.get("factors", self._factors), self.np_random.spawn(1)[0])
        self._goal_cube = goal[9:12]
        self._goal_picture = self._scene.place(goal[:16])
        self._observation = self._scene.place(start[:16])
        self._scene.data.act[:] = start[16:]
        return self._observation, self._info()

    @property
    def tip(self) -> np.ndarray:
        """Where the tip is now, (3,) metres."""
        return panda.chain(self._scene.data.qpos[:7])[0]

    @property
    def cube(self) -> np.ndarray:
        """Where the middle of the cube is now, (3,) metres."""
        return self._scene.data.qpos[9:12].copy()

    def goal_distance(self) -> float:
        """Return the distance of the cube to the goal's cube now, in metres."""
        return float(np.linalg.norm(self.cube - self._goal_cube))

    def goal_distances(self, actions: np.ndarray) -> np.ndarray:
        """Return the distance in metres after every action of sequences (s, h, 4), as (s, h).

        Starts from the present state, which is left as it was; nothing is rendered.
        """
        actions = np.clip(np.asarray(actions, np.float64), -1.0, 1.0)
        positions = self._scene.imagine_controlled(actions, _control)
        return np.linalg.norm(positions[..., 9:12] - self._goal_cube, axis=-1)

    def expert(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield the actions that carry the cube to its goal, then lead the hand back and rest.

        Each is for the state that the environment is then in.
        """
        while True:
            if self.goal_distance() > self.tolerance / 4:
                yield from self._carry(self._goal_cube)
            yield from self._lead(lambda: HOME, -1.0)
            yield np.zeros(4, np.float32)

    def guide(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield actions that carry the cube about, with noise, and wander in between.

        Each is for the state that the environment is then in.
        """
        while True:
            place = np.append(generator.uniform(*FIELD), HALF + generator.choice([0.0, 0.1]))
            wander = generator.uniform(*BOX)
            for action in self._carry(place):
                noise = generator.normal(0.0, [0.3, 0.3, 0.3, 0.1]) * (generator.random() < 0.5)
                yield np.clip(action + noise, -1.0, 1.0).astype(np.float32)
            for action in self._lead(lambda place=wander: place, generator.uniform(-1.0, 1.0)):
                yield action

    def _carry(self, place: np.ndarray) -> Iterator[np.ndarray]:
        """Reach, grasp, lift, carry, let down, release, withdraw."""
        above = np.array([0.0, 0.0, ABOVE])
        yield from self._lead(lambda: self.cube + above, -1.0)
        yield from self._lead(lambda: self.cube, -1.0)
        yield from self._grip(1.0)
        lifted = self.tip + above
        yield from self._lead(lambda: lifted, 1.0)
        yield from self._lead(lambda: place + above, 1.0)
        yield from self._lead(lambda: place, 1.0)
        yield from self._grip(-1.0)
        yield from self._lead(lambda: place + above, -1.0)

    def _lead(self, place: Callable[[], np.ndarray], grip: float) -> Iterator[np.ndarray]:
        """Lead the tip to a place, for 2.5 seconds at most."""
        for _ in range(25):
            gap = np.clip(place(), *BOX) - self.tip
            if np.abs(gap).max() < 0.006:
                return
            velocity = np.clip(gap / (STEP * TIP_SPEED), -1.0, 1.0)
            yield np.append(velocity, grip).astype(np.float32)

    def _grip(self, grip: float) -> Iterator[np.ndarray]:
        for _ in range(3):
            yield np.array([0.0, 0.0, 0.0, grip], np.float32)

    def implausible(self, generator: np.random.Generator) -> dict[str, np.ndarray]:
        """Picture what cannot come next: the cube elsewhere, in another colour, and gone."""
        there = self._scene.data.qpos.copy()
        while np.linalg.norm(there[9:11] - self.cube[:2]) < FAR:
            there[9:12] = [*generator.uniform(*FIELD), HALF]
        return self._scene.implausible(there, ("cube",), generator)

    def _given(self, action: np.ndarray) -> np.ndarray:
        action = within_bounds(action, self.action_space)
        self._scene.data.qacc_warmstart[:] = 0.0  # as in imagine_controlled
        return _control(self._scene.data.qpos, action)

    def _whole(self, name: str, value: Any, *, held: bool) -> np.ndarray:
        value = np.asarray(value, np.float64)
        if value.shape not in ((2,), (18,)) or not np.isfinite(value).all():
            raise ValueError(
                f"{name} is {value!r}, expected the cube's place on the table: x and y in metres "
                "from the base; or the 18 numbers of info['configuration']"
            )
        if value.shape == (2,):
            place = np.append(value, HALF)
            arm, opening = (panda.posture(place), HALF) if held else (self._home, OPEN)
            fingers = np.full(2, opening)
            value = np.concatenate([arm, fingers, place, [1.0, 0.0, 0.0, 0.0], fingers])
        return value

    def _measured(self) -> dict[str, Any]:
        data = self._scene.data
        return {
            "state": np.concatenate([data.qpos, data.qvel]),
            "proprio": np.append(self.tip, data.qpos[7]).astype(np.float32),
            "configuration": np.concatenate([data.qpos, data.act]),
        }


def _control(positions: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Return what actions (..., 4) ask at positions (..., nq): arm and fingers (..., 9)."""
    arm = lead_tip(positions[..., :7], action[..., :3], BOX)
    return np.concatenate([arm, np.repeat(-FINGER_SPEED * action[..., 3:], 2, -1)], -1)
