"""Train an image encoder by I-JEPA: hidden blocks are predicted, features are Gaussian."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from jepa_world.commands.image_training import ImageTraining, train_on_images
from jepa_world.config import Part, require_at_least, to_dict
from jepa_world.data.images import Images
from jepa_world.methods.ijepa import IJEPA, TeacherIJEPA, build_ijepa
from jepa_world.pictures import mask_picture
from jepa_world.registry import UserError
from jepa_world.testing import check_masked_predictor

MOMENTUM = 0.996  # of the published teacher at the first step; rises to 1


@dataclass(frozen=True)
class TrainIjepa(ImageTraining):
    """Train an encoder on images without labels: error of hidden tokens + weight * SIGReg.

    Without arguments: generated shapes, and what the features then tell of each factor.
    """

    encoder: Part = Part(
        "vit", {"dim": 64, "depth": 3, "heads": 2, "patch": 8, "standardise": True}
    )
    """Maps images to tokens on a grid."""
    masked_predictor: Part = Part("transformer", {"width": 32, "depth": 2, "heads": 1})
    """Maps visible tokens to hidden ones."""
    masks: tuple[float, float] = (0.3, 0.5)
    """Share of the tokens that is seen, and share that is predicted, in blocks."""
    views: tuple[float, float] = (0.7, 0.5)
    """The context is seen in one view of the image, targets in another: least share of the image
    that a view keeps, and strength of jitter, greying, blur and solarising. 1 0: the image itself
    in both places."""
    teacher: Literal["none", "ema"] = "none"
    """none: SIGReg keeps features from collapsing; ema: a moving average does, as published with
    --views 1 0."""
    weights: tuple[float, float] = (1.0, 20.0)
    """Weights against the error of tokens: of SIGReg of tokens, without its factor N, and of
    foretelling the hidden part as a whole, with a SIGReg of its own."""
    steps: int = 1000
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 5e-2


def run(config: TrainIjepa) -> None:
    """Train; leave config.yaml, metrics.jsonl, results.json and checkpoint/ in the run folder."""
    check(config)
    (context, target), (crop, colour), (weight, whole) = config.masks, config.views, config.weights
    teacher = {"momentum": MOMENTUM, "steps": config.steps}
    own = {
        "method": "ijepa",
        "masked_predictor": to_dict(config)["masked_predictor"],
        "masks": {"context": context, "target": target},
        "teacher": teacher if config.teacher == "ema" else None,
        "views": {"crop": crop, "colour": colour},
        "whole": whole,
        "sigreg": {"slices": 64, "seed": config.seed, "weight": weight},
    }
    train_on_images("train_ijepa", config, checked_ijepa, own, draw_masks)


def checked_ijepa(description: dict[str, Any]) -> IJEPA | TeacherIJEPA:
    """Build the method; its predictor may be anybody's, and keeps its contract."""
    method = build_ijepa(description)
    encoder: Any = method.encoder
    check_masked_predictor(method.get_submodule("predictor"), encoder.dim, encoder.grid)
    return method


def draw_masks(folder: Path, method: IJEPA | TeacherIJEPA, images: Images) -> None:
    """Draw what is seen and what is predicted of the first images, as `masks.png`."""
    pixels = images.pixels[:8]
    masks = method.masks(torch.arange(len(pixels)), 0)
    encoder: Any = method.encoder
    mask_picture(pixels, masks, encoder.grid[1:]).savefig(folder / "masks.png", dpi=120)


def check(config: TrainIjepa) -> None:
    """Check the numbers of a configuration.

    Raises:
        UserError: naming the flag, the number and what is allowed.
    """
    require_at_least(config, steps=1, batch_size=2, log_every=1, checkpoint_every=1)
    require_at_least(config, lr=0, weight_decay=0, seed=0, image_size=8)
    check_objective(config.views, config.weights)


def check_objective(views: tuple[float, float], weights: tuple[float, float]) -> None:
    """Check the numbers that masked prediction of images and of clips have in common.

    Raises:
        UserError: naming the flag, the numbers and what is allowed.
    """
    if not (0 < views[0] <= 1 and views[1] >= 0):
        raise UserError(f"--views {views}: give a share in (0, 1] and a strength from 0 on")
    if min(weights) < 0:
        raise UserError(f"--weights {weights}: give two numbers from 0 on")
