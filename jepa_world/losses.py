"""Distances between latents that were predicted and latents that came; VICReg's regulariser."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from jepa_world.nn import sum_over_processes

Distance = Literal["l2", "l1", "smooth_l1"]
DISTANCES: dict[Distance, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
}


class VICReg(nn.Module):
    """The variance and the covariance term of VICReg, in the paper's proportion of 25 to 1.

    It is called like SIGReg, and stands in its place (arXiv 2105.04906, equation 6, section 4.2).

    Example:
        >>> import torch
        >>> VICReg()(torch.zeros(4, 64, 8), step=0)  # collapsed: every deviation is .01
        tensor(0.9900)
    """

    def forward(self, z: Float[Tensor, "*g n d"], step: int) -> Float[Tensor, ""]:
        """Return the sum of both terms of `z`, over the samples of all processes; any step."""
        variance, covariance = variance_covariance(z)
        return variance + covariance / 25


def variance_covariance(
    z: Float[Tensor, "*g n d"], *, least: float = 1.0, eps: float = 1e-4
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return VICReg's variance and covariance terms, each the mean over groups.

        variance = mean_j max(0, least - sqrt(var(z_j) + eps))
        covariance = sum_{i != j} C_ij^2 / d

    C is the covariance matrix, with n - 1 below (arXiv 2105.04906, equations 1 to 4). Exact over
    processes; in float32, or float64 for float64 input, whatever autocast says.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        count = sum_over_processes(z.new_tensor(float(z.shape[-2])))
        centred = z - sum_over_processes(z.sum(-2, keepdim=True)) / count
        matrix = sum_over_processes(centred.mT @ centred) / (count - 1)
        own = matrix.diagonal(dim1=-2, dim2=-1)
        variance = F.relu(least - (own + eps).sqrt()).mean()
        covariance = (matrix.square().sum((-2, -1)) - own.square().sum(-1)).mean() / z.shape[-1]
        return variance, covariance
