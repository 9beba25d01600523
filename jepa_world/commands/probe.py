"""Judge frozen image encoders: linear, k-NN and few-shot probes beside what costs nothing."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from jepa_world.checkpoint import (
    build_part,
    described_part,
    encoder_weights,
    find_checkpoint,
    load_state,
    observation_shape,
)
from jepa_world.commands import prepare_process
from jepa_world.config import Part, read_yaml, require_at_least
from jepa_world.data.augmentation import Augmentation, random_numbers
from jepa_world.data.images import Images, hold_out, load_images
from jepa_world.evaluation import Rate
from jepa_world.interfaces import Encoder
from jepa_world.methods.supervised import Supervised
from jepa_world.pictures import neighbour_picture, token_picture
from jepa_world.probes import (
    effective_rank,
    factor_r2,
    few_shot,
    image_features,
    knn_probe,
    lidar,
    linear_probe,
    whiten,
)
from jepa_world.registry import UserError
from jepa_world.runs import Run
from jepa_world.training import Training, make_accelerator, train

Pixels = UInt8[np.ndarray, "n hh ww c"]
Features = Callable[[Pixels], Tensor]
"""Return features (n d) of images."""


@dataclass(frozen=True)
class Probe:
    """Judge frozen encoders on labelled images, beside raw pixels, PCA and a random encoder.

    Without arguments: a random encoder on generated shapes.
    """

    data: Path = Path("shapes")
    """`shapes` (generated), a folder of idx files, or a folder or tar of pictures."""
    image_size: int = 64
    """Side in pixels that pictures of folders and tars are brought to."""
    checkpoint: tuple[Path, ...] = ()
    """Run folders of trained encoders, of any method."""
    encoder: Part = Part("resnet", {"width": 16})
    """Encoder of the random and the supervised row, where no checkpoint names one."""
    validation: bool = False
    """Judge on images held out of the training part, and leave the test part untouched."""
    supervised_steps: int = 0
    """Also train the same encoder with labels, for so many steps of 256 images."""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Mixed precision of that training; features are judged in float32."""
    cells: int = 1
    """Read tokens out as means over so many times so many parts of the image, one behind the other:
    raw pixels know where things are, the mean of all tokens does not."""
    k: int = 20
    """Neighbours of the k-NN probe."""
    draws: int = 10
    """Random choices of the labelled samples of the few-shot probes."""
    seed: int = 0
    """Of the random encoder, the few-shot choices and the views of LiDAR."""
    trust: tuple[str, ...] = ()
    """Packages outside jepa_world that a checkpoint may import."""
    run_dir: Path | None = None
    """Where everything is left; default runs/probe-<time>."""


def run(config: Probe) -> None:
    """Probe; leave results.json and pictures in the run folder."""
    prepare_process()
    require_at_least(config, supervised_steps=0, cells=1, k=1, draws=1, seed=0, image_size=8)
    made = Run.of("probe", config.run_dir)
    training, test = load_images(config.data, size=config.image_size)
    if config.validation:
        training, test = hold_out(training)
    if not training.classes:
        raise UserError(f"{str(config.data)!r} has no labels: give class folders or idx labels")
    rows, columns, channels = training.pixels.shape[1:]
    shape = (1, channels, rows, columns)
    encoders = {str(path): load_encoder(path, shape, config.trust) for path in config.checkpoint}
    part = next((part for _, part in encoders.values()), config.encoder)
    made.open(config)

    known = baselines(training, part, config.seed, cells=config.cells)
    if config.supervised_steps:
        known["supervised"] = supervised(config, training, part, made.folder)
    known |= {name: _frozen(encoder, config.cells) for name, (encoder, _) in encoders.items()}
    results = {
        name: judge(features, training, test, config)
        for name, features in tqdm(known.items(), "probing")
    }
    for factor in training.classes:
        print_table(factor, results)
    for factor in training.values:
        cells = ", ".join(f"{name} {row['R^2'][factor]:.2f}" for name, row in results.items())
        print(f"R^2 of {factor}: {cells}")
    draw(made.folder, known, encoders, training, test)
    made.finish({"judged_on": len(test), "fitted_on": len(training), "features": results})


def load_encoder(
    path: Path, shape: tuple[int, ...], trusted: tuple[str, ...]
) -> tuple[Encoder, Part]:
    """Load the encoder of a trained method, in evaluation mode; clips may hold several of its own.

    Raises:
        UserError: no checkpoint, a part that is not trusted, or one built for other clips.
    """
    folder = find_checkpoint(path)
    description = read_yaml(folder / "config.yaml")
    own = observation_shape(description)
    if own[1:] != shape[1:] or shape[0] % own[0]:
        raise UserError(
            f"{str(folder)!r} takes {own} (frames, channels, rows, columns), the data has {shape}: "
            "give its --data, or another size"
        )
    file = folder / "model.safetensors"
    encoder = build_part(description, "encoder", own, file=file, trusted=trusted)
    load_state(encoder, *encoder_weights(folder))
    return encoder.eval(), described_part(description, "encoder")


def baselines(
    training: Images, part: Part, seed: int, *, cells: int = 1, components: int = 64
) -> dict[str, Features]:
    """Return the features that cost no training: raw pixels, whitened PCA, a random encoder."""
    fit = _raw(training.pixels[:: max(1, len(training) // 10_000)])
    mean = fit.mean(0)
    _, scale, directions = torch.linalg.svd(fit - mean, full_matrices=False)
    whiten = directions[:components].T / scale[:components].clamp(min=1e-6) * len(fit) ** 0.5
    torch.manual_seed(seed)
    rows, columns, channels = training.pixels.shape[1:]
    random = part.build("encoder", (1, channels, rows, columns)).eval()
    return {
        "raw pixels": _raw,
        f"PCA {min(components, len(scale))}": lambda pixels: (_raw(pixels) - mean) @ whiten,
        "random encoder": _frozen(random, cells),
    }


def supervised(config: Probe, training: Images, part: Part, folder: Path) -> Features:
    """Train the encoder with the labels of the first factor and return its frozen features."""
    factor, labels = next(iter(training.classes.items()))
    rows, columns, channels = training.pixels.shape[1:]
    torch.manual_seed(config.seed)
    encoder = part.build("encoder", (1, channels, rows, columns))
    crops = Augmentation(scale=(0.5, 1.0))
    method = Supervised(encoder, int(labels.max()) + 1, crops, seed=config.seed)

    def read(index: Int[np.ndarray, " b"], step: int) -> dict[str, Tensor]:
        arrays = {"pixels": training.pixels[index], "index": index, "class": labels[index]}
        return {key: torch.from_numpy(value) for key, value in arrays.items()}

    run_dir = folder / f"supervised_{factor}"
    how = Training(
        steps=config.supervised_steps,
        batch_size=min(256, len(training)),
        lr=2e-3,
        weight_decay=5e-2,
        seed=config.seed,
        checkpoint_every=config.supervised_steps,
    )
    accelerator = make_accelerator(config.precision, "none", run_dir)
    train(method, read, len(training), how, accelerator=accelerator, run_dir=run_dir)
    return _frozen(method.eval().encoder, config.cells)


def judge(features: Features, training: Images, test: Images, config: Probe) -> dict[str, Any]:
    """Return every measure of one kind of features."""
    fit_z, z = features(training.pixels), features(test.pixels)
    white = whiten(fit_z, z)
    measured: dict[str, Any] = {
        "dim": z.shape[1],
        "effective_rank": round(effective_rank(z - z.mean(0)), 1),
        "lidar": round(lidar(_views(features, test, config.seed)), 1),
    }
    for factor, labels in training.classes.items():
        sets = fit_z, torch.from_numpy(labels).to(z.device), z
        y = torch.from_numpy(test.classes[factor]).to(z.device)
        measured[factor] = {
            "linear": asdict(Rate.of((linear_probe(*sets) == y).tolist())),
            "knn": asdict(Rate.of((knn_probe(*sets, k=config.k) == y).tolist())),
            "white knn": asdict(
                Rate.of((knn_probe(white[0], sets[1], white[1], k=config.k) == y).tolist())
            ),
        }
        for shots in (1, 10):
            found = few_shot(*sets, y, shots=shots, draws=config.draws, seed=config.seed)
            spread = {
                "mean": round(float(np.mean(found)), 4),
                "std": round(float(np.std(found)), 4),
            }
            measured[factor][f"{shots}-shot"] = spread
    measured["R^2"] = factor_r2(fit_z, training.values, z, test.values)
    return measured


def print_table(factor: str, results: dict[str, dict[str, Any]]) -> None:
    """Print one line for every kind of features; intervals are Wilson's, 95 %."""
    width = max(map(len, results))
    heads = "linear (95 %)         k-NN   white   1-shot 10-shot   dim  rank  LiDAR"
    print(f"\n{factor:<{width}}  {heads}")
    for name, row in results.items():
        linear, knn, white = (row[factor][probe] for probe in ("linear", "knn", "white knn"))
        one, ten = row[factor]["1-shot"]["mean"], row[factor]["10-shot"]["mean"]
        print(
            f"{name:<{width}}  {linear['rate']:.2%} ({linear['low']:.1%}-{linear['high']:.1%})  "
            f"{knn['rate']:.2%} {white['rate']:.2%}  {one:.1%}  {ten:.1%}  {row['dim']:>5} "
            f"{row['effective_rank']:>5} {row['lidar']:>6}"
        )


def draw(
    folder: Path,
    known: dict[str, Features],
    encoders: dict[str, tuple[Encoder, Part]],
    training: Images,
    test: Images,
) -> None:
    """Draw nearest neighbours by the last features, and patch tokens where an encoder has them."""
    features = list(known.values())[-1]
    queries = test.pixels[np.linspace(0, len(test) - 1, 8).astype(int)]
    bank = training.pixels[:10_000]
    picture = neighbour_picture(queries, features(queries), bank, features(bank))
    picture.savefig(folder / "neighbours.png", dpi=120)
    for encoder, _ in list(encoders.values())[-1:]:
        tokens = _tokens(encoder, queries)
        if tokens is not None:
            token_picture(queries, tokens).savefig(folder / "tokens.png", dpi=120)


@torch.no_grad()
def _tokens(encoder: Encoder, pixels: Pixels) -> Float[Tensor, "n rows columns d"] | None:
    """Return the patch tokens of images as maps; None for an encoder with one token an image."""
    images = rearrange(_tensor(pixels), "n hh ww c -> n 1 c hh ww") / 255
    tokens = encoder(images)[:, 0]
    rows = round((tokens.shape[1] * pixels.shape[1] / pixels.shape[2]) ** 0.5)
    if tokens.shape[1] == 1 or tokens.shape[1] % rows:
        return None
    return rearrange(tokens, "n (y x) d -> n y x d", y=rows)


def _views(features: Features, images: Images, seed: int) -> Float[Tensor, "n q d"]:
    """Return features of ten crops of up to 1000 images, for LiDAR."""
    chosen = np.linspace(0, len(images) - 1, min(1000, len(images))).astype(int)
    pixels = rearrange(_tensor(images.pixels[chosen]), "n hh ww c -> n c hh ww") / 255
    numbers = random_numbers(torch.from_numpy(chosen), views=10, seed=seed, step=0)
    views = torch.stack([Augmentation()(pixels, own) for own in numbers], 1)
    views = rearrange((views * 255).round().byte(), "n q c hh ww -> (n q) hh ww c")
    return rearrange(features(views.numpy()), "(n q) d -> n q d", n=len(chosen))


def _frozen(encoder: Encoder, cells: int) -> Features:
    cast(nn.Module, encoder).eval()
    return lambda pixels: image_features(encoder, pixels, cells=cells)


def _raw(pixels: Pixels) -> Tensor:
    return _tensor(pixels).flatten(1) / 255


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)
