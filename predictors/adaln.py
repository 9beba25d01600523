"""A causal transformer as latent dynamics, conditioned on the action by AdaLN-zero.

z_{t+1} = z_t + f(z_{t-k+1..t}, a_{t-k+1..t}): the predictor of LeWorldModel
(https://arxiv.org/abs/2603.19312, section 3), here residual and without batch norm in its head. It
starts as a copy of the latent.
"""

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from jepa_world.nn import AdaLNBlock, roll_window, slide_window


class AdaLNPredictor(nn.Module):
    """Predict every step from the last `history` steps and their actions.

    A token sees all tokens of its own step and of the steps before, not only its own past, so patch
    tokens exchange information. Nothing before the last `history` steps is seen, at any depth:
    training windows may be shorter than the sequences rolled out later.

    Args:
        dim: Width of a latent token.
        action_dim: Width of an action.
        width: Width of the transformer.
        depth: Number of blocks.
        heads: Attention heads.
        history: Steps seen, the present one included.
        dropout: In attention and after both halves of every block.

    Example:
        >>> import torch
        >>> predictor = AdaLNPredictor(32, 2, width=64, depth=2)
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
        width: int = 128,
        depth: int = 3,
        heads: int = 4,
        history: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.history = history
        self.latent_in = nn.Linear(dim, width)
        self.positions = nn.Parameter(0.02 * torch.randn(history, 1, width))
        all_blocks = nn.Linear(width, depth * 6 * width)
        self.modulation = nn.Sequential(
            nn.Linear(action_dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), all_blocks
        )
        self.blocks = nn.ModuleList(AdaLNBlock(width, heads, dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, dim)
        for layer in (all_blocks, self.out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

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
        x = rearrange(self.latent_in(z) + self.positions[:steps], "b k n w -> b (k n) w")
        modulation = repeat(modulation, "b k m -> b (k n) m", n=tokens)
        step = torch.arange(steps, device=z.device).repeat_interleave(tokens)
        mask = step[:, None] >= step
        parts = modulation.chunk(len(self.blocks), -1)
        for block, part in zip(self.blocks, parts, strict=True):
            x = block(x, part, mask)
        return z + rearrange(self.out(self.norm(x)), "b (k n) d -> b k n d", n=tokens)
