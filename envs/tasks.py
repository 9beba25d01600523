"""What every task is made of: a scene that moves, is seen and varies.

A task is one `.py` beside one `.xml`; it is a `Task`, which holds a `Scene`, and says what an
action, a start and a goal are. A factor of variation is a number (or several) of the model, of a
stated range, that a reset draws or is given; what a task is asked to do never depends on it.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco's names come from a compiled module without stubs)

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from jepa_world.envs.rendering import SmoothRenderer, choose_gl

choose_gl()  # before mujoco, which reads the choice when it is imported

import mujoco  # noqa: E402
from mujoco import rollout  # noqa: E402

STATE = mujoco.mjtState.mjSTATE_FULLPHYSICS.value
RANDOM = "random"  # in place of a factor's value, or of all


class Scene:
    """A model of MuJoCo with its state, its pictures, its rollouts and its factors of variation.

    Args:
        model: The compiled model, with one actuator for every number of an action.
        size: Height and width of a picture.
        substeps: Time steps of the model that a step of the environment is.
        factors: What may vary, by name; what is not asked for keeps the model's own value.
        camera: Name of the camera, or of several, whose pictures lie one behind the other in the
            channels.

    Example:
        >>> xml = "<mujoco><worldbody><camera/><geom name='g' size='0.1'/></worldbody></mujoco>"
        >>> model = mujoco.MjModel.from_xml_string(xml)
        >>> scene = Scene(model, size=8, substeps=1, factors={"light": light(model)}, camera=0)
        >>> scene.vary({"light": (0.7, 0.7, 0.7)}, np.random.default_rng(0))
        >>> scene.place(()).shape, scene.values["light"]
        ((8, 8, 3), array([0.7, 0.7, 0.7]))
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        *,
        size: int,
        substeps: int,
        factors: Mapping[str, "Factor"],
        camera: str | int | tuple[str, ...] = "above",
    ) -> None:
        self.model, self.data = model, mujoco.MjData(model)
        self.substeps = substeps
        self.factors = factors
        self._values = {name: factor.default for name, factor in factors.items()}
        cameras = camera if isinstance(camera, tuple) else (camera,)
        self.shape = (size, size, 3 * len(cameras))
        self._renderers = [SmoothRenderer(model, size=size, camera=one) for one in cameras]
        self._imagined = mujoco.MjData(model)
        self._rollout = rollout.Rollout(nthread=0)

    def vary(self, asked: Any, generator: np.random.Generator) -> None:
        """Give the factors their values for an episode.

        Args:
            asked: A value, or "random", by the factor's name; "random" alone draws them all,
                uniformly; what is not named returns to the model's own value, None all of them.
            generator: Draws; what it gives a factor does not depend on which others are drawn.

        Raises:
            ValueError: an unknown factor, a value of another shape or beyond its range.
        """
        if asked is None:
            asked = {}
        elif isinstance(asked, str) and asked == RANDOM:
            asked = dict.fromkeys(self.factors, RANDOM)
        if not isinstance(asked, Mapping):
            raise ValueError(f"factors is {asked!r}, expected {RANDOM!r} or a value by name")
        if unknown := set(asked) - set(self.factors):
            raise ValueError(f"unknown factors {sorted(unknown)}; known: {', '.join(self.factors)}")
        for name, factor in self.factors.items():
            drawn = generator.uniform(factor.low, factor.high, factor.default.shape)
            value = asked.get(name, factor.default)
            at_random = isinstance(value, str) and value == RANDOM
            self._values[name] = factor.set(name, drawn if at_random else value)

    @property
    def values(self) -> dict[str, np.ndarray]:
        """Return the present value of every factor."""
        return {name: value.copy() for name, value in self._values.items()}

    def place(self, positions: Any) -> np.ndarray:
        """Set the positions (nq), everything at rest, and return the picture."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = positions
        mujoco.mj_forward(self.model, self.data)
        return self.picture()

    def step(self, action: np.ndarray) -> np.ndarray:
        """Hold an action for a step of the environment and return the picture.

        Raises:
            ValueError: an action of another shape, or one that is not finite.
        """
        action = np.asarray(action)
        count = self.model.nu
        if action.shape != (count,) or not np.isfinite(action).all():
            raise ValueError(f"action is {action!r}, expected {count} finite numbers in [-1, 1]")
        self.data.ctrl[:] = action
        mujoco.mj_step(self.model, self.data, self.substeps)
        mujoco.mj_kinematics(self.model, self.data)  # mj_step leaves the poses a substep behind
        return self.picture()

    def picture(self) -> np.ndarray:
        """Render the present state, (size, size, 3) for every camera."""
        return self._render(self.data)

    def implausible(
        self, elsewhere: Any, materials: tuple[str, ...], generator: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """Return pictures that cannot come next: the present one with a thing changed.

        Args:
            elsewhere: Positions (nq) that have it in another place.
            materials: What it is made of; the materials of nothing else.
            generator: Draws the colour.

        Returns:
            By name: "teleport", "colour" (one material has another, at least half the edge of the
            cube of red, green and blue away), "vanished". The state is left as it was.
        """
        self._imagined.qpos[:] = elsewhere
        mujoco.mj_forward(self.model, self._imagined)
        pictures = {"teleport": self._render(self._imagined)}
        views = [self.model.material(name).rgba for name in materials]
        own = [view.copy() for view in views]
        changed = int(generator.integers(len(views)))
        views[changed][:3] = _another_color(own[changed][:3], generator)
        pictures["colour"] = self.picture()
        for view, rgba in zip(views, own, strict=True):
            view[:] = [*rgba[:3], 0.0]
        pictures["vanished"] = self.picture()
        for view, rgba in zip(views, own, strict=True):
            view[:] = rgba
        return pictures

    def _render(self, data: mujoco.MjData) -> np.ndarray:
        return np.concatenate([render(data) for render in self._renderers], axis=-1)

    def imagine(self, actions: np.ndarray) -> np.ndarray:
        """Return the positions (s, h, nq) after every action of sequences (s, h, a).

        Starts from the present state, which is left as it was; nothing is rendered.
        """
        warm = np.tile(self.data.qacc_warmstart, (len(actions), 1))
        return self._roll_out(self._present(len(actions)), actions, warm)[..., self._positions]

    def imagine_controlled(
        self, actions: np.ndarray, control: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> np.ndarray:
        """Return the same where a controller stands between actions and actuators.

        `control` maps positions (s, nq) and an action at each (s, a) to what the actuators get
        (s, nu). The solver begins every step anew: so must the environment's.
        """
        states = self._present(len(actions))
        cold = np.zeros((len(actions), self.model.nv))
        positions = np.empty((*actions.shape[:2], self.model.nq))
        for step in range(actions.shape[1]):
            given = control(states[:, self._positions], actions[:, step])
            states = self._roll_out(states, given[:, None], cold)[:, 0]
            positions[:, step] = states[:, self._positions]
        return positions

    def close(self) -> None:
        """Free the OpenGL contexts."""
        for renderer in self._renderers:
            renderer.close()

    @property
    def _positions(self) -> slice:
        return slice(1, 1 + self.model.nq)  # of a state, which begins with the time

    def _present(self, samples: int) -> np.ndarray:
        state = np.empty(mujoco.mj_stateSize(self.model, STATE))
        mujoco.mj_getState(self.model, self.data, state, STATE)
        return np.tile(state, (samples, 1))

    def _roll_out(self, states: np.ndarray, given: np.ndarray, warm: np.ndarray) -> np.ndarray:
        samples, horizon, _ = given.shape
        after = np.empty((samples, horizon * self.substeps, states.shape[1]))
        self._rollout.rollout(
            [self.model] * samples,
            [self._imagined],
            states,
            np.repeat(np.asarray(given, np.float64), self.substeps, axis=1),
            skip_checks=True,
            nstep=horizon * self.substeps,
            initial_warmstart=warm,
            state=after,
        )
        return after[:, self.substeps - 1 :: self.substeps]


class Task(gymnasium.Env[np.ndarray, np.ndarray]):
    """What the tasks have in common: an action is held, a goal is a picture, `info` has names.

    A task draws start and goal in `reset`, knows its `goal_distance`, and says what `info` holds
    beside "goal", "success" and "factors" in `_measured`, and in `_given` what the actuators are
    given for an action.

    Args:
        scene: Moves, and is seen.
        actions: Numbers of an action, each in [-1, 1].
        budget: Environment steps of an episode, unless it is given others.
        tolerance: Distance to the goal that counts as success, in metres.
        factors: Of variation, of all episodes that are not given others.
        render_mode: "rgb_array", or none.

    Raises:
        ValueError: a tolerance that is not above 0, factors that are unknown or out of range.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        scene: Scene,
        *,
        actions: int,
        budget: int,
        tolerance: float,
        factors: Any,
        render_mode: str | None,
    ):
        if not tolerance > 0:
            raise ValueError(f"tolerance is {tolerance}, expected metres above 0")
        self.render_mode, self.budget, self.tolerance = render_mode, budget, tolerance
        self.observation_space = gymnasium.spaces.Box(0, 255, scene.shape, np.uint8)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (actions,), np.float32)
        scene.vary(factors, np.random.default_rng(0))  # a mistake in them is told now
        self._scene, self._factors = scene, factors
        self._goal_picture = self._observation = np.zeros(scene.shape, np.uint8)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Hold an action for 0.1 s; numbers beyond [-1, 1] count as the bound.

        Raises:
            ValueError: an action of another shape, or one that is not finite.
        """
        self._observation = self._scene.step(self._given(action))
        return self._observation, -self.goal_distance(), False, False, self._info()

    def goal_distance(self) -> float:
        """Return the distance to the goal now, in metres."""
        raise NotImplementedError

    def render(self) -> np.ndarray | None:
        """Return the views of the last observation side by side, or None without a render mode."""
        if self.render_mode != "rgb_array":
            return None
        views = np.split(self._observation, self._observation.shape[-1] // 3, -1)
        return np.concatenate(views, 1)

    def close(self) -> None:
        """Free the OpenGL contexts."""
        self._scene.close()

    def _given(self, action: np.ndarray) -> np.ndarray:
        return action

    def _measured(self) -> dict[str, Any]:
        raise NotImplementedError

    def _info(self) -> dict[str, Any]:
        return {
            "goal": self._goal_picture.copy(),
            "success": self.goal_distance() <= self.tolerance,
            **self._measured(),
            "factors": self._scene.values,
        }


@dataclass(frozen=True)
class Factor:
    """Numbers of a model that may vary: the model's own value, the range, and how to set them."""

    default: np.ndarray
    low: float
    high: float
    write: Callable[[np.ndarray], None]

    def set(self, name: str, value: Any) -> np.ndarray:
        """Set the numbers in the model and return them.

        Raises:
            ValueError: another shape, or beyond the range (the model's own value always fits).
        """
        try:
            value = np.asarray(value, np.float64)
        except (TypeError, ValueError):
            value = np.asarray(value)
        within = (
            value.dtype == np.float64
            and value.shape == self.default.shape
            and (
                np.array_equal(value, self.default)
                or bool(((self.low <= value) & (value <= self.high)).all())
            )
        )
        if not within:
            count = self.default.size
            raise ValueError(
                f"factor {name} is {value.tolist()!r}, expected {count} "
                f"number{'s' * (count > 1)} within {self.low} to {self.high}"
            )
        self.write(value)
        return value


def placed(view: np.ndarray, low: float, high: float) -> Factor:
    """Return the factor that is these numbers of a model themselves, given as a view of them."""

    def write(value: np.ndarray) -> None:
        view[...] = value

    return Factor(np.array(view, np.float64), low, high, write)


def shifted(view: np.ndarray, reach: float) -> Factor:
    """Return the factor that is added to these numbers of a model: 0, within -reach to reach."""
    own = np.array(view)

    def write(value: np.ndarray) -> None:
        view[...] = own + value

    return Factor(np.zeros(own.shape), -reach, reach, write)


def scaled(low: float, high: float, *views: np.ndarray) -> Factor:
    """Return the factor, one number, that all these numbers of a model are multiplied by: 1."""
    own = [np.array(view) for view in views]

    def write(value: np.ndarray) -> None:
        for view, numbers in zip(views, own, strict=True):
            view[...] = numbers * value

    return Factor(np.ones(()), low, high, write)


def light(model: mujoco.MjModel) -> Factor:
    """Return the colour of the light that is everywhere: red, green, blue of 0.5 to 1."""
    return placed(model.vis.headlight.ambient, 0.5, 1.0)


def color(model: mujoco.MjModel, material: str, low: float = 0.0, high: float = 1.0) -> Factor:
    """Return the colour of a material: red, green, blue."""
    return placed(model.material(material).rgba[:3], low, high)


def camera(model: mujoco.MjModel, reach: float, name: str = "above") -> Factor:
    """Return the shift of a camera along the world's x and y, in metres."""
    return shifted(model.camera(name).pos[:2], reach)


def zoom(model: mujoco.MjModel, low: float = 0.9, high: float = 1.1, name: str = "above") -> Factor:
    """Return the scale of what a camera sees: above 1 it sees more, and all looks smaller."""
    index = model.camera(name).id
    return scaled(low, high, model.cam_fovy[index : index + 1])


def extent(model: mujoco.MjModel, low: float, high: float, body: str) -> Factor:
    """Return the scale of a body's shapes about its origin; its mass stays, its inertia follows."""
    own = model.body(body).id
    first = model.body_geomadr[own]
    geoms = slice(first, first + model.body_geomnum[own])
    lengths = (model.geom_size[geoms], model.geom_pos[geoms], model.geom_aabb[geoms])
    sizes = scaled(low, high, *lengths, model.geom_rbound[geoms])
    inertia = scaled(low**2, high**2, model.body_inertia[own])

    def write(value: np.ndarray) -> None:
        sizes.write(value)
        inertia.write(value**2)

    return Factor(sizes.default, low, high, write)


def _another_color(own: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    while np.linalg.norm((drawn := generator.uniform(0.0, 1.0, 3)) - own) < 0.5:
        pass
    return drawn


def known_options(options: Mapping[str, Any] | None, *known: str) -> dict[str, Any]:
    """Return the options of a reset.

    Raises:
        ValueError: one is not known.
    """
    if unknown := set(options or {}) - set(known):
        names = ", ".join(known)
        raise ValueError(f"unknown reset options {sorted(unknown)!r}; known: {names}")
    return dict(options or {})
