"""The improved cross-entropy method: coloured noise, fewer samples each round, elites that stay.

The noise of an action has the power spectrum 1 / f^beta over time. Each round draws fewer samples
than the one before: N_i = max(N / gamma^i, 2 K) for K elites. A share of the elites is evaluated
again in the next round and, one step on, in the next plan; the last round evaluates the mean as
well. The best plan evaluated is returned.

iCEM: Pinneri et al. 2020, https://arxiv.org/abs/2008.06389, section 3. There, the noise has the
period of the horizon, so that its mean over a plan is small; here it is cut from a longer period.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from jepa_world.interfaces import Cost
from jepa_world.search import Draws, around, cheapest, refit

PERIOD = 4  # of the noise, in horizons: noise that returns to where it began never pushes one way


class ICEM:
    """Minimise a cost over action sequences, for all episodes at once.

    Samples are actions, clamped to their bounds before they are evaluated. The planner remembers
    the elites of its last plan; they count for an episode whose `start` is the rest of that plan,
    so that a new episode knows nothing of the last one.

    Args:
        low: Lower bound of an action.
        high: Upper bound of an action.
        horizon: Steps of a plan.
        samples: Action sequences evaluated in the first round.
        elites: Cheapest samples that mean and standard deviation are moved to.
        iterations: Rounds of sampling.
        decay: By how much the samples of a round are fewer than those of the round before.
        std: Standard deviation of the first round, in units of half the action range.
        exponent: beta of the noise; 0 is white, 2 a random walk.
        momentum: Share of the old mean and standard deviation that is kept.
        kept: Share of the elites that is evaluated again; the best always is.
        seed: Of the planner's own random numbers.

    Raises:
        ValueError: fewer than two samples an elite, no elite, no iteration, or a decay below 1.

    Example:
        >>> import torch
        >>> planner = ICEM(torch.tensor([-1.0]), torch.tensor([1.0]), 5)
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
        samples: int = 60,
        elites: int = 6,
        iterations: int = 6,
        decay: float = 1.25,
        std: float = 1.0,
        exponent: float = 2.0,
        momentum: float = 0.1,
        kept: float = 0.3,
        seed: int = 0,
    ) -> None:
        if elites < 1 or samples < 2 * elites:
            raise ValueError(f"need two samples an elite at least, got {samples} and {elites}")
        if iterations < 1 or not decay >= 1:
            raise ValueError(f"need an iteration and decay >= 1, got {iterations} and {decay}")
        self.low, self.high = low, high
        self.counts = [max(int(samples / decay**i), 2 * elites) for i in range(iterations)]
        self.elites, self.kept = elites, max(1, min(round(kept * elites), elites))
        self.std, self.exponent, self.momentum = std, exponent, momentum
        self.draws = Draws(seed)
        self.last: tuple[Tensor, Tensor] | None = None  # plan (b h a), elites (b k h a)

    @torch.no_grad()
    def __call__(self, cost: Cost, start: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        """Return the best plan evaluated.

        Raises:
            ValueError: no sample of an episode has a finite cost.
        """
        low, high = self.low.to(start), self.high.to(start)
        mean = start.clamp(low, high)
        std = ((high - low) * (self.std / 2)).expand_as(mean)
        _, horizon, actions = mean.shape
        elite, kept = mean[:, None], self._recalled(mean)
        for index, count in enumerate(self.counts):
            white = self.draws.normal(count, PERIOD * horizon, actions, like=mean)
            noise = coloured(white, self.exponent)[:, :horizon]
            candidates = around(mean, std, noise, low, high)
            first = 1 if index in (0, len(self.counts) - 1) else 0  # the mean stays, or goes
            candidates[:, first : first + self.kept] = kept
            elite, _ = cheapest(candidates, cost(candidates), self.elites)
            kept = elite[:, : self.kept]
            mean, std = refit(mean, std, elite, self.momentum)
            mean = mean.clamp(low, high)
        self.last = elite[:, 0], kept
        return elite[:, 0]

    def _recalled(self, start: Float[Tensor, "b h a"]) -> Float[Tensor, "b k h a"]:
        """Return the last elites, one step on, of episodes that go on, and `start` of others."""
        fresh = start[:, None].expand(-1, self.kept, -1, -1)
        if self.last is None or self.last[0].shape != start.shape:
            return fresh
        plan, kept = (each.to(start) for each in self.last)
        shifted = torch.cat([kept[:, :, 1:], kept[:, :, -1:]], 2)
        goes_on = (start[:, :-1] == plan[:, 1:]).flatten(1).all(1)
        return torch.where(goes_on[:, None, None, None], shifted, fresh)


def coloured(white: Float[Tensor, "s t a"], exponent: float) -> Float[Tensor, "s t a"]:
    """Give white noise the power spectrum 1 / f^exponent over its t steps, and unit variance.

    The mean over the steps, whose frequency is 0, gets the power of the lowest frequency above.
    Timmer and Koenig 1995, Astronomy and Astrophysics 300.
    """
    steps = white.shape[1]
    frequency = torch.fft.fftfreq(steps, device=white.device, dtype=white.dtype).abs()
    amplitude = frequency.clamp(min=1 / steps) ** (-exponent / 2)
    amplitude = (amplitude / amplitude.square().mean().sqrt())[: steps // 2 + 1]
    return torch.fft.irfft(torch.fft.rfft(white, dim=1) * amplitude[:, None], steps, dim=1)
