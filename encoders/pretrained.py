"""Read I-JEPA, V-JEPA 2 and LeWorldModel weights; write an I-JEPA as `transformers` has it.

Keys are converted, nothing is left over and nothing missing: a file that does not fit is an error.
Meta's files hold the teacher as `target_encoder` (the one that was evaluated) and are preferred in
that order; `transformers` has folders with `config.json` and `model.safetensors`; LeWorldModel has
folders with `config.json` and `weights.pt`, as stable-worldmodel writes them.

Published encoders expect pixels of mean 0 and deviation 1 over ImageNet, those of this package
pixels in [0, 1]: `fold_pixel_statistics` makes the former the latter.
(I-JEPA, https://arxiv.org/abs/2301.08243; V-JEPA 2, https://arxiv.org/abs/2506.09985; LeWorldModel,
https://arxiv.org/abs/2603.19312.)
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from jepa_world.encoders.leworldmodel import LeWorldModelEncoder
from jepa_world.encoders.vit import SIZES, ViTEncoder
from jepa_world.nn import IMAGENET_MEAN, IMAGENET_STD, AttentiveProbe
from jepa_world.predictors.block_causal import BlockCausalPredictor
from jepa_world.predictors.leworldmodel import LeWorldModelPredictor
from jepa_world.predictors.masked import MaskedTransformer

Weights = dict[str, Tensor]
Source = Literal["meta", "transformers"]
Table = tuple[tuple[str, str], ...]
Fact = TypeVar("Fact")
_PREFIX = (r"^(module\.)?(backbone\.)?", "")
_META_BLOCKS = (
    (r"\.attn\.(qkv|proj)\.", r".attention.\1."),
    (r"\.attention\.proj\.", ".attention.out."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
)
_META = (
    _PREFIX,
    (r"^pos_embed$", "positions"),
    (r"^patch_embed\.proj\.", "embed."),
    *_META_BLOCKS,
)
_META_PREDICTOR = (
    _PREFIX,
    (r"^predictor_pos_embed$", "positions"),
    (r"^predictor_proj\.", "out."),
    (r"^predictor_(embed|blocks|norm)\.", r"\1."),
    (r"^(action|state)_encoder\.", r"\1."),
    *_META_BLOCKS,
)
_META_PROBE = (
    _PREFIX,
    (r"^pooler\.query_tokens$", "query"),
    (r"^pooler\.cross_attention_block\.", ""),
    (r"^xattn\.", "attention."),
    (r"^mlp\.fc1\.", "mlp.0."),
    (r"^mlp\.fc2\.", "mlp.3."),
    (r"^pooler\.blocks\.", "blocks."),
    (r"^linear\.", "out."),
    *_META_BLOCKS,
)
_IJEPA = (
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
_VJEPA2 = (
    (r"^embeddings\.(patch_embeddings\.proj|predictor_embeddings)\.", "embed."),
    (r"^embeddings\.mask_tokens$", "mask_token"),
    (r"^layer\.", "blocks."),
    (r"\.attention\.(q|k|v)(uery|ey|alue)\.", r".attention.\1."),
    (r"\.attention\.proj\.", ".attention.out."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
    (r"^layernorm\.", "norm."),
    (r"^proj\.", "out."),
)
_VJEPA2_PROBE = (
    (r"^pooler\.query_tokens$", "query"),
    (r"^pooler\.cross_attention_layer\.", ""),
    (r"^pooler\.self_attention_layers\.", "blocks."),
    (r"(^|\.)layer_norm([12])\.", r"\1norm\2."),
    (r"(^|\.)(cross_attn|self_attn)\.([qkv])_proj\.", r"\1attention.\3."),
    (r"\.self_attn\.out_proj\.", ".attention.out."),
    (r"(^|\.)mlp\.fc1\.", r"\1mlp.0."),
    (r"(^|\.)mlp\.fc2\.", r"\1mlp.3."),
    (r"^classifier\.", "out."),
)
_LEWORLDMODEL = (
    (r"^encoder\.embeddings\.cls_token$", "cls"),
    (r"^encoder\.", ""),
    (r"^projector\.net\.", "projector."),
    *_IJEPA,
)
_LEWORLDMODEL_PREDICTOR = (
    (r"^predictor\.pos_embedding$", "positions"),
    (r"^predictor\.transformer\.norm\.", "norm."),
    (r"^predictor\.transformer\.layers\.", "blocks."),
    (r"\.attn\.norm\.", ".norm1."),
    (r"\.attn\.to_qkv\.", ".attention.qkv."),
    (r"\.attn\.to_out\.0\.", ".attention.out."),
    (r"\.mlp\.net\.0\.", ".norm2."),
    (r"\.mlp\.net\.1\.", ".mlp.0."),
    (r"\.mlp\.net\.4\.", ".mlp.3."),
    (r"^action_encoder\.patch_embed\.", "modulation.0."),
    (r"^action_encoder\.embed\.0\.", "modulation.1."),
    (r"^action_encoder\.embed\.2\.", "modulation.3."),
    (r"^pred_proj\.net\.", "head."),
)
_LEWORLDMODEL_ENCODER_FACTS = {
    *("size", "patch_size", "image_size", "hidden_size", "num_hidden_layers"),
    *("num_attention_heads", "intermediate_size", "pretrained", "use_mask_token", "_target_"),
}
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
_HEADS = {width: heads for width, _, heads, _ in SIZES.values()}
_OF_PREDICTOR = ("predictor.", "action_encoder.", "pred_proj.")
_COUNTER = ".num_batches_tracked"  # of batch norms: counts steps, and is not used
_PREDICTOR_HEADS = {384: 12}
_AC_HEADS = {1024: 16}
_FRAMES = {1024: 64, 1280: 64, 1408: 64}
_IMAGE_SIZES = {1024: (256, 256), 1280: (256, 256)}  # 1408 was published at 256 and at 384
_AC_IMAGE_SIZES = {1408: (256, 256)}
_META_PROBE_HEADS = 16  # whatever the encoder's number


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


class LeWorldModelParts(NamedTuple):
    """What must be known to build the two parts of a published LeWorldModel.

    Example:
        >>> sizes = {"dim": 32, "width": 64, "depth": 1, "heads": 2}
        >>> parts = LeWorldModelParts((1, 3, 28, 28), 10, sizes, {"depth": 2})
        >>> encoder, predictor = parts.build()
        >>> encoder.dim, len(predictor.blocks)
        (32, 2)
    """

    observation_shape: tuple[int, int, int, int]
    action_dim: int
    encoder: dict[str, Any]
    predictor: dict[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "LeWorldModelParts":
        """Read a `config.json` of stable-worldmodel.

        Raises:
            ValueError: a fact is missing, or one that is not known here.
        """
        seen, acting = _section_of(config, "encoder"), _section_of(config, "predictor")
        for name in sorted(seen.keys() - _LEWORLDMODEL_ENCODER_FACTS):
            raise ValueError(f"config.json gives the encoder {name!r}, which is not known here")
        side, size = int(_told(seen, "image_size")), _told(seen, "size")
        if size not in SIZES:
            raise ValueError(f"config.json names the size {size!r}, known are {sorted(SIZES)}")
        actions, heads = (_section_of(config, name) for name in ("action_encoder", "pred_proj"))
        projector = _section_of(config, "projector")
        width = int(seen.get("hidden_size", SIZES[size][0]))
        encoder = {
            "dim": int(_told(projector, "output_dim")),
            "size": size,
            "patch": int(_told(seen, "patch_size")),
            "width": width,
            "depth": int(seen.get("num_hidden_layers", SIZES[size][1])),
            "heads": int(seen.get("num_attention_heads", SIZES[size][2])),
            "mlp_ratio": int(seen.get("intermediate_size", 4 * width)) / width,
            "hidden": int(_told(projector, "hidden_dim")),
        }
        predictor = {
            "depth": int(_told(acting, "depth")),
            "heads": int(_told(acting, "heads")),
            "head_dim": int(acting.get("dim_head", 64)),
            "hidden": int(_told(acting, "mlp_dim")),
            "head": int(_told(heads, "hidden_dim")),
            "smooth": int(actions.get("smoothed_dim", 10)),
            "history": int(_told(acting, "num_frames")),
            "dropout": float(acting.get("dropout", 0.0)),
        }
        return cls((1, 3, side, side), int(_told(actions, "input_dim")), encoder, predictor)

    def build(self) -> tuple[LeWorldModelEncoder, LeWorldModelPredictor]:
        """Return an encoder and a predictor of these sizes."""
        encoder = LeWorldModelEncoder(self.observation_shape, **self.encoder)
        return encoder, LeWorldModelPredictor(encoder.dim, self.action_dim, **self.predictor)


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
        ValueError: a file that is damaged, a name or a shape that does not fit, or a fact that must
            be given.

    Example:
        >>> from jepa_world.encoders.vit import ViTEncoder
        >>> encoder = ViTEncoder((1, 3, 32, 32), dim=64, depth=2, heads=2)
        >>> exported, _ = to_transformers(encoder)
        >>> load_ijepa(exported, source="transformers", heads=2).grid
        (1, 4, 4)
    """
    content, config = _opened(weights, source)
    table = _IJEPA if source == "transformers" else _META
    renamed = _renamed(_encoder_of(content), table)
    if config:
        size = _told(config, "image_size")
        image_size = image_size or ((size, size) if isinstance(size, int) else tuple(size))
        heads = heads or int(_told(config, "num_attention_heads"))
    encoder = architecture_of(renamed, image_size=image_size, heads=heads).build()
    positions = renamed.pop("positions").reshape(encoder.positions.shape).float()
    _fill(encoder, renamed, eps=float(config.get("layer_norm_eps", 1e-6)))
    published = torch.allclose(positions, encoder.positions, atol=1e-4)
    if not published:  # learned positions are saved with the encoder; ours are computed
        encoder.register_buffer("positions", positions, persistent=True)
    return encoder


def load_vjepa2(
    weights: Path | str | Mapping[str, Any],
    *,
    source: Source = "meta",
    frames: int | None = None,
    image_size: tuple[int, int] | None = None,
    heads: int | None = None,
    predictor_heads: int | None = None,
) -> tuple[ViTEncoder, MaskedTransformer]:
    """Return the encoder and the masked predictor of a V-JEPA 2 file, a folder, or its content.

    What no weight tells is taken from the argument, else from `config.json`, else from what was
    published for this width. With rotary positions, weights serve any number of frames and any
    image size; where that is not square, rows and columns are counted as they are, which Meta's and
    `transformers`' predictors do not. `transformers` asks with mask token 1: `predictor(...,
    mask_token=1)`.

    Args:
        weights: Meta: a `.pt` file or what it holds. `transformers`: a folder that
            `save_pretrained` wrote (of a classifier too: its head is left to
            `load_attentive_probe`), its safetensors file, or a state dict.
        source: Whose names the weights have.
        frames: Of a clip.
        image_size: Height and width.
        heads: Attention heads of the encoder.
        predictor_heads: Attention heads of the predictor.

    Raises:
        ValueError: a file that is damaged, a name or a shape that does not fit, or a fact that must
            be given.
    """
    content, config = _opened(weights, source)
    parts = _VJEPA2_PARTS[source](content)
    if config:
        side = int(_told(config, "crop_size"))
        frames = frames or int(_told(config, "frames_per_clip"))
        image_size = image_size or (side, side)
        heads = heads or int(_told(config, "num_attention_heads"))
        predictor_heads = predictor_heads or int(_told(config, "pred_num_attention_heads"))
        _check_activation(config)
        for part, name in zip(parts, ("num_hidden_layers", "pred_num_hidden_layers"), strict=True):
            _check_depth(part, int(_told(config, name)))
    eps = float(config.get("layer_norm_eps", 1e-6))
    encoder = _rotary_encoder(parts[0], frames, image_size, heads)
    _fill(encoder, parts[0], eps)
    predictor = _rotary_predictor(parts[1], encoder, predictor_heads)
    _fill(predictor, parts[1], eps)
    return encoder, predictor


def load_vjepa2_ac(
    weights: Path | str | Mapping[str, Any],
    *,
    image_size: tuple[int, int] | None = None,
    heads: int | None = None,
    predictor_heads: int | None = None,
) -> tuple[ViTEncoder, BlockCausalPredictor]:
    """Return the encoder of frames and the predictor of a V-JEPA 2-AC file, or of its content.

    Latents and predictions are layer-normed. The published world model shows its video encoder
    every frame twice; here the kernel of its patches is summed over the two, which is the same for
    half the pixels. `extrinsics_encoder`, which the published model holds and does not use, is left
    out. Where the image is not square, columns are counted as they are, not stretched to the rows.

    Args:
        weights: A `.pt` file of Meta's, or what it holds.
        image_size: Height and width; 256 x 256 at the published width.
        heads: Attention heads of the encoder, published for its width.
        predictor_heads: Attention heads of the predictor, 16 at the published width.

    Raises:
        ValueError: a file that is damaged, a name or a shape that does not fit, or a fact that must
            be given.
    """
    content, _ = _opened(weights, "meta")
    seeing = _renamed(_section(content, "target_encoder", "encoder"), _META)
    seeing.pop("positions", None)
    acting = _renamed(_section(content, "predictor"), _META_PREDICTOR)
    acting = {name: v for name, v in acting.items() if not name.startswith("extrinsics_encoder.")}
    width, *_ = _shape(seeing, "embed.weight", 5)
    seeing["embed.weight"] = seeing["embed.weight"].sum(2, keepdim=True)
    size = _known("image_size", image_size, _AC_IMAGE_SIZES, width)
    encoder = _rotary_encoder(seeing, 1, size, heads, normalise=True)
    _fill(encoder, seeing, eps=1e-6)
    predictor = _acting_predictor(acting, encoder, predictor_heads)
    _fill(predictor, acting, eps=1e-6)
    return encoder, predictor


def load_leworldmodel(
    path: Path | str,
) -> tuple[LeWorldModelEncoder, LeWorldModelPredictor, LeWorldModelParts]:
    """Return the encoder and the predictor of a published LeWorldModel, and their sizes.

    They are the published functions: of pixels normalised over ImageNet, and of actions normalised
    over the dataset. `fold_pixel_statistics` and `fold_action_statistics` make them functions of
    what an environment has; `WorldModel(encoder, predictor, SIGReg(), weight=0.0)` plans with them.

    Args:
        path: A folder with `weights.pt` and `config.json`, or the first of them with the other
            beside it.

    Raises:
        ValueError: a file that is damaged or missing, a name or a shape that does not fit.
    """
    path = Path(path)
    content, config = _read(path / "weights.pt" if path.is_dir() else path)
    if not config:
        raise ValueError(f"{str(path)!r} has no config.json beside its weights")
    weights = {k: v for k, v in _tensors(content).items() if not k.endswith(_COUNTER)}
    for name in weights:
        if not name.startswith(("encoder.", "projector.", *_OF_PREDICTOR)):
            raise ValueError(f"the weights hold unknown {name!r}")
    seeing = {k: v for k, v in weights.items() if not k.startswith(_OF_PREDICTOR)}
    acting = {k: v for k, v in weights.items() if k.startswith(_OF_PREDICTOR)}
    parts = LeWorldModelParts.of(config)
    encoder, predictor = parts.build()
    _fill(encoder, _bare(_renamed(seeing, _LEWORLDMODEL), encoder))
    acting = _bare(_renamed(acting, _LEWORLDMODEL_PREDICTOR), predictor)
    _fill(predictor, _joined_modulations(acting))
    return encoder.eval(), predictor.eval(), parts


def load_attentive_probe(
    weights: Path | str | Mapping[str, Any],
    *,
    source: Source = "meta",
    heads: int | None = None,
    number: int = 0,
) -> AttentiveProbe:
    """Return the attentive probe of a V-JEPA 2 classifier's file, folder, or its content.

    Args:
        weights: Meta: a `.pt` file with `classifiers`, what it holds, or one of them.
            `transformers`: a folder of a `VJEPA2ForVideoClassification`, its safetensors file, or a
            state dict.
        source: Whose names the weights have.
        heads: Attention heads; 16 in Meta's probes, those of the encoder in `transformers`.
        number: Of Meta's classifiers, which differ in how they were trained.

    Raises:
        ValueError: a file that is damaged, a name or a shape that does not fit, or a fact that must
            be given.
    """
    content, config = _opened(weights, source)
    if source == "transformers":
        named = {k: v for k, v in content.items() if k.startswith(("pooler.", "classifier."))}
        renamed = _renamed(_tensors(named), _VJEPA2_PROBE)
        eps = float(config.get("layer_norm_eps", 1e-6))
        heads = heads or (int(_told(config, "num_attention_heads")) if config else None)
    else:
        renamed = _renamed(_tensors(_classifier(content, number)), _META_PROBE)
        eps, heads = 1e-5, heads or _META_PROBE_HEADS
    classes, dim = _shape(renamed, "out.weight", 2)
    heads = _known("heads", heads, _HEADS, dim)
    probe = AttentiveProbe(dim, classes, heads=heads, depth=_depth(renamed))
    if "query" in renamed:
        renamed["query"] = _rows(renamed["query"])
    _fill(probe, renamed, eps)
    return probe


def fold_action_statistics(
    predictor: LeWorldModelPredictor, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Make a predictor of actions (a - mean) / std one of the actions a, in place.

    Where a step has several actions side by side, each has the same statistics.

    Raises:
        ValueError: the statistics do not divide the predictor's actions, or a deviation of zero.

    Example:
        >>> predictor = LeWorldModelPredictor(32, 10, depth=1, heads=2)
        >>> fold_action_statistics(predictor, mean=(0.1, -0.2), std=(0.5, 0.4))
    """
    first = predictor.modulation[0]
    assert isinstance(first, nn.Linear)
    times, rest = divmod(first.in_features, len(mean) or 1)
    if rest or len(std) != len(mean) or not len(mean) or min(std) <= 0:
        raise ValueError(
            f"actions of {first.in_features} numbers need a mean and a positive deviation for each "
            f"of theirs or of several side by side, got {tuple(mean)} and {tuple(std)}"
        )
    means, stds = (torch.tensor(x).repeat(times).to(first.weight) for x in (mean, std))
    with torch.no_grad():
        first.weight.div_(stds)
        first.bias.sub_(first.weight @ means)


def fold_pixel_statistics(
    encoder: ViTEncoder | LeWorldModelEncoder,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> None:
    """Make an encoder of pixels (x - mean) / std, by channel, one of pixels x in [0, 1].

    The patches' linear map takes the statistics up, in place: it costs nothing later.

    Raises:
        ValueError: the encoder has a stem in the place of that map.

    Example:
        >>> encoder = ViTEncoder((1, 3, 32, 32), dim=64, depth=2, heads=2)
        >>> fold_pixel_statistics(encoder)
    """
    embed = encoder.embed
    if not isinstance(embed, nn.Linear):
        raise ValueError("statistics go into a linear map of patches, and the encoder has a stem")
    pixels = embed.in_features // len(mean)
    means, stds = (repeat(torch.tensor(x), "c -> (pixels c)", pixels=pixels) for x in (mean, std))
    with torch.no_grad():
        embed.weight.div_(stds.to(embed.weight))
        embed.bias.sub_(embed.weight @ means.to(embed.weight))


def to_transformers(encoder: ViTEncoder) -> tuple[Weights, dict[str, Any]]:
    """Return the state dict and the configuration that `transformers.IJepaModel` has for this.

    Raises:
        ValueError: the encoder is built for clips, has a stem or rotary positions: IJepaModel is
            for images, and adds positions to a linear map of patches.
    """
    if encoder.grid[0] != 1 or encoder.tubelet != 1:
        raise ValueError(f"encoder has the grid {encoder.grid}: IJepaModel takes one frame")
    if encoder.rotates or not isinstance(encoder.embed, nn.Linear):
        raise ValueError("encoder has a stem or rotary positions, which IJepaModel lacks")
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
    heads = _known("heads", heads, _HEADS, dim)
    return Architecture(size, channels, patch, dim, _depth(weights), heads, hidden)


def _rotary_encoder(
    weights: Weights,
    frames: int | None,
    image_size: tuple[int, int] | None,
    heads: int | None,
    *,
    normalise: bool = False,
) -> ViTEncoder:
    """Build the V-JEPA 2 encoder that weights with our names are of."""
    dim, channels, tubelet, patch, _ = _shape(weights, "embed.weight", 5)
    hidden, _ = _shape(weights, "blocks.0.mlp.0.weight", 2)
    frames = _known("frames", frames, _FRAMES, dim)
    image_size = _known("image_size", image_size, _IMAGE_SIZES, dim)
    return ViTEncoder(
        (frames, channels, *image_size),
        patch=patch,
        tubelet=tubelet,
        dim=dim,
        depth=_depth(weights),
        heads=_known("heads", heads, _HEADS, dim),
        mlp_ratio=hidden / dim,
        positions="rotary",
        normalise=normalise,
    )


def _rotary_predictor(
    weights: Weights, encoder: ViTEncoder, heads: int | None
) -> MaskedTransformer:
    """Build the V-JEPA 2 predictor that weights with our names are of."""
    width, _ = _shape(weights, "embed.weight", 2)
    hidden, _ = _shape(weights, "blocks.0.mlp.0.weight", 2)
    tokens = weights["mask_token"]
    return MaskedTransformer(
        encoder.dim,
        encoder.grid,
        width=width,
        depth=_depth(weights),
        heads=_known("predictor_heads", heads, _PREDICTOR_HEADS, width),
        mlp_ratio=hidden / width,
        positions="rotary",
        mask_tokens=1 if tokens.ndim == 1 else len(tokens),
    )


def _acting_predictor(
    weights: Weights, encoder: ViTEncoder, heads: int | None
) -> BlockCausalPredictor:
    """Build the V-JEPA 2-AC predictor that weights with our names are of."""
    width, action_dim = _shape(weights, "action.weight", 2)
    hidden, _ = _shape(weights, "blocks.0.mlp.0.weight", 2)
    return BlockCausalPredictor(
        encoder.dim,
        action_dim,
        rows=encoder.grid[1],
        state_dim=_shape(weights, "state.weight", 2)[1],
        width=width,
        depth=_depth(weights),
        heads=_known("predictor_heads", heads, _AC_HEADS, width),
        mlp_ratio=hidden / width,
        normalise=True,
    )


def _known(name: str, given: Fact | None, published: dict[int, Fact], width: int) -> Fact:
    """Return what was given, or what was published for this width."""
    if given is not None:
        return given
    if width not in published:
        raise ValueError(
            f"no weight tells {name}, and width {width} is none of the published "
            f"{sorted(published)}: give {name}="
        )
    return published[width]


def _shape(weights: Weights, name: str, axes: int) -> tuple[int, ...]:
    """Return the shape of a weight that the architecture is read off."""
    if name not in weights:
        raise ValueError(f"the weights lack {name!r}")
    shape = tuple(weights[name].shape)
    if len(shape) != axes:
        raise ValueError(f"the weights hold {name!r} of shape {shape}, expected {axes} axes")
    return shape


def _depth(weights: Weights) -> int:
    return len({name.split(".")[1] for name in weights if name.startswith("blocks.")})


def _check_depth(weights: Weights, expected: int) -> None:
    if _depth(weights) != expected:
        raise ValueError(
            f"the weights hold {_depth(weights)} blocks where config.json says {expected}"
        )


def _check_activation(config: dict[str, Any]) -> None:
    """Refuse what no weight shows: blocks here have a GELU."""
    if _told(config, "hidden_act") != "gelu":
        raise ValueError(f"config.json says hidden_act {config['hidden_act']!r}, expected 'gelu'")


def _section_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if not isinstance(config.get(name), Mapping):
        raise ValueError(f"config.json has no section {name!r}")
    return config[name]


def _told(config: Mapping[str, Any], name: str) -> Any:
    if name not in config:
        raise ValueError(f"config.json lacks {name!r}")
    return config[name]


def _opened(
    weights: Path | str | Mapping[str, Any], source: Source
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return the content of a file or a folder, and what `transformers` says of it, if anything."""
    if isinstance(weights, Mapping):
        return weights, {}
    content, config = _read(Path(weights))
    return content, config if source == "transformers" else {}


def _read(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Read a weights file, or the one of a folder, and the `config.json` beside it."""
    if path.is_dir():
        found = [path / name for name in ("model.safetensors", "pytorch_model.bin")]
        present = [file for file in found if file.is_file()]
        if not present:
            raise ValueError(f"{str(path)!r} has neither model.safetensors nor pytorch_model.bin")
        path = present[0]
    described = path.parent / "config.json"
    try:
        config = json.loads(described.read_text()) if described.is_file() else {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(described)!r} cannot be read: {error}") from error
    try:
        content = _tensors_of_file(path)
    except MemoryError:
        raise
    except Exception as error:  # torch has errors of every kind for bytes that are no pickle
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{str(path)!r} cannot be read as weights alone: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, not named weights")
    return content, config


def _tensors_of_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _encoder_of(weights: Mapping[str, Any]) -> Weights:
    """Return the encoder's own state dict: the teacher's, the student's, or the mapping itself."""
    for name in ("target_encoder", "encoder"):
        if isinstance(weights.get(name), Mapping):
            return _tensors(weights[name])
    return _tensors(weights)


def _section(weights: Mapping[str, Any], *names: str) -> Weights:
    """Return the state dict of the first of these names that a file of Meta's has."""
    for name in names:
        if isinstance(weights.get(name), Mapping):
            return _tensors(weights[name])
    raise ValueError(f"the file holds no {names[0]!r}, but {sorted(map(str, weights))[:6]}")


def _classifier(weights: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    """Return one of Meta's classifiers, or the mapping itself if it is one."""
    if "classifiers" not in weights:
        return weights
    classifiers = weights["classifiers"]
    if not 0 <= number < len(classifiers):
        raise ValueError(f"the file holds {len(classifiers)} classifiers, none has number {number}")
    return classifiers[number]


def _tensors(weights: Mapping[str, Any]) -> Weights:
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name!r} is a {type(value).__name__}, not a weight")
    return dict(weights)


def _vjepa2_of_meta(weights: Mapping[str, Any]) -> tuple[Weights, Weights]:
    """Return the weights of encoder and predictor under our names, from a file of Meta's.

    Their sine-cosine positions, which rotary models carry along unused, are left out by name.
    """
    encoder = _renamed(_section(weights, "target_encoder", "encoder"), _META)
    predictor = _renamed(_section(weights, "predictor"), _META_PREDICTOR)
    for part in (encoder, predictor):
        part.pop("positions", None)
    numbers = range(sum(name.startswith("mask_tokens.") for name in predictor))
    for number in numbers:
        _shape(predictor, f"mask_tokens.{number}", 3)
    tokens = [predictor.pop(f"mask_tokens.{number}") for number in numbers]
    if not tokens:
        raise ValueError("the weights lack 'mask_tokens.0'")
    predictor["mask_token"] = _rows(torch.cat(tokens))
    return encoder, predictor


def _vjepa2_of_transformers(weights: Mapping[str, Any]) -> tuple[Weights, Weights]:
    """Return the weights of encoder and predictor under our names, from a state dict."""
    whole = {name.removeprefix("vjepa2."): v for name, v in _tensors(weights).items()}
    known = ("encoder.", "predictor.", "pooler.", "classifier.")
    for name in whole:
        if not name.startswith(known):
            raise ValueError(f"the weights hold unknown {name!r}")
    encoder, predictor = (
        _renamed({k.removeprefix(p): v for k, v in whole.items() if k.startswith(p)}, _VJEPA2)
        for p in known[:2]
    )
    if "mask_token" not in predictor:
        raise ValueError("the weights lack 'predictor.embeddings.mask_tokens'")
    predictor["mask_token"] = _rows(predictor["mask_token"])
    return encoder, predictor


_VJEPA2_PARTS = {"meta": _vjepa2_of_meta, "transformers": _vjepa2_of_transformers}


def _rows(tokens: Tensor) -> Tensor:
    """Return learned tokens `(n d)` of any number of axes, or `(d)` of a single one."""
    return tokens.reshape(-1, tokens.shape[-1]).squeeze(0)


def _bare(weights: Weights, module: nn.Module) -> Weights:
    """Return the weights without the axes of one that a batch or a convolution of width 1 has."""
    own, bare = module.state_dict(), dict(weights)
    for name in ("cls", "positions", "modulation.0.weight"):
        if name in own and name in bare and bare[name].numel() == own[name].numel():
            bare[name] = bare[name].reshape(own[name].shape)
    return bare


def _joined_modulations(weights: Weights) -> Weights:
    """Join the modulations of all blocks, which the predictor has in one linear map."""
    whole = dict(weights)
    for kind in ("weight", "bias"):
        parts = [f"blocks.{n}.adaLN_modulation.1.{kind}" for n in range(_depth(weights))]
        if all(part in whole for part in parts):
            whole[f"modulation.5.{kind}"] = _cat(whole, parts)
    return whole


def _renamed(weights: Weights, table: Table) -> Weights:
    renamed: Weights = {}
    for name, value in weights.items():
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def _fill(module: nn.Module, weights: Weights, eps: float | None = None) -> None:
    """Load weights that have our names and their shapes, into layer norms of this eps, if given.

    Raises:
        ValueError: naming the first weight that is unknown, missing, or of another shape.
    """
    own = module.state_dict()
    whole = _joined(list(own), weights)
    if "embed.weight" in whole and whole["embed.weight"].ndim > 2:
        whole["embed.weight"] = _flat_patches(whole["embed.weight"])
    for name in sorted(own.keys() ^ whole.keys()):
        raise ValueError(f"the weights {'lack' if name in own else 'hold unknown'} {name!r}")
    for name, value in whole.items():
        if value.shape != own[name].shape:
            shapes = f"{tuple(value.shape)}, expected {tuple(own[name].shape)}"
            raise ValueError(f"the weights hold {name!r} of shape {shapes}")
    module.load_state_dict(whole)
    for part in module.modules():
        if isinstance(part, nn.LayerNorm) and eps is not None:
            part.eps = eps


def _joined(own: list[str], weights: Weights) -> Weights:
    """Join queries, keys and values where the module has them in one."""
    whole = dict(weights)
    for name in own:
        found = re.fullmatch(r"(.*\battention)\.(qkv|kv)\.(weight|bias)", name)
        if found is None:
            continue
        before, letters, kind = found.groups()
        parts = [f"{before}.{letter}.{kind}" for letter in letters]
        if all(part in whole for part in parts):
            whole[name] = _cat(whole, parts)
    return whole


def _cat(weights: Weights, names: list[str]) -> Tensor:
    """Take these weights out and return them as one."""
    parts = [weights.pop(name) for name in names]
    for name, part in zip(names, parts, strict=True):
        if part.shape != parts[0].shape:
            shapes = f"{tuple(part.shape)}, expected {tuple(parts[0].shape)}"
            raise ValueError(f"the weights hold {name!r} of shape {shapes} as {names[0]!r}")
    return torch.cat(parts)


def _flat_patches(kernel: Tensor) -> Tensor:
    """Return the linear map of patches that a convolution with this kernel is."""
    if kernel.ndim == 5:
        return rearrange(kernel, "d c p q r -> d (p q r c)")
    return rearrange(kernel, "d c q r -> d (q r c)")
