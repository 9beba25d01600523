"""The predictor of LeWorldModel, as its published weights need it.

    x = z + positions,  c = embed(action)
    x = x + gate_1(c) * attend(modulate_1(x, c)),  x = x + gate_2(c) * mlp(modulate_2(x, c))
    z_{t+1} = head(norm(x_t)), a perceptron with batch norm

(https://arxiv.org/abs/2603.19312, section 3.) `adaln` is its smaller, residual relative.
"""

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from jepa_world.nn import MLP, Attention, BatchNorm, roll_window, slide_window


class LeWorldModelPredictor(nn.Module):
    """Predict every step from the last `history` steps and their actions.

    Published weights expect actions of mean 0 and deviation 1, several of them side by side:
    `encoders.pretrained.fold_action_statistics` makes them ones of the actions themselves. A token
    sees all tokens of its own step and of the steps before; LeWorldModel has one token a step.

    Args:
        dim: Width of a latent token.
        action_dim: Width of an action.
        depth: Number of blocks.
        heads: Attention heads.
        head_dim: Width of a head.
        hidden: Width of a block's hidden layer.
        head: Width of the hidden layer at the end.
        smooth: Width that actions are mapped to first.
        history: Steps seen, the present one included.
        dropout: In attention, in the hidden layers and after both halves of every block.

    Example:
        >>> import torch
        >>> predictor = LeWorldModelPredictor(32, 2, depth=2, heads=2, head_dim=16, hidden=64)
        >>> predictor(torch.zeros(8, 5, 1, 32), torch.zeros(8, 5, 2)).shape
        torch.Size([8, 5, 1, 32])
        >>> predictor.rollout(torch.zeros(8, 1, 1, 32), torch.zeros(8, 10, 2)).shape
        torch.Size([8, 10, 1, 32])
    """

    def __init__(
        self,
        dim: int,
        action_dim: int,
        *,
        depth: int = 6,
        heads: int = 16,
        head_dim: int = 64,
        hidden: int = 2048,
        head: int = 2048,
        smooth: int = 10,
        history: int = 3,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.history = history
        all_blocks = nn.Linear(dim, depth * 6 * dim)
        self.modulation = nn.Sequential(
            *(nn.Linear(action_dim, smooth), nn.Linear(smooth, 4 * dim), nn.SiLU()),
            *(nn.Linear(4 * dim, dim), nn.SiLU(), all_blocks),
        )
        nn.init.zeros_(all_blocks.weight)
        nn.init.zeros_(all_blocks.bias)
        self.positions = nn.Parameter(torch.randn(history, dim))
        self.blocks = nn.ModuleList(
            _Block(dim, heads, head_dim, hidden, dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(
            nn.Linear(dim, head), BatchNorm(head), nn.GELU(), nn.Linear(head, dim)
        )

    def forward(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b t a"]
    ) -> Float[Tensor, "b t n d"]:
        """Return the next latent of every step."""
        return slide_window(self._window, self.history, z, self.modulation(action))

    def rollout(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b u a"]
    ) -> Float[Tensor, "b h n d"]:
        """Return the h = u - t + 1 latents after z; a step computes its last window only."""
        return roll_window(self._window, self.history, z, self.modulation(action))

    def _window(self, z: Tensor, modulation: Tensor) -> Tensor:
        """Predict from at most `history` steps `(b k n d)`, modulated by their actions."""
        _, steps, tokens, _ = z.shape
        x = rearrange(z + self.positions[:steps, None], "b k n d -> b (k n) d")
        modulation = repeat(modulation, "b k m -> b (k n) m", n=tokens)
        step = torch.arange(steps, device=z.device).repeat_interleave(tokens)
        mask = step[:, None] >= step
        parts = modulation.chunk(len(self.blocks), -1)
        for block, part in zip(self.blocks, parts, strict=True):
            x = block(x, part, mask)
        return rearrange(self.head(self.norm(x)), "b (k n) d -> b k n d", n=tokens).to(z.dtype)


class _Block(nn.Module):
    """An AdaLN block that normalises once more, with affine, behind each modulation."""

    def __init__(self, dim: int, heads: int, head_dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.plain = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, head_dim=head_dim, dropout=dropout, qkv_bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, hidden, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, modulation: Tensor, mask: Tensor) -> Tensor:
        """Return the tokens, each under its own modulation."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
        y = self.norm1(torch.addcmul(shift1, self.plain(x), 1 + scale1))
        x = x + gate1 * self.dropout(self.attention(y, mask))
        y = self.norm2(torch.addcmul(shift2, self.plain(x), 1 + scale2))
        return x + gate2 * self.dropout(self.mlp(y))
