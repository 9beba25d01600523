"""Memory: blocks that compute again for the gradient, sharded parameters, kept freed memory.

A transformer keeps what every block computes until the backward pass has used it. With blocks that
compute again, only what enters each of them is kept, and the inside of one block at a time, for one
more forward pass. (Activation checkpointing, https://arxiv.org/abs/1604.06174, section 4.)

Sharded, every process has its part of each parameter, of its gradient and of AdamW's two moments;
a block is gathered when it computes, and let go. (FSDP2, torch's `fully_shard`: ZeRO's third stage,
https://arxiv.org/abs/1910.02054.)
"""

import copy
import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jepa_world.registry import UserError

ENTRANCES = ("extend", "rollout", "rollout_prefixes", "between")  # of blocks, predictors, costs

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT, MAPPED = 1 << 30, 64 << 20  # bytes


def keep_freed_memory() -> None:
    """Have glibc keep up to 1 GB of freed memory, in blocks below 64 MB, for the next tensors.

    By default most of what a training step frees goes back to the system, which clears every page
    of it again for the next step: a fifth to a third of the CPU time of small nets. Peak memory
    grows by an eighth. Where the C library is another one, nothing happens. (mallopt(3).)
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MAPPED)
        mallopt(M_TRIM_THRESHOLD, KEPT)


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


def sharded(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of a model with its parameters sharded over all processes.

    Blocks are gathered one at a time, the rest of each part (encoder, predictor) with it. Outside
    of them parameters are shards, in a `forward` of the model too: a moving average of an encoder
    follows shard by shard.

    Raises:
        UserError: a parameter without an axis.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise UserError(
                f"--loop.shard: {name!r} is a single number, which cannot be shared out: drop the "
                "flag, or give it an axis"
            )
    from torch.distributed.device_mesh import init_device_mesh  # takes seconds
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # changed by none
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    copied = copy.deepcopy(model)
    blocks = blocks_of(copied, _has_parameters)
    parts = (part for part in copied.children() if not isinstance(part, nn.ModuleList))
    for unit in filter(_has_parameters, dict.fromkeys((*blocks, *parts))):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        for name in ENTRANCES:
            if name in dir(unit):
                register_fsdp_forward_method(unit, name)
    fully_shard(copied, mesh=mesh)
    return copied


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from its shards, by all processes together; any other as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the shard of a tensor that all processes have, where another of its shape is one."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def let_go(model: nn.Module) -> None:
    """Let the process group end that a sharded model was trained in: torch keeps meshes for ever.

    A thread of the group that is still alive when the interpreter ends can abort the process.
    """
    from torch.distributed.tensor import DTensor

    for parameter in model.parameters():
        if isinstance(parameter, DTensor):  # a mesh holds its group in newer torch
            vars(parameter.device_mesh).get("_pg_registry", {}).clear()
