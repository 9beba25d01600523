"""Cost of every task, and how well it is solved without a model: `python benchmarks/envs.py`.

CPU-milliseconds of a picture, of a step with its picture, and of 40 imagined sequences of 10
actions (a round of the default planner); then the share of episodes that end in success within 50
steps: random actions, the environment's expert, and the default planner on the true simulator.
Goals are 25 steps ahead (what `collect` does from the start), or anywhere ("far"); episodes that
begin solved are replaced. In brackets: Wilson, 95 %. One thread; the table is Markdown.

`--sheet FILE` makes a picture instead, of a start, a goal and four draws of all factors of each.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from PIL import Image, ImageDraw

from jepa_world import envs
from jepa_world.commands.plan import Planning, goals_ahead, make_planners
from jepa_world.evaluation import (
    Policy,
    RandomPolicy,
    SimulatorPolicy,
    run_episode,
    success_end,
    unsolved_seeds,
)
from jepa_world.interfaces import SimulatorEnv
from jepa_world.policies import ExpertEnv

AHEAD, BUDGET = 25, 50


class ExpertPolicy:
    """The script of an environment."""

    def __init__(self, env: ExpertEnv) -> None:
        self.env = env
        self.actions: Iterator[np.ndarray] = iter(())

    def reset(self, goal: np.ndarray) -> None:
        """Begin: the script knows the goal."""
        self.actions = self.env.expert(np.random.default_rng(0))

    def act(self, observation: np.ndarray) -> np.ndarray:
        """Return what the script does next."""
        return next(self.actions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", nargs="+", default=list(envs.SHORT_NAMES))
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--planned", type=int, default=40, help="episodes of the planner; 0: none")
    parser.add_argument("--sheet", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.sheet:
        contact_sheet(given.envs).save(given.sheet)
        return
    print("| task | picture | step | 40 x 10 imagined | goals | random | expert | simulator |")
    print("|---" * 8 + "|")
    for name in given.envs:
        env = envs.make(name)
        for goals, task in (("ahead", goals_ahead(env, AHEAD)), ("far", env)):
            costs = milliseconds(env) if goals == "ahead" else ["", "", ""]
            rates = successes(task, given.episodes, given.planned)
            print("| " + " | ".join([f"`{name}`", *costs, goals, *rates]) + " |", flush=True)
        env.close()


def milliseconds(env: gym.Env[Any, Any]) -> list[str]:
    """Return the CPU-milliseconds of a picture, of a step, and of imagining 40 x 10 actions."""
    inner: Any = env.unwrapped
    width = env.action_space.shape or ()
    actions = np.random.default_rng(0).uniform(-1, 1, (40, 10, *width))
    inner.reset(seed=0)
    picture = cpu_milliseconds(lambda: inner.reset(seed=0), 100)
    step = cpu_milliseconds(lambda: inner.step(actions[0, 0]), 200)
    imagined = cpu_milliseconds(lambda: inner.goal_distances(actions), 10)
    return [f"{number:.1f}" for number in (picture / 2, step, imagined)]


def cpu_milliseconds(run: Callable[[], object], repeats: int) -> float:
    begin = time.process_time()
    for _ in range(repeats):
        run()
    return 1000 * (time.process_time() - begin) / repeats


def successes(env: gym.Env[Any, Any], count: int, planned: int) -> list[str]:
    """Return the success of random actions, the expert and the planner on the simulator."""
    inner = env.unwrapped
    assert isinstance(inner, SimulatorEnv)
    seeds = unsolved_seeds(env, max(count, planned), 0, inner.tolerance)

    def rate(policy: Policy, count: int = count) -> str:
        episodes = [run_episode(env, policy, seed, BUDGET) for seed in seeds[:count]]
        found = success_end(episodes, inner.tolerance)
        low, high = 100 * found.low, 100 * found.high
        return f"{100 * found.rate:.0f} % ({low:.0f} to {high:.0f}, n {found.n})"

    build, start = make_planners(Planning(), env)
    return [
        rate(RandomPolicy(env.action_space, 0)),
        rate(ExpertPolicy(inner)) if isinstance(inner, ExpertEnv) else "",
        rate(SimulatorPolicy(inner, build(0), start), planned) if planned else "",
    ]


def contact_sheet(names: list[str], *, size: int = 96, margin: int = 4) -> Image.Image:
    """Draw a column a task: a start, its goal, and the start under four draws of all factors."""
    titles = ("start", "goal", "factors", "", "", "")
    cell, left, top = size + margin, 48, 18
    sheet = Image.new("RGB", (left + len(names) * cell, top + len(titles) * cell), "white")
    draw = ImageDraw.Draw(sheet)
    for row, title in enumerate(titles):
        draw.text((margin, top + row * cell + size // 2), title, fill="black")
    for column, name in enumerate(names):
        env = envs.make(name, size=size)
        observation, info = env.reset(seed=1)
        pictures = [observation, info["goal"]]
        for seed in range(4):
            factors = env.reset(seed=seed, options={"factors": "random"})[1]["factors"]
            pictures.append(env.reset(seed=1, options={"factors": factors})[0])
        draw.text((left + column * cell, 4), name, fill="black")
        for row, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture[..., :3]), (left + column * cell, top + row * cell))
        env.close()
    return sheet


if __name__ == "__main__":
    main()
