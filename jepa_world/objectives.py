"""What a plan costs, as plain functions of the latents it visits, its actions and the goal.

A cost is a sum: `--objective summed_distance effort=0.05 my_module:my_constraint=10`, or in Python
`weighted_sum((1.0, summed_distance), (0.05, effort))`, or any function of the same arguments. A
function should be differentiable where planners that follow slopes are to use it.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

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
