"""Model predictive path integral control: the mean of samples, weighted by how cheap they are.

    plan <- sum_k w_k a_k,    w_k = exp(-(S_k - min S) / (temperature * scale)) / sum of the same

MPPI: Williams et al. 2017, https://arxiv.org/abs/1707.02342, algorithm 2, without its term for the
likelihood ratio of the noise (alpha = 1). The scale of the costs is the distance of their median
from their minimum: a temperature means the same whatever the unit of the cost, and a few samples of
huge cost do not change it.
"""

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from jepa_world.interfaces import Cost
from jepa_world.search import Draws, ar1_filter, around, cheaper, cheapest


class MPPI:
    """Minimise a cost over action sequences, for all episodes at once.

    Samples are clamped to the bounds before they are evaluated, and it is the clamped samples that
    are averaged, so the plan lies within the bounds too. Each iteration evaluates the mean and the
    best sample again.

    Args:
        low: Lower bound of an action.
        high: Upper bound of an action.
        horizon: Steps of a plan.
        samples: Action sequences evaluated in an iteration.
        iterations: Rounds of sampling and averaging.
        temperature: Cost above the best, in units of the median's, at which a weight falls to 1/e.
        std: Standard deviation of the first iteration, in units of half the action range.
        decay: What it is multiplied by from one iteration to the next.
        correlation: Autocorrelation of the noise over the steps.
        seed: Of the planner's own random numbers.

    Raises:
        ValueError: fewer than three samples, no iteration, a temperature that is not positive, or a
            correlation outside [0, 1).

    Example:
        >>> import torch
        >>> planner = MPPI(torch.tensor([-1.0]), torch.tensor([1.0]), 5)
        >>> plan = planner(lambda a: (a - 0.5).square().sum((-1, -2)), torch.zeros(1, 5, 1))
        >>> bool((plan - 0.5).abs().max() < 0.2)
        True
    """

    def __init__(
        self,
        low: Float[Tensor, "a"],
        high: Float[Tensor, "a"],
        horizon: int,
        *,
        samples: int = 40,
        iterations: int = 6,
        temperature: float = 0.1,
        std: float = 1.0,
        decay: float = 0.6,
        correlation: float = 0.95,
        seed: int = 0,
    ) -> None:
        if samples < 3 or iterations < 1:
            raise ValueError(
                f"need at least 3 samples and an iteration, got {samples} and {iterations}"
            )
        if not temperature > 0:
            raise ValueError(f"need a temperature above 0, got {temperature}")
        self.low, self.high = low, high
        self.samples, self.iterations, self.temperature = samples, iterations, temperature
        self.std, self.decay = std, decay
        self.filter = ar1_filter(correlation, horizon)
        self.draws = Draws(seed)

    @torch.no_grad()
    def __call__(self, cost: Cost, start: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        """Return the last weighted mean, or the best sample where that is cheaper.

        Raises:
            ValueError: no sample of an episode has a finite cost.
        """
        low, high = self.low.to(start), self.high.to(start)
        best = mean = start.clamp(low, high)
        best_cost = mean.new_full((len(mean),), torch.inf)
        std = ((high - low) * (self.std / 2)).expand_as(mean)
        for _ in range(self.iterations):
            white = self.draws.normal(self.samples, *mean.shape[1:], like=mean)
            candidates = around(mean, std, self.filter.to(mean) @ white, low, high)
            candidates[:, 1] = best
            costs = cost(candidates)
            elite, least = cheapest(candidates, costs, 1)
            best, best_cost = elite[:, 0], least[:, 0]
            weights = weigh(costs, self.temperature)
            mean = einsum(weights, candidates, "b s, b s h a -> b h a").clamp(low, high)
            std = std * self.decay
        return cheaper(cost, mean, best, best_cost)


def weigh(costs: Float[Tensor, "b s"], temperature: float) -> Float[Tensor, "b s"]:
    """Return the weights of samples, which sum to 1; a cost that is not finite weighs nothing.

    They do not change when the cost is scaled or shifted.
    """
    finite = costs.where(costs.isfinite(), torch.nan)
    above = finite - finite.nan_to_num(torch.inf).amin(1, keepdim=True)
    scale = above.nanmedian(1, keepdim=True).values.clamp(min=torch.finfo(costs.dtype).tiny)
    return (-above / scale / temperature).nan_to_num(-torch.inf).softmax(1)
