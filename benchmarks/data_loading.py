"""CPU time of reading training batches, as a ratio of the training step they feed.

    python benchmarks/data_loading.py [--data data/reach]

A batch is 64 random windows of 4 frames. The step is forward and backward of the default encoder
alone, on one thread in bfloat16 as `train_world_model.py` runs it: predictor, SIGReg and optimiser
come on top, so the true ratio is smaller. Without --data, 100 episodes of `reach` are collected.
The goal: reading costs under 5 % of a step, from memory and from files.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from jepa_world.commands.collect import Collect, collect
from jepa_world.data.trajectories import Trajectories
from jepa_world.encoders.conv import ConvEncoder

WINDOWS, FRAMES = 64, 4


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of reading batches")
    parser.add_argument("--data", type=Path, help="a dataset of reach; collected if left out")
    folder = parser.parse_args().data
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            folder = collect(Collect(episodes=100, data=Path(temporary) / "reach"))
        report(folder)


def report(folder: Path) -> None:
    cached, from_files = Trajectories(folder), Trajectories(folder, cache_bytes=0)
    began = time.process_time()
    cached.read(np.array([0]), 1)
    load = time.process_time() - began
    step = cpu_time(training_step(cached), repeats=10)
    print(f"{cached.lengths.sum()} frames of {cached.frame_shape}: loaded in {load:.2f} CPU-s")
    print(f"training step (encoder only)   {1e3 * step:8.2f} CPU-ms   baseline")
    for name, data in (("memory", cached), ("HDF5 files", from_files)):
        seconds = cpu_time(random_batch(data), repeats=50)
        ratio = seconds / step
        verdict = f"{ratio:6.2%}, {'under' if ratio < 0.05 else 'NOT under'} 5 %"
        print(f"batch from {name:12s}        {1e3 * seconds:8.2f} CPU-ms   {verdict}")


def training_step(data: Trajectories) -> Callable[[], None]:
    rows, columns, channels = data.frame_shape
    encoder = ConvEncoder((1, channels, rows, columns))
    pixels = torch.from_numpy(data.read(data.windows(FRAMES)[:WINDOWS], FRAMES)["pixels"])

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            z = encoder(pixels.permute(0, 1, 4, 2, 3) / 255)
        z.float().square().mean().backward()

    return step


def random_batch(data: Trajectories) -> Callable[[], None]:
    windows, generator = data.windows(FRAMES), np.random.default_rng(0)

    def read() -> None:
        data.read(generator.choice(windows, WINDOWS), FRAMES)

    return read


def cpu_time(work: Callable[[], None], repeats: int) -> float:
    """Return the median CPU time of a call in seconds, after three calls to warm up."""
    seconds = []
    for _ in range(repeats + 3):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds[3:])


if __name__ == "__main__":
    main()
