"""Time and memory of a masked-prediction step: SIGReg against the EMA teacher, part by part.

    python benchmarks/masked_step.py
    python benchmarks/masked_step.py --recompute    # what --loop.recompute saves and costs

Encoder, predictor, masks and data are the same; both step an AdamW. Gradients are cut at the
latents, so that each part's forward and backward pass is timed by itself: context encoder, target
pass, predictor, SIGReg (of tokens with centring, and of the whole with its projector), optimiser
(with the moving average of the teacher). One CPU thread; the two forms take turns and each part
keeps its best CPU time. Memory is the peak resident size of a step above what lies there before it
(Linux).
"""

import argparse
import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_world.encoders.vit import ViTEncoder
from jepa_world.masking import Masks, MultiBlockMasks
from jepa_world.memory import recompute_blocks
from jepa_world.methods.ijepa import (
    IJEPA,
    DrawMasks,
    TeacherIJEPA,
    centre_positions,
    sigreg_of_tokens,
)
from jepa_world.methods.vjepa import MaskKind, tube_masks
from jepa_world.predictors.masked import CrossMaskedTransformer, MaskedTransformer
from jepa_world.sigreg import SIGReg

PARTS = ("masks", "context", "target", "predictor", "SIGReg", "optimiser")


class Recipe(NamedTuple):
    """Sizes of a run; for clips also the kind of mask, and the predictor beside SIGReg."""

    name: str
    image: int
    batch: int
    encoder: dict[str, Any]
    predictor: dict[str, int]
    slices: int
    rounds: int
    frames: int = 1
    masks: MaskKind | None = None
    ours: type[MaskedTransformer] | type[CrossMaskedTransformer] = MaskedTransformer


RECIPES = (
    Recipe(
        "tiny recipe: 28 px, patch 7, ViT 3 x 64, predictor 2 x 32, batch 128",
        28,
        128,
        {"patch": 7, "dim": 64, "depth": 3, "heads": 2},
        {"width": 32, "depth": 2, "heads": 1},
        64,
        60,
    ),
    Recipe(
        "ViT-S/16 at 224 px, predictor 6 x 384, batch 8",
        224,
        8,
        {"patch": 16, "dim": 384, "depth": 12, "heads": 6},
        {"width": 384, "depth": 6, "heads": 12},
        256,
        8,
    ),
)


class Clock:
    """CPU seconds between marks, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.last = time.process_time()

    def mark(self, part: str) -> None:
        """Add the time since the last mark to a part."""
        now = time.process_time()
        self.seconds[part] += now - self.last
        self.last = now


def step_with_sigreg(
    method: IJEPA, optimizer: torch.optim.Optimizer, video: Tensor, step: int
) -> dict[str, float]:
    clock = Clock()
    masks = method.masks(torch.arange(len(video)), step)
    clock.mark("masks")
    z = method.encoder(video, keep=masks.context)
    clock.mark("context")
    targets, mean = method.targets(video, masks)
    clock.mark("target")
    cut = z.detach().requires_grad_()
    (method.predictor(cut, *masks) - targets).square().mean().backward()
    clock.mark("predictor")
    encoder: Any = method.encoder
    tokens = centre_positions(cut, masks.context, math.prod(encoder.grid))
    weights = method.weights
    assert method.projector is not None
    q = method.projector(cut.mean(1))
    of_tokens = weights["sigreg"] * sigreg_of_tokens(method.sigreg, tokens, step)
    of_whole = weights["whole"] * (q - mean).square().mean()
    (of_tokens + of_whole + weights["whole_sigreg"] * method.sigreg(q, step)).backward()
    clock.mark("SIGReg")
    z.backward(cut.grad)
    clock.mark("context")
    optimizer.step()
    optimizer.zero_grad()
    clock.mark("optimiser")
    return clock.seconds


def step_with_teacher(
    method: TeacherIJEPA, optimizer: torch.optim.Optimizer, video: Tensor, step: int
) -> dict[str, float]:
    clock = Clock()
    masks: Masks = method.masks(torch.arange(len(video)), step)
    clock.mark("masks")
    z = method.student(video, keep=masks.context)
    clock.mark("context")
    targets = method.targets(video, masks)
    clock.mark("target")
    cut = z.detach().requires_grad_()
    F.smooth_l1_loss(method.predictor(cut, *masks), targets).backward()
    clock.mark("predictor")
    z.backward(cut.grad)
    clock.mark("context")
    optimizer.step()
    optimizer.zero_grad()
    method.follow(step)
    clock.mark("optimiser")
    return clock.seconds


def make_steps(recipe: Recipe) -> dict[str, Callable[[int], dict[str, float]]]:
    """Return a step of each form, on networks of its own."""
    ours, optimizer, video = with_sigreg(recipe)
    teacher = TeacherIJEPA(*parts(recipe, MaskedTransformer), steps=1000)
    return {
        "SIGReg": partial(step_with_sigreg, ours, optimizer, video),
        "EMA": partial(step_with_teacher, teacher, _adamw(teacher), video),
    }


def with_sigreg(recipe: Recipe) -> tuple[IJEPA, torch.optim.Optimizer, Tensor]:
    """Return the method without a teacher, its optimiser, and a batch."""
    torch.manual_seed(0)
    video = torch.rand(recipe.batch, recipe.frames, 3, recipe.image, recipe.image)
    encoder, predictor, masks = parts(recipe, recipe.ours)
    ours = IJEPA(encoder, predictor, SIGReg(slices=recipe.slices), masks, weight=3.0)
    return ours, _adamw(ours), video


def parts(recipe: Recipe, predicts: type[nn.Module]) -> tuple[ViTEncoder, nn.Module, DrawMasks]:
    """Return an encoder, a predictor of this class, and what draws masks."""
    shape = (recipe.frames, 3, recipe.image, recipe.image)
    encoder = ViTEncoder(shape, **recipe.encoder)
    masks = tube_masks((recipe.masks,), encoder.grid) if recipe.masks else None
    predictor = predicts(encoder.dim, encoder.grid, **recipe.predictor)
    return encoder, predictor, masks or MultiBlockMasks(encoder.grid)


def _adamw(method: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in method.parameters() if p.requires_grad])


def peak_megabytes(run: Callable[[], object]) -> float:
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


def compare(recipe: Recipe) -> dict[str, float]:
    """Print the parts of a step of each form, and return the seconds of the whole."""
    steps = make_steps(recipe)
    best = {name: dict.fromkeys(PARTS, math.inf) for name in steps}
    for number in range(recipe.rounds + 1):  # the first warms up
        for name, run in steps.items():
            seconds = run(number)
            if number:
                best[name] = {part: min(best[name][part], seconds[part]) for part in PARTS}
    print(f"\n{recipe.name}")
    print(f"{'CPU ms':8}" + "".join(f"{part:>10}" for part in PARTS) + "      step  peak MB")
    totals = {name: sum(parts.values()) for name, parts in best.items()}
    for name, parts in best.items():
        cells = "".join(f"{parts[part] * 1e3:10.1f}" for part in PARTS)
        size = peak_megabytes(lambda run=steps[name]: run(recipe.rounds + 1))
        print(f"{name:8}{cells}{totals[name] * 1e3:10.1f}{size:9.0f}", flush=True)
    print(f"a step with SIGReg takes {totals['SIGReg'] / totals['EMA']:.2f} times one with EMA")
    return totals


def compare_recomputing(recipe: Recipe) -> None:
    """Print time and memory of a step with SIGReg, as it is and with blocks that compute again."""
    runs: dict[str, Callable[[int], dict[str, float]]] = {}
    for name in ("kept", "computed again"):
        method, optimizer, video = with_sigreg(recipe)
        if name == "computed again":
            recompute_blocks(method)
        runs[name] = partial(step_with_sigreg, method, optimizer, video)
    least = dict.fromkeys(runs, math.inf)
    for number in range(recipe.rounds + 1):  # the first warms up
        for name, run in runs.items():
            seconds = sum(run(number).values())
            least[name] = min(least[name], seconds) if number else math.inf
    sizes = {name: peak_megabytes(partial(run, recipe.rounds + 1)) for name, run in runs.items()}
    print(f"\n{recipe.name}")
    for name in runs:
        print(f"{name:>15}: {least[name] * 1e3:8.1f} CPU ms a step, peak {sizes[name]:6.0f} MB")
    time_ratio, size_ratio = (of["computed again"] / of["kept"] for of in (least, sizes))
    print(f"computed again: {time_ratio:.2f} times the time, {size_ratio:.2f} times the memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recompute", action="store_true")
    torch.set_num_threads(1)
    run = compare_recomputing if parser.parse_args().recompute else compare
    for recipe in RECIPES:
        run(recipe)


if __name__ == "__main__":
    main()
