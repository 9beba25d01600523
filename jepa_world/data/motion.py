"""Short clips of one item on a torus, in one of ten motions: a test that needs time.

An item starts at any place, angle and size, and sizes come back round as places do, so a single
frame says nothing about the motion; the item itself is the content, which any frame shows.
"""

import csv
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from jepa_world.data.images import Images
from jepa_world.data.video import write_video

MOTIONS = (
    *("static", "left", "right", "up", "down"),
    *("clockwise", "counterclockwise", "grow", "shrink", "zigzag"),
)
SPEED = 2.0  # pixels a frame, of a canvas of 48
TURN = np.pi / 15  # radians a frame
GROWTH = 1 / 16  # of a cycle of sizes a frame
SIZES = (0.7, 1.2)  # of an item on the canvas, least and largest
LETTERS = "FGJLPQRZ47"  # no two are alike when turned, none is its own mirror image
FPS = 8.0  # of the files


def motion_clips(
    items: UInt8[np.ndarray, "n hh ww"],
    motion: Int[np.ndarray, " n"],
    *,
    seed: int,
    frames: int = 16,
    size: int = 48,
) -> UInt8[np.ndarray, "n t size size 1"]:
    """Return a clip of every item in its motion, a number of `MOTIONS`.

    Place, angle and size of the first frame are uniform, a function of the seed.

    Example:
        >>> clips = motion_clips(np.full((2, 28, 28), 255, np.uint8), np.array([0, 1]), seed=0)
        >>> clips.shape, [bool((clip == clip[:1]).all()) for clip in clips]
        ((2, 16, 48, 48, 1), [True, False])
    """
    random = np.random.default_rng(seed)
    start = random.random((4, len(items)))  # column, row, angle, size, each in [0, 1)
    steps = np.arange(frames)
    zigzag = np.where(steps % 8 < 4, steps % 8, 8 - steps % 8)  # up and down again
    paths = {
        "left": (0, -steps * SPEED / 48),
        "right": (0, steps * SPEED / 48),
        "up": (1, -steps * SPEED / 48),
        "down": (1, steps * SPEED / 48),
        "clockwise": (2, steps * TURN / (2 * np.pi)),
        "counterclockwise": (2, -steps * TURN / (2 * np.pi)),
        "grow": (3, steps * GROWTH),
        "shrink": (3, -steps * GROWTH),
        "zigzag": (0, zigzag * SPEED / 48),
    }
    moved = np.repeat(start[:, :, None], frames, 2)
    for number, name in enumerate(MOTIONS):
        if name in paths:
            axis, path = paths[name]
            moved[axis, motion == number] += path
    return _render(torch.from_numpy(items), torch.from_numpy(moved % 1.0), size)


def _render(
    items: UInt8[Tensor, "n hh ww"], moved: Float[Tensor, "four n t"], size: int
) -> UInt8[np.ndarray, "n t size size 1"]:
    """Draw items on the torus: every pixel asks where it lies in the item's own frame."""
    column, row, turn, growth = rearrange(moved.float(), "four n t -> four (n t) 1 1")
    pixel = (torch.arange(size) + 0.5) / size
    x = (pixel[None, None, :] - column + 0.5) % 1.0 - 0.5  # the nearest way round
    y = (pixel[None, :, None] - row + 0.5) % 1.0 - 0.5
    scale = SIZES[0] * (SIZES[1] / SIZES[0]) ** growth * items.shape[-1] / 48
    cos, sin = (2 * np.pi * turn).cos() * 2 / scale, (2 * np.pi * turn).sin() * 2 / scale
    grid = torch.stack([cos * x + sin * y, cos * y - sin * x], -1)
    images = items.float().unsqueeze(1).repeat_interleave(moved.shape[2], 0)
    drawn = F.grid_sample(images, grid, align_corners=False)
    return rearrange(drawn.round().byte(), "(n t) 1 y x -> n t y x 1", n=len(items)).numpy()


def letters(count: int, *, seed: int, size: int = 28) -> Images:
    """Return drawn letters, each in a hand of its own: width, slant, stroke and brightness vary."""
    random = np.random.default_rng(seed)
    labels = random.integers(len(LETTERS), size=count)
    pixels = np.stack([_letter(LETTERS[label], random, size) for label in labels])
    return Images(pixels[..., None], {"class": labels})


def _letter(letter: str, random: np.random.Generator, size: int) -> UInt8[np.ndarray, "hh ww"]:
    canvas = Image.new("L", (size, size))
    font = ImageFont.load_default(size * random.uniform(0.75, 0.95))
    ink, stroke = int(random.uniform(140, 256)), int(random.integers(0, 2))
    draw = ImageDraw.Draw(canvas)
    place = (size / 2, size / 2)
    draw.text(place, letter, ink, font, anchor="mm", stroke_width=stroke)
    slant, width = random.uniform(-0.25, 0.25), random.uniform(0.9, 1.25)
    middle = size / 2
    shear = (width, slant, middle * (1 - width - slant), 0.0, 1.0, 0.0)
    return np.asarray(canvas.transform(canvas.size, Image.Transform.AFFINE, shear, resample=2))


def write_motion_clips(folder: Path, items: Images, *, seed: int, per_item: int = 1) -> Path:
    """Write clips of items as mp4 files and a list `clips.csv` of paths, motions and contents.

    Returns:
        The list, which `load_clips` reads. It is written last: a folder that has it is whole.
    """
    rows: list[tuple[str, str, str]] = []
    total = len(items) * per_item
    motion = np.random.default_rng(seed).permutation(np.arange(total) % len(MOTIONS))
    for first in tqdm(range(0, total, 200), f"writing {folder.name}"):
        chosen = np.arange(first, min(first + 200, total))
        which = chosen % len(items)
        clips = motion_clips(items.pixels[which, ..., 0], motion[chosen], seed=seed + first)
        for number, item, clip in zip(chosen, which, clips, strict=True):
            name = f"{number:06d}.mp4"
            write_video(folder / name, np.repeat(clip, 3, -1), FPS)
            content = f"item {items.classes['class'][item]}"
            rows.append((name, MOTIONS[motion[number]], content))
    listed = folder / "clips.csv"
    partial = folder / "clips.csv.partial"
    with partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "motion", "content"))
        writer.writerows(rows)
    return partial.replace(listed)
