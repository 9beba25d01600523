"""Train an image encoder by LeJEPA: views agree, features are Gaussian, no teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

import jepa_world
from jepa_world.checkpoint import write_yaml
from jepa_world.commands import use_one_thread
from jepa_world.commands.train_world_model import check_same_model
from jepa_world.config import Part, require_at_least, to_dict
from jepa_world.data.images import Images, hold_out, load_images
from jepa_world.interfaces import Encoder
from jepa_world.methods.lejepa import LeJEPA, build_lejepa
from jepa_world.probes import image_features, knn_probe, linear_probe, linear_probe_r2
from jepa_world.registry import UserError
from jepa_world.runs import Run
from jepa_world.testing import check_encoder
from jepa_world.training import Training, make_accelerator, own_share, train


@dataclass(frozen=True)
class TrainLejepa(Training):
    """Train an encoder on images without labels: agreement of views + weight * SIGReg.

    Without arguments: generated shapes, and what the features then tell of each factor.
    """

    data: Path = Path("shapes")
    """`shapes` (generated), a folder of idx files, or a folder or tar of pictures."""
    image_size: int = 64
    """Side in pixels that pictures of folders and tars are brought to."""
    encoder: Part = Part("resnet", {"width": 16})
    """Maps images to features."""
    projection: int = 64
    """Width of the projections that are compared and tested."""
    views: tuple[int, int] = (2, 0)
    """Global and local views of an image."""
    crops: tuple[float, float, float] = (0.1, 0.4, 1.0)
    """Share of the image that a crop keeps: local ones from the first to the second number, global
    ones from the second to the third."""
    colour: float = 0.5
    """Strength of jitter, greying, blur and solarising; 1 is the recipe for photographs."""
    sigreg_weight: float = 0.05
    """Weight of SIGReg; the agreement of the views has what is left to 1."""
    steps: int = 300
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 5e-2


def run(config: TrainLejepa) -> None:
    """Train; leave config.yaml, metrics.jsonl, results.json and checkpoint/ in the run folder."""
    use_one_thread()
    check(config)
    made = Run.of("train_lejepa", config.run_dir)
    accelerator = make_accelerator(config.precision, config.log_with, made.folder)
    whole, test = load_images(config.data, size=config.image_size)
    training, held_out = hold_out(whole)

    torch.manual_seed(config.seed)
    description = describe(config, whole)
    method = build_lejepa(description)
    check_encoder(method.get_submodule("encoder"), tuple(description["observation_shape"]))
    own_share(config.batch_size, len(training), accelerator)
    if config.resume:
        check_same_model(made.folder, description)
    if accelerator.is_main_process:
        made.open(config, resume=config.resume)
        write_yaml(made.folder / "checkpoint" / "config.yaml", description)
    accelerator.wait_for_everyone()
    accelerator.print(
        f"{len(training)} images, {sum(p.numel() for p in method.parameters()):,} parameters, "
        f"{accelerator.num_processes} process(es) on {accelerator.device.type}"
    )
    if whole.skipped:
        accelerator.print(f"{len(whole.skipped)} files skipped: {', '.join(whole.skipped[:5])}")

    def read(index: Int[np.ndarray, " b"]) -> dict[str, Tensor]:
        pixels = torch.from_numpy(training.pixels[index])
        return {"pixels": pixels, "index": torch.from_numpy(index)}

    last = train(
        method,
        read,
        len(training),
        accelerator=accelerator,
        run_dir=made.folder,
        steps=config.steps,
        batch_size=config.batch_size,
        lr=config.lr,
        weight_decay=config.weight_decay,
        seed=config.seed,
        resume=config.resume,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        evaluate=lambda: quick_probe(method.encoder, training, held_out),
    )
    if accelerator.is_main_process:
        probed = factor_table(method, description, config.seed, whole, test)
        made.finish({**last, "seed": config.seed, "probe": probed})


def check(config: TrainLejepa) -> None:
    """Check the numbers of a configuration.

    Raises:
        UserError: naming the flag, the number and what is allowed.
    """
    require_at_least(config, steps=1, batch_size=2, log_every=1, checkpoint_every=1, projection=1)
    require_at_least(config, lr=0, weight_decay=0, sigreg_weight=0, seed=0, colour=0, image_size=8)
    if config.views[0] < 1 or config.views[1] < 0 or sum(config.views) < 2:
        raise UserError(f"--views {config.views}: give one global view or more, and two in all")
    smallest, middle, largest = config.crops
    if not 0 < smallest <= middle <= largest <= 1:
        raise UserError(f"--crops {config.crops}: give three rising shares in (0, 1]")
    if config.sigreg_weight > 1:
        raise UserError(f"--sigreg-weight is {config.sigreg_weight}: give at most 1")


def describe(config: TrainLejepa, images: Images) -> dict[str, Any]:
    """Return the `config.yaml` of the checkpoint."""
    rows, columns, channels = images.pixels.shape[1:]
    return {
        "method": "lejepa",
        "observation_shape": [1, channels, rows, columns],
        "encoder": to_dict(config)["encoder"],
        "projection": config.projection,
        "views": list(config.views),
        "crops": list(config.crops),
        "colour": config.colour,
        "sigreg": {"slices": 256, "seed": config.seed, "weight": config.sigreg_weight},
        "jepa_world": jepa_world.__version__,
    }


def quick_probe(
    encoder: Encoder, training: Images, held_out: Images, *, at_most: int = 10_000
) -> dict[str, float]:
    """Return how well features tell each factor: k-NN of classes, R^2 of values."""
    training = training.take(np.arange(min(at_most, len(training))))
    if not (training.classes or training.values):
        return {}
    fit_z, z = (image_features(encoder, images.pixels) for images in (training, held_out))
    measured: dict[str, float] = {}
    for name, labels in training.classes.items():
        predicted = knn_probe(fit_z, torch.from_numpy(labels).to(z.device), z)
        measured[f"knn_{name}"] = accuracy(predicted, held_out.classes[name])
    for name, factor in training.values.items():
        fit_y, y = (torch.from_numpy(v).to(z.device) for v in (factor, held_out.values[name]))
        measured[f"r2_{name}"] = round(linear_probe_r2(fit_z, fit_y, z, y), 4)
    return measured


def factor_table(
    method: LeJEPA, description: dict[str, Any], seed: int, training: Images, test: Images
) -> dict[str, dict[str, float]]:
    """Print what the trained encoder and a random one tell of each factor of the test part."""
    torch.manual_seed(seed)
    random = build_lejepa(description).eval().to(next(method.parameters()).device)
    rows = {
        "trained": probe_factors(method.eval().encoder, training, test),
        "random": probe_factors(random.encoder, training, test),
    }
    for name, value in rows["trained"].items():
        print(f"{name:>20}: {value:.3f}, random encoder {rows['random'][name]:.3f}")
    return rows


def probe_factors(encoder: Encoder, training: Images, test: Images) -> dict[str, float]:
    """Return the accuracy of a linear probe for every class, and R^2 for every value."""
    if not (training.classes or training.values):
        return {}
    fit_z, z = (image_features(encoder, images.pixels) for images in (training, test))
    measured: dict[str, float] = {}
    for name, labels in training.classes.items():
        predicted = linear_probe(fit_z, torch.from_numpy(labels).to(z.device), z)
        measured[f"linear {name}"] = accuracy(predicted, test.classes[name])
    for name, factor in training.values.items():
        fit_y, y = (torch.from_numpy(v).to(z.device) for v in (factor, test.values[name]))
        measured[f"R^2 {name}"] = round(linear_probe_r2(fit_z, fit_y, z, y), 4)
    return measured


def accuracy(predicted: Int[Tensor, " n"], labels: Int[np.ndarray, " n"]) -> float:
    """Return the share of classes that are right."""
    return round(float((predicted.cpu().numpy() == labels).mean()), 4)
