"""What features are worth, without training the encoder, and whether they have collapsed."""

from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from jepa_world.sigreg import null_mean, random_directions, sigreg


class CollapseReport(TypedDict):
    """Health of features that should look like N(0, I).

    `sigreg_excess` is SIGReg minus its mean on exact Gaussian samples: near 0 when all is well, at
    any batch size. `warning` is empty when nothing is wrong.
    """

    sigreg_excess: float
    effective_rank: float
    smallest_std: float
    largest_std: float
    mean_norm: float
    warning: str


@torch.no_grad()
def collapse_report(
    z: Float[Tensor, "n d"], *, slices: int = 256, max_samples: int = 1024
) -> CollapseReport:
    """Return how far the features of this process are from N(0, I), and a warning in plain words.

    Costs little: at most `max_samples` rows, evenly spread, and fixed slices, so that two steps are
    compared like with like. Never raises on bad features: it is there to describe them.
    """
    stride = -(-len(z) // max_samples)
    z = z[:: max(1, stride)].float()
    if len(z) < 2 or not bool(z.isfinite().all()):
        nan = float("nan")
        words = f"features are not finite or too few to judge: {len(z)} samples"
        return CollapseReport(
            sigreg_excess=nan,
            effective_rank=nan,
            smallest_std=nan,
            largest_std=nan,
            mean_norm=nan,
            warning=words,
        )
    std = z.std(0, correction=0)
    directions = random_directions(z.shape[1], slices, seed=0, step=0)
    report = CollapseReport(
        sigreg_excess=sigreg(z, directions, across_processes=False).item() - null_mean(),
        effective_rank=effective_rank(z),
        smallest_std=std.min().item(),
        largest_std=std.max().item(),
        mean_norm=z.mean(0).norm().item(),
        warning="",
    )
    report["warning"] = _warning(report, *z.shape)
    return report


@torch.no_grad()
def effective_rank(z: Float[Tensor, "n d"]) -> float:
    """Return RankMe: exp of the entropy of the normalised singular values, from 1 to min(n, d).

    Source: arXiv 2210.02885, equation 1; here from eigenvalues of the smaller Gram matrix, float64.
    All-zero features have rank 0.
    """
    z = z.double()
    gram = z.T @ z if len(z) > z.shape[1] else z @ z.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    if not singular.sum() > 0:
        return 0.0
    return torch.special.entr(singular / singular.sum()).sum().exp().item()


def _warning(report: CollapseReport, n: int, dim: int) -> str:
    """Say what is wrong, worst first. The limits are far from anything a healthy run shows."""
    if report["largest_std"] < 0.05:
        return f"features have collapsed to a point: no std is above {report['largest_std']:.2g}"
    if report["largest_std"] > 20 or report["mean_norm"] > 20 * dim**0.5:
        return (
            f"features blow up: the largest std is {report['largest_std']:.3g} and the norm of the "
            f"mean {report['mean_norm']:.3g}, where 1 and 0 are wanted"
        )
    full = min(n, dim)
    if report["effective_rank"] < 0.1 * full:
        return (
            f"features have collapsed to few dimensions: effective rank "
            f"{report['effective_rank']:.1f} of {full}"
        )
    if report["smallest_std"] < 0.01:
        return f"some dimensions are dead: the smallest std is {report['smallest_std']:.2g}"
    return ""


@torch.no_grad()
def linear_probe_r2(
    fit_z: Float[Tensor, "n d"],
    fit_y: Float[Tensor, "n k"],
    z: Float[Tensor, "m d"],
    y: Float[Tensor, "m k"],
) -> float:
    """Return the R^2 on (z, y) of a least-squares read-out fitted on (fit_z, fit_y).

    The worst of the k targets: a mean would hide one that the features lack. At most 1; below
    0 the read-out is worse than the mean of `y`.
    """

    def with_bias(features: Tensor) -> Tensor:
        return torch.cat([features, features.new_ones(len(features), 1)], dim=1).double()

    readout = torch.linalg.lstsq(with_bias(fit_z), fit_y.double(), driver="gelsd").solution
    left = (y - with_bias(z) @ readout).square().sum(0)
    return float((1 - left / (y - y.double().mean(0)).square().sum(0)).min())
