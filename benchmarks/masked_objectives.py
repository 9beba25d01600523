"""Objectives of masked prediction side by side: same encoder, masks, images and CPU seconds.

    python benchmarks/masked_objectives.py --data FOLDER          # idx files of Fashion-MNIST
    python benchmarks/masked_objectives.py --data FOLDER --seconds 300 --seeds 3 ours ema

The encoder is a ViT of 3 x 64 on the 28 x 28 pixels (16 tokens of 7 x 7), the predictor one of
2 x 32. Probes read the mean token, then the means of 2 x 2 parts: fitted on 10,000 images,
judged on 5,000 others of the training part, which pretraining never sees; the test part is not
touched.
docs/ijepa.md has the numbers.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from jepa_world.data.augmentation import Augmentation
from jepa_world.data.images import load_images
from jepa_world.encoders.vit import ViTEncoder
from jepa_world.masking import Masks, MultiBlockMasks
from jepa_world.methods.ijepa import (
    IJEPA,
    TeacherIJEPA,
    centre_positions,
    sigreg_of_tokens,
)
from jepa_world.methods.world_model import Output
from jepa_world.nn import Projector, take_tokens
from jepa_world.predictors.masked import MaskedTransformer
from jepa_world.probes import effective_rank, few_shot, knn_probe, linear_probe, whiten
from jepa_world.sigreg import SIGReg, sigreg
from jepa_world.training import batch_index, learning_rate, native_precision

SIDE, PATCH, TOKENS, DIM, BATCH = 28, 7, 16, 64, 128


class Batch(NamedTuple):
    """Images as clips of one frame, and masks."""

    video: Tensor
    masks: Masks


class Networks(nn.Module):
    """What all objectives share; each uses what it needs."""

    def __init__(self, seed: int, target: float) -> None:
        super().__init__()
        torch.manual_seed(seed)
        shape = (1, 1, SIDE, SIDE)
        self.encoder = ViTEncoder(shape, patch=PATCH, dim=DIM, depth=3, heads=2, standardise=True)
        self.predictor = MaskedTransformer(DIM, self.encoder.grid, width=32, depth=2, heads=1)
        self.projector = Projector(DIM, DIM)
        self.masks = MultiBlockMasks(self.encoder.grid, target=target, seed=seed)
        self.sigreg = SIGReg(slices=64, seed=seed)

    def see(self, video: Tensor, keep: Tensor) -> Tensor:
        """Return the tokens `keep` in float32."""
        return self.encoder(video, keep=keep).float()

    def gap(self, z: Tensor, masks: Masks, targets: Tensor) -> Tensor:
        """Return the mean squared error of the prediction."""
        return (self.predictor(z, *masks).float() - targets).square().mean()


class Objective(nn.Module):
    """An objective as a method of its own, for those that are none of the package."""

    def __init__(self, n: Networks, loss: "Loss") -> None:
        super().__init__()
        self.n, self.encoder, self.loss = n, n.encoder, loss

    def forward(self, batch: dict[str, Tensor], step: int) -> Output:
        """Return the loss of a batch."""
        video = rearrange(batch["pixels"].float() / 255, "b y x c -> b 1 c y x")
        masks = self.n.masks(batch["index"], step)
        value = self.loss(self.n, Batch(video, masks), step)
        return Output(value, {}, value.detach())


Loss = Callable[[Networks, Batch, int], Tensor]
Build = Callable[[Networks, argparse.Namespace], nn.Module]


def _ours(n: Networks, o: argparse.Namespace, **changes: Any) -> IJEPA:
    views = Augmentation.of_strength((o.crop, 1.0), o.colour)
    settings = {"weight": o.weight, "whole": 5.0, "share": o.share, "views": views} | changes
    return IJEPA(n.encoder, n.predictor, n.sigreg, n.masks, **settings)


def _without(method: IJEPA, *terms: str) -> IJEPA:
    method.weights |= dict.fromkeys(terms, 0.0)
    return method


def _teacher(n: Networks, o: argparse.Namespace, views: Augmentation | None = None) -> nn.Module:
    how = {"momentum": o.momentum, "steps": o.steps, "views": views}
    return TeacherIJEPA(n.encoder, n.predictor, n.masks, **how)


METHODS: dict[str, Build] = {
    "ours": _ours,
    "control": lambda n, o: _without(_ours(n, o), "prediction", "whole"),  # SIGReg only
    "whole_only": lambda n, o: _without(_ours(n, o), "prediction", "sigreg"),  # no tokens
    "no_sigreg_of_tokens": lambda n, o: _without(_ours(n, o), "sigreg"),
    "no_views": lambda n, o: _ours(n, o, views=None),
    "tokens": lambda n, o: _ours(n, o, views=None, whole=0.0, weight=10.0),
    "tokens_control": lambda n, o: _without(
        _ours(n, o, views=None, whole=0.0, weight=10.0), "prediction"
    ),
    "ema": _teacher,
    "ema_views": lambda n, o: _teacher(n, o, Augmentation.of_strength((o.crop, 1.0), o.colour)),
}


def _stop_gradient(n: Networks, batch: Batch) -> Tensor:
    with torch.no_grad():
        z = take_tokens(n.encoder(batch.video)[:, 0].float(), batch.masks.target)
        return centre_positions(z, batch.masks.target, TOKENS)


def _between(n: Networks, z: Tensor, index: Tensor, step: int) -> Tensor:
    """Return SIGReg over pairs of tokens of different images.

    The statistic is a mean over pairs. With A that of all tokens and G the mean of those of each of
    b images, the pairs between images have the mean (b A - G) / (b - 1).
    """
    z = centre_positions(z, index, TOKENS)
    (b, k), directions = z.shape[:2], n.sigreg.draw(DIM, 64, seed=n.sigreg.seed, step=step)
    every, own = sigreg(z.flatten(0, 1), directions) / (b * k), sigreg(z, directions) / k
    return (b * every - own) / (b - 1)


def _flat(n: Networks, z: Tensor, index: Tensor, step: int) -> Tensor:
    return sigreg_of_tokens(n.sigreg, centre_positions(z, index, TOKENS), step)


def flat(n: Networks, batch: Batch, step: int) -> Tensor:
    """Stop-gradient target of the whole image; SIGReg over all pairs of centred tokens."""
    z = n.see(batch.video, batch.masks.context)
    error = n.gap(z, batch.masks, _stop_gradient(n, batch))
    return error + 10 * _flat(n, z, batch.masks.context, step)


def between(n: Networks, batch: Batch, step: int) -> Tensor:
    """The same with SIGReg between images."""
    z = n.see(batch.video, batch.masks.context)
    error = n.gap(z, batch.masks, _stop_gradient(n, batch))
    return error + 10 * _between(n, z, batch.masks.context, step)


def _both(n: Networks, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return context and target tokens, both with gradient, and the loss of the tokens."""
    context, target = batch.masks.context, batch.masks.target
    z, hidden = n.see(batch.video, context), n.see(batch.video, target)
    error = n.gap(z, batch.masks, centre_positions(hidden, target, TOKENS))
    regular = _between(n, z, context, step) + _between(n, hidden, target, step)
    return z, hidden, error + 5 * regular


def _pooled(n: Networks, z: Tensor, other: Tensor, step: int) -> Tensor:
    p, q = n.projector(z.mean(1)), n.projector(other.mean(1))
    return (p - q).square().mean() + 0.015 * (n.sigreg(p, step) + n.sigreg(q, step))


def blocks(n: Networks, batch: Batch, step: int) -> Tensor:
    """Gradient through targets, which are encoded from the target blocks alone."""
    return _both(n, batch, step)[2]


def pooled(n: Networks, batch: Batch, step: int) -> Tensor:
    """No tokens: the projected means of the two masks' tokens agree, SIGReg on each."""
    z, hidden = (n.see(batch.video, keep) for keep in batch.masks)
    return _pooled(n, z, hidden, step)


def blocks_pooled(n: Networks, batch: Batch, step: int) -> Tensor:
    """Tokens and means together, gradients everywhere."""
    z, hidden, loss = _both(n, batch, step)
    return loss + _pooled(n, z, hidden, step)


OBJECTIVES = {f.__name__: f for f in (flat, between, blocks, pooled, blocks_pooled)}


def build(name: str, n: Networks, options: argparse.Namespace) -> nn.Module:
    return METHODS[name](n, options) if name in METHODS else Objective(n, OBJECTIVES[name])


def train(
    name: str, images: Tensor, options: argparse.Namespace, seed: int
) -> tuple[nn.Module, int, float]:
    """Train for the given CPU seconds; a first stretch tells how many steps they hold."""
    options.steps = 10**9
    began = time.process_time()
    _steps(name, images, options, seed, stop=20)
    spent = time.process_time() - began
    options.steps = int(20 * options.seconds / spent)
    began = time.process_time()
    method = _steps(name, images, options, seed, stop=options.steps)
    return method.get_submodule("encoder").eval(), options.steps, time.process_time() - began


def _steps(
    name: str, images: Tensor, options: argparse.Namespace, seed: int, stop: int
) -> nn.Module:
    n = Networks(seed, 0.4 if "pooled" in name else 0.5)
    method = build(name, n, options).train()
    lr = options.ema_lr if name.startswith("ema") else options.lr
    trained = [p for p in method.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(stop):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, lr)
        index = torch.from_numpy(batch_index(len(images), BATCH, seed, step))
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            loss = method({"pixels": images[index], "index": index}, step).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return method


@torch.no_grad()
def tokens_of(encoder: nn.Module, images: Tensor) -> Tensor:
    video = rearrange(images, "n y x c -> n 1 c y x")
    return torch.cat([encoder(part.float() / 255)[:, 0] for part in video.split(1000)])


def shares(tokens: Tensor) -> tuple[float, float]:
    """Return the shares of the token variance that image and position explain."""
    tokens = tokens - tokens.mean((0, 1))
    whole = tokens.square().mean()
    return tuple(float(tokens.mean(axis).square().mean() / whole) for axis in (1, 0))  # type: ignore[return-value]


def judge(fit: Tensor, z: Tensor, fit_y: Tensor, y: Tensor) -> str:
    """Return k-NN, whitened k-NN, linear and 10-shot accuracy, and the effective rank."""
    white, other = whiten(fit, z)

    def right(predicted: Tensor) -> float:
        return float((predicted == y).float().mean())

    cells = [
        right(knn_probe(fit, fit_y, z)),
        right(knn_probe(white, fit_y, other)),
        right(linear_probe(fit, fit_y, z)),
        sum(few_shot(fit, fit_y, z, y, shots=10)) / 10,
    ]
    rank = effective_rank(fit - fit.mean(0))
    return "".join(f"{cell:6.3f}" for cell in cells) + f"{rank:5.0f}"


def cells_of(tokens: Tensor) -> Tensor:
    """Return the mean tokens of 2 x 2 parts of the image, one behind the other."""
    maps = rearrange(tokens, "n (y x) d -> n d y x", y=SIDE // PATCH)
    return F.adaptive_avg_pool2d(maps, 2).flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=80.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema-lr", type=float, default=1e-3)
    parser.add_argument("--momentum", type=float, default=0.996)
    parser.add_argument("--weight", type=float, default=3.0, help="of SIGReg of tokens, for ours")
    parser.add_argument("--share", type=float, default=0.04, help="of SIGReg in the whole")
    parser.add_argument("--crop", type=float, default=0.5, help="least share, of two views")
    parser.add_argument("--colour", type=float, default=1.5, help="strength, of two views")
    parser.add_argument("--precision", choices=("no", "bf16"), default=native_precision())
    parser.add_argument("--seeds", type=int, default=1, help="so many, from 0")
    parser.add_argument("objectives", nargs="*", choices=[[], *METHODS, *OBJECTIVES])
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, _ = load_images(options.data)
    images, labels = torch.from_numpy(data.pixels), torch.from_numpy(data.classes["class"])
    fit, held = slice(0, 10_000), slice(50_000, 55_000)
    y = labels[fit], labels[held]
    heads = "k-NN white linear 10-s rank"
    print(f"{'':20} seed CPU s steps |  {heads} |  2 x 2 parts: the same | image position")
    raw = images.flatten(1).float() / 255
    print(f"{'raw pixels':38}| {judge(raw[fit], raw[held], *y)}")
    pca = whiten(raw[fit], raw[held])
    print(f"{'PCA 64':38}| {judge(pca[0][:, -64:], pca[1][:, -64:], *y)}", flush=True)
    for name in options.objectives or [*METHODS, *OBJECTIVES]:
        for seed in range(options.seeds):
            encoder, steps, cpu = train(name, images[:45_000], options, seed)
            tokens = [tokens_of(encoder, images[part]) for part in (fit, held)]
            image, position = shares(tokens[0][:2000])
            mean = judge(tokens[0].mean(1), tokens[1].mean(1), *y)
            parts = judge(cells_of(tokens[0]), cells_of(tokens[1]), *y)
            print(
                f"{name:20} {seed:4} {cpu:5.0f} {steps:5} | {mean} | {parts} "
                f"| {image:.2f} {position:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
