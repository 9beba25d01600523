"""Maze: a ball, seen from above, rolls through a maze to where the goal picture shows it.

The distance to the goal is the length of the shortest way round the walls: over the corners of the
walls, each reached from the next in a straight line (Lozano-Perez and Wesley 1979, visibility
graphs, https://doi.org/10.1145/359156.359164).
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco's names come from a compiled module without stubs)

from collections.abc import Iterator
from itertools import product
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
    extent,
    known_options,
    light,
    zoom,
)

import mujoco  # isort: skip  (after tasks, which chooses OpenGL)

SUBSTEPS = 10  # of 0.01 s: one step of the environment is 0.1 s
CELL = 0.1  # metres, width and height of a cell
STEP = 0.05  # metres the ball moves in a step under an action of 1
INSET = 0.015  # metres; start and goal are drawn at most this far from the middle of a cell
SLACK = 0.008  # metres; contacts are a little soft, and a state seen in one can be set again
THIN = 1e-3  # metres that walls are thicker by for a way: none leads between two that touch
LAYOUTS = {
    "small": """
        #####
        #...#
        ###.#
        #...#
        #####""",
    "medium": """
        ########
        #...#..#
        #.#.##.#
        #.#....#
        #.##.#.#
        #..#.#.#
        ##...#.#
        ########""",
    "large": """
        ############
        #...#......#
        #.#.#.####.#
        #.#...#..#.#
        #.####.#.#.#
        #......#...#
        ###.##.###.#
        #...#......#
        ############""",
}


class MazeEnv(Task):
    """A ball of 3 cm radius rolls through a maze of cells of 10 cm; the goal is a picture.

    Frame: metres from the middle of the maze, x to the right in the picture, y up. Observation:
    (size, size, 3) bytes. Action: two numbers in [-1, 1], the speed along x and y; 1 is 0.5 m/s, 5
    cm in the step of 0.1 s. Reward: minus the distance to the goal. An episode never terminates.

    The maze is a layout's name ("small", "medium", "large") or rows of # (wall) and . (free),
    walled all round. The distance to the goal is the length of the way to it round the walls, of a
    point, in metres; success is a distance of at most `tolerance`.

    `info`: "goal" (like an observation), "success", "configuration" (x, y), "state" (x, y in m,
    their rates in m/s; float64), "proprio" (x, y; float32), "factors".

    `reset(options={"start": (x, y), "goal": (x, y)})` sets places; what is left out is drawn near
    the middle of a free cell, the goal's another than the start's. `factors` of the options, or of
    the constructor for all episodes, vary it ("random", or a value or "random" by name): "light",
    "floor_color", "wall_color", "ball_color" (red, green, blue), "camera" (shift in metres along x
    and y), "zoom", "ball_size" (scale).

    Example:
        >>> env = MazeEnv(size=32)
        >>> observation, info = env.reset(seed=0, options={"start": (0, 0.1), "goal": (0, -0.1)})
        >>> info["success"], round(env.goal_distance(), 2)
        (False, 0.25)
    """

    quantities: dict[str, tuple[Quantity, ...]] = {  # noqa: RUF012
        "state": (
            Quantity("ball x", "m"),
            Quantity("ball y", "m"),
            Quantity("ball x rate", "m/s"),
            Quantity("ball y rate", "m/s"),
        )
    }

    def __init__(
        self,
        *,
        layout: str = "small",
        size: int = 64,
        tolerance: float = 0.05,
        factors: Any = None,
        render_mode: str | None = None,
    ):
        self.walls = _read(layout)
        boxes = _boxes(self.walls)
        model = _model(boxes, (max(self.walls.shape) - 1) * CELL)
        super().__init__(
            Scene(model, size=size, substeps=SUBSTEPS, factors=_factors(model)),
            actions=2,
            budget=50,
            tolerance=tolerance,
            factors=factors,
            render_mode=render_mode,
        )
        self._cells = np.argwhere(~self.walls)
        self._ways = Ways(boxes, _corners(self.walls))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Place the ball at rest at the start, and picture the goal.

        Raises:
            ValueError: an option that is unknown or of another shape, a place in a wall.
        """
        super().reset(seed=seed)
        options = known_options(options, "start", "goal", "factors")
        cells = self.np_random.choice(self._cells, 2, replace=False)
        drawn = self._middle(cells) + self.np_random.uniform(-INSET, INSET, (2, 2))
        self._scene.vary(options.get("factors", self._factors), self.np_random.spawn(1)[0])
        start = self._place("start", options.get("start", drawn[0]))
        goal = self._place("goal", options.get("goal", drawn[1]))
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
        """Go to free cells drawn anew, with noise."""
        while True:
            cell = generator.choice(self._cells)
            pace = generator.uniform(0.5, 1.0)
            for action in self._go_to(self._middle(cell)):
                yield (pace * action + 0.3 * generator.standard_normal(2)).clip(-1, 1)

    def expert(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """Go to the goal from cell to cell, and stay there."""
        while True:
            yield from self._go_to(self._ways.goal)
            yield np.zeros(2)

    def implausible(self, generator: np.random.Generator) -> dict[str, np.ndarray]:
        """Picture what cannot come next: the ball elsewhere, in another colour, and gone."""
        middles = self._middle(self._cells)
        order = np.linalg.norm(middles - self._scene.data.qpos, axis=1).argsort()
        there = middles[generator.choice(order[len(order) // 2 :])]  # in the farther half
        return self._scene.implausible(there, ("ball",), generator)

    def _measured(self) -> dict[str, Any]:
        data = self._scene.data
        return {
            "state": np.concatenate([data.qpos, data.qvel]),
            "proprio": data.qpos.astype(np.float32),
            "configuration": data.qpos.copy(),
        }

    def _place(self, name: str, value: Any) -> np.ndarray:
        value = np.asarray(value, np.float64)
        if value.shape != (2,) or not np.isfinite(value).all():
            raise ValueError(f"{name} is {value!r}, expected (x, y) in metres")
        radius = self._scene.model.geom("ball").size[0]
        if self._ways.gap(value) + THIN < radius - SLACK:
            raise ValueError(f"{name} is {value!r}: nearer to a wall than the ball's {radius} m")
        return value

    def _middle(self, cells: Any) -> np.ndarray:
        """Return the middles (..., 2) of cells given as (row, column)."""
        return _vertices(self.walls, np.asarray(cells) + 0.5)

    def _cell(self, place: np.ndarray) -> tuple[int, int]:
        rows, columns = self.walls.shape
        row, column = rows / 2 - place[1] / CELL, place[0] / CELL + columns / 2
        return int(row), int(column)

    def _go_to(self, place: np.ndarray) -> Iterator[np.ndarray]:
        """Yield actions that lead to a place through the middles of cells, until it is there."""
        far = _steps_to(self.walls, self._cell(place))
        while True:
            here = self._scene.data.qpos
            row, column = self._cell(here)
            around = [(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)]
            following = min(around, key=lambda cell: far[cell])
            way = place - here if far[row, column] == 0 else self._middle(following) - here
            if far[row, column] == 0 and np.linalg.norm(way) < 0.2 * STEP:
                return
            yield way / max(STEP, np.linalg.norm(way))


class Ways:
    """The lengths of the shortest ways of a point to a goal, round boxes.

    Args:
        boxes: (w, 4), x and y of the lower left and the upper right corner of each.
        corners: (k, 2), the corners that a way may bend at, a little off the boxes.

    Example:
        >>> ways = Ways(np.array([[-1.0, -9.0, 1.0, 0.0]]), np.array([[-1.0, 0.0], [1.0, 0.0]]))
        >>> ways.aim(np.array([2.0, -1.0]))
        >>> round(float(ways(np.array([-2.0, -1.0]))), 2)  # sqrt(2) + 2 + sqrt(2)
        4.83
    """

    def __init__(self, boxes: np.ndarray, corners: np.ndarray) -> None:
        self.boxes, self.corners = boxes, corners
        lengths = self._straight(corners[:, None], corners)
        for middle in range(len(corners)):  # Floyd and Warshall
            through = lengths[:, middle, None] + lengths[middle]
            lengths = np.minimum(lengths, through)
        self._between = lengths

    def aim(self, goal: np.ndarray) -> None:
        """Set the goal (x, y)."""
        self.goal = goal
        self._from_corners = (self._between + self._straight(self.corners, goal)).min(1)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Return the lengths (...) of the ways from places (..., 2) to the goal."""
        first = self._straight(places[..., None, :], self.corners)
        bent = (first + self._from_corners).min(-1)
        return np.minimum(bent, self._straight(places, self.goal))

    def gap(self, place: np.ndarray) -> float:
        """Return the distance of a place (x, y) to the nearest box, 0 within one."""
        outside = np.maximum(self.boxes[:, :2] - place, place - self.boxes[:, 2:]).clip(min=0)
        return float(np.linalg.norm(outside, axis=1).min())

    def _straight(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return the lengths of the lines between places (..., 2); infinite through a box."""
        way = b - a
        way = np.where(way == 0, 1e-12, way)[..., None, :]
        enter, leave = ((box - a[..., None, :]) / way for box in np.split(self.boxes, 2, axis=1))
        first = np.minimum(enter, leave).max(-1).clip(min=0)
        last = np.maximum(enter, leave).min(-1).clip(max=1)
        length = np.linalg.norm(b - a, axis=-1)
        return np.where((last > first).any(-1), np.inf, length)


def _read(layout: str) -> np.ndarray:
    """Return where a layout has walls (rows, columns).

    Raises:
        ValueError: no name of a layout and no walled rows of # and ., or free cells apart.
    """
    rows = LAYOUTS.get(layout, layout).split()
    if {len(row) for row in rows} != {len(rows[0]) if rows else 0} or set("".join(rows)) != {*"#."}:
        raise ValueError(
            f"layout is {layout!r}, expected {', '.join(LAYOUTS)}, or rows of # and . of one length"
        )
    walls = np.array([[cell == "#" for cell in row] for row in rows])
    if not (walls[[0, -1]].all() and walls[:, [0, -1]].all()):
        raise ValueError(f"layout is {layout!r}: its first and last rows and columns must be walls")
    free = np.argwhere(~walls)
    if len(free) < 2 or not np.isfinite(_steps_to(walls, tuple(free[0]))[~walls]).all():
        raise ValueError(f"layout is {layout!r}: needs two free cells, and a way between any two")
    return walls


def _steps_to(walls: np.ndarray, goal: tuple[int, int]) -> np.ndarray:
    """Return from every cell the steps to a goal, from cell to cell; infinite in walls."""
    far = np.full(walls.shape, np.inf)
    far[goal] = 0
    ring = [goal]
    while ring:
        row, column = ring.pop(0)
        for cell in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if not walls[cell] and np.isinf(far[cell]):
                far[cell] = far[row, column] + 1
                ring.append(cell)
    return far


def _vertices(walls: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Return the places (..., 2) of the upper left corners of cells (row, column)."""
    rows, columns = walls.shape
    return CELL * np.stack([cells[..., 1] - columns / 2, rows / 2 - cells[..., 0]], -1)


def _boxes(walls: np.ndarray) -> np.ndarray:
    """Return boxes (w, 4) that cover the walls, few and large."""
    left, boxes = walls.copy(), []
    for row, column in product(*map(range, walls.shape)):
        if not left[row, column]:
            continue
        right, low = column, row
        while right + 1 < walls.shape[1] and left[row, right + 1]:
            right += 1
        while low + 1 < walls.shape[0] and left[low + 1, column : right + 1].all():
            low += 1
        left[row : low + 1, column : right + 1] = False
        corners = _vertices(walls, np.array([[low + 1, column], [row, right + 1]]))
        boxes.append(corners.reshape(4) + np.array([-THIN, -THIN, THIN, THIN]))
    return np.array(boxes)


def _corners(walls: np.ndarray) -> np.ndarray:
    """Return the places (k, 2), two THIN off the walls, that a way round them may bend at."""
    places = []
    for row, column in product(range(1, walls.shape[0]), range(1, walls.shape[1])):
        around = walls[row - 1 : row + 1, column - 1 : column + 1]
        if around.sum() == 1:
            below, right = np.argwhere(around)[0]
            off = 2 * THIN * np.array([1 - 2 * right, 2 * below - 1])
            places.append(_vertices(walls, np.array([row, column])) + off)
    return np.array(places).reshape(-1, 2)


def _model(boxes: np.ndarray, width: float) -> mujoco.MjModel:
    spec = mujoco.MjSpec.from_file(str(Path(__file__).with_name("maze.xml")))
    spec.camera("above").fovy = 2 * np.degrees(np.arctan(width / 2 / 4))
    for box in boxes:
        low, high = box[:2] + THIN, box[2:] - THIN
        spec.worldbody.add_geom(
            type=mujoco.mjtGeom.mjGEOM_BOX,
            pos=[*(low + high) / 2, 0],
            size=[*(high - low) / 2, 0.03],
            material="wall",
            condim=1,
        )
    return spec.compile()


def _factors(model: mujoco.MjModel) -> dict[str, Factor]:
    return {
        "light": light(model),
        "floor_color": color(model, "floor", 0.6, 1.0),
        "wall_color": color(model, "wall", 0.0, 0.5),
        "ball_color": color(model, "ball"),
        "camera": camera(model, 0.02),
        "zoom": zoom(model),
        "ball_size": extent(model, 0.6, 1.1, "ball"),
    }
