"""CPU time of reading: of training batches against the step they feed, of windows by layout.

    python benchmarks/data_loading.py [--data data/reach] [--size 64]

Without --data, 60 episodes of `reach` are collected at --size. First, a batch of 64 random windows
of 4 frames, against forward and backward of the default encoder alone, on one thread in bfloat16
as `train_world_model.py` runs it: predictor, SIGReg and optimiser come on top, so the true share is
smaller. The goal: reading costs under 5 % of a step, from memory and from files.

Then the same episodes in every layout that is read, from files (`cache_bytes=0`): CPU time of a
random window of 16 frames in batches of 8, actions and states included, beside a loop written
against the library alone (h5py, numpy, pyarrow, PyAV, Pillow) that has its file open and stacks the
same frames, without actions. Both read the same windows, in turns; medians. Layouts in Parquet or
Arrow need pyarrow.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import av
import foreign_layouts as layouts
import h5py
import numpy as np
import torch
from PIL import Image

from jepa_world.commands.collect import Collect, collect
from jepa_world.data.trajectories import Trajectories
from jepa_world.encoders.conv import ConvEncoder
from jepa_world.training import native_precision

WINDOWS, FRAMES = 64, 4  # of a training batch
BATCH, LONG = 8, 16  # of the comparison of layouts
Bare = Callable[[int, int], np.ndarray]
"""Episode, its first frame in the window -> frames of the window."""


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of reading")
    parser.add_argument("--data", type=Path, help="a dataset of reach; collected if left out")
    parser.add_argument("--size", type=int, default=64, help="pixels of frames to collect")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = given.data or collect(
            Collect(episodes=60, image_size=given.size, data=folder / "reach")
        )
        report_batches(path)
        report_layouts(folder, Trajectories(path))


def report_batches(folder: Path) -> None:
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
        with torch.autocast("cpu", torch.bfloat16, enabled=native_precision() == "bf16"):
            z = encoder(pixels.permute(0, 1, 4, 2, 3) / 255)
        z.float().square().mean().backward()

    return step


def random_batch(data: Trajectories) -> Callable[[], None]:
    windows, generator = data.windows(FRAMES), np.random.default_rng(0)

    def read() -> None:
        data.read(generator.choice(windows, WINDOWS), FRAMES)

    return read


def cpu_time(work: Callable[[], object], repeats: int) -> float:
    """Return the median CPU time of a call in seconds, after three calls to warm up."""
    return statistics.median([timed(work)[0] for _ in range(repeats + 3)][3:])


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def report_layouts(folder: Path, data: Trajectories) -> None:
    episodes = list(all_episodes(data))
    print("\nCPU-ms of a window of 16 frames    MB on disk      here     bare    ratio")
    for name, (file, write, bare) in LAYOUTS.items():
        if name.startswith(NEED_ARROW) and not find_spec("pyarrow"):
            print(f"{name:34s} needs pyarrow")
            continue
        path = write(folder / file, episodes)
        ours, theirs = compare(Trajectories(path, cache_bytes=0), bare(path))
        size = sum(f.stat().st_size for f in [path, *path.rglob("*")] if f.is_file()) / 1e6
        row = f"{size:10.1f} {1e3 * ours:9.3f} {1e3 * theirs:8.3f} {ours / theirs:8.2f}"
        print(f"{name:34s} {row}", flush=True)


def all_episodes(data: Trajectories) -> Iterator[dict[str, np.ndarray]]:
    first = 0
    for length in data.lengths.tolist():
        rows = data.read(np.array([first]), length)
        yield {name: rows[name][0] for name in ("pixels", "action", "state")}
        first += length


def compare(data: Trajectories, bare: Bare, *, rounds: int = 14) -> tuple[float, float]:
    """Return the median CPU time of a window for both, on the same random ones, after two rounds.

    They take turns, half the rounds apart: HDF5 would give one what the other has just read.
    """
    chosen = np.random.default_rng(0).choice(data.windows(LONG), (rounds, BATCH))
    times: list[tuple[float, float]] = []
    for starts, others in zip(chosen, np.roll(chosen, rounds // 2, 0), strict=True):
        ours, _ = timed(partial(data.read, starts, LONG))
        theirs, frames = timed(partial(bare_batch, bare, places(data, others)))
        np.testing.assert_array_equal(data.read(others, LONG)["pixels"], frames)
        times.append((ours / BATCH, theirs / BATCH))
    ours, theirs = (statistics.median(column) for column in zip(*times[2:], strict=True))
    return ours, theirs


def places(data: Trajectories, starts: np.ndarray) -> list[tuple[int, int]]:
    """Return the episode of every window, and its first frame in it."""
    begins = np.cumsum(data.lengths) - data.lengths
    episodes = np.searchsorted(begins, starts, side="right") - 1
    return list(zip(episodes.tolist(), (starts - begins[episodes]).tolist(), strict=True))


def bare_batch(bare: Bare, windows: list[tuple[int, int]]) -> np.ndarray:
    return np.stack([bare(episode, first) for episode, first in windows])


# Reading as one would write it against each library alone


def bare_columns(path: Path, key: str, lengths: str = "") -> Bare:
    """Read HDF5 whose episodes lie one after another."""
    file: Any = h5py.File(path, "r")
    ends = np.flatnonzero(file["terminals"][:] | file["timeouts"][:]) + 1 if not lengths else []
    counts = file[lengths][:] if lengths else np.diff(ends, prepend=0)
    begins, pixels = np.cumsum(counts) - counts, file[key]

    def read(episode: int, first: int) -> np.ndarray:
        return pixels[begins[episode] + first : begins[episode] + first + LONG]

    return read


def bare_groups(path: Path, name: str) -> Bare:
    """Read HDF5 of a group an episode, whose frames may be JPEG."""
    file: Any = h5py.File(path, "r")

    def read(episode: int, first: int) -> np.ndarray:
        stored = file[name.format(episode)][first : first + LONG]
        return stored if stored.dtype == np.uint8 else np.stack([picture(x) for x in stored])

    return read


def bare_npz(path: Path) -> Bare:
    """Read arrays that are in memory, where the library has them."""
    with np.load(path) as file:
        pixels, ends = file["observations"], np.flatnonzero(file["terminals"]) + 1
    begins = np.concatenate([[0], ends])

    def read(episode: int, first: int) -> np.ndarray:
        return pixels[begins[episode] + first : begins[episode] + first + LONG]

    return read


def bare_videos(path: Path, name: str) -> Bare:
    """Decode videos of an episode each."""
    return lambda episode, first: decode(path / name.format(episode), first / layouts.FPS)


def bare_lerobot_v3(path: Path) -> Bare:
    """Decode videos of two episodes each, which begin where meta/ says."""
    parquet: Any = import_module("pyarrow.parquet")
    meta = parquet.read_table(path / "meta/episodes/chunk-000/file-000.parquet").to_pylist()

    def read(episode: int, first: int) -> np.ndarray:
        row = {key.removeprefix(f"videos/{layouts.CAMERA}/"): v for key, v in meta[episode].items()}
        file = path / f"videos/{layouts.CAMERA}/chunk-000/file-{row['file_index']:03d}.mp4"
        return decode(file, row["from_timestamp"] + first / layouts.FPS)

    return read


def bare_parquet_pictures(path: Path) -> Bare:
    """Decode PNG in the parquet of an episode each."""
    parquet: Any = import_module("pyarrow.parquet")

    def read(episode: int, first: int) -> np.ndarray:
        file = parquet.ParquetFile(path / f"data/chunk-000/episode_{episode:06d}.parquet")
        table = file.read_row_group(0, columns=[layouts.CAMERA], use_threads=False)
        rows = table[layouts.CAMERA].slice(first, LONG).to_pylist()
        return np.stack([picture(row["bytes"]) for row in rows])

    return read


def bare_arrow(path: Path) -> Bare:
    """Decode JPEG in the Arrow file of an episode each."""
    pyarrow: Any = import_module("pyarrow")

    def read(episode: int, first: int) -> np.ndarray:
        with pyarrow.memory_map(str(path / f"data/{episode}/part-0.arrow")) as source:
            table = pyarrow.ipc.open_file(source).read_all()
            rows = table["observations"].slice(first, LONG).to_pylist()
        return np.stack([picture(row["pixels"]) for row in rows])

    return read


def decode(path: Path, begin: float) -> np.ndarray:
    """Return the frames of a window that begins at this second of a video."""
    frames: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        container.seek(int((begin + 1e-3) / float(stream.time_base or 1)), stream=stream)
        for frame in container.decode(stream):
            if frame.time is not None and frame.time > begin - 0.5 / layouts.FPS:
                frames.append(frame.to_ndarray(format="rgb24", threads=1))
            if len(frames) == LONG:
                break
    return np.stack(frames)


def picture(data: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


NEED_ARROW = ("LeRobot", "Minari, Arrow")
AV1 = "libsvtav1"
LAYOUTS: dict[str, tuple[str, layouts.Write, Callable[[Path], Bare]]] = {
    "LeWorldModel, ours": (
        "lewm.h5",
        layouts.write_leworldmodel,
        partial(bare_columns, key="pixels", lengths="ep_len"),
    ),
    "robomimic": (
        "demo.hdf5",
        layouts.write_robomimic,
        partial(bare_groups, name="data/demo_{}/obs/agentview_image"),
    ),
    "D4RL": ("d4rl.hdf5", layouts.write_d4rl, partial(bare_columns, key="observations")),
    "Minari": (
        "minari",
        layouts.write_minari,
        lambda path: bare_groups(path / MINARI, "episode_{}/observations/pixels"),
    ),
    "Minari, JPEG": (
        "minari_jpeg",
        partial(layouts.write_minari, jpeg=True),
        lambda path: bare_groups(path / MINARI, "episode_{}/observations/pixels"),
    ),
    "Minari, Arrow of JPEG": ("arrow", layouts.write_minari_arrow, bare_arrow),
    "OGBench (bare: in memory)": ("visual.npz", layouts.write_ogbench, bare_npz),
    "mp4 and npz, H.264": (
        "videos",
        layouts.write_videos,
        partial(bare_videos, name="{:06d}.mp4"),
    ),
    "LeRobot v2.1, AV1": (
        "lerobot2",
        partial(layouts.write_lerobot_v2, codec=AV1),
        partial(bare_videos, name=f"videos/chunk-000/{layouts.CAMERA}/episode_{{:06d}}.mp4"),
    ),
    "LeRobot v2.1, PNG": (
        "lerobot2_png",
        partial(layouts.write_lerobot_v2, embedded=True),
        bare_parquet_pictures,
    ),
    "LeRobot v3.0, AV1": (
        "lerobot3",
        partial(layouts.write_lerobot_v3, codec=AV1),
        bare_lerobot_v3,
    ),
    "LeRobot v3.0, H.264": ("lerobot3_h264", layouts.write_lerobot_v3, bare_lerobot_v3),
}
MINARI = "data/main_data.hdf5"


if __name__ == "__main__":
    main()
