"""Train an image encoder by LeJEPA: views agree, features are Gaussian, no teacher."""

from dataclasses import dataclass

from jepa_world.commands.image_training import ImageTraining, train_on_images
from jepa_world.config import Part, require_at_least
from jepa_world.methods.lejepa import build_lejepa
from jepa_world.registry import UserError


@dataclass(frozen=True)
class TrainLejepa(ImageTraining):
    """Train an encoder on images without labels: agreement of views + weight * SIGReg.

    Without arguments: generated shapes, and what the features then tell of each factor.
    """

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
    check(config)
    own = {
        "method": "lejepa",
        "projection": config.projection,
        "views": list(config.views),
        "crops": list(config.crops),
        "colour": config.colour,
        "sigreg": {"slices": 256, "seed": config.seed, "weight": config.sigreg_weight},
    }
    train_on_images("train_lejepa", config, build_lejepa, own)


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
