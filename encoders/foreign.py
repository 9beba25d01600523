"""Backbones of other libraries as encoders of images: transformers' and timm's, random weights.

Every frame is encoded by itself; a feature map becomes tokens in raster order. Both libraries are
optional and imported when an encoder is built: `pip install 'jepa-world[transformers]'`, or
`'jepa-world[timm]'`. Weights, if wanted, are loaded into `.backbone` by whoever has them; nothing
is downloaded.
"""

import importlib
from types import ModuleType

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from jepa_world.nn import take_tokens


class TransformersEncoder(nn.Module):
    """A vision model of `transformers`, built from its configuration class.

    Args:
        observation_shape: `(t, c, hh, ww)`; any t is accepted later.
        model: Prefix of the model's classes: ResNet, ConvNextV2, Swin, ViT, Dinov2, ...
        options: Of the configuration, as `name=value`: `depths=1,1,1,1`, `layer_type=basic`.

    Raises:
        ImportError: transformers is not installed.
        ValueError: an unknown model or a malformed option.

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
    ) -> None:
        super().__init__()
        library = _library("transformers")
        settings = dict(_setting(option) for option in options)
        sizes = {"num_channels": observation_shape[1], "image_size": observation_shape[2]}
        try:
            build, configure = (getattr(library, model + end) for end in ("Model", "Config"))
        except AttributeError as error:
            raise ValueError(f"transformers has no {model}Model with a {model}Config") from error
        self.backbone = build(configure(**sizes | settings))
        self.num_tokens, self.dim = _measure(self, observation_shape)

    def forward(
        self, video: Float[Tensor, "b t c hh ww"], keep: Int[Tensor, "b k"] | None = None
    ) -> Tensor:
        """Return `(b t n d)`, or `(b k d)` of the tokens `keep`."""
        output = self.backbone(rearrange(video, "b t c hh ww -> (b t) c hh ww"))
        return _tokens(output.last_hidden_state, len(video), keep)


class TimmEncoder(nn.Module):
    """Any model of `timm` by its name, such as maxvit_nano_rw_256.

    Args:
        observation_shape: `(t, c, hh, ww)`; any t is accepted later.
        model: Its name in timm.
        fits: Build the model for the size of the frames, as ViT, Swin and MaxViT need it.

    Raises:
        ImportError: timm is not installed.

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
    ) -> None:
        super().__init__()
        library = _library("timm")
        size = {"img_size": observation_shape[2:]} if fits else {}
        self.backbone = library.create_model(
            model, pretrained=False, num_classes=0, in_chans=observation_shape[1], **size
        )
        self.num_tokens, self.dim = _measure(self, observation_shape)

    def forward(
        self, video: Float[Tensor, "b t c hh ww"], keep: Int[Tensor, "b k"] | None = None
    ) -> Tensor:
        """Return `(b t n d)`, or `(b k d)` of the tokens `keep`."""
        maps = self.backbone.forward_features(rearrange(video, "b t c hh ww -> (b t) c hh ww"))
        if maps.ndim == 4 and maps.shape[1] != self.backbone.num_features:
            maps = rearrange(maps, "f hh ww d -> f d hh ww")  # Swin's have channels last
        return _tokens(maps, len(video), keep)


def _tokens(maps: Tensor, batch: int, keep: Tensor | None) -> Tensor:
    """Return tokens of maps (f d hh ww) or tokens (f n d) of all frames."""
    if maps.ndim == 4:
        maps = rearrange(maps, "f d hh ww -> f (hh ww) d")
    tokens = rearrange(maps, "(b t) n d -> b t n d", b=batch)
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
    values = [_number(word) for word in text.split(",")]
    return name, values if len(values) > 1 else values[0]


def _number(word: str) -> object:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word
