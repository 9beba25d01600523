"""What a training step and a plan of a world model cost: `python benchmarks/world_model_step.py`.

Every row is configs/world_reach.yaml with its words, in float32 on one thread: CPU time of a step,
its batch at hand (the median of some, the least of the rounds), to that of the first row in the
same run; and of a plan of `plan.py`'s defaults by the untrained model. Frames are random: costs do
not depend on them. Freed memory is kept, as commands keep it, unless `--returned` says otherwise.
"""

import argparse
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from jepa_world import Agent
from jepa_world.commands.plan import HORIZON
from jepa_world.commands.train_world_model import TrainWorldModel, build_method
from jepa_world.config import parse, to_dict
from jepa_world.memory import keep_freed_memory
from jepa_world.methods.world_model import WorldModel
from jepa_world.planners.cem import CEM

ROOT = Path(__file__).resolve().parents[1]
PATCHES = "--encoder.patches --encoder.stages 5"  # two rows of two tokens
SMALL = "--predictor.width 64 --predictor.depth 2 --predictor.heads 2"
ROWS = {
    "recipe": "",
    "vicreg": "--regulariser.name vicreg",
    "ema": "--regulariser.name ema",
    "none": "--regulariser.name none",
    "patches-adaln": f"{PATCHES} --predictor adaln --predictor.history 1 {SMALL}",
    "patches-block_causal": f"{PATCHES} --predictor block_causal --predictor.rows 2 {SMALL}",
}
ACTIONS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--size", type=int, default=64, help="side of a frame")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--returned", action="store_true", help="freed memory to the system")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.returned:
        keep_freed_memory()
    configs = {name: config_of(ROWS[name]) for name in arguments.rows}
    times: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(arguments.rounds):
        for name, config in configs.items():
            times[name].append(step_seconds(config, arguments.size))
    print(
        "| row | parameters | CPU-ms a step | to the first | CPU-ms a plan |\n" + "|---" * 5 + "|"
    )
    first = min(times[arguments.rows[0]])
    for name, config in configs.items():
        seconds = min(times[name])
        model, _ = built(config, arguments.size)
        count = sum(p.numel() for p in model.parameters())
        plan = 1000 * plan_seconds(model, arguments.size)
        cells = [f"{count:,}", f"{1000 * seconds:.0f}", f"{seconds / first:.2f}", f"{plan:.0f}"]
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"\npeak memory of all {peak / 1024:.0f} MB")


def config_of(words: str) -> TrainWorldModel:
    recipe = ["--config", str(ROOT / "configs" / "world_reach.yaml")]
    return parse(TrainWorldModel, [*recipe, *words.split()], program="train_world_model")


def built(config: TrainWorldModel, size: int) -> tuple[WorldModel, Any]:
    torch.manual_seed(config.seed)
    parts = {name: to_dict(config)[name] for name in ("encoder", "predictor")}
    shape = {"observation_shape": [1, 3, size, size], "action_dim": ACTIONS}
    return build_method(config, parts | shape)


def step_seconds(config: TrainWorldModel, size: int, *, steps: int = 10) -> float:
    """Return the CPU time of a training step: the median of some."""
    _, method = built(config, size)
    shape = (config.batch_size, config.frames)
    pixels = torch.randint(0, 256, (*shape, size, size, 3), dtype=torch.uint8)
    batch = {"pixels": pixels, "action": torch.rand(*shape, ACTIONS) * 2 - 1}
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    times: list[float] = []
    for step in range(steps):
        began = time.process_time()
        method(batch, step).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - began)
    return statistics.median(times[steps // 3 :])


def plan_seconds(model: WorldModel, size: int, *, plans: int = 5) -> float:
    """Return the CPU time of a plan: the least of some."""
    horizon, bound = HORIZON, torch.ones(ACTIONS)
    agent = Agent(model.eval(), CEM(-bound, bound, horizon), torch.zeros(horizon, ACTIONS))
    picture = torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8)
    agent.reset(picture)
    times: list[float] = []
    for _ in range(plans):
        began = time.process_time()
        agent.act(picture)
        times.append(time.process_time() - began)
    return min(times)


if __name__ == "__main__":
    main()
