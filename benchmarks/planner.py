"""CPU time of the planner's own sampling, without a model: `python benchmarks/planner.py`.

The cost is one sum over actions, next to free. The baseline is textbook CEM in the same run, with
as many samples and iterations: one episode after the other, white noise, elites by sorting.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from jepa_world.planners.cem import CEM

HORIZON, ACTIONS, SAMPLES, ELITES, ITERATIONS = 10, 2, 64, 6, 4


def cost(actions: Tensor) -> Tensor:
    return actions.sum((-1, -2))


def textbook_cem(start: Tensor) -> Tensor:
    plans = []
    for mean in start:
        std = torch.ones_like(mean)
        for _ in range(ITERATIONS):
            samples = (mean + std * torch.randn(SAMPLES, HORIZON, ACTIONS)).clamp(-1, 1)
            elites = samples[cost(samples[None])[0].argsort()[:ELITES]]
            mean, std = elites.mean(0), elites.std(0)
        plans.append(mean)
    return torch.stack(plans)


def cpu_milliseconds(run: Callable[[], object], repeats: int = 200) -> float:
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return 1000 * statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    bound = torch.ones(ACTIONS)
    planner = CEM(-bound, bound, HORIZON, samples=SAMPLES, elites=ELITES, iterations=ITERATIONS)
    print(f"{SAMPLES} samples x {ITERATIONS} iterations x horizon {HORIZON}, one thread")
    for episodes in (1, 8):
        start = torch.zeros(episodes, HORIZON, ACTIONS)
        ours = cpu_milliseconds(lambda start=start: planner(cost, start))
        textbook = cpu_milliseconds(lambda start=start: textbook_cem(start))
        print(
            f"{episodes} episodes: {ours:.2f} CPU-ms a call, textbook {textbook:.2f}, "
            f"ratio {ours / textbook:.2f}"
        )


if __name__ == "__main__":
    main()
