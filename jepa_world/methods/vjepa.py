"""V-JEPA: I-JEPA for clips, with masks that run through time, and SIGReg in place of the teacher.

The two classes of `methods.ijepa` are used as they are, an image being a clip of one frame: what is
seen foretells the hidden tokens and the hidden part as a whole, in another view of the clip. A mask
is a set of tubes: places hidden in every frame. Two kinds take turns, as published: blocks of .15
of the frame until three quarters are hidden, and of .7 until nine tenths are.
(V-JEPA, https://arxiv.org/abs/2404.08471, section 3.)
"""

from typing import Any, Literal

from torch import nn

from jepa_world.config import part_from_dict
from jepa_world.data.augmentation import Augmentation
from jepa_world.masking import Grid, MultiBlockMasks, RandomMasks, TurnsOfMasks
from jepa_world.methods.ijepa import IJEPA, OnGrid, Shape, TeacherIJEPA
from jepa_world.registry import UserError
from jepa_world.sigreg import SIGReg

MaskKind = Literal["short", "long", "random"]


def tube_masks(
    kinds: tuple[MaskKind, ...], grid: Grid, *, predict: float = 1.0, seed: int = 0
) -> TurnsOfMasks:
    """Return the masks of V-JEPA, one kind a step in turn.

    Args:
        kinds: `short` sees a quarter, the rest lies in blocks of .15 of the frame; `long` sees a
            tenth, blocks of .7; `random` sees a tenth, places drawn one by one.
        grid: Of the tokens.
        predict: Share of the hidden tokens that is predicted; with 1 every token is seen or told.
        seed: Of the masks.

    Raises:
        ValueError: a share leaves no token on this grid.

    Example:
        >>> import torch
        >>> masks = tube_masks(("short", "long"), (8, 6, 6))(torch.arange(4), step=0)
        >>> masks.context.shape, masks.target.shape
        (torch.Size([4, 72]), torch.Size([4, 216]))
    """
    drawn = {
        "short": lambda: MultiBlockMasks(grid, 0.25, 0.75 * predict, (0.15, 0.15), seed=seed),
        "long": lambda: MultiBlockMasks(grid, 0.1, 0.9 * predict, (0.7, 0.7), seed=seed),
        "random": lambda: RandomMasks(grid, 0.1, 0.9 * predict, seed=seed),
    }
    return TurnsOfMasks(tuple(drawn[kind]() for kind in kinds))


def build_vjepa(description: dict[str, Any]) -> IJEPA | TeacherIJEPA:
    """Build the method from the `config.yaml` of its checkpoint.

    Raises:
        UserError: a key is missing or does not fit, or a part cannot be built.
    """
    try:
        frames, channels, rows, columns = map(int, description["observation_shape"])
        parts = {
            kind: part_from_dict(description[kind]) for kind in ("encoder", "masked_predictor")
        }
        kinds, predict = tuple(description["masks"]), float(description["predict"])
        slices, seed, weight = (description["sigreg"][key] for key in ("slices", "seed", "weight"))
        smallest, colour = (float(description["views"][key]) for key in ("crop", "colour"))
        whole, distance = float(description["whole"]), description["distance"]
        teacher = description["teacher"]
        momentum, steps = (teacher["momentum"], teacher["steps"]) if teacher is not None else (0, 0)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"not the description of V-JEPA: {error!r}") from error
    shape: Shape = (frames, channels, rows, columns)
    encoder = parts["encoder"].build("encoder", shape)
    if not (isinstance(encoder, nn.Module) and isinstance(encoder, OnGrid)):
        name = parts["encoder"].name
        raise UserError(f"encoder {name!r} has no `grid` (t, rows, columns) of tokens")
    try:
        masks = tube_masks(kinds, encoder.grid, predict=predict, seed=seed)
    except (KeyError, ValueError) as error:
        raise UserError(str(error)) from error
    predictor = parts["masked_predictor"].build("masked_predictor", encoder.dim, encoder.grid)
    changed = smallest < 1 or colour > 0
    views = Augmentation.of_strength((smallest, 1.0), colour) if changed else None
    if teacher is not None:
        return TeacherIJEPA(
            *(encoder, predictor, masks),
            momentum=momentum,
            steps=steps,
            views=views,
            shape=shape,
            distance=distance,
        )
    return IJEPA(
        *(encoder, predictor, SIGReg(slices=slices, seed=seed), masks),
        weight=weight,
        whole=whole,
        views=views,
        shape=shape,
        distance=distance,
    )
