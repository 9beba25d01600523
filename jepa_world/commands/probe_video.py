"""Judge frozen video encoders: what their tokens tell of labels, and whether order matters."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from tqdm import tqdm

from jepa_world.commands import prepare_process
from jepa_world.commands.probe import load_encoder
from jepa_world.commands.train_vjepa import DEFAULT, load_parts, middles, some, write_default
from jepa_world.config import Part, require_at_least
from jepa_world.data.augmentation import Augmentation
from jepa_world.data.clips import Clips
from jepa_world.evaluation import Rate
from jepa_world.methods.supervised import Supervised
from jepa_world.probes import (
    attentive_probe,
    attentive_r2,
    clip_tokens,
    knn_probe,
    linear_probe,
    placed_r2,
)
from jepa_world.registry import UserError
from jepa_world.runs import Run
from jepa_world.training import Training, make_accelerator, train

BY_PLACE = 2048  # numbers of a clip that a probe by place takes
Pixels = UInt8[np.ndarray, "n t hh ww c"]


@dataclass(frozen=True)
class ProbeVideo:
    """Judge frozen encoders of labelled videos, beside raw pixels, their mean and a random encoder.

    Without arguments: a random encoder on generated clips of moving letters.
    """

    data: Path = DEFAULT
    """Labelled videos, as train_vjepa takes them; data/motion is generated if it is not there."""
    checkpoint: tuple[Path, ...] = ()
    """Run folders of trained encoders, of videos or of images: those see every frame by itself."""
    encoder: Part = Part("vit", {"dim": 96, "depth": 4, "heads": 3, "patch": 8, "tubelet": 2})
    """Encoder of the random and the supervised rows, where no checkpoint names one."""
    frames: int = 16
    """Frames of a clip."""
    fps: float = 8.0
    """Frames a second of a clip."""
    size: int = 48
    """Side in pixels."""
    at_most: int = 2000
    """Videos that probes are fitted on, and half as many that they are judged on."""
    frame_by_frame: bool = False
    """Also read the encoders as encoders of images: every frame by itself."""
    supervised_steps: int = 0
    """Also train the encoder with labels for so many steps of 64, in order and shuffled."""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Mixed precision of that training; features are judged in float32."""
    seed: int = 0
    """Of the random encoder, of probes and of shuffled frames."""
    trust: tuple[str, ...] = ()
    """Packages outside jepa_world that a checkpoint may import."""
    run_dir: Path | None = None
    """Where everything is left; default runs/probe_video-<time>."""


def run(config: ProbeVideo) -> None:
    """Probe; leave results.json in the run folder."""
    prepare_process()
    require_at_least(config, frames=1, size=8, at_most=20, supervised_steps=0, seed=0)
    made = Run.of("probe_video", config.run_dir)
    if config.data == DEFAULT:
        write_default(config.data)
    training, test = load_parts(config.data)
    if not (training.classes or training.values):
        raise UserError(f"{str(config.data)!r} has no labels: give class folders or a csv")
    shape = (config.frames, 3, config.size, config.size)
    encoders = {str(path): load_encoder(path, shape, config.trust) for path in config.checkpoint}
    part = next((part for _, part in encoders.values()), config.encoder)
    made.open(config)

    fit, training = middles(some(training, config.at_most), config)
    pixels, test = middles(some(test, config.at_most // 2), config)
    torch.manual_seed(config.seed)
    random = part.build("encoder", shape).eval()
    known: dict[str, Any] = {"random encoder": random}
    known |= {name: encoder for name, (encoder, _) in encoders.items()}
    if config.frame_by_frame:
        known |= {f"{name}, frame by frame": by_frame(known[name], shape) for name in list(known)}
    results = {
        factor: plain_rows(factor, fit, training, pixels, test) for factor in training.classes
    }
    for name, encoder in tqdm(known.items(), "probing"):
        for factor, row in judge(encoder, fit, training, pixels, test, config).items():
            results[factor][name] = row
    if config.supervised_steps:
        for factor in training.classes:
            results[factor] |= supervised_rows(
                factor, part, fit, training, pixels, test, config, made
            )
    for factor, rows in results.items():
        print_rows(factor, rows)
    r2 = values_by_encoder(known, fit, training, pixels, test, config)
    for name, row in r2.items():
        print(f"R^2 from {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()))
    counts = {"judged_on": len(test), "fitted_on": len(training)}
    made.finish({**counts, "features": results, "R^2": r2})


def by_frame(encoder: Any, shape: tuple[int, ...]) -> Any:
    """Return the encoder for clips of one frame, with the same weights.

    Raises:
        UserError: it is for clips of one length only.
    """
    if not hasattr(encoder, "for_clips"):
        raise UserError(f"--frame-by-frame: {type(encoder).__name__} has no `for_clips`")
    return encoder.for_clips((1, *shape[1:])).eval()


def judge(
    encoder: Any, fit: Pixels, training: Clips, pixels: Pixels, test: Clips, config: ProbeVideo
) -> dict[str, dict[str, Any]]:
    """Return every measure of an encoder by label; `shuffled`: of frames in an order by chance.

    A probe is fitted on clips in order; the shuffled ones show what it then reads from order.
    """
    if not training.classes:
        return {}
    fit_z, z = clip_tokens(encoder, fit), clip_tokens(encoder, pixels)
    mixed = clip_tokens(encoder, shuffled(pixels, config.seed))
    rows: dict[str, dict[str, Any]] = {}
    for factor, labels in training.classes.items():
        y, truth = torch.from_numpy(labels), torch.from_numpy(test.classes[factor])
        told = attentive_probe(fit_z, y, torch.cat([z, mixed]), seed=config.seed)
        means = fit_z.mean(1), y, z.mean(1)
        rows[factor] = {
            "attentive": rate(told[: len(z)], truth),
            "shuffled": rate(told[len(z) :], truth),
            "linear": rate(linear_probe(*means), truth),
            "knn": rate(knn_probe(*means), truth),
        }
    return rows


def values_by_encoder(
    known: dict[str, Any],
    fit: Pixels,
    training: Clips,
    pixels: Pixels,
    test: Clips,
    config: ProbeVideo,
) -> dict[str, dict[str, float]]:
    """Return R^2 of every number: an attentive probe of all tokens, and probes that know places.

    These read the last step, and all steps where they hold no more than `BY_PLACE` numbers. Of
    clips, and of clips whose last frame stands still: what one frame gives.
    """
    if not training.values:
        return {}
    fit_y, y = (
        torch.from_numpy(np.concatenate([clips.values[name] for name in training.values], 1))
        for clips in (training, test)
    )
    rows: dict[str, dict[str, float]] = {}
    for name, encoder in known.items():
        for seen, view in (("", np.asarray), (", the last frame alone", still)):
            fit_z, z = (clip_tokens(encoder, view(clips)) for clips in (fit, pixels))
            found = {"": attentive_r2(fit_z, fit_y, z, y, seed=config.seed)}
            spans = {z.shape[1]: ", all by place", encoder.num_tokens: ", last step by place"}
            for tokens, how in spans.items():
                if tokens == encoder.num_tokens or tokens * encoder.dim <= BY_PLACE:
                    sets = fit_z[:, -tokens:], fit_y, z[:, -tokens:], y
                    found[how] = placed_r2(*sets, seed=config.seed)
            for how, r2 in found.items():
                told = zip(training.values, r2.tolist(), strict=True)
                rows[name + seen + how] = {k: round(v, 4) for k, v in told}
    return rows


def plain_rows(
    factor: str, fit: Pixels, training: Clips, pixels: Pixels, test: Clips
) -> dict[str, dict[str, Any]]:
    """Return what raw pixels, a quarter as fine a side, and the mean frame tell."""
    y, truth = (torch.from_numpy(clips.classes[factor]) for clips in (training, test))
    rows: dict[str, dict[str, Any]] = {}
    for name, features in (("raw pixels", _raw), ("mean frame", _mean_frame)):
        sets = features(fit), y, features(pixels)
        rows[name] = {
            "linear": rate(linear_probe(*sets), truth),
            "knn": rate(knn_probe(*sets), truth),
        }
    return rows


def supervised_rows(
    factor: str,
    part: Part,
    fit: Pixels,
    training: Clips,
    pixels: Pixels,
    test: Clips,
    config: ProbeVideo,
    made: Run,
) -> dict[str, dict[str, Any]]:
    """Return what the same encoder learns with labels, from frames in order and shuffled."""
    labels, rows = training.classes[factor], {}
    sets = {"in order": (fit, pixels)}
    sets["shuffled"] = (shuffled(fit, config.seed + 1), shuffled(pixels, config.seed))
    for order, (seen, judged) in sets.items():
        torch.manual_seed(config.seed)
        encoder = part.build("encoder", (config.frames, 3, config.size, config.size))
        views = Augmentation(scale=(0.7, 1.0), flip=0.0)  # a flip turns left into right
        method = Supervised(encoder, int(labels.max()) + 1, views, seed=config.seed)

        def read(index: Int[np.ndarray, " b"], step: int, seen: Pixels = seen) -> dict[str, Tensor]:
            arrays = {"pixels": seen[index], "index": index, "class": labels[index]}
            return {key: torch.from_numpy(value) for key, value in arrays.items()}

        folder = made.folder / f"supervised_{factor}_{order.replace(' ', '_')}"
        steps = config.supervised_steps
        how = Training(
            steps=steps,
            lr=1e-3,
            weight_decay=5e-2,
            seed=config.seed,
            checkpoint_every=steps,
            batch_size=min(64, len(seen)),
        )
        accelerator = make_accelerator(config.precision, "none", folder)
        train(method, read, len(seen), how, accelerator=accelerator, run_dir=folder)
        scores = method.eval().classifier(clip_tokens(method.encoder, judged).mean(1))
        truth = torch.from_numpy(test.classes[factor])
        rows[f"supervised, {order}"] = {"linear": rate(scores.argmax(1), truth)}
    return rows


def shuffled(pixels: Pixels, seed: int) -> Pixels:
    """Return clips whose frames are in an order by chance, another for every clip."""
    random = np.random.default_rng(seed)
    order = random.permuted(np.tile(np.arange(pixels.shape[1]), (len(pixels), 1)), axis=1)
    return np.take_along_axis(pixels, order[:, :, None, None, None], 1)


def still(pixels: Pixels) -> Pixels:
    """Return clips of the last frame of each, which stands still."""
    return np.repeat(pixels[:, -1:], pixels.shape[1], 1)


def rate(predicted: Tensor, truth: Tensor) -> dict[str, Any]:
    """Return the share of right predictions, with Wilson's interval."""
    return asdict(Rate.of((predicted == truth).tolist()))


def print_rows(factor: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print one line for every kind of features; intervals are Wilson's, 95 %."""
    columns = ("attentive", "shuffled", "linear", "knn")
    width = max(map(len, rows))
    print(f"\n{factor:<{width}}  " + "".join(f"{column:<22}" for column in columns))
    for name, row in rows.items():
        cells = (
            f"{row[c]['rate']:.1%} ({row[c]['low']:.1%}-{row[c]['high']:.1%})" if c in row else "-"
            for c in columns
        )
        print(f"{name:<{width}}  " + "".join(f"{cell:<22}" for cell in cells))


def _raw(pixels: Pixels) -> Float[Tensor, "n d"]:
    grey = torch.from_numpy(pixels).float().mean(-1)
    return F.adaptive_avg_pool2d(grey, pixels.shape[2] // 4).flatten(1) / 255


def _mean_frame(pixels: Pixels) -> Float[Tensor, "n d"]:
    return torch.from_numpy(pixels).float().mean((1, -1)).flatten(1) / 255
