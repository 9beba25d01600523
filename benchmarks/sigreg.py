"""Time and memory of SIGReg, forward and backward, against the plain and the compiled definition.

    python benchmarks/sigreg.py

One CPU thread; candidates take turns and each keeps its best CPU time, so that the ratios of one
run can be trusted on a busy machine. Memory is the peak resident size above the inputs, the
gradient included (Linux). The floor is the two matrix products that no method avoids: projecting
the samples and carrying the gradient back. Takes some minutes, most of them compiling.
"""

import ctypes
import gc
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from jepa_world.sigreg import random_directions, sigreg

SHAPES = (  # groups, n, d, slices
    (1, 256, 128, 256),
    (1, 512, 512, 1024),
    (1, 2048, 384, 1024),
    (1, 8192, 512, 1024),
    (16, 128, 256, 1024),
)
GROWTH_BASE = {"n": 2048, "d": 256, "slices": 512, "knots": 17}
ROUNDS = 5


def definition(z: Tensor, directions: Tensor, knots: int = 17, t_max: float = 3.0) -> Tensor:
    """The reference implementation of arXiv 2511.08544, algorithm 1, on [0, 3]."""
    t = torch.linspace(0, t_max, knots, dtype=z.dtype)
    spacing = t_max / (knots - 1)
    phi = torch.exp(-t.square() / 2)
    weights = torch.full_like(t, 2 * spacing)
    weights[0] = weights[-1] = spacing
    waves = (z @ directions).unsqueeze(-1) * t
    error = (waves.cos().mean(-3) - phi).square() + waves.sin().mean(-3).square()
    return ((error @ (weights * phi)) * z.shape[-2]).mean()


def forward_backward(loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def run(z: Tensor, directions: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        return torch.autograd.grad(loss(z, directions), z)[0]

    return run


def matmul_floor(z: Tensor, directions: Tensor) -> Tensor:
    flat = z.flatten(0, -2)
    return (flat @ directions) @ directions.T


def best_seconds(
    candidates: dict[str, Callable[[Tensor, Tensor], Tensor]], z: Tensor, directions: Tensor
) -> dict[str, float]:
    best = dict.fromkeys(candidates, math.inf)
    for run in candidates.values():
        run(z, directions)
    for _ in range(ROUNDS):
        for name, run in candidates.items():
            start = time.process_time()
            run(z, directions)
            best[name] = min(best[name], time.process_time() - start)
    return best


def peak_megabytes(run: Callable[[], Tensor]) -> float:
    if sys.platform != "linux":
        return math.nan
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the present size
    before = _resident("VmRSS")
    run()
    return (_resident("VmHWM") - before) / 1e6


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def compare(shape: tuple[int, int, int, int]) -> None:
    groups, n, dim, slices = shape
    z = torch.randn(groups, n, dim)
    directions = random_directions(dim, slices, seed=0, step=0)
    torch.compiler.reset()
    candidates = {
        "plain": forward_backward(definition),
        "compiled": forward_backward(torch.compile(definition, dynamic=False)),
        "ours": forward_backward(sigreg),
        "floor": matmul_floor,
    }
    seconds = best_seconds(candidates, z, directions)
    sizes = {
        name: peak_megabytes(lambda r=run: r(z, directions)) for name, run in candidates.items()
    }
    cells = [f"{seconds[name] * 1e3:8.1f} /{sizes[name]:6.1f}" for name in candidates]
    ratios = [seconds[name] / seconds["ours"] for name in ("plain", "compiled")]
    over = seconds["ours"] / seconds["floor"]
    print(
        f"{shape!s:22} {'  '.join(cells)}  {ratios[0]:5.1f}x {ratios[1]:5.2f}x {over:5.2f}x",
        flush=True,
    )


def exactness() -> None:
    z, directions = torch.randn(2048, 384), random_directions(384, 1024, seed=0, step=0)
    exact = z.double().requires_grad_()
    loss = definition(exact, directions.double())
    (exact_gradient,) = torch.autograd.grad(loss, exact)
    gradient = forward_backward(sigreg)(z, directions)
    relative = (gradient - exact_gradient).norm() / exact_gradient.norm()
    value = sigreg(z, directions).item() / loss.item() - 1
    print(f"against float64 at (2048, 384, 1024): loss {abs(value):.1e}, gradient {relative:.1e}")


def growth() -> None:
    print(
        f"\ngrowth of ours, CPU ms, from {GROWTH_BASE}; linear is 2 and 4 times, less what is fixed"
    )
    for axis in GROWTH_BASE:
        times = []
        for factor in (1, 2, 4):
            size = GROWTH_BASE | {axis: factor * GROWTH_BASE[axis]}
            z = torch.randn(size["n"], size["d"])
            directions = random_directions(size["d"], size["slices"], seed=0, step=0)
            run = forward_backward(lambda x, a, k=size["knots"]: sigreg(x, a, knots=k))
            times.append(best_seconds({"ours": run}, z, directions)["ours"] * 1e3)
        print(
            f"{axis:8} " + "  ".join(f"{t:7.1f} ({t / times[0]:.2f}x)" for t in times), flush=True
        )


def main() -> None:
    warnings.filterwarnings("ignore", module="torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("forward + backward: CPU ms / peak MB above the inputs; then times faster than plain")
    print("and than compiled, and ours over the floor")
    names = "  ".join(f"{name:>16}" for name in ("plain", "compiled", "ours", "floor"))
    print(f"{'(groups n d slices)':22} {names}")
    for shape in SHAPES:
        compare(shape)
    exactness()
    growth()


if __name__ == "__main__":
    main()
