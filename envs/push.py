"""Push: a disc pushes a block over a table, seen from above, to where the goal picture shows it.

The block rests when nothing pushes it: friction with the table is a drag, equal in every direction.
With forces F at r from its centre, c v = F and c_turn w = r x F (all but its short inertia).
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco's names come from a compiled module without stubs)

from collections.abc import Iterator
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
    scaled,
    zoom,
)

import mujoco  # isort: skip  (after tasks, which chooses OpenGL)

SUBSTEPS = 10  # of 0.01 s: one step of the environment is 0.1 s
EDGE = 0.25  # metres; the table is a square of twice that
STEP = 0.03  # metres the disc moves in a step under an action of 1
PLACE = 0.07  # metres; the block's centre is drawn within this of the table's, along x and y
CLEAR = 0.16  # metres; the disc is drawn at least this far from the block's centre
FAR = 0.10  # metres; the block moves less in a step
SLACK = 0.005  # metres; contacts are a little soft, and a state seen in one can be set again
CIRCLE = 0.165  # metres; the disc passes the block of any size at this distance from its centre
SQUARE = {"bar": (0.05, 0.025, 0.02), "stem": (0.05, 0.025, 0.02)}  # half sizes of the two halves


class PushEnv(Task):
    """A disc of 2 cm radius on a table of 0.5 m x 0.5 m pushes a block; the goal is a picture.

    Frame: metres from the table's centre, x to the right in the picture, y up; angles in radians,
    counter-clockwise. Observation: (size, size, 3) bytes. Action: two numbers in [-1, 1], the speed
    of the disc along x and y; 1 is 0.3 m/s, 3 cm in the step of 0.1 s. Reward: minus the distance
    to the goal. An episode never terminates.

    The block is a "t", 16 cm wide and long, its stem of another colour, or a "square" of 10 cm.
    Success: its centre of mass within `tolerance` metres of the goal's and its angle within
    `angle_tolerance` radians, a square's modulo a quarter turn. The distance to the goal is the
    larger of the two, in metres, an angle of `angle_tolerance` counting as `tolerance`. Where the
    disc ends does not matter.

    `info`: "goal" (like an observation), "success", "configuration" (disc x, y, block x, y, angle),
    "state" (the same, then their rates in m/s and rad/s), "proprio" (the same with cosine and sine
    of the angle in place of the angle, of four times the angle for a square; float32), "factors".

    `reset(options={"start": c, "goal": c})` sets configurations; what is left out is drawn: the
    block's centre within 7 cm of the table's along x and y, at any angle, the disc elsewhere.
    `factors` of the options, or of the constructor for all episodes, vary it ("random", or a value
    or "random" by name): "light", "table_color", "block_color", "disc_color" (red, green, blue),
    "camera" (shift in metres along x and y), "zoom", "block_size", "disc_size" and "friction"
    (scales; the last is between disc and block, 0.6).

    Example:
        >>> env = PushEnv(size=32)
        >>> start, goal = (0.0, -0.2, 0.0, 0.0, 0.0), (0.0, -0.2, 0.0, 0.015, 0.3)
        >>> observation, info = env.reset(seed=0, options={"start": start, "goal": goal})
        >>> info["success"], round(env.goal_distance(), 4)
        (True, 0.0172)
    """

    def __init__(
        self,
        *,
        block: str = "t",
        size: int = 64,
        tolerance: float = 0.02,
        angle_tolerance: float = np.pi / 9,
        factors: Any = None,
        render_mode: str | None = None,
    ):
        if block not in ("t", "square"):
            raise ValueError(f"block is {block!r}, expected 't' or 'square'")
        if not (tolerance > 0 and angle_tolerance > 0):
            raise ValueError(
                f"need tolerances above 0, got {tolerance} m and {angle_tolerance} rad"
            )
        self.angle_tolerance = angle_tolerance
        self.period = 2 * np.pi if block == "t" else np.pi / 2
        self.quantities = {"state": _quantities(self.period)}
        model = _model(block)
        self._materials = ("block", "stem") if block == "t" else ("block",)
        super().__init__(
            Scene(model, size=size, substeps=SUBSTEPS, factors=_factors(model)),
            actions=2,
            budget=50,
            tolerance=tolerance,
            factors=factors,
            render_mode=render_mode,
        )
        self._goal = np.zeros(5)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Place disc and block at rest at the start, and picture the goal.

        Raises:
            ValueError: an option that is unknown or of another shape, a configuration off the table
                or with the disc in the block.
        """
        super().reset(seed=seed)
        options = known_options(options, "start", "goal", "factors")
        start, goal = _drawn(self.np_random), _drawn(self.np_random)
        self._scene.vary(options.get("factors", self._factors), self.np_random.spawn(1)[0])
        start = self._configuration("start", options.get("start", start))
        self._goal = self._configuration("goal", options.get("goal", goal))
        self._goal_picture = self._scene.place(self._goal)
        self._observation = self._scene.place(start)
        return self._observation, self._info()

    def goal_distance(self) -> float:
        """Return the distance of the block to the goal now, in metres."""
        return float(self._distance(self._scene.data.qpos))

    def goal_distances(self, actions: np.ndarray) -> np.ndarray:
        """Return the distance in metres after every action of sequences (s, h, 2), as (s, h).

        Starts from the present state, which is left as it was; nothing is rendered.
        """
        return self._distance(self._scene.imagine(actions))

    def guide(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """Push the block towards places and angles drawn anew, with noise; at times wander."""
        while True:
            if generator.random() < 0.15:
                yield from [generator.uniform(-1, 1, 2)] * 6
            target = generator.uniform(-PLACE, PLACE, 2)
            turn = self._scene.data.qpos[4] + generator.uniform(-np.pi, np.pi)
            pushing = self._push_to(np.array([*target, turn]))
            for _, action in zip(range(int(generator.integers(20, 60))), pushing, strict=False):
                yield (action + 0.2 * generator.standard_normal(2)).clip(-1, 1)

    def expert(self, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """Push the block to the goal, and let it lie there."""
        while True:
            for _, action in zip(range(60), self._push_to(self._goal[2:]), strict=False):
                yield action
            if self.goal_distance() > 0.3 * self.tolerance:  # stuck, in a corner: back off
                yield from [generator.uniform(-1, 1, 2)] * 3
            yield np.zeros(2)

    def implausible(self, generator: np.random.Generator) -> dict[str, np.ndarray]:
        """Picture what cannot come next: the block elsewhere, in another colour, and gone."""
        there = self._scene.data.qpos.copy()
        disc, here = there[:2], there[2:4].copy()
        while np.linalg.norm(there[2:4] - here) < FAR or self._gap(disc, there[2:]) < 0:
            there[2:4] = generator.uniform(-PLACE, PLACE, 2)
        return self._scene.implausible(there, self._materials, generator)

    @property
    def _radius(self) -> float:
        return float(self._scene.model.geom("disc").size[0])

    def _distance(self, positions: np.ndarray) -> np.ndarray:
        away = np.linalg.norm(positions[..., 2:4] - self._goal[2:4], axis=-1)
        turned = np.abs(self._turn(positions[..., 4], self._goal[4]))
        return np.maximum(away, turned * self.tolerance / self.angle_tolerance)

    def _turn(self, angle: np.ndarray, goal: float) -> np.ndarray:
        """Return the signed angle from `angle` to the goal's, at most half a period."""
        half = self.period / 2
        return (goal - angle + half) % self.period - half

    def _measured(self) -> dict[str, Any]:
        data, fold = self._scene.data, 2 * np.pi / self.period
        angle = fold * data.qpos[4]
        proprio = np.array([*data.qpos[:4], np.cos(angle), np.sin(angle)], np.float32)
        return {
            "state": np.concatenate([data.qpos, data.qvel]),
            "proprio": proprio,
            "configuration": data.qpos.copy(),
        }

    def _configuration(self, name: str, value: Any) -> np.ndarray:
        value = np.asarray(value, np.float64)
        if value.shape != (5,) or not np.isfinite(value).all():
            raise ValueError(f"{name} is {value!r}, expected (disc x, y, block x, y, angle)")
        if np.abs(value[:4]).max() > EDGE:
            raise ValueError(f"{name} is {value!r}, expected places within {EDGE} m of the centre")
        if self._gap(value[:2], value[2:]) < -SLACK:
            raise ValueError(f"{name} is {value!r}: the disc lies in the block")
        return value

    def _gap(self, disc: np.ndarray, block: np.ndarray) -> np.ndarray:
        """Return the space in metres between discs at (..., 2) and the block at (x, y, angle)."""
        model = self._scene.model
        local = (disc - block[:2]) @ _rotation(block[2])
        parts = [model.geom(name) for name in ("bar", "stem")]
        outside = [np.abs(local - part.pos[:2]) - part.size[:2] for part in parts]
        gaps = [
            np.linalg.norm(np.maximum(d, 0), axis=-1) + np.minimum(d.max(-1), 0) for d in outside
        ]
        return np.minimum(*gaps) - self._radius

    def _push_to(self, target: np.ndarray) -> Iterator[np.ndarray]:
        """Yield actions that push the block to (x, y, angle), until it is there.

        Go to the place on the block's side where a straight push helps most, push, look again.
        """
        while True:
            push = self._best_push(target)
            if push is None:
                return
            yield from self._go_behind(push)
            for _ in range(12):
                advance = self._advance(push[None], target)[0][0]
                if advance < 0.002:
                    break
                yield self._towards(push[:2] + push[2:] * (self._radius - advance))

    def _best_push(self, target: np.ndarray) -> np.ndarray | None:
        """Return the place and the normal (x, y, nx, ny) in the block's frame that help most."""
        pushes = self._places()
        advance, gain = self._advance(pushes, target)
        disc, block = self._scene.data.qpos[:2], self._scene.data.qpos[2:]
        gain[~self._on_table(pushes[:, :2] + 0.01 * pushes[:, 2:])] = 0
        if (advance < 0.002).all() or gain.max() < 4e-6:
            return None
        here = (disc - block[:2]) @ _rotation(block[2])
        way = np.linalg.norm(here - pushes[:, :2], axis=1)
        return pushes[(gain * np.exp(-way / 0.3)).argmax()]

    def _places(self) -> np.ndarray:
        """Return where the disc may push: points on the block's sides with normals (p, 4)."""
        model, points = self._scene.model, []
        for name in ("bar", "stem"):
            (x, y), (w, h) = model.geom(name).pos[:2], model.geom(name).size[:2]
            for share in np.linspace(-0.9, 0.9, 7):
                points += [(x + share * w, y + side * h, 0, side) for side in (-1, 1)]
                points += [(x + side * w, y + share * h, side, 0) for side in (-1, 1)]
        points = np.array(points)
        touching = points[:, :2] + points[:, 2:] * (self._radius + 0.001)
        return points[self._gap(touching, np.zeros(3)) > 0]

    def _advance(self, pushes: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how far (m) to push at each place, and by how much that lowers the squared error.

        A radian counts as 8 cm. Under drag a push by 1 along -normal moves the centre by f / c and
        turns it by f (r x d) / c_turn, with f = 1 / (1 / c + (r x d)^2 / c_turn).
        """
        block, damping = self._scene.data.qpos[2:], self._scene.model.dof_damping
        place, push = pushes[:, :2], -pushes[:, 2:]
        lever = place[:, 0] * push[:, 1] - place[:, 1] * push[:, 0]
        force = 1 / (1 / damping[2] + lever**2 / damping[4])
        motion = np.column_stack([push / damping[2], 0.08 * lever / damping[4]]) * force[:, None]
        offset = (target[:2] - block[:2]) @ _rotation(block[2])
        error = np.array([*offset, 0.08 * self._turn(block[2], target[2])])
        along, power = motion @ error, (motion**2).sum(1)
        advance = np.clip(along / power, 0, 0.08)
        return advance, 2 * advance * along - advance**2 * power

    def _go_behind(self, push: np.ndarray) -> Iterator[np.ndarray]:
        """Yield actions that bring the disc before a place: round the block, then straight in."""
        for _ in range(30):
            disc, block = self._scene.data.qpos[:2], self._scene.data.qpos[2:]
            here = (disc - block[:2]) @ _rotation(block[2])
            behind = push[:2] + push[2:] * (self._radius + 0.01)
            aside = abs((here - behind) @ (push[3], -push[2]))
            if np.linalg.norm(here - behind) < 0.008:
                return
            if aside < 0.012 and (here - behind) @ push[2:] > -0.005:
                goal = behind
            else:
                goal = self._round(here, behind, push[2:])
            yield self._towards(goal)

    def _round(self, here: np.ndarray, behind: np.ndarray, normal: np.ndarray) -> np.ndarray:
        """Return the next place on a circle about the block, on the way to before `behind`.

        Outward first, where the table has room for it.
        """
        out = behind @ normal
        entry = behind + normal * (np.sqrt(CIRCLE**2 - behind @ behind + out**2) - out)
        angle, wanted = (np.arctan2(place[1], place[0]) for place in (here, entry))
        outward = CIRCLE * np.array([np.cos(angle), np.sin(angle)])
        if np.linalg.norm(here) < CIRCLE - 0.02 and self._on_table(outward):
            return outward
        turn = np.clip((wanted - angle + np.pi) % (2 * np.pi) - np.pi, -0.35, 0.35)
        return CIRCLE * np.array([np.cos(angle + turn), np.sin(angle + turn)])

    def _on_table(self, places: np.ndarray) -> np.ndarray:
        """Return whether the disc has room at places (..., 2) in the block's frame."""
        block = self._scene.data.qpos[2:]
        world = block[:2] + places @ _rotation(block[2]).T
        return np.abs(world).max(-1) < EDGE - self._radius

    def _towards(self, place: np.ndarray) -> np.ndarray:
        """Return the action that moves the disc to a place in the block's frame."""
        disc, block = self._scene.data.qpos[:2], self._scene.data.qpos[2:]
        way = (block[:2] + place @ _rotation(block[2]).T - disc) / STEP
        return way / max(1.0, np.linalg.norm(way))


def _quantities(period: float) -> tuple[Quantity, ...]:
    places = [Quantity(f"{thing} {axis}", "m") for thing in ("disc", "block") for axis in "xy"]
    rates = [Quantity(f"{place.name} rate", "m/s") for place in places]
    turn = Quantity("block angle", "rad", period)
    return (*places, turn, *rates, Quantity("block angle rate", "rad/s"))


def _rotation(angle: float) -> np.ndarray:
    """Return the matrix that turns columns by an angle; a row times it turns back."""
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _drawn(generator: np.random.Generator) -> np.ndarray:
    block = generator.uniform((-PLACE, -PLACE, -np.pi), (PLACE, PLACE, np.pi))
    while True:
        disc = generator.uniform(-EDGE + 0.03, EDGE - 0.03, 2)
        if np.linalg.norm(disc - block[:2]) > CLEAR:
            return np.concatenate([disc, block])


def _model(block: str) -> mujoco.MjModel:
    spec = mujoco.MjSpec.from_file(str(Path(__file__).with_name("push.xml")))
    if block == "square":
        for side, (name, size) in zip((1, -1), SQUARE.items(), strict=True):
            spec.geom(name).size, spec.geom(name).pos = size, (0, side * size[1], 0)
            spec.geom(name).mass, spec.geom(name).material = 0.05, "block"
    return spec.compile()


def _factors(model: mujoco.MjModel) -> dict[str, Factor]:
    touching = [model.geom(name).friction[:1] for name in ("disc", "bar", "stem")]
    return {
        "light": light(model),
        "table_color": color(model, "table", 0.6, 1.0),
        "block_color": color(model, "block"),
        "disc_color": color(model, "disc"),
        "camera": camera(model, 0.02),
        "zoom": zoom(model, 0.95, 1.15),
        "block_size": extent(model, 0.8, 1.2, "block"),
        "disc_size": extent(model, 0.8, 1.25, "disc"),
        "friction": scaled(0.2, 2.0, *touching),
    }
