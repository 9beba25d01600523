"""Predict the tokens that were not seen from those that were, a transformer with mask tokens.

(I-JEPA, arXiv 2301.08243, section 3; V-JEPA, 2404.08471, section 3.1: all targets in one pass.)
"""

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from jepa_world.nn import Block, grid_index, rotary_positions, sincos_positions


class MaskedTransformer(nn.Module):
    """Let context tokens and one mask token for each target exchange information.

    A target is told apart by its position alone: fixed sine-cosine positions of the grid are added
    to all tokens, or rotary ones turn their queries and keys. Only the targets are read out.

    Args:
        dim: Width of a latent token.
        grid: `(t', rows, columns)` of the encoder's tokens.
        width: Width of the predictor; narrower than the encoder is cheap and no worse (I-JEPA,
            table 12: 384 beats 1024).
        depth: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Width of a block's hidden layer, as a multiple of `width`.
        positions: Added to the tokens (I-JEPA, V-JEPA) or rotary (V-JEPA 2).
        mask_tokens: Number of mask tokens to choose from, one for each kind of mask.

    Raises:
        ValueError: the width does not divide into heads, or no mask token; heads too narrow for
            rotary positions.

    Example:
        >>> import torch
        >>> predictor = MaskedTransformer(64, (1, 7, 7), width=32, depth=1, heads=2)
        >>> seen, unseen = torch.tensor([[0, 1, 8]]), torch.tensor([[24, 25, 31, 32]])
        >>> predictor(torch.randn(1, 3, 64), seen, unseen).shape
        torch.Size([1, 4, 64])
    """

    positions: Tensor  # (l width) to be added, or (2 l e) of rotary positions

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int, int],
        *,
        width: int = 96,
        depth: int = 2,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        positions: Literal["sincos", "rotary"] = "sincos",
        mask_tokens: int = 1,
    ) -> None:
        super().__init__()
        if mask_tokens < 1:
            raise ValueError(f"a predictor needs a mask token, got mask_tokens={mask_tokens}")
        self.rotates = positions == "rotary"
        axes = grid if grid[0] > 1 else grid[1:]
        places = (
            rotary_positions(width // heads, grid_index(*grid))
            if self.rotates
            else sincos_positions(width, *axes)
        )
        self.register_buffer("positions", places, persistent=False)
        self.embed = nn.Linear(dim, width)
        shape = (width,) if mask_tokens == 1 else (mask_tokens, width)
        self.mask_token = nn.Parameter(torch.zeros(shape))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio=mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, dim)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self,
        context: Float[Tensor, "b k d"],
        context_index: Int[Tensor, "b k"],
        target_index: Int[Tensor, "b m"],
        mask_token: int = 0,
    ) -> Float[Tensor, "b m d"]:
        """Return the latents at `target_index`, asked for by the mask token of that number."""
        seen = self.embed(context)
        asked = rearrange(self.mask_token, "... w -> (...) w")[mask_token]
        tokens = torch.cat([seen, asked.expand(*target_index.shape, -1)], 1)
        positions = self.positions[..., torch.cat([context_index, target_index], 1), :]
        tokens, rotary = (tokens, positions) if self.rotates else (tokens + positions, None)
        for block in self.blocks:
            tokens = block(tokens, rotary=rotary)
        return self.out(self.norm(tokens[:, context.shape[1] :]))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)  # as in encoders/vit.py
        nn.init.zeros_(module.bias)
