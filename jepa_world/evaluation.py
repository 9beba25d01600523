"""Closed-loop episodes and honest success rates.

Starts and goals are drawn anew for evaluation, episodes that begin solved are replaced, the budget
is stated, success is reported at the end and ever, with Wilson 95 % intervals, beside the floor of
random actions and the ceiling of the same planner on the true simulator.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from jepa_world.agent import Agent
from jepa_world.interfaces import Planner, SimulatorEnv
from jepa_world.registry import UserError

Frame = UInt8[np.ndarray, "hh ww c"]


class Policy(Protocol):
    """Something that acts in one episode."""

    def reset(self, goal: Frame) -> None:
        """Begin an episode that should end looking like `goal`."""
        ...

    def act(self, observation: Frame) -> Float[np.ndarray, " a"]:
        """Return the next action."""
        ...


@dataclass(frozen=True)
class Episode:
    """What happened: distances to the goal (first at the start), and CPU seconds of every plan."""

    seed: int
    distances: list[float]
    seconds: list[float]


@dataclass(frozen=True)
class Rate:
    """A success rate with its Wilson 95 % interval (Wilson 1927).

    Example:
        >>> Rate.of([True] * 9 + [False])
        Rate(rate=0.9, n=10, low=0.596, high=0.982)
    """

    rate: float
    n: int
    low: float
    high: float

    @classmethod
    def of(cls, successes: Iterable[bool]) -> "Rate":
        """Count successes."""
        counted = list(successes)
        n, share, z = len(counted), sum(counted) / len(counted), 1.959964
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return cls(round(share, 4), n, round(max(0, centre - half), 3), round(centre + half, 3))


@dataclass(frozen=True)
class Separation:
    """How well a score tells two kinds apart: the area under the ROC curve (AUROC).

    The chance that one of the second kind scores above one of the first, a tie counting half. The
    95 % interval holds the areas that are not 1.96 of their standard errors away from the one that
    was found, with the error of Hanley and McNeil 1982 (Radiology 143, 29-36):
    it has a width where every pair is told apart.

    Example:
        >>> Separation.of([0.1, 0.2, 0.3, 0.4], [0.35, 0.5, 0.6, 0.7])
        Separation(auroc=0.9375, n=4, low=0.513, high=0.995)
    """

    auroc: float
    n: int  # of each kind, or of the rarer one
    low: float
    high: float

    @classmethod
    def of(cls, usual: Iterable[float], odd: Iterable[float]) -> "Separation":
        """Compare the scores of what is usual with those of what is odd."""
        first, second = np.asarray(list(usual)), np.asarray(list(odd))
        above = np.sign(second[:, None] - first).mean()
        area, sizes = float(above + 1) / 2, (len(first), len(second))
        low, high = (_area_at(area, limit, *sizes) for limit in (0.0, 1.0))
        return cls(round(area, 4), min(sizes), round(low, 3), round(high, 3))


def _area_at(found: float, limit: float, n: int, m: int) -> float:
    """Return the area, on the way from the one found to a limit, from which that is 1.96 errors."""
    near, far = found, limit
    for _ in range(50):
        area = (near + far) / 2
        first, second = area / (2 - area) - area**2, 2 * area**2 / (1 + area) - area**2
        variance = (area * (1 - area) + (m - 1) * first + (n - 1) * second) / (n * m)
        within = (area - found) ** 2 <= 1.959964**2 * variance
        near, far = (area, far) if within else (near, area)
    return (near + far) / 2


def unsolved_seeds(env: gym.Env[Any, Any], count: int, seed: int, tolerance: float) -> list[int]:
    """Return `count` reset seeds whose episodes do not begin solved.

    Raises:
        UserError: the environment gives no goal, or nearly every episode begins solved.
    """
    kept: list[int] = []
    first = 1_000_000 * (seed + 1)
    for candidate in range(first, first + 20 * count + 100):
        _, info = env.reset(seed=candidate)
        for name in ("goal", "success"):
            if name not in info:
                raise UserError(
                    f"the environment's reset gives no info[{name!r}]: nothing to reach"
                )
        if not distance(env, info) <= tolerance:
            kept.append(candidate)
        if len(kept) == count:
            return kept
    raise UserError(f"nearly all episodes begin within the tolerance {tolerance}: nothing to reach")


def run_episode(
    env: gym.Env[Any, Any],
    policy: Policy,
    seed: int,
    budget: int,
    *,
    watch: Callable[[Frame], None] | None = None,
) -> Episode:
    """Run one episode for exactly `budget` steps, whether or not the goal is reached on the way.

    Args:
        env: Its reset with `seed` gives the start and the goal.
        policy: Acts in it.
        seed: Of the reset.
        budget: Environment steps.
        watch: Called with every observation once the action from it is chosen.
    """
    observation, info = env.reset(seed=seed)
    distances, seconds = [distance(env, info)], []
    policy.reset(info["goal"])
    for _ in range(budget):
        began = time.process_time()
        action = policy.act(observation)
        seconds.append(time.process_time() - began)
        if watch is not None:
            watch(observation)
        observation, _, _, _, info = env.step(action)
        distances.append(distance(env, info))
    if watch is not None:
        watch(observation)
    return Episode(seed, distances, seconds)


def distance(env: gym.Env[Any, Any], info: dict[str, Any]) -> float:
    """Return the true distance to the goal; 0 or infinity where the env knows only success."""
    simulator = env.unwrapped
    if isinstance(simulator, SimulatorEnv):
        return simulator.goal_distance()
    return 0.0 if info["success"] else math.inf


def success_end(episodes: list[Episode], tolerance: float) -> Rate:
    """Return how often the last state is within the tolerance."""
    return Rate.of(episode.distances[-1] <= tolerance for episode in episodes)


def success_ever(episodes: list[Episode], tolerance: float) -> Rate:
    """Return how often any state after the first is within the tolerance."""
    return Rate.of(min(episode.distances[1:]) <= tolerance for episode in episodes)


def plan_seconds(episodes: list[Episode]) -> dict[str, float]:
    """Return median and 95th percentile of the CPU seconds of one plan, encoding included."""
    seconds = [second for episode in episodes for second in episode.seconds]
    median, p95 = np.percentile(seconds, [50, 95])
    return {"median": round(float(median), 5), "p95": round(float(p95), 5)}


class ModelPolicy:
    """The agent under test, one episode at a time."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent

    def reset(self, goal: Frame) -> None:
        """Encode the goal."""
        self.agent.reset(torch.from_numpy(goal)[None])

    def act(self, observation: Frame) -> Float[np.ndarray, " a"]:
        """Plan and return the first action."""
        return self.agent.act(torch.from_numpy(observation)[None])[0].cpu().numpy()


class RandomPolicy:
    """Uniform random actions: the floor."""

    def __init__(self, space: gym.Space[Any], seed: int) -> None:
        self.space = space
        self.space.seed(seed)

    def reset(self, goal: Frame) -> None:
        """Ignore the goal."""

    def act(self, observation: Frame) -> Float[np.ndarray, " a"]:
        """Draw an action."""
        return self.space.sample()


class SimulatorPolicy:
    """The same planner with the true simulator as its model: the ceiling.

    Args:
        simulator: Knows true distances.
        planner: The planner.
        plan: The plan that the first search of an episode starts from.
        stride: Actions that a step of the plan holds side by side.
    """

    def __init__(
        self,
        simulator: SimulatorEnv,
        planner: Planner,
        plan: Float[Tensor, "h a"],
        *,
        stride: int = 1,
    ) -> None:
        self.simulator = simulator
        self.planner = planner
        self.stride = stride
        self.start = plan[None]

    def reset(self, goal: Frame) -> None:
        """Begin with the first plan; the simulator knows the goal."""
        self.plan = self.start

    def act(self, observation: Frame) -> Float[np.ndarray, " a"]:
        """Plan with true distances and return the first action."""
        shifted = torch.cat([self.plan[:, 1:], torch.zeros_like(self.plan[:, :1])], dim=1)
        self.plan = self.planner(self._cost, shifted)
        return self.plan[0, 0].numpy()

    def _cost(self, plans: Float[Tensor, "b s h a"]) -> Float[Tensor, "b s"]:
        actions = (
            rearrange(plans[0].detach(), "s h (k a) -> s (h k) a", k=self.stride).double().numpy()
        )
        distances = self.simulator.goal_distances(actions)[:, self.stride - 1 :: self.stride]
        return torch.from_numpy(np.square(distances).sum(-1))[None].float()
