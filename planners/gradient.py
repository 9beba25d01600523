"""Gradient descent through the cost, from several starts at once.

Adam moves the actions down the slope of the cost, backpropagated through the whole rollout; after
every step they are projected to their bounds (`search.descend`). Descent from one start ends in the
nearest valley: others begin around it, and the cheapest plan of all wins.

Planning through a learned model by its gradient: Henaff et al. 2017,
https://arxiv.org/abs/1705.07177; in the space of latents: DINO-WM, https://arxiv.org/abs/2411.04983.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from jepa_world.interfaces import Cost
from jepa_world.search import Draws, ar1_filter, around, descend, require_descent


class Gradient:
    """Minimise a differentiable cost over action sequences, for all episodes at once.

    Works within `torch.no_grad`; the parameters behind the cost gather no gradient.

    Args:
        low: Lower bound of an action.
        high: Upper bound of an action.
        horizon: Steps of a plan.
        starts: Plans the descent begins at: the given one, and others around it.
        steps: Of Adam, from every start.
        lr: What the first step moves every action by, in units of the action range; it falls
            linearly, to nothing at the end.
        std: Standard deviation of the other starts, in units of half the action range.
        correlation: Autocorrelation over the steps of what they differ by.
        seed: Of the planner's own random numbers.

    Raises:
        ValueError: no start, no step, or an lr that is not positive.

    Example:
        >>> import torch
        >>> planner = Gradient(torch.tensor([-1.0]), torch.tensor([1.0]), 5)
        >>> plan = planner(lambda a: (a - 0.5).square().sum((-1, -2)), torch.zeros(1, 5, 1))
        >>> bool((plan - 0.5).abs().max() < 0.1)
        True
    """

    def __init__(
        self,
        low: Float[Tensor, "a"],
        high: Float[Tensor, "a"],
        horizon: int,
        *,
        starts: int = 8,
        steps: int = 10,
        lr: float = 0.05,
        std: float = 1.0,
        correlation: float = 0.95,
        seed: int = 0,
    ) -> None:
        if starts < 1:
            raise ValueError(f"need at least one start, got {starts}")
        require_descent(steps, lr)
        self.low, self.high = low, high
        self.starts, self.steps, self.lr, self.std = starts, steps, lr, std
        self.filter = ar1_filter(correlation, horizon)
        self.draws = Draws(seed)

    @torch.no_grad()
    def __call__(self, cost: Cost, start: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        """Return the cheapest plan met in the descent.

        Raises:
            ValueError: no plan of an episode has a finite cost.
            UnsuitedCostError: the cost has no slope.
        """
        low, high = self.low.to(start), self.high.to(start)
        plan = start.clamp(low, high)
        std = ((high - low) * (self.std / 2)).expand_as(plan)
        white = self.draws.normal(self.starts, *plan.shape[1:], like=plan)
        plans = around(plan, std, self.filter.to(plan) @ white, low, high)
        return descend(cost, plans, low, high, steps=self.steps, lr=self.lr)
