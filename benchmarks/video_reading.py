"""CPU time of reading clips, as a ratio of decoding the same frames with the same library alone.

    python benchmarks/video_reading.py [--frames 16] [--fps 7.5] [--rounds 5]

Videos of 340 x 256 pixels, 10 s at 30 frames a second, textures that move and flicker, are made in
a temporary folder with a key frame at most every 250 and every 12 frames. The baselines open each
file and decode to RGB the frames at the very times of the clips, in a loop written against the
library alone: in their own size, and scaled by it to the short side asked for. `Clips.read`
also draws times, checks for damage, cuts squares and scales them. The three are measured in turns;
each number is the best of the rounds. The goal: 95 % of the clips a second of the library alone.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import decord
import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch.nn.functional import interpolate

from jepa_world.data.clips import Clips, load_clips
from jepa_world.data.reencoding import Job, shrink_video
from jepa_world.data.video import FORGIVEN, open_video, write_video

VIDEOS, SECONDS, FPS, HEIGHT, WIDTH = 8, 10, 30, 256, 340
Decode = Callable[[Path, Float[np.ndarray, " t"], int | None], object]


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time of reading clips")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--fps", type=float, default=7.5, help="frames a second of a clip")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("clips a second of one core's CPU time (of wall time), and ratios of CPU times")
    print("GOP backend side     Clips.read    decoding alone           and scaling")
    with tempfile.TemporaryDirectory() as temporary:
        for gop, folder in make_videos(Path(temporary)).items():
            for backend, decode in (("pyav", decode_with_pyav), ("decord", decode_with_decord)):
                for size in (HEIGHT, 224, 112):
                    cut = {"frames": options.frames, "fps": options.fps, "size": size}
                    clips = load_clips(folder, backend=backend)
                    ours, wall, alone, _, scaled, _ = measure(clips, decode, cut, options.rounds)
                    print(
                        f"{gop:>3} {backend:<7} {size:>4}   {ours:>5.1f} ({wall:>4.1f})"
                        f"   {alone:>6.1f} {ours / alone:>7.1%}"
                        f"   {scaled:>9.1f} {ours / scaled:>7.1%}"
                    )


def make_videos(folder: Path) -> dict[int, Path]:
    """Write the same videos with few and with many key frames; return their folders by GOP."""
    for number in range(VIDEOS):
        write_video(folder / "raw" / f"{number}.mp4", moving_texture(number), FPS)
        for gop in (250, 12):
            source, target = (folder / name / f"{number}.mp4" for name in ("raw", str(gop)))
            shrink_video(Job(source, target, short_side=HEIGHT, gop=gop, crf=23))
    return {gop: folder / str(gop) for gop in (250, 12)}


def moving_texture(seed: int) -> UInt8[np.ndarray, "t h w c"]:
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.random((1, 3, 24, 32)))
    picture = interpolate(coarse, (2 * HEIGHT, 2 * WIDTH), mode="bicubic")[0]
    picture = rearrange(picture, "c h w -> h w c").numpy().clip(0, 1) * 220 + 10
    frames = np.empty((SECONDS * FPS, HEIGHT, WIDTH, 3), np.uint8)
    for t in range(len(frames)):
        y = int(HEIGHT / 2 * (1 + np.sin(t / 40 + seed)))
        x = int(WIDTH / 2 * (1 + np.sin(t / 67)))
        noise = random.integers(-6, 7, (HEIGHT, WIDTH, 1))
        frames[t] = (picture[y : y + HEIGHT, x : x + WIDTH] + noise).clip(0, 255)
    return frames


def measure(clips: Clips, decode: Decode, cut: dict[str, Any], rounds: int) -> list[float]:
    """Return clips a second of CPU and of wall time: `Clips.read`, the library, it with scaling."""
    index, files = np.arange(len(clips)), times_of(clips, cut["frames"], cut["fps"])
    side = cut["size"] if cut["size"] < HEIGHT else None
    works = (
        lambda: clips.read(index, **cut, seed=0, step=0),
        lambda: [decode(path, times, None) for path, times in files],
        lambda: [decode(path, times, side) for path, times in files],
    )
    costs = np.array([[cost(work) for work in works] for _ in range(rounds + 1)])[1:]
    return (len(clips) / costs.min(0)).flatten().tolist()


def times_of(clips: Clips, frames: int, fps: float) -> list[tuple[Path, Float[np.ndarray, " t"]]]:
    """Return the files and the times of their clips, as `Clips.read` draws them."""
    times = []
    for sample, path in enumerate(clips.files):
        assert isinstance(path, Path)
        with open_video(path) as video:
            room = max(0.0, video.duration - frames / fps)
        begin = np.random.default_rng((0, 0, sample)).random() * room
        times.append((path, begin + np.arange(frames) / fps))
    return times


def cost(work: Callable[[], object]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def decode_with_pyav(path: Path, times: Float[np.ndarray, " t"], side: int | None) -> object:
    with av.open(str(path), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        tick = float(stream.time_base or 1)
        container.seek(int(times[0] / tick), stream=stream)
        kept: list[np.ndarray] = []
        last: Any = None
        for frame in container.decode(stream):
            while len(kept) < len(times) and (frame.pts or 0) * tick > times[len(kept)] + FORGIVEN:
                kept.append(rgb(last, side))
            if len(kept) == len(times):
                break
            last = frame
        kept.extend(rgb(last, side) for _ in range(len(times) - len(kept)))
        return np.stack(kept)


def rgb(frame: av.VideoFrame, side: int | None) -> UInt8[np.ndarray, "h w c"]:
    if side is not None:
        frame = frame.reformat(width_of(side), side, "rgb24", interpolation="BILINEAR")
    return frame.to_ndarray(format="rgb24")


def decode_with_decord(path: Path, times: Float[np.ndarray, " t"], side: int | None) -> object:
    scaled = {} if side is None else {"width": width_of(side), "height": side}
    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1, **scaled)
    starts = np.asarray(reader.get_frame_timestamp(range(len(reader))))[:, 0]
    shown = np.searchsorted(starts - starts[0], times + FORGIVEN, side="right") - 1
    return reader.get_batch(shown.clip(0).tolist()).asnumpy()


def width_of(side: int) -> int:
    return round(WIDTH * side / HEIGHT / 2) * 2


if __name__ == "__main__":
    main()
