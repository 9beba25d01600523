"""Collect trajectories: what a policy does in an environment, stored as HDF5 shards.

Actions are smooth and random, or an environment's own guide gives them where it has one: random
actions seldom touch an object. Still segments, in which every action is exactly zero, interrupt
both: without them a model never learns that a resting arm rests. Episode i is a function of
(seed, i) alone, so a dataset does not depend on the number of processes, nor on an interruption.
"""

import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import gymnasium
import numpy as np

import jepa_world
from jepa_world import envs
from jepa_world.config import OR_ROBOT
from jepa_world.data.trajectories import (
    Trajectories,
    is_complete,
    wait_until_begun,
    write_store,
)
from jepa_world.envs.recorder import Recorder
from jepa_world.policies import PolicyName, actions_of, check_policy, usual_policy
from jepa_world.processes import launched, map_in_processes
from jepa_world.registry import UserError


@dataclass(frozen=True)
class Collect:
    """Collect trajectories of an environment."""

    env: Annotated[str, OR_ROBOT] = "reach"
    """The environment: `reach` and others (docs/envs.md), any Gymnasium id, module:Id-v0, or a
    robot of MuJoCo Menagerie (franka_emika_panda)."""
    policy: PolicyName | None = None
    """Who acts: smooth random actions, the environment's guide, or its expert, which goes to the
    goal; default: guided where the environment has a guide, else random."""
    factors: tuple[str, ...] | None = None
    """Factors of variation drawn for every episode, by name; `all` is all of them. Default: none"""
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
    """Correlation of a random action with the next one, from 0 to below 1."""
    spread: float = 0.7
    """Standard deviation of random actions before they are clipped to [-1, 1]."""
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
    settings["factors"] = config.factors and list(config.factors)
    try:
        if share[0] > 0:
            wait_until_begun(folder)
        if is_complete(folder, settings, _versions()):
            return folder
        env = _kept_env(config)
        _check_env(env, config.env)
        if config.policy is not None:
            check_policy(env, config.policy)
        description = {
            "settings": settings,
            "policy": config.policy or usual_policy(env),
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


def play(env: gymnasium.Env, actions: Iterable[np.ndarray], seed: int) -> dict[str, Any]:
    """Play actions (a) from the start of a seed; return the columns, one row for every frame.

    An episode that the environment ends early is shorter; the action at the last frame is zero.
    """
    recorder = Recorder(env)
    recorder.reset(seed=seed)
    for action in actions:
        _, _, terminated, truncated, _ = recorder.step(action)
        if terminated or truncated:
            break
    return recorder.recorded_episode()


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
    actions = actions_of(
        env,
        config.policy or usual_policy(env),
        np.random.default_rng(sequence),
        config.steps,
        correlation=config.correlation,
        spread=config.spread,
        still=config.still,
    )
    return play(env, actions, int(sequence.generate_state(1)[0]))


@lru_cache(maxsize=1)  # one environment for each process
def _kept_env(config: Collect) -> gymnasium.Env:
    options: dict[str, Any] = {} if config.image_size is None else {"size": config.image_size}
    if config.factors is not None:
        options["factors"] = envs.drawn(config.factors)
    return envs.make(config.env, max_episode_steps=config.steps, **options)


def _check_env(env: gymnasium.Env, name: str) -> None:
    pixels, action = env.observation_space, env.action_space
    if pixels.shape is None or len(pixels.shape) != 3 or pixels.dtype != np.uint8:
        raise UserError(f"env {name!r} observes {pixels}, expected byte images (h, w, c)")
    if action != gymnasium.spaces.Box(-1.0, 1.0, (math.prod(action.shape or ()),), np.float32):
        raise UserError(f"env {name!r} takes actions {action}, expected a Box in [-1, 1]")
