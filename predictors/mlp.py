"""A residual perceptron as latent dynamics: z_{t+1} = z_t + f(z_{t-k+1..t}, a_{t-k+1..t}).

The last layer starts at zero, so an untrained predictor copies the latent: a resting arm rests.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class MLPPredictor(nn.Module):
    """Predict the change of every token from its own last `history` values and actions.

    Steps before the first repeat the first. Tokens do not see each other.

    Args:
        dim: Width of a latent token.
        action_dim: Width of an action.
        width: Units of a hidden layer.
        depth: Number of hidden layers.
        history: Steps seen, the present one included.
        residual: Every hidden layer but the first adds to what it gets, layer-normed, in place of
            replacing it: dynamics with contacts are learned better (docs/recipes.md).

    Example:
        >>> import torch
        >>> predictor = MLPPredictor(32, 2)
        >>> predictor(torch.zeros(8, 3, 1, 32), torch.zeros(8, 3, 2)).shape
        torch.Size([8, 3, 1, 32])
        >>> predictor.rollout(torch.zeros(8, 1, 1, 32), torch.zeros(8, 10, 2)).shape
        torch.Size([8, 10, 1, 32])
    """

    def __init__(
        self,
        dim: int,
        action_dim: int,
        *,
        width: int = 256,
        depth: int = 3,
        history: int = 1,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.history = history
        self.latent_in = nn.Linear(history * dim, width)
        self.action_in = nn.Linear(history * action_dim, width, bias=False)
        layer = _Residual if residual else _Layer
        self.hidden = nn.ModuleList(layer(width, width) for _ in range(depth - 1))
        self.out = nn.Linear(width, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b t a"]
    ) -> Float[Tensor, "b t n d"]:
        """Return the next latent of every step."""
        latents = rearrange(self._windows(z), "b t n d k -> b t n (k d)")
        return z + self._change(latents, self._drive(action).unsqueeze(2))

    def rollout(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b u a"]
    ) -> Float[Tensor, "b h n d"]:
        """Return the h = u - t + 1 latents after z, all actions embedded in one product."""
        drive = self._drive(action)[:, z.shape[1] - 1 :].unsqueeze(2)
        window = list(self._windows(z)[:, -1].unbind(-1))  # `history` latents (b n d)
        future: list[Tensor] = []
        for step in drive.unbind(1):
            latent = window[0] if self.history == 1 else torch.cat(window, -1)
            future.append(window[-1] + self._change(latent, step))
            window = [*window[1:], future[-1]]
        return torch.stack(future, 1)

    def _drive(self, action: Tensor) -> Tensor:
        return self.action_in(rearrange(self._windows(action), "b t a k -> b t (k a)"))

    def _change(self, latent: Tensor, drive: Tensor) -> Tensor:
        x = F.silu(self.latent_in(latent) + drive)
        for layer in self.hidden:
            x = layer(x)
        return self.out(x)

    def _windows(self, x: Tensor) -> Tensor:
        """Return the last `history` steps of every step, in a new last axis."""
        first = x[:, :1].expand(-1, self.history - 1, *x.shape[2:])
        return torch.cat([first, x], 1).unfold(1, self.history, 1)


class _Layer(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.silu(super().forward(input))


class _Residual(_Layer):
    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(F.layer_norm(input, input.shape[-1:]))
