"""Masks as index tensors: which tokens an encoder sees and which a predictor must tell.

A mask is a function of (seed, step, index of the sample in the data) alone: N processes draw what
one would, and nothing is saved for a resumed run. All masks have the same number of tokens,
whatever the shape of their blocks, and no position is favoured: see `MultiBlockMasks`.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

Grid = tuple[int, int, int]
"""Time steps, rows and columns; the number of a token is (t * rows + row) * columns + column."""


class Masks(NamedTuple):
    """Token numbers in rising order; the two share none."""

    context: Int[Tensor, "b k"]
    target: Int[Tensor, "b m"]


@dataclass(frozen=True)
class MultiBlockMasks:
    """Targets are blocks of the grid, through all time steps; the context is drawn from the rest.

    I-JEPA (arXiv 2301.08243, section 3) and V-JEPA (2404.08471, section 3.2), with these faults of
    their published samplers mended. A block may hang over the border, so that each covers every
    position with the same probability (blocks inside the border rarely reach a corner). Blocks are
    laid until they hold enough tokens; of the last one, and of the context, a uniform draw is kept
    (not the first in raster order), so all masks of all samples have the same length.

    Args:
        grid: Of the tokens.
        context: Share of all tokens that is seen.
        target: Share of all tokens that is predicted.
        scale: Least and largest area of a block, as a share of rows x columns.
        aspect: Least and largest height / width of a block.
        seed: Of the masks.

    Raises:
        ValueError: a share leaves no token, or the two shares together exceed one.

    Example:
        >>> import torch
        >>> masks = MultiBlockMasks((1, 14, 14), context=0.3, target=0.5)(torch.arange(8), 0)
        >>> masks.context.shape, masks.target.shape
        (torch.Size([8, 59]), torch.Size([8, 98]))
    """

    grid: Grid
    context: float = 0.3
    target: float = 0.5
    scale: tuple[float, float] = (0.15, 0.2)
    aspect: tuple[float, float] = (0.75, 1.5)
    seed: int = 0

    def __post_init__(self) -> None:
        _lengths(self.grid, self.context, self.target)

    def for_grid(self, grid: Grid) -> "MultiBlockMasks":
        """Return the same kind of masks on another grid.

        Raises:
            ValueError: a share leaves no token there.
        """
        return replace(self, grid=grid)

    def __call__(self, index: Int[Tensor, " b"], step: int) -> Masks:
        """Draw the masks of the samples `index` of the data."""
        blocks = math.ceil(4 * self.target / self.scale[0])  # rarely are more needed
        length = math.prod(self.grid)
        numbers = uniform_numbers(index, self.seed, step, 4 * blocks + 2 * length)
        geometry = rearrange(numbers[:, : 4 * blocks], "b (four blocks) -> four b blocks", four=4)
        covered = self._blocks(*geometry)  # (b, blocks, rows, columns)
        none = torch.ones_like(covered[:, :1])
        arrival = torch.cat([covered, none], 1).to(torch.uint8).argmax(1)
        place = rearrange(arrival, "b y x -> b (y x)")
        return _masks(self.grid, self.context, self.target, place, numbers[:, 4 * blocks :])

    def _blocks(
        self, scale: Tensor, aspect: Tensor, top: Tensor, left: Tensor
    ) -> Bool[Tensor, "b blocks rows columns"]:
        """Return what blocks cover, from uniform numbers for size, shape and place."""
        _, rows, columns = self.grid
        area = rows * columns * (self.scale[0] + scale * (self.scale[1] - self.scale[0]))
        low, high = math.log(self.aspect[0]), math.log(self.aspect[1])
        ratio = torch.exp(low + aspect * (high - low))
        covered = []
        for length, side, place in (
            (rows, (area * ratio).sqrt(), top),
            (columns, (area / ratio).sqrt(), left),
        ):
            size = side.round().clamp(1, length)
            start = (place * (length + size - 1)).floor() - (size - 1)
            line = torch.arange(length)
            covered.append((line >= start[..., None]) & (line < (start + size)[..., None]))
        return rearrange(covered[0], "b n y -> b n y 1") & rearrange(covered[1], "b n x -> b n 1 x")


@dataclass(frozen=True)
class RandomMasks:
    """Targets are places of the grid drawn one by one, each through all time steps (random tubes).

    (V-JEPA, arXiv 2404.08471, table 5: "random-tube"; with one time step, MAE's random masking.)

    Args:
        grid: Of the tokens.
        context: Share of all tokens that is seen.
        target: Share of all tokens that is predicted.
        seed: Of the masks.

    Raises:
        ValueError: a share leaves no token, or the two shares together exceed one.

    Example:
        >>> import torch
        >>> masks = RandomMasks((8, 14, 14), context=0.1, target=0.9)(torch.arange(2), 0)
        >>> masks.context.shape, masks.target.shape
        (torch.Size([2, 157]), torch.Size([2, 1411]))
    """

    grid: Grid
    context: float = 0.3
    target: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        _lengths(self.grid, self.context, self.target)

    def for_grid(self, grid: Grid) -> "RandomMasks":
        """Return the same kind of masks on another grid.

        Raises:
            ValueError: a share leaves no token there.
        """
        return replace(self, grid=grid)

    def __call__(self, index: Int[Tensor, " b"], step: int) -> Masks:
        """Draw the masks of the samples `index` of the data."""
        places = self.grid[1] * self.grid[2]
        numbers = uniform_numbers(index, self.seed, step, places + 2 * math.prod(self.grid))
        place = numbers[:, :places].argsort(1).argsort(1)
        return _masks(self.grid, self.context, self.target, place, numbers[:, places:])


@dataclass(frozen=True)
class TurnsOfMasks:
    """Masks of several kinds, one kind a step, in turn.

    V-JEPA has short-range and long-range blocks (2404.08471, section 3.2), both for every clip.

    Args:
        kinds: What takes turns; all have one grid and seed.

    Example:
        >>> import torch
        >>> short, long = (MultiBlockMasks((8, 6, 6), context=c, target=1 - c) for c in (0.25, 0.1))
        >>> masks = TurnsOfMasks((short, long))
        >>> [masks(torch.arange(4), step).context.shape[1] for step in range(3)]
        [72, 29, 72]
    """

    kinds: "tuple[MultiBlockMasks | RandomMasks, ...]"

    @property
    def seed(self) -> int:
        """Return the seed of all kinds."""
        return self.kinds[0].seed

    def __call__(self, index: Int[Tensor, " b"], step: int) -> Masks:
        """Draw the masks of the samples `index` of the data."""
        return self.kinds[step % len(self.kinds)](index, step)

    def for_grid(self, grid: Grid) -> "TurnsOfMasks":
        """Return the same kinds of masks on another grid.

        Raises:
            ValueError: a share leaves no token there.
        """
        return TurnsOfMasks(tuple(kind.for_grid(grid) for kind in self.kinds))


def _lengths(grid: Grid, context: float, target: float) -> tuple[int, int]:
    """Return the number of context and of target tokens."""
    length = math.prod(grid)
    k, m = round(context * length), round(target * length)
    if context + target <= 1 + 1e-9:
        m = min(m, length - k)  # both were rounded up
    if k < 1 or m < 1 or k + m > length:
        raise ValueError(
            f"masks of {k} context and {m} target tokens on a grid of {length}: each needs one, "
            f"and together at most {length} (shares {context} and {target})"
        )
    return k, m


def _masks(
    grid: Grid, context: float, target: float, place: Int[Tensor, "b yx"], ties: Tensor
) -> Masks:
    """Take targets in the order of `place`, equal places by chance, and context from the rest.

    A place is taken with all its time steps; of the last one, steps are taken by chance.
    """
    k, m = _lengths(grid, context, target)
    among_targets, among_context = ties.chunk(2, 1)
    among_steps = rearrange(among_targets, "b (t yx) -> b t yx", t=grid[0])
    order = place.unsqueeze(1) + among_steps[:, :1] + (1e-9 * among_steps if grid[0] > 1 else 0)
    target_index = rearrange(order, "b t yx -> b (t yx)").argsort(1)[:, :m]
    left = among_context.scatter(1, target_index, 2.0)
    context_index = left.argsort(1)[:, :k]
    return Masks(context_index.sort(1).values, target_index.sort(1).values)


def uniform_numbers(
    index: Int[Tensor, " b"], seed: int, step: int, count: int
) -> Float[Tensor, "b count"]:
    """Return `count` numbers in [0, 1) for each sample, a function of (seed, step, sample).

    Philox makes the n-th number from n itself, four at a time: each sample has its own stretch.
    (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3".)
    """
    key, quads = np.array([seed, step], np.uint64), math.ceil(count / 4)
    numbers = np.empty((len(index), count))
    for row, sample in zip(numbers, index.tolist(), strict=True):
        bits = np.random.Philox(key=key, counter=sample * quads)
        np.random.Generator(bits).random(out=row)
    return torch.from_numpy(numbers)
