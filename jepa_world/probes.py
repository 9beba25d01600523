"""What features are worth, without training the encoder, and whether they have collapsed."""

from collections.abc import Sequence
from typing import TypedDict, cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from jepa_world.interfaces import Encoder
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

    The mean over the k targets. At most 1; below 0 the read-out is worse than the mean of `y`.
    """

    def with_bias(features: Tensor) -> Tensor:
        return torch.cat([features, features.new_ones(len(features), 1)], dim=1).double()

    readout = torch.linalg.lstsq(with_bias(fit_z), fit_y.double(), driver="gelsd").solution
    left = (y - with_bias(z) @ readout).square().sum(0)
    return float((1 - left / (y - y.double().mean(0)).square().sum(0)).mean())


@torch.no_grad()
def image_features(
    encoder: Encoder, pixels: UInt8[np.ndarray, "n hh ww c"], *, batch_size: int = 500
) -> Float[Tensor, "n d"]:
    """Return the mean token of every image, channels last, from a frozen encoder on its device."""
    features: list[Tensor] = []
    device = next(cast(nn.Module, encoder).parameters()).device
    for start in range(0, len(pixels), batch_size):
        part = torch.from_numpy(pixels[start : start + batch_size]).to(device)
        images = rearrange(part, "b hh ww c -> b 1 c hh ww").to(torch.get_default_dtype()) / 255
        features.append(reduce(encoder(images).float(), "b t n d -> b d", "mean"))
    return torch.cat(features)


def linear_probe(
    fit_z: Float[Tensor, "n d"],
    fit_y: Int[Tensor, " n"],
    z: Float[Tensor, "m d"],
    *,
    decays: Sequence[float] = (1e-2, 1e-3, 1e-4, 1e-5),
) -> Int[Tensor, " m"]:
    """Return the classes of `z` that a multinomial logistic regression on (fit_z, fit_y) predicts.

    Features are standardised by their mean and deviation on `fit_z`. The weight decay is the one of
    `decays` that does best on a sixth of the fitting data; the rest of it is used to choose, all of
    it to predict.
    """
    fit_x, x = standardise(fit_z, z)
    order = torch.randperm(len(fit_x), generator=torch.Generator().manual_seed(0))
    held, kept = order.to(fit_x.device).tensor_split([len(order) // 6])
    if len(decays) > 1:
        decays = [_best_decay(fit_x, fit_y, kept, held, decays)]
    return _scores(x, fit_logistic(fit_x, fit_y, decay=decays[0])).argmax(1)


def standardise(fit_z: Float[Tensor, "n d"], *others: Float[Tensor, "m d"]) -> list[Tensor]:
    """Return features with mean 0 and deviation 1 on the first set; a dead one stays 0."""
    mean, std = fit_z.mean(0), fit_z.std(0).clamp(min=1e-6)
    return [(z - mean) / std for z in (fit_z, *others)]


def fit_logistic(
    x: Float[Tensor, "n d"], y: Int[Tensor, " n"], *, decay: float
) -> Float[Tensor, "d+1 k"]:
    """Minimise cross-entropy + decay / 2 * |W|^2 by L-BFGS; the last row, the bias, is free.

    The curvature in W is at most X^T X / 2 n + decay (Boehning, 1992): solving in the coordinates
    where that bound is the identity, few steps are enough however correlated the features are.
    """
    bound = x.T @ x / (2 * len(x))
    bound.diagonal().add_(decay)
    factor = torch.linalg.cholesky(bound)
    white = torch.linalg.solve_triangular(factor, x.T, upper=False).T.contiguous()
    weights = x.new_zeros(x.shape[1] + 1, int(y.max()) + 1, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights], max_iter=100, tolerance_change=1e-6, line_search_fn="strong_wolfe"
    )

    def own(weights: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor.T, weights[:-1], upper=True)

    def loss() -> Tensor:
        solver.zero_grad()
        penalty = decay / 2 * own(weights).square().sum()
        value = F.cross_entropy(_scores(white, weights), y) + penalty
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return torch.cat([own(weights), weights[-1:]]).detach()


def _scores(x: Float[Tensor, "n d"], weights: Float[Tensor, "d+1 k"]) -> Float[Tensor, "n k"]:
    return torch.addmm(weights[-1], x, weights[:-1])


def _best_decay(x: Tensor, y: Tensor, kept: Tensor, held: Tensor, decays: Sequence[float]) -> float:
    """Return the decay whose fit on `kept` does best on `held`; the strongest of equals."""
    right: dict[float, float] = {}
    for decay in sorted(decays, reverse=True):
        weights = fit_logistic(x[kept], y[kept], decay=decay)
        right[decay] = float((_scores(x[held], weights).argmax(1) == y[held]).float().mean())
    return max(right, key=lambda decay: right[decay])


@torch.no_grad()
def knn_probe(
    fit_z: Float[Tensor, "n d"],
    fit_y: Int[Tensor, " n"],
    z: Float[Tensor, "m d"],
    *,
    k: int = 20,
    block: int = 1000,
) -> Int[Tensor, " m"]:
    """Return the class that most of the k nearest neighbours have; ties go to the nearer ones.

    Nearness is cosine similarity of features from which the mean of `fit_z` is taken.
    """
    mean = fit_z.mean(0)
    fit_x = F.normalize(fit_z - mean, dim=1)
    onehot = F.one_hot(fit_y).to(fit_x)
    predicted: list[Tensor] = []
    for part in F.normalize(z - mean, dim=1).split(block):
        near = (part @ fit_x.T).topk(min(k, len(fit_x)), dim=1)
        votes = onehot[near.indices] * (1 + 1e-3 * near.values.unsqueeze(-1))
        predicted.append(votes.sum(1).argmax(1))
    return torch.cat(predicted)


def few_shot(
    fit_z: Float[Tensor, "n d"],
    fit_y: Int[Tensor, " n"],
    z: Float[Tensor, "m d"],
    y: Int[Tensor, " m"],
    *,
    shots: int,
    draws: int = 10,
    seed: int = 0,
) -> list[float]:
    """Return the accuracy on (z, y) of logistic regressions on `shots` samples a class, by draw."""
    fit_x, x = standardise(fit_z, z)
    accuracies: list[float] = []
    for draw in range(draws):
        random = torch.Generator().manual_seed(seed * 1000 + draw)
        order = torch.randperm(len(fit_y), generator=random).to(fit_y.device)
        chosen = [order[fit_y[order] == label][:shots] for label in fit_y.unique()]
        index = torch.cat(chosen)
        weights = fit_logistic(fit_x[index], fit_y[index], decay=1e-2)
        accuracies.append(float((_scores(x, weights).argmax(1) == y).float().mean()))
    return accuracies


@torch.no_grad()
def lidar(z: Float[Tensor, "n q d"], *, delta: float = 1e-4) -> float:
    """Return LiDAR of q views of n images: the effective rank of what tells images apart.

    exp of the entropy of the eigenvalues of W^-1/2 B W^-1/2, with B the covariance of the images'
    means and W that of the views around them plus `delta`: the rank of linear discriminant analysis
    with every image a class, at most n - 1 and d. (https://arxiv.org/abs/2312.04000, section 4.)
    """
    z = z.double()
    means = z.mean(1)
    centred = means - means.mean(0)
    between = centred.T @ centred / (len(z) - 1)
    around = (z - means.unsqueeze(1)).flatten(0, 1)
    within = around.T @ around / (len(z) * (z.shape[1] - 1))
    within = within + delta * torch.eye(z.shape[2], dtype=z.dtype, device=z.device)
    values, vectors = torch.linalg.eigh(within)
    root = vectors * values.rsqrt() @ vectors.T
    share = torch.linalg.eigvalsh(root @ between @ root).clamp_min(0)
    return torch.special.entr(share / share.sum()).sum().exp().item()
