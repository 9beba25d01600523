"""Checkpoints: `model.safetensors` beside `config.yaml`; no pickled object anywhere.

Every file is written beside its name and renamed when whole, so a kill at any moment leaves the
last good one. `training.safetensors` holds all that a resumed run needs, in one file.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from jaxtyping import Float, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from jepa_world.config import Part, part_from_dict
from jepa_world.registry import UserError, class_path, require_trust

LARGEST_OBSERVATION = 2**27  # numbers: 64 frames of 3 x 768 x 768 are fewer


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
    """Read what `save_tensors` wrote, the few bits of `in_few_bits` as the weights they stand for.

    Raises:
        UserError: the file is missing, cut short, or not safetensors.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except FileNotFoundError:
        raise UserError(f"no checkpoint file {str(path)!r}; train one, or name another") from None
    except _DAMAGES as error:
        raise UserError(f"checkpoint file {str(path)!r} is damaged: {error}") from error
    if not isinstance(facts, dict):
        raise UserError(f"checkpoint file {str(path)!r} is damaged: its facts are {facts!r}")
    for key in [key for key in tensors if key.endswith(_SCALE)]:
        name, scale = key.removesuffix(_SCALE), tensors.pop(key)
        try:
            tensors[name] = _widen(tensors[name], scale)
        except (KeyError, RuntimeError) as error:
            raise UserError(f"checkpoint file {str(path)!r} is damaged: {key!r}") from error
    return tensors, facts


def in_few_bits(tensors: dict[str, Tensor], *, bits: int = 4) -> dict[str, Tensor]:
    """Return tensors in about a sixth of the bytes (8 bits: a quarter), for `load_tensors` to read.

    Weights are whole numbers with a scale beside them: those of a large matrix in `bits`, 4 or 8,
    with 4 each 32 of a row to their scale; of all else that has two axes or more in 8, a row to
    its own. Other floating-point tensors are in half precision, the rest as it was.
    """
    small = {}
    for name, x in tensors.items():
        small[name] = x.half() if x.is_floating_point() else x
        if x.is_floating_point() and x.dim() > 1:
            large = x.dim() == 2 and x.numel() >= 2**15 and x.shape[1] % 32 == 0
            four = large and bits == 4
            runs = x.float().reshape(len(x), x.shape[1] // 32 if four else 1, -1)
            top = 7 if four else 127
            small[name + _SCALE] = scale = (runs.abs().amax(-1) / top).half().clamp_min(_LEAST)
            codes = (runs / scale[..., None]).round().clamp(-top, top).reshape(x.shape)
            small[name] = _two_a_byte(codes) if four else codes.to(torch.int8)
    return small


def _two_a_byte(codes: Float[Tensor, "o i"]) -> UInt8[Tensor, "o half"]:
    halves = (codes + 8).byte()
    return halves[:, ::2] | halves[:, 1::2] << 4


def _widen(codes: Tensor, scale: Float[Tensor, "rows runs"]) -> Tensor:
    """Return the weights that `in_few_bits` made a pair of tensors of."""
    if codes.dtype == torch.uint8:  # two a byte
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1).to(torch.int8) - 8
    weights = codes.reshape(*scale.shape, -1) * scale.float()[..., None]
    return weights.reshape(codes.shape)


_SCALE, _LEAST = "/scale", 2**-24  # no name of a module's tensor holds a slash; float16 ends there
_DAMAGES = (SafetensorError, OSError, ValueError, LookupError, AttributeError, RecursionError)


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a safetensors file into a module, strictly: the same names and the same shapes.

    Raises:
        UserError: the file cannot be read, or holds another model; the first difference is named.
    """
    tensors, _ = load_tensors(path)
    load_state(module, tensors, str(path))


def load_state(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load named tensors into a module, strictly; `source` is named in errors."""
    own, parameters = module.state_dict(), dict(module.named_parameters())
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
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise UserError(
                f"{source!r}: {name!r} is {tensor.dtype}, the model's {own[name].dtype}"
            )
        if name in parameters and not bool(tensor.isfinite().all()):
            raise UserError(f"{source!r}: {name!r} holds numbers that are not finite: damaged")
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


def observation_shape(description: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Return the `(t, c, hh, ww)` that a checkpoint's `config.yaml` gives.

    Raises:
        UserError: it gives none, or one that no camera has.
    """
    given = description.get("observation_shape")
    sizes = given if isinstance(given, list) else []
    if len(sizes) != 4 or not all(type(size) is int and size > 0 for size in sizes):
        raise UserError(
            f"the checkpoint gives the observation_shape {given!r}: expected [t, c, h, w]"
        )
    if math.prod(sizes) > LARGEST_OBSERVATION:
        raise UserError(f"the checkpoint gives the observation_shape {given}: too large to be true")
    frames, channels, rows, columns = sizes
    return frames, channels, rows, columns


def build_part(
    description: Mapping[str, Any], kind: str, *facts: Any, file: Path, trusted: tuple[str, ...]
) -> Any:
    """Build a part as a checkpoint's `config.yaml` describes it, no larger than its weights.

    Args:
        description: Holds the name and the options of the part at `kind`.
        kind: `encoder`, `predictor`, ...
        facts: What its class is given besides.
        file: The weights: a part of the package with more numbers than it holds is not built.
        trusted: Packages outside jepa_world whose classes may be imported.

    Raises:
        UserError: no such part, one that is not trusted, cannot be built, or is too large.
    """
    part = described_part(description, kind)
    where = class_path(kind, part.name)
    require_trust("the checkpoint", where, trusted)
    if where.startswith("jepa_world."):  # the code of others may not run without memory
        with _within(file):
            part.build(kind, *facts)
    return part.build(kind, *facts)


def described_part(description: Mapping[str, Any], kind: str) -> Part:
    """Return the part that a checkpoint's `config.yaml` describes at `kind`.

    Raises:
        UserError: there is none.
    """
    values = description.get(kind)
    if not (isinstance(values, dict) and isinstance(values.get("name"), str)):
        raise UserError(f"the checkpoint describes no {kind}, but {values!r:.80}")
    return part_from_dict(values)


@contextmanager
def _within(file: Path) -> Iterator[None]:
    """Build without memory, and stop at more numbers than a file holds (tied ones count again)."""
    left = 4 * _numbers(file) + 2**26  # tables of positions are not in the file

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal left
        left -= 1 if tensor is None else 1 + tensor.numel()
        if left < 0:
            raise ValueError(f"it is many times larger than the weights in {str(file)!r}")

    hooks = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ]
    try:
        with torch.device("meta"):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _numbers(file: Path) -> int:
    """Count the numbers in a safetensors file from its header."""
    try:
        with safe_open(file, "pt") as opened:
            return sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())
    except _DAMAGES as error:
        raise UserError(f"checkpoint file {str(file)!r} is damaged: {error}") from error
