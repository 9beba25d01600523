"""Predict the tokens that were not seen from those that were, a transformer with mask tokens.

(I-JEPA, arXiv 2301.08243, section 3; V-JEPA, 2404.08471, section 3.1: all targets in one pass.)
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from jepa_world.nn import Block, sincos_positions


class MaskedTransformer(nn.Module):
    """Let context tokens and one mask token for each target exchange information.

    A target is told apart by its position alone: fixed sine-cosine positions of the grid are added
    to all tokens. Only the targets are read out.

    Args:
        dim: Width of a latent token.
        grid: `(t', rows, columns)` of the encoder's tokens.
        width: Width of the predictor; narrower than the encoder is cheap and no worse (I-JEPA,
            table 12: 384 beats 1024).
        depth: Number of blocks.
        heads: Attention heads.

    Example:
        >>> import torch
        >>> predictor = MaskedTransformer(64, (1, 7, 7), width=32, depth=1, heads=2)
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
        axes = grid if grid[0] > 1 else grid[1:]
        self.register_buffer("positions", sincos_positions(width, *axes), persistent=False)
        self.embed = nn.Linear(dim, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
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
        seen = self.embed(context) + self.positions[context_index]
        unseen = self.mask_token + self.positions[target_index]
        tokens = torch.cat([seen, unseen.to(seen.dtype)], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.out(self.norm(tokens[:, context.shape[1] :]))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)  # as in encoders/vit.py
        nn.init.zeros_(module.bias)
