"""Lay out videos with known motion: moving items, or windows of a dataset of trajectories.

    python benchmarks/motion.py items /usr/share/datasets/fashion-mnist data/fashion_motion
    python benchmarks/motion.py frames data/fashion_motion data/fashion_frames
    python benchmarks/motion.py windows data/reach data/reach_windows

`items`: every image of the training part in one motion, and half of the test part: OUT/train and
OUT/test, mp4 files and `clips.csv` with `motion` and `content`. `frames`: a frame of every video
of the training part as a picture, for `train_vjepa.py --clips.images OUT`. `windows`: a window at
every fifth frame (`--every`), test episodes apart, with `info["proprio"]` and the joints' rates
(rad/s, m/s) at the last frame as numbers. `train_vjepa.py --data OUT` and `probe_video.py --data
OUT` take items and windows.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from jepa_world.commands.train_vjepa import load_parts
from jepa_world.data.images import load_images
from jepa_world.data.motion import write_motion_clips
from jepa_world.data.trajectories import Trajectories
from jepa_world.data.video import write_video

FRAMES, FPS = 8, 8.0


def lay_out_items(source: Path, folder: Path, count: int) -> None:
    """Write a clip of every item: `count` for training, a quarter as many for the test."""
    training, test = load_images(source)
    for name, images, at_most, seed in (
        ("train", training, count, 0),
        ("test", test, count // 4, 1),
    ):
        chosen = np.arange(min(at_most, len(images)))
        write_motion_clips(folder / name, images.take(chosen), seed=seed)


def lay_out_frames(source: Path, folder: Path) -> None:
    """Write one frame of every video of the training part, at a time by chance."""
    clips, _ = load_parts(source)
    folder.mkdir(parents=True)
    pixels, _ = clips.draw(np.arange(len(clips)), frames=1, fps=FPS, size=48, seed=0, step=0)
    for number, (frame,) in enumerate(pixels):
        Image.fromarray(frame).save(folder / f"{number:05d}.png")


def lay_out_windows(source: Path, folder: Path, every: int) -> None:
    """Write windows of episodes, and what the simulator knows of the last frame of each."""
    columns = ("pixels", "state", "proprio")
    for name, part in zip(
        ("train", "test"), Trajectories(source, columns=columns).split(0.2), strict=True
    ):
        first = part.windows(FRAMES)[::every]
        shown = part.read(first[:1], FRAMES)
        joints = shown["state"].shape[-1] // 2
        heads = [f"rate{i}" for i in range(joints)]
        heads += [f"proprio{i}" for i in range(shown["proprio"].shape[-1])]
        rows: list[list[object]] = [["path", *heads]]
        for number, window in enumerate(tqdm(first, f"writing {name}")):
            batch = part.read(np.array([window]), FRAMES)
            write_video(folder / name / f"{number:05d}.mp4", batch["pixels"][0], FPS)
            state, proprio = batch["state"][0, -1], batch["proprio"][0, -1]
            rows.append([f"{number:05d}.mp4", *state[joints:], *proprio])
        with (folder / name / "clips.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Lay out videos with known motion")
    parser.add_argument("what", choices=("items", "frames", "windows"))
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=16_000, help="items for training")
    parser.add_argument("--every", type=int, default=5, help="frames between windows")
    given = parser.parse_args()
    if given.what == "frames" and given.folder.exists():
        parser.error(f"{given.folder} is there already: nothing is overwritten")
    if given.what == "items":
        lay_out_items(given.source, given.folder, given.count)
    elif given.what == "frames":
        lay_out_frames(given.source, given.folder)
    else:
        lay_out_windows(given.source, given.folder, given.every)


if __name__ == "__main__":
    main()
