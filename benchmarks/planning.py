"""CPU time of one plan, and where it goes: `python benchmarks/planning.py`.

The world model that comes with the package (or `--checkpoint`), default settings, one thread: an
observation is encoded, CEM samples, the predictor rolls every sample out. Baselines in the same
run: the same predictor called step by step with its growing sequence, and textbook CEM (white
noise, elites by sorting, one episode after the other).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from jepa_world import Agent, load_world_model
from jepa_world.commands.plan import Planning, shipped
from jepa_world.methods.world_model import rollout
from jepa_world.planners.cem import CEM


def textbook_cem(
    start: Tensor, cost: Callable[[Tensor], Tensor], samples: int, elites: int, iterations: int
) -> Tensor:
    plans = []
    for mean in start:
        std = torch.ones_like(mean)
        for _ in range(iterations):
            noise = torch.randn(samples, *mean.shape)
            candidates = (mean + std * noise).clamp(-1, 1)
            best = candidates[cost(candidates[None])[0].argsort()[:elites]]
            mean, std = best.mean(0), best.std(0)
        plans.append(mean)
    return torch.stack(plans)


def cpu_milliseconds(run: Callable[[], object], repeats: int = 40) -> float:
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return 1000 * statistics.median(times)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=shipped("reach"))
    torch.set_num_threads(1)
    model, description = load_world_model(parser.parse_args().checkpoint)
    config, bound = Planning(), torch.ones(description["action_dim"])
    planner = CEM(-bound, bound, config.horizon, **config.planner.options)
    shape = (planner.samples, planner.elites, len(planner.filters))
    print("{} samples, {} elites, {} iterations, ".format(*shape) + f"horizon {config.horizon}")

    size = description["observation_shape"]
    observation = torch.randint(0, 256, (1, size[2], size[3], size[1]), dtype=torch.uint8)
    agent = Agent(model, planner, torch.zeros(config.horizon, len(bound)))
    agent.reset(observation)
    agent.act(observation)
    plans = torch.rand(1, planner.samples, config.horizon, len(bound)) * 2 - 1
    z = agent.z.expand(planner.samples, -1, -1, -1)
    start = torch.zeros(1, config.horizon, len(bound))

    whole = cpu_milliseconds(lambda: agent.act(observation))
    encode = cpu_milliseconds(lambda: model.encode(observation[:, None]))
    fast = cpu_milliseconds(lambda: model.rollout(z, plans[0]))
    plain = cpu_milliseconds(lambda: rollout(model.predictor, z, plans[0]))
    print(f"one plan: {whole:.1f} CPU-ms")
    print(f"  encode {encode:.2f}")
    print(f"  rollout {shape[2]} x {fast:.2f}; step by step {plain:.2f}: ", end="")
    print(f"ratio {fast / plain:.2f}")
    for episodes in (1, 8):
        first = start.expand(episodes, -1, -1)
        ours = cpu_milliseconds(lambda first=first: planner(free, first))
        textbook = cpu_milliseconds(lambda first=first: textbook_cem(first, free, *shape))
        print(f"  sampling, {episodes} episodes: {ours:.2f}, textbook CEM {textbook:.2f}: ", end="")
        print(f"ratio {ours / textbook:.2f}")


def free(actions: Tensor) -> Tensor:
    """Cost next to nothing: what is left is the planner's own work."""
    return actions.sum((-1, -2))


if __name__ == "__main__":
    main()
