"""The cross-entropy method over action sequences, with temporally correlated noise.

Each iteration samples around a mean, keeps the cheapest samples (the elites) and moves mean and
standard deviation to theirs. The effects of white noise cancel and move an arm nowhere; noise with
autocorrelation rho explores (AR(1): x_t = rho x_{t-1} + sqrt(1 - rho^2) e_t, unit variance). The
first half of the iterations uses it; the second half is white and refines.

CEM: Rubinstein 1999, https://doi.org/10.1023/A:1010091220143. Kept elites, coloured noise and the
mean as a sample: iCEM, https://arxiv.org/abs/2008.06389, section 3.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


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
        seed: Of the planner's own generator.

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
        if iterations < 1 or not 0 <= correlation < 1:
            raise ValueError(
                f"need at least one iteration and a correlation in [0, 1), got {iterations} and "
                f"{correlation}"
            )
        self.low, self.high, self.horizon = low, high, horizon
        self.samples, self.elites, self.keep_elites = samples, elites, keep_elites
        self.std, self.min_std, self.momentum = std, min_std, momentum
        white = iterations // 2
        self.filters = torch.stack(
            [ar1_filter(correlation, horizon)] * (iterations - white) + [torch.eye(horizon)] * white
        )
        self.seed = seed
        self.generator: torch.Generator | None = None

    @torch.no_grad()
    def __call__(
        self,
        cost: Callable[[Float[Tensor, "b s h a"]], Float[Tensor, "b s"]],
        start: Float[Tensor, "b h a"],
    ) -> Float[Tensor, "b h a"]:
        """Return the mean of the last elites, or the best sample where that is cheaper.

        Raises:
            ValueError: no sample of an episode has a finite cost.
        """
        low, high = self.low.to(start), self.high.to(start)
        mean = start.clamp(low, high)
        std = ((high - low) * (self.std / 2)).expand_as(mean)
        min_std = (high - low) * (self.min_std / 2)
        elite, best_cost = mean[:, None], mean.new_full((len(mean), 1), torch.inf)
        for noise in self._noise(start):
            candidates = torch.addcmul(mean[:, None], std[:, None], noise).clamp_(low, high)
            kept = elite[:, : self.keep_elites]
            candidates[:, 0] = mean
            candidates[:, 1 : 1 + kept.shape[1]] = kept
            elite, best_cost = cheapest(candidates, cost(candidates), self.elites)
            new_std, new_mean = torch.std_mean(elite, 1, correction=0)
            mean = new_mean.lerp(mean, self.momentum)
            std = torch.maximum(new_std.lerp(std, self.momentum), min_std)
        better = cost(mean[:, None]) <= best_cost
        return torch.where(better[..., None], mean, elite[:, 0])

    def _noise(self, start: Tensor) -> Tensor:
        """Draw the noise of all iterations `(iterations s h a)`."""
        if self.generator is None or self.generator.device != start.device:
            self.generator = torch.Generator(start.device).manual_seed(self.seed)
        filters = self.filters.to(start)
        shape = (*filters.shape[:2], self.samples * start.shape[-1])
        white = torch.randn(shape, generator=self.generator, device=start.device, dtype=start.dtype)
        noise = rearrange(filters @ white, "i h (s a) -> i s h a", s=self.samples)
        return noise.contiguous()


def ar1_filter(correlation: float, horizon: int) -> Float[Tensor, "h h"]:
    """Return the matrix that turns white noise over time into AR(1) noise of unit variance."""
    step = torch.arange(horizon)
    powers = torch.tensor(correlation) ** (step[:, None] - step).clamp(min=0)
    powers[:, 1:] *= (1 - correlation**2) ** 0.5
    return powers.tril()


def cheapest(
    candidates: Float[Tensor, "b s h a"], costs: Float[Tensor, "b s"], count: int
) -> tuple[Float[Tensor, "b e h a"], Float[Tensor, "b 1"]]:
    """Return the `count` candidates of least cost, the best first, and the cost of the best.

    A candidate whose cost is not finite never counts; the best takes its place.

    Raises:
        ValueError: no candidate of an episode has a finite cost.
    """
    costs = costs.nan_to_num(torch.inf, torch.inf, torch.inf)
    cost, index = costs.topk(count, largest=False)
    usable = cost.isfinite()
    if not usable.all():
        if not usable[:, 0].all():
            episodes = (~usable[:, 0]).nonzero().flatten().tolist()
            raise ValueError(f"no candidate has a finite cost in episodes {episodes}")
        index = torch.where(usable, index, index[:, :1])
    episode = torch.arange(len(costs), device=costs.device)[:, None]
    return candidates[episode, index], cost[:, :1]
