"""Actions and the latents they lead to, moved together: for long horizons.

The latents z_1..z_h of a plan are unknowns of their own. What they are pulled to is the goal, and
what the action of each step would lead to from the latent before it:

    minimise  score(z, a) + sum_t  price_t . gap_t + weight / 2 |gap_t|^2,
    gap_t = f(z_{t-1}, a_t) - z_t

f is one call of the predictor for all steps at once, so a gradient is as deep as one step, whatever
the horizon. Now and then the prices take up the gaps (price += weight gap) and the plans are rolled
out, which puts the latents back to where the actions really lead: as the gaps close, the prices
become the gradient that backpropagation through the rollout would have brought.

Virtual states, gradients in parallel over time and rollouts now and then: GRASP, Psenka et al.
2026, https://arxiv.org/abs/2602.00475. There, gradients for the states that a step starts from are
cut off, and noise on the states explores. Here prices make the limit exact (the method of
multipliers: Hestenes 1969, https://doi.org/10.1007/BF00927673), and several starts explore.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from jepa_world.interfaces import Cost, LatentCost
from jepa_world.search import (
    Draws,
    UnsuitedCostError,
    ar1_filter,
    around,
    cheapest,
    require_descent,
    require_slope,
    slope,
    to_share,
)


class GRASP:
    """Minimise a cost over actions and latents, for all episodes at once.

    Needs a cost that offers its latents (`interfaces.LatentCost`), as an agent's does, and slopes.
    Works within `torch.no_grad`; the parameters behind the cost gather no gradient.

    Args:
        low: Lower bound of an action.
        high: Upper bound of an action.
        horizon: Steps of a plan.
        starts: Plans the descent begins at: the given one, and others around it.
        rounds: Rollouts of all plans, each after some steps of Adam.
        steps: Of Adam in a round.
        lr: What the first step moves every action by, in units of the action range; it falls
            linearly, to nothing at the end.
        latent_lr: The same for latents, in their own unit.
        weight: Of the gaps.
        std: Standard deviation of the other starts, in units of half the action range.
        correlation: Autocorrelation over the steps of what they differ by.
        seed: Of the planner's own random numbers.

    Raises:
        ValueError: no start, no round, no step, or an lr that is not positive.

    Example:
        >>> import torch
        >>> class Walk:  # z' = z + a from 0, and the goal is 2
        ...     def __call__(self, plans): return self.score(self.imagine(plans), plans)
        ...     def imagine(self, plans): return plans.unsqueeze(3).cumsum(2)
        ...     def foresee(self, z, plans):
        ...         before = torch.cat([torch.zeros_like(z[:, :, :1]), z[:, :, :-1]], 2)
        ...         return before + plans.unsqueeze(3)
        ...     def score(self, z, plans): return (z - 2).square().sum((-1, -2, -3))
        >>> planner = GRASP(torch.tensor([-1.0]), torch.tensor([1.0]), 4, rounds=20)
        >>> plan = planner(Walk(), torch.zeros(1, 4, 1))
        >>> bool((plan.flatten() - torch.tensor([1.0, 1.0, 0.0, 0.0])).abs().max() < 0.1)
        True
    """

    needs_latents = True

    def __init__(
        self,
        low: Float[Tensor, "a"],
        high: Float[Tensor, "a"],
        horizon: int,
        *,
        starts: int = 8,
        rounds: int = 3,
        steps: int = 5,
        lr: float = 0.05,
        latent_lr: float = 0.1,
        weight: float = 10.0,
        std: float = 1.0,
        correlation: float = 0.95,
        seed: int = 0,
    ) -> None:
        if starts < 1 or rounds < 1:
            raise ValueError(f"need at least one start and one round, got {starts} and {rounds}")
        require_descent(steps, min(lr, latent_lr))
        self.low, self.high = low, high
        self.starts, self.rounds, self.steps = starts, rounds, steps
        self.lr, self.latent_lr, self.weight, self.std = lr, latent_lr, weight, std
        self.filter = ar1_filter(correlation, horizon)
        self.draws = Draws(seed)

    @torch.no_grad()
    def __call__(self, cost: Cost, start: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        """Return the cheapest plan that was rolled out.

        Raises:
            ValueError: no plan of an episode has a finite cost.
            UnsuitedCostError: the cost has no slope, or no latents.
        """
        if not isinstance(cost, LatentCost):
            raise UnsuitedCostError(
                "the planner moves latents and the cost has none (interfaces.LatentCost)"
            )
        low, high = self.low.to(start), self.high.to(start)
        plan = start.clamp(low, high)
        std = ((high - low) * (self.std / 2)).expand_as(plan)
        white = self.draws.normal(self.starts, *plan.shape[1:], like=plan)
        plans = around(plan, std, self.filter.to(plan) @ white, low, high)
        z = cost.imagine(plans).clone()  # moved in place below
        best, best_cost = cheapest(plans, cost.score(z, plans), 1)
        share, price = to_share(plans, low, high).requires_grad_(), torch.zeros_like(z)
        z.requires_grad_()
        groups = [{"params": [share], "lr": self.lr}, {"params": [z], "lr": self.latent_lr}]
        optimizer, steps = torch.optim.Adam(groups), self.rounds * self.steps
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for step in range(1, steps + 1):
            with torch.enable_grad():
                plans = torch.lerp(low, high, share)
                gap = cost.foresee(z, plans) - z
                scored = cost.score(z, plans)
                total = scored + ((price + self.weight / 2 * gap) * gap).sum((-1, -2, -3))
            require_slope(scored)
            share.grad, z.grad = slope(total, [share, z])
            optimizer.step()
            falling.step()
            share.clamp_(0, 1)
            if step % self.steps == 0:
                price += self.weight * gap
                plans = torch.lerp(low, high, share)
                z.copy_(cost.imagine(plans))
                seen, costs = torch.cat([best, plans], 1), cost.score(z, plans)
                best, best_cost = cheapest(seen, torch.cat([best_cost, costs], 1), 1)
        return best[:, 0]
