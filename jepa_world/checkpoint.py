"""Checkpoints: `model.safetensors` beside `config.yaml`; no pickled object anywhere.

Every file is written beside its name and renamed when whole, so a kill at any moment leaves the
last good one. `training.safetensors` holds all that a resumed run needs, in one file.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from jepa_world.registry import UserError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a name beside `path`, flush it to the disk, and rename it to `path`.

    Raises:
        UserError: it cannot be written; what `path` held before is whole.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(unfinished)
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            unfinished.replace(path)
        except (OSError, SafetensorError):
            unfinished.unlink(missing_ok=True)  # a full disk has room again
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line what could not be written: a full disk, a folder that is read-only."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write {str(path)!r}: {error}; what was written before is whole"
        ) from error


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write a mapping as YAML, keys in their order."""
    text = yaml.safe_dump(values, sort_keys=False)
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a mapping as indented JSON; a number that is not finite becomes null."""
    text = json.dumps(finite(values), indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def finite(value: Any) -> Any:
    """Return a value without the NaN and infinities that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors and a small JSON mapping of facts into one safetensors file."""
    whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    metadata = {"facts": json.dumps(facts)}
    write_atomically(path, lambda part: save_file(whole, part, metadata))


def encoder_weights(folder: Path) -> tuple[dict[str, Tensor], str]:
    """Return the weights of the encoder in the checkpoint of any method, and the file's name.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = folder / "model.safetensors"
    tensors, _ = load_tensors(file)
    prefix = "encoder."
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return own, str(file)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        UserError: the file is missing, cut short, or not safetensors.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            return {key: file.get_tensor(key) for key in file.keys()}, facts
    except FileNotFoundError:
        raise UserError(f"no checkpoint file {str(path)!r}; train one, or name another") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"checkpoint file {str(path)!r} is damaged: {error}") from error


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a safetensors file into a module, strictly: the same names and the same shapes.

    Raises:
        UserError: the file cannot be read, or holds another model; the first difference is named.
    """
    tensors, _ = load_tensors(path)
    load_state(module, tensors, str(path))


def load_state(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load named tensors into a module, strictly; `source` is named in errors."""
    own = module.state_dict()
    different = sorted(own.keys() ^ tensors.keys())
    if different:
        missing = "lacks" if different[0] in own else "holds unknown"
        count = len(different)
        raise UserError(
            f"{source!r} {missing} {different[0]!r} ({count} names differ): another model"
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)}, the model's is {tuple(own[name].shape)}"
            raise UserError(f"{source!r}: {name!r} is {shapes}: another model")
    module.load_state_dict(tensors)


def find_checkpoint(path: Path) -> Path:
    """Return the folder that holds `config.yaml` and `model.safetensors`: a run's, or itself.

    Raises:
        UserError: neither is there.
    """
    for folder in (path / "checkpoint", path):
        if (folder / "model.safetensors").is_file() and (folder / "config.yaml").is_file():
            return folder
    what = "has no model.safetensors beside config.yaml" if path.is_dir() else "is not a folder"
    raise UserError(f"no checkpoint in {str(path)!r}: it {what}; give a run folder")


def require_trust(class_path: str, trusted: tuple[str, ...]) -> None:
    """Refuse a class path from a checkpoint that lies outside jepa_world and is not trusted.

    Raises:
        UserError: naming the flag that grants the import.
    """
    package = class_path.partition(":")[0].partition(".")[0]
    if ":" in class_path and package not in ("jepa_world", *trusted):
        raise UserError(
            f"the checkpoint names {class_path!r}: importing it runs its code;"
            f" if you trust it, add --trust {package}"
        )
