"""Predict the tokens that were not seen from those that were, a transformer with mask tokens.

(I-JEPA, arXiv 2301.08243, section 3; V-JEPA, 2404.08471, section 3.1: all targets in one pass.)
"""

from typing import Literal, TypeVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from jepa_world.nn import (
    MLP,
    Block,
    CrossAttention,
    grid_index,
    rotary_positions,
    sharing_weights,
    sincos_of_grid,
)


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
        self.width, self.heads, self.rotates = width, heads, positions == "rotary"
        self.register_buffer("positions", self._positions(grid), persistent=False)
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

    def for_grid(self, grid: tuple[int, int, int]) -> "MaskedTransformer":
        """Return this predictor for clips on another grid of tokens; both share all weights."""
        return _for_grid(self, grid)

    def _positions(self, grid: tuple[int, int, int]) -> Tensor:
        if self.rotates:
            return rotary_positions(self.width // self.heads, grid_index(*grid))
        return sincos_of_grid(self.width, grid)


class CrossMaskedTransformer(nn.Module):
    """Let every target ask the context alone: targets do not see each other.

    Attention costs (targets x context) and the context is not processed again, so the cost grows
    linearly with what is masked; `MaskedTransformer` attends among all tokens.
    (CrossMAE, https://arxiv.org/abs/2401.14391, section 3.2, for pixels.)

    Args:
        dim: Width of a latent token.
        grid: `(t', rows, columns)` of the encoder's tokens.
        width: Width of the predictor.
        depth: Number of blocks.
        heads: Attention heads.

    Raises:
        ValueError: the width does not divide into heads.

    Example:
        >>> import torch
        >>> predictor = CrossMaskedTransformer(64, (1, 7, 7), width=32, depth=1, heads=2)
        >>> seen, unseen = torch.tensor([[0, 1, 8]]), torch.tensor([[24, 25, 31, 32]])
        >>> predictor(torch.randn(1, 3, 64), seen, unseen).shape
        torch.Size([1, 4, 64])
    """

    positions: Tensor

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int, int],
        *,
        width: int = 96,
        depth: int = 2,
        heads: int = 3,
    ) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("positions", self._positions(grid), persistent=False)
        self.embed = nn.Linear(dim, width)
        self.context_norm = nn.LayerNorm(width, eps=1e-6)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(_CrossBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, dim)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(
        self,
        context: Float[Tensor, "b k d"],
        context_index: Int[Tensor, "b k"],
        target_index: Int[Tensor, "b m"],
    ) -> Float[Tensor, "b m d"]:
        """Return the latents at `target_index`."""
        seen = self.context_norm(self.embed(context) + self.positions[context_index])
        tokens = self.mask_token + self.positions[target_index]
        for block in self.blocks:
            tokens = block(tokens, seen)
        return self.out(self.norm(tokens))

    def for_grid(self, grid: tuple[int, int, int]) -> "CrossMaskedTransformer":
        """Return this predictor for clips on another grid of tokens; both share all weights."""
        return _for_grid(self, grid)

    def _positions(self, grid: tuple[int, int, int]) -> Tensor:
        return sincos_of_grid(self.width, grid)


class _CrossBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attention = CrossAttention(width, heads)
        self.mix = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, 4 * width)

    def forward(self, x: Float[Tensor, "b m w"], seen: Float[Tensor, "b k w"]) -> Tensor:
        x = x + self.mix(self.attention(self.norm1(x), seen))
        return x + self.mlp(self.norm2(x))


P = TypeVar("P", MaskedTransformer, CrossMaskedTransformer)


def _for_grid(predictor: P, grid: tuple[int, int, int]) -> P:
    other = sharing_weights(predictor)
    positions = other._positions(grid).to(predictor.positions.device)
    other.register_buffer("positions", positions, persistent=False)
    return other


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)  # as in encoders/vit.py
        nn.init.zeros_(module.bias)
