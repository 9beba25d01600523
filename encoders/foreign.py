"""Backbones of other libraries as encoders of images: transformers' and timm's.

Every frame is encoded by itself; a feature map becomes tokens in raster order. Both libraries are
optional and imported when an encoder is built: `pip install 'jepa-world[transformers]'`, or
`'jepa-world[timm]'`. Weights are random, or those that `load_weights` reads from the disk; nothing
is downloaded.
"""

import importlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from jepa_world.nn import IMAGENET_MEAN, IMAGENET_STD, take_tokens

Tokens = Literal["patches", "mean", "cls"]
HEADS = ("classifier.", "pooler.")  # of other tasks, in files of transformers


class TransformersEncoder(nn.Module):
    """A vision model of `transformers`, built from its configuration class.

    `--encoder FOLDER`, a folder that `save_pretrained` wrote, stands for the model and the options
    that it describes. V-JEPA 2 sees a frame as a clip at rest.

    Args:
        observation_shape: `(t, c, hh, ww)`; any t is accepted later.
        model: Prefix of the model's classes: ResNet, ConvNextV2, Swin, ViT, Dinov2, DINOv3ViT,
            IJepa, VJEPA2, ...
        options: Of the configuration, as `name=value`: `depths=1,1,1,1`, `layer_type=basic`.
        tokens: What is read out: the patches, their mean, or the CLS token.
        resize: Height that frames are brought to first; patches must divide it, and the width.

    Raises:
        ImportError: transformers is not installed.
        ValueError: an unknown model, a malformed option, or a CLS token that is not there.

    Example:
        >>> import torch
        >>> encoder = TransformersEncoder((1, 3, 64, 64), model="ResNet")  # doctest: +SKIP
        >>> encoder(torch.rand(2, 1, 3, 64, 64)).shape  # doctest: +SKIP
        torch.Size([2, 1, 4, 2048])
    """

    def __init__(
        self,
        observation_shape: tuple[int, int, int, int],
        *,
        model: str = "ResNet",
        options: tuple[str, ...] = (),
        tokens: Tokens = "patches",
        resize: int | None = None,
    ) -> None:
        super().__init__()
        library = _library("transformers")
        settings = dict(_setting(option) for option in options)
        for name, value in settings.items():  # other words name code on the web
            if name.endswith("_implementation") and value not in ("eager", "sdpa", None):
                raise ValueError(f"{name} is {value!r}: choose eager or sdpa")
        channels, side = observation_shape[1], resize or observation_shape[2]
        sizes = {"num_channels": channels, "image_size": side}
        if model == "VJEPA2":
            sizes = {"in_chans": channels, "crop_size": side}
        try:
            build, configure = (getattr(library, model + end) for end in ("Model", "Config"))
        except AttributeError as error:
            raise ValueError(f"transformers has no {model}Model with a {model}Config") from error
        self.backbone = build(configure(**sizes | settings))
        self.tubelet = self.backbone.config.tubelet_size if model == "VJEPA2" else 0
        accepted = inspect.signature(self.backbone.forward).parameters
        native = settings.get("image_size", side) == side
        self.interpolates = not native and "interpolate_pos_encoding" in accepted
        self.frames = _Frames(channels, resize)
        self.tokens: Tokens = tokens
        self.num_tokens, self.dim = _measure(self, observation_shape)

    def forward(
        self, video: Float[Tensor, "b t c hh ww"], keep: Int[Tensor, "b k"] | None = None
    ) -> Tensor:
        """Return `(b t n d)`, or `(b k d)` of the tokens `keep`."""
        frames = self.frames(rearrange(video, "b t c hh ww -> (b t) c hh ww"))
        if self.tubelet:
            clips = repeat(frames, "f c hh ww -> f p c hh ww", p=self.tubelet)
            output = self.backbone(clips, skip_predictor=True)
        elif self.interpolates:
            output = self.backbone(frames, interpolate_pos_encoding=True)
        else:
            output = self.backbone(frames)
        maps = output.last_hidden_state
        patch = self.backbone.config.to_dict().get("patch_size", 1)
        z = _read_out(maps, self.tokens, prefix=_prefix(maps, frames, patch))
        return _arranged(z, len(video), keep)

    def load_weights(self, path: Path) -> None:
        """Load the weights of a folder that `save_pretrained` wrote, and expect their pixels.

        The statistics of these are in `preprocessor_config.json`, or those of ImageNet.

        Raises:
            ValueError: they cannot be read, or are not those of this model.
        """
        build: Any = type(self.backbone)
        try:
            loaded, told = build.from_pretrained(
                path,
                config=self.backbone.config,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except MemoryError:
            raise
        except Exception as error:  # of every kind, for damaged files
            raise ValueError(f"{str(path)!r} cannot be read: {_one_line(error)}") from error
        for what in ("missing", "unexpected", "mismatched"):
            names = sorted(map(_name_of, told[f"{what}_keys"]))
            names = [name for name in names if not name.startswith(HEADS)]
            if names:
                raise ValueError(f"{str(path)!r} has {what} weights, the first is {names[0]!r}")
        self.backbone.load_state_dict(loaded.state_dict())
        file = path / "preprocessor_config.json"
        known = json.loads(file.read_text()) if file.is_file() else {}
        mean, std = known.get("image_mean", IMAGENET_MEAN), known.get("image_std", IMAGENET_STD)
        self.frames.normalise_by(mean, std)


class TimmEncoder(nn.Module):
    """Any model of `timm` by its name, such as maxvit_nano_rw_256.

    Args:
        observation_shape: `(t, c, hh, ww)`; any t is accepted later.
        model: Its name in timm.
        fits: Build the model for the size of the frames, as ViT, Swin and MaxViT need it.
        tokens: What is read out: the patches, their mean, or the CLS token.
        resize: Height that frames are brought to first.

    Raises:
        ImportError: timm is not installed.
        ValueError: a CLS token that is not there.

    Example:
        >>> import torch
        >>> encoder = TimmEncoder((1, 3, 64, 64), model="resnet10t")  # doctest: +SKIP
        >>> encoder(torch.rand(2, 1, 3, 64, 64)).shape  # doctest: +SKIP
        torch.Size([2, 1, 4, 512])
    """

    def __init__(
        self,
        observation_shape: tuple[int, int, int, int],
        *,
        model: str = "resnet18",
        fits: bool = False,
        tokens: Tokens = "patches",
        resize: int | None = None,
    ) -> None:
        super().__init__()
        library = _library("timm")
        rows, columns = observation_shape[2:]
        sides = (resize, columns * resize // rows) if resize else (rows, columns)
        size = {"img_size": sides} if fits else {}
        self.backbone = library.create_model(
            model, pretrained=False, num_classes=0, in_chans=observation_shape[1], **size
        )
        self.frames = _Frames(observation_shape[1], resize)
        self.tokens: Tokens = tokens
        self.num_tokens, self.dim = _measure(self, observation_shape)

    def forward(
        self, video: Float[Tensor, "b t c hh ww"], keep: Int[Tensor, "b k"] | None = None
    ) -> Tensor:
        """Return `(b t n d)`, or `(b k d)` of the tokens `keep`."""
        frames = self.frames(rearrange(video, "b t c hh ww -> (b t) c hh ww"))
        maps = self.backbone.forward_features(frames)
        if maps.ndim == 4 and maps.shape[1] != self.backbone.num_features:
            maps = rearrange(maps, "f hh ww d -> f d hh ww")  # Swin's have channels last
        prefix = self.backbone.num_prefix_tokens if maps.ndim == 3 else 0
        return _arranged(_read_out(maps, self.tokens, prefix=prefix), len(video), keep)

    def load_weights(self, path: Path) -> None:
        """Load the weights of a file of timm's, .safetensors or .pth, and expect their pixels.

        The head of the file is left out.

        Raises:
            ValueError: they cannot be read, or are not those of this model.
        """
        told = self.backbone.pretrained_cfg
        head = f"{told['classifier']}."
        try:
            state = _library("timm").models.load_state_dict(str(path), weights_only=True)
            own = {name: value for name, value in state.items() if not name.startswith(head)}
            self.backbone.load_state_dict(own)
        except MemoryError:
            raise
        except Exception as error:  # of every kind, for damaged files
            raise ValueError(f"{str(path)!r} does not fit the model: {_one_line(error)}") from error
        self.frames.normalise_by(told["mean"], told["std"])


class _Frames(nn.Module):
    """Bring frames to the size and the statistics that the weights are for."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, resize: int | None) -> None:
        super().__init__()
        self.resize = resize
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, frames: Float[Tensor, "f c hh ww"]) -> Float[Tensor, "f c yy xx"]:
        """Return the frames."""
        if self.resize is not None:
            rows, columns = frames.shape[2:]
            size = (self.resize, columns * self.resize // rows)
            frames = F.interpolate(frames, size, mode="bicubic", antialias=True)
        return (frames - self.mean) / self.std

    def normalise_by(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Expect pixels of this mean and deviation, by channel."""
        for buffer, values in ((self.mean, mean), (self.std, std)):
            buffer.copy_(torch.tensor(values).reshape(buffer.shape))


def _prefix(maps: Tensor, frames: Tensor, patch: int | tuple[int, int] | list[int]) -> int:
    """Return how many tokens (CLS, registers) of a model of transformers come before the patches.

    A model that joins patches, such as Swin, has fewer tokens than patches, and none of these.
    """
    if maps.ndim == 4:
        return 0
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    patches = (frames.shape[2] // rows) * (frames.shape[3] // columns)
    return max(0, maps.shape[1] - patches)


def _read_out(maps: Tensor, tokens: Tokens, *, prefix: int) -> Float[Tensor, "f n d"]:
    """Return what is asked for of maps (f d hh ww), or of tokens (f prefix+n d)."""
    if maps.ndim == 4:
        maps = rearrange(maps, "f d hh ww -> f (hh ww) d")
    if tokens == "cls":
        if not prefix:
            raise ValueError("the model has no CLS token: choose the tokens patches or mean")
        return maps[:, :1]
    patches = maps[:, prefix:]
    return patches if tokens == "patches" else patches.mean(1, keepdim=True)


def _arranged(z: Tensor, batch: int, keep: Tensor | None) -> Tensor:
    """Return the tokens (f n d) of all frames by sample."""
    tokens = rearrange(z, "(b t) n d -> b t n d", b=batch)
    return tokens if keep is None else take_tokens(tokens.flatten(1, 2), keep)


def _measure(encoder: nn.Module, observation_shape: tuple[int, int, int, int]) -> tuple[int, int]:
    """Return number and width of a frame's tokens; freeze what only the library's own head uses."""
    encoder.eval()
    with torch.enable_grad():
        tokens = encoder(torch.zeros(1, 1, *observation_shape[1:]))
        tokens.sum().backward()
    for parameter in encoder.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    encoder.zero_grad(set_to_none=True)
    encoder.train()
    return tokens.shape[2], tokens.shape[3]


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"needs {name}: pip install 'jepa-world[{name}]'") from error


def _setting(option: str) -> tuple[str, object]:
    """Return the name and the value of `name=value`: numbers, words, or lists with commas."""
    name, equals, text = option.partition("=")
    if not equals:
        raise ValueError(f"option {option!r} is not of the form name=value")
    values = [_value(word) for word in text.split(",")]
    return name, values if len(values) > 1 else values[0]


def _value(word: str) -> object:
    """Return a number, true, false or null as JSON has it, or else the word."""
    try:
        return json.loads(word)
    except ValueError:
        return word


def _name_of(key: Any) -> str:
    """Return the name of a weight in a list of transformers', which has shapes beside some."""
    return str(key[0] if isinstance(key, tuple) else key)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
