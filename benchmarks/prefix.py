"""CPU of a plan: all latents at once against one after the other: `python benchmarks/prefix.py`.

`prefix` beside transformers that are rolled out step by step, in their own fast way and plainly:
equal numbers of parameters, random weights, float32, one thread, one run. A plan is CEM's: every
round rolls all samples out and scores them. Encoding is left out: it is the same for both. Two
settings: LeWorldModel's (300 samples, 5 steps of 5 actions each, latents of 192 channels; 3 of its
30 rounds, which all cost the same), with `adaln` in 6 blocks and with LeWorldModel's own predictor,
and that of `reach` (40 samples, 6 rounds, horizon 10). First it is checked that planning many
samples at once gives what each gives alone. docs/predictors.md has the numbers.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jepa_world import SIGReg, WorldModel
from jepa_world.agent import GoalCost
from jepa_world.config import Part
from jepa_world.objectives import summed_distance
from jepa_world.planners.cem import CEM
from jepa_world.predictors.prefix import PrefixPredictor


class Setting(NamedTuple):
    """What is planned, and by how large predictors."""

    dim: int
    action_dim: int
    horizon: int
    search: dict[str, int]
    stepwise: Part
    prefix: dict[str, int]


PUBLISHED = 192, 10, 5, {"samples": 300, "elites": 30, "iterations": 3}
SETTINGS = {
    "LeWorldModel": Setting(
        *PUBLISHED,
        Part("adaln", {"width": 192, "depth": 6, "heads": 3}),
        {"width": 192, "depth": 7, "action_depth": 3, "heads": 3},
    ),
    "LeWorldModel, its own": Setting(
        *PUBLISHED,
        Part("leworldmodel"),
        {"width": 320, "depth": 7, "action_depth": 3, "heads": 5},
    ),
    "reach": Setting(
        *(32, 2, 10, {"samples": 40, "elites": 5, "iterations": 6}), Part("adaln"), {}
    ),
}


class Plain(nn.Module):
    """A predictor without a rollout of its own."""

    def __init__(self, predictor: nn.Module) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, z: Tensor, action: Tensor) -> Tensor:
        """Return the next latent of every step."""
        return self.predictor(z, action)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| setting | predictor | parameters | CPU-ms a plan | of a rollout | to prefix |")
    print("|---|---|---|---|---|---|")
    for name, setting in SETTINGS.items():
        measure(name, setting, repeats)


def measure(name: str, setting: Setting, repeats: int) -> None:
    dims = setting.dim, setting.action_dim
    prefix = PrefixPredictor(*dims, span=setting.horizon, **setting.prefix).eval()
    stepwise = setting.stepwise.build("predictor", *dims).eval()
    for parameter in (*prefix.parameters(), *stepwise.parameters()):
        parameter.add_(0.02 * torch.randn_like(parameter))  # away from the copy they start as
    check(prefix, setting)
    predictors = {"prefix": prefix, setting.stepwise.name: stepwise, "plainly": Plain(stepwise)}
    found: list[float] = []
    for label, predictor in predictors.items():
        cost, planner, start = make(predictor, setting)
        plans = torch.rand(1, setting.search["samples"], setting.horizon, setting.action_dim)
        plan = cpu_milliseconds(partial(planner, cost, start), repeats)
        rollout = cpu_milliseconds(partial(cost.imagine, plans), repeats)
        size = sum(p.numel() for p in predictor.parameters())
        found.append(plan)
        ratio = plan / found[0]
        cells = (name, label, f"{size:,}", f"{plan:.1f}", f"{rollout:.1f}", f"{ratio:.1f}")
        print("| " + " | ".join(cells) + " |", flush=True)


def make(predictor: nn.Module, setting: Setting) -> tuple[GoalCost, CEM, Tensor]:
    model = WorldModel(nn.Identity(), predictor, SIGReg(), weight=0.0).eval()
    z, goal = torch.randn(2, 1, 1, setting.dim)
    cost = GoalCost(model, z[None], torch.zeros(1, 0, setting.action_dim), goal, summed_distance)
    bound = torch.ones(setting.action_dim)
    search: dict[str, Any] = setting.search
    planner = CEM(-bound, bound, setting.horizon, **search)
    return cost, planner, torch.zeros(1, setting.horizon, setting.action_dim)


def check(prefix: PrefixPredictor, setting: Setting) -> None:
    """Compare plans rolled out together with each alone, and prefixes with plans cut short."""
    z = torch.randn(2, 1, 1, setting.dim)
    action = torch.rand(2, 4, setting.horizon, setting.action_dim)
    together = prefix.rollout_prefixes(z, action)
    for sample in range(4):
        for steps in range(1, setting.horizon + 1):
            alone = prefix.rollout_prefixes(z, action[:, sample, None, :steps])[:, 0, -1]
            torch.testing.assert_close(together[:, sample, steps - 1], alone)


def cpu_milliseconds(run: Callable[[], object], repeats: int) -> float:
    times: list[float] = []
    for _ in range(repeats + 1):
        began = time.process_time()
        run()
        times.append(time.process_time() - began)
    return 1000 * statistics.median(times[1:])


if __name__ == "__main__":
    main()
