"""All predictors in `reach` after equal CPU time of training: `python benchmarks/predictors.py`.

Every row is `train_world_model.py --config configs/world_reach.yaml --precision no` (not every
processor is fast in bfloat16) with the row's words; its steps are what its CPU time holds, by a
step time measured just before. Section `latents` trains predictors on the frozen encoder of the
shipped model, whose frames are encoded once; section `pixels` trains each end to end with an
encoder of its own. A run that is complete is not trained again.

Then, one row after the other: error of open-loop prediction after 1, 5 and 10 steps of held-out
episodes, as shares of the latents' variance, beside that of copying the latent; success in held-out
episodes that do not begin solved, 15 steps, default planner, Wilson 95 %; CPU time of a plan. One
thread; the tables are Markdown. docs/predictors.md has the numbers.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

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
from jepa_world.commands.train_world_model import (
    TrainWorldModel,
    build_method,
    collect_default,
    describe,
)
from jepa_world.config import parse
from jepa_world.data.trajectories import Trajectories
from jepa_world.evaluation import (
    Episode,
    ModelPolicy,
    plan_seconds,
    run_episode,
    success_end,
    unsolved_seeds,
)
from jepa_world.memory import keep_freed_memory
from jepa_world.methods.vjepa2_ac import VJEPA2AC
from jepa_world.methods.world_model import WorldModel

ROOT, DATA = Path(__file__).resolve().parents[1], Path("data/reach")
TEN = "--frames 11 --batch-size 24 --predict.open-loop 10"
ROWS = {  # frames times batch size is about the same for all: an encoder's share of a step is, too
    "mlp": "--predictor mlp",
    "mlp-teacher-forcing": "--predictor mlp --predict.open-loop 1",
    "mlp-ten": f"--predictor mlp {TEN}",
    "gru": "--predictor gru",
    "gru-ten": f"--predictor gru {TEN}",
    "adaln": "--predictor adaln",
    "concat": "--predictor concat",
    "block_causal": "--predictor block_causal",
    "block_causal-ten": f"--predictor block_causal {TEN}",
    "prefix": "--predictor prefix",
    "prefix-five": "--predictor prefix --predictor.span 5 --frames 6 --batch-size 42 "
    "--predict.open-loop 5",
    "prefix-ten": f"--predictor prefix --predictor.span 10 {TEN}",
}
RECIPE = ["--config", str(ROOT / "configs" / "world_reach.yaml"), "--precision", "no"]
RECIPE += ["--predict.open-loop", "3"]
SECTIONS = {
    "latents": ["--frozen", str(shipped("reach")), "--predict.distance", "l2"],
    "pixels": [],
}
AHEAD = (1, 5, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", default=list(SECTIONS), help=", ".join(SECTIONS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU time, on latents")
    parser.add_argument("--pixel-seconds", type=float, default=180.0, help="the same, on pixels")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--runs", type=Path, default=Path("runs/predictors"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    collect_default(DATA)
    for section in arguments.sections:
        folder = arguments.runs / section
        seconds = arguments.pixel_seconds if section == "pixels" else arguments.seconds
        for name in arguments.rows:
            if not (folder / name / "results.json").is_file():
                train([*RECIPE, *SECTIONS[section], *ROWS[name].split()], seconds, folder / name)
        print(f"{section}, {arguments.episodes} episodes\n")
        print("| row | parameters | steps, CPU-s | error after 1 / 5 / 10 steps ", end="")
        print("| of copying | drift of 10 resting steps | end within 5 cm | within 2 cm ", end="")
        print("| CPU-ms a plan |\n" + "|---" * 9 + "|")
        for name in arguments.rows:
            row(name, folder / name, arguments.episodes)


def train(words: list[str], seconds: float, folder: Path) -> None:
    config = parse(TrainWorldModel, words, program="train_world_model")
    steps = str(round(seconds / step_seconds(config)))
    command = [sys.executable, str(ROOT / "train_world_model.py"), *words, "--steps", steps]
    print(*command[2:], "--run-dir", folder, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("w") as log:
        subprocess.run([*command, "--run-dir", str(folder)], check=True, stdout=log, stderr=log)


def step_seconds(config: TrainWorldModel, *, steps: int = 30) -> float:
    """Return the CPU time of a training step, its batch at hand: the median of some."""
    store = Trajectories(*config.data)
    training, _ = store.split(0.05)
    index = training.windows(config.frames)[: config.batch_size]
    read = training.read(index, config.frames)
    batch = {key: torch.from_numpy(read[key]) for key in ("pixels", "action")}
    torch.manual_seed(config.seed)
    _, method = build_method(config, describe(config, store))
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4)
    if isinstance(method, VJEPA2AC):
        batch["latent"] = method.encode(batch["pixels"])
    times: list[float] = []
    for step in range(steps):
        began = time.process_time()
        method(batch, step).loss.backward()
        torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.process_time() - began)
    return statistics.median(times[steps // 3 :])


@torch.no_grad()
def row(name: str, folder: Path, count: int) -> None:
    trained = json.loads((folder / "results.json").read_text())
    model, description = load_world_model(folder)
    errors, copies = open_loop_errors(model)
    config = Planning()
    env = open_env(config, description)
    seeds = unsolved_seeds(env, count, config.seed, tolerance_of(config, env))
    build, start = make_planners(config, env)
    policy = ModelPolicy(Agent(model, build(0), start))
    episodes = [run_episode(env, policy, seed, budget_of(config, env)) for seed in seeds]
    cells = [
        name,
        f"{sum(p.numel() for p in model.predictor.parameters()):,}",  # type: ignore[attr-defined]
        f"{trained['step']}, {trained['cpu_seconds']:.0f}",
        " / ".join(f"{error:.4f}" for error in errors),
        " / ".join(f"{error:.2f}" for error in copies),
        f"{trained['rest_drift']:.4f}",
        *(rate(episodes, tolerance) for tolerance in (0.05, 0.02)),
        f"{1000 * plan_seconds(episodes)['median']:.1f}",
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


def open_loop_errors(model: WorldModel, *, count: int = 512) -> tuple[list[float], list[float]]:
    """Return errors of prediction and of copying, as shares of the variance of the latents."""
    _, held_out = Trajectories(DATA).split(0.05)
    frames = max(AHEAD) + 1
    windows = held_out.windows(frames)
    batch = held_out.read(windows[np.linspace(0, len(windows) - 1, count).astype(int)], frames)
    z, action = model.encode(torch.from_numpy(batch["pixels"])), torch.from_numpy(batch["action"])
    predicted = model.rollout(z[:, :1], action[:, :-1])
    variance = z.flatten(0, 1).var(0).sum()

    def share(difference: Tensor) -> float:
        return float(difference.square().flatten(1).sum(1).mean() / variance)

    errors = [share(predicted[:, ahead - 1] - z[:, ahead]) for ahead in AHEAD]
    return errors, [share(z[:, 0] - z[:, ahead]) for ahead in AHEAD]


def rate(episodes: list[Episode], tolerance: float) -> str:
    found = success_end(episodes, tolerance)
    return f"{100 * found.rate:.0f} % ({100 * found.low:.0f} to {100 * found.high:.0f})"


if __name__ == "__main__":
    main()
