"""Vision transformers over patches of a clip, with fixed sine-cosine or rotary positions.

`ViTEncoder` returns patch tokens, `PooledViTEncoder` one vector for every time step. Neither has a
CLS token. (ViT, https://arxiv.org/abs/2010.11929, section 3.1; tubelets as in V-JEPA,
https://arxiv.org/abs/2404.08471, section 3.)
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from jepa_world.encoders.conv import ConvEncoder
from jepa_world.nn import (
    Block,
    Projector,
    grid_index,
    rotary_positions,
    sharing_weights,
    sincos_of_grid,
    take_tokens,
)

Size = Literal["tiny", "small", "base", "large", "huge", "giant"]
SIZES: dict[Size, tuple[int, int, int, float]] = {  # width, depth, heads, mlp_ratio
    "tiny": (192, 12, 3, 4.0),
    "small": (384, 12, 6, 4.0),
    "base": (768, 12, 12, 4.0),
    "large": (1024, 24, 16, 4.0),
    "huge": (1280, 32, 16, 4.0),
    "giant": (1408, 40, 22, 48 / 11),
}
FAINT = 0.05  # added to the deviation of a clip: noise of an empty one is not blown up


class ViTEncoder(nn.Module):
    """Encode a clip into its patch tokens; all tokens of a clip see each other.

    The encoder is built for clips of t frames. A longer video counts as several clips, each encoded
    by itself: built for t = 1, it encodes every frame by itself and accepts any number of them. An
    image is a clip of one frame, which fills a tubelet by being repeated. `for_clips` returns the
    same encoder for clips of another shape: images and video, short and long, small and large share
    one set of weights.

    Args:
        observation_shape: `(t, c, hh, ww)` of a clip.
        size: Preset of width, depth and heads.
        patch: Side of a patch in pixels.
        tubelet: Frames of a patch.
        dim: Width of the tokens, in place of the preset's.
        depth: Number of blocks, in place of the preset's.
        heads: Attention heads, in place of the preset's.
        mlp_ratio: Width of a block's hidden layer, as a multiple of the tokens' width, in place of
            the preset's.
        positions: Added to the patches (I-JEPA, V-JEPA), or turning queries and keys in every block
            (V-JEPA 2).
        stem: Channels of the first stage of a convolutional network that embeds every patch by
            itself, halving it until 4 pixels a side are left
            (https://arxiv.org/abs/2106.14881); 0 is a linear map.
        standardise: Bring every clip to mean 0 and deviation 1 first: brightness and contrast of
            the whole are not seen then.
        normalise: Bring every token to mean 0 and deviation 1 last: the latents of V-JEPA 2-AC.

    Raises:
        ValueError: the clip does not divide into patches, or the width into heads; heads too narrow
            for rotary positions.

    Example:
        >>> import torch
        >>> encoder = ViTEncoder((4, 3, 32, 32), tubelet=2, dim=64, depth=2, heads=2)
        >>> video = torch.rand(2, 4, 3, 32, 32)
        >>> encoder(video).shape
        torch.Size([2, 2, 16, 64])
        >>> encoder(video, keep=torch.tensor([[0, 5, 31], [7, 8, 9]])).shape
        torch.Size([2, 3, 64])
    """

    positions: Tensor  # (l d) to be added, or (2 l e) of rotary positions

    def __init__(
        self,
        observation_shape: tuple[int, int, int, int],
        *,
        size: Size = "tiny",
        patch: int = 8,
        tubelet: int = 1,
        dim: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        mlp_ratio: float | None = None,
        positions: Literal["sincos", "rotary"] = "sincos",
        stem: int = 0,
        standardise: bool = False,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        preset_dim, preset_depth, preset_heads, preset_ratio = SIZES[size]
        self.dim, self.heads = dim or preset_dim, heads or preset_heads
        self.patch, self.tubelet, self.rotates = patch, tubelet, positions == "rotary"
        self.standardise, self.normalise = standardise, normalise
        self._fit(observation_shape)
        numbers = (tubelet, patch, patch, observation_shape[1])
        self.embed = (
            ConvStem(numbers, self.dim, stem) if stem else nn.Linear(math.prod(numbers), self.dim)
        )
        self.blocks = nn.ModuleList(
            Block(self.dim, self.heads, mlp_ratio=mlp_ratio or preset_ratio)
            for _ in range(depth or preset_depth)
        )
        self.norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.apply(_initialise)

    def forward(
        self, video: Float[Tensor, "b t c hh ww"], keep: Int[Tensor, "b k"] | None = None
    ) -> Tensor:
        """Return `(b t' n d)`, or `(b k d)` of the tokens `keep`, the only ones that are computed.

        Raises:
            ValueError: the video is not a whole number of clips, or not one clip with `keep`.
        """
        frames = self.frames
        if video.shape[1] % frames or (keep is not None and video.shape[1] != frames):
            raise ValueError(
                f"encoder is built for clips of {frames} frames, got {video.shape[1]}: give a "
                f"multiple, or exactly {frames} with keep"
            )
        if frames == 1 < self.tubelet:
            video = repeat(video, "b t c hh ww -> b (t p) c hh ww", p=self.tubelet)
        patches = rearrange(
            video,
            "b (clip t p) c (y q) (x r) -> (b clip) (t y x) (p q r c)",
            t=self.grid[0],
            p=self.tubelet,
            q=self.patch,
            r=self.patch,
        )
        if self.standardise:
            std, mean = torch.std_mean(patches, (1, 2), keepdim=True)
            patches = (patches - mean) / (std + FAINT)
        if keep is not None:
            return self._encode(take_tokens(patches, keep), self.positions[..., keep, :])
        tokens = self._encode(patches, self.positions)
        return rearrange(
            tokens, "(b clip) (t n) d -> b (clip t) n d", b=len(video), n=self.num_tokens
        )

    def for_clips(self, observation_shape: tuple[int, int, int, int]) -> "ViTEncoder":
        """Return this encoder for clips of another shape `(t, c, hh, ww)`; both share all weights.

        Raises:
            ValueError: the clip does not divide into patches, or positions were learned.
        """
        if "positions" not in self._non_persistent_buffers_set:
            raise ValueError("encoder has learned positions: it is for clips of one shape only")
        other = sharing_weights(self)
        other._fit(observation_shape)
        other.positions = other.positions.to(self.positions.device)
        return other

    def _fit(self, observation_shape: tuple[int, int, int, int]) -> None:
        """Set what depends on the shape of clips."""
        frames, _, rows, columns = observation_shape
        if (frames > 1 and frames % self.tubelet) or rows % self.patch or columns % self.patch:
            raise ValueError(
                f"a clip of {frames} x {rows} x {columns} (frames, rows, columns) does not divide "
                f"into patches of {self.tubelet} x {self.patch} x {self.patch}"
            )
        self.frames = frames
        self.grid = (-(-frames // self.tubelet), rows // self.patch, columns // self.patch)
        self.num_tokens = self.grid[1] * self.grid[2]
        self.register_buffer("positions", self._positions(), persistent=False)

    def _positions(self) -> Tensor:
        if self.rotates:
            return rotary_positions(self.dim // self.heads, grid_index(*self.grid))
        return sincos_of_grid(self.dim, self.grid)

    def _encode(self, patches: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(patches).to(self.norm.weight.dtype)  # autocast halves maps, not their sum
        x, rotary = (x, positions) if self.rotates else (x + positions, None)
        for block in self.blocks:
            x = block(x, rotary=rotary)
        x = self.norm(x)
        return F.layer_norm(x, (self.dim,)) if self.normalise else x


class ConvStem(nn.Module):
    """Embed patches by convolutions, each by itself: none shows what its neighbours hold.

    Args:
        shape: `(p, q, q, c)` of a patch: frames, rows, columns, channels.
        dim: Width of the tokens.
        width: Channels of the first stage; every later one has twice as many.

    Raises:
        ValueError: a side that halvings do not lead to 4.

    Example:
        >>> import torch
        >>> ConvStem((2, 16, 16, 3), 32, 8)(torch.rand(4, 9, 1536)).shape
        torch.Size([4, 9, 32])
    """

    def __init__(self, shape: tuple[int, int, int, int], dim: int, width: int) -> None:
        super().__init__()
        self.shape = frames, side, _, channels = shape
        stages = side.bit_length() - 3
        if stages < 1 or side != 4 << stages:
            raise ValueError(f"a stem takes patches of 8, 16, 32 ... pixels a side, got {side}")
        patch = (1, frames * channels, side, side)
        self.conv = ConvEncoder(patch, dim=dim, width=width, stages=stages)

    def forward(self, patches: Float[Tensor, "b l pqrc"]) -> Float[Tensor, "b l d"]:
        """Return a token of every patch, whose numbers are in the order of `shape`."""
        pixels = patches.unflatten(2, self.shape)
        return self.conv(rearrange(pixels, "b l p q r c -> b l (p c) q r")).squeeze(2)


class PooledViTEncoder(nn.Module):
    """Encode each frame by itself into one token: the mean of its patch tokens, projected.

    Args:
        observation_shape: `(t, c, hh, ww)`; any t is accepted later.
        dim: Width of the latent.
        size: Preset of the transformer's width, depth and heads.
        patch: Side of a patch in pixels.
        width: Width of the transformer, in place of the preset's.
        depth: Number of blocks, in place of the preset's.
        heads: Attention heads, in place of the preset's.
        hidden: Width of the projector's hidden layer; none makes the projector linear.

    Raises:
        ValueError: the frame does not divide into patches, or the width into heads.

    Example:
        >>> import torch
        >>> encoder = PooledViTEncoder((1, 3, 32, 32), dim=32, width=64, depth=2, heads=2)
        >>> encoder(torch.rand(2, 4, 3, 32, 32)).shape
        torch.Size([2, 4, 1, 32])
    """

    def __init__(
        self,
        observation_shape: tuple[int, int, int, int],
        *,
        dim: int = 32,
        size: Size = "tiny",
        patch: int = 8,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        hidden: int | None = 2048,
    ) -> None:
        super().__init__()
        frame = (1, *observation_shape[1:])
        self.vit = ViTEncoder(frame, size=size, patch=patch, dim=width, depth=depth, heads=heads)
        self.projector = Projector(self.vit.dim, dim, hidden=hidden)
        self.dim, self.num_tokens = dim, 1

    def forward(
        self, video: Float[Tensor, "b t c hh ww"], keep: Int[Tensor, "b k"] | None = None
    ) -> Tensor:
        """Return `(b t 1 d)`, or `(b k d)` of the frames `keep`."""
        z = self.projector(self.vit(video).mean(2))
        return z.unsqueeze(2) if keep is None else take_tokens(z, keep)


def _initialise(module: nn.Module) -> None:
    """Start linear maps as MAE does (arXiv 2111.06377, appendix A.1): Xavier, patches included.

    The usual std of 0.02 is right for a patch of 768 numbers and a width of 768. For 16 numbers it
    drowns the pixels in the positions: an I-JEPA of width 64 then never learns to see.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:  # a stem's maps have none
            nn.init.zeros_(module.bias)
