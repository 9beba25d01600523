"""Random shooting, the baseline: draw action sequences uniformly and return the cheapest."""

import torch
from jaxtyping import Float
from torch import Tensor

from jepa_world.interfaces import Cost
from jepa_world.search import Draws, cheapest


class RandomShooting:
    """Minimise a cost over uniform action sequences, for all episodes at once.

    The start is among the candidates. All episodes see the same samples.

    Args:
        low: Lower bound of an action.
        high: Upper bound of an action.
        horizon: Steps of a plan.
        samples: Action sequences evaluated.
        seed: Of the planner's own random numbers.

    Example:
        >>> import torch
        >>> planner = RandomShooting(torch.tensor([-1.0]), torch.tensor([1.0]), 2)
        >>> plan = planner(lambda a: (a - 0.5).square().sum((-1, -2)), torch.zeros(1, 2, 1))
        >>> bool((plan - 0.5).abs().max() < 0.2)
        True
    """

    def __init__(
        self,
        low: Float[Tensor, "a"],
        high: Float[Tensor, "a"],
        horizon: int,
        *,
        samples: int = 256,
        seed: int = 0,
    ) -> None:
        self.low, self.high = low, high
        self.samples = samples
        self.draws = Draws(seed)

    @torch.no_grad()
    def __call__(self, cost: Cost, start: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        """Return the cheapest of the start and the samples.

        Raises:
            ValueError: no sample of an episode has a finite cost.
        """
        low, high = self.low.to(start), self.high.to(start)
        uniform = self.draws.uniform(self.samples, *start.shape[1:], like=start)
        candidates = torch.lerp(low, high, uniform).repeat(len(start), 1, 1, 1)
        candidates[:, 0] = start.clamp(low, high)
        best, _ = cheapest(candidates, cost(candidates), 1)
        return best[:, 0]
