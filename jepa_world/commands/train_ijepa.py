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
    crop: float = 0.7
    """Least share of the image that a view keeps: the context is seen in one view, targets in
    another. 1, with --colour 0: both in the image itself."""
    colour: float = 0.5
    """Strength of jitter, greying, blur and solarising of the views; 1 is for photographs."""
    teacher: Literal["none", "ema"] = "none"
    """none: SIGReg keeps features from collapsing; ema: a moving average does, as published with
    --crop 1 --colour 0."""
    momentum: float = 0.996
    """Of the moving average at the first step; rises to 1. For --teacher ema."""
    sigreg_weight: float = 1.0
    """Weight of SIGReg of tokens, without its factor N, against the prediction error."""
    whole: float = 20.0
    """Weight of foretelling the whole image from the context, with its own SIGReg."""
    steps: int = 1000
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 5e-2


def run(config: TrainIjepa) -> None:
    """Train; leave config.yaml, metrics.jsonl, results.json and checkpoint/ in the run folder."""
    check(config)
    context, target = config.masks
    teacher = {"momentum": config.momentum, "steps": config.steps}
    own = {
        "method": "ijepa",
        "masked_predictor": to_dict(config)["masked_predictor"],
        "masks": {"context": context, "target": target},
        "teacher": teacher if config.teacher == "ema" else None,
        "views": {"crop": config.crop, "colour": config.colour},
        "whole": config.whole,
        "sigreg": {"slices": 64, "seed": config.seed, "weight": config.sigreg_weight},
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
    grid = method.get_submodule("encoder").grid[1:]  # type: ignore[index]
    mask_picture(pixels, masks, grid).savefig(folder / "masks.png", dpi=120)


def check(config: TrainIjepa) -> None:
    """Check the numbers of a configuration.

    Raises:
        UserError: naming the flag, the number and what is allowed.
    """
    require_at_least(config, steps=1, batch_size=2, log_every=1, checkpoint_every=1)
    require_at_least(config, lr=0, weight_decay=0, sigreg_weight=0, seed=0, image_size=8)
    require_at_least(config, whole=0, colour=0)
    if not 0 < config.crop <= 1:
        raise UserError(f"--crop is {config.crop}: give a share in (0, 1]")
    if not 0 <= config.momentum <= 1:
        raise UserError(f"--momentum is {config.momentum}: give a number in [0, 1]")
