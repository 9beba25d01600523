"""Measure planning: success over many held-out episodes and several trained models."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
from tqdm import tqdm

from jepa_world.agent import Agent
from jepa_world.commands import prepare_process
from jepa_world.commands.plan import (
    Planning,
    budget_of,
    make_agents,
    make_planners,
    model_steps,
    open_env,
    search_used,
    shipped,
    stride_of,
    tolerance_of,
)
from jepa_world.config import require_at_least
from jepa_world.data.trajectories import write_store
from jepa_world.evaluation import (
    Episode,
    ModelPolicy,
    Policy,
    RandomPolicy,
    SimulatorPolicy,
    plan_seconds,
    run_episode,
    success_end,
    success_ever,
    unsolved_seeds,
)
from jepa_world.interfaces import SimulatorEnv
from jepa_world.methods.world_model import load_world_model
from jepa_world.processes import gather, launched, own_share
from jepa_world.registry import UserError
from jepa_world.runs import Run
from jepa_world.search import UnsuitedCostError


@dataclass(frozen=True)
class Evaluate(Planning):
    """Measure the success of planning, beside random actions and the true simulator.

    Without arguments: 200 episodes of `reach` with the world model that comes with the package.
    """

    checkpoint: tuple[Path, ...] = ()
    """Run folders of models trained from different seeds; default: the shipped model."""
    episodes: int = 200
    """Held-out episodes, the same for every model."""
    ceiling: bool = True
    """Also run the same planner on the true simulator."""
    record: Path | None = None
    """Folder for the models' episodes as a dataset, to train on: mistakes and all. Give a --seed of
    its own: what was trained on is not held out."""


def run(config: Evaluate) -> None:
    """Measure, and leave results.json in the run folder."""
    prepare_process()
    made = Run.of("evaluate", config.run_dir)
    require_at_least(config, episodes=1, horizon=1, history=1, seed=0)
    sources = config.checkpoint or (shipped(config.env),)
    models = [load_world_model(source, config.trust) for source in sources]
    recorded = config.record is not None
    env, *_ = [open_env(config, description, recorded=recorded) for _, description in models]
    budget = budget_of(config, env)
    steps = the_same_steps(budget, [description for _, description in models])
    tolerance = tolerance_of(config, env)
    seeds = unsolved_seeds(env, config.episodes, config.seed, tolerance)
    policies = {
        str(source): model_policies(make_agents(config, env, model))
        for source, (model, _) in zip(sources, models, strict=True)
    }
    own = own_share(seeds, "episodes")
    number, _ = launched()
    check_record(config.record)
    if number == 0:
        made.open(config)

    if config.record is not None:
        measured = record(config.record, env, policies, own, steps)
    else:
        measured = {name: play(name, env, policy, own, steps) for name, policy in policies.items()}
    others = {"random": play("random", env, random_policies(env), own, steps)}
    if config.ceiling:
        others |= _ceiling(config, env, own, steps, stride_of(models[0][1]))
    by_model, others = gather(measured), gather(others)
    if number > 0:
        return
    results = {"env": config.env, "budget": budget, "seeds": seeds}
    results |= summary(by_model, others, tolerance)
    for source, (model, _) in zip(sources, models, strict=True):
        results["models"][str(source)] |= search_used(config, env, model)
    made.finish(results)


def summary(
    by_model: dict[str, list[Episode]], others: dict[str, list[Episode]], tolerance: float
) -> dict[str, Any]:
    """Return, and print, what results.json says of the episodes of models, together and each.

    Args:
        by_model: The episodes of every model, by its name.
        others: Of `random` actions and, if there are any, of the `simulator`.
        tolerance: Largest distance to the goal that counts as success.
    """
    episodes = [episode for model in by_model.values() for episode in model]
    rates = {name: _rates(rows, tolerance) for name, rows in others.items()}
    results: dict[str, Any] = {
        **_rates(episodes, tolerance),
        "random_floor": rates["random"],
        "plan_seconds": plan_seconds(episodes),
        "tolerance": tolerance,
        "models": {name: _rates(rows, tolerance) for name, rows in by_model.items()},
        "final_distances": {
            name: [round(row.distances[-1], 5) for row in rows] for name, rows in by_model.items()
        },
    }
    if "simulator" in rates:
        results["simulator_ceiling"] = rates["simulator"]
    for name in ("success_end", "success_ever"):
        rate = results[name]
        print(f"{name}: {rate['rate']:.1%} (n {rate['n']}, 95 %: {rate['low']} to {rate['high']})")
    return results


def model_policies(agent_of: Callable[[int], Agent]) -> Callable[[int], Policy]:
    """Return what makes the policy of an episode, from its seed: the agent under test."""
    return lambda seed: ModelPolicy(agent_of(seed))


def random_policies(env: gym.Env[Any, Any]) -> Callable[[int], Policy]:
    """Return what makes the policy of an episode, from its seed: random actions."""
    return lambda seed: RandomPolicy(env.action_space, seed)


def the_same_steps(budget: int, descriptions: list[dict[str, Any]]) -> int:
    """Return the steps of all models in the budget.

    Raises:
        UserError: models with steps of different lengths: no env is the same for them.
    """
    strides = sorted({stride_of(description) for description in descriptions})
    if len(strides) > 1:
        raise UserError(f"the models' steps are {strides} environment steps: evaluate them apart")
    return model_steps(budget, descriptions[0])


def play(
    name: str,
    env: gym.Env[Any, Any],
    policy_of: Callable[[int], Policy],
    seeds: Sequence[int],
    steps: int,
) -> list[Episode]:
    """Return the episodes of these seeds, each of so many steps by a policy of its own.

    Args:
        name: Shown by the progress bar.
        env: Its reset with a seed gives a start and a goal.
        policy_of: Makes the policy of an episode, from its seed.
        seeds: Of the episodes.
        steps: Of each.
    """
    progress = tqdm(seeds, name, mininterval=1.0, disable=launched()[0] > 0)
    return [run_episode(env, policy_of(seed), seed, steps) for seed in progress]


def check_record(folder: Path | None) -> None:
    """Check that episodes can be recorded into a folder.

    Raises:
        UserError: it is not empty, or several processes would write there.
    """
    if folder is None:
        return
    if launched()[1] > 1:
        raise UserError("--record: one process writes a dataset, leave accelerate launch out")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"--record {folder} is there already: nothing is overwritten, name another")


def record(
    folder: Path,
    env: gym.Env[Any, Any],
    policies: dict[str, Callable[[int], Policy]],
    seeds: Sequence[int],
    steps: int,
) -> dict[str, list[Episode]]:
    """Play as `play` does, each policy by its name, and leave all episodes as a dataset.

    Raises:
        UserError: the folder cannot be written.
    """
    played: dict[str, list[Episode]] = {name: [] for name in policies}
    turns = [(name, seed) for name in policies for seed in seeds]

    def episodes(indices: list[int]) -> Iterator[dict[str, Any]]:
        for name, seed in (turns[index] for index in indices):
            played[name].append(run_episode(env, policies[name](seed), seed, steps))
            yield env.get_wrapper_attr("recorded_episode")()

    settings = {"env": env.spec and env.spec.id, "episodes": len(turns)}
    description = {"settings": settings, "policy": "planner", "models": list(policies)}
    try:
        write_store(
            *(folder, description, episodes, len(turns)),
            shard_episodes=100,
            jpeg=False,
            doing="planning",
        )
    except OSError as error:
        raise UserError(f"--record {folder} cannot be written: {error}") from error
    return played


def _ceiling(
    config: Evaluate, env: gym.Env[Any, Any], seeds: Sequence[int], steps: int, stride: int
) -> dict[str, list[Episode]]:
    """Return episodes of planning on the simulator; none where it or the planner cannot."""
    if not isinstance(simulator := env.unwrapped, SimulatorEnv):
        return {}
    build, start = make_planners(config, env)

    def policy_of(seed: int) -> Policy:
        return SimulatorPolicy(simulator, build(seed), start, stride=stride)

    try:
        return {"simulator": play("simulator", env, policy_of, seeds, steps)}
    except UnsuitedCostError as error:
        print(f"no ceiling, the true simulator gives only costs: {error}")
        return {}


def _rates(episodes: list[Episode], tolerance: float) -> dict[str, Any]:
    return {
        "success_end": asdict(success_end(episodes, tolerance)),
        "success_ever": asdict(success_ever(episodes, tolerance)),
    }
