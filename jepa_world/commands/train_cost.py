"""Train what a plan costs: the steps from imagined latents to the goal, on a frozen world model."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from jepa_world.commands import prepare_process
from jepa_world.commands.plan import shipped
from jepa_world.commands.train_world_model import encode_once, open_data
from jepa_world.config import Part, require_at_least, to_dict
from jepa_world.data.files import BAD_SHARE
from jepa_world.data.trajectories import Columns, Trajectories
from jepa_world.interfaces import LearnedCost
from jepa_world.masking import uniform_numbers
from jepa_world.methods.temporal_distance import TemporalDistanceLearning
from jepa_world.methods.world_model import load_world_model
from jepa_world.probes import spearman
from jepa_world.registry import UserError
from jepa_world.runs import Run
from jepa_world.training import Training, begin, make_accelerator, train

GOALS = 4  # of every frame: two later in its episode, two anywhere


@dataclass(frozen=True)
class TrainCost(Training):
    """Train a cost for planning: how many steps lie between two latents of a trained world model.

    What is near in latent space may be far to go: behind a wall, or to be pushed there first.
    Without arguments: on the world model that comes with the package for `reach`.
    """

    checkpoint: Path | None = None
    """A run folder of train_world_model; it stays as it is, this run holds a model with the cost.
    Default: the model shipped for `reach`."""
    data: tuple[Path, ...] = (Path("data/reach"),)
    """Datasets: as the world model's."""
    columns: Columns = Columns()
    """Which columns of a dataset of others are the pictures and the actions."""
    bad_share: float = BAD_SHARE
    """Of the files or episodes that may be damaged; in small sets a tenth may be, and ten."""
    cost: Part = Part("temporal")
    """The network that learns the distance."""
    expectile: float = 0.1
    """0.5: the mean way that the data takes; towards 0, the shortest."""
    policy: Part = Part("none")
    """A network that learns beside it what the data does on the way to a goal (cloned): searches
    then begin with its plan, and are narrow (--planner.std 0.15)."""
    trust: tuple[str, ...] = ()
    """Packages outside jepa_world whose classes a checkpoint may name."""
    steps: int = 2000
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 1e-4


def run(config: TrainCost) -> None:
    """Train; leave config.yaml, metrics.jsonl, results.json and checkpoint/ in the run folder."""
    prepare_process()
    require_at_least(config, steps=1, batch_size=2, log_every=1, checkpoint_every=1)
    require_at_least(config, lr=0, weight_decay=0, seed=0, bad_share=0)
    if not 0 < config.expectile < 1:
        raise UserError(f"--expectile is {config.expectile}: give a number between 0 and 1")
    made = Run.of("train_cost", config.run_dir)
    accelerator = make_accelerator(
        *(config.precision, config.loop.log_with, made.folder),
        accumulate=config.loop.accumulate,
        compile=config.loop.compile,
    )
    model, description = load_world_model(config.checkpoint or shipped("reach"), config.trust)
    store = open_data(config.data, config.columns, config.bad_share, accelerator)
    check_frames(store, description)
    training, held_out = store.split(0.05)
    stride = description.get("stride", 1)
    windows = training.windows(2, stride)

    torch.manual_seed(config.seed)
    facts = (model.encoder.dim, model.encoder.num_tokens)
    cost = config.cost.build("cost", *facts)
    check_cost(cost, config.cost.name)
    policy, learned = None, {"cost": to_dict(config)["cost"]}
    if config.policy.name != "none":
        learned["policy"] = to_dict(config)["policy"]
        policy = config.policy.build("policy", *facts, description["action_dim"])
        check_policy(policy, config.policy.name, *facts, description["action_dim"])
    method = TemporalDistanceLearning(model, cost, policy, expectile=config.expectile)
    kept = {key: value for key, value in description.items() if key != "policy"}
    begin(made, config, kept | learned, len(windows), accelerator)
    latents = encode_once(method, store, made.folder / "features.npy", accelerator)
    if latents is not None:
        training, held_out = (part.with_latents(latents) for part in (training, held_out))

    def read(index: Int[np.ndarray, " b"], step: int) -> dict[str, Tensor]:
        numbers = uniform_numbers(torch.from_numpy(index), config.seed, step, GOALS).numpy()
        return triples(training, windows, windows[index], numbers, stride, cost.discount)

    last = train(
        *(method, read, len(windows), config),
        accelerator=accelerator,
        run_dir=made.folder,
        evaluate=lambda: ranks_steps(method, held_out, stride, accelerator),
    )
    if accelerator.is_main_process:
        (made.folder / "features.npy").unlink(missing_ok=True)
        made.finish({**last, "seed": config.seed, **store.skipped.results()})


def check_cost(cost: object, name: str) -> None:
    """Check that a network keeps the contract of a learned cost.

    Raises:
        UserError: it does not.
    """
    if not (isinstance(cost, nn.Module) and isinstance(cost, LearnedCost)):
        raise UserError(f"cost {name!r} is no nn.Module with `discount` and `between`")


def check_policy(policy: object, name: str, dim: int, tokens: int, action_dim: int) -> None:
    """Check that a network keeps the contract of a policy.

    Raises:
        UserError: it does not.
    """
    z, fits = torch.zeros(2, 3, tokens, dim), False
    with contextlib.suppress(RuntimeError, TypeError, ValueError, AttributeError):
        fits = isinstance(policy, nn.Module) and policy(z, z).shape == (2, 3, action_dim)
    if not fits:
        raise UserError(
            f"policy {name!r} is no nn.Module that makes of two latents (b g n d) an action "
            f"(b g {action_dim})"
        )


def check_frames(store: Trajectories, description: dict[str, Any]) -> None:
    """Check that a dataset's frames are what the world model sees.

    Raises:
        UserError: they are of another shape, or of another environment.
    """
    trained = description.get("env")
    if None not in (trained, store.env) and trained != store.env:
        raise UserError(f"{store.path} was collected in {store.env!r}, the model is of {trained!r}")
    _, channels, *size = description["observation_shape"]
    rows, columns, depth = store.frame_shape
    if [rows, columns, depth] != [*size, channels]:
        raise UserError(
            f"frames of {store.path} are {store.frame_shape}, the world model's "
            f"{(*size, channels)}: give the data it was trained on"
        )


def triples(
    data: Trajectories,
    windows: Int[np.ndarray, " w"],
    rows: Int[np.ndarray, " b"],
    numbers: Float[np.ndarray, "b g"],
    stride: int,
    discount: float,
) -> dict[str, Tensor]:
    """Read frames, those a step later, and goals: two later ones, near and at any time, two others.

    Args:
        data: The episodes.
        windows: The frames that goals anywhere are taken from.
        rows: The frames; each has one a step later in its episode.
        numbers: Uniform in [0, 1): they choose the goals.
        stride: Frames of a step.
        discount: Near goals lie 1 / (1 - discount) steps ahead on average.
    """
    left = data.frames_after(rows) // stride
    soon = np.ceil(np.log1p(-numbers[:, 0]) / np.log(discount)).clip(1, left)
    ahead = np.stack([soon, 1 + np.floor(numbers[:, 1] * left)], 1).astype(np.int64)
    anywhere = windows[np.floor(numbers[:, 2:] * len(windows)).astype(np.int64)]
    there = rows[:, None] + stride * ahead
    frames = np.concatenate([rows[:, None], rows[:, None] + stride, there, anywhere], 1)
    batch = data.read(frames.ravel(), 1)
    actions = data.read(rows, 1, stride)["action"][:, 0]
    name = "latent" if "latent" in batch else "pixels"
    seen = batch[name].reshape(*frames.shape, *batch[name].shape[2:])
    reached = np.concatenate([ahead == 1, np.zeros(anywhere.shape, bool)], 1)
    later = np.broadcast_to(np.arange(reached.shape[1]) < ahead.shape[1], reached.shape)
    arrays = {name: seen, "reached": reached, "action": actions, "later": later}
    return {key: torch.from_numpy(np.ascontiguousarray(x)) for key, x in arrays.items()}


@torch.no_grad()
def ranks_steps(
    method: TemporalDistanceLearning, data: Trajectories, stride: int, accelerator: Accelerator
) -> dict[str, float]:
    """Compare distances with the steps that held-out episodes took from frame to frame.

    Returns:
        `steps_rank`: Spearman's correlation over 2,000 pairs; an episode's ways are not the
        shortest, so that 1 is not to be had.
    """
    random = np.random.default_rng(0)
    rows = random.choice(data.windows(2, stride), 2000)
    ahead = 1 + np.floor(random.random(2000) * (data.frames_after(rows) // stride)).astype(np.int64)
    batch = data.read(np.concatenate([rows, rows + stride * ahead]), 1)
    seen = {key: torch.from_numpy(x).to(accelerator.device) for key, x in batch.items()}
    z = seen["latent"] if "latent" in seen else method.encode(seen["pixels"])
    here, there = z[:, 0].chunk(2)
    distance = method.cost.between(here, there).cpu().numpy()
    return {"steps_rank": spearman(distance, ahead.astype(np.float64))}
