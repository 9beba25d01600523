"""Read the I-JEPA weights of others into a `ViTEncoder`, and write one as `transformers` has it.

Keys are converted, nothing is left over and nothing missing: a file that does not fit is an error.
Meta's files hold the teacher as `target_encoder` (the one that was evaluated) and are preferred in
that order; `transformers` has folders with `config.json` and `model.safetensors`.
(I-JEPA, https://arxiv.org/abs/2301.08243.)
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from jepa_world.encoders.vit import SIZES, ViTEncoder

Weights = dict[str, Tensor]
Source = Literal["meta", "transformers"]
_META = (
    (r"^(module\.)?(backbone\.)?", ""),
    (r"^pos_embed$", "positions"),
    (r"^patch_embed\.proj\.", "embed."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)
_TRANSFORMERS = (
    (r"^ijepa\.", ""),
    (r"^embeddings\.position_embeddings$", "positions"),
    (r"^embeddings\.patch_embeddings\.projection\.", "embed."),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".attention.q."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".attention.k."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".attention.v."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attention.out."),
    (r"\.(intermediate\.dense|mlp\.fc1)\.", ".mlp.0."),
    (r"\.(output\.dense|mlp\.fc2)\.", ".mlp.3."),
    (r"^layernorm\.", "norm."),
)
_EXPORT = (
    (r"^blocks\.", "layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attention\.([qkv])\.", r".attention.\1_proj."),
    (r"\.attention\.out\.", ".attention.o_proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"^norm\.", "layernorm."),
    (r"^positions$", "embeddings.position_embeddings"),
    (r"^embed\.", "embeddings.patch_embeddings.projection."),
)


class Architecture(NamedTuple):
    """What must be known to build the encoder of a file.

    Example:
        >>> Architecture((32, 48), 3, 8, dim=64, depth=2, heads=2, hidden=256).build().grid
        (1, 4, 6)
    """

    image_size: tuple[int, int]
    channels: int
    patch: int
    dim: int
    depth: int
    heads: int
    hidden: int

    def build(self) -> ViTEncoder:
        """Return an encoder of this architecture."""
        return ViTEncoder(
            (1, self.channels, *self.image_size),
            patch=self.patch,
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.hidden / self.dim,
        )


def load_ijepa(
    weights: Path | str | Mapping[str, Any],
    *,
    source: Source = "meta",
    image_size: tuple[int, int] | None = None,
    heads: int | None = None,
) -> ViTEncoder:
    """Return the encoder of an I-JEPA file, a folder, or the mapping read from one.

    Args:
        weights: Meta: a `.pth.tar` file or what it holds. `transformers`: a folder that
            `save_pretrained` wrote, its safetensors file, or a state dict.
        source: Whose names the weights have.
        image_size: Height and width; taken from `config.json`, or square, if not given.
        heads: Attention heads, which no weight tells; taken from `config.json`, or from the
            published size of this width, if not given.

    Raises:
        ValueError: a name or a shape that does not fit, or a fact that must be given.

    Example:
        >>> from jepa_world.encoders.vit import ViTEncoder
        >>> encoder = ViTEncoder((1, 3, 32, 32), dim=64, depth=2, heads=2)
        >>> exported, _ = to_transformers(encoder)
        >>> load_ijepa(exported, source="transformers", heads=2).grid
        (1, 4, 4)
    """
    config: dict[str, Any] = {}
    if not isinstance(weights, Mapping):
        weights, config = _read(Path(weights))
    table = _TRANSFORMERS if source == "transformers" else _META
    renamed = _renamed(_encoder_of(weights), table)
    if config:
        size = config["image_size"]
        image_size = image_size or ((size, size) if isinstance(size, int) else tuple(size))
        heads = heads or int(config["num_attention_heads"])
    encoder = architecture_of(renamed, image_size=image_size, heads=heads).build()
    for module in encoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = float(config.get("layer_norm_eps", 1e-6))
    _load_strictly(encoder, renamed)
    return encoder


def to_transformers(encoder: ViTEncoder) -> tuple[Weights, dict[str, Any]]:
    """Return the state dict and the configuration that `transformers.IJepaModel` has for this.

    Raises:
        ValueError: the encoder is built for clips; IJepaModel is for images.
    """
    if encoder.grid[0] != 1 or encoder.tubelet != 1:
        raise ValueError(f"encoder has the grid {encoder.grid}: IJepaModel takes one frame")
    weights: Weights = {}
    for name, value in encoder.state_dict().items():
        if ".attention.qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                weights[name.replace(".qkv.", f".{letter}.")] = part.clone()
        else:
            weights[name] = value.clone()
    patch = {"q": encoder.patch, "r": encoder.patch}
    weights["embed.weight"] = rearrange(weights["embed.weight"], "d (q r c) -> d c q r", **patch)
    weights["positions"] = encoder.positions.clone().unsqueeze(0)
    config = {
        "architectures": ["IJepaModel"],
        "model_type": "ijepa",
        "image_size": [encoder.grid[1] * encoder.patch, encoder.grid[2] * encoder.patch],
        "patch_size": encoder.patch,
        "num_channels": weights["embed.weight"].shape[1],
        "hidden_size": encoder.dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": encoder.heads,
        "intermediate_size": weights["blocks.0.mlp.0.weight"].shape[0],
        "layer_norm_eps": encoder.norm.eps,
    }
    return _renamed(weights, _EXPORT), config


def save_for_transformers(encoder: ViTEncoder, folder: Path) -> None:
    """Write a folder that `transformers.IJepaModel.from_pretrained` reads."""
    from safetensors.torch import save_file

    weights, config = to_transformers(encoder)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: value.contiguous() for name, value in weights.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def architecture_of(
    weights: Weights, *, image_size: tuple[int, int] | None = None, heads: int | None = None
) -> Architecture:
    """Read the architecture off weights with our names and their shapes.

    Raises:
        ValueError: a weight that tells it is missing, or a fact that must be given.
    """
    try:
        dim, channels, patch, _ = weights["embed.weight"].shape
        hidden, length = weights["blocks.0.mlp.0.weight"].shape[0], weights["positions"].shape[-2]
    except (KeyError, ValueError) as error:
        raise ValueError(f"not the weights of an I-JEPA encoder: {error!s}") from error
    side = round(length**0.5)
    size = image_size or (side * patch, side * patch)
    if (size[0] // patch) * (size[1] // patch) != length:
        raise ValueError(
            f"{length} positions of patches of {patch} do not make an image of {size}: give "
            "image_size=(height, width)"
        )
    published = {width: number for width, _, number, _ in SIZES.values()}
    if heads is None and dim not in published:
        raise ValueError(f"width {dim} is none of the published {sorted(published)}: give heads=")
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    return Architecture(size, channels, patch, dim, len(blocks), heads or published[dim], hidden)


def _read(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Read a weights file, or the one of a folder, and the `config.json` beside it."""
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin")]
        present = [file for file in found if file.is_file()]
        if not present:
            raise ValueError(f"{str(path)!r} has neither model.safetensors nor pytorch_model.bin")
        path = present[0]
    described = path.parent / "config.json"
    config = json.loads(described.read_text()) if described.is_file() else {}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path), config
    return torch.load(path, map_location="cpu", weights_only=True), config


def _encoder_of(weights: Mapping[str, Any]) -> Weights:
    """Return the encoder's own state dict: the teacher's, the student's, or the mapping itself."""
    for name in ("target_encoder", "encoder"):
        if isinstance(weights.get(name), Mapping):
            return dict(weights[name])
    return dict(weights)


def _renamed(weights: Weights, table: tuple[tuple[str, str], ...]) -> Weights:
    renamed: Weights = {}
    for name, value in weights.items():
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _load_strictly(encoder: ViTEncoder, weights: Weights) -> None:
    """Load weights that have our names and their shapes.

    Raises:
        ValueError: naming the first weight that is unknown, missing, or of another shape.
    """
    whole = dict(weights)
    for name in [name for name in whole if name.endswith(".attention.q.weight")]:
        for kind in ("weight", "bias"):
            parts = [name.replace(".q.weight", f".{letter}.{kind}") for letter in "qkv"]
            if all(part in whole for part in parts):
                joined = torch.cat([whole.pop(part) for part in parts])
                whole[name.replace(".q.weight", f".qkv.{kind}")] = joined
    positions = whole.pop("positions").reshape(encoder.positions.shape).float()
    whole["embed.weight"] = rearrange(whole["embed.weight"], "d c q r -> d (q r c)")
    own = encoder.state_dict()
    for name in sorted(own.keys() ^ whole.keys()):
        raise ValueError(f"the weights {'lack' if name in own else 'hold unknown'} {name!r}")
    for name, value in whole.items():
        if value.shape != own[name].shape:
            shapes = f"{tuple(value.shape)}, expected {tuple(own[name].shape)}"
            raise ValueError(f"the weights hold {name!r} of shape {shapes}")
    encoder.load_state_dict(whole)
    published = torch.allclose(positions, encoder.positions, atol=1e-4)
    if not published:  # learned positions are saved with the encoder; ours are computed
        encoder.register_buffer("positions", positions, persistent=True)
