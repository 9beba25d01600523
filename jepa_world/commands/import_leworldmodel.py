"""Make the published weights of a LeWorldModel a checkpoint that plans here."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

import jepa_world
from jepa_world.checkpoint import save_tensors, write_yaml
from jepa_world.data.trajectories import Trajectories
from jepa_world.encoders.pretrained import (
    fold_action_statistics,
    fold_pixel_statistics,
    load_leworldmodel,
)
from jepa_world.registry import UserError
from jepa_world.runs import Run


@dataclass(frozen=True)
class ImportLeworldmodel:
    """Read `weights.pt` and `config.json` as stable-worldmodel writes them, strictly.

    The run folder that is left plans: `jepa-world plan --env my_module:MyEnv-v0 --checkpoint
    FOLDER`. What the published model is given normalised, its first maps take as the environment
    has it: pixels in [0, 1], and actions by the statistics of the dataset it was trained on.
    """

    weights: Path
    """Folder with weights.pt and config.json, or the first with the other beside it."""
    data: Path | None = None
    """Dataset it was trained on, for the statistics of its actions."""
    action_mean: tuple[float, ...] = ()
    """Mean of an action, where there is no dataset."""
    action_std: tuple[float, ...] = ()
    """Standard deviation of an action, where there is no dataset."""
    env: str | None = None
    """Gymnasium id of the environment it is for; the dataset's, or any, if not given."""
    run_dir: Path | None = None
    """Where the checkpoint is left; default runs/import_leworldmodel-<time>."""


def run(config: ImportLeworldmodel) -> None:
    """Import; leave config.yaml, results.json and checkpoint/ in the run folder."""
    made = Run.of("import_leworldmodel", config.run_dir)
    (mean, std), env = action_statistics(config)
    try:
        encoder, predictor, parts = load_leworldmodel(config.weights)
        fold_pixel_statistics(encoder)
        fold_action_statistics(predictor, mean, std)
    except ValueError as error:
        raise UserError(str(error)) from error
    model = nn.ModuleDict({"encoder": encoder, "predictor": predictor})
    description = {
        "method": "world_model",
        "env": env,
        "observation_shape": list(parts.observation_shape),
        "stride": parts.action_dim // len(mean),
        "action_dim": parts.action_dim,
        "encoder": {"name": "leworldmodel", **parts.encoder},
        "predictor": {"name": "leworldmodel", **parts.predictor},
        "jepa_world": jepa_world.__version__,
    }
    made.open(config)
    write_yaml(made.folder / "checkpoint" / "config.yaml", description)
    save_tensors(made.folder / "checkpoint" / "model.safetensors", model.state_dict(), {})
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters; a step of the model is "
        f"{description['stride']} of the environment, with actions of {len(mean)} numbers"
    )
    made.finish({"action_mean": mean, "action_std": std})


def action_statistics(
    config: ImportLeworldmodel,
) -> tuple[tuple[list[float], list[float]], str | None]:
    """Return the mean and the deviation of an action, and the environment.

    Raises:
        UserError: neither given nor in a dataset, or both.
    """
    given = bool(config.action_mean), bool(config.action_std)
    if config.data is None and given == (True, True):
        return (list(config.action_mean), list(config.action_std)), config.env
    if config.data is None or any(given):
        raise UserError(
            "the model was trained on normalised actions: give --data, the dataset, or "
            "--action-mean and --action-std"
        )
    data = Trajectories(config.data, columns=["action"])
    mean, std = data.action_mean.tolist(), data.action_std.tolist()
    return (mean, std), config.env or data.env
