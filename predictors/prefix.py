"""All latents ahead from the present one and the prefixes of the actions, in one call.

z_{t+k} = z_t + f(z_t, a_t..a_{t+k-1}) for k = 1..span: nothing is fed back while planning. The
actions are read by a causal transformer that also sees the present latent; what it makes of a
prefix moves every token. In the spirit of Fast-LeWM, where a causal transformer reads the actions
alone (https://arxiv.org/abs/2606.26217).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from jepa_world.nn import Block


class PrefixPredictor(nn.Module):
    """Predict every latent of a plan from the last latent that is known.

    The latent k steps ahead is not the one-step prediction applied k times: train on rollouts, over
    windows of at least `span` + 1 frames, or longer prefixes are never seen. Only the present
    latent is seen, none before it. Plans longer than `span` go on from the latent at its end. The
    last layer starts at zero, so an untrained predictor copies the latent.

    Args:
        dim: Width of a latent token.
        action_dim: Width of an action.
        span: Actions of the longest prefix.
        width: Width of the transformer.
        depth: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Width of a block's hidden layer, and of the last one, as a multiple of `width`.

    Raises:
        ValueError: the width does not divide into heads.

    Example:
        >>> import torch
        >>> predictor = PrefixPredictor(32, 2, span=10, width=64, depth=2)
        >>> predictor(torch.zeros(8, 5, 4, 32), torch.zeros(8, 5, 2)).shape
        torch.Size([8, 5, 4, 32])
        >>> predictor.rollout_prefixes(torch.zeros(8, 1, 4, 32), torch.zeros(8, 10, 2)).shape
        torch.Size([8, 10, 4, 32])
    """

    def __init__(
        self,
        dim: int,
        action_dim: int,
        *,
        span: int = 3,
        width: int = 128,
        depth: int = 3,
        heads: int = 4,
        mlp_ratio: float = 2.0,
    ) -> None:
        super().__init__()
        self.span = span
        self.token_in = nn.Linear(dim, width)
        self.action_in = nn.Linear(action_dim, width)
        self.positions = nn.Parameter(0.02 * torch.randn(span, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio=mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        hidden = int(width * mlp_ratio)
        self.token_out = nn.Linear(width, hidden)
        self.prefix_out = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b t a"]
    ) -> Float[Tensor, "b t n d"]:
        """Return the next latent of every step, from this step alone."""
        present = rearrange(z, "b t n d -> (b t) n d")
        following = self._ahead(present, rearrange(action, "b t a -> (b t) 1 a"))
        return rearrange(following, "(b t) 1 n d -> b t n d", b=len(z))

    def rollout_prefixes(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b u a"]
    ) -> Float[Tensor, "b h n d"]:
        """Return the h = u - t + 1 latents after z, `span` of them at a time."""
        present, future = z[:, -1], []
        for actions in action[:, z.shape[1] - 1 :].split(self.span, 1):
            future.append(self._ahead(present, actions))
            present = future[-1][:, -1]
        return torch.cat(future, 1)

    def _ahead(
        self, z: Float[Tensor, "b n d"], action: Float[Tensor, "b k a"]
    ) -> Float[Tensor, "b k n d"]:
        """Return the latents after each prefix of at most `span` actions."""
        tokens, prefixes = z.shape[1], action.shape[1]
        actions = self.action_in(action) + self.positions[:prefixes]
        x = torch.cat([self.token_in(z).to(actions), actions], 1)
        order = torch.arange(tokens + prefixes, device=z.device).sub(tokens - 1).clamp(min=0)
        mask = order[:, None] >= order  # tokens of the latent see each other and no action
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        present, prefix = self.token_out(x[:, :tokens]), self.prefix_out(x[:, tokens:])
        return z[:, None] + self.out(F.silu(present[:, None] + prefix[:, :, None]))
