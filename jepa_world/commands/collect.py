"""Collect trajectories: smooth random actions in an environment, stored as HDF5 shards.

Actions follow an Ornstein-Uhlenbeck process, a_t = rho a_(t-1) + sqrt(1 - rho^2) sigma noise,
clipped to [-1, 1], interrupted by still segments in which every action is exactly zero: without
them a model never learns that a resting arm rests. Episode i is a function of (seed, i) alone, so a
dataset does not depend on the number of processes, nor on an interruption.
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Float32

import jepa_world
from jepa_world import envs
from jepa_world.data.trajectories import (
    Trajectories,
    is_complete,
    wait_until_begun,
    write_store,
)
from jepa_world.processes import launched, map_in_processes
from jepa_world.registry import UserError

STILL_STEPS = 5.0  # mean length of a still segment
STATE_COLUMNS = ("state", "proprio")  # of info, stored where the environment gives them


@dataclass(frozen=True)
class Collect:
    """Collect trajectories of smooth random actions."""

    env: str = "reach"
    """Environment: `reach`, `reach_torque`, any Gymnasium id, or module:Id-v0."""
    episodes: int = 1000
    """Number of episodes."""
    steps: int = 40
    """Steps of an episode, which then has one more frame."""
    data: Path | None = None
    """Folder of the dataset; default data/<env>."""
    seed: int = 0
    """Of starts and actions; the number of workers changes nothing."""
    workers: int = 0
    """Processes; 0 is one for every core."""
    correlation: float = 0.8
    """Correlation of an action with the next one, from 0 to below 1."""
    spread: float = 0.7
    """Standard deviation of the actions before they are clipped to [-1, 1]."""
    still: float = 0.15
    """Share of the steps at which every action is exactly zero, about 5 steps at a time."""
    image_size: int | None = None
    """Height and width of a frame in pixels; default: the environment's own."""
    jpeg: bool = False
    """Store frames as JPEG: 4 to 6 times smaller, slower to read."""
    shard_episodes: int = 100
    """Episodes of a file."""


def run(config: Collect) -> None:
    """Collect, and say where the dataset is."""
    number, count = launched()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    workers = config.workers or max(1, (os.cpu_count() or 1) // local)
    folder = collect(replace(config, workers=workers), share=(number, count))
    if number > 0:
        return
    data = Trajectories(folder)
    size = "x".join(map(str, data.frame_shape))
    print(f"{data.num_episodes} episodes, {data.lengths.sum()} frames of {size}: {folder}")


def collect(config: Collect, *, share: tuple[int, int] = (0, 1)) -> Path:
    """Collect, or finish an interrupted collection of the same settings; return its folder.

    A complete dataset is left as it is. With more than one worker the caller's main module is
    imported again in each, as always with spawned processes.

    Args:
        config: What is collected.
        share: The number of this process and how many collect side by side into one folder, every
            one its share of the shards; the first returns when all are there.

    Raises:
        UserError: a value out of range, an environment that is unknown or gives no pictures, a
            folder that cannot be written or holds something else.
    """
    _check_values(config)
    folder = config.data or Path("data") / config.env.replace("/", "-").replace(":", "-")
    settings = {key: value for key, value in vars(config).items() if key not in _NOT_SETTINGS}
    settings["env"] = envs.SHORT_NAMES.get(config.env, config.env)
    try:
        if share[0] > 0:
            wait_until_begun(folder)
        if is_complete(folder, settings, _versions()):
            return folder
        _check_env(_kept_env(config), config.env)
        description = {
            "settings": settings,
            "policy": "ornstein-uhlenbeck",
            "versions": _versions(),
        }
        write_store(
            *(folder, description, partial(_play_all, config), config.episodes),
            shard_episodes=config.shard_episodes,
            jpeg=config.jpeg,
            doing="collecting",
            share=share,
        )
    except envs.EnvError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"dataset folder {folder} cannot be written: {error}") from error
    except BrokenProcessPool as error:
        raise UserError(
            f"a collecting process died (out of memory?); run again to continue in {folder}, "
            "perhaps with --workers 1"
        ) from error
    finally:
        _kept_env.cache_clear()
    return folder


def smooth_actions(
    generator: np.random.Generator,
    steps: int,
    action_dim: int,
    *,
    correlation: float = 0.8,
    spread: float = 0.7,
    still: float = 0.15,
) -> Float32[np.ndarray, "t a"]:
    """Draw an Ornstein-Uhlenbeck action sequence in [-1, 1], zero in still segments.

    The process begins stationary. Whether a step is still is a Markov chain: it stays so for
    `STILL_STEPS` steps on average, and is so at the share `still` of all steps.
    """
    noise = spread * generator.standard_normal((steps, action_dim))
    noise[1:] *= np.sqrt(1.0 - correlation**2)
    chance = generator.random(steps)
    enter = still / (1.0 - still) / STILL_STEPS
    actions = np.zeros((steps, action_dim), np.float32)
    value, rests = np.zeros(action_dim), chance[0] < still
    for step in range(steps):
        value = correlation * value + noise[step]
        if step > 0:
            rests = chance[step] < (1.0 - 1.0 / STILL_STEPS if rests else enter)
        if not rests:
            actions[step] = value.clip(-1.0, 1.0)
    return actions


def play(env: gymnasium.Env, actions: Float32[np.ndarray, "t a"], seed: int) -> dict[str, Any]:
    """Play actions from the start of a seed; return the columns, one row for every frame.

    An episode that the environment ends early is shorter; the action at the last frame is zero.
    """
    observation, info = env.reset(seed=seed)
    kept = [name for name in STATE_COLUMNS if name in info]
    pixels, states = [observation], [[info[name] for name in kept]]
    for action in actions:
        observation, _, terminated, truncated, info = env.step(action)
        pixels.append(observation)
        states.append([info[name] for name in kept])
        if terminated or truncated:
            break
    taken = np.zeros((len(pixels), actions.shape[1]), np.float32)
    taken[:-1] = actions[: len(pixels) - 1]
    columns = {name: np.stack([row[i] for row in states]) for i, name in enumerate(kept)}
    return {"pixels": np.stack(pixels), "action": taken, **columns}


_NOT_SETTINGS = ("data", "workers")


def _check_values(config: Collect) -> None:
    for name in ("episodes", "steps", "shard_episodes"):
        if vars(config)[name] < 1:
            raise UserError(f"{name} is {vars(config)[name]}, expected at least 1")
    if config.workers < 0 or config.seed < 0:
        raise UserError("workers and seed cannot be negative")
    if not (0.0 <= config.correlation < 1.0 and config.spread >= 0.0 and 0.0 <= config.still < 0.8):
        raise UserError(
            f"correlation {config.correlation}, spread {config.spread}, still {config.still}: "
            "expected correlation in [0, 1), spread at least 0, still in [0, 0.8)"
        )


def _versions() -> dict[str, str]:
    return {"jepa_world": jepa_world.__version__, "mujoco": version("mujoco")}


def _play_all(config: Collect, indices: list[int]) -> Iterator[dict[str, Any]]:
    """Play episodes in order, in this process or in spawned ones."""
    play_one = partial(_play_index, config)
    yield from map_in_processes(play_one, indices, workers=config.workers)


def _play_index(config: Collect, index: int) -> dict[str, Any]:
    env = _kept_env(config)
    sequence = np.random.SeedSequence(config.seed, spawn_key=(index,))
    actions = smooth_actions(
        np.random.default_rng(sequence),
        config.steps,
        math.prod(env.action_space.shape or ()),
        correlation=config.correlation,
        spread=config.spread,
        still=config.still,
    )
    return play(env, actions, int(sequence.generate_state(1)[0]))


@lru_cache(maxsize=1)  # one environment for each process
def _kept_env(config: Collect) -> gymnasium.Env:
    options = {} if config.image_size is None else {"size": config.image_size}
    return envs.make(config.env, max_episode_steps=config.steps, **options)


def _check_env(env: gymnasium.Env, name: str) -> None:
    pixels, action = env.observation_space, env.action_space
    if pixels.shape is None or len(pixels.shape) != 3 or pixels.dtype != np.uint8:
        raise UserError(f"env {name!r} observes {pixels}, expected byte images (h, w, c)")
    if action != gymnasium.spaces.Box(-1.0, 1.0, (math.prod(action.shape or ()),), np.float32):
        raise UserError(f"env {name!r} takes actions {action}, expected a Box in [-1, 1]")
