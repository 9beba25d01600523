"""SIGReg: make features an isotropic Gaussian, in place of a teacher, by testing random 1-d slices.

For a unit vector a and samples z_1 .. z_N the Epps-Pulley statistic of the slice p_n = a . z_n is

    T(a) = N * integral w(t) |mean_n exp(i t p_n) - phi(t)|^2 dt,    w(t) = phi(t) = exp(-t^2 / 2)

and SIGReg is the mean of T over slices (LeJEPA, arXiv 2511.08544, section 4).
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from jepa_world.nn import several_processes, sum_over_processes

SliceStatistic = Callable[[Float[Tensor, "*g n m"]], Float[Tensor, "*g m"]]
"""A test of N samples against N(0, 1) on every slice, samples on the axis before last."""

_NO_SAMPLES = "SIGReg of no samples: z is {}, expected (n d) or (g n d) with n > 0"
_SLICES = 128  # projected in one matrix product
_NEAR = 5  # 1, cos x, sin x, cos 2x, sin 2x
_RUN = 512  # samples added up in one go: longer float32 sums lose a digit
_CPU_BLOCK = 1 << 16  # angles at a time: 18 buffers of 256 KB stay in the cache
_GPU_BLOCK = 1 << 22  # angles at a time: fewer, larger kernels


class SIGReg(nn.Module):
    """Regularise features towards N(0, I): zero mean, unit variance, uncorrelated, Gaussian.

    The slices of a call are a function of (seed, step) alone, drawn on the CPU in float32: every
    process and every device has the same ones, and a resumed run draws what the uninterrupted run
    would have drawn, with nothing to save or synchronise.

    Args:
        slices: random directions a call.
        knots: points of the quadrature on [0, t_max]; the integrand is even.
        t_max: end of the integration domain. The rule of the paper's text, 17 points on the line
            [-5, 5], is `knots=9, t_max=5.0`.
        seed: of the slices.
        orthogonal: draw slices in orthogonal blocks of d (arXiv 1903.03784): less slice noise, one
            QR decomposition a block.
        unbiased: leave out the pairs of a sample with itself (U-statistic): Gaussian data has mean
            0 and the minibatch bias of arXiv 2511.08544, theorem 6, is gone; can be negative.
        scale_weight: times `scale_term`, which still pushes when features have collapsed.
        statistic: another test of the slices, such as `anderson_darling`, in place of Epps-Pulley;
            `knots`, `t_max` and `unbiased` have no say then.

    Example:
        >>> import torch
        >>> z = torch.randn(512, 64, requires_grad=True)
        >>> loss = SIGReg(slices=256)(z, step=0)
        >>> loss.backward()
    """

    def __init__(
        self,
        *,
        slices: int = 1024,
        knots: int = 17,
        t_max: float = 3.0,
        seed: int = 0,
        orthogonal: bool = False,
        unbiased: bool = False,
        scale_weight: float = 0.0,
        statistic: SliceStatistic | None = None,
    ) -> None:
        super().__init__()
        self.slices = slices
        self.knots = knots
        self.t_max = t_max
        self.seed = seed
        self.draw = orthogonal_directions if orthogonal else random_directions
        self.unbiased = unbiased
        self.scale_weight = scale_weight
        self.statistic = statistic

    def forward(self, z: Float[Tensor, "*g n d"], step: int) -> Float[Tensor, ""]:
        """Return the mean statistic of `z`, `(n d)` or `(g n d)`, over slices and groups."""
        directions = self.draw(z.shape[-1], self.slices, seed=self.seed, step=step)
        if self.statistic is None:
            rule = {"knots": self.knots, "t_max": self.t_max, "unbiased": self.unbiased}
            loss = sigreg(z, directions, **rule)
        else:
            loss = sliced_statistic(z, directions, self.statistic)
        return loss + self.scale_weight * scale_term(z) if self.scale_weight else loss


def sigreg(
    z: Float[Tensor, "*g n d"],
    directions: Float[Tensor, "d m"],
    *,
    knots: int = 17,
    t_max: float = 3.0,
    unbiased: bool = False,
    across_processes: bool = True,
) -> Float[Tensor, ""]:
    """Return the mean Epps-Pulley statistic of `z` along unit `directions` (no gradient for them).

    Groups are tested one by one and averaged. With several processes the samples of all of them are
    tested together (N counts them all) unless `across_processes` is false; uneven batches are
    exact. Computed in float32, or float64 for float64 input, whatever autocast says.

    Raises:
        ValueError: no samples, or a sample that is not finite.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    with torch.autocast(z.device.type, enabled=False):
        grouped = z.to(dtype).reshape(math.prod(z.shape[:-2]), *z.shape[-2:])
        shared = across_processes and several_processes()
        rule = _rule(knots, t_max, dtype, z.device)
        directions = directions.detach().to(z.device, dtype)
        loss = _EppsPulley.apply(grouped, directions, rule, unbiased, shared)
    _check_finite(loss, z)  # type: ignore[arg-type]
    return loss  # type: ignore[return-value]


def null_mean(*, knots: int = 17, t_max: float = 3.0, unbiased: bool = False) -> float:
    """Return the mean SIGReg of exact N(0, I) samples, at any batch size: 1.0525 by default."""
    rule = _rule(knots, t_max, torch.float64, torch.device("cpu"))
    return 0.0 if unbiased else float((rule.weights * (1 - rule.phi.square())).sum())


def random_directions(dim: int, slices: int, *, seed: int, step: int) -> Float[Tensor, "d m"]:
    """Draw independent unit directions on the CPU, a function of (seed, step) alone."""
    mixed = int(np.random.SeedSequence(seed, spawn_key=(step,)).generate_state(1)[0])
    directions = torch.randn(slices, dim, generator=torch.Generator().manual_seed(mixed))
    return (directions / directions.norm(dim=1, keepdim=True)).T


def orthogonal_directions(dim: int, slices: int, *, seed: int, step: int) -> Float[Tensor, "d m"]:
    """Draw unit directions in orthogonal blocks of `dim`, each alone uniform on the sphere.

    The Q of a Gaussian matrix is uniform over rotations up to the signs of its columns, and the
    statistic's distribution does not depend on them (Rowland et al., arXiv 1903.03784).
    """
    gaussian = random_directions(dim, slices, seed=seed, step=step)
    return torch.cat([torch.linalg.qr(block).Q for block in gaussian.split(dim, dim=1)], dim=1)


def scale_term(z: Float[Tensor, "*g n d"]) -> Float[Tensor, ""]:
    """Return N * mean_j (1 - std_j)^2, whose gradient does not vanish as features collapse.

    Source: VISReg, arXiv 2606.02572, times N so that it is of order one (1/2) for Gaussian data at
    any N, like the statistic. Exact over processes.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        count = sum_over_processes(z.new_tensor(float(z.shape[-2])))
        mean = sum_over_processes(z.sum(-2, keepdim=True)) / count
        variance = sum_over_processes((z - mean).square().sum(-2)) / count
        return count * (1 - (variance + 1e-12).sqrt()).square().mean()


def sliced_statistic(
    z: Float[Tensor, "*g n d"], directions: Float[Tensor, "d m"], statistic: SliceStatistic
) -> Float[Tensor, ""]:
    """Return the mean over slices and groups of any statistic, over the samples of all processes.

    Order statistics need all samples in one place, so every process gathers `z`.
    """
    with torch.autocast(z.device.type, enabled=False):
        dtype = torch.promote_types(z.dtype, torch.float32)
        everyone = _gather(z.to(dtype))
        if everyone.shape[-2] == 0:
            raise ValueError(_NO_SAMPLES.format(tuple(z.shape)))
        loss = statistic(everyone @ directions.to(z.device, dtype)).mean()
    _check_finite(loss, z)
    return loss


def cramer_von_mises(p: Float[Tensor, "*g n m"]) -> Float[Tensor, "*g m"]:
    """Return W^2 = 1 / 12 n + sum_i (Phi(p_(i)) - (2 i - 1) / 2 n)^2; mean 1/6 for N(0, 1).

    Source: Cramer (1928) and von Mises (1928), in the form of Stephens (1974).
    """
    n = p.shape[-2]
    uniform = torch.special.ndtr(p.sort(dim=-2).values)
    return 1 / (12 * n) + (uniform - _midpoints(p)).square().sum(-2)


def anderson_darling(p: Float[Tensor, "*g n m"]) -> Float[Tensor, "*g m"]:
    """Return A^2 = -n - sum_i (2 i - 1) / n log(Phi(p_(i)) Phi(-p_(n+1-i))); mean 1 for N(0, 1).

    Source: Anderson and Darling (1952): the Cramer-von Mises integral, the tails weighted up.
    """
    ordered = p.sort(dim=-2).values
    logs = torch.special.log_ndtr(ordered) + torch.special.log_ndtr(-ordered.flip(-2))
    return -p.shape[-2] - 2 * (_midpoints(p) * logs).sum(-2)


def watson(p: Float[Tensor, "*g n m"]) -> Float[Tensor, "*g m"]:
    """Return U^2 = W^2 - n (mean Phi(p) - 1/2)^2, blind to a shift of Phi(p); mean about 1/12.

    Source: Watson (1961).
    """
    centre = torch.special.ndtr(p).mean(-2) - 0.5
    return cramer_von_mises(p) - p.shape[-2] * centre.square()


def jarque_bera(p: Float[Tensor, "*g n m"]) -> Float[Tensor, "*g m"]:
    """Return n (mean^2 / var + (var - 1)^2 / 2 + skewness^2 / 6 + (kurtosis - 3)^2 / 24); mean 4.

    Source: Jarque and Bera (1980) for the last two terms, which do not see location and scale; the
    first two, as in the extended test of arXiv 2511.08544, do.
    """
    mean = p.mean(-2, keepdim=True)
    variance = (p - mean).square().mean(-2)
    unit = (p - mean) / variance.unsqueeze(-2).sqrt()
    skewness, kurtosis = unit.pow(3).mean(-2), unit.pow(4).mean(-2)
    location_scale = mean.squeeze(-2).square() / variance + (variance - 1).square() / 2
    return p.shape[-2] * (location_scale + skewness.square() / 6 + (kurtosis - 3).square() / 24)


def moments(p: Float[Tensor, "*g n m"]) -> Float[Tensor, "*g m"]:
    """Return n sum_k (mean p^k - E x^k)^2 / var x^k over k = 1 .. 4, x ~ N(0, 1); mean 4."""
    powers = torch.stack([p, p.square(), p.pow(3), p.pow(4)]).mean(-2)
    expected, variance = p.new_tensor([0.0, 1.0, 0.0, 3.0]), p.new_tensor([1.0, 2.0, 15.0, 96.0])
    shape = (4,) + (1,) * (powers.dim() - 1)
    return p.shape[-2] * ((powers - expected.view(shape)).square() / variance.view(shape)).sum(0)


def infinite_slice_sigreg(
    z: Float[Tensor, "*g n d"], *, knots: int = 17, t_max: float = 3.0, unbiased: bool = False
) -> Float[Tensor, ""]:
    """Return SIGReg's limit at infinitely many slices, in closed form: O(n^2 d), for small n.

    The mean of cos(t a . x) over unit vectors a is 0F1(; d/2; -t^2 |x|^2 / 4), so the limit is a
    maximum mean discrepancy with that kernel, summed over the knots (KerJEPA, arXiv 2512.19605).
    It is evaluated by a Gauss-Gegenbauer quadrature, which no distance makes overflow.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    grouped = _gather(z.to(dtype).reshape(math.prod(z.shape[:-2]), *z.shape[-2:]))
    _, n, dim = grouped.shape
    rule = _rule(knots, t_max, dtype, z.device)
    t = rule.multiples * rule.spacing
    square = grouped.square().sum(-1)
    apart = square[:, :, None] + square[:, None] - 2 * grouped @ grouped.mT
    pairs = _sphere_average(apart, rule.weights, t, dim).sum((-2, -1))
    itself = n * rule.weights.sum()
    pairs = (pairs - itself) / (n - 1) if unbiased else pairs / n
    cross = _sphere_average(square, rule.weights * rule.phi, t, dim).sum(-1)
    return (pairs - 2 * cross + n * (rule.weights * rule.phi.square()).sum()).mean()


class _EppsPulley(torch.autograd.Function):
    """Value and gradient in one sweep over blocks of slices, while a block is in the cache.

    A slice's value needs nothing of other slices, so its gradient is ready as soon as its sums are:
    projections are neither stored nor computed twice. Several processes sweep for the sums first,
    add them up in one collective, and sweep again for the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, directions: Tensor, rule: "_Rule", unbiased: bool, shared: bool
    ) -> Tensor:
        flat = rearrange(z, "g n d -> (g n) d")
        scaled = directions.T.contiguous() * rule.spacing  # projections come out as angles dt * p
        waves = _Waves(rule, z)
        totals = _sums_of_all(waves, flat, scaled) if shared else None
        grad = torch.zeros_like(flat) if ctx.needs_input_grad[0] else None
        values: list[Tensor] = []
        for block in scaled.split(_SLICES):
            angles = waves.project(block, flat)
            for angle in angles.split(waves.rows):
                waves.set_angle(angle)
                sums = waves.sums() if totals is None else totals[len(values)]
                value, slope = _value_and_slope(sums, rule, unbiased)
                values.append(value)
                if grad is not None:
                    waves.polynomial(slope, out=angle)
            if grad is not None:
                grad.addmm_(angles.view(len(block), len(flat)).T, block)
        ctx.shared = shared
        statistics = torch.cat(values)
        if grad is not None:
            ctx.save_for_backward(grad.div_(len(statistics)).view_as(z))
        return statistics.mean()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        outer = sum_over_processes(grads[0]) if ctx.shared else grads[0]
        return ctx.saved_tensors[0] * outer, None, None, None, None


def _sums_of_all(waves: "_Waves", flat: Tensor, scaled: Tensor) -> tuple[Tensor, ...]:
    """Return the sums over the samples of all processes, part by part in the order of the sweep."""
    local: list[Tensor] = []
    for block in scaled.split(_SLICES):
        for angle in waves.project(block, flat).split(waves.rows):
            waves.set_angle(angle)
            local.append(waves.sums())
    return sum_over_processes(torch.cat(local)).split([len(part) for part in local])


def _value_and_slope(
    sums: Float[Tensor, "r 2 k"], rule: "_Rule", unbiased: bool
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r 2 k"]]:
    """Return T of every row and the waves' coefficients of dT/dp, in units of 1 / dt.

    U-statistic: T - N / (N - 1) sum_k w_k (1 - |psi_k|^2), psi the mean of exp(i t p).
    """
    count = sums[:, :1, :1]  # cos(0 p) summed over samples
    psi = sums / count
    error = psi - rule.target
    value = count[:, 0, 0] * (error.square().sum(1) @ rule.weights)
    if unbiased:
        value = value - (1 - psi.square().sum(1)) @ rule.weights * (count / (count - 1))[:, 0, 0]
        error = error + psi / (count - 1)
    force = 2 * rule.weights * rule.multiples * error  # dT/dsums times k
    return value, torch.stack([force[:, 1], -force[:, 0]], dim=1)


class _Waves:
    """Sums and polynomials of cos(k x) and sin(k x), k = 0 .. knots - 1, in few passes over memory.

    With k = 5 j + a and |a| <= 2, exp(i k x) = exp(i a x) exp(5 i j x): every wave is a sum of
    products of a `near` one (1, cos x, sin x, cos 2x, sin 2x) and a `far` one (1, cos 5x, sin 5x,
    ...). The sums over samples of all products are one small matrix product a slice, and so is the
    larger part of a trigonometric polynomial.
    """

    def __init__(self, rule: "_Rule", z: Float[Tensor, "g n d"]) -> None:
        groups, n, _ = z.shape
        self.rule = rule
        block = _CPU_BLOCK if z.device.type == "cpu" else _GPU_BLOCK
        self.rows = max(1, min(block // max(1, n), _SLICES * groups))
        self.angles = z.new_empty(_SLICES * groups, n)
        self.near = z.new_ones(self.rows, _NEAR, n)
        self.far = z.new_ones(self.rows, rule.table.shape[-1] // _NEAR, n)
        self.spare = z.new_empty(self.rows, _NEAR, n)

    def project(
        self, block: Float[Tensor, "m d"], flat: Float[Tensor, "gn d"]
    ) -> Float[Tensor, "mg n"]:
        """Return the angles of a block of slices, in a buffer that the next call reuses."""
        angles = self.angles[: len(block) * len(self.angles) // _SLICES]
        torch.mm(block, flat.T, out=angles.view(len(block), len(flat)))
        return angles

    def set_angle(self, x: Float[Tensor, "r n"]) -> None:
        """Fill `near` and `far`: two transcendental calls, then rotations."""
        near, far, spare = (
            buffer[: len(x)].unbind(1) for buffer in (self.near, self.far, self.spare)
        )
        torch.cos(x, out=near[1])
        torch.sin(x, out=near[2])
        _double(near[1:3], out=near[3:5])
        if len(far) > 1:
            _double(near[3:5], out=spare[:2])
            _rotate(spare[:2], near[1:3], out=far[1:3])
        if len(far) > 3:
            _double(far[1:3], out=far[3:5])
        for j in range(5, len(far), 2):
            _rotate(far[j - 2 : j], far[1:3], out=far[j : j + 2])
        self.filled = len(x)

    def sums(self) -> Float[Tensor, "r 2 k"]:
        """Return the sums over samples of cos(k x) and sin(k x), accumulated in short runs."""
        near, far = self.near[: self.filled], self.far[: self.filled]
        products = near.new_zeros(len(near), near.shape[1], far.shape[1])
        for start in range(0, near.shape[-1], _RUN):
            run = slice(start, start + _RUN)
            products.baddbmm_(near[..., run], far[..., run].mT)
        return (products.flatten(1) @ self.rule.table.T).unflatten(1, (2, -1))

    def polynomial(self, coefficients: Float[Tensor, "r 2 k"], out: Float[Tensor, "r n"]) -> None:
        """Evaluate sum_k c_k cos(k x) + s_k sin(k x) into `out`."""
        near, far, spare = (buffer[: self.filled] for buffer in (self.near, self.far, self.spare))
        products = (coefficients.flatten(1) @ self.rule.table).unflatten(1, (_NEAR, -1))
        torch.bmm(products, far, out=spare)
        torch.addcmul(spare[:, 0], spare[:, 1], near[:, 1], out=out)
        for a in range(2, _NEAR):
            out.addcmul_(spare[:, a], near[:, a])


def _double(x: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
    """Write cos and sin of twice an angle; 1 - 2 sin^2 does not amplify the cosine's rounding."""
    torch.mul(x[1], x[1], out=out[0]).mul_(-2).add_(1)
    torch.mul(x[0], x[1], out=out[1]).mul_(2)


def _rotate(x: tuple[Tensor, ...], y: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
    """Write cos and sin of the sum of two angles, each given as (cos, sin)."""
    torch.mul(x[0], y[0], out=out[0]).addcmul_(x[1], y[1], value=-1)
    torch.mul(x[0], y[1], out=out[1]).addcmul_(x[1], y[0])


class _Rule(NamedTuple):
    """Knots t_k = k dt, phi(t_k), (phi, 0), trapezoid weights times window, and product table."""

    spacing: float
    multiples: Float[Tensor, " k"]
    phi: Float[Tensor, " k"]
    target: Float[Tensor, "2 k"]
    weights: Float[Tensor, " k"]
    table: Float[Tensor, "2k ab"]


@lru_cache(maxsize=32)
def _rule(knots: int, t_max: float, dtype: torch.dtype, device: torch.device) -> _Rule:
    """Return the quadrature of an even integrand on [0, t_max]."""
    if knots < 2:
        raise ValueError(f"knots is {knots}, expected at least 2: a trapezoid rule has two ends")
    spacing = t_max / (knots - 1)
    multiples = torch.arange(knots, dtype=torch.float64)
    phi = torch.exp(-(multiples * spacing).square() / 2)
    weights = 2 * spacing * phi
    weights[[0, -1]] /= 2
    tensors = (multiples, phi, torch.stack([phi, 0 * phi]), weights, _product_table(knots))
    return _Rule(spacing, *(x.to(device, dtype) for x in tensors))


def _product_table(knots: int) -> Float[Tensor, "2k ab"]:
    """Return cos(k x), then sin(k x), as combinations of products near x far: entries 0 and +-1."""
    stride = _NEAR
    reach = stride // 2
    far = 2 * max(0, -(-(knots - 1 - reach) // stride)) + 1
    table = torch.zeros(2, knots, _NEAR, far, dtype=torch.float64)
    for k in range(knots):
        j, a = divmod(k + reach, stride)
        a -= reach
        cos_a, sin_a = max(0, 2 * abs(a) - 1), 2 * abs(a)
        cos_j, sin_j = max(0, 2 * j - 1), 2 * j
        table[0, k, cos_a, cos_j] = 1
        if a and j:
            table[0, k, sin_a, sin_j] = -1 if a > 0 else 1
        if j:
            table[1, k, cos_a, sin_j] = 1
        if a:
            table[1, k, sin_a, cos_j] = 1 if a > 0 else -1
    return rearrange(table, "wave k a b -> (wave k) (a b)")


def _midpoints(p: Float[Tensor, "*g n m"]) -> Float[Tensor, "n 1"]:
    n = p.shape[-2]
    return (torch.arange(n, device=p.device, dtype=p.dtype).unsqueeze(-1) + 0.5) / n


def _sphere_average(
    square: Float[Tensor, "*s"], weights: Float[Tensor, " k"], t: Float[Tensor, " k"], dim: int
) -> Float[Tensor, "*s"]:
    """Return sum_k w_k E cos(t_k a . x) over unit vectors a, given |x|^2."""
    nodes, mass = (torch.from_numpy(x).to(square) for x in _gegenbauer(dim))
    waves = torch.cos(
        square.clamp_min(1e-12).sqrt().unsqueeze(-1) * torch.outer(t, nodes).flatten()
    )
    return waves @ torch.outer(weights, mass).flatten()


@lru_cache(maxsize=32)
def _gegenbauer(dim: int, order: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Return the Gauss rule of one coordinate of a uniform unit vector (Golub and Welsch, 1969)."""
    j, half = np.arange(2, order), dim / 2 - 1
    squared = j * (j + 2 * half - 1) / (4 * (j + half) * (j + half - 1))
    side = np.sqrt(np.concatenate([[1 / dim], squared]))
    nodes, vectors = np.linalg.eigh(np.diag(side, 1) + np.diag(side, -1))
    return nodes, vectors[0] ** 2


def _gather(z: Float[Tensor, "*g n d"]) -> Float[Tensor, "*g n_all d"]:
    """Return the samples of all processes, differentiably, in the order of their ranks."""
    if not several_processes():
        return z
    counts = torch.zeros(dist.get_world_size(), dtype=torch.long, device=z.device)
    counts[dist.get_rank()] = z.shape[-2]
    sizes = sum_over_processes(counts).tolist()
    before, after = sum(sizes[: dist.get_rank()]), sum(sizes[dist.get_rank() + 1 :])
    return sum_over_processes(nn.functional.pad(z, (0, 0, before, after)))


def _check_finite(loss: Tensor, z: Tensor) -> None:
    """Raise in words if the loss is not a number; looking at one number keeps the check cheap."""
    if bool(loss.isfinite()):
        return
    if z.shape[-2] == 0 and not several_processes():
        raise ValueError(
            f"SIGReg of no samples: z is {tuple(z.shape)}, expected (n d) or (g n d), n > 0"
        )
    bad = (~z.detach().isfinite().all(-1)).nonzero().tolist()
    if bad:
        row = bad[0][0] if len(bad[0]) == 1 else tuple(bad[0])
        raise ValueError(
            f"SIGReg of features that are not finite: row {row} of z {tuple(z.shape)} is the first "
            f"of {len(bad)}; training has diverged or the input holds NaN"
        )
    raise ValueError(
        f"SIGReg is {float(loss)!r} though the {z.shape[-2]} samples here are finite: another "
        "process holds a bad row, there are too few samples, or features are too large"
    )
