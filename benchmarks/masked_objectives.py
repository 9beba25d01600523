"""Objectives of masked prediction side by side: same encoder, masks, images and CPU seconds.

    python benchmarks/masked_objectives.py --data FOLDER            # idx files of Fashion-MNIST
    python benchmarks/masked_objectives.py --data FOLDER --seconds 150 --lr 2e-3 ours ema

Images are scaled to 20 x 20 (25 tokens of 4 x 4), the encoder is a ViT of 3 x 64, the predictor one
of 2 x 32. Probes read mean tokens: fitted on 10,000 images, judged on 5,000 others of the training
part, which pretraining never sees; the test part is not touched. docs/ijepa.md has the numbers.
"""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from jepa_world.data.augmentation import Augmentation, random_numbers
from jepa_world.data.images import load_images
from jepa_world.encoders.vit import ViTEncoder
from jepa_world.masking import Masks, MultiBlockMasks
from jepa_world.methods.ijepa import centre_positions, sigreg_between_images
from jepa_world.nn import Projector, take_tokens
from jepa_world.predictors.masked import MaskedTransformer
from jepa_world.probes import effective_rank, few_shot, knn_probe, linear_probe
from jepa_world.sigreg import SIGReg
from jepa_world.training import learning_rate

SIDE, TOKENS, DIM, BATCH = 20, 25, 64, 128


class Networks(nn.Module):
    """What all objectives share; each uses what it needs."""

    def __init__(self, seed: int, target: float) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = ViTEncoder((1, 1, SIDE, SIDE), patch=4, dim=DIM, depth=3, heads=2)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
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


Objective = Callable[[Networks, Tensor, Tensor, Masks, int], Tensor]
"""Return the loss of two views of a batch (the same one twice, unless the objective has crops)."""


def ema(n: Networks, x: Tensor, _: Tensor, masks: Masks, step: int) -> Tensor:
    """Published: smooth-L1 to the layer-normed tokens of a moving average for the whole image."""
    with torch.no_grad():
        z = take_tokens(n.teacher(x)[:, 0].float(), masks.target)
    predicted = n.predictor(n.see(x, masks.context), *masks).float()
    return F.smooth_l1_loss(predicted, F.layer_norm(z, z.shape[-1:]))


def _stop_gradient(n: Networks, x: Tensor, masks: Masks, keep: Tensor | None) -> Tensor:
    with torch.no_grad():
        if keep is None:
            z = take_tokens(n.encoder(x)[:, 0].float(), masks.target)
        else:
            z = n.see(x, keep)[:, : masks.target.shape[1]]
        return centre_positions(z, masks.target, TOKENS)


def _between(n: Networks, z: Tensor, index: Tensor, step: int) -> Tensor:
    return sigreg_between_images(n.sigreg, centre_positions(z, index, TOKENS), step)


def _flat(n: Networks, z: Tensor, index: Tensor, step: int) -> Tensor:
    tokens = rearrange(centre_positions(z, index, TOKENS), "b k d -> (b k) d")
    return n.sigreg(tokens, step) / len(tokens)


def flat(n: Networks, x: Tensor, _: Tensor, masks: Masks, step: int) -> Tensor:
    """Stop-gradient target of the whole image; SIGReg over all pairs of centred tokens."""
    z = n.see(x, masks.context)
    error = n.gap(z, masks, _stop_gradient(n, x, masks, None))
    return error + 10 * _flat(n, z, masks.context, step)


def between(n: Networks, x: Tensor, _: Tensor, masks: Masks, step: int) -> Tensor:
    """The same with SIGReg between images."""
    z = n.see(x, masks.context)
    error = n.gap(z, masks, _stop_gradient(n, x, masks, None))
    return error + 10 * _between(n, z, masks.context, step)


def between_100(n: Networks, x: Tensor, _: Tensor, masks: Masks, step: int) -> Tensor:
    """The same at ten times the weight."""
    z = n.see(x, masks.context)
    error = n.gap(z, masks, _stop_gradient(n, x, masks, None))
    return error + 100 * _between(n, z, masks.context, step)


def ours(n: Networks, x: Tensor, _: Tensor, masks: Masks, step: int) -> Tensor:
    """What IJEPA does: the target pass computes the tokens of target and context only."""
    z = n.see(x, masks.context)
    keep = torch.cat([masks.target, masks.context], 1)
    error = n.gap(z, masks, _stop_gradient(n, x, masks, keep))
    return error + 10 * _between(n, z, masks.context, step)


def sigreg_only(n: Networks, x: Tensor, _: Tensor, masks: Masks, step: int) -> Tensor:
    """The control: no prediction."""
    return 10 * _between(n, n.see(x, masks.context), masks.context, step)


def blocks(n: Networks, x: Tensor, _: Tensor, masks: Masks, step: int) -> Tensor:
    """Gradient through targets, which are encoded from the target blocks alone."""
    z, hidden = n.see(x, masks.context), n.see(x, masks.target)
    error = n.gap(z, masks, centre_positions(hidden, masks.target, TOKENS))
    both = _between(n, z, masks.context, step) + _between(n, hidden, masks.target, step)
    return error + 5 * both


def _pooled(n: Networks, z: Tensor, other: Tensor, step: int, weight: float) -> Tensor:
    p, q = n.projector(z.mean(1)), n.projector(other.mean(1))
    return (p - q).square().mean() + weight / 2 * (n.sigreg(p, step) + n.sigreg(q, step))


def pooled(n: Networks, x: Tensor, y: Tensor, masks: Masks, step: int) -> Tensor:
    """No tokens: the projected means of the two masks' tokens agree, SIGReg on each."""
    return _pooled(n, n.see(x, masks.context), n.see(y, masks.target), step, 0.03)


def pooled_crops(n: Networks, x: Tensor, y: Tensor, masks: Masks, step: int) -> Tensor:
    """The same across two random crops: LeJEPA with masked views."""
    return _pooled(n, n.see(x, masks.context), n.see(y, masks.target), step, 0.05)


def blocks_pooled(n: Networks, x: Tensor, _: Tensor, masks: Masks, step: int) -> Tensor:
    """Tokens and means together, gradients everywhere."""
    z, hidden = n.see(x, masks.context), n.see(x, masks.target)
    error = n.gap(z, masks, centre_positions(hidden, masks.target, TOKENS))
    both = _between(n, z, masks.context, step) + _between(n, hidden, masks.target, step)
    return error + 5 * both + _pooled(n, z, hidden, step, 0.03)


OBJECTIVES: dict[str, tuple[Objective, float]] = {  # with the share of target tokens
    **{f.__name__: (f, 0.5) for f in (ema, flat, between, between_100, ours, sigreg_only, blocks)},
    **{f.__name__: (f, 0.4) for f in (pooled, pooled_crops, blocks_pooled)},
}


def views(x: Tensor, name: str, index: Tensor, step: int, seed: int) -> tuple[Tensor, Tensor]:
    if name != "pooled_crops":
        return x, x
    one, two = random_numbers(index, views=2, seed=seed, step=step)
    crop = Augmentation(scale=(0.4, 1.0))
    return crop(x[:, 0], one).unsqueeze(1), crop(x[:, 0], two).unsqueeze(1)


def train(name: str, images: Tensor, options: argparse.Namespace) -> tuple[nn.Module, int]:
    """Train for the given CPU seconds, of which a first stretch tells how many steps they hold."""
    objective, target = OBJECTIVES[name]
    n = Networks(options.seed, target)
    trained = [p for p in n.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(options.seed)
    began, step, steps = time.process_time(), 0, 10**9
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, options.lr)
        index = torch.randint(len(images), (BATCH,), generator=generator)
        x, y = views(images[index].float() / 255, name, index, step, options.seed)
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(n, x, y, n.masks(index, step), step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(n.teacher.parameters(), n.encoder.parameters(), strict=True):
                slow.lerp_(fast, 1 - options.momentum)
        step += 1
        if step == 20:
            steps = int(20 * options.seconds / (time.process_time() - began))
    return (n.teacher if name == "ema" else n.encoder).eval(), step


@torch.no_grad()
def tokens_of(encoder: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([encoder(part.float() / 255)[:, 0] for part in images.split(1000)])


def shares(tokens: Tensor) -> tuple[float, float]:
    """Return the shares of the token variance that image and position explain."""
    tokens = tokens - tokens.mean((0, 1))
    whole = tokens.square().mean()
    return tuple(float(tokens.mean(axis).square().mean() / whole) for axis in (1, 0))  # type: ignore[return-value]


def judge(name: str, fit: Tensor, z: Tensor, fit_y: Tensor, y: Tensor, note: str) -> None:
    mean, (scale, directions) = fit.mean(0), torch.linalg.eigh(fit.T.cov())
    whiten = directions / (scale + 1e-3 * scale.mean()).sqrt()
    white = [(part - mean) @ whiten for part in (fit, z)]

    def right(predicted: Tensor) -> float:
        return float((predicted == y).float().mean())

    cells = [
        right(knn_probe(fit, fit_y, z)),
        right(knn_probe(white[0], fit_y, white[1])),
        right(linear_probe(fit, fit_y, z, decays=(1e-4,))),
        sum(few_shot(fit, fit_y, z, y, shots=10, draws=5)) / 5,
    ]
    rank = effective_rank(fit - mean)
    print(f"{name:14}" + "".join(f"{c:8.3f}" for c in cells) + f"{rank:7.1f}  {note}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--momentum", type=float, default=0.99)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("objectives", nargs="*", choices=[[], *OBJECTIVES])
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, _ = load_images(options.data)
    images = rearrange(torch.from_numpy(data.pixels), "n y x c -> n c y x")
    small = [
        F.interpolate(part.float(), (SIDE, SIDE), mode="bilinear", antialias=True)
        for part in images.split(5000)
    ]
    images = torch.cat(small).round().byte().unsqueeze(1)
    labels = torch.from_numpy(data.classes["class"])
    fit, held = slice(0, 10_000), slice(50_000, 55_000)
    print("                  k-NN white kNN logistic 10-shot  rank")
    raw = images.flatten(1).float() / 255
    judge("raw pixels", raw[fit], raw[held], labels[fit], labels[held], "")
    for name in options.objectives or OBJECTIVES:
        encoder, steps = train(name, images[:45_000], options)
        tokens = [tokens_of(encoder, images[part]) for part in (fit, held)]
        image, position = shares(tokens[0][:2000])
        note = f"{steps} steps; variance by image {image:.2f}, position {position:.2f}"
        fit_z, held_z = (part.mean(1) for part in tokens)
        judge(name, fit_z, held_z, labels[fit], labels[held], note)


if __name__ == "__main__":
    main()
