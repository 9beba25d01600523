"""What a plan costs, as plain functions of the latents it visits, its actions and the goal.

A cost is a sum: `--objective summed_distance effort=0.05 my_module:my_constraint=10`, or in Python
`weighted_sum((1.0, summed_distance), (0.05, effort))`, or any function of the same arguments. A
function should be differentiable where planners that follow slopes are to use it.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

Objective = Callable[
    [Float[Tensor, "b s h n d"], Float[Tensor, "b s h a"], Float[Tensor, "b n d"]],
    Float[Tensor, "b s"],
]
"""Cost of imagined latents and of the plans that lead to them, given the goal's latent."""


def summed_distance(
    z: Float[Tensor, "b s h n d"], plans: Float[Tensor, "b s h a"], goal: Float[Tensor, "b n d"]
) -> Float[Tensor, "b s"]:
    """Sum the latent distance to the goal over the horizon: arrive early, and stay.

    Not squared: squares let the first, far steps of a plan drown the last, near ones.
    """
    return torch.linalg.vector_norm(z - goal[:, None, None], dim=(-1, -2)).sum(-1)


def effort(
    z: Float[Tensor, "b s h n d"], plans: Float[Tensor, "b s h a"], goal: Float[Tensor, "b n d"]
) -> Float[Tensor, "b s"]:
    """Sum the squares of the actions: do not move more than needed."""
    return plans.square().sum((-1, -2))


def smoothness(
    z: Float[Tensor, "b s h n d"], plans: Float[Tensor, "b s h a"], goal: Float[Tensor, "b n d"]
) -> Float[Tensor, "b s"]:
    """Sum the squared differences of actions that follow each other: do not jerk."""
    return plans.diff(dim=2).square().sum((-1, -2))


def keep_out(avoid: Float[Tensor, "m n d"], radius: float) -> Objective:
    """Return the cost of coming nearer than `radius` to any of the latents `avoid`.

    It is the sum over the steps of how deep they lie inside, as a share of the radius: 0 outside, 1
    at the latent itself. Give it a weight that outweighs the distance a detour costs.

    Raises:
        ValueError: the radius is not positive, or `avoid` is not `(m n d)`.

    Example:
        >>> stay_off = keep_out(torch.zeros(1, 1, 2), radius=2.0)
        >>> z = torch.tensor([3.0, 1.0]).view(1, 1, 2, 1, 1).expand(1, 1, 2, 1, 2) / 2**0.5
        >>> stay_off(z, torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2))
        tensor([[0.5000]])
    """
    if not radius > 0 or avoid.ndim != 3:
        raise ValueError(
            f"need a radius above 0 and latents (m n d), got {radius} and {tuple(avoid.shape)}"
        )
    places = rearrange(avoid, "m n d -> m (n d)")

    def inside(z: Tensor, plans: Tensor, goal: Tensor) -> Tensor:
        visited = rearrange(z, "b s h n d -> b (s h) (n d)")
        nearest = torch.cdist(visited, places.to(visited).expand(len(z), -1, -1)).amin(-1)
        depth = (1 - nearest / radius).clamp(min=0)
        return rearrange(depth, "b (s h) -> b s h", s=z.shape[1]).sum(-1)

    return inside


def weighted_sum(*terms: tuple[float, Objective]) -> Objective:
    """Return the sum of weighted objectives.

    Example:
        >>> cost = weighted_sum((1.0, summed_distance), (0.5, effort))
        >>> cost(torch.zeros(1, 1, 3, 1, 2), torch.ones(1, 1, 3, 2), torch.zeros(1, 1, 2))
        tensor([[3.]])
    """

    def total(z: Tensor, plans: Tensor, goal: Tensor) -> Tensor:
        costs = [weight * objective(z, plans, goal) for weight, objective in terms]
        return torch.stack(costs).sum(0)

    return total


class TemporalDistance(nn.Module):
    """The steps from a latent to a goal's, learned (`methods.temporal_distance`): an `Objective`.

    A goal k steps away is (1 - discount^k) / (1 - discount) away: near goals are told apart
    exactly, far ones less and less, and none is further than 1 / (1 - discount).

    Args:
        dim: Width of a latent token.
        num_tokens: Tokens of a latent.
        width: Units of a hidden layer.
        depth: Number of hidden layers.
        discount: Of a step against the one before it.

    Raises:
        ValueError: no hidden layer, or a discount outside (0, 1).

    Example:
        >>> cost = TemporalDistance(32, 1)
        >>> cost(torch.zeros(2, 5, 10, 1, 32), torch.zeros(2, 5, 10, 4), torch.ones(2, 1, 32)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        dim: int,
        num_tokens: int,
        *,
        width: int = 256,
        depth: int = 3,
        discount: float = 0.95,
    ) -> None:
        super().__init__()
        if not 0 < discount < 1:
            raise ValueError(f"need a discount in (0, 1), got {discount}")
        self.discount = discount
        self.layers = between_latents(dim * num_tokens, 1, width, depth)

    def forward(
        self,
        z: Float[Tensor, "b s h n d"],
        plans: Float[Tensor, "b s h a"],
        goal: Float[Tensor, "b n d"],
    ) -> Float[Tensor, "b s"]:
        """Return the distance to the goal, summed over the horizon."""
        return self.between(z, goal[:, None, None]).sum(-1)

    def between(
        self, z: Float[Tensor, "*b n d"], goal: Float[Tensor, "*b n d"]
    ) -> Float[Tensor, "*b"]:
        """Return the discounted steps from each latent to its goal."""
        logit = self.layers(both_and_change(z, goal)).squeeze(-1)
        return logit.float().sigmoid() / (1 - self.discount)


def between_latents(dim: int, outputs: int, width: int, depth: int) -> nn.Sequential:
    """Return a perceptron of what `both_and_change` gives of two latents of `dim` numbers.

    Raises:
        ValueError: no hidden layer.
    """
    if depth < 1:
        raise ValueError(f"need a hidden layer, got depth {depth}")
    layers: list[nn.Module] = [nn.Linear(3 * dim, width), nn.SiLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def both_and_change(
    z: Float[Tensor, "*b n d"], goal: Float[Tensor, "*b n d"]
) -> Float[Tensor, "*b x"]:
    """Return a latent, its goal and their difference side by side."""
    here, there = z.flatten(-2), goal.expand_as(z).flatten(-2)
    return torch.cat([here, there, here - there], -1)
