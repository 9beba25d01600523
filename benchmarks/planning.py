"""CPU time, wall time and memory of planning: `python benchmarks/planning.py`.

Two models: LeWorldModel's network in its published size (random weights, 300 samples x 30 elites x
10 iterations x horizon 5), and the world model of `reach` that comes with the package (defaults of
plan.py). Every line is measured in a process of its own, so that its peak memory is its own; the
lines of a table take turns, the median of the rounds counts, and ratios are to the first line. The
baselines are the published loop (below: `PublishedLoop`) and textbook CEM over the predictor called
step by step. All but the published loop keep freed memory, as commands do; it is run both ways. One
thread, unless `--threads` says otherwise. All tables are Markdown; `--only` names some of them.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from jepa_world import Agent, SIGReg, WorldModel, load_world_model
from jepa_world.agent import GoalCost
from jepa_world.commands.plan import (
    HORIZON as USUAL_HORIZON,
)
from jepa_world.commands.plan import (
    Planning,
    budget_of,
    make_planners,
    open_env,
    shipped,
    tolerance_of,
)
from jepa_world.config import Part
from jepa_world.encoders.leworldmodel import LeWorldModelEncoder
from jepa_world.evaluation import ModelPolicy, run_episode, success_end, unsolved_seeds
from jepa_world.memory import keep_freed_memory
from jepa_world.methods.world_model import rollout
from jepa_world.planners.cem import CEM
from jepa_world.predictors.leworldmodel import LeWorldModelPredictor

ACTION, HORIZON, SAMPLES, ELITES = 10, 5, 300, 30  # LeWorldModel's
Variant = Literal["float32", "bf16", "compiled"]


class Line(NamedTuple):
    """What a process reports: of one plan, or of what the table says."""

    cpu: float  # seconds
    wall: float  # seconds
    megabytes: float  # peak of the process, with Python, torch and the model
    said: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=TABLES, default=list(TABLES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=10, help="of LeWorldModel's plan")
    arguments = parser.parse_args()
    tables = TABLES | {"leworldmodel": partial(table_leworldmodel, arguments.iterations)}
    for name in arguments.only:
        tables[name](arguments.rounds, arguments.threads)
        print(flush=True)


def in_process(work: Callable[[], Any], threads: int) -> Any:
    """Run a function in a process of its own."""
    with get_context("spawn").Pool(1, torch.set_num_threads, (threads,)) as pool:
        return pool.apply(work)


def compare(
    lines: Mapping[str, Callable[[], Line]], rounds: int, threads: int, last: str = "costs"
) -> dict[str, Line]:
    """Measure lines in turn, print them beside the first, and return their medians."""
    print(f"| | CPU s | wall s | peak MB | ratio of CPU, wall, memory | {last} |")
    print("|---|---|---|---|---|---|")
    seen: dict[str, list[Line]] = {name: [] for name in lines}
    for _ in range(rounds):
        for name, work in lines.items():
            seen[name].append(in_process(work, threads))
    medians = {name: median(found) for name, found in seen.items()}
    base = next(iter(medians.values()))
    for name, line in medians.items():
        ratios = ", ".join(
            f"{ours / its:.2f}" for ours, its in zip(line[:3], base[:3], strict=True)
        )
        numbers = f"{line.cpu:.4g} | {line.wall:.4g} | {line.megabytes:.0f}"
        print(f"| {name} | {numbers} | {ratios} | {line.said} |", flush=True)
    return medians


def median(lines: list[Line]) -> Line:
    columns = ([line.cpu, line.wall, line.megabytes] for line in lines)
    cpu, wall, megabytes = map(statistics.median, zip(*columns, strict=True))
    return Line(cpu, wall, megabytes, lines[-1].said)


def timed(run: Callable[[], object], repeats: int = 1, said: str = "") -> Line:
    """Return the median times of a run, and the peak memory of this process (Linux)."""
    times = []
    for _ in range(repeats):
        cpu, wall = time.process_time(), time.perf_counter()
        run()
        times.append((time.process_time() - cpu, time.perf_counter() - wall))
    cpu, wall = (statistics.median(column) for column in zip(*times, strict=True))
    status = Path("/proc/self/status")
    peak = [row.split()[1] for row in status.read_text().splitlines() if row.startswith("VmHWM")]
    return Line(cpu, wall, int(peak[0]) / 1024, said)


# LeWorldModel's network.


def leworldmodel_parts() -> tuple[WorldModel, Tensor, Tensor]:
    """Return the published network with random weights, a picture and a goal `(1 hh ww c)`."""
    torch.manual_seed(0)
    encoder, predictor = LeWorldModelEncoder((1, 3, 224, 224)), LeWorldModelPredictor(192, ACTION)
    for name, value in [*encoder.state_dict().items(), *predictor.state_dict().items()]:
        if name.endswith("running_var"):
            nn.init.uniform_(value, 0.5, 1.5)
        else:
            nn.init.normal_(value, std=0.15)
    pictures = torch.randint(0, 256, (2, 1, 224, 224, 3), dtype=torch.uint8)
    return WorldModel(encoder, predictor, SIGReg(), weight=0.0).eval(), pictures[0], pictures[1]


def terminal(z: Tensor, plans: Tensor, goal: Tensor) -> Tensor:
    """Return the squared distance at the end, LeWorldModel's cost."""
    return (z[:, :, -1] - goal[:, None]).square().sum((-1, -2))


class PublishedLoop:
    """LeWorldModel's cost of plans as it is published, on the weights of our parts.

    For every call picture and goal are encoded; at every step all actions so far are embedded, and
    the predictor and its head run on every token of the window
    (https://arxiv.org/abs/2603.19312; stable-worldmodel 0.1.1).
    """

    def __init__(self, model: WorldModel, picture: Tensor, goal: Tensor) -> None:
        self.model, self.pictures = model, (picture, goal)
        predictor: Any = model.predictor
        *embed, silu, self.modulation = predictor.modulation
        self.predictor, self.embed, self.silu = predictor, nn.Sequential(*embed), silu

    def encode(self) -> list[Tensor]:
        """Return the latents `(1 1 d)` of picture and goal."""
        return [self.model.encode(picture[:, None])[:, 0] for picture in self.pictures]

    def __call__(self, plans: Tensor) -> Tensor:
        """Return the costs `(1 s)` of plans `(1 s h a)`."""
        z, goal = self.encode()
        latents, history = z.expand(plans.shape[1], 1, -1), self.predictor.history
        for step in range(1, plans.shape[2] + 1):
            actions = self.embed(plans[0, :, :step])
            following = self.predict(latents[:, -history:], actions[:, -history:])
            latents = torch.cat([latents, following[:, -1:]], 1)
        return (latents[None, :, -1] - goal).square().sum(-1)

    def predict(self, latents: Tensor, actions: Tensor) -> Tensor:
        """Return the next latent of every step of a window `(s k d)`, under embedded actions."""
        x = latents + self.predictor.positions[: latents.shape[1]]
        weights = zip(*(part.chunk(6) for part in self.modulation.parameters()), strict=True)
        for block, (weight, bias) in zip(self.predictor.blocks, weights, strict=True):
            modulation = F.linear(self.silu(actions), weight, bias)
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
            y = block.norm1(block.plain(x) * (1 + scale1) + shift1)
            qkv = block.attention.qkv(y).unflatten(-1, (3, 16, 64)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(*qkv, is_causal=True)
            x = x + gate1 * block.attention.out(y.transpose(1, 2).flatten(-2))
            y = block.norm2(block.plain(x) * (1 + scale2) + shift2)
            x = x + gate2 * nn.Sequential.forward(block.mlp, y)
        return self.predictor.head(self.predictor.norm(x))


def leworldmodel_agent(iterations: int) -> tuple[Agent, PublishedLoop, Tensor]:
    """Return our agent that has planned once, the published cost, and a picture."""
    model, picture, goal = leworldmodel_parts()
    bound = torch.ones(ACTION)
    options = {"samples": SAMPLES, "elites": ELITES, "iterations": iterations}
    planner = CEM(-bound, bound, HORIZON, **options)
    agent = Agent(model, planner, torch.zeros(HORIZON, ACTION), objective=terminal)
    agent.reset(goal)
    with torch.inference_mode():
        agent.planner = lambda cost, start: start
        agent.act(picture)
        agent.planner = planner
        return agent, PublishedLoop(model, picture, goal), picture


def random_plans(samples: int, horizon: int, episodes: int = 1) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(episodes, samples, horizon, ACTION) * 2 - 1


@torch.inference_mode()
def published_plan(iterations: int, *, kept: bool = False) -> Line:
    if kept:
        keep_freed_memory()
    cost = PublishedLoop(*leworldmodel_parts())
    start = torch.zeros(1, HORIZON, ACTION)
    textbook_cem(start, cost, 32, 3, 1)
    encoding = iterations * timed(cost.encode, 5).cpu
    said = f"{encoding:.1f} CPU-s encode picture and goal"
    return timed(lambda: textbook_cem(start, cost, SAMPLES, ELITES, iterations), 1, said)


@torch.inference_mode()
def our_plan(iterations: int) -> Line:
    keep_freed_memory()
    agent, _, picture = leworldmodel_agent(iterations)
    agent.cost(random_plans(32, HORIZON))
    return timed(lambda: agent.act(picture))


def set_variant(agent: Agent, variant: Variant) -> None:
    """Compile the agent's predictor, or have it predict in half precision.

    Of LeWorldModel's, the perceptrons: its whole rollout takes many minutes to compile.
    """
    predictor: Any = agent.model.predictor
    if variant == "compiled" and isinstance(predictor, LeWorldModelPredictor):
        for block in predictor.blocks:
            block.mlp = torch.compile(block.mlp, dynamic=False)  # pyright: ignore
    elif variant == "compiled":
        predictor.rollout = torch.compile(predictor.rollout, dynamic=False)
    agent.half = variant == "bf16"


@torch.inference_mode()
def variant_costs(variant: Variant) -> Line:
    """Rate 300 plans: one iteration. Says the gap in costs, and what compiling took."""
    keep_freed_memory()
    agent, published, _ = leworldmodel_agent(1)
    plans = random_plans(SAMPLES, HORIZON)
    expected, begin = published(plans), time.process_time()
    set_variant(agent, variant)
    cost = replace(agent.cost, half=agent.half)
    gap = largest_gap(cost(plans), expected)
    first = time.process_time() - begin
    said = f"differ by {gap:.1e}; the first call takes {first:.1f} CPU-s"
    return timed(lambda: cost(plans), 3, said)


def table_leworldmodel(iterations: int, rounds: int, threads: int) -> None:
    print(f"LeWorldModel's network, one plan: {SAMPLES} x {iterations} x {HORIZON} steps\n")
    lines = {
        "published loop": partial(published_plan, iterations),
        "published loop, freed memory kept": partial(published_plan, iterations, kept=True),
        "ours": partial(our_plan, iterations),
    }
    medians = compare(lines, rounds, threads, "")
    print()
    floor = in_process(flop_floor, 1)
    print(f"the costs of {SAMPLES} plans differ by {floor['gap']:.1e} of them at most")
    for name in ("published loop", "ours"):
        line = medians[name]
        flop, seconds = floor[name], floor[name] * iterations / floor["peak"]
        print(
            f"{name}: {flop / 1e9:.1f} GFLOP of matrix products an iteration; at the measured "
            f"{floor['peak'] / 1e9:.0f} GFLOP/s a plan takes {seconds:.1f} CPU-s, "
            f"{seconds / line.cpu:.0%} of what it took"
        )


@torch.inference_mode()
def flop_floor() -> dict[str, float]:
    """Return the operations of an iteration, those a second of a large product, the costs' gap."""
    agent, published, _ = leworldmodel_agent(1)
    plans, x = random_plans(SAMPLES, HORIZON), torch.randn(1024, 1024)
    found = {"peak": 2 * 1024**3 / min(timed(lambda: x @ x).cpu for _ in range(40))}
    costs = {}
    for name, cost in (("published loop", published), ("ours", agent.cost)):
        with FlopCounterMode(display=False) as counter:
            costs[name] = cost(plans)
        found[name] = counter.get_total_flops()
    return found | {"gap": largest_gap(costs["ours"], costs["published loop"])}


def largest_gap(found: Tensor, expected: Tensor) -> float:
    return float(((found.float() - expected) / expected).abs().max())


def table_variants(rounds: int, threads: int) -> None:
    flags = next(
        row.split() for row in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in row
    )
    has = [flag for flag in ("avx2", "avx512_bf16", "amx_bf16") if flag in flags]
    print(f"LeWorldModel's network, {SAMPLES} plans rated; this CPU has {', '.join(has)}\n")
    names: dict[str, Variant] = {"float32": "float32", "bf16": "bf16", "compiled": "compiled"}
    compare({n: partial(variant_costs, v) for n, v in names.items()}, min(rounds, 2), threads)


# The model of reach.


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


def reach_agent(episodes: int = 1, **options: int) -> tuple[Agent, Tensor]:
    keep_freed_memory()
    model, description = load_world_model(shipped("reach"))
    config, bound = Planning(), torch.ones(description["action_dim"])
    horizon = options.pop("horizon", USUAL_HORIZON)
    planner = CEM(-bound, bound, horizon, **{**config.planner.options, **options})
    _, channels, rows, columns = description["observation_shape"]
    pictures = torch.randint(0, 256, (episodes, rows, columns, channels), dtype=torch.uint8)
    agent = Agent(model, planner, torch.zeros(horizon, len(bound)))
    agent.reset(pictures)
    agent.act(pictures)
    return agent, pictures


@torch.inference_mode()
def reach_plan(variant: Variant, **options: int) -> Line:
    agent, pictures = reach_agent(**options)
    set_variant(agent, variant)
    agent.act(pictures)
    return timed(lambda: agent.act(pictures), 40)


@torch.inference_mode()
def reach_textbook() -> Line:
    """Plan by textbook CEM over the predictor called step by step, encoding once."""
    agent, picture = reach_agent()
    planner: Any = agent.planner
    shape = planner.samples, planner.elites, len(planner.filters)

    def plan() -> Tensor:
        z = agent.model.encode(picture[:, None])

        def cost(plans: Tensor) -> Tensor:
            seen = z.expand(plans.shape[1], -1, -1, -1)
            future = rollout(agent.model.predictor, seen, plans[0])
            return agent.objective(future[None], plans, agent.goal)

        return textbook_cem(agent.plan, cost, *shape)

    return timed(plan, 40)


def table_reach(rounds: int, threads: int) -> None:
    print("the shipped model of reach, one plan\n")
    lines = {
        "textbook CEM, predictor step by step": reach_textbook,
        "ours": partial(reach_plan, "float32"),
        "ours, bf16": partial(reach_plan, "bf16"),
        "ours, compiled": partial(reach_plan, "compiled"),
    }
    compare(lines, rounds, threads, "")


@torch.inference_mode()
def success(count: int, variant: Variant, **options: int) -> Line:
    """Plan held-out episodes; the line is of one plan, and says how many end near the goal."""
    keep_freed_memory()
    model, description = load_world_model(shipped("reach"))
    config = Planning(planner=Part("cem", options))
    env = open_env(config, description)
    build, start = make_planners(config, env)
    agent = Agent(model, build(0), start)
    seeds = unsolved_seeds(env, count, 0, tolerance_of(config, env))
    set_variant(agent, variant)
    rows = [run_episode(env, ModelPolicy(agent), seed, budget_of(config, env)) for seed in seeds]
    rates = [success_end(rows, tolerance) for tolerance in (0.05, 0.02)]
    picture = torch.from_numpy(env.reset(seed=0)[0])[None]
    line = timed(lambda: agent.act(picture), 40)
    said = " / ".join(f"{r.rate:.0%} ({r.low:.0%} to {r.high:.0%})" for r in rates)
    return line._replace(said=said)


def table_success(rounds: int, threads: int) -> None:
    print("reach, 50 held-out episodes; last column: end within 5 cm / within 2 cm\n")
    lines = {"default: 40 samples, 6 iterations": partial(success, 50, "float32")}
    for samples, iterations in ((40, 4), (40, 3), (60, 4)):
        name = f"{samples} samples, {iterations} iterations"
        lines[name] = partial(success, 50, "float32", samples=samples, iterations=iterations)
    lines["default, bf16"] = partial(success, 50, "bf16")
    compare(lines, 1, threads, "success at the end")


# Growth.


@torch.inference_mode()
def grow_leworldmodel() -> dict[str, dict[int, float]]:
    """Return CPU seconds of rating plans, by what grows."""
    keep_freed_memory()
    agent, _, _ = leworldmodel_agent(1)
    z, goal = agent.z, agent.goal

    def rate(samples: int = 75, horizon: int = HORIZON, episodes: int = 1) -> Callable[[], object]:
        seen, wanted = z.expand(episodes, -1, -1, -1), goal.expand(episodes, -1, -1)
        none = z.new_zeros(episodes, 0, ACTION)
        cost = GoalCost(agent.model, seen, none, wanted, terminal)
        plans = random_plans(samples, horizon, episodes)
        return lambda: cost(plans)

    return {
        "samples": take_turns({s: rate(samples=s) for s in (75, 150, 300)}, 2),
        "horizon": take_turns({h: rate(horizon=h) for h in (5, 10, 20)}, 2),
        "episodes": take_turns({b: rate(episodes=b) for b in (1, 2, 4, 8)}, 2),
    }


@torch.inference_mode()
def grow_reach() -> dict[str, dict[int, float]]:
    """Return CPU seconds of a plan, by what grows."""

    def plan(episodes: int = 1, **options: int) -> Callable[[], Tensor]:
        agent, pictures = reach_agent(episodes, **options)
        return lambda: agent.act(pictures)

    return {
        "samples": take_turns({s: plan(samples=s) for s in (40, 80, 160, 320)}, 9),
        "horizon": take_turns({h: plan(horizon=h) for h in (5, 10, 20, 40)}, 9),
        "iterations": take_turns({i: plan(iterations=i) for i in (3, 6, 12, 24)}, 9),
        "episodes": take_turns({b: plan(b) for b in (1, 2, 4, 8)}, 9),
    }


def take_turns(runs: dict[int, Callable[[], object]], rounds: int) -> dict[int, float]:
    """Return the median CPU seconds of every run; the first round warms up."""
    times: dict[int, list[float]] = {size: [] for size in runs}
    for number in range(rounds + 1):
        for size, run in runs.items():
            seconds = timed(run).cpu
            if number:
                times[size].append(seconds)
    return {size: statistics.median(found) for size, found in times.items()}


def exponent(seconds: dict[int, float]) -> float:
    """Fit seconds = c size^exponent by least squares of the logarithms."""
    x, y = ([math.log(v) for v in values] for values in (seconds, seconds.values()))
    return statistics.linear_regression(x, y).slope


def table_growth(rounds: int, threads: int) -> None:
    print("growth of CPU time; of episodes planned together, also what one of them costs\n")
    print("| | grows | CPU-ms | exponent | an episode, to one alone |")
    print("|---|---|---|---|---|")
    for model, grow in (
        ("LeWorldModel's network, 75 plans rated", grow_leworldmodel),
        ("reach, one plan", grow_reach),
    ):
        for what, seconds in in_process(grow, threads).items():
            cells = ", ".join(f"{size}: {1000 * cpu:.4g}" for size, cpu in seconds.items())
            shares = [
                f"{cpu / size / seconds[1]:.2f}" for size, cpu in seconds.items() if 1 in seconds
            ]
            row = f"| {model} | {what} | {cells} | {exponent(seconds):.2f} | {', '.join(shares)} |"
            print(row, flush=True)


TABLES: dict[str, Callable[[int, int], None]] = {
    "leworldmodel": partial(table_leworldmodel, 10),
    "variants": table_variants,
    "reach": table_reach,
    "success": table_success,
    "growth": table_growth,
}

if __name__ == "__main__":
    main()
