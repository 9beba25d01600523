"""Success of every planner against its CPU time: `python benchmarks/planners.py`.

First in `reach`, with the world model that comes with the package: held-out episodes that do not
begin solved, the same for all, 15 steps, several budgets a planner, beside random actions. "end,
mm" is the median distance of the tip from the goal after the last step, "all, mm" the mean over all
steps and episodes: who arrives early has a small one. Then a cart on a line (z' = A z + B a,
quadratic cost) over long horizons: by how much a plan is dearer than Riccati's. One thread; both
tables are Markdown.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from jepa_world import Agent, load_world_model
from jepa_world.commands.plan import (
    Planning,
    budget_of,
    make_planners,
    open_env,
    shipped,
    tolerance_of,
)
from jepa_world.config import Part
from jepa_world.evaluation import (
    Episode,
    ModelPolicy,
    Policy,
    RandomPolicy,
    plan_seconds,
    run_episode,
    success_end,
    unsolved_seeds,
)

BUDGETS: dict[str, list[dict[str, Any]]] = {  # {} is the default
    "cem": [
        {"samples": 8, "elites": 2, "iterations": 2},
        {"samples": 16, "elites": 3, "iterations": 3},
        {"samples": 24, "elites": 4, "iterations": 4},
        {},
    ],
    "icem": [
        {"samples": 8, "elites": 2, "iterations": 2},
        {"samples": 20, "elites": 3, "iterations": 3},
        {"samples": 32, "elites": 4, "iterations": 4},
        {},
    ],
    "mppi": [
        {"samples": 8, "iterations": 2},
        {"samples": 16, "iterations": 3},
        {"samples": 24, "iterations": 4},
        {},
    ],
    "predictive_sampling": [
        {"samples": 8, "iterations": 2},
        {"samples": 16, "iterations": 3},
        {"samples": 24, "iterations": 4},
        {},
    ],
    "cem_gradient": [
        {"samples": 8, "elites": 2, "iterations": 1, "steps": 1},
        {"samples": 16, "elites": 2, "iterations": 2, "steps": 1},
        {"samples": 24, "iterations": 2},
        {},
    ],
    "gradient": [
        {"starts": 2, "steps": 2},
        {"starts": 4, "steps": 4},
        {"starts": 8, "steps": 6},
        {},
    ],
    "grasp": [
        {"starts": 4, "rounds": 1, "steps": 3},
        {"rounds": 2, "steps": 3},
        {"rounds": 2},
        {},
    ],
    "random_shooting": [{"samples": 16}, {"samples": 64}, {}],
}
LONG: dict[str, dict[str, Any]] = {  # for the cart
    "cem": {"samples": 200, "elites": 20, "iterations": 40, "min_std": 0.0},
    "mppi": {"samples": 200, "iterations": 40, "decay": 0.9},
    "gradient": {"starts": 4, "steps": 150, "lr": 0.02},
    "grasp": {"starts": 4, "rounds": 20, "steps": 15, "lr": 0.02, "weight": 100.0},
}
HORIZONS = (10, 25, 50, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    reach(arguments.episodes, arguments.seed)
    print()
    cart()


def reach(count: int, seed: int) -> None:
    model, description = load_world_model(shipped("reach"))
    env = open_env(Planning(), description)
    seeds = unsolved_seeds(env, count, seed, tolerance_of(Planning(), env))
    print(
        "| planner | options | CPU-ms a plan | end within 5 cm | within 2 cm | end, mm | all, mm |"
    )
    print("|---|---|---|---|---|---|---|")
    row(env, "random actions", {}, RandomPolicy(env.action_space, seed), seeds)
    for name, budgets in BUDGETS.items():
        for options in budgets:
            config = Planning(planner=Part(name, options), seed=seed)
            build, start = make_planners(config, env)
            row(env, name, options, ModelPolicy(Agent(model, build(0), start)), seeds)


def row(
    env: gym.Env[Any, Any], name: str, options: dict[str, Any], policy: Policy, seeds: list[int]
) -> None:
    episodes = [run_episode(env, policy, seed, budget_of(Planning(), env)) for seed in seeds]
    said = ", ".join(f"{key} {value}" for key, value in options.items()) or "default"
    milliseconds = 1000 * plan_seconds(episodes)["median"]
    last = 1000 * float(np.median([episode.distances[-1] for episode in episodes]))
    mean = 1000 * float(np.mean([episode.distances[1:] for episode in episodes]))
    rates = " | ".join(rate(episodes, tolerance) for tolerance in (0.05, 0.02))
    print(
        f"| {name} | {said} | {milliseconds:.1f} | {rates} | {last:.1f} | {mean:.0f} |", flush=True
    )


def rate(episodes: list[Episode], tolerance: float) -> str:
    found = success_end(episodes, tolerance)
    return f"{100 * found.rate:.0f} % ({100 * found.low:.0f} to {100 * found.high:.0f})"


class Cart:
    """The cost of a cart's position and speed, both to be 0, and of its force: a `LatentCost`."""

    a, b, effort = torch.tensor([[1.0, 0.1], [0.0, 1.0]]), torch.tensor([[0.0], [0.1]]), 0.01
    present = torch.tensor([1.0, 0.5])

    def __call__(self, plans: Tensor) -> Tensor:
        """Return the costs (b s) of plans (b s h 1)."""
        return self.score(self.imagine(plans), plans)

    def imagine(self, plans: Tensor) -> Tensor:
        """Return the states (b s h 1 2) that plans lead to."""
        z, visited = self.present, []
        for action in plans.unbind(2):
            z = z @ self.a.T + action @ self.b.T
            visited.append(z)
        return torch.stack(visited, 2).unsqueeze(3)

    def foresee(self, z: Tensor, plans: Tensor) -> Tensor:
        """Return the state after every step, were those before it `z`."""
        present = self.present.expand_as(z[:, :, :1])
        return torch.cat([present, z[:, :, :-1]], 2) @ self.a.T + (plans @ self.b.T).unsqueeze(3)

    def score(self, z: Tensor, plans: Tensor) -> Tensor:
        """Return the costs of states."""
        return z.square().sum((-1, -2, -3)) + self.effort * plans.square().sum((-1, -2))

    def least(self, horizon: int) -> float:
        """Return the least cost, by Riccati's recursion."""
        value = torch.zeros(2, 2)
        for _ in range(horizon):
            reached = torch.eye(2) + value
            gain = torch.linalg.solve(
                self.effort + self.b.T @ reached @ self.b, self.b.T @ reached @ self.a
            )
            value = self.a.T @ reached @ (self.a - self.b @ gain)
        return float(self.present @ value @ self.present)


def cart() -> None:
    print("| planner | " + " | ".join(f"{horizon} steps" for horizon in HORIZONS) + " |")
    print("|---" * (len(HORIZONS) + 1) + "|")
    cost, bound = Cart(), torch.tensor([20.0])
    for name, options in LONG.items():
        cells: list[str] = []
        for horizon in HORIZONS:
            planner = Part(name, options).build("planner", -bound, bound, horizon)
            start = torch.zeros(1, horizon, 1)
            plan = planner(cost, start)
            seconds = cpu_seconds(lambda planner=planner, start=start: planner(cost, start))
            over = float(cost(plan[:, None])) / cost.least(horizon) - 1
            cells.append(f"{100 * over:.2f} %, {seconds:.2f} s")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def cpu_seconds(run: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    main()
