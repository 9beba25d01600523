"""What the commands that train on images share: data, loop, and the probe that ends a run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn

import jepa_world
from jepa_world.commands import prepare_process
from jepa_world.config import Part, to_dict
from jepa_world.data.files import BAD_SHARE, Skipped, naming_lost_readers
from jepa_world.data.images import (
    SUFFIXES,
    Images,
    Pictures,
    hold_out,
    load_images,
    stream_images,
)
from jepa_world.data.shards import Shards, count_samples, find_shards, is_sharded
from jepa_world.interfaces import Encoder
from jepa_world.probes import factor_r2, image_features, knn_probe, linear_probe
from jepa_world.runs import Run
from jepa_world.testing import check_encoder
from jepa_world.training import Training, begin, divided, make_accelerator, train


@dataclass(frozen=True)
class Reading:
    """How pictures are read."""

    bad_share: float = BAD_SHARE
    """Of the pictures that may be unreadable; in small sets a tenth may be, and ten."""
    workers: int = 0
    """Processes that read and decode pictures of shards ahead; others are in memory."""
    patience: float = 600.0
    """Seconds without a batch of theirs after which they are taken to hang."""


@dataclass(frozen=True)
class ImageTraining(Training):
    """The flags that commands for images add to those of training."""

    data: Path = Path("shapes")
    """`shapes` (generated), a folder of idx files, a folder or tar of pictures; or shards, read as
    they are needed: x-{000..099}.tar, x-*.tar, a folder of tars, a list of them, or photos/**."""
    image_size: int = 64
    """Side in pixels that pictures of folders and tars are brought to."""
    reading: Reading = Reading()
    """How pictures are read."""
    encoder: Part = Part("vit")
    """Maps images to features or tokens."""


def train_on_images(
    command: str,
    config: ImageTraining,
    build: Callable[[dict[str, Any]], Any],
    own: dict[str, Any],
    draw: Callable[[Path, Any, Images], None] | None = None,
) -> None:
    """Train; leave config.yaml, metrics.jsonl, results.json and checkpoint/ in the run folder.

    Args:
        command: Names the run.
        config: Its flags, checked.
        build: Makes the method, a module with an `encoder`, from the description that its
            checkpoint will hold.
        own: What the method adds to the description beside encoder and image size.
        draw: Leaves pictures of a method and held-out images in the run folder.
    """
    prepare_process()
    made = Run.of(command, config.run_dir)
    accelerator = make_accelerator(
        *(config.precision, config.loop.log_with, made.folder),
        accumulate=config.loop.accumulate,
        compile=config.loop.compile,
    )
    parts = load_parts(config, accelerator)
    rows, columns, channels = parts.fit.pixels.shape[1:]
    description = own | {
        "observation_shape": [1, channels, rows, columns],
        "encoder": to_dict(config)["encoder"],
        "jepa_world": jepa_world.__version__,
    }
    torch.manual_seed(config.seed)
    method = build(description)
    check_encoder(method.get_submodule("encoder"), tuple(description["observation_shape"]))
    begin(made, config, description, len(parts.training), accelerator)
    training = parts.training
    if isinstance(training, Pictures):
        training = training.noting(made.folder)
    accelerator.print(
        f"{len(training)} images, {sum(p.numel() for p in method.parameters()):,} parameters, "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    )
    if parts.skipped:
        accelerator.print(parts.skipped.summary())
    with naming_lost_readers(made.folder):
        last = train(
            *(method, Read(training, config.seed), len(training), config),
            accelerator=accelerator,
            run_dir=made.folder,
            evaluate=lambda: quick_probe(method.encoder, parts.fit, parts.held_out),
            sizes=parts.sizes,
            workers=0 if parts.sizes is None else config.reading.workers,
            patience=config.reading.patience,
        )
    if accelerator.is_main_process:
        torch.manual_seed(config.seed)
        random = build(description).to(next(method.parameters()).device)
        probed = beside_a_random_encoder(method, random, parts.whole, parts.test)
        if draw is not None:
            draw(made.folder, method, parts.held_out)
        parts.skipped.recall()
        made.finish({**last, "seed": config.seed, "probe": probed, **parts.skipped.results()})


@dataclass(frozen=True)
class Parts:
    """A data set in parts: what is trained on, and images in memory that are measured on."""

    training: Images | Pictures
    fit: Images
    """What probes are fitted to during training."""
    held_out: Images
    whole: Images
    """What probes are fitted to in the end."""
    test: Images
    sizes: Int[np.ndarray, " shards"] | None = None
    """Images of each shard, where they lie in shards."""

    @property
    def skipped(self) -> Skipped:
        """What was left out of all parts."""
        return self.whole.skipped


def load_parts(config: ImageTraining, accelerator: Accelerator) -> Parts:
    """Read all images, or count those of shards and read some."""
    bad_share = config.reading.bad_share
    if not is_sharded(config.data):
        whole, test = load_images(config.data, size=config.image_size, bad_share=bad_share)
        training, held_out = hold_out(whole)
        return Parts(training, training, held_out, whole, test)
    shards = open_shards(config.data, SUFFIXES, config.batch_size, bad_share, accelerator)
    training, fit, other = stream_images(shards, size=config.image_size, bad_share=bad_share)
    held_out, test = (other.take(np.arange(begin, len(other), 2)) for begin in (0, 1))
    return Parts(training, fit, held_out, fit, test, training.shards.sizes)


def open_shards(
    data: Path, suffixes: set[str], batch_size: int, bad_share: float, accelerator: Accelerator
) -> Shards:
    """Count the samples of all shards, every process those of some.

    Raises:
        UserError: too many cannot be read, or they hold nothing.
    """
    paths, kinds = find_shards(data), frozenset(suffixes)
    counts = divided(partial(count_samples, suffixes=kinds), paths, accelerator)
    lanes = batch_size // accelerator.num_processes + 2
    return replace(Shards.of(paths, counts, kinds, bad_share=bad_share), most_open=lanes)


@dataclass(frozen=True)
class Read:
    """Reads the batch of a step."""

    images: Images | Pictures
    seed: int

    def __call__(self, index: Int[np.ndarray, " b"], step: int) -> dict[str, Tensor]:
        """Return `pixels`, bytes, and what number each image has in the data."""
        if isinstance(self.images, Images):
            pixels, drawn = self.images.pixels[index], index
        else:
            pixels, drawn = self.images.draw(index, seed=self.seed, step=step)
        return {"pixels": torch.from_numpy(pixels), "index": torch.from_numpy(drawn)}


def quick_probe(
    encoder: Encoder, training: Images, held_out: Images, *, at_most: int = 10_000
) -> dict[str, float]:
    """Return how well features tell each factor: k-NN of classes, R^2 of values."""
    training = training.take(np.arange(min(at_most, len(training))))
    return probe_factors(encoder, training, held_out, knn_probe, "knn_{}", "r2_{}")


def beside_a_random_encoder(
    method: nn.Module, random: nn.Module, training: Images, test: Images
) -> dict[str, dict[str, float]]:
    """Print what the trained encoder and a random one tell of each factor of the test part."""
    encoders = {"trained": method, "random": random}
    rows = {
        name: probe_factors(built.eval().encoder, training, test)  # type: ignore[arg-type]
        for name, built in encoders.items()
    }
    for name, value in rows["trained"].items():
        print(f"{name:>20}: {value:.3f}, random encoder {rows['random'][name]:.3f}")
    return rows


def probe_factors(
    encoder: Encoder,
    training: Images,
    test: Images,
    classify: Callable[[Tensor, Tensor, Tensor], Tensor] = linear_probe,
    class_name: str = "linear {}",
    value_name: str = "R^2 {}",
) -> dict[str, float]:
    """Return the accuracy of a probe for every class, and R^2 of a linear one for every value."""
    if not (training.classes or training.values):
        return {}
    fit_z, z = (image_features(encoder, images.pixels) for images in (training, test))
    measured: dict[str, float] = {}
    for name, labels in training.classes.items():
        predicted = classify(fit_z, torch.from_numpy(labels).to(z.device), z).cpu().numpy()
        right = float((predicted == test.classes[name]).mean())
        measured[class_name.format(name)] = round(right, 4)
    r2 = factor_r2(fit_z, training.values, z, test.values)
    return measured | {value_name.format(name): value for name, value in r2.items()}
