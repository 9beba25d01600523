"""Less memory in training: what lies inside blocks is computed again for the gradient.

A transformer keeps what every block computes until the backward pass has used it. With blocks
computed again, only what enters each of them is kept, and the inside of one block at a time: memory
grows with the depth by one tensor a block in place of some twenty, for one more forward pass.
(Activation checkpointing, https://arxiv.org/abs/1604.06174, section 4.)
"""

from collections.abc import Callable, Iterator
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from jepa_world.registry import UserError


def recompute_blocks(model: nn.Module) -> None:
    """Have the blocks of a model compute again, for the gradient, what lies inside them.

    Losses and gradients stay what they are, dropout included. Blocks with buffers are left as they
    are: a batch norm would count its batch twice.

    Raises:
        UserError: no such block.

    Example:
        >>> import torch
        >>> from jepa_world.encoders.vit import ViTEncoder
        >>> encoder = ViTEncoder((1, 3, 32, 32), dim=32, depth=2, heads=2)
        >>> recompute_blocks(encoder)
        >>> encoder(torch.rand(2, 1, 3, 32, 32)).mean().backward()
    """
    blocks = list(blocks_of(model, _computes_the_same_twice))
    if not blocks:
        raise UserError(
            "--loop.recompute: nothing here consists of blocks without buffers (batch norm has "
            "some) that learn: drop it, or choose a transformer"
        )
    for block in blocks:
        for name in ("forward", "extend"):
            if name in dir(block):
                setattr(block, name, partial(checkpoint, getattr(block, name), use_reentrant=False))


def blocks_of(model: nn.Module, fits: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """Yield the outermost modules that fit among those that repeat: lists of one class."""
    parts = list(model.children())
    listed = isinstance(model, nn.ModuleList | nn.Sequential)
    repeats = listed and len({type(part) for part in parts}) == 1
    for part in parts:
        if repeats and any(part.children()) and fits(part):
            yield part
        else:
            yield from blocks_of(part, fits)


def _computes_the_same_twice(block: nn.Module) -> bool:
    return not any(True for _ in block.buffers()) and any(
        parameter.requires_grad for parameter in block.parameters()
    )
