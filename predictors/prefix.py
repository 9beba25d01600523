"""All latents ahead from the present one and the prefixes of the actions, in one call.

z_{t+k} = z_t + f(z_t, a_t..a_{t+k-1}) for k = 1..span: nothing is fed back while planning. One
transformer reads the present latent; a shallow, causal one then reads [latent, actions]. No token
of the latent sees an action, so all that is made of the latent is made once for all plans that
begin there. In the spirit of Fast-LeWM, where a causal transformer reads the actions alone
(https://arxiv.org/abs/2606.26217).
"""

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from jepa_world.nn import Block


class PrefixPredictor(nn.Module):
    """Predict every latent of a plan from the last latent that is known.

    The latent k steps ahead is not the one-step prediction applied k times: train on rollouts, over
    windows of at least `span` + 1 frames, or longer prefixes are never seen. Only the present
    latent is seen, none before it. Plans longer than `span` go on from the latent at its end. The
    last layer starts at zero, so an untrained predictor copies the latent.

    A plan costs a token of the causal transformer for each action, and nothing more: with the
    defaults, which have about as many weights as `adaln`, a third of the weights.

    Args:
        dim: Width of a latent token.
        action_dim: Width of an action.
        span: Actions of the longest prefix.
        width: Width of both transformers.
        depth: Blocks of the one that reads the latent.
        action_depth: Blocks of the one that reads the actions.
        heads: Attention heads.
        mlp_ratio: Width of the hidden layers of the one that reads the latent, as a multiple of
            `width`.
        action_ratio: The same of the one that reads the actions, and of the last hidden layer.

    Raises:
        ValueError: the width does not divide into heads.

    Example:
        >>> import torch
        >>> predictor = PrefixPredictor(32, 2, span=10, width=64, depth=2)
        >>> predictor(torch.zeros(8, 5, 4, 32), torch.zeros(8, 5, 2)).shape
        torch.Size([8, 5, 4, 32])
        >>> predictor.rollout_prefixes(torch.zeros(8, 1, 4, 32), torch.zeros(8, 20, 10, 2)).shape
        torch.Size([8, 20, 10, 4, 32])
    """

    def __init__(
        self,
        dim: int,
        action_dim: int,
        *,
        span: int = 3,
        width: int = 128,
        depth: int = 3,
        action_depth: int = 2,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        action_ratio: float = 2.0,
    ) -> None:
        super().__init__()
        self.span = span
        self.token_in = nn.Linear(dim, width)
        self.action_in = nn.Linear(action_dim, width)
        self.positions = nn.Parameter(0.02 * torch.randn(span, width))
        self.present = nn.Sequential(
            *(Block(width, heads, mlp_ratio=mlp_ratio) for _ in range(depth))
        )
        self.ahead = nn.ModuleList(
            Block(width, heads, mlp_ratio=action_ratio) for _ in range(action_depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        hidden = int(width * action_ratio)
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
        following = self._ahead(present, rearrange(action, "b t a -> (b t) 1 1 a"))
        return rearrange(following, "(b t) 1 1 n d -> b t n d", b=len(z))

    def rollout_prefixes(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b s u a"]
    ) -> Float[Tensor, "b s h n d"]:
        """Return the h = u - t + 1 latents after z under every plan, `span` of them at a time."""
        first, *later = action[:, :, z.shape[1] - 1 :].split(self.span, 2)
        future = [self._ahead(z[:, -1], first)]
        for actions in later:
            reached = rearrange(future[-1][:, :, -1], "b s n d -> (b s) n d")
            stretch = self._ahead(reached, rearrange(actions, "b s k a -> (b s) 1 k a"))
            future.append(rearrange(stretch, "(b s) 1 k n d -> b s k n d", b=len(z)))
        return torch.cat(future, 2)

    def _ahead(
        self, z: Float[Tensor, "b n d"], action: Float[Tensor, "b s k a"]
    ) -> Float[Tensor, "b s k n d"]:
        """Return the latents after each prefix of at most `span` actions, for s plans of each z."""
        tokens, (samples, prefixes) = z.shape[1], action.shape[1:3]
        latent = self.present(self.token_in(z))
        x = self.action_in(rearrange(action, "b s k a -> (b s) k a")) + self.positions[:prefixes]
        mask = x.new_ones(prefixes, tokens + prefixes, dtype=torch.bool).tril(tokens)
        for block in self.ahead:
            latent, seen = cast(Block, block).extend(latent, None)
            key, value = (repeat(part, "b h n e -> (b s) h n e", s=samples) for part in seen)
            x, _ = cast(Block, block).extend(x, (key, value), mask)
        token = rearrange(self.token_out(self.norm(latent)), "b n w -> b 1 1 n w")
        prefix = self.prefix_out(self.norm(x))
        prefix = rearrange(prefix, "(b s) k w -> b s k 1 w", s=samples)
        return z[:, None, None] + self.out(F.silu(token + prefix))
