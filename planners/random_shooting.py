"""Random shooting, the baseline: draw action sequences uniformly and return the cheapest."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


class RandomShooting:
    """Minimise a cost over uniform action sequences, for all episodes at once.

    The start is among the candidates. All episodes see the same samples.

    Args:
        low: Lower bound of an action.
        high: Upper bound of an action.
        horizon: Steps of a plan.
        samples: Action sequences evaluated.
        seed: Of the planner's own generator.

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
        self.low, self.high, self.horizon = low, high, horizon
        self.samples, self.seed = samples, seed
        self.generator: torch.Generator | None = None

    @torch.no_grad()
    def __call__(
        self,
        cost: Callable[[Float[Tensor, "b s h a"]], Float[Tensor, "b s"]],
        start: Float[Tensor, "b h a"],
    ) -> Float[Tensor, "b h a"]:
        """Return the cheapest of the start and the samples.

        Raises:
            ValueError: no sample of an episode has a finite cost.
        """
        if self.generator is None or self.generator.device != start.device:
            self.generator = torch.Generator(start.device).manual_seed(self.seed)
        low, high = self.low.to(start), self.high.to(start)
        uniform = torch.rand(
            (self.samples, *start.shape[1:]),
            generator=self.generator,
            device=start.device,
            dtype=start.dtype,
        )
        candidates = torch.lerp(low, high, uniform).repeat(len(start), 1, 1, 1)
        candidates[:, 0] = start.clamp(low, high)
        costs = cost(candidates)
        costs = torch.where(costs.isfinite(), costs, torch.inf)
        best, index = costs.min(1)
        if not best.isfinite().all():
            episodes = best.isinf().nonzero().flatten().tolist()
            raise ValueError(f"no candidate has a finite cost in episodes {episodes}")
        return candidates[torch.arange(len(start), device=start.device), index]
