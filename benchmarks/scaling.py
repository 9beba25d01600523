"""What a step costs as model, batch, clip and processes grow, and what stands beside the model.

    python benchmarks/scaling.py [--parts steps processes reading recipe checkpoint] [--rounds 3]

`steps`: the step of `train_vjepa.py` (forward, backward, clipping, AdamW; its batch at hand,
float32, one thread) against the first row. `processes`: the same batch on one process and on two
of gloo that Accelerate wraps. `reading`: the batch of such a step out of tars: finding and reading
its bytes, decoding them, and counting the members of a tar. `recipe`: what 500 steps of
configs/world_reach.yaml spend outside of the model. `checkpoint`: the size of one of ViT-g, and
what writing and reading a checkpoint costs here.

CPU time, the least of the rounds, with wall time beside it: the machines this runs on are shared.
MFU is the arithmetic of a step's matrix products (torch's FlopCounterMode, attention included) over
that which products of 1024 x 1024 matrices reach in the same CPU time, in the same run.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from masked_step import peak_megabytes
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from video_reading import cost, make_videos

import jepa_world.training as training
from jepa_world.checkpoint import load_tensors, save_tensors
from jepa_world.commands import train_world_model
from jepa_world.commands.collect import Collect, collect
from jepa_world.commands.train_vjepa import TrainVjepa, describe
from jepa_world.config import parse
from jepa_world.data.clips import Clips
from jepa_world.data.shards import Count, Shards, count_samples, find_shards
from jepa_world.data.video import SUFFIXES
from jepa_world.encoders.vit import ViTEncoder
from jepa_world.methods.vjepa import build_vjepa
from jepa_world.predictors.masked import CrossMaskedTransformer
from jepa_world.training import sharded_index

ROOT = Path(__file__).resolve().parents[1]
BASE = "--clips.frames 16 --clips.size 48 --batch-size 16"
ROWS = {  # what differs from the first row
    "4 x 96, 16 frames of 48 px, batch 16": "",
    "model 8 x 96": "--encoder.depth 8",
    "model 4 x 192": "--encoder.dim 192",
    "model 4 x 384": "--encoder.dim 384 --encoder.heads 6",
    "batch 4": "--batch-size 4",
    "batch 64": "--batch-size 64",
    "clip of 8 frames": "--clips.frames 8",
    "clip of 32 frames": "--clips.frames 32",
    "clip of 64 frames": "--clips.frames 64",
    "clip of 96 px": "--clips.size 96",
}
PER_FAILURE = 16384 * 54 * 24 / 419  # GPU-hours: Llama 3 405B, arXiv 2407.21783, section 3.3.4
H100 = 989e12  # dense bf16 products a second: NVIDIA's data sheet of the H100 SXM


def main() -> None:
    parser = argparse.ArgumentParser(description="What a step costs as things grow")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--launched", type=Path, help="used by this script itself")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.launched:
        launched_step(given.launched, given.rounds)
        return
    with tempfile.TemporaryDirectory() as folder:
        for part in given.parts:
            PARTS[part](Path(folder), given.rounds)


# Steps


def steps(folder: Path, rounds: int) -> None:
    """Print the cost of a step for every row, in turns."""
    runs, numbers, peaks = {}, {}, [product_rate()]
    for name, words in ROWS.items():
        method, run, batch = make_step(words)
        runs[name] = run
        numbers[name] = (sum(p.numel() for p in method.parameters()), arithmetic(method, batch))
    best = {name: [math.inf, math.inf] for name in runs}
    for _ in range(rounds + 1):  # the first warms up, and is slower
        for name, run in runs.items():
            best[name] = [min(pair) for pair in zip(best[name], cost(run), strict=True)]
        peaks.append(product_rate())
    first, rate = best[next(iter(ROWS))][0], max(peaks)
    print(f"products of 1024 x 1024 matrices: {rate / 1e9:.1f} G a CPU-second, float32, one thread")
    print(
        "\n| step of train_vjepa | parameters | CPU-ms | wall ms | ratio | GFLOP | MFU | peak MB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, (cpu, wall) in best.items():
        count, flops = numbers[name]
        peak = peak_megabytes(runs[name])
        cells = [f"{count / 1e6:.2f} M", f"{1e3 * cpu:.0f}", f"{1e3 * wall:.0f}"]
        cells += [f"{cpu / first:.2f}", f"{flops / 1e9:.1f}", f"{flops / cpu / rate:.0%}"]
        print(f"| {name} | {' | '.join(cells)} | {peak:.0f} |", flush=True)


def make_step(words: str) -> tuple[nn.Module, Callable[[], None], dict[str, torch.Tensor]]:
    """Return the method of a command line, a step of it, and its batch."""
    config = parse(TrainVjepa, [*BASE.split(), *words.split()], program="train_vjepa")
    cut = config.clips
    torch.manual_seed(0)
    method = build_vjepa(describe(config, (cut.frames, 3, cut.size, cut.size)))
    shape = (config.batch_size, cut.frames, cut.size, cut.size, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    batch = {"pixels": pixels, "index": torch.arange(config.batch_size)}
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4)

    def run() -> None:
        method(batch, 0).loss.backward()
        nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return method, run, batch


def arithmetic(method: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Return the floating-point operations of a step's matrix products."""
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # other kernels are not counted on a CPU
        method(batch, 0).loss.backward()
    method.zero_grad()
    return float(counter.get_total_flops())


def product_rate(side: int = 1024) -> float:
    """Return the operations a CPU-second of products of float32 matrices: the best of three."""
    a, b = torch.rand(side, side), torch.rand(side, side)
    return 2 * side**3 / min(cost(lambda: a @ b)[0] for _ in range(3))


# Processes


def processes(folder: Path, rounds: int) -> None:
    """Print what a step costs on one process and on two, together."""
    print("\n| processes | CPU-ms of all, a step | wall ms | ratio of CPU |")
    print("|---|---|---|---|")
    first = 0.0
    for count in (1, 2):
        out = folder / f"processes-{count}"
        out.mkdir()
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        line += [f"--nproc_per_node={count}", __file__, "--launched", out, "--rounds", 3 * rounds]
        environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run([str(word) for word in line], env=environment, check=True)
        shares = [json.loads(file.read_text()) for file in out.iterdir()]
        cpu, wall = sum(s["cpu"] for s in shares), max(s["wall"] for s in shares)
        first = first or cpu
        print(f"| {count} | {1e3 * cpu:.0f} | {1e3 * wall:.0f} | {cpu / first:.2f} |", flush=True)


def launched_step(out: Path, rounds: int) -> None:
    """Time the share of this process of the first row's step, and leave it in a file."""
    accelerator = Accelerator(cpu=True)
    size = 16 // accelerator.num_processes
    method, _, batch = make_step(f"--batch-size {size}")
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4)
    model, prepared = accelerator.prepare(method, optimizer)

    def run() -> None:
        accelerator.backward(model(batch, 0).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        prepared.step()
        prepared.zero_grad()

    costs = np.array([cost(run) for _ in range(rounds + 2)])[2:].min(0)
    (out / str(accelerator.process_index)).write_text(
        json.dumps({"cpu": costs[0], "wall": costs[1]})
    )
    accelerator.wait_for_everyone()
    model, prepared = accelerator.free_memory(model, prepared)
    accelerator.end_training()


# Reading


def reading(folder: Path, rounds: int) -> None:
    """Print what a batch out of tars costs beside the step it feeds, and what counting costs."""
    videos = make_videos(folder)[12]
    paths = [pack(folder / f"{n}.tar", videos, copies=16) for n in range(4)]
    suffixes = frozenset(SUFFIXES)
    shards = Shards.of(paths, [count_samples(p, suffixes) for p in paths], suffixes)
    clips = Clips(shards.names, shards)
    index = np.arange(0, len(shards), len(shards) // 16)[:16]
    _, step, _ = make_step("")
    clip = {"frames": 16, "fps": 7.5, "seed": 0, "step": 0}
    works: dict[str, Callable[[], object]] = {
        "the step: 4 x 96, 16 frames of 48 px, batch 16": step,
        "find and read the bytes of 16 videos": lambda: [shards[i].read() for i in index.tolist()],
        "read, decode and cut them, 48 px": lambda: clips.read(index, size=48, **clip),
        "read, decode and cut them, 224 px": lambda: clips.read(index, size=224, **clip),
    }
    best = {name: [math.inf, math.inf] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            best[name] = [min(pair) for pair in zip(best[name], cost(work), strict=True)]
    first = next(iter(best.values()))[0]
    print("\n| of a batch of 16 clips | CPU-ms | wall ms | ratio to the step |\n|---|---|---|---|")
    for name, (cpu, wall) in best.items():
        print(f"| {name} | {1e3 * cpu:.1f} | {1e3 * wall:.1f} | {cpu / first:.3f} |")
    report_counting(folder, rounds)


def pack(path: Path, videos: Path, *, copies: int) -> Path:
    """Write a shard of copies of some videos, a label beside each."""
    with tarfile.open(path, "w") as archive:
        for number, file in enumerate(sorted(videos.iterdir()) * copies):
            archive.add(file, f"{number:06d}.mp4")
            archive.addfile(tarfile.TarInfo(f"{number:06d}.cls"))
    return path


def report_counting(folder: Path, rounds: int) -> None:
    """Print what it costs to count the samples of a tar, and of a folder."""
    tar, many = folder / "many.tar", folder / "many"
    many.mkdir()
    with tarfile.open(tar, "w") as archive:
        for number in range(10_000):
            archive.addfile(tarfile.TarInfo(f"{number:06d}.mp4"))
            archive.addfile(tarfile.TarInfo(f"{number:06d}.cls"))
            (many / f"{number:06d}.mp4").touch()
    suffixes = frozenset(SUFFIXES)
    for what, count, path in (("tar", 20_000, tar), ("folder", 10_000, many)):
        seconds, _ = min(cost(lambda path=path: count_samples(path, suffixes)) for _ in range(3))
        print(f"counting a {what}: {1e6 * seconds / count:.1f} CPU-microseconds a member")
    shards = Shards.of([tar], [count_samples(tar, suffixes)], suffixes)
    assert shards[0] and len(shards) == 10_000 and find_shards(folder / "many.tar*") == (tar,)
    table = shards.opened[0]
    kept = table.places.nbytes + sum(map(sys.getsizeof, table.names)) + 8 * len(table.names)
    print(f"an open table keeps {kept / len(table):.0f} bytes a sample")
    names = Path("x-{000000..499999}.tar")
    peak = peak_megabytes(lambda: many_shards(names, suffixes))
    sizes = many_shards(names, suffixes).sizes  # a process reads 64 lanes of 4096
    turns = [cost(lambda s=s: sharded_index(sizes, 4096, 0, 4096 * s + np.arange(64))) for s in RUN]
    print(
        f"500,000 shards of 2000 samples: {peak:.0f} MB for their names, {1e3 * min(turns)[0]:.1f} "
        "CPU-ms a step to say which 64 of them"
    )


def many_shards(names: Path, suffixes: frozenset[str]) -> Shards:
    """Return shards that need not be there, as if they had been counted."""
    paths = find_shards(names)
    return Shards.of(paths, [Count(2000, {}) for _ in paths], suffixes)


RUN = range(5)  # steps


# The recipe of the world model


def recipe(folder: Path, rounds: int) -> None:
    """Print what training with configs/world_reach.yaml spends on what, in 500 steps."""
    data = collect(Collect(episodes=200, data=folder / "reach"))
    config = ["--config", str(ROOT / "configs" / "world_reach.yaml"), "--data", str(data)]
    words = [*config, "--steps", "500", "--precision", "no", "--run-dir", str(folder / "run")]
    with timed_parts() as spent:
        began = time.process_time()
        train_world_model.run(
            parse(train_world_model.TrainWorldModel, words, program="train_world_model")
        )
        total = time.process_time() - began
    inside = spent.pop("train")
    print(f"\n500 steps of world_reach: {total:.1f} CPU-s, {inside:.1f} in the loop; of the loop:")
    print("\n| part | CPU-s | share |\n|---|---|---|")
    for name, seconds in (*spent.items(), ("the rest", inside - sum(spent.values()))):
        print(f"| {name} | {seconds:.2f} | {seconds / inside:.1%} |")


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Add up the CPU time of the parts of the training loop."""
    places: dict[str, tuple[Any, str]] = {
        "train": (train_world_model, "train"),
        "the model: forward, backward, optimiser": (training, "_step"),
        "reading batches": (training._Batches, "__getitem__"),
        "health of the latents, losses of processes": (training._Log, "add"),
        "metrics.jsonl": (training._Log, "write"),
        "measuring on held-out data": (training, "_in_evaluation_mode"),
        "checkpoints": (training._Checkpoints, "save"),
        "seeds": (training, "set_seed"),
    }
    before = {name: getattr(owner, known) for name, (owner, known) in places.items()}
    spent = dict.fromkeys(places, 0.0)

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            began = time.process_time()
            try:
                return work(*given, **named)
            finally:
                spent[name] += time.process_time() - began

        return call

    for name, (owner, known) in places.items():
        setattr(owner, known, timed(name, before[name]))
    try:
        yield spent
    finally:
        for name, (owner, known) in places.items():
            setattr(owner, known, before[name])


# Checkpoints


def checkpoint(folder: Path, rounds: int) -> None:
    """Print what a checkpoint of ViT-g holds, what one costs, and how often to write it."""
    with torch.device("meta"):
        encoder = ViTEncoder((16, 3, 256, 256), size="giant", patch=16, tubelet=2)
        sizes: dict[str, Any] = {"width": 384, "depth": 12, "heads": 12}
        predictor = CrossMaskedTransformer(encoder.dim, encoder.grid, **sizes)
    numbers = sum(p.numel() for part in (encoder, predictor) for p in part.parameters())
    gigabytes = numbers * (4 + 12) / 1e9  # model.safetensors; weights and two moments
    print(f"\nViT-g/16 and a predictor of 12 x 384: {numbers:,} parameters; a checkpoint has")
    print(f"{gigabytes:.1f} GB: {numbers * 4e-9:.2f} of weights, {numbers * 12e-9:.2f} to resume")
    write, read = seconds_a_gigabyte(folder, rounds)
    print(f"here a GB takes {write:.2f} s to write and to flush, {read:.2f} s to read (wall)")
    flops = step_of_giant(encoder, predictor)
    each = H100 * 0.4 / flops
    print(f"a clip of 16 frames of 256 px takes {flops / 1e12:.1f} TFLOP; at 40 % of an H100's")
    print(f"{H100 / 1e12:.0f} TFLOP/s a GPU takes {each:.1f} clips a second")
    print("\n| GPUs | a failure every | write every | lost | clips/s | GB/s | cores | 10^9 clips |")
    print("|---|---|---|---|---|---|---|---|")
    for count in (8, 64, 512, 4096):
        between, pause = PER_FAILURE / count, gigabytes * write / 3600
        interval = math.sqrt(2 * pause * between)  # Young; Daly subtracts `pause`
        again = (gigabytes * read + 2e9 * MEMBER / count) / 3600 + START
        lost = pause / interval + (interval / 2 + again) / between
        clips, hours = count * each, 1e9 / (count * each) / 3600
        cells = [f"{between:,.0f} h", f"{60 * interval:.0f} min", f"{lost:.2%}", f"{clips:,.0f}"]
        cells += [f"{clips * BYTES / 1e9:.2f}", f"{clips * DECODE:,.0f}", f"{hours:,.1f} h"]
        print(f"| {count:,} | {' | '.join(cells)} |")


BYTES = 135e9 / 254_380  # of a clip of 10 s: Kinetics-400, PaddleVideo, docs/en/dataset/k400.md
DECODE = 22e-3  # CPU-seconds to read, decode and cut a clip at 224 px: `reading`
MEMBER = 24e-6  # CPU-seconds to count a member of a tar: `reading`
START = 2 / 60  # hours until processes have started, taken to be two minutes


def seconds_a_gigabyte(folder: Path, rounds: int) -> tuple[float, float]:
    """Return the wall time of writing a GB of tensors, and of reading it."""
    tensors = {f"block{n}": torch.rand(2**24) for n in range(8)}  # half a GB
    size = sum(t.nbytes for t in tensors.values()) / 1e9
    file = folder / "one.safetensors"
    write = min(cost(lambda: save_tensors(file, tensors, {}))[1] for _ in range(rounds))
    read = min(cold_read(file) for _ in range(rounds))
    return write / size, read / size


def cold_read(file: Path) -> float:
    """Return the wall time of reading a file of tensors whose pages the system has let go of."""
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cost(lambda: [float(t.sum()) for t in load_tensors(file)[0].values()])[1]


def step_of_giant(encoder: ViTEncoder, predictor: CrossMaskedTransformer) -> float:
    """Return the operations of a step on one clip, a quarter of whose tokens is seen."""
    count = math.prod(encoder.grid)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        video = torch.zeros(1, 16, 3, 256, 256)
        seen, hidden = (torch.zeros(1, n, dtype=torch.long) for n in (count // 4, count * 3 // 4))
        z, targets = encoder(video, keep=seen), encoder(video, keep=hidden)
        (predictor(z, seen, hidden) - targets).square().mean().backward()
    return float(counter.get_total_flops())


PARTS: dict[str, Callable[[Path, int], None]] = {
    "steps": steps,
    "processes": processes,
    "reading": reading,
    "recipe": recipe,
    "checkpoint": checkpoint,
}

if __name__ == "__main__":
    main()
