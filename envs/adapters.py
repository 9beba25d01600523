"""Environments of others, asked in pictures: Gymnasium's on MuJoCo, and OGBench's.

Gymnasium's MuJoCo environments report numbers and pay a reward; here they show a picture, and the
goal is a picture of another state. OGBench's visual environments have picture goals already.
"""

# pyright: reportAttributeAccessIssue=false
# (mujoco's names come from a compiled module without stubs)

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from jepa_world.envs.rendering import SmoothRenderer, choose_gl
from jepa_world.envs.tasks import known_options

import mujoco  # isort: skip  (after tasks, which chooses OpenGL)

choose_gl()
HELD = 8  # steps that a random action is held for, on the way to a goal


@dataclass(frozen=True)
class Task:
    """What an environment itself asks for: some body brought to another; and a view of it."""

    body: str
    target: str
    tolerance: float
    """Metres."""
    looks_at: tuple[float, float, float]
    """The middle of the picture, metres."""
    view: tuple[float, float, float]
    """Azimuth and elevation in degrees, distance in metres."""


TASKS = {  # by the name of the class
    "ReacherEnv": Task("fingertip", "target", 0.02, (0.0, 0.0, 0.0), (90.0, -90.0, 0.65)),
    "PusherEnv": Task("object", "goal", 0.05, (0.4, -0.3, -0.2), (90.0, -60.0, 1.6)),
}


OPTIONS = ("size", "bodies", "tolerance", "ahead", "camera", "render_mode")  # of PictureEnv


def picture_env(
    spec: gymnasium.envs.registration.EnvSpec, options: Mapping[str, Any]
) -> gymnasium.Env[Any, Any]:
    """Make a registered MuJoCo environment as a `PictureEnv`; other options are its own."""
    ours = {name: value for name, value in options.items() if name in OPTIONS}
    theirs = {name: value for name, value in options.items() if name not in OPTIONS}
    steps = theirs.pop("max_episode_steps", spec.max_episode_steps)
    env = PictureEnv(gymnasium.make(spec, disable_env_checker=True, **theirs), **ours)
    return gymnasium.wrappers.TimeLimit(env, steps) if steps else env


class PictureEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A MuJoCo environment of Gymnasium that shows pictures and asks for the state of one.

    Observation: (size, size, 3) bytes. Action: as many numbers as the environment's, [-1, 1]
    stretched to its bounds. Reward and termination are the environment's.

    The distance to a goal is the largest, over `bodies`, between the places of a body now and in
    the goal's state, in metres. Where `TASKS` knows the environment, goals are what it asks for
    itself (in Reacher the fingertip on the target, in Pusher the object on the goal) and only that
    body counts; elsewhere a goal is where random actions, held for 8 steps each, lead from the
    start in `ahead` steps, and all bodies count.

    `info`: the environment's own, and "goal" (like an observation), "success" (distance at most
    `tolerance`), "state" and "configuration" (positions and velocities, float64).

    `reset(options={"start": state, "goal": state})` sets positions and velocities.

    Args:
        inner: The environment, a `gymnasium.envs.mujoco.MujocoEnv`.
        size: Height and width of a picture.
        bodies: Names of bodies.
        tolerance: Metres; 0.05 if neither given nor known.
        ahead: Steps.
        camera: Name or number of a camera; default: the first one, or a view of all.

    Raises:
        ValueError: a body that the model lacks, or actions without bounds.

    Example:
        >>> from jepa_world.envs import make
        >>> make("Reacher-v5", size=32).reset(seed=0)[0].shape  # doctest: +SKIP
        (32, 32, 3)
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        inner: gymnasium.Env[Any, Any],
        *,
        size: int = 64,
        bodies: Sequence[str] = (),
        tolerance: float | None = None,
        ahead: int = 50,
        camera: str | int | None = None,
        render_mode: str | None = None,
    ):
        self.inner: Any = inner.unwrapped
        self.render_mode = render_mode
        self.ahead = ahead
        self._model, self._data = self.inner.model, self.inner.data
        self._task = None if bodies else TASKS.get(type(self.inner).__name__)
        known = self._task.tolerance if self._task else 0.05
        self.budget = 50
        self.tolerance = known if tolerance is None else tolerance
        self._bodies = self._numbers([self._task.body] if self._task else bodies)
        space = self.inner.action_space
        if not isinstance(space, gymnasium.spaces.Box) or not space.is_bounded():
            raise ValueError(f"actions are {space}, expected numbers within bounds")
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, space.shape, np.float32)
        self.observation_space = gymnasium.spaces.Box(0, 255, (size, size, 3), np.uint8)
        view = self._view() if camera is None else camera
        self._renderer = SmoothRenderer(self._model, size=size, camera=view)
        self._goal_places = np.zeros((len(self._bodies), 3))
        self._goal_picture = self._observation = np.zeros((size, size, 3), np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin where the environment begins, and picture the goal.

        Raises:
            ValueError: an option that is unknown or no state of the environment.
        """
        super().reset(seed=seed)
        options = known_options(options, "start", "goal")
        own_seed = int(self.np_random.integers(2**31))
        _, info = self.inner.reset(seed=own_seed)
        start = self._state("start", options.get("start", self._now()))
        self._set(start)
        if "goal" not in options:
            self._seek() if self._task else self._wander()
        goal = self._state("goal", options.get("goal", self._now()))
        self._set(goal)
        self._goal_places = self._data.xpos[self._bodies].copy()
        self._goal_picture = self._renderer(self._data)
        self._set(start)
        self._observation = self._renderer(self._data)
        return self._observation, self._info(info)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take a step of the environment; numbers beyond [-1, 1] count as the bound."""
        _, reward, terminated, truncated, info = self._step(action)
        self._observation = self._renderer(self._data)
        return self._observation, float(reward), terminated, truncated, self._info(info)

    def goal_distance(self) -> float:
        """Return the largest distance of a body to its place in the goal now, in metres."""
        gaps = self._data.xpos[self._bodies] - self._goal_places
        return float(np.linalg.norm(gaps, axis=-1).max())

    def goal_distances(self, actions: np.ndarray) -> np.ndarray:
        """Return the distance in metres after every action of sequences (s, h, a), as (s, h).

        Starts from the present state, which is left as it was; nothing is rendered.
        """
        kind = mujoco.mjtState.mjSTATE_INTEGRATION.value
        state = np.empty(mujoco.mj_stateSize(self._model, kind))
        mujoco.mj_getState(self._model, self._data, state, kind)
        distances = np.empty(actions.shape[:2])
        for sample, plan in enumerate(actions):
            for step, action in enumerate(plan):
                self._step(action)
                distances[sample, step] = self.goal_distance()
            mujoco.mj_setState(self._model, self._data, state, kind)
        mujoco.mj_kinematics(self._model, self._data)
        return distances

    def render(self) -> np.ndarray | None:
        """Return the last observation, or None without a render mode."""
        return self._observation.copy() if self.render_mode == "rgb_array" else None

    def close(self) -> None:
        """Free the OpenGL context, and close the environment."""
        self._renderer.close()
        self.inner.close()

    def _step(self, action: np.ndarray) -> tuple[Any, ...]:
        action = np.asarray(action, np.float64)
        if action.shape != self.inner.action_space.shape or not np.isfinite(action).all():
            count = self.inner.action_space.shape[0]
            raise ValueError(f"action is {action!r}, expected {count} finite numbers in [-1, 1]")
        space = self.inner.action_space
        share = (np.clip(action, -1.0, 1.0) + 1.0) / 2.0
        taken = self.inner.step((space.low + share * (space.high - space.low)).astype(space.dtype))
        mujoco.mj_kinematics(self._model, self._data)  # mj_step leaves the poses a substep behind
        return taken

    def _numbers(self, names: Sequence[str]) -> np.ndarray:
        known = [self._model.body(index).name for index in range(self._model.nbody)]
        if unknown := set(names) - set(known):
            raise ValueError(f"no bodies {sorted(unknown)}; known: {', '.join(known[1:])}")
        return np.array([known.index(name) for name in names or known[1:]])

    def _view(self) -> Any:
        if self._task is None and self._model.ncam:
            return 0
        view = mujoco.MjvCamera()
        mujoco.mjv_defaultFreeCamera(self._model, view)
        if self._task is not None:
            view.azimuth, view.elevation, view.distance = self._task.view
            view.lookat[:] = self._task.looks_at
        return view

    def _wander(self) -> None:
        shape = self.inner.action_space.shape
        actions = self.np_random.uniform(-1, 1, (self.ahead // HELD + 1, *shape))
        for step in range(self.ahead):
            self._step(actions[step // HELD])

    def _seek(self) -> None:
        """Move the joints that carry the task's body, by damped least squares, to the target."""
        assert self._task is not None
        body, target = self._model.body(self._task.body).id, self._data.body(self._task.target)
        jacobian = np.zeros((3, self._model.nv))
        for _ in range(200):
            gap = target.xpos - self._data.xpos[body]
            mujoco.mj_comPos(self._model, self._data)
            mujoco.mj_jacBody(self._model, self._data, jacobian, None, body)
            damped = jacobian @ jacobian.T + 1e-4 * np.eye(3)
            turn = jacobian.T @ np.linalg.solve(damped, np.clip(gap, -0.02, 0.02))
            mujoco.mj_integratePos(self._model, self._data.qpos, turn, 1.0)
            mujoco.mj_kinematics(self._model, self._data)
        self._data.qvel[:] = 0.0

    def _now(self) -> np.ndarray:
        return np.concatenate([self._data.qpos, self._data.qvel])

    def _set(self, state: np.ndarray) -> None:
        mujoco.mj_resetData(self._model, self._data)
        self.inner.set_state(*np.split(state, [self._model.nq]))

    def _state(self, name: str, value: Any) -> np.ndarray:
        value = np.asarray(value, np.float64)
        count = self._model.nq + self._model.nv
        if value.shape != (count,) or not np.isfinite(value).all():
            raise ValueError(f"{name} is {value!r}, expected {count} positions and velocities")
        return value

    def _info(self, info: dict[str, Any]) -> dict[str, Any]:
        return {
            **info,
            "goal": self._goal_picture.copy(),
            "success": self.goal_distance() <= self.tolerance,
            "state": self._now(),
            "configuration": self._now(),
        }


class KeptGoal(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment that shows its goal at reset only, and says from the first step on if it is.

    So do OGBench's visual ones: `ogbench:visual-cube-single-v0`.
    """

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin; an episode does not begin solved."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._goal = info["goal"]
        return observation, {"success": False, **info}

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        told = {"goal": self._goal, "success": bool(info["success"])}
        return observation, reward, terminated, truncated, {**info, **told}
