"""The claims of LeJEPA (arXiv 2511.08544) about SIGReg, measured beside what theory predicts.

    python benchmarks/lejepa_theory.py

About two minutes on a CPU. Prints one table a claim and draws the figures of docs/sigreg.md.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from jepa_world.sigreg import (
    SIGReg,
    infinite_slice_sigreg,
    jarque_bera,
    moments,
    null_mean,
    orthogonal_directions,
    random_directions,
    scale_term,
    sigreg,
    sliced_statistic,
)

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
T = torch.linspace(0, 3, 17, dtype=torch.float64)
PHI = torch.exp(-T.square() / 2)
WEIGHTS = torch.full_like(T, 2 * 3 / 16) * PHI
WEIGHTS[[0, -1]] /= 2


def main() -> None:
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    FIGURES.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    for claim in (
        null_mean_is_constant,
        isotropy_is_best_for_linear_probes,
        gradient_is_bounded,
        few_resampled_slices_do,
        gradient_vanishes_at_collapse,
        minibatch_bias_can_be_removed,
        orthogonal_slices_are_less_noisy,
    ):
        claim()
    print(f"\n{time.perf_counter() - start:.0f} s; figures are in {FIGURES}")


def null_mean_is_constant() -> None:
    """Gaussian data has SIGReg sum_k w_k (1 - phi_k^2), whatever n and d are."""
    table("null mean", "n", "d", "measured", "standard error", "predicted")
    sizes, measured, errors = (16, 64, 256, 1024), [], []
    for n in sizes:
        values = torch.stack([SIGReg(slices=16)(torch.randn(n, 64), step) for step in range(2000)])
        measured.append(values.mean().item())
        errors.append(values.std().item() / len(values) ** 0.5)
        row(n, 64, measured[-1], errors[-1], null_mean())
    with figure("null_mean", "samples n", "SIGReg of N(0, I) samples") as axes:
        axes.errorbar(sizes, measured, [2 * e for e in errors], fmt="o", label="measured, 2 s.e.")
        axes.axhline(null_mean(), color="k", ls="--", label="predicted 1.0525")
        axes.set_xscale("log", base=2)
        axes.set_ylim(0.9, 1.2)


def isotropy_is_best_for_linear_probes() -> None:
    """At equal trace, a probe's variance and bias grow with the covariance's condition number."""
    columns = ("condition", "OLS variance", "predicted", "ridge bias^2", "predicted")
    table("linear probe, n 256, d 32, trace 32, ridge 32", *columns)
    n, dim, ridge, trials = 256, 32, 32.0, 200
    conditions, results = (1, 4, 16, 64, 256), []
    for condition in conditions:
        spectrum = torch.logspace(0, 1, dim, base=condition, dtype=torch.float64)
        spectrum *= dim / spectrum.sum()
        variance = bias = 0.0
        for _ in range(trials):
            z = torch.randn(n, dim, dtype=torch.float64) * spectrum.sqrt()
            gram = torch.linalg.eigvalsh(z.T @ z)
            variance += (1 / gram).sum().item() / trials
            bias += (ridge / (gram + ridge)).square().mean().item() / trials
        predicted_variance = (1 / spectrum).sum().item() / (n - dim - 1)
        shrink = effective_ridge(spectrum, n, ridge)
        predicted_bias = ridge_bias(spectrum, n, shrink)
        results.append((variance, predicted_variance, bias, predicted_bias))
        row(condition, *results[-1])
    with figure("linear_probe", "condition number of the covariance", "over isotropic") as axes:
        for column, label in enumerate(("OLS variance", "predicted", "ridge bias²", "predicted")):
            ratios = [r[column] / results[0][column] for r in results]
            axes.plot(conditions, ratios, "--k" if column % 2 else "o", label=label)
        axes.set_xscale("log", base=4)
        axes.set_yscale("log")


def effective_ridge(spectrum: Tensor, n: int, ridge: float) -> float:
    """Solve k = ridge / n + k / n sum_j s_j / (s_j + k): random features act as this much ridge."""
    k = ridge / n
    for _ in range(200):
        k = ridge / n + k / n * (spectrum / (spectrum + k)).sum().item()
    return k


def ridge_bias(spectrum: Tensor, n: int, k: float) -> float:
    """Return E |ridge (Z'Z + ridge)^-1|^2 / d at large n and d.

    With E tr ridge (Z'Z + ridge)^-1 = sum_j k / (s_j + k), the square is f - ridge df/dridge.
    """
    step = 1e-4
    ridge = n * k - k * (spectrum / (spectrum + k)).sum().item()
    f = [
        (kk / (spectrum + kk)).mean().item()
        for kk in (effective_ridge(spectrum, n, ridge * (1 + s)) for s in (-step, 0, step))
    ]
    return f[1] - (f[2] - f[0]) / (2 * step)


def gradient_is_bounded() -> None:
    """One outlier moves Epps-Pulley by a bounded amount, moment tests without limit (theorem 4)."""
    bound = 2 * (WEIGHTS * T * (1 + PHI)).sum().item()
    columns = ("outlier", "Epps-Pulley", "bound", "Jarque-Bera", "moments")
    table("largest gradient of a sample, n 256, one outlier", *columns)
    clean, direction = torch.randn(256, 1, dtype=torch.float64), torch.ones(1, 1).double()
    statistics: dict[str, Callable[[Tensor], Tensor]] = {
        "Epps-Pulley": lambda z: sigreg(z, direction),
        "Jarque-Bera": lambda z: sliced_statistic(z, direction, jarque_bera),
        "moments": lambda z: sliced_statistic(z, direction, moments),
    }
    factors, curves = (1, 3, 10, 30, 100, 300, 1000), []
    for factor in factors:
        z = clean.clone()
        z[0] = factor * 2.0
        z.requires_grad_()
        curves.append([gradient(f, z).abs().max().item() for f in statistics.values()])
        row(2 * factor, curves[-1][0], bound, *curves[-1][1:])
    with figure("outlier", "one sample at", "largest gradient of a sample") as axes:
        for index, name in enumerate(statistics):
            axes.loglog([2 * f for f in factors], [c[index] for c in curves], "o-", label=name)
        axes.axhline(bound, color="k", ls="--", label="bound")


def few_resampled_slices_do() -> None:
    """Slices redrawn at every step cover the sphere, fixed ones leave gaps in it."""
    table("256 points in R^64, 400 Adam steps", "slices", "resampled", "fixed")
    counts, curves = (16, 64, 256, 1024), {"resampled": [], "fixed": []}
    for count in counts:
        curves["resampled"].append(optimise(count, lambda step: step) if count < 1024 else None)
        curves["fixed"].append(optimise(count, lambda step: 0))
        row(count, *(curve[-1] for curve in curves.values()))
    with figure("resampled_slices", "slices a step", "SIGReg on held-out slices") as axes:
        for name, curve in curves.items():
            pairs = [(c, v) for c, v in zip(counts, curve, strict=True) if v is not None]
            axes.plot(*zip(*pairs, strict=True), "o-", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.axhline(null_mean(), color="k", ls="--", label="Gaussian samples")


def optimise(slices: int, slice_step: Callable[[int], int]) -> float:
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(256, 64, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    loss = SIGReg(slices=slices)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        optimizer.zero_grad()
        loss(z, slice_step(step)).backward()
        optimizer.step()
    return sigreg(z.detach(), random_directions(64, 4096, seed=1, step=0)).item()


def gradient_vanishes_at_collapse() -> None:
    """The force falls with the std of collapsing features, that of the scale term does not."""
    n, dim = 256, 64
    table(
        f"gradient norm, n {n}, d {dim}", "std", "SIGReg", "at small std", "scale term", "predicted"
    )
    stiffness = 2 * (WEIGHTS * T.square() * (1 - PHI)).sum().item()
    stds, curves = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001), []
    noise = torch.randn(n, dim, dtype=torch.float64)
    noise = (noise - noise.mean(0)) / noise.std(0, correction=0)
    for std in stds:
        z = (std * noise).requires_grad_()
        norms = [gradient(f, z).norm().item() for f in (infinite_slice_sigreg, scale_term)]
        unit = (n / dim) ** 0.5
        curves.append((norms[0], stiffness * std * unit, norms[1], 2 * (1 - std) * unit))
        row(std, *curves[-1])
    with figure("collapse", "standard deviation of the features", "gradient norm") as axes:
        axes.loglog(stds, [c[0] for c in curves], "o-", label="SIGReg")
        axes.loglog(stds, [c[1] for c in curves], "--k", label="predicted, small std")
        axes.loglog(stds[1:], [c[2] for c in curves[1:]], "s-", label="scale term")
        axes.loglog(stds[1:], [c[3] for c in curves[1:]], ":k", label="predicted")


def minibatch_bias_can_be_removed() -> None:
    """E T / N is biased by sum_k w_k (1 - |phi_k|^2) / N (theorem 6); the U-statistic is not."""
    std, dim = 0.5, 32
    phi = torch.exp(-(std * T).square() / 2)
    limit = (WEIGHTS * (phi - PHI).square()).sum().item()
    table("SIGReg / N of N(0, 0.25 I)", "N", "biased", "predicted", "unbiased", "predicted")
    sizes, curves = (4, 8, 16, 32, 64, 128), []
    for n in sizes:
        z = std * torch.randn(8192 // n, n, dim)
        means = [
            torch.stack([SIGReg(slices=64, unbiased=u)(z, step) for step in range(10)]).mean() / n
            for u in (False, True)
        ]
        predicted = limit + (WEIGHTS * (1 - phi.square())).sum().item() / n
        curves.append((means[0].item(), predicted, means[1].item(), limit))
        row(n, *curves[-1])
    with figure("minibatch_bias", "batch size N", "SIGReg / N") as axes:
        for column, (style, label) in enumerate(
            [("o", "biased"), ("--k", "predicted"), ("s", "unbiased"), (":k", "infinite batch")]
        ):
            axes.plot(sizes, [c[column] for c in curves], style, label=label)
        axes.set_xscale("log", base=2)


def orthogonal_slices_are_less_noisy() -> None:
    """Noise of the gradient falls as 1 / sqrt(slices); orthogonal blocks cancel most of it."""
    n, dim = 256, 128
    columns = ("features", "slices", "independent", "predicted", "orthogonal")
    table("relative noise of the gradient, n 256, d 128", *columns)
    features = {
        "near Gaussian": torch.randn(n, dim),
        "anisotropic": 0.5 * torch.randn(n, dim) * torch.logspace(0, -1.5, dim),
    }
    counts = (64, 128, 256, 512)
    curves: dict[str, list[float]] = {}
    for name, z in features.items():
        z.requires_grad_()
        exact = gradient(infinite_slice_sigreg, z)
        for count in counts:
            noises = [
                slice_noise(z, exact, count, draw)
                for draw in (random_directions, orthogonal_directions)
            ]
            for kind, noise in zip(("independent", "orthogonal"), noises, strict=True):
                curves.setdefault(f"{name}, {kind}", []).append(noise)
            predicted = curves[f"{name}, independent"][0] * (counts[0] / count) ** 0.5
            row(name, count, noises[0], predicted, noises[1])
    with figure("orthogonal_slices", "slices", "relative noise of the gradient") as axes:
        for name, curve in curves.items():
            style = "o-" if "independent" in name else "s--"
            axes.plot(counts, curve, style, label=name, color=f"C{'anisotropic' in name:d}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylim(0.001, 4)


def slice_noise(z: Tensor, exact: Tensor, slices: int, draw: Callable[..., Tensor]) -> float:
    squares = [
        (gradient(lambda x, s=step: sigreg(x, draw(x.shape[1], slices, seed=0, step=s)), z) - exact)
        .square()
        .sum()
        for step in range(20)
    ]
    return (torch.stack(squares).mean().sqrt() / exact.norm()).item()


def gradient(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    return torch.autograd.grad(loss(z), z)[0]


@contextmanager
def figure(name: str, xlabel: str, ylabel: str) -> Iterator[Axes]:
    """Save what is drawn on the axes as one small picture."""
    picture, axes = plt.subplots(figsize=(4.4, 3), layout="constrained")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    yield axes
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    picture.savefig(FIGURES / f"{name}.png", dpi=90)
    plt.close(picture)


def table(title: str, *columns: str) -> None:
    print(f"\n{title}\n" + " ".join(f"{c:>15}" for c in columns))


def row(*cells: float | str | None) -> None:
    def text(cell: float | str | None) -> str:
        return "-" if cell is None else cell if isinstance(cell, str) else f"{cell:.4g}"

    print(" ".join(f"{text(c):>15}" for c in cells), flush=True)


if __name__ == "__main__":
    main()
