"""A transformer over the patch tokens of the last frames, the action a part of each: DINO-WM.

The action is embedded and concatenated to every token of its frame; a token sees all tokens of its
own frame and of those before. (https://arxiv.org/abs/2411.04983.) Here the tokens are
mapped to the width of the transformer first, and the prediction is residual.
"""

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from jepa_world.nn import Block, roll_window, sincos_positions, slide_window


class ConcatPredictor(nn.Module):
    """Predict every step from the tokens of the last `history` frames and their actions.

    Nothing before the last `history` frames is seen, at any depth. Tokens of a frame are told apart
    by their place in raster order, frames by learned positions. The last layer starts at zero, so
    an untrained predictor copies the latent.

    Args:
        dim: Width of a latent token.
        action_dim: Width of an action.
        action_width: Width of the embedding of an action, beside that of the token.
        width: Width of the transformer.
        depth: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Width of a block's hidden layer, as a multiple of `width`.
        history: Frames seen, the present one included.
        dropout: In attention and in the hidden layers.

    Raises:
        ValueError: the width does not divide into heads.

    Example:
        >>> import torch
        >>> predictor = ConcatPredictor(32, 2, width=64, depth=2)
        >>> predictor(torch.zeros(8, 5, 4, 32), torch.zeros(8, 5, 2)).shape
        torch.Size([8, 5, 4, 32])
        >>> predictor.rollout(torch.zeros(8, 1, 4, 32), torch.zeros(8, 10, 2)).shape
        torch.Size([8, 10, 4, 32])
    """

    def __init__(
        self,
        dim: int,
        action_dim: int,
        *,
        action_width: int = 10,
        width: int = 128,
        depth: int = 3,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        history: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.history, self.width = history, width
        self.action_in = nn.Linear(action_dim, action_width)
        self.token_in = nn.Linear(dim + action_width, width)
        self.positions = nn.Parameter(0.02 * torch.randn(history, 1, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio=mlp_ratio, dropout=dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b t a"]
    ) -> Float[Tensor, "b t n d"]:
        """Return the next latent of every step."""
        return slide_window(self._window, self.history, z, self.action_in(action))

    def rollout(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b u a"]
    ) -> Float[Tensor, "b h n d"]:
        """Return the h = u - t + 1 latents after z; a step computes its last window only."""
        return roll_window(self._window, self.history, z, self.action_in(action))

    def _window(self, z: Tensor, embedded: Tensor) -> Tensor:
        """Predict from at most `history` frames `(b k n d)` and their embedded actions."""
        _, steps, tokens, _ = z.shape
        joined = torch.cat([z, repeat(embedded, "b k e -> b k n e", n=tokens).to(z)], -1)
        places = sincos_positions(self.width, tokens).to(self.positions)
        x = self.token_in(joined) + self.positions[:steps] + places
        x = rearrange(x, "b k n w -> b (k n) w")
        step = torch.arange(steps, device=z.device).repeat_interleave(tokens)
        mask = step[:, None] >= step
        for block in self.blocks:
            x = block(x, mask)
        return z + rearrange(self.out(self.norm(x)), "b (k n) d -> b k n d", n=tokens)
