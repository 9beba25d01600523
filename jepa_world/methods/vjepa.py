"""V-JEPA: I-JEPA for clips, with masks that run through time, and SIGReg in place of the teacher.

The two classes of `methods.ijepa` are used as they are, an image being a clip of one frame: what is
seen foretells the hidden tokens and the hidden part as a whole, in another view of the clip. A mask
is a set of tubes: places hidden in every frame. Two kinds take turns, as published: blocks of .15
of the frame until three quarters are hidden, and of .7 until nine tenths are.
(V-JEPA, https://arxiv.org/abs/2404.08471, section 3.)
"""

from typing import Any, Literal

from jepa_world.losses import DISTANCES
from jepa_world.masking import Grid, MultiBlockMasks, RandomMasks, TurnsOfMasks
from jepa_world.methods.ijepa import IJEPA, DrawMasks, TeacherIJEPA, assemble
from jepa_world.registry import UserError

MaskKind = Literal["short", "long", "random"]
KINDS: dict[MaskKind, tuple[float, float | None]] = {  # share that is seen, area of a block
    "short": (0.25, 0.15),
    "long": (0.1, 0.7),
    "random": (0.1, None),
}


def tube_masks(
    kinds: tuple[MaskKind, ...],
    grid: Grid,
    *,
    predict: float = 1.0,
    seen: float | None = None,
    seed: int = 0,
) -> TurnsOfMasks:
    """Return the masks of V-JEPA, one kind a step in turn.

    Args:
        kinds: `short` sees a quarter, the rest lies in blocks of .15 of the frame; `long` sees a
            tenth, blocks of .7; `random` sees a tenth, places drawn one by one.
        grid: Of the tokens.
        predict: Share of the hidden tokens that is predicted; with 1 every token is seen or told.
        seen: Share of the tokens that is seen, in place of what each kind has.
        seed: Of the masks.

    Raises:
        ValueError: a share leaves no token on this grid.

    Example:
        >>> import torch
        >>> masks = tube_masks(("short", "long"), (8, 6, 6))(torch.arange(4), step=0)
        >>> masks.context.shape, masks.target.shape
        (torch.Size([4, 72]), torch.Size([4, 216]))
    """

    def drawn(kind: MaskKind) -> MultiBlockMasks | RandomMasks:
        context, area = KINDS[kind]
        context = context if seen is None else seen
        target = (1 - context) * predict
        if area is None:
            return RandomMasks(grid, context, target, seed=seed)
        return MultiBlockMasks(grid, context, target, (area, area), seed=seed)

    return TurnsOfMasks(tuple(map(drawn, kinds)))


def build_vjepa(description: dict[str, Any]) -> IJEPA | TeacherIJEPA:
    """Build the method from the `config.yaml` of its checkpoint.

    Raises:
        UserError: a key is missing or does not fit, or a part cannot be built.
    """

    def masks(grid: Grid, seed: int) -> DrawMasks:
        kinds, share = tuple(description["masks"]), float(description["predict"])
        seen = description.get("seen")
        return tube_masks(kinds, grid, predict=share, seen=seen, seed=seed)

    distance = description.get("distance")
    if distance not in DISTANCES:
        raise UserError(f"not the description of V-JEPA: the distance {distance!r}")
    return assemble(description, masks, "V-JEPA", distance, any_shape=True)
