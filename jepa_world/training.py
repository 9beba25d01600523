"""The one training loop: Accelerate, schedule, log, checkpoint, exact resume.

Everything random is a function of the seed and the step: which samples form a batch, dropout, the
slices of SIGReg. Nothing random is therefore saved, a resumed run equals the uninterrupted one bit
for bit, and the samples of a step do not depend on the number of processes.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, set_seed
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from jepa_world.checkpoint import (
    load_state,
    load_tensors,
    save_tensors,
    write_atomically,
    write_yaml,
)
from jepa_world.config import read_yaml
from jepa_world.probes import collapse_report
from jepa_world.registry import UserError, did_you_mean
from jepa_world.runs import Run

Read = Callable[[Int[np.ndarray, " b"], int], dict[str, Tensor]]
"""Return the batch of these samples at a step; pickled where processes of their own read."""
Evaluate = Callable[[], dict[str, float]]
"""Return what is measured on held-out data beside the losses."""


@dataclass(frozen=True)
class Training:
    """The flags all training commands share; each gives its own defaults and adds to them."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 64
    """Samples in a step, over all processes."""
    lr: float = 1e-3
    """Largest learning rate of AdamW."""
    weight_decay: float = 1e-2
    """Weight decay of AdamW, on matrices and kernels."""
    seed: int = 0
    """Of weights, batches, slices and all else that is random."""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Mixed precision of the networks, SIGReg and the loss stay float32; auto: bf16 where the
    device multiplies it natively."""
    log_every: int = 50
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 500
    """Steps between two checkpoints and measurements on held-out data."""
    log_with: str = "none"
    """A tracker of Accelerate's: tensorboard, wandb, ..."""
    run_dir: Path | None = None
    """Where everything is left; default runs/<command>-<time>."""
    resume: bool = False
    """Continue the run in --run-dir exactly where its last checkpoint is."""


def train(
    method: nn.Module,
    read: Read,
    num_samples: int,
    config: Training,
    *,
    accelerator: Accelerator,
    run_dir: Path,
    evaluate: Evaluate | None = None,
    workers: int = 0,
    patience: float = 0.0,
) -> dict[str, float]:
    """Train a method, a module `(batch, step) -> Output`, and leave its checkpoint in `run_dir`.

    Args:
        method: Returns `(loss, terms, latent)`; see `methods.world_model.Output`.
        read: Gives the batch of a list of samples; every process reads its own share.
        num_samples: Each is seen once an epoch, in an order drawn from the seed.
        config: How long, how fast, how often: the shared flags. The learning rate rises over the
            first 5 % of the steps and falls to lr / 1000; biases and gains have no weight decay.
        accelerator: Of this process.
        run_dir: Receives `metrics.jsonl` and `checkpoint/`; resumed from, if asked.
        evaluate: Runs on all processes, in evaluation mode, before a checkpoint.
        workers: Processes that read batches ahead; with 0, batches are read when they are needed.
        patience: Seconds to wait for a batch of theirs; 0 is for ever.

    Returns:
        The last line of the log.

    Raises:
        UserError: the batch does not divide, the loss is not finite, the checkpoint does not fit,
            or a batch cannot be read.
        RuntimeError: a process that reads died or hangs, as torch says it.
    """
    share = own_share(config.batch_size, num_samples, accelerator)
    accelerator.init_trackers("jepa-world")
    optimizer = AdamW(_parameter_groups(method, config.weight_decay), lr=config.lr)
    first = _load_training(run_dir, method, optimizer, accelerator) if config.resume else 0
    model, prepared = accelerator.prepare(method, optimizer)
    log = _Log(run_dir, first, accelerator)
    batches = _batches(_Batches(read, num_samples, config, share), first, workers, patience)
    for step in _progress(first, config.steps, accelerator):
        set_seed(_step_seed(config.seed, step))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.steps, config.lr)
        batch = {key: value.to(accelerator.device) for key, value in next(batches).items()}
        try:
            loss, terms, latent = _backward(model, batch, step, accelerator)
        except ValueError as error:  # of a loss that refuses features that are not finite
            raise _diverged(str(error), step, run_dir) from error
        if not torch.isfinite(loss):
            raise _diverged(f"the loss is {loss.item()}", step, run_dir)
        norm = torch.as_tensor(accelerator.clip_grad_norm_(model.parameters(), 1.0))
        prepared.step()
        prepared.zero_grad()

        done, last = step + 1, step + 1 == config.steps
        if done % config.log_every == 0 or last:
            log.add({"loss": loss, **terms, "gradient_norm": norm}, latent)
        if done % config.checkpoint_every == 0 or last:
            log.measure(_in_evaluation_mode(method, evaluate))
        log.write(done, learning_rate(step, config.steps, config.lr))
        if (done % config.checkpoint_every == 0 or last) and accelerator.is_main_process:
            _save_training(run_dir, method, optimizer, accelerator, done)
    accelerator.wait_for_everyone()
    model, prepared = accelerator.free_memory(model, prepared)  # they hold the process group
    accelerator.end_training()
    return log.last


def _backward(
    model: nn.Module, batch: dict[str, Tensor], step: int, accelerator: Accelerator
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Compute gradients, of so many parts of the batch in turn as the accelerator accumulates.

    Processes add up their gradients at the last part. What is a statistic of the batch (SIGReg,
    batch norm) is then one of each part.
    """
    parts = accelerator.gradient_accumulation_steps
    outputs: list[tuple[Tensor, dict[str, Tensor], Tensor]] = []
    for number in range(parts):
        part = {key: value.chunk(parts)[number] for key, value in batch.items()}
        last = number + 1 == parts
        with nullcontext() if last else accelerator.no_sync(model):
            loss, terms, latent = model(part, step)
            accelerator.backward(loss)  # divides by the number of parts
        outputs.append((loss.detach(), terms, latent))
    losses, terms, latents = zip(*outputs, strict=True)
    means = {key: torch.stack([of[key] for of in terms]).mean() for key in terms[0]}
    return torch.stack(losses).mean(), means, torch.cat(latents)


def make_accelerator(precision: str, log_with: str, run_dir: Path) -> Accelerator:
    """Return the Accelerator of this process.

    Raises:
        UserError: the tracker is unknown or not installed (Accelerate would drop it silently).
    """
    known = [str(tracker) for tracker in LoggerType if tracker != LoggerType.ALL]
    if log_with not in ("none", *known):
        raise UserError(f"unknown tracker {log_with!r}{did_you_mean(log_with, ['none', *known])}")
    if log_with not in ("none", *map(str, get_available_trackers())):
        raise UserError(f"--log-with {log_with}: not installed; pip install {log_with}")
    accelerator = Accelerator(
        mixed_precision=native_precision() if precision == "auto" else precision,
        log_with=None if log_with == "none" else log_with,
        project_dir=run_dir,
    )
    return accelerator


def native_precision() -> str:
    """Return "bf16" if this process's device multiplies bfloat16 natively, else "no".

    A CPU without such instructions emulates them, more than ten times slower than float32.
    """
    device = PartialState().device.type
    on_cpu = device == "cpu" and torch.backends.mkldnn.is_available()
    if on_cpu and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "bf16"
    return "bf16" if device == "cuda" and torch.cuda.is_bf16_supported() else "no"


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rise linearly over the first 5 % of the steps, then fall on a cosine to peak / 1000."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * progress)))


def batch_index(num_samples: int, batch_size: int, seed: int, step: int) -> Int[np.ndarray, " b"]:
    """Return the samples of one step: batches are cut from one shuffled epoch after another."""
    position = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = position // num_samples
    index = [_shuffled(num_samples, seed, int(epoch)) for epoch in np.unique(epochs)]
    return np.concatenate(index)[position - epochs[0] * num_samples]


def begin(
    made: Run,
    config: Training,
    description: dict[str, Any],
    num_samples: int,
    accelerator: Accelerator,
) -> None:
    """Open the folder of a run and leave the model's description in it, or check what is there.

    Raises:
        UserError: before anything is overwritten: the batch does not divide, the run to resume
            trains another model, or the folder is taken.
    """
    own_share(config.batch_size, num_samples, accelerator)
    if config.resume:
        _check_same_model(made.folder, description)
    if accelerator.is_main_process:
        made.open(config, resume=config.resume)
        write_yaml(made.folder / "checkpoint" / "config.yaml", description)
    accelerator.wait_for_everyone()


def _check_same_model(folder: Path, description: dict[str, Any]) -> None:
    """Check that the run to resume trains this model."""
    saved = folder / "checkpoint" / "config.yaml"
    known = read_yaml(saved) if saved.is_file() else description
    for key in description.keys() - {"jepa_world"}:
        if known.get(key) != description[key]:
            raise UserError(
                f"{str(folder)!r} holds a model with {key} {known.get(key)!r}, not "
                f"{description[key]!r}: resume it as it was, or name another --run-dir"
            )


def own_share(batch_size: int, num_samples: int, accelerator: Accelerator) -> slice:
    """Return the part of every batch that belongs to this process.

    Raises:
        UserError: the batch does not divide by the processes, or is more than there is.
    """
    processes, parts = accelerator.num_processes, accelerator.gradient_accumulation_steps
    if batch_size % (processes * parts):
        times = "" if parts == 1 else f" x {parts} steps of accumulation"
        raise UserError(
            f"--batch-size {batch_size} does not divide by {processes} processes{times}"
        )
    if num_samples < batch_size:
        raise UserError(
            f"--batch-size {batch_size} is more than the {num_samples} samples there are"
        )
    size = batch_size // processes
    return slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)


@dataclass(frozen=True)
class _Batches(Dataset[dict[str, Tensor] | UserError]):
    """The batch of every step, or the user's mistake that met it: a worker returns it whole."""

    read: Read
    num_samples: int
    config: Training
    share: slice

    def __getitem__(self, step: int) -> dict[str, Tensor] | UserError:
        config = self.config
        index = batch_index(self.num_samples, config.batch_size, config.seed, step)[self.share]
        try:
            return self.read(index, step)
        except UserError as error:
            return error


def _batches(
    batches: _Batches, first: int, workers: int, patience: float
) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of all steps from `first` on, in order.

    Raises:
        UserError: a batch cannot be read.
    """
    steps = range(first, batches.config.steps)
    own = torch.Generator()  # the loader draws from it, not from what steps draw from
    how = {"num_workers": workers, "timeout": patience if workers else 0, "generator": own}
    for batch in DataLoader(batches, batch_size=None, sampler=steps, **how):
        if isinstance(batch, UserError):
            raise batch
        yield batch


@lru_cache(maxsize=2)
def _shuffled(num_samples: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def _parameter_groups(method: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    trained = [p for p in method.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def _progress(first: int, steps: int, accelerator: Accelerator) -> Iterable[int]:
    hidden = not accelerator.is_main_process
    numbers = range(first, steps)
    return tqdm(numbers, "training", steps, initial=first, disable=hidden, mininterval=1.0)


def _diverged(what: str, step: int, run_dir: Path) -> UserError:
    where = f"the last good checkpoint is in {str(run_dir / 'checkpoint')!r}"
    return UserError(f"at step {step} {what}: lower --lr; {where}")


def _in_evaluation_mode(method: nn.Module, evaluate: Evaluate | None) -> dict[str, float]:
    if evaluate is None:
        return {}
    method.eval()
    with torch.no_grad():
        measured = evaluate()
    method.train()
    return measured


def _save_training(
    run_dir: Path, method: nn.Module, optimizer: AdamW, accelerator: Accelerator, step: int
) -> None:
    """Write the weights, and beside them all that a resumed run needs, each whole or not at all."""
    folder = run_dir / "checkpoint"
    weights = method.state_dict()
    tensors = {f"model/{name}": value for name, value in weights.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
    save_tensors(folder / "model.safetensors", weights, {"step": step})
    scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
    facts = {"step": step, "scaler": scaler}  # the scale of the loss, in fp16 only
    save_tensors(folder / "training.safetensors", tensors, facts)  # last: resumed from


def _load_training(
    run_dir: Path, method: nn.Module, optimizer: AdamW, accelerator: Accelerator
) -> int:
    """Load what `_save_training` wrote and return the number of steps done; 0 before the first."""
    path = run_dir / "checkpoint" / "training.safetensors"
    if not path.exists():
        return 0
    tensors, facts = load_tensors(path)
    weights = {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
    load_state(method, weights, str(path))
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            states.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})
    if accelerator.scaler and facts["scaler"]:
        accelerator.scaler.load_state_dict(facts["scaler"])
    return int(facts["step"])


class _Log:
    """`metrics.jsonl`: a line a log step, without gap or double line after a resume."""

    def __init__(self, run_dir: Path, first: int, accelerator: Accelerator) -> None:
        self.path = run_dir / "metrics.jsonl"
        self.accelerator = accelerator
        self.last: dict[str, float] = {}
        self.line: dict[str, float] = {}
        self.warned = ""
        if accelerator.is_main_process:
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [
                line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first
            ]
            self.last = json.loads(kept[-1]) if kept else {}
            text = "".join(line + "\n" for line in kept)
            write_atomically(self.path, lambda part: part.write_text(text))

    def add(self, terms: dict[str, Tensor], latent: Tensor) -> None:
        """Add losses, averaged over processes, and the health of the features."""
        means = self.accelerator.reduce({k: v.detach().float() for k, v in terms.items()}, "mean")
        self.line |= {key: float(value) for key, value in means.items()}
        report = dict(collapse_report(latent))
        warning = str(report.pop("warning"))
        self.line |= report  # type: ignore[arg-type]
        if warning and warning != self.warned and self.accelerator.is_main_process:
            tqdm.write(f"warning: {warning}")
        self.warned = warning

    def measure(self, values: dict[str, float]) -> None:
        """Add what was measured on held-out data."""
        self.line |= values

    def write(self, step: int, lr: float) -> None:
        """Write the line of this step, if anything was added to it."""
        if not self.line:
            return
        self.last, self.line = {"step": step, "lr": lr, **self.line}, {}
        self.accelerator.log(self.last, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(self.last) + "\n")
