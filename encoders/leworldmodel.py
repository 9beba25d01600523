"""The encoder of LeWorldModel: a vision transformer whose CLS token, projected, is the latent.

(https://arxiv.org/abs/2603.19312, section 3; the transformer is that of `transformers.ViTModel`.)
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from jepa_world.encoders.vit import SIZES, Size
from jepa_world.nn import BatchNorm, Block, take_tokens


class LeWorldModelEncoder(nn.Module):
    """Encode each frame by itself into one token.

    The published weights expect pixels of mean 0 and deviation 1 over ImageNet:
    `encoders.pretrained.fold_pixel_statistics` makes them ones of pixels in [0, 1].

    Args:
        observation_shape: `(t, c, hh, ww)`; any t is accepted later.
        dim: Width of the latent.
        size: Preset of the transformer's width, depth, heads and `mlp_ratio`.
        patch: Side of a patch in pixels.
        width: Width of the transformer, in place of the preset's.
        depth: Number of blocks, in place of the preset's.
        heads: Attention heads, in place of the preset's.
        mlp_ratio: Width of a block's hidden layer, as a multiple of `width`, in place of the
            preset's.
        hidden: Width of the projector's hidden layer.

    Raises:
        ValueError: the frame does not divide into patches, or the width into heads.

    Example:
        >>> import torch
        >>> encoder = LeWorldModelEncoder((1, 3, 28, 28), dim=32, width=64, depth=2, heads=2)
        >>> encoder(torch.rand(2, 4, 3, 28, 28)).shape
        torch.Size([2, 4, 1, 32])
    """

    def __init__(
        self,
        observation_shape: tuple[int, int, int, int],
        *,
        dim: int = 192,
        size: Size = "tiny",
        patch: int = 14,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        mlp_ratio: float | None = None,
        hidden: int = 2048,
    ) -> None:
        super().__init__()
        _, channels, rows, columns = observation_shape
        if rows % patch or columns % patch:
            raise ValueError(
                f"a frame of {rows} x {columns} does not divide into patches of {patch}"
            )
        preset_width, preset_depth, preset_heads, preset_ratio = SIZES[size]
        width, heads = width or preset_width, heads or preset_heads
        self.dim, self.num_tokens, self.patch = dim, 1, patch
        self.embed = nn.Linear(patch * patch * channels, width)
        self.cls = nn.Parameter(torch.zeros(width))
        tokens = 1 + (rows // patch) * (columns // patch)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=mlp_ratio or preset_ratio)
            for _ in range(depth or preset_depth)
        )
        self.norm = nn.LayerNorm(width)
        for part in self.modules():
            if isinstance(part, nn.LayerNorm):
                part.eps = 1e-12  # ViTModel's
        self.projector = nn.Sequential(
            nn.Linear(width, hidden), BatchNorm(hidden), nn.GELU(), nn.Linear(hidden, dim)
        )

    def forward(
        self, video: Float[Tensor, "b t c hh ww"], keep: Int[Tensor, "b k"] | None = None
    ) -> Tensor:
        """Return `(b t 1 d)`, or `(b k d)` of the frames `keep`."""
        patches = rearrange(
            video,
            "b t c (y q) (x r) -> (b t) (y x) (q r c)",
            q=self.patch,
            r=self.patch,
        )
        x = self.embed(patches).to(self.cls.dtype)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        z = self.projector(self.norm(x[:, 0])).to(self.cls.dtype)
        z = rearrange(z, "(b t) d -> b t 1 d", b=len(video))
        return z if keep is None else take_tokens(z.squeeze(2), keep)
