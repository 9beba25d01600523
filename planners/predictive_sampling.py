"""Predictive sampling: noise around the last plan, and the best of all is the plan.

Howell et al. 2022, https://arxiv.org/abs/2212.00541. The noise is drawn at a few knots,
spread evenly over the horizon, and joined by straight lines: smooth, and of few dimensions.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from jepa_world.interfaces import Cost
from jepa_world.search import Draws, around, cheapest


class PredictiveSampling:
    """Minimise a cost over action sequences, for all episodes at once.

    Samples are clamped to the bounds before they are evaluated; the first of them is the plan so
    far, so that no iteration makes it worse.

    Args:
        low: Lower bound of an action.
        high: Upper bound of an action.
        horizon: Steps of a plan.
        samples: Action sequences evaluated in an iteration.
        iterations: Rounds; the paper has one between two actions.
        knots: Points over the horizon at which noise is drawn.
        std: Standard deviation of the noise at a knot, in units of half the action range.
        decay: What it is multiplied by from one iteration to the next.
        seed: Of the planner's own random numbers.

    Raises:
        ValueError: fewer than two samples, no iteration, or no knot.

    Example:
        >>> import torch
        >>> planner = PredictiveSampling(torch.tensor([-1.0]), torch.tensor([1.0]), 5)
        >>> plan = planner(lambda a: (a - 0.5).square().sum((-1, -2)), torch.zeros(1, 5, 1))
        >>> bool((plan - 0.5).abs().max() < 0.3)
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
        knots: int = 2,
        std: float = 1.0,
        decay: float = 0.5,
        seed: int = 0,
    ) -> None:
        if samples < 2 or iterations < 1 or knots < 1:
            raise ValueError(
                "need at least two samples, an iteration and a knot, "
                f"got {samples}, {iterations} and {knots}"
            )
        self.low, self.high = low, high
        self.samples, self.iterations, self.knots = samples, iterations, knots
        self.std, self.decay = std, decay
        self.draws = Draws(seed)

    @torch.no_grad()
    def __call__(self, cost: Cost, start: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        """Return the best plan evaluated.

        Raises:
            ValueError: no sample of an episode has a finite cost.
        """
        low, high = self.low.to(start), self.high.to(start)
        best = start.clamp(low, high)
        std = ((high - low) * (self.std / 2)).expand_as(best)
        for _ in range(self.iterations):
            candidates = around(best, std, self._noise(best), low, high)
            elite, _ = cheapest(candidates, cost(candidates), 1)
            best, std = elite[:, 0], std * self.decay
        return best

    def _noise(self, plan: Float[Tensor, "b h a"]) -> Float[Tensor, "s h a"]:
        """Draw noise at the knots and join it by straight lines."""
        _, horizon, actions = plan.shape
        knots = self.draws.normal(self.samples, actions, self.knots, like=plan)
        lines = F.interpolate(knots, horizon, mode="linear", align_corners=True)
        return rearrange(lines, "s a h -> s h a")
