"""What the commands that train on images share: data, loop, and the probe that ends a run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

import jepa_world
from jepa_world.commands import use_one_thread
from jepa_world.config import Part, to_dict
from jepa_world.data.files import BAD_SHARE
from jepa_world.data.images import Images, hold_out, load_images
from jepa_world.interfaces import Encoder
from jepa_world.probes import factor_r2, image_features, knn_probe, linear_probe
from jepa_world.runs import Run
from jepa_world.testing import check_encoder
from jepa_world.training import Training, begin, make_accelerator, train


@dataclass(frozen=True)
class ImageTraining(Training):
    """The flags that commands for images add to those of training."""

    data: Path = Path("shapes")
    """`shapes` (generated), a folder of idx files, or a folder or tar of pictures."""
    image_size: int = 64
    """Side in pixels that pictures of folders and tars are brought to."""
    bad_share: float = BAD_SHARE
    """Of the pictures that may be unreadable; in small sets a tenth may be, and ten."""
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
    use_one_thread()
    made = Run.of(command, config.run_dir)
    accelerator = make_accelerator(
        *(config.precision, config.loop.log_with, made.folder),
        accumulate=config.loop.accumulate,
        compile=config.loop.compile,
    )
    whole, test = load_images(config.data, size=config.image_size, bad_share=config.bad_share)
    training, held_out = hold_out(whole)
    rows, columns, channels = whole.pixels.shape[1:]
    description = own | {
        "observation_shape": [1, channels, rows, columns],
        "encoder": to_dict(config)["encoder"],
        "jepa_world": jepa_world.__version__,
    }
    torch.manual_seed(config.seed)
    method = build(description)
    check_encoder(method.get_submodule("encoder"), tuple(description["observation_shape"]))
    begin(made, config, description, len(training), accelerator)
    accelerator.print(
        f"{len(training)} images, {sum(p.numel() for p in method.parameters()):,} parameters, "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    )
    if whole.skipped:
        accelerator.print(whole.skipped.summary())

    def read(index: Int[np.ndarray, " b"], step: int) -> dict[str, Tensor]:
        pixels = torch.from_numpy(training.pixels[index])
        return {"pixels": pixels, "index": torch.from_numpy(index)}

    last = train(
        *(method, read, len(training), config),
        accelerator=accelerator,
        run_dir=made.folder,
        evaluate=lambda: quick_probe(method.encoder, training, held_out),
    )
    if accelerator.is_main_process:
        torch.manual_seed(config.seed)
        random = build(description).to(next(method.parameters()).device)
        probed = beside_a_random_encoder(method, random, whole, test)
        if draw is not None:
            draw(made.folder, method, held_out)
        made.finish({**last, "seed": config.seed, "probe": probed, **whole.skipped.results()})


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
