"""Train a world model from the pixels and actions of a dataset, end to end."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mujoco
import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

import jepa_world
from jepa_world.checkpoint import encoder_weights, find_checkpoint, load_state, load_tensors
from jepa_world.commands import prepare_process
from jepa_world.commands.collect import Collect, collect
from jepa_world.config import Part, read_yaml, require_at_least, to_dict
from jepa_world.data.files import BAD_SHARE
from jepa_world.data.trajectories import Columns, Trajectories
from jepa_world.interfaces import ReadsWeights
from jepa_world.losses import Distance, VICReg
from jepa_world.methods.temporal_distance import TemporalDistanceLearning
from jepa_world.methods.vjepa2_ac import VJEPA2AC
from jepa_world.methods.world_model import (
    TeacherWorldModel,
    WorldModel,
    build_learned,
    build_parts,
)
from jepa_world.probes import linear_probe_r2
from jepa_world.registry import UserError
from jepa_world.runs import Run
from jepa_world.sigreg import SIGReg
from jepa_world.testing import check_encoder, check_predictor
from jepa_world.training import Training, begin, make_accelerator, train


@dataclass(frozen=True)
class PredictFlags:
    """How far ahead latents are predicted, and how the error is measured."""

    stride: int = 1
    """Environment steps between two latents; their actions, side by side, are one."""
    open_loop: int | None = None
    """Steps predicted before the true latent is given again: the whole window if not given, 1 for
    teacher forcing. With --frozen: steps of the rollout beside teacher forcing, 2 if not given."""
    distance: Distance | None = None
    """Between latents predicted and latents that came: l2, with --frozen l1, if not given."""


@dataclass(frozen=True)
class Regulariser:
    """What keeps latents from collapsing; not with --frozen, where they cannot."""

    name: Literal["sigreg", "vicreg", "ema", "none"] = "sigreg"
    """sigreg, or to compare with it: vicreg, the variance and covariance terms of VICReg; ema,
    targets from a moving average of the encoder (momentum .99), without gradient; none, nothing."""
    weight: tuple[float, float] | None = None
    """Of sigreg or vicreg against the prediction error at the start, which makes latents hold much,
    and at the end, which leaves them smooth, and distances meaningful. Sigreg .1 and .002, vicreg 1
    and .02, if not given."""
    change: float | None = None
    """Also of what changes over a window: its deviation, as a share of that between any two frames.
    For scenes where much never changes in an episode (rooms): what stays foretells itself, and may
    be all that latents hold. Nothing if not given."""
    slices: int = 256
    """Random directions that sigreg tests at every step."""


LEARNED = ("cost", "policy")  # what train_cost learns beside a world model
WEIGHTS = {"sigreg": (0.1, 0.002), "vicreg": (1.0, 0.02)}


@dataclass(frozen=True)
class TrainWorldModel(Training):
    """Train an encoder and a predictor end to end: next-latent error + weight * SIGReg.

    Without arguments: collect `reach` into data/reach if it is not there, and train on it.
    """

    data: tuple[Path, ...] = (Path("data/reach"),)
    """Dataset: a folder of shards that collect.py made, or one in a layout of docs/datasets.md.
    More behind it, such as `evaluate.py --record` leaves, are trained on beside it."""
    columns: Columns = Columns()
    """Which columns of a dataset of others are the pictures and the actions."""
    bad_share: float = BAD_SHARE
    """Of the files or episodes that may be damaged; in small sets a tenth may be, and ten."""
    encoder: Part = Part("conv")
    """Maps frames to latents."""
    predictor: Part = Part("mlp")
    """Maps latents and actions to the next latents."""
    frozen: Path | None = None
    """Run folder whose encoder is used as it is, or a folder of transformers' or a file of timm's
    weights: only a predictor is trained, by the loss of V-JEPA 2-AC, on frames that are encoded
    once. `--encoder FOLDER` is short for it and the encoder's options. A cost and a policy that the
    run holds (train_cost) stay."""
    frames: int = 4
    """Frames of a training window; the first is encoded, the others are predicted open loop."""
    predict: PredictFlags = PredictFlags()
    """How far ahead latents are predicted, and how the error is measured."""
    regulariser: Regulariser = Regulariser()
    """What keeps latents from collapsing."""
    steps: int = 2500
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 1e-3


def run(config: TrainWorldModel) -> None:
    """Train; leave config.yaml, metrics.jsonl, results.json and checkpoint/ in the run folder."""
    prepare_process()
    require_at_least(config, frames=2, steps=1, batch_size=2, log_every=1)
    require_at_least(config, lr=0, weight_decay=0, seed=0, checkpoint_every=1, bad_share=0)
    check_steps_ahead(config)
    check_regulariser(config.regulariser)
    made = Run.of("train_world_model", config.run_dir)
    accelerator = make_accelerator(
        *(config.precision, config.loop.log_with, made.folder),
        accumulate=config.loop.accumulate,
        compile=config.loop.compile,
    )
    store = open_data(config.data, config.columns, config.bad_share, accelerator)
    training, held_out = store.split(0.05)

    torch.manual_seed(config.seed)
    description = describe(config, store)
    model, method = build_method(config, description)
    stride = config.predict.stride
    windows = training.windows(config.frames, stride)
    begin(made, config, description, len(windows), accelerator)
    accelerator.print(store.origin)
    if store.skipped:
        accelerator.print(store.skipped.summary())
    accelerator.print(
        f"{training.num_episodes} episodes, {sum(p.numel() for p in method.parameters()):,} "
        f"parameters, {accelerator.num_processes} process(es) on {accelerator.device.type}"
    )
    if isinstance(method, VJEPA2AC):
        latents = encode_once(method, store, made.folder / "features.npy", accelerator)
        if latents is not None:
            training, held_out = (part.with_latents(latents) for part in (training, held_out))

    def read(index: Int[np.ndarray, " b"], step: int) -> dict[str, Tensor]:
        batch = training.read(windows[index], config.frames, stride)
        seen = ("pixels", "latent", "action")
        return {key: torch.from_numpy(batch[key]) for key in seen if key in batch}

    last = train(
        *(method, read, len(windows), config),
        accelerator=accelerator,
        run_dir=made.folder,
        evaluate=lambda: latent_health(model, training, held_out, stride=stride),
    )
    if accelerator.is_main_process:
        (made.folder / "features.npy").unlink(missing_ok=True)
        if store.skipped:
            print(store.skipped.summary())
        made.finish({**last, "seed": config.seed, **store.skipped.results()})


def describe(config: TrainWorldModel, data: Trajectories) -> dict[str, Any]:
    """Return what the checkpoint holds beside the weights: what the model is for, and its parts."""
    stride = config.predict.stride
    return {
        "method": "world_model",
        "env": data.env,
        "observation_shape": [1, data.frame_shape[2], *data.frame_shape[:2]],
        "stride": stride,
        "action_dim": stride * data.action_dim,
        "encoder": to_dict(config)["encoder"],
        "predictor": to_dict(config)["predictor"],
        "regulariser": config.regulariser.name if config.frozen is None else "none",
        "jepa_world": jepa_world.__version__,
        "mujoco": mujoco.__version__,
        **describe_learned(config.frozen, stride, stride * data.action_dim),
    }


def describe_learned(frozen: Path | None, stride: int, action_dim: int) -> dict[str, Any]:
    """Return what a frozen world model's checkpoint says of its cost and its policy.

    They know its latents, and hold with any predictor of the same steps; those of others are left.
    """
    found = [] if frozen is None else [frozen / "checkpoint", frozen]
    file = next((path for folder in found if (path := folder / "config.yaml").is_file()), None)
    known = {} if file is None else read_yaml(file)
    if (known.get("stride", 1), known.get("action_dim")) != (stride, action_dim):
        return {}
    return {kind: known[kind] for kind in LEARNED if kind in known}


def build_method(
    config: TrainWorldModel, description: dict[str, Any]
) -> tuple[WorldModel, WorldModel | TeacherWorldModel | VJEPA2AC]:
    """Build the world model, and what trains it: itself, a teacher, or a loss of frozen latents.

    Its parts may be anybody's, and keep their contracts.
    """
    encoder, predictor = build_parts(description)
    check_encoder(encoder, tuple(description["observation_shape"]))
    given, seed = config.regulariser, config.seed
    start, end = given.weight or WEIGHTS.get(given.name, (0.0, 0.0))
    known = {"sigreg": SIGReg(slices=given.slices, seed=seed), "vicreg": VICReg()}
    open_loop = config.predict.open_loop
    distance = config.predict.distance or ("l1" if config.frozen else "l2")
    model = WorldModel(
        *(encoder, predictor, known.get(given.name)),
        weight=start,
        change=given.change,
        final_weight=end,
        steps=config.steps,
        open_loop=open_loop,
        distance=distance,
    )
    dim, tokens = model.encoder.dim, model.encoder.num_tokens
    check_predictor(predictor, dim, description["action_dim"], num_tokens=tokens)
    if config.frozen is not None:
        load_frozen(encoder, config.frozen)
        rollout = open_loop or min(2, config.frames - 1)
        learned = load_learned(description, encoder, config.frozen)
        return model, VJEPA2AC(encoder, predictor, rollout=rollout, distance=distance, **learned)
    if given.name == "ema":
        words: Any = {"open_loop": open_loop, "distance": distance}
        return model, TeacherWorldModel(encoder, predictor, **words)
    return model, model


def load_learned(description: dict[str, Any], encoder: nn.Module, path: Path) -> dict[str, Any]:
    """Load the cost and the policy that are taken over from a run, as they are.

    Raises:
        UserError: damaged, or made by a package outside this one.
    """
    if not any(kind in description for kind in LEARNED):
        return {}
    file = find_checkpoint(path) / "model.safetensors"
    tensors, _ = load_tensors(file)
    parts = build_learned(description, encoder, file)
    for kind, part in parts.items():
        prefix = f"{kind}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        load_state(part, own, str(file))
    return parts


def load_frozen(encoder: nn.Module, path: Path) -> None:
    """Load the weights of an encoder from a run, or from a file of the library it comes from.

    Raises:
        UserError: nothing there, or weights of another encoder.
    """
    if not isinstance(encoder, ReadsWeights) or (path / "checkpoint").is_dir():
        load_state(encoder, *encoder_weights(find_checkpoint(path)))
        return
    try:
        encoder.load_weights(path)
    except ValueError as error:
        raise UserError(str(error)) from error


def encode_once(
    method: VJEPA2AC | TemporalDistanceLearning,
    store: Trajectories,
    file: Path,
    accelerator: Accelerator,
) -> Float[np.ndarray, "f n d"] | None:
    """Encode every frame of a store into a file of float16, each process its share, and open it.

    Returns:
        The latents, on the disk; nothing where they would take more than a quarter of what is free
        there: frames are then encoded in every batch.

    Raises:
        UserError: a latent that is not finite, or too large for float16.
    """
    shape = (store.num_frames, method.encoder.num_tokens, method.encoder.dim)
    needed, free = 2 * math.prod(shape), shutil.disk_usage(file.parent).free
    if not file.is_file() and needed > free / 4:
        accelerator.print(f"{needed / 1e9:.1f} GB of latents: frames are encoded in every batch")
        return None
    if not file.is_file():
        part = file.with_name(file.name + ".unfinished")
        if accelerator.is_main_process:
            np.lib.format.open_memmap(part, "w+", np.float16, shape).flush()
        accelerator.wait_for_everyone()
        _encode_share(method, store, np.load(part, mmap_mode="r+"), accelerator)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            part.replace(file)
        accelerator.wait_for_everyone()
    return np.load(file, mmap_mode="r")


@torch.no_grad()
def _encode_share(
    method: VJEPA2AC | TemporalDistanceLearning,
    store: Trajectories,
    latents: Float[np.ndarray, "f n d"],
    accelerator: Accelerator,
    *,
    batch: int = 64,
) -> None:
    """Encode this process's share of all frames, batch by batch."""
    method.to(accelerator.device).eval()
    starts = range(
        accelerator.process_index * batch, len(latents), accelerator.num_processes * batch
    )
    hidden = not accelerator.is_main_process
    for start in tqdm(starts, "encoding", disable=hidden, mininterval=1.0):
        index = np.arange(start, min(start + batch, len(latents)))
        pixels = torch.from_numpy(store.read(index, 1)["pixels"]).to(accelerator.device)
        with accelerator.autocast():
            z = method.encode(pixels)[:, 0].half()
        if not bool(z.isfinite().all()):
            raise UserError(
                f"the encoder's latents of frames {start} to {index[-1]} are not finite"
            )
        latents[index] = z.cpu().numpy()
    method.train()


def check_steps_ahead(config: TrainWorldModel) -> None:
    """Check that a window has the steps that are to be predicted open loop.

    Raises:
        UserError: no step, more than the window has, or no stride.
    """
    if config.predict.stride < 1:
        raise UserError(f"--predict.stride is {config.predict.stride}: give at least 1")
    steps = config.predict.open_loop
    if steps is not None and not 1 <= steps < config.frames:
        raise UserError(
            f"--predict.open-loop is {steps}: give 1 to {config.frames - 1}, the steps in windows "
            f"of {config.frames} frames"
        )


def check_regulariser(given: Regulariser) -> None:
    """Check that a regulariser has the numbers that it needs, and no others.

    Raises:
        UserError: a weight below 0 or of nothing, or no slice.
    """
    require_at_least(given, "regulariser.", slices=1)
    if given.change is not None and (given.name not in WEIGHTS or not 0 < given.change < math.inf):
        raise UserError(f"--regulariser.change is {given.change}: above 0, of sigreg or vicreg")
    if given.weight is None:
        return
    if given.name not in WEIGHTS:
        raise UserError(f"--regulariser.weight: {given.name!r} has none, drop it")
    if not all(weight >= 0 for weight in given.weight):
        start, end = given.weight
        raise UserError(f"--regulariser.weight is {start} {end}: give at least 0")


def open_data(
    data: tuple[Path, ...], columns: Columns, bad_share: float, accelerator: Accelerator
) -> Trajectories:
    """Open datasets to be read as one; the default one is collected where it is not there.

    Raises:
        UserError: none, or what `Trajectories` refuses.
    """
    if not data:
        raise UserError("--data names no dataset")
    if accelerator.is_main_process and data == (Path("data/reach"),):
        collect_default(data[0])
    accelerator.wait_for_everyone()
    first, *also = data
    pixels, action = columns.pixels, columns.action
    return Trajectories(first, also=also, pixels=pixels, action=action, bad_share=bad_share)


def collect_default(folder: Path) -> None:
    """Collect `reach`, or finish an interrupted collection; a complete dataset is left as it is."""
    description = folder / "dataset.yaml"
    if not description.is_file() or "action" not in read_yaml(description):
        collect(Collect(data=folder))


def latent_health(
    model: WorldModel,
    training: Trajectories,
    held_out: Trajectories,
    *,
    steps: int = 10,
    stride: int = 1,
) -> dict[str, float]:
    """Measure held-out latents: what they hold, and how far open-loop prediction can be trusted.

    Returns:
        `probe_r2` of a linear read-out of `proprio` (cosines and sines of an arm's joint angles),
        fitted on training episodes; `open_loop_error` after 10 steps and `copy_error` of the latent
        10 steps before, both as shares of the latents' variance; `rest_drift`: the predictor's
        change over 10 steps of zero action, likewise.
    """
    longest = min(int(part.lengths.max()) for part in (training, held_out))
    steps = min(steps, (longest - 1) // stride)
    z, action, proprio = _encoded(model, held_out, steps + 1, stride)
    variance = z.flatten(0, 1).var(0).sum()
    predicted = model.rollout(z[:, :1], action[:, :-1])[:, -1]
    resting = model.rollout(z[:, :1], torch.zeros_like(action[:, :-1]))[:, -1]

    def share(difference: Tensor) -> float:
        return float(difference.square().flatten(1).sum(1).mean() / variance)

    measured = {
        "open_loop_error": share(predicted - z[:, -1]),
        "copy_error": share(z[:, 0] - z[:, -1]),
        "rest_drift": share(resting - z[:, 0]),
    }
    if proprio is not None:
        fit_z, _, fit_proprio = _encoded(model, training, steps + 1, stride)
        assert fit_proprio is not None
        fit_z, fit_y, z, y = (x.flatten(2).flatten(0, 1) for x in (fit_z, fit_proprio, z, proprio))
        r2 = linear_probe_r2(fit_z, fit_y, z, y)
        measured |= {"probe_r2": float(r2.mean()), "probe_r2_worst": float(r2.min())}
    return measured


def _encoded(
    model: WorldModel, trajectories: Trajectories, frames: int, stride: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Encode up to 256 windows, spread evenly; with their actions and proprioception, if any.

    Of encoders with many tokens fewer, 32 at least.
    """
    device = next(model.parameters()).device
    windows = trajectories.windows(frames, stride)
    count = min(max(32, 256 // model.encoder.num_tokens), len(windows))
    chosen = windows[np.linspace(0, len(windows) - 1, count).astype(int)]
    batch = trajectories.read(chosen, frames, stride)
    tensors = {key: torch.from_numpy(value).to(device) for key, value in batch.items()}
    z = tensors["latent"] if "latent" in tensors else model.encode(tensors["pixels"]).float()
    return z, tensors["action"], tensors.get("proprio")
