"""The cross-entropy method over action sequences, with temporally correlated noise.

Each iteration samples around a mean, keeps the cheapest samples (the elites) and moves mean and
standard deviation to theirs. The first half of the iterations draws noise that is correlated over
time (`search.ar1_filter`) and explores; the second half is white and refines. `CEMGradient` refines
by descent instead.

CEM: Rubinstein 1999, https://doi.org/10.1023/A:1010091220143. Kept elites, coloured noise and the
mean as a sample: iCEM, https://arxiv.org/abs/2008.06389, section 3.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from jepa_world.interfaces import Cost
from jepa_world.search import (
    Draws,
    ar1_filter,
    around,
    cheaper,
    cheapest,
    descend,
    refit,
    require_descent,
)


class CEM:
    """Minimise a cost over action sequences, for all episodes at once.

    Samples are clamped to the bounds before they are evaluated; the first of them is the mean. All
    episodes see the same noise, so the plan of one does not depend on the others.

    Args:
        low: Lower bound of an action.
        high: Upper bound of an action.
        horizon: Steps of a plan.
        samples: Action sequences evaluated in an iteration.
        elites: Cheapest samples that mean and standard deviation are moved to.
        iterations: Rounds of sampling.
        std: Standard deviation of the first iteration, in units of half the action range.
        min_std: Least standard deviation, in the same unit.
        momentum: Share of the old mean and standard deviation that is kept.
        correlation: Autocorrelation of the noise in the first half of the iterations.
        keep_elites: Best samples that are evaluated again in the next iteration.
        seed: Of the planner's own random numbers.

    Raises:
        ValueError: keep_elites <= elites < samples does not hold, no iteration, or a correlation
            outside [0, 1).

    Example:
        >>> import torch
        >>> planner = CEM(torch.tensor([-1.0]), torch.tensor([1.0]), 5)
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
        samples: int = 40,
        elites: int = 5,
        iterations: int = 6,
        std: float = 1.0,
        min_std: float = 0.02,
        momentum: float = 0.1,
        correlation: float = 0.95,
        keep_elites: int = 2,
        seed: int = 0,
    ) -> None:
        if not 0 <= keep_elites <= elites < samples or elites < 1:
            raise ValueError(
                f"need keep_elites <= elites < samples, got {keep_elites}, {elites}, {samples}"
            )
        if iterations < 1:
            raise ValueError(f"need at least one iteration, got {iterations}")
        self.low, self.high = low, high
        self.samples, self.elites, self.keep_elites = samples, elites, keep_elites
        self.std, self.min_std, self.momentum = std, min_std, momentum
        white = iterations // 2
        self.filters = torch.stack(
            [ar1_filter(correlation, horizon)] * (iterations - white) + [torch.eye(horizon)] * white
        )
        self.draws = Draws(seed)

    @torch.no_grad()
    def __call__(self, cost: Cost, start: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        """Return the mean of the last elites, or the best sample where that is cheaper.

        Raises:
            ValueError: no sample of an episode has a finite cost.
        """
        mean, elite, costs = self.search(cost, start)
        return cheaper(cost, mean, elite[:, 0], costs[:, 0])

    def search(
        self, cost: Cost, start: Float[Tensor, "b h a"]
    ) -> tuple[Float[Tensor, "b h a"], Float[Tensor, "b e h a"], Float[Tensor, "b e"]]:
        """Return the mean of the last elites, these elites, the best first, and their costs."""
        low, high = self.low.to(start), self.high.to(start)
        mean = start.clamp(low, high)
        std = ((high - low) * (self.std / 2)).expand_as(mean)
        min_std = (high - low) * (self.min_std / 2)
        elite, costs = mean[:, None], mean.new_full((len(mean), 1), torch.inf)
        for noise in self._noise(start):
            candidates = around(mean, std, noise, low, high)
            kept = elite[:, : self.keep_elites]
            candidates[:, 1 : 1 + kept.shape[1]] = kept
            elite, costs = cheapest(candidates, cost(candidates), self.elites)
            mean, std = refit(mean, std, elite, self.momentum)
            mean, std = mean.clamp(low, high), torch.maximum(std, min_std)
        return mean, elite, costs

    def _noise(self, start: Tensor) -> Tensor:
        """Draw the noise of all iterations `(iterations s h a)`."""
        filters = self.filters.to(start)
        white = self.draws.normal(*filters.shape[:2], self.samples * start.shape[-1], like=start)
        noise = rearrange(filters @ white, "i h (s a) -> i s h a", s=self.samples)
        return noise.contiguous()


class CEMGradient:
    """Search by the cross-entropy method, then descend from its mean and its elites.

    The search finds the valley, the slope its floor. The cost must be differentiable.

    Args:
        low: Lower bound of an action.
        high: Upper bound of an action.
        horizon: Steps of a plan.
        samples: Action sequences evaluated in an iteration of the search.
        elites: Cheapest samples; the descent begins at these and at their mean.
        iterations: Rounds of sampling.
        std: Standard deviation of the first iteration, in units of half the action range.
        correlation: Autocorrelation of the noise in the first half of the iterations.
        steps: Of the descent by Adam.
        lr: What the first step moves every action by, in units of the action range; it falls
            linearly, to nothing at the end.
        seed: Of the planner's own random numbers.

    Raises:
        ValueError: as `CEM` does, or no step.

    Example:
        >>> import torch
        >>> planner = CEMGradient(torch.tensor([-1.0]), torch.tensor([1.0]), 5)
        >>> plan = planner(lambda a: (a - 0.5).square().sum((-1, -2)), torch.zeros(1, 5, 1))
        >>> bool((plan - 0.5).abs().max() < 0.05)
        True
    """

    def __init__(
        self,
        low: Float[Tensor, "a"],
        high: Float[Tensor, "a"],
        horizon: int,
        *,
        samples: int = 40,
        elites: int = 3,
        iterations: int = 3,
        std: float = 1.0,
        correlation: float = 0.95,
        steps: int = 2,
        lr: float = 0.05,
        seed: int = 0,
    ) -> None:
        self.cem = CEM(
            *(low, high, horizon),
            samples=samples,
            elites=elites,
            iterations=iterations,
            std=std,
            correlation=correlation,
            keep_elites=min(2, elites),
            seed=seed,
        )
        require_descent(steps, lr)
        self.steps, self.lr = steps, lr

    @torch.no_grad()
    def __call__(self, cost: Cost, start: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        """Return the cheapest plan met in the descent.

        Raises:
            ValueError: no plan of an episode has a finite cost.
            UnsuitedCostError: the cost has no slope.
        """
        mean, elite, _ = self.cem.search(cost, start)
        plans = torch.cat([mean[:, None], elite], 1)
        low, high = self.cem.low.to(start), self.cem.high.to(start)
        return descend(cost, plans, low, high, steps=self.steps, lr=self.lr)
