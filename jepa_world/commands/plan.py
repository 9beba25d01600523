"""Plan to goal images with a trained world model, and leave a video of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium as gym
import mujoco
import torch
from torch import Tensor
from tqdm import tqdm

from jepa_world import envs
from jepa_world.agent import Agent
from jepa_world.commands import prepare_process
from jepa_world.config import OR_ROBOT, Part, part_options, require_at_least, to_dict
from jepa_world.envs.ahead import GoalsAhead
from jepa_world.envs.blocks import ActionBlocks
from jepa_world.envs.recorder import Recorder
from jepa_world.evaluation import (
    ModelPolicy,
    plan_seconds,
    run_episode,
    success_end,
    success_ever,
    unsolved_seeds,
)
from jepa_world.interfaces import BudgetEnv, Planner, SimulatorEnv
from jepa_world.methods.world_model import WorldModel, load_world_model
from jepa_world.objectives import Objective, weighted_sum
from jepa_world.policies import actions_of, usual_policy
from jepa_world.processes import gather, launched, own_share
from jepa_world.registry import UserError, did_you_mean, load_function
from jepa_world.report import Camera, Film, FrameBank, write_report
from jepa_world.runs import Run
from jepa_world.search import SingleActions
from jepa_world.testing import check_objective, check_planner

LEARNED = "learned"  # the name of the objective that a checkpoint holds
HORIZON, IN_BLOCKS = 10, 5  # steps of a plan, by default; of one whose steps are several actions
NARROW = 0.15  # deviation of a search around a policy's plan, in units of half the action range
SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints"


@dataclass(frozen=True)
class Planning:
    """What planning needs, whether it is shown or measured."""

    env: Annotated[str, OR_ROBOT] = "reach"
    """The environment: `reach` and others (docs/envs.md), any Gymnasium id, module:Id-v0, or a
    robot of MuJoCo Menagerie (franka_emika_panda)."""
    planner: Part = Part("cem")
    """Minimises the objective."""
    objective: tuple[str, ...] | None = None
    """What a plan costs: names (summed_distance, learned, effort, smoothness, module:function) with
    weights, effort=0.1. Default: learned, with a checkpoint of train_cost, else summed_distance."""
    horizon: int | None = None
    """Steps of a plan; only the first is executed before planning again. Default: 10, and 5 where a
    step of the model is several actions."""
    history: int = 1
    """Past observations given to the predictor."""
    budget: int | None = None
    """Environment steps of an episode; default: the environment's own (docs/envs.md)."""
    tolerance: float | None = None
    """Largest distance that counts as success; default: the environment's own (docs/envs.md)."""
    ahead: int | None = None
    """Goals are what acting as in `collect` reaches in so many steps; default: goals anywhere."""
    factors: tuple[str, ...] | None = None
    """Factors of variation drawn for every episode, by name; `all` is all of them. Default: none"""
    precision: Literal["no", "bf16"] = "no"
    """Of predictions; bf16 halves the time of large predictors (LeWorldModel's) on processors that
    multiply it natively; small ones, and other processors, are slower with it."""
    seed: int = 0
    """Of starts, goals and the planner's samples."""
    run_dir: Path | None = None
    """Where everything is left; default runs/<command>-<time>."""
    trust: tuple[str, ...] = ()
    """Packages outside jepa_world whose classes a checkpoint may name."""


@dataclass(frozen=True)
class Plan(Planning):
    """Plan in latent space to goals given as images, and film it.

    Without arguments: 10 episodes of `reach` with the world model that comes with the package.
    """

    checkpoint: Path | None = None
    """A run folder of train_world_model; default: the model shipped for the environment."""
    episodes: int = 10
    """Episodes to plan."""


def run(config: Plan) -> None:
    """Plan, and leave results.json, plan.mp4, plan.png and report.html in the run folder."""
    prepare_process()
    made = Run.of("plan", config.run_dir)
    require_at_least(config, episodes=1, horizon=1, history=1, seed=0)
    source = config.checkpoint or shipped(config.env)
    model, description = load_world_model(source, config.trust)
    env = open_env(config, description)
    tolerance = tolerance_of(config, env)
    seeds = unsolved_seeds(env, config.episodes, config.seed, tolerance)
    agent_of = make_agents(config, env, model)
    budget = budget_of(config, env)
    steps = model_steps(budget, description)
    number, _ = launched()
    if number == 0:
        made.open(config)
    bank = FrameBank.of(env, model)
    own: list[Film] = []
    for seed in tqdm(own_share(seeds, "episodes"), "planning", mininterval=1.0, disable=number > 0):
        camera = Camera(bank, agent := agent_of(seed))
        episode = run_episode(env, ModelPolicy(agent), seed, steps, watch=camera.watch)
        own.append(Film(episode, env.reset(seed=seed)[1]["goal"], camera.seen, camera.imagined))
    films = gather({"films": own})["films"]
    if number > 0:
        return
    episodes = [film.episode for film in films]
    results: dict[str, Any] = {
        "env": config.env,
        "checkpoint": str(source),
        **search_used(config, env, model),
        "success_end": asdict(success_end(episodes, tolerance)),
        "success_ever": asdict(success_ever(episodes, tolerance)),
        "plan_seconds": plan_seconds(episodes),
        "tolerance": tolerance,
        "budget": budget,
        "seeds": seeds,
        "final_distances": [round(episode.distances[-1], 5) for episode in episodes],
    }
    write_report(made.folder, results, films)
    rate = results["success_end"]
    print(f"{rate['rate']:.0%} of {rate['n']} episodes end within {tolerance} of the goal")
    made.finish(results)


def shipped(env: str) -> Path:
    """Return the checkpoint that comes with the package for an environment.

    Raises:
        UserError: there is none.
    """
    folder = SHIPPED / env
    if not folder.is_dir():
        hint = did_you_mean(env, [path.name for path in SHIPPED.glob("*")])
        raise UserError(f"no model is shipped for env {env!r}{hint}; give --checkpoint")
    return folder


def open_env(
    config: Planning, description: dict[str, Any], *, recorded: bool = False
) -> gym.Env[Any, Any]:
    """Make the environment, recorded step by step or not, and check that the model is for it.

    Raises:
        UserError: unknown environment, or another than the checkpoint's.
    """
    _, channels, rows, columns = description["observation_shape"]
    options = {} if config.factors is None else {"factors": envs.drawn(config.factors)}
    try:
        env = _make_env(config.env, (rows, columns, channels), **options)
    except envs.EnvError as error:
        raise UserError(str(error)) from error
    if config.ahead is not None:
        env = goals_ahead(env, config.ahead)
    if recorded:
        env = Recorder(env)
    if stride_of(description) > 1:
        env = ActionBlocks(env, stride_of(description))
    _compare_versions(description.get("mujoco"))
    trained = description.get("env")  # none: from a dataset that does not say
    if trained not in (None, config.env, env.spec.id if env.spec else None):
        raise UserError(f"the checkpoint was trained for env {trained!r}, not for {config.env!r}")
    for what, has, expects in (
        ("observations", env.observation_space.shape, (rows, columns, channels)),
        ("actions", env.action_space.shape, (description["action_dim"],)),
    ):
        if has != expects:
            raise UserError(f"{what} of {config.env!r} are {has}, the checkpoint expects {expects}")
    return env


def _compare_versions(trained: str | None) -> None:
    """Say so where a world model was trained with another main version of MuJoCo."""
    here = mujoco.__version__
    if trained is not None and trained.partition(".")[0] != here.partition(".")[0]:
        print(f"trained with MuJoCo {trained}, here is {here}: motion and pictures may differ")


def goals_ahead(env: gym.Env[Any, Any], steps: int) -> gym.Env[Any, Any]:
    """Return the environment with goals that its usual policy reaches in some steps.

    Raises:
        UserError: not one step, or an environment whose reset does not say where it began.
    """
    if steps < 1:
        raise UserError(f"--ahead is {steps}: give at least 1")
    if "configuration" not in env.reset(seed=0)[1]:
        raise UserError("--ahead: the environment gives no info['configuration'] to start from")
    options: dict[str, Any] = {"policy": usual_policy(env), "steps": steps, "still": 0.0}
    return GoalsAhead(env, steps, lambda generator: actions_of(env, generator=generator, **options))


def tolerance_of(config: Planning, env: gym.Env[Any, Any]) -> float:
    """Return the distance that counts as success: the one asked for, or the environment's own.

    Raises:
        UserError: a negative one, or no number.
    """
    if config.tolerance is not None:
        require_at_least(config, tolerance=0)
        return config.tolerance
    simulator = env.unwrapped
    return simulator.tolerance if isinstance(simulator, SimulatorEnv) else 0.0


def budget_of(config: Planning, env: gym.Env[Any, Any]) -> int:
    """Return the environment steps of an episode: those asked for, or the environment's own.

    Raises:
        UserError: fewer than one.
    """
    if config.budget is not None:
        require_at_least(config, budget=1)
        return config.budget
    inner = env.unwrapped
    return inner.budget if isinstance(inner, BudgetEnv) else 50


def stride_of(description: dict[str, Any]) -> int:
    """Return the environment steps that a step of the world model is."""
    return int(description.get("stride", 1))


def model_steps(budget: int, description: dict[str, Any]) -> int:
    """Return the steps of the world model that the budget of environment steps is.

    Raises:
        UserError: not one whole step.
    """
    stride = stride_of(description)
    if budget < stride:
        raise UserError(f"--budget is {budget}: the model's steps are {stride} each")
    return budget // stride


def _make_env(name: str, frame: tuple[int, int, int], **options: Any) -> gym.Env[Any, Any]:
    """Make an environment; where it has an option `size`, with frames of this shape."""
    env = envs.make(name, **options)
    if env.observation_space.shape == frame or frame[0] != frame[1]:
        return env
    try:
        resized = envs.make(name, size=frame[0], **options)
    except envs.EnvError:
        return env
    env.close()
    return resized


def make_agents(
    config: Planning, env: gym.Env[Any, Any], model: WorldModel
) -> Callable[[int], Agent]:
    """Return what makes the agent of an episode, from the seed of its start and goal."""
    build, start = make_planners(narrow(config, model), env)
    objective = make_objective(config.objective, model)
    check_objective(objective, model.encoder.num_tokens, model.encoder.dim, *start.shape)
    options: dict[str, Any] = {"history": config.history, "half": config.precision == "bf16"}
    return lambda seed: Agent(model, build(seed), start, objective=objective, **options)


def narrow(config: Planning, model: WorldModel) -> Planning:
    """Return the configuration with a search that stays near a policy's plan, unless it says how.

    A wide search from there leaves what the data did, and the model's errors show. The planner's
    own default counts as nothing said. Without a policy the search is as it was.
    """
    if model.policy is None:
        return config
    name, options = config.planner.name, config.planner.options
    usual = {option.name: option.default for option in part_options("planner", name)}
    if "std" not in usual or options.get("std", usual["std"]) != usual["std"]:
        return config
    return replace(config, planner=Part(name, {**options, "std": NARROW}))


def search_used(config: Planning, env: gym.Env[Any, Any], model: WorldModel) -> dict[str, Any]:
    """Return what a search with this model is, for results.json: its planner and its horizon."""
    planner = to_dict(narrow(config, model))["planner"]
    return {"planner": planner, "horizon": horizon_of(config, stride_in(env))}


def horizon_of(config: Planning, stride: int) -> int:
    """Return the steps of a plan: those asked for, or fewer where a step is several actions."""
    return config.horizon or (HORIZON if stride == 1 else IN_BLOCKS)


def stride_in(env: gym.Env[Any, Any]) -> int:
    """Return the environment steps that a step of an environment is."""
    return env.get_wrapper_attr("stride") if env.has_wrapper_attr("stride") else 1


def make_objective(terms: Sequence[str] | None, model: WorldModel) -> Objective:
    """Return the sum of the objectives that are named, each with its weight: `effort=0.1`.

    `learned` is the world model's own cost, what nothing named means where it has one.

    Raises:
        UserError: unknown name, no weight behind the equals sign, nothing named, or no such cost.
    """
    if terms is None:
        terms = ("summed_distance",) if model.cost is None else (LEARNED,)
    weighted: list[tuple[float, Objective]] = []
    for term in terms:
        name, equals, number = term.partition("=")
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise UserError(f"--objective {term!r}: {number!r} is no weight, as in effort=0.1")
        if name == LEARNED and model.cost is None:
            raise UserError("--objective learned: the checkpoint has no cost, train_cost makes one")
        learned = model.cost if name == LEARNED else None
        weighted.append((weight, learned or load_function("objective", name)))
    if not weighted:
        raise UserError("--objective names nothing to minimise: give summed_distance")
    return weighted_sum(*weighted)


def make_planners(
    config: Planning, env: gym.Env[Any, Any]
) -> tuple[Callable[[int], Planner], Tensor]:
    """Return what makes the planner of an episode, and a first plan of zeros.

    Its samples are drawn from the seeds of the command and of the episode, so an episode does not
    depend on those before it, nor on the number of processes. Where a step has several actions, a
    planner that only asks for costs searches over single ones.
    """
    space = env.action_space
    assert isinstance(space, gym.spaces.Box)
    low, high = torch.from_numpy(space.low), torch.from_numpy(space.high)
    known = [option.name for option in part_options("planner", config.planner.name)]
    stride = stride_in(env)
    own, horizon = space.shape[0] // stride, horizon_of(config, stride)

    def build(seed: int) -> Planner:
        options = dict(config.planner.options)
        if "seed" in known:
            options["seed"] = options.get("seed", 0) + config.seed + seed
        part = Part(config.planner.name, options)
        planner: Planner = part.build("planner", low, high, horizon)
        if stride == 1 or getattr(planner, "needs_latents", False):
            return planner
        single = part.build("planner", low[:own], high[:own], horizon * stride)
        return SingleActions(single, stride)

    check_planner(lambda: build(0), low, high, horizon)
    return build, torch.zeros(horizon, *space.shape)
