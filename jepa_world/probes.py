"""What features are worth, without training the encoder, and whether they have collapsed."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict, cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from jepa_world.interfaces import Encoder
from jepa_world.nn import AttentiveProbe
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


def linear_probe_r2(
    fit_z: Float[Tensor, "n d"],
    fit_y: Float[Tensor, "n k"],
    z: Float[Tensor, "m d"],
    y: Float[Tensor, "m k"],
) -> Float[Tensor, " k"]:
    """Return R^2 on (z, y) of a ridge regression fitted on (fit_z, fit_y), by target."""
    return r_squared(linear_read_out(fit_z, fit_y)(z), y)


def r_squared(predicted: Float[Tensor, "m k"], y: Float[Tensor, "m k"]) -> Float[Tensor, " k"]:
    """Return the share of the variance of `y` that is told, by target.

    At most 1; below 0 what is predicted is worse than the mean of `y`.
    """
    y = y.double().cpu()
    error = y - predicted.double().cpu()
    return 1 - error.square().sum(0) / (y - y.mean(0)).square().sum(0)


ReadOut = Callable[[Float[Tensor, "m d"]], Float[Tensor, "m k"]]
"""What numbers a fitted probe reads from features."""


@torch.no_grad()
def linear_read_out(fit_z: Float[Tensor, "n d"], fit_y: Float[Tensor, "n k"]) -> ReadOut:
    """Return a ridge regression fitted on (fit_z, fit_y).

    Features are standardised by `fit_z`; every target has the decay, of 1e-8 to 10, with the least
    error when each sample of the fit is foretold from the others.
    """
    fit_z, fit_y = fit_z.double().cpu(), fit_y.double().cpu()
    (fit_x,) = standardise(fit_z)
    directions = principal_directions(fit_x)
    scores, centred = fit_x @ directions, fit_y - fit_y.mean(0)
    sizes, along = scores.square().sum(0), scores.T @ centred
    decays = len(fit_x) * torch.logspace(-8, 1, 10, dtype=torch.float64)
    shrunk = 1 / (sizes + decays[:, None])  # by decay and direction
    left = centred - scores @ (shrunk[..., None] * along)
    told_by_itself = shrunk @ scores.square().T + 1 / len(fit_x)
    alone = left / (1 - told_by_itself[..., None]).clamp(min=1e-9)
    best = shrunk[alone.square().sum(1).argmin(0)]  # by target and direction
    weights = directions @ (best.T * along)
    return lambda z: fit_y.mean(0) + standardise(fit_z, z.double().cpu())[1] @ weights


def mlp_read_out(
    fit_z: Float[Tensor, "n d"],
    fit_y: Float[Tensor, "n k"],
    *,
    width: int = 256,
    epochs: int = 60,
    seed: int = 0,
) -> ReadOut:
    """Return a network of two hidden layers fitted on (fit_z, fit_y), all targets at once.

    Features and targets are standardised by the fit. Every target is read by the network of the
    epoch that was best at it on the last sixth of the fit, which is held back: where neighbouring
    rows are frames of one episode, most of it is other episodes.
    """
    mean, std = fit_y.mean(0), fit_y.std(0).clamp(min=1e-6)
    x, target = standardise(fit_z.float())[0], ((fit_y - mean) / std).to(fit_z).float()
    kept = len(x) - len(x) // 6
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = (nn.Linear(x.shape[1], width), nn.GELU(), nn.Linear(width, width), nn.GELU())
        network = nn.Sequential(*layers, nn.Linear(width, target.shape[1])).to(x.device)
    least, best = [float("inf")] * target.shape[1], [network] * target.shape[1]
    for now in _epochs(network, x[:kept], target[:kept], epochs, seed):
        with torch.no_grad():
            errors = (now(x[kept:]) - target[kept:]).square().mean(0).tolist()
        better = [error < lowest for error, lowest in zip(errors, least, strict=True)]
        best = [now if is_better else old for is_better, old in zip(better, best, strict=True)]
        least = [min(pair) for pair in zip(errors, least, strict=True)]

    @torch.no_grad()
    def read(z: Tensor) -> Tensor:
        features = standardise(fit_z.float(), z.float())[1]
        told = {one: one(features) for one in set(best)}
        columns = [told[one][:, place] for place, one in enumerate(best)]
        return torch.stack(columns, 1).to(mean) * std + mean

    return read


def _epochs(
    network: nn.Module, x: Tensor, target: Tensor, epochs: int, seed: int, *, batch_size: int = 128
) -> Iterator[nn.Module]:
    """Train by AdamW with a cosine, and yield the network as it is after every epoch."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = epochs * -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=random).split(batch_size):
            optimizer.zero_grad()
            F.mse_loss(network(x[index]), target[index]).backward()
            optimizer.step()
            schedule.step()
        yield copy.deepcopy(network)


def principal_directions(x: Float[Tensor, "n d"]) -> Float[Tensor, "d r"]:
    """Return orthonormal directions that x varies along, from the smaller Gram matrix."""
    wide = len(x) < x.shape[1]
    sizes, turn = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    used = sizes > 1e-12 * sizes[-1]
    return x.T @ (turn[:, used] / sizes[used].sqrt()) if wide else turn[:, used]


def factor_r2(
    fit_z: Float[Tensor, "n d"],
    fit_values: dict[str, Float[np.ndarray, "n k"]],
    z: Float[Tensor, "m d"],
    values: dict[str, Float[np.ndarray, "m k"]],
) -> dict[str, float]:
    """Return R^2 of named factors, the mean over the numbers of each, from one read-out of all."""
    if not fit_values:
        return {}
    fit_y, y = (
        torch.from_numpy(np.concatenate([named[name] for name in fit_values], 1))
        for named in (fit_values, values)
    )
    found = linear_probe_r2(fit_z, fit_y, z, y).split([v.shape[1] for v in fit_values.values()])
    return {name: round(float(r2.mean()), 4) for name, r2 in zip(fit_values, found, strict=True)}


@torch.no_grad()
def image_features(
    encoder: Encoder,
    pixels: UInt8[np.ndarray, "n hh ww c"],
    *,
    cells: int = 1,
    batch_size: int = 500,
) -> Float[Tensor, "n d"]:
    """Return features of images, channels last, from a frozen encoder on its device.

    The mean token; with `cells`, the mean tokens of cells x cells parts of the image one behind the
    other, which tell where things are (for an encoder whose tokens lie on a grid).
    """
    features: list[Tensor] = []
    device = next(cast(nn.Module, encoder).parameters()).device
    for start in range(0, len(pixels), batch_size):
        part = torch.from_numpy(pixels[start : start + batch_size]).to(device)
        images = rearrange(part, "b hh ww c -> b 1 c hh ww").to(torch.get_default_dtype()) / 255
        tokens = encoder(images).float()
        grid: tuple[int, int, int] | None = getattr(encoder, "grid", None)
        if cells == 1 or grid is None:
            features.append(reduce(tokens, "b t n d -> b d", "mean"))
        else:
            maps = rearrange(tokens, "b 1 (y x) d -> b d y x", y=grid[1])
            features.append(F.adaptive_avg_pool2d(maps, cells).flatten(1))
    return torch.cat(features)


@torch.no_grad()
def clip_tokens(
    encoder: Encoder, pixels: UInt8[np.ndarray, "n t hh ww c"], *, batch_size: int = 100
) -> Float[Tensor, "n l d"]:
    """Return all tokens of clips, channels last, from a frozen encoder on its device."""
    device = next(cast(nn.Module, encoder).parameters()).device
    tokens: list[Tensor] = []
    for start in range(0, len(pixels), batch_size):
        part = torch.from_numpy(pixels[start : start + batch_size]).to(device)
        clips = rearrange(part, "b t hh ww c -> b t c hh ww").to(torch.get_default_dtype()) / 255
        tokens.append(rearrange(encoder(clips).float(), "b t n d -> b (t n) d"))
    return torch.cat(tokens)


@torch.no_grad()
def clip_features(
    encoder: Encoder, pixels: UInt8[np.ndarray, "n t hh ww c"], *, batch_size: int = 100
) -> Float[Tensor, "n d"]:
    """Return the mean token of clips, channels last, from a frozen encoder on its device."""
    parts = range(0, len(pixels), batch_size)
    return torch.cat(
        [clip_tokens(encoder, pixels[start : start + batch_size]).mean(1) for start in parts]
    )


def attentive_probe(
    fit_z: Float[Tensor, "n l d"],
    fit_y: Int[Tensor, " n"],
    z: Float[Tensor, "m l d"],
    *,
    heads: int = 4,
    epochs: int = 10,
    seed: int = 0,
) -> Int[Tensor, " m"]:
    """Return the class of every clip by a query that attends to its tokens, trained on the fit.

    (V-JEPA, arXiv 2404.08471, section 4: frozen evaluation.)
    """
    classes = int(fit_y.max()) + 1
    read = _fit_attentive(
        fit_z, fit_y, classes, F.cross_entropy, heads=heads, epochs=epochs, seed=seed
    )
    return read(z).argmax(1)


def attentive_r2(
    fit_z: Float[Tensor, "n l d"],
    fit_y: Float[Tensor, "n k"],
    z: Float[Tensor, "m l d"],
    y: Float[Tensor, "m k"],
    *,
    heads: int = 4,
    epochs: int = 30,
    seed: int = 0,
) -> Float[Tensor, " k"]:
    """Return R^2 on (z, y) of what an attentive probe of (fit_z, fit_y) reads, by target."""
    mean, std = fit_y.mean(0), fit_y.std(0).clamp(min=1e-6)
    target = ((fit_y - mean) / std).to(fit_z)
    read = _fit_attentive(
        fit_z, target, len(mean), F.mse_loss, heads=heads, epochs=epochs, seed=seed
    )
    return r_squared(read(z).to(y) * std + mean, y)


def placed_r2(
    fit_z: Float[Tensor, "n l d"],
    fit_y: Float[Tensor, "n k"],
    z: Float[Tensor, "m l d"],
    y: Float[Tensor, "m k"],
    *,
    components: int = 512,
    seed: int = 0,
) -> Float[Tensor, " k"]:
    """Return R^2 on (z, y) of what a perceptron reads from tokens that it knows the places of.

    All numbers of all tokens, or the first principal components of the fit where there are more
    than `components` numbers: an attentive probe tells tokens apart by what is in them alone.
    Fewer numbers are read as they are: made components of one size, those that hardly vary would
    weigh as much as those that do.
    """
    fit_x, x = fit_z.flatten(1), z.flatten(1)
    if fit_x.shape[1] > components:
        mean = fit_x.mean(0)
        directions = principal_directions(fit_x - mean)[:, -components:]
        fit_x, x = ((tokens - mean) @ directions for tokens in (fit_x, x))
    return r_squared(mlp_read_out(fit_x, fit_y, seed=seed)(x), y)


def _fit_attentive(
    fit_z: Float[Tensor, "n l d"],
    target: Tensor,
    outputs: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    heads: int,
    epochs: int,
    seed: int,
    lr: float = 1e-3,
    batch_size: int = 64,
) -> Callable[[Tensor], Tensor]:
    """Train a probe by AdamW with a cosine, and return it as a function of tokens.

    Tokens are standardised by those of `fit_z`.
    """
    mean, std = fit_z.mean((0, 1)), fit_z.std((0, 1)).clamp(min=1e-6)
    target = target.to(fit_z.device)
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        probe = AttentiveProbe(fit_z.shape[2], outputs, heads=heads).to(fit_z.device)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=lr, weight_decay=1e-2)
    steps = epochs * -(-len(fit_z) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for index in torch.randperm(len(fit_z), generator=random).split(batch_size):
            optimizer.zero_grad()
            loss(probe((fit_z[index] - mean) / std), target[index]).backward()
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def read(z: Tensor) -> Tensor:
        return torch.cat([probe((part - mean) / std) for part in z.split(500)])

    return read


def linear_probe(
    fit_z: Float[Tensor, "n d"],
    fit_y: Int[Tensor, " n"],
    z: Float[Tensor, "m d"],
    *,
    decays: Sequence[float] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
    choosers: int = 24_000,
) -> Int[Tensor, " m"]:
    """Return the classes of `z` that a multinomial logistic regression on (fit_z, fit_y) predicts.

    Features are standardised by their mean and deviation on `fit_z`. At most `choosers` samples of
    the fitting data choose the weight decay, by sixths: the one of `decays` that, fitted on the
    other five, does best on a sixth, or on as many of them one after the other as have a twelfth
    of `choosers` samples together: few samples choose in turn, of many one sixth is enough. All
    of the data then fits the weights that predict.
    """
    fit_x, x = standardise(fit_z, z)
    if len(decays) > 1:
        order = torch.randperm(len(fit_x), generator=torch.Generator().manual_seed(0))
        sixths = list(order[:choosers].to(fit_x.device).tensor_split(6))
        turns = min(6, -(-choosers // (12 * max(1, len(sixths[0])))))
        decays = [_best_decay(fit_x, fit_y, sixths, turns, sorted(decays, reverse=True))]
    return _scores(x, fit_logistic(fit_x, fit_y, decays=decays))[0].argmax(0)


def standardise(fit_z: Float[Tensor, "n d"], *others: Float[Tensor, "m d"]) -> list[Tensor]:
    """Return features with mean 0 and deviation 1 on the first set; a dead one stays 0."""
    mean, std = fit_z.mean(0), fit_z.std(0).clamp(min=1e-6)
    return [(z - mean) / std for z in (fit_z, *others)]


def whiten(fit_z: Float[Tensor, "n d"], *others: Float[Tensor, "m d"]) -> list[Tensor]:
    """Return features with mean 0 and covariance near 1 on the first set.

    Directions of less than a thousandth of the mean variance are left small, not blown up.
    """
    mean = fit_z.mean(0)
    variances, directions = torch.linalg.eigh((fit_z - mean).T @ (fit_z - mean) / len(fit_z))
    turn = directions / (variances.clamp(min=0) + 1e-3 * variances.mean()).clamp(min=1e-12).sqrt()
    return [(z - mean) @ turn for z in (fit_z, *others)]


def fit_logistic(
    x: Float[Tensor, "n d"], y: Int[Tensor, " n"], *, decays: Sequence[float]
) -> Float[Tensor, "w k d+1"]:
    """Minimise cross-entropy + decay / 2 * |W|^2 by L-BFGS, for all decays together.

    The last column, the bias, is free. The curvature in W is at most X^T X / 2 n + decay (Boehning,
    1992): solving in the coordinates where that bound is the identity, few steps are enough however
    correlated the features are. With fewer samples than features, W lies in the samples' span.
    """
    span = None
    if len(x) < x.shape[1]:
        span, triangle = torch.linalg.qr(x.T)
        x = triangle.T.contiguous()
    decay = x.new_tensor(list(decays)).view(-1, 1, 1)
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    factors = torch.linalg.cholesky(x.T @ x / (2 * len(x)) + decay * identity)
    weights = x.new_zeros(len(decay), int(y.max()) + 1, x.shape[1] + 1, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights], max_iter=100, tolerance_change=1e-6, line_search_fn="strong_wolfe"
    )
    target = y.expand(len(decay), -1)

    def own() -> Tensor:
        inner = torch.linalg.solve_triangular(factors, weights[..., :-1], upper=False, left=False)
        return torch.cat([inner, weights[..., -1:]], 2)

    def loss() -> Tensor:
        solver.zero_grad()
        found = own()
        value = F.cross_entropy(_scores(x, found), target, reduction="sum") / len(x)
        value = value + (decay / 2 * found[..., :-1].square()).sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    found = own().detach()
    return found if span is None else torch.cat([found[..., :-1] @ span.T, found[..., -1:]], 2)


def _scores(x: Float[Tensor, "n d"], weights: Float[Tensor, "w k d+1"]) -> Float[Tensor, "w k n"]:
    """Return the scores of all fits in one pass; (k d)(d n) is six times faster than its mirror."""
    both = rearrange(weights, "w k d -> (w k) d")
    return (both[:, :-1] @ x.T + both[:, -1:]).view(*weights.shape[:2], -1)


def _best_decay(
    x: Tensor, y: Tensor, parts: list[Tensor], turns: int, decays: Sequence[float]
) -> float:
    """Return the decay that does best on each of `turns` parts in turn; the first of equals."""
    right = torch.zeros(len(decays))
    for turn, held in enumerate(parts[:turns]):
        kept = torch.cat(parts[:turn] + parts[turn + 1 :])
        predicted = _scores(x[held], fit_logistic(x[kept], y[kept], decays=decays)).argmax(1)
        right += (predicted == y[held]).sum(1).cpu()
    return decays[int(right.argmax())]


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
        weights = fit_logistic(fit_x[index], fit_y[index], decays=[1e-2])
        accuracies.append(float((_scores(x, weights)[0].argmax(0) == y).float().mean()))
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
    around = (z - means.unsqueeze(1)).flatten(0, 1)
    within = around.T @ around / (len(z) * (z.shape[1] - 1))
    within.diagonal().add_(delta)
    root = torch.linalg.cholesky(within)
    shown = torch.linalg.solve_triangular(root, centred.T, upper=False)  # W^-1/2 of the means
    gram = shown @ shown.T if len(z) > z.shape[2] else shown.T @ shown
    share = torch.linalg.eigvalsh(gram).clamp_min(0)
    return torch.special.entr(share / share.sum()).sum().exp().item()


def spearman(
    x: Sequence[float] | Float[np.ndarray, " n"], y: Sequence[float] | Float[np.ndarray, " n"]
) -> float:
    """Return the correlation of the ranks of two lists of numbers; equal ones share their mean."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]

    return float(np.corrcoef(ranks(np.asarray(x)), ranks(np.asarray(y)))[0, 1])
