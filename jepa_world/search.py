"""What planners share: their random numbers, noise over time, the cheapest plans, descent."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from jepa_world.interfaces import Cost, Planner
from jepa_world.registry import UserError


class UnsuitedCostError(UserError):
    """A cost lacks what a planner needs of it: a slope, or latents."""


class Draws:
    """A planner's own random numbers: the same under the same seed, whatever else draws.

    Example:
        >>> import torch
        >>> a, b = (Draws(3).normal(2, like=torch.zeros(1)) for _ in range(2))
        >>> bool((a == b).all())
        True
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generator: torch.Generator | None = None

    def normal(self, *shape: int, like: Tensor) -> Tensor:
        """Draw from N(0, 1), with the device and the type of `like`."""
        generator = self._generator(like.device)
        return torch.randn(shape, generator=generator, device=like.device, dtype=like.dtype)

    def uniform(self, *shape: int, like: Tensor) -> Tensor:
        """Draw from [0, 1), with the device and the type of `like`."""
        generator = self._generator(like.device)
        return torch.rand(shape, generator=generator, device=like.device, dtype=like.dtype)

    def _generator(self, device: torch.device) -> torch.Generator:
        if self.generator is None or self.generator.device != device:
            self.generator = torch.Generator(device).manual_seed(self.seed)
        return self.generator


class SingleActions:
    """A planner for steps of several actions that searches over the actions one by one.

    Noise that is correlated over time is then correlated within a step as well; drawn for each
    action of a step by itself it cancels out, and the step leads nowhere.

    Args:
        planner: For single actions, over `stride` times as many steps.
        stride: Actions of a step.

    Example:
        >>> import torch
        >>> from jepa_world.planners.cem import CEM
        >>> planner = SingleActions(CEM(-torch.ones(2), torch.ones(2), horizon=15), 5)
        >>> planner(lambda a: a.square().sum((-1, -2)), torch.zeros(1, 3, 10)).shape
        torch.Size([1, 3, 10])
    """

    def __init__(self, planner: Planner, stride: int) -> None:
        self.planner, self.stride = planner, stride

    def __call__(self, cost: Cost, start: Float[Tensor, "b h ka"]) -> Float[Tensor, "b h ka"]:
        """Return the plan of the planner within, in steps again."""
        singly, k = rearrange(start, "b h (k a) -> b (h k) a", k=self.stride), self.stride
        plan = self.planner(lambda a: cost(rearrange(a, "b s (h k) a -> b s h (k a)", k=k)), singly)
        return rearrange(plan, "b (h k) a -> b h (k a)", k=k)


def ar1_filter(correlation: float, horizon: int) -> Float[Tensor, "h h"]:
    """Return the matrix that turns white noise over time into AR(1) noise of unit variance.

    x_t = rho x_{t-1} + sqrt(1 - rho^2) e_t: the effects of white noise cancel and move an arm
    nowhere; noise with autocorrelation rho explores.

    Raises:
        ValueError: the correlation is outside [0, 1).
    """
    if not 0 <= correlation < 1:
        raise ValueError(f"need a correlation in [0, 1), got {correlation}")
    step = torch.arange(horizon)
    powers = torch.tensor(correlation) ** (step[:, None] - step).clamp(min=0)
    powers[:, 1:] *= (1 - correlation**2) ** 0.5
    return powers.tril()


def around(
    plan: Float[Tensor, "b h a"],
    std: Float[Tensor, "b h a"],
    noise: Float[Tensor, "s h a"],
    low: Float[Tensor, "a"],
    high: Float[Tensor, "a"],
) -> Float[Tensor, "b s h a"]:
    """Return samples around plans, clamped to the bounds; the first is the plan itself."""
    samples = torch.addcmul(plan[:, None], std[:, None], noise).clamp_(low, high)
    samples[:, 0] = plan
    return samples


def cheapest(
    candidates: Float[Tensor, "b s h a"], costs: Float[Tensor, "b s"], count: int
) -> tuple[Float[Tensor, "b e h a"], Float[Tensor, "b e"]]:
    """Return the `count` candidates of least cost, the best first, and their costs.

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
        cost = torch.where(usable, cost, cost[:, :1])
    episode = torch.arange(len(costs), device=costs.device)[:, None]
    return candidates[episode, index], cost


def cheaper(
    cost: Cost,
    plan: Float[Tensor, "b h a"],
    best: Float[Tensor, "b h a"],
    best_cost: Float[Tensor, "b"],
) -> Float[Tensor, "b h a"]:
    """Return a plan that was not evaluated yet, or the best one known where that is cheaper."""
    better = cost(plan[:, None])[:, 0] <= best_cost
    return torch.where(better[:, None, None], plan, best)


def refit(
    mean: Float[Tensor, "b h a"],
    std: Float[Tensor, "b h a"],
    elite: Float[Tensor, "b e h a"],
    momentum: float,
) -> tuple[Float[Tensor, "b h a"], Float[Tensor, "b h a"]]:
    """Move mean and standard deviation to those of the elites, keeping a share of the old ones."""
    new_std, new_mean = torch.std_mean(elite, 1, correction=0)
    return new_mean.lerp(mean, momentum), new_std.lerp(std, momentum)


def to_share(
    plans: Float[Tensor, "*b h a"], low: Float[Tensor, "a"], high: Float[Tensor, "a"]
) -> Float[Tensor, "*b h a"]:
    """Return actions as shares of their range, in [0, 1]; `torch.lerp(low, high, ...)` undoes it.

    One step size then fits all actions, and clamping shares keeps actions within their bounds.
    """
    span = (high - low).clamp(min=torch.finfo(low.dtype).tiny)
    return ((plans - low) / span).clamp(0, 1)


def require_slope(costs: Float[Tensor, "b s"]) -> None:
    """Check that autograd can follow costs back to the actions.

    Raises:
        UnsuitedCostError: it cannot.
    """
    if not costs.requires_grad:
        raise UnsuitedCostError("the planner follows slopes and the cost has none (no gradient)")


def slope(costs: Float[Tensor, "b s"], unknowns: list[Tensor]) -> list[Tensor]:
    """Return the gradient of the costs for the unknowns alone: a model's parameters gather none.

    Where a cost is not finite, neither is its slope, and zeros take its place.
    """
    gradients = torch.autograd.grad(costs, unknowns, torch.ones_like(costs))
    return [gradient.nan_to_num(0.0, 0.0, 0.0) for gradient in gradients]


def require_descent(steps: int, lr: float) -> None:
    """Check the options of a descent.

    Raises:
        ValueError: no step, or a step that goes nowhere.
    """
    if steps < 1 or not lr > 0:
        raise ValueError(f"need at least one step and lr > 0, got {steps} and {lr}")


@torch.no_grad()
def descend(
    cost: Cost,
    plans: Float[Tensor, "b s h a"],
    low: Float[Tensor, "a"],
    high: Float[Tensor, "a"],
    *,
    steps: int,
    lr: float,
) -> Float[Tensor, "b h a"]:
    """Move plans down the slope of their cost by Adam and return the cheapest plan met on the way.

    After every step the actions are projected to their bounds. `lr` is in units of the action
    range: the first step moves every action by this much. It falls linearly, to nothing at the end.

    Adam: Kingma and Ba 2015, https://arxiv.org/abs/1412.6980.

    Raises:
        ValueError: no plan of an episode has a finite cost.
        UnsuitedCostError: the cost has no slope.
    """
    share = to_share(plans, low, high).requires_grad_()
    optimizer = torch.optim.Adam([share], lr)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    best, best_cost = plans[:, :1], plans.new_full((len(plans), 1), torch.inf)
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            actions = torch.lerp(low, high, share)
            costs = cost(actions)
        seen, seen_costs = torch.cat([best, actions], 1), torch.cat([best_cost, costs], 1)
        best, best_cost = cheapest(seen, seen_costs, 1)
        if step < steps:
            require_slope(costs)
            (share.grad,) = slope(costs, [share])
            optimizer.step()
            falling.step()
            share.clamp_(0, 1)
    return best[:, 0]
