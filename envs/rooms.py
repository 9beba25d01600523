"""Rooms: a ball, seen from above, goes through a door to where the goal picture shows it.

Where the wall stands and where its door is are drawn anew for every episode: they are part of what
an encoder has to see. The distance to the goal is the length of the shortest way through the door.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco's names come from a compiled module without stubs)

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jepa_world.envs import Quantity
from jepa_world.envs.maze import Ways
from jepa_world.envs.tasks import (
    Factor,
    Scene,
    Task,
    camera,
    color,
    extent,
    known_options,
    light,
    zoom,
)

import mujoco  # isort: skip  (after tasks, which chooses OpenGL)

SUBSTEPS = 10  # of 0.01 s: one step of the environment is 0.1 s
EDGE = 0.25  # metres; the two rooms are a square of twice that
STEP = 0.03  # metres the ball moves in a step under an action of 1
DOOR = 0.10  # metres, the width of the door
THICK = 0.015  # metres, half the thickness of the wall
WALL = 0.10  # metres; the wall stands within this of the middle
PLACE = 0.15  # metres; the middle of the door is within this of the middle
CLEAR = 0.03  # metres from the walls at which start and goal are drawn
FAR = 0.10  # metres; the ball moves less in a step
SLACK = 0.005  # metres; contacts are a little soft, and a state seen in one can be set again


class RoomsEnv(Task):
    """A ball of 2 cm radius in two rooms, 0.5 m x 0.5 m together; the goal is a picture.

    Frame: metres from the middle, x to the right in the picture, y up. Observation: (size, size, 3)
    bytes. Action: two numbers in [-1, 1], the speed along x and y; 1 is 0.3 m/s, 3 cm in the step
    of 0.1 s. Reward: minus the distance to the goal. An episode never terminates.

    A wall along y, 3 cm thick, has a door 10 cm wide. The distance to the goal is the length of the
    way to it round the wall, of a point, in metres; success is a distance of at most `tolerance`.

    `info`: "goal" (like an observation), "success", "configuration" (x, y), "state" (x, y in m,
    their rates in m/s, x of the wall, y of the door's middle; float64), "proprio" (x, y, wall,
    door; float32), "factors".

    `reset(options={"start": (x, y), "goal": (x, y), "wall": x, "door": y})` sets places; what is
    left out is drawn: the wall within 10 cm of the middle, the door within 15, the start in either
    room, the goal in the other one. `factors` of the options, or of the constructor for all
    episodes, vary it ("random", or a value or "random" by name): "light", "floor_color",
    "wall_color", "ball_color" (red, green, blue), "camera" (shift in metres along x and y), "zoom",
    "ball_size" (scale).

    Example:
        >>> env = RoomsEnv(size=32)
        >>> options = {"start": (-0.2, 0), "goal": (0.2, 0), "wall": 0.0, "door": 0.0}
        >>> observation, info = env.reset(seed=0, options=options)
        >>> info["success"], round(env.goal_distance(), 3)
        (False, 0.4)
    """

    quantities: dict[str, tuple[Quantity, ...]] = {  # noqa: RUF012
        "state": (
            Quantity("ball x", "m"),
            Quantity("ball y", "m"),
            Quantity("ball x rate", "m/s"),
            Quantity("ball y rate", "m/s"),
            Quantity("wall x", "m"),
            Quantity("door y", "m"),
        )
    }

    def __init__(
        self,
        *,
        size: int = 64,
        tolerance: float = 0.03,
        factors: Any = None,
        render_mode: str | None = None,
    ):
        model = mujoco.MjModel.from_xml_path(str(Path(__file__).with_name("rooms.xml")))
        super().__init__(
            Scene(model, size=size, substeps=SUBSTEPS, factors=_factors(model)),
            actions=2,
            budget=50,
            tolerance=tolerance,
            factors=factors,
            render_mode=render_mode,
        )
        self.wall = self.door = 0.0
        self._ways = _ways(self.wall, self.door)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Build the wall, place the ball at rest at the start, and picture the goal.

        Raises:
            ValueError: an option that is unknown, of another shape or out of its range, a place in
                the wall.
        """
        super().reset(seed=seed)
        options = known_options(options, "start", "goal", "wall", "door", "factors")
        wall, door = self.np_random.uniform((-WALL, -PLACE), (WALL, PLACE))
        side = self.np_random.choice([-1, 1])
        shares = self.np_random.random((2, 2))
        self.wall = _within("wall", options.get("wall", wall), WALL)
        self.door = _within("door", options.get("door", door), PLACE)
        self._build()
        self._scene.vary(options.get("factors", self._factors), self.np_random.spawn(1)[0])
        start = self._place("start", options.get("start", self._drawn(shares[0], side)))
        goal = self._place("goal", options.get("goal", self._drawn(shares[1], -side)))
        self._ways.aim(goal)
        self._goal_picture = self._scene.place(goal)
        self._observation = self._scene.place(start)
        return self._observation, self._info()

    def goal_distance(self) -> float:
        """Return the length of the way to the goal now, in metres."""
        return float(self._ways(self._scene.data.qpos))

    def goal_distances(self, actions: np.ndarray) -> np.ndarray:
        """Return the distance in metres after every action of sequences (s, h, 2), as (s, h).

        Starts from the present state, which is left as it was; nothing is rendered.
        """
        return self._ways(self._scene.imagine(actions))

    def guide(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """Go to places drawn anew, in the other room more often than not, with noise.

        A third of the ways are straight, whatever stands in them: who has never met the wall does
        not know that it is one.
        """
        while True:
            here = np.sign(self._scene.data.qpos[0] - self.wall)
            side = -here if generator.random() < 0.7 else here
            pace = generator.uniform(0.5, 1.0)
            place = self._drawn(generator.random(2), side)
            straight = generator.random() < 1 / 3
            for action in self._straight_to(place) if straight else self._go_to(place):
                yield (pace * action + 0.3 * generator.standard_normal(2)).clip(-1, 1)

    def expert(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """Go to the goal, through the door where it is in the other room, and stay there."""
        while True:
            yield from self._go_to(self._ways.goal)
            yield np.zeros(2)

    def implausible(self, generator: np.random.Generator) -> dict[str, np.ndarray]:
        """Picture what cannot come next: the ball elsewhere, in another colour, and gone."""
        here = there = self._scene.data.qpos
        while np.linalg.norm(there - here) < FAR:
            there = self._drawn(generator.random(2), generator.choice([-1, 1]))
        return self._scene.implausible(there, ("ball",), generator)

    def _measured(self) -> dict[str, Any]:
        data, built = self._scene.data, np.array([self.wall, self.door])
        return {
            "state": np.concatenate([data.qpos, data.qvel, built]),
            "proprio": np.concatenate([data.qpos, built]).astype(np.float32),
            "configuration": data.qpos.copy(),
        }

    def _build(self) -> None:
        """Move the pieces of the wall to where it stands and its door is."""
        for name, side in (("below", -1), ("above", 1)):
            piece = self._scene.model.geom(name)
            piece.pos[:2] = self.wall, self.door + side * (DOOR / 2 + piece.size[1])
        self._ways = _ways(self.wall, self.door)

    def _drawn(self, shares: np.ndarray, side: float) -> np.ndarray:
        """Return a place in the left room (side -1) or the right one, by shares in [0, 1]."""
        far, near = side * (EDGE - CLEAR), self.wall + side * (THICK + CLEAR)
        x = near + shares[0] * (far - near)
        return np.array([x, (2 * shares[1] - 1) * (EDGE - CLEAR)])

    def _place(self, name: str, value: Any) -> np.ndarray:
        value = np.asarray(value, np.float64)
        if value.shape != (2,) or not np.isfinite(value).all():
            raise ValueError(f"{name} is {value!r}, expected (x, y) in metres")
        radius = self._scene.model.geom("ball").size[0]
        if min(self._ways.gap(value), (EDGE - np.abs(value)).min()) < radius - SLACK:
            raise ValueError(f"{name} is {value!r}: nearer to a wall than the ball's {radius} m")
        return value

    def _go_to(self, place: np.ndarray) -> Iterator[np.ndarray]:
        """Yield actions that lead to a place, in front of the door and then behind it first."""
        while True:
            here = self._scene.data.qpos
            next_place = self._through(here, place)
            way = next_place - here
            if next_place is place and np.linalg.norm(way) < 0.2 * STEP:
                return
            yield way / max(STEP, np.linalg.norm(way))

    def _straight_to(self, place: np.ndarray) -> Iterator[np.ndarray]:
        """Yield actions that lead straight towards a place, at most 15."""
        for _ in range(15):
            way = place - self._scene.data.qpos
            if np.linalg.norm(way) < 0.2 * STEP:
                return
            yield way / max(STEP, np.linalg.norm(way))

    def _through(self, here: np.ndarray, place: np.ndarray) -> np.ndarray:
        """Return the next place on the way: before the door, behind it, or the last one."""
        reach = THICK + CLEAR
        side, wanted = here[0] - self.wall, np.sign(place[0] - self.wall)
        if side * wanted >= reach:
            return place
        if abs(here[1] - self.door) < 0.02:
            return np.array([self.wall + 1.2 * wanted * reach, self.door])
        return np.array([self.wall + np.sign(side) * reach, self.door])


def _ways(wall: float, door: float) -> Ways:
    """Return the ways round the wall: two boxes, with the corners of the door."""
    low, high, left, right = door - DOOR / 2, door + DOOR / 2, wall - THICK, wall + THICK
    boxes = np.array([[left, -1.0, right, low], [left, high, right, 1.0]])
    off = 1e-6  # metres
    corners = [[x, y] for x in (left - off, right + off) for y in (low + off, high - off)]
    return Ways(boxes, np.array(corners))


def _within(name: str, value: Any, limit: float) -> float:
    value = np.asarray(value, np.float64)
    if value.shape != () or not abs(value) <= limit:
        raise ValueError(f"{name} is {value.tolist()!r}, expected a number within {limit} of 0")
    return float(value)


def _factors(model: mujoco.MjModel) -> dict[str, Factor]:
    return {
        "light": light(model),
        "floor_color": color(model, "floor", 0.6, 1.0),
        "wall_color": color(model, "wall", 0.0, 0.5),
        "ball_color": color(model, "ball"),
        "camera": camera(model, 0.02),
        "zoom": zoom(model, 0.95, 1.15),
        "ball_size": extent(model, 0.7, 1.3, "ball"),
    }
