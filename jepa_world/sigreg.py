"""SIGReg: make features an isotropic Gaussian, in place of a teacher, by testing random 1-d slices.

For a unit vector a and samples z_1 .. z_N the Epps-Pulley statistic of the slice p_n = a . z_n is

    T(a) = N * integral w(t) |mean_n exp(i t p_n) - phi(t)|^2 dt,    w(t) = phi(t) = exp(-t^2 / 2)

and SIGReg is the mean of T over slices (LeJEPA, arXiv 2511.08544, section 4).
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from jepa_world.nn import sum_over_processes

_BLOCK = 1 << 17  # projections handled at a time: the working set stays in a core's cache


class SIGReg(nn.Module):
    """Regularise features towards N(0, I): zero-mean, unit-variance, uncorrelated, Gaussian.

    The slices of a call are a function of (seed, step) alone, drawn on the CPU in float32: every
    process and every device has the same ones, and a resumed run draws what the uninterrupted run
    would have drawn, with nothing to save or synchronise.

    Args:
        slices: random directions a call.
        knots: points of the quadrature on [0, t_max]; the integrand is even.
        t_max: end of the integration domain. The rule of the paper's text, 17 points on [-5, 5], is
            `knots=9, t_max=5.0`.
        seed: of the slices.

    Example:
        >>> import torch
        >>> z = torch.randn(512, 64, requires_grad=True)
        >>> loss = SIGReg(slices=256)(z, step=0)
        >>> loss.backward()
    """

    def __init__(
        self, *, slices: int = 1024, knots: int = 17, t_max: float = 3.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.slices = slices
        self.knots = knots
        self.t_max = t_max
        self.seed = seed

    def forward(self, z: Float[Tensor, "*g n d"], step: int) -> Float[Tensor, ""]:
        """Return the mean statistic of `z`, `(n d)` or `(g n d)`, over slices and groups."""
        directions = random_directions(z.shape[-1], self.slices, seed=self.seed, step=step)
        return sigreg(z, directions.to(z.device), knots=self.knots, t_max=self.t_max)


def sigreg(
    z: Float[Tensor, "*g n d"],
    directions: Float[Tensor, "d m"],
    *,
    knots: int = 17,
    t_max: float = 3.0,
) -> Float[Tensor, ""]:
    """Return the mean Epps-Pulley statistic of `z` along unit `directions`.

    Groups are tested one by one and averaged. With several processes the samples of all of them are
    tested together (N counts them all); uneven batches are exact. Computed in float32, or float64
    for float64 input, whatever autocast says.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        grouped = z.to(dtype).reshape(-1, z.shape[-2], z.shape[-1])
        sums = _CharacteristicSums.apply(grouped, directions.to(z.device, dtype), knots, t_max)
        sums = sum_over_processes(sums)  # type: ignore[arg-type]
        cosines, sines = sums
        phi, weights = quadrature(knots, t_max, like=sums)
        count = cosines[:, :1]  # cos(0 p) summed over samples
        error = (cosines / count - phi[:, None]).square() + (sines / count).square()
        return (count[:, 0] * torch.einsum("k,gkm->gm", weights, error)).mean()


def null_mean(*, knots: int = 17, t_max: float = 3.0) -> float:
    """Return the mean SIGReg of exact N(0, I) samples, at any batch size: 1.0525 by default."""
    phi, weights = quadrature(knots, t_max, like=torch.empty(0, dtype=torch.float64))
    return float((weights * (1 - phi.square())).sum())


def quadrature(
    knots: int, t_max: float, *, like: Tensor
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Return phi(t_k) and the trapezoid weights, window included, of an even integrand."""
    t = torch.linspace(0, t_max, knots, dtype=torch.float64)
    phi = torch.exp(-t.square() / 2)
    weights = 2 * t_max / (knots - 1) * phi
    weights[[0, -1]] /= 2
    return phi.to(like), weights.to(like)


def random_directions(dim: int, slices: int, *, seed: int, step: int) -> Float[Tensor, "d m"]:
    """Draw unit directions on the CPU, a function of (seed, step) alone."""
    mixed = int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
    generator = torch.Generator().manual_seed(mixed)
    directions = torch.randn(dim, slices, generator=generator)
    return directions / directions.norm(dim=0)


class _CharacteristicSums(torch.autograd.Function):
    """Sum cos(t_k p) and sin(t_k p) over samples, for knots t_k = k t_max / (knots - 1).

    The knots are equally spaced: cos and sin of t_k p follow x_{k+1} = 2 cos(dt p) x_k - x_{k-1},
    and the gradient, a trigonometric polynomial of p, is evaluated by Clenshaw's recurrence.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, directions: Tensor, knots: int, t_max: float
    ) -> Float[Tensor, "2 g k m"]:
        ctx.save_for_backward(z, directions)
        ctx.spacing = t_max / (knots - 1)
        groups, n, _ = z.shape
        slices = directions.shape[1]
        sums = z.new_empty(2, groups, knots, slices)
        width = max(1, min(slices, _BLOCK // max(1, groups * n)))
        for start in range(0, slices, width):
            part = slice(start, start + width)
            angle = (z @ directions[:, part]).mul_(ctx.spacing)
            twice = 2 * angle.cos()
            cosines, sines = (
                [torch.ones_like(angle), twice / 2],
                [torch.zeros_like(angle), angle.sin()],
            )
            for k in range(knots):
                sums[0, :, k, part] = cosines[0].sum(1)
                sums[1, :, k, part] = sines[0].sum(1)
                cosines = [cosines[1], (twice * cosines[1]).sub_(cosines[0])]
                sines = [sines[1], (twice * sines[1]).sub_(sines[0])]
        return sums

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None, None]:
        z, directions = ctx.saved_tensors
        grad_cosines, grad_sines = grads[0]
        groups, n, _ = z.shape
        knots, slices = grad_cosines.shape[1:]
        t = ctx.spacing * torch.arange(knots, device=z.device, dtype=z.dtype)[:, None]
        alpha, beta = grad_sines * t, -grad_cosines * t  # of cos(t_k p) and sin(t_k p)
        grad = torch.zeros_like(z)
        width = max(1, min(slices, _BLOCK // max(1, groups * n)))
        for start in range(0, slices, width):
            part = slice(start, start + width)
            angle = (z @ directions[:, part]).mul_(ctx.spacing)
            cosine, twice = angle.cos(), 2 * angle.cos()
            a = [torch.zeros_like(angle), torch.zeros_like(angle)]
            b = [torch.zeros_like(angle), torch.zeros_like(angle)]
            for k in range(knots - 1, 0, -1):
                a = [(twice * a[0]).sub_(a[1]).add_(alpha[:, k : k + 1, part]), a[0]]
                b = [(twice * b[0]).sub_(b[1]).add_(beta[:, k : k + 1, part]), b[0]]
            slope = cosine * a[0] - a[1] + angle.sin() * b[0]
            grad += slope @ directions[:, part].T
        return grad, None, None, None
