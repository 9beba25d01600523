"""Train an image encoder by I-JEPA: hidden blocks are predicted, features are Gaussian."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

import jepa_world
from jepa_world.checkpoint import write_yaml
from jepa_world.commands import use_one_thread
from jepa_world.commands.train_lejepa import probe_factors, quick_probe
from jepa_world.commands.train_world_model import check_same_model
from jepa_world.config import Part, require_at_least, to_dict
from jepa_world.data.images import Images, hold_out, load_images
from jepa_world.methods.ijepa import IJEPA, TeacherIJEPA, build_ijepa
from jepa_world.registry import UserError
from jepa_world.runs import Run
from jepa_world.testing import check_encoder
from jepa_world.training import Training, make_accelerator, own_share, train


@dataclass(frozen=True)
class TrainIjepa(Training):
    """Train an encoder on images without labels: error of hidden tokens + weight * SIGReg.

    Without arguments: generated shapes, and what the features then tell of each factor.
    """

    data: Path = Path("shapes")
    """`shapes` (generated), a folder of idx files, or a folder or tar of pictures."""
    image_size: int = 64
    """Side in pixels that pictures of folders and tars are brought to."""
    encoder: Part = Part("vit", {"dim": 64, "depth": 3, "heads": 2, "patch": 4})
    """Maps images to tokens on a grid."""
    masked_predictor: Part = Part("transformer", {"width": 32, "depth": 2, "heads": 1})
    """Maps visible tokens to hidden ones."""
    masks: tuple[float, float] = (0.3, 0.5)
    """Share of the tokens that is seen, and share that is predicted, in blocks."""
    teacher: Literal["none", "ema"] = "none"
    """none: SIGReg keeps features from collapsing; ema: the published moving average does."""
    momentum: float = 0.996
    """Of the moving average at the first step; rises to 1. For --teacher ema."""
    sigreg_weight: float = 10.0
    """Weight of SIGReg, without its factor N, against the prediction error."""
    steps: int = 1000
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 5e-2


def run(config: TrainIjepa) -> None:
    """Train; leave config.yaml, metrics.jsonl, results.json and checkpoint/ in the run folder."""
    use_one_thread()
    check(config)
    made = Run.of("train_ijepa", config.run_dir)
    accelerator = make_accelerator(config.precision, config.log_with, made.folder)
    whole, test = load_images(config.data, size=config.image_size)
    training, held_out = hold_out(whole)

    torch.manual_seed(config.seed)
    description = describe(config, whole)
    method = build_ijepa(description)
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
        probed = beside_a_random_encoder(method, description, config.seed, whole, test)
        made.finish({**last, "seed": config.seed, "probe": probed})


def check(config: TrainIjepa) -> None:
    """Check the numbers of a configuration.

    Raises:
        UserError: naming the flag, the number and what is allowed.
    """
    require_at_least(config, steps=1, batch_size=2, log_every=1, checkpoint_every=1)
    require_at_least(config, lr=0, weight_decay=0, sigreg_weight=0, seed=0, image_size=8)
    if not 0 <= config.momentum <= 1:
        raise UserError(f"--momentum is {config.momentum}: give a number in [0, 1]")


def describe(config: TrainIjepa, images: Images) -> dict[str, Any]:
    """Return the `config.yaml` of the checkpoint."""
    rows, columns, channels = images.pixels.shape[1:]
    values = to_dict(config)
    context, target = config.masks
    teacher = {"momentum": config.momentum, "steps": config.steps}
    return {
        "method": "ijepa",
        "observation_shape": [1, channels, rows, columns],
        "encoder": values["encoder"],
        "masked_predictor": values["masked_predictor"],
        "masks": {"context": context, "target": target},
        "teacher": teacher if config.teacher == "ema" else None,
        "sigreg": {"slices": 64, "seed": config.seed, "weight": config.sigreg_weight},
        "jepa_world": jepa_world.__version__,
    }


def beside_a_random_encoder(
    method: IJEPA | TeacherIJEPA,
    description: dict[str, Any],
    seed: int,
    training: Images,
    test: Images,
) -> dict[str, dict[str, float]]:
    """Print what the trained encoder and a random one tell of each factor of the test part."""
    torch.manual_seed(seed)
    random = build_ijepa(description).eval().to(next(method.parameters()).device)
    rows = {
        "trained": probe_factors(method.eval().encoder, training, test),
        "random": probe_factors(random.encoder, training, test),
    }
    for name, value in rows["trained"].items():
        print(f"{name:>20}: {value:.3f}, random encoder {rows['random'][name]:.3f}")
    return rows
