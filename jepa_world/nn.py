"""Building blocks shared by encoders, predictors and methods."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def sum_over_processes(x: Tensor) -> Tensor:
    """Sum a tensor over all processes, differentiably; the tensor itself when there is one process.

    Every process gets the same sum, and the backward pass sums the gradients of all of them. When each
    process computes the same loss from the sum and the data-parallel wrapper then averages parameter
    gradients, the result is the gradient of one process that holds all samples.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    return _SumOverProcesses.apply(x)  # type: ignore[no-any-return]
