"""The one training loop: Accelerate, schedule, log, checkpoint, exact resume.

Everything random is a function of the seed and the step: which samples form a batch, dropout, the
slices of SIGReg. Nothing random is therefore saved, a resumed run equals the uninterrupted one bit
for bit, and the samples of a step do not depend on the number of processes.
"""

import gc
import json
import math
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    LoggerType,
    gather_object,
    parse_flag_from_env,
    patch_environment,
    set_seed,
)
from jaxtyping import Int
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from jepa_world.checkpoint import (
    finite,
    load_state,
    load_tensors,
    save_tensors,
    write_atomically,
    write_yaml,
    writing,
)
from jepa_world.config import read_yaml, require_at_least
from jepa_world.memory import let_go, recompute_blocks, shard_of, sharded, whole
from jepa_world.probes import collapse_report
from jepa_world.registry import Stopped, UserError, did_you_mean
from jepa_world.runs import Run

Item = TypeVar("Item")
Result = TypeVar("Result")
Read = Callable[[Int[np.ndarray, " b"], int], dict[str, Tensor]]
"""Return the batch of these samples at a step; pickled where processes of their own read."""
Evaluate = Callable[[], dict[str, float]]
"""Return what is measured on held-out data beside the losses."""


@dataclass(frozen=True)
class Loop:
    """How the loop steps, what it keeps, and what it does with numbers that are not finite."""

    accumulate: int = 1
    """Parts of a batch whose gradients are added up, one after another: less memory. SIGReg and
    batch norm then see one part at a time."""
    clip: float = 1.0
    """Largest norm of the gradient; a longer one is shortened to it."""
    compile: bool = False
    """Compile the model: slow to begin, then faster."""
    recompute: bool = False
    """Forget what transformers compute inside their blocks, and compute it again for the gradient
    (activation checkpointing): less memory, slower."""
    shard: bool = False
    """Give every process its part of the weights, of their gradients and moments (FSDP2): less
    memory a device. So does `accelerate launch --use_fsdp`, whose other options are not read."""
    skips: int = 10
    """Steps in a row that are skipped because the loss or the gradient is not finite; one more ends
    the training."""
    keep: int = 0
    """Checkpoints kept in checkpoints/step-*, beside the newest in checkpoint/."""
    best: tuple[str, Literal["min", "max"]] | None = None
    """A number of metrics.jsonl, as `open_loop_error min`: checkpoints/best has the weights of the
    checkpoint where it is the least or the greatest."""
    log_with: str = "none"
    """A tracker of Accelerate's: tensorboard, wandb, ..."""


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
    loop: Loop = Loop()
    """How the loop steps, what it keeps, and what it does with numbers that are not finite."""
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
    sizes: Int[np.ndarray, " shards"] | None = None,
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
        sizes: Samples of every shard, where samples lie in shards: read as in `sharded_index`.
        workers: Processes that read batches ahead; with 0, batches are read when they are needed.
        patience: Seconds to wait for a batch of theirs; 0 is for ever.

    Returns:
        The last line of the log.

    Raises:
        UserError: the batch does not divide, the loss or the gradient is not finite in more steps
            in a row than may be skipped, the checkpoint does not fit or cannot be written, a batch
            cannot be read, or there are no blocks to compute again.
        Stopped: SIGTERM came; the step was finished, and a checkpoint written.
        RuntimeError: a process that reads died or hangs, as torch says it.
    """
    share = own_share(config.batch_size, num_samples, accelerator)
    accelerator.init_trackers("jepa-world")
    if config.loop.recompute:
        recompute_blocks(method)
    batches = _Batches(read, num_samples, config, share, sizes)
    state, last = _loop(method, batches, accelerator, run_dir, evaluate, workers, patience)
    if _shards(config.loop, accelerator):
        gc.collect()  # what is sharded holds itself, and the process group
    accelerator.end_training()
    if state.step < config.steps:
        raise Stopped(
            f"asked to end, stopped after step {state.step} of {config.steps}; "
            f"--resume --run-dir {run_dir} goes on from the last checkpoint"
        )
    return last


def _loop(
    method: nn.Module,
    data: "_Batches",
    accelerator: Accelerator,
    run_dir: Path,
    evaluate: Evaluate | None,
    workers: int,
    patience: float,
) -> tuple["_State", dict[str, float]]:
    """Take the steps that are left; return where they end, and the last line of the log."""
    config, shards = data.config, _shards(data.config.loop, accelerator)
    trained = _sharded(method, accelerator) if shards else method
    optimizer = AdamW(_parameter_groups(trained, config.weight_decay), lr=config.lr)
    checkpoints = _Checkpoints(
        run_dir, method, trained, optimizer, accelerator, config.loop, data.num_samples
    )
    state = checkpoints.load() if config.resume else _State()
    model, prepared = _prepared(trained, optimizer, accelerator, alone=shards)
    log = _Log(run_dir, state.step, accelerator)
    batches = _batches(data, state.step, workers, patience)
    with _noticing_termination() as asked:
        for step in _progress(state.step, config.steps, accelerator):
            set_seed(_step_seed(config.seed, step))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.steps, config.lr)
            batch = {key: value.to(accelerator.device) for key, value in next(batches).items()}
            taken = _step(model, prepared, batch, step, config.loop.clip, asked, accelerator)
            state = state.after(taken.wrong)
            if state.in_a_row > config.loop.skips:
                raise _diverged(taken.wrong, state, run_dir)

            done, last = step + 1, step + 1 == config.steps
            good = state.in_a_row == 0
            due = (good and done % config.checkpoint_every == 0) or last
            saved = due or (good and taken.stop)
            if done % config.log_every == 0 or last:
                log.add({**taken.terms, "skipped": torch.tensor(state.skipped)}, taken.latent)
            if saved:
                checkpoints.gather()
            if due:
                log.measure(_in_evaluation_mode(method, evaluate, done))
            log.write(done, learning_rate(step, config.steps, config.lr))
            if saved:
                checkpoints.save(state, log.last if due else None)
            if saved and shards and not last:
                method.cpu()
            if taken.stop:
                break
    accelerator.wait_for_everyone()
    batches.close()
    if shards:
        let_go(trained)
    accelerator.free_memory(model, prepared)  # they hold the process group
    return state, log.last


def _shards(loop: Loop, accelerator: Accelerator) -> bool:
    """Tell whether parameters are to be sharded, and there is more than one process for it."""
    asked = loop.shard or parse_flag_from_env("ACCELERATE_USE_FSDP")
    return asked and accelerator.num_processes > 1


def _sharded(method: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Return the copy that is trained, and put the method aside until it is measured."""
    trained = sharded(method, accelerator.device)
    accelerator.print(f"weights are sharded over {accelerator.num_processes} processes")
    method.cpu()
    return trained


def _prepared(
    model: nn.Module, optimizer: AdamW, accelerator: Accelerator, *, alone: bool
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Return model and optimiser with their precision, the model in what averages its gradients."""
    if alone:  # shards average them
        model = accelerator.prepare_model(model, evaluation_mode=True)
        return model, accelerator.prepare(optimizer)
    return accelerator.prepare(model, optimizer)


@dataclass(frozen=True)
class _State:
    """Steps done, and those among them that were skipped: in all, and without a good one since."""

    step: int = 0
    skipped: int = 0
    in_a_row: int = 0

    def after(self, wrong: str) -> "_State":
        """Return the state after one more step."""
        bad = bool(wrong)
        return _State(self.step + 1, self.skipped + bad, self.in_a_row + 1 if bad else 0)


class _Taken(NamedTuple):
    """What a step was: terms of the loss, latents, what was not finite, whether to end after it."""

    terms: dict[str, Tensor]
    latent: Tensor | None
    wrong: str
    stop: bool


def _step(
    model: nn.Module,
    optimizer: AcceleratedOptimizer,
    batch: dict[str, Tensor],
    step: int,
    clip: float,
    asked: "_Asked",
    accelerator: Accelerator,
) -> _Taken:
    """Take a step, or leave all as it was where the loss or the gradient is not finite."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    terms: dict[str, Tensor] = {}
    latent = None
    try:
        loss, parts, latent = _backward(model, batch, step, accelerator)
        norm = whole(torch.as_tensor(accelerator.clip_grad_norm_(model.parameters(), clip)))
        terms = {"loss": loss, **parts, "gradient_norm": norm}
        wrong = _not_finite(loss, norm)
    except ValueError as error:  # of a loss that refuses features that are not finite
        wrong = str(error)
    bad, stop = _anywhere([bool(wrong), asked.to_end], accelerator)
    if not bad or (accelerator.scaler is not None and latent is not None):
        optimizer.step()  # in fp16 it is this that skips such a gradient, and lowers the scale
    if bad:
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        terms, latent = {"loss": torch.tensor(math.nan)}, None  # the same in all processes
    optimizer.zero_grad()
    return _Taken(terms, latent, wrong or "the loss of another process is not finite" * bad, stop)


def _not_finite(loss: Tensor, norm: Tensor) -> str:
    """Say which number is not finite, or nothing."""
    for name, number in (("loss", loss), ("norm of the gradient", norm)):
        if not bool(number.isfinite()):
            return f"the {name} is {float(number)}"
    return ""


def _anywhere(here: list[bool], accelerator: Accelerator) -> list[bool]:
    """Tell which of some things hold in any process."""
    if accelerator.num_processes == 1:
        return here
    found = torch.tensor(here, dtype=torch.float32, device=accelerator.device)
    return [bool(count) for count in accelerator.reduce(found, "sum")]  # type: ignore[union-attr]


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


def make_accelerator(
    precision: str, log_with: str, run_dir: Path, *, accumulate: int = 1, compile: bool = False
) -> Accelerator:
    """Return the Accelerator of this process; see `Loop` for the options.

    Raises:
        UserError: the tracker is unknown or not installed (Accelerate would drop it silently).
    """
    known = [str(tracker) for tracker in LoggerType if tracker != LoggerType.ALL]
    if log_with not in ("none", *known):
        raise UserError(f"unknown tracker {log_with!r}{did_you_mean(log_with, ['none', *known])}")
    if log_with not in ("none", *map(str, get_available_trackers())):
        raise UserError(f"--loop.log-with {log_with}: not installed; pip install {log_with}")
    with patch_environment(ACCELERATE_USE_FSDP="false"):  # it would do so on GPUs alone, and
        return Accelerator(  # bring losses to half precision: the loop shards by itself
            mixed_precision=native_precision() if precision == "auto" else precision,
            log_with=None if log_with == "none" else log_with,
            project_dir=run_dir,
            gradient_accumulation_steps=accumulate,
            dynamo_backend="inductor" if compile else None,
        )


def native_precision() -> str:
    """Return "bf16" if this process's device multiplies bfloat16 natively, else "no".

    A CPU without such instructions emulates them, more than ten times slower than float32.
    """
    device = cast(torch.device, PartialState().device).type
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


def sharded_index(
    sizes: Int[np.ndarray, " shards"],
    batch_size: int,
    seed: int,
    position: Int[np.ndarray, " b"],
) -> Int[np.ndarray, " b"]:
    """Return the samples at some positions of an endless order in which shards are read.

    An epoch is one row of samples: the shards in a random order, in each its samples in a random
    order. The row is cut into `batch_size` lanes of one length, or one sample more, and a step
    takes the next sample of every lane. So every sample comes once an epoch, a batch has samples of
    as many shards as there are lanes, and a process reads the shards of its own lanes alone. All of
    it is a function of seed and position: no buffer, nothing to save, and no list of samples.

    Args:
        sizes: Samples of every shard, none of them empty.
        batch_size: Of all processes together: the number of lanes.
        seed: Of the orders.
        position: Counted over all epochs; the step times the batch size is where a batch begins.
    """
    ends = np.cumsum(sizes)
    epochs, place = np.divmod(position, int(ends[-1]))
    row, lane = np.divmod(place, batch_size)
    length, longer = divmod(int(ends[-1]), batch_size)
    along = lane * length + np.minimum(lane, longer) + row
    index = np.empty_like(position)
    for epoch in np.unique(epochs).tolist():
        order = _shuffled(len(sizes), seed, epoch)
        reached = np.cumsum(sizes[order])
        here = np.flatnonzero(epochs == epoch)
        turn = np.searchsorted(reached, along[here], side="right")
        shards = order[turn]
        left = reached[turn] - along[here]  # from a sample to the end of its shard
        for i, shard, back in zip(here, shards.tolist(), left.tolist(), strict=True):
            within = _shuffled_shard(int(sizes[shard]), seed, epoch, shard)
            index[i] = ends[shard] - sizes[shard] + within[-back]
    return index


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
    require_at_least(config.loop, "loop.", accumulate=1, clip=1e-6, skips=0, keep=0)
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


def own_share(
    batch_size: int, num_samples: int, accelerator: Accelerator
) -> Int[np.ndarray, " share"]:
    """Return the positions in every batch that belong to this process.

    The batch is cut into the parts that are accumulated, and each of them among the processes: a
    part, and SIGReg of it, is the same whatever their number.

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
    cut = np.arange(batch_size).reshape(parts, processes, -1)
    return cut[:, accelerator.process_index].reshape(-1)


@dataclass(frozen=True)
class _Batches(Dataset[dict[str, Tensor] | UserError]):
    """The batch of every step, or the user's mistake that met it: a worker returns it whole."""

    read: Read
    num_samples: int
    config: Training
    share: Int[np.ndarray, " share"]
    sizes: Int[np.ndarray, " shards"] | None

    def __getitem__(self, step: int) -> dict[str, Tensor] | UserError:
        try:
            return self.read(self._index(step), step)
        except UserError as error:
            return error

    def _index(self, step: int) -> Int[np.ndarray, " share"]:
        batch_size, seed = self.config.batch_size, self.config.seed
        if self.sizes is not None:
            return sharded_index(self.sizes, batch_size, seed, step * batch_size + self.share)
        return batch_index(self.num_samples, batch_size, seed, step)[self.share]


def _batches(
    batches: _Batches, first: int, workers: int, patience: float
) -> Generator[dict[str, Tensor], None, None]:
    """Yield the batches of all steps from `first` on, in order.

    Raises:
        UserError: a batch cannot be read.
    """
    steps = range(first, batches.config.steps)
    own = torch.Generator()  # the loader draws from it, not from what steps draw from
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        timeout=patience if workers else 0,
        generator=own,
        worker_init_fn=_ignore_termination,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


@lru_cache(maxsize=2)
def _shuffled(num_samples: int, seed: int, epoch: int) -> Int[np.ndarray, " n"]:
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


@lru_cache(maxsize=256)  # of 10,000 samples: 10 MB
def _shuffled_shard(size: int, seed: int, epoch: int, shard: int) -> Int[np.ndarray, " n"]:
    return np.random.default_rng([seed, epoch, shard]).permutation(size).astype(np.int32)


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


def divided(
    work: Callable[[Item], Result], items: Sequence[Item], accelerator: Accelerator
) -> list[Result]:
    """Return what some work makes of every item: each done by one process, and known to all."""
    number, count = accelerator.process_index, accelerator.num_processes
    shares: list[list[Result]] = gather_object([[work(item) for item in items[number::count]]])
    return [shares[i % count][i // count] for i in range(len(items))]


@dataclass
class _Asked:
    """Whether the process was asked to end."""

    to_end: bool = False

    def __call__(self, *_: object) -> None:
        self.to_end = True


@contextmanager
def _noticing_termination() -> Iterator[_Asked]:
    """Note SIGTERM instead of dying of it, where signals can be handled: in the main thread."""
    asked = _Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, asked)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _ignore_termination(worker: int) -> None:
    """Let a process that reads ahead live as long as the one it reads for needs its batches."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _diverged(wrong: str, state: _State, run_dir: Path) -> UserError:
    times = f", {state.in_a_row} steps in a row" if state.in_a_row > 1 else ""
    where = f"the last good checkpoint is in {str(run_dir / 'checkpoint')!r}"
    return UserError(f"at step {state.step - 1} {wrong}{times}: lower --lr; {where}")


def _in_evaluation_mode(
    method: nn.Module, evaluate: Evaluate | None, step: int
) -> dict[str, float]:
    if evaluate is None:
        return {}
    method.eval()
    try:
        with torch.no_grad():
            measured = evaluate()
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise UserError(
            f"the features after step {step} cannot be measured, they have diverged: lower --lr "
            f"({error})"
        ) from error
    method.train()
    return measured


class _Checkpoints:
    """`checkpoint/`, all that a resumed run needs; the last few and the best in `checkpoints/`."""

    def __init__(
        self,
        run_dir: Path,
        method: nn.Module,
        trained: nn.Module,
        optimizer: AdamW,
        accelerator: Accelerator,
        loop: Loop,
        num_samples: int,
    ) -> None:
        self.newest, self.others = run_dir / "checkpoint", run_dir / "checkpoints"
        self.method, self.trained = method, trained
        self.optimizer, self.accelerator = optimizer, accelerator
        self.loop, self.num_samples = loop, num_samples

    @torch.no_grad()
    def gather(self) -> None:
        """Gather weights that are sharded in the method, which is measured and saved."""
        if self.trained is self.method:
            return
        shards = self.trained.state_dict()
        for name, own in self.method.to(self.accelerator.device).state_dict().items():
            own.copy_(whole(shards[name]))

    def _gathered_moments(self) -> dict[str, Tensor]:
        """Return the optimiser's tensors, gathered where they are sharded, in the first process."""
        moments: dict[str, Tensor] = {}
        for index, values in self.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                gathered = whole(value)
                if self.accelerator.is_main_process:
                    moments[f"optimizer/{index}/{name}"] = gathered.cpu()
        return moments

    def save(self, state: _State, measured: dict[str, float] | None) -> None:
        """Write a checkpoint; the others before it, so that a run killed between writes them again.

        Called in all processes, behind `gather`; the first one writes.

        Args:
            state: What was done.
            measured: The line of the log, at the steps where checkpoints are due.
        """
        moments = self._gathered_moments()
        if not self.accelerator.is_main_process:
            return
        if measured is not None and self.loop.best is not None:
            self._save_if_best(state, measured, *self.loop.best)
        if measured is not None and self.loop.keep > 0:
            self._write(self.others / f"step-{state.step:08d}", state, moments)
        self._write(self.newest, state, moments)
        self._prune(state.step)

    def _write(self, folder: Path, state: _State, moments: dict[str, Tensor]) -> None:
        """Write the weights, and beside them all the rest, each whole or not at all."""
        weights = self.method.state_dict()
        tensors = {f"model/{name}": value for name, value in weights.items()} | moments
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
        facts = {  # the scale of the loss, in fp16 only
            **asdict(state),
            "scaler": scaler,
            "processes": self.accelerator.num_processes,
            "samples": self.num_samples,
        }
        self._describe(folder)
        save_tensors(folder / "model.safetensors", weights, {"step": state.step})
        save_tensors(folder / "training.safetensors", tensors, facts)  # last: resumed from

    def _describe(self, folder: Path) -> None:
        """Lay the description of the model beside weights that are kept."""
        description = self.newest / "config.yaml"
        if folder != self.newest and description.is_file():
            write_atomically(
                folder / "config.yaml", lambda part: shutil.copyfile(description, part)
            )

    def _save_if_best(
        self, state: _State, measured: dict[str, float], name: str, which: str
    ) -> None:
        """Write the weights to `checkpoints/best` if a number is better than at those there."""
        if name not in measured:
            raise UserError(f"--loop.best {name!r} is not measured{did_you_mean(name, measured)}")
        file, value = self.others / "best" / "model.safetensors", measured[name]
        before = load_tensors(file)[1]["value"] if file.is_file() else math.nan
        better = value < before if which == "min" else value > before
        if better or (math.isnan(before) and not math.isnan(value)):
            self._describe(file.parent)
            facts = {"step": state.step, "number": name, "value": value}
            save_tensors(file, self.method.state_dict(), facts)

    def _prune(self, step: int) -> None:
        """Remove kept checkpoints but the last ones up to a step."""
        kept = [
            folder
            for folder in sorted(self.others.glob("step-*"))
            if int(folder.name.removeprefix("step-")) <= step
        ]
        with writing(self.others):
            for folder in kept[: max(0, len(kept) - self.loop.keep)]:
                shutil.rmtree(folder)

    def load(self) -> _State:
        """Load what was written, and return what was done; nothing before the first checkpoint.

        Raises:
            UserError: damaged, or of another model.
        """
        if self.accelerator.is_main_process:
            self._tidy()
        path = self.newest / "training.safetensors"
        if not path.exists():
            return _State()
        tensors, facts = load_tensors(path)
        weights = {
            k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")
        }
        load_state(self.method, weights, str(path))
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                states.setdefault(int(index), {})[name] = value
        self._spread(weights, states)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        if self.accelerator.scaler and facts["scaler"]:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self._compare_processes(facts.get("processes", 1))
        self._compare_samples(facts.get("samples", self.num_samples))
        state = _State(*(int(facts.get(name, 0)) for name in ("step", "skipped", "in_a_row")))
        if self.accelerator.is_main_process:
            self._prune(state.step)
        return state

    @torch.no_grad()
    def _spread(self, weights: dict[str, Tensor], moments: dict[int, dict[str, Tensor]]) -> None:
        """Give what is trained, where it is sharded, its part of weights and of moments."""
        if self.trained is self.method:
            return
        for name, own in self.trained.state_dict().items():
            own.copy_(shard_of(weights[name], own))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, values in moments.items():
            for name, value in values.items():
                values[name] = shard_of(value, parameters[index])

    def _tidy(self) -> None:
        """Remove what a kill left of files that were being written."""
        for folder in (self.newest, *self.others.glob("*")):
            for pattern in ("*.unfinished", ".tmp*"):  # of ours, of safetensors'
                for file in folder.glob(pattern):
                    file.unlink()

    def _compare_processes(self, before: int) -> None:
        """Say that rounding differs where the number of processes does."""
        now = self.accelerator.num_processes
        if now != before:
            self.accelerator.print(
                f"resumed on {now} process(es), stopped on {before}: the same samples in the same "
                "order, but sums are rounded otherwise, so not bit for bit what it would have been"
            )

    def _compare_samples(self, before: int) -> None:
        """Say that the order is another where the number of samples is."""
        if before != self.num_samples:
            self.accelerator.print(
                f"the data has {self.num_samples} samples, it had {before} when the run stopped: "
                "from here on they come in another order, some of this epoch twice or not at all"
            )


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

    def add(self, terms: dict[str, Tensor], latent: Tensor | None) -> None:
        """Add losses, averaged over processes, and the health of the features, if there are any."""
        device = self.accelerator.device
        own = {key: value.detach().to(device, torch.float32) for key, value in terms.items()}
        means = self.accelerator.reduce(own, "mean")
        self.line |= {key: float(value) for key, value in means.items()}
        if latent is None:
            return
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
            with writing(self.path), self.path.open("a") as file:
                file.write(json.dumps(finite(self.last)) + "\n")
