"""Pictures of features: what patch tokens tell apart, which images are near; of episodes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from jepa_world.masking import Masks


def token_picture(
    pixels: UInt8[np.ndarray, "n hh ww c"], tokens: Float[Tensor, "n rows columns d"]
) -> Figure:
    """Draw images above their patch tokens: three principal components as red, green and blue.

    The components are those of all tokens of all images together.
    """
    maps = component_colours(tokens)
    figure = Figure(figsize=(1.2 * len(pixels), 2.5), layout="constrained")
    axes = figure.subplots(2, len(pixels), squeeze=False)
    for column, (picture, colour) in enumerate(zip(pixels, maps, strict=True)):
        _show(axes[0, column], picture)
        axes[1, column].imshow(colour)
        axes[1, column].axis("off")
    return figure


def mask_picture(
    pixels: UInt8[np.ndarray, "n hh ww c"], masks: Masks, grid: tuple[int, int]
) -> Figure:
    """Draw images above what an encoder sees of them and what is to be predicted, the rest grey."""
    figure = Figure(figsize=(1.2 * len(pixels), 3.9), layout="constrained")
    axes = figure.subplots(3, len(pixels), squeeze=False)
    for column, (picture, *sets) in enumerate(zip(pixels, *masks, strict=True)):
        _show(axes[0, column], picture)
        for row, index in enumerate(sets, 1):
            chosen = np.zeros(grid[0] * grid[1], bool)
            chosen[index.numpy()] = True
            rows, columns = (
                side // cells for side, cells in zip(picture.shape, grid, strict=False)
            )
            shown = chosen.reshape(grid).repeat(rows, 0).repeat(columns, 1)
            _show(axes[row, column], np.where(shown[..., None], picture, np.uint8(128)))
    for row, words in enumerate(("image", "context", "targets")):
        axes[row, 0].set_title(words, fontsize=9, loc="left")
    return figure


def tube_picture(
    pixels: UInt8[np.ndarray, "n t hh ww c"], masks: Masks, grid: tuple[int, int, int]
) -> Figure:
    """Draw clips over time as an encoder sees them, what it does not see grey, a row each."""
    n, _, height, width, _ = pixels.shape
    frames = pixels[:, _shown(pixels.shape[1], grid[0])]
    figure = Figure(figsize=(1.1 * grid[0], 1.15 * n), layout="constrained")
    axes = figure.subplots(n, grid[0], squeeze=False)
    for row, (clip, context) in enumerate(zip(frames, masks.context, strict=True)):
        chosen = np.zeros(np.prod(grid), bool)
        chosen[context.numpy()] = True
        for column, (frame, seen) in enumerate(zip(clip, chosen.reshape(grid), strict=True)):
            shown = seen.repeat(height // grid[1], 0).repeat(width // grid[2], 1)
            _show(axes[row, column], np.where(shown[..., None], frame, np.uint8(128)))
    return figure


def clip_picture(
    pixels: UInt8[np.ndarray, "n t hh ww c"], tokens: Float[Tensor, "n t rows columns d"]
) -> Figure:
    """Draw clips over time above their tokens, as `token_picture` has it."""
    n, steps = tokens.shape[:2]
    frames = pixels[:, _shown(pixels.shape[1], steps)]
    maps = component_colours(rearrange(tokens, "n t y x d -> (n t) y x d"))
    maps = rearrange(maps, "(n t) y x c -> n t y x c", n=n)
    figure = Figure(figsize=(1.1 * steps, 2.3 * n), layout="constrained")
    axes = figure.subplots(2 * n, steps, squeeze=False)
    for row in range(n):
        for column in range(steps):
            _show(axes[2 * row, column], frames[row, column])
            axes[2 * row + 1, column].imshow(maps[row, column])
            axes[2 * row + 1, column].axis("off")
    return figure


def component_colours(
    tokens: Float[Tensor, "n rows columns d"],
) -> Float[np.ndarray, "n rows columns three"]:
    """Return three principal components of all tokens together as red, green and blue."""
    flat = rearrange(tokens, "n y x d -> (n y x) d").float()
    flat = flat - flat.mean(0)
    *_, directions = torch.linalg.svd(flat, full_matrices=False)
    colours = flat @ directions[:3].T
    low, high = colours.quantile(0.02, 0), colours.quantile(0.98, 0)
    shown = ((colours - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return shown.view(*tokens.shape[:3], -1).cpu().numpy()


def _shown(frames: int, steps: int) -> range:
    """Return the first frame of every time step of tokens."""
    return range(0, frames, frames // steps)


def neighbour_picture(
    queries: UInt8[np.ndarray, "q hh ww c"],
    query_z: Float[Tensor, "q d"],
    pixels: UInt8[np.ndarray, "n hh ww c"],
    z: Float[Tensor, "n d"],
    *,
    neighbours: int = 8,
) -> Figure:
    """Draw every query and the images with the most similar features, by cosine, in a row."""
    centre = z.mean(0)
    unit, query = (
        torch.nn.functional.normalize(features - centre, dim=1) for features in (z, query_z)
    )
    nearest = (query @ unit.T).topk(neighbours, 1).indices.cpu().numpy()
    size = (1.0 * (neighbours + 1), 1.05 * len(queries))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(queries), neighbours + 1, squeeze=False)
    for row, picture, index in zip(axes, queries, nearest, strict=True):
        for axis, shown in zip(row, [picture, *pixels[index]], strict=True):
            _show(axis, shown)
    axes[0, 0].set_title("query", fontsize=9)
    axes[0, 1].set_title("nearest", fontsize=9)
    return figure


class Strip(NamedTuple):
    """Frames of an episode, and which ones they are."""

    title: str
    steps: list[int]
    frames: UInt8[np.ndarray, "t hh ww c"]


def contact_sheet(strips: Sequence[Strip]) -> Figure:
    """Draw episodes in rows."""
    height, width = in_colour(strips[0].frames[0]).shape[:2]
    most = max(len(strip.steps) for strip in strips)
    cell = 1.5 * height / width + 0.25
    figure = Figure(figsize=(1.5 * most + 0.9, cell * len(strips)), layout="constrained")
    axes = figure.subplots(len(strips), most, squeeze=False)
    for row, strip in zip(axes, strips, strict=True):
        for axis in row[len(strip.steps) :]:
            axis.axis("off")
        for axis, step, frame in zip(row, strip.steps, strip.frames, strict=False):
            _show(axis, in_colour(frame))
            axis.set_title(f"{step}", fontsize=7, pad=2)
        row[0].annotate(
            strip.title,
            (-0.08, 0.5),
            xycoords="axes fraction",
            ha="right",
            va="center",
            fontsize=8,
        )
    return figure


def in_colour(frame: UInt8[np.ndarray, "hh ww c"]) -> UInt8[np.ndarray, "hh wide 3"]:
    """Return a frame as one picture of red, green and blue.

    Several views, three channels each, come side by side; of other numbers of channels the first
    three, or the first one in grey.

    Example:
        >>> in_colour(np.zeros((4, 4, 6), np.uint8)).shape
        (4, 8, 3)
    """
    channels = frame.shape[-1]
    if channels < 3:
        return frame[..., :1].repeat(3, axis=-1)
    views = channels // 3 if channels % 3 == 0 else 1
    return rearrange(frame[..., : 3 * views], "hh ww (v c) -> hh (v ww) c", c=3)


def _show(axis: Axes, picture: UInt8[np.ndarray, "hh ww c"]) -> None:
    axis.imshow(in_colour(picture))
    axis.axis("off")
