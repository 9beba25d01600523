"""A recurrent network as latent dynamics: z_{t+1} = z_t + f(h_t), h_t = GRU(z_t, a_t, h_{t-1}).

The state h carries what a single latent does not show, such as velocities.
(GRU: https://arxiv.org/abs/1406.1078, section 2.3.)
"""

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn


class GRUPredictor(nn.Module):
    """Predict the change of every token from all steps so far, in one recurrent state.

    The state starts at zero with the first step that is given. Tokens do not see each other. The
    last layer starts at zero, so an untrained predictor copies the latent.

    Args:
        dim: Width of a latent token.
        action_dim: Width of an action.
        width: Width of the state.
        depth: Recurrent layers, one above the other.

    Example:
        >>> import torch
        >>> predictor = GRUPredictor(32, 2)
        >>> predictor(torch.zeros(8, 3, 1, 32), torch.zeros(8, 3, 2)).shape
        torch.Size([8, 3, 1, 32])
        >>> predictor.rollout(torch.zeros(8, 1, 1, 32), torch.zeros(8, 10, 2)).shape
        torch.Size([8, 10, 1, 32])
    """

    def __init__(self, dim: int, action_dim: int, *, width: int = 256, depth: int = 1) -> None:
        super().__init__()
        self.cells = nn.GRU(dim + action_dim, width, depth, batch_first=True)
        self.out = nn.Linear(width, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b t a"]
    ) -> Float[Tensor, "b t n d"]:
        """Return the next latent of every step."""
        return self._steps(z, action, None)[0]

    def rollout(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b u a"]
    ) -> Float[Tensor, "b h n d"]:
        """Return the h = u - t + 1 latents after z; the state is kept, each step computed once."""
        known = z.shape[1]
        following, state = self._steps(z, action[:, :known], None)
        future = [following[:, -1:]]
        for step in range(known, action.shape[1]):
            following, state = self._steps(future[-1], action[:, step : step + 1], state)
            future.append(following)
        return torch.cat(future, 1)

    def _steps(self, z: Tensor, action: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the next latent of every step after `state`, and the state after the last."""
        tokens = z.shape[2]
        given = torch.cat([z, repeat(action, "b t a -> b t n a", n=tokens).to(z)], -1)
        hidden, after = self.cells(rearrange(given, "b t n e -> (b n) t e"), state)
        return z + self.out(rearrange(hidden, "(b n) t w -> b t n w", n=tokens)), after
