"""The contracts between the parts: nothing inherits from these, whatever fits is a part.

Axes: b batch, t time, n tokens, d latent width, a action, s sample, h horizon, k context tokens,
m target tokens, c/hh/ww image. One latent layout everywhere: `(b t n d)`; a vector latent has
n = 1.
`jepa_world.testing.check_encoder` and its sisters run anybody's part through its contract.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt8
from torch import Tensor

Cost = Callable[[Float[Tensor, "b s h a"]], Float[Tensor, "b s"]]
"""What a planner minimises: the cost of every candidate action sequence of every episode."""


@runtime_checkable
class Encoder(Protocol):
    """Map a video to latents: `MyEncoder(observation_shape, *, ...)`.

    `observation_shape` is `(t, c, hh, ww)`: the clip the encoder is built for. Video holds floats
    in [0, 1] (the caller divides bytes by 255). An image is a clip with t = 1. An encoder that sees
    every frame by itself returns t' = t and accepts any t; one with tubelets returns
    t' = t / tubelet.

    Example:
        >>> import torch
        >>> from jepa_world.encoders.conv import ConvEncoder
        >>> encoder = ConvEncoder((1, 3, 64, 64), dim=32)
        >>> encoder(torch.rand(2, 4, 3, 64, 64)).shape
        torch.Size([2, 4, 1, 32])
    """

    dim: int
    num_tokens: int  # n: tokens of one time step t'

    def __call__(
        self, video: Float[Tensor, "b t c hh ww"], keep: Int[Tensor, "b k"] | None = None
    ) -> Tensor:
        """Return latents `(b t' n d)`, or `(b k d)` of the tokens `keep`, indices into t' * n."""
        ...


@runtime_checkable
class ReadsWeights(Protocol):
    """An encoder of another library may also offer this: weights in that library's files."""

    def load_weights(self, path: Path) -> None:
        """Load them, strictly; a file that does not fit is a ValueError."""
        ...


@runtime_checkable
class MaskedPredictor(Protocol):
    """Predict tokens that were not seen: `MyMaskedPredictor(dim, grid, *, ...)`.

    `grid` is `(t', rows, columns)` of the encoder's tokens.
    """

    def __call__(
        self,
        context: Float[Tensor, "b k d"],
        context_index: Int[Tensor, "b k"],
        target_index: Int[Tensor, "b m"],
    ) -> Float[Tensor, "b m d"]:
        """Return the latents at `target_index`."""
        ...


@runtime_checkable
class Predictor(Protocol):
    """Latent dynamics: `MyPredictor(dim, action_dim, *, ...)`.

    The output at t is the latent at t + 1, computed from latents and actions at steps <= t only.

    Example:
        >>> import torch
        >>> from jepa_world.predictors.mlp import MLPPredictor
        >>> predictor = MLPPredictor(32, 2)
        >>> predictor(torch.zeros(8, 3, 1, 32), torch.zeros(8, 3, 2)).shape
        torch.Size([8, 3, 1, 32])
    """

    def __call__(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b t a"]
    ) -> Float[Tensor, "b t n d"]:
        """Return the next latent of every step."""
        ...


@runtime_checkable
class FastRollout(Protocol):
    """A predictor may also offer this: the same numbers as calling it step by step, cheaper."""

    def rollout(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b u a"]
    ) -> Float[Tensor, "b h n d"]:
        """Return the h = u - t + 1 latents after z; actions 0..t-1 belong to the steps of z."""
        ...


@runtime_checkable
class PrefixRollout(Protocol):
    """A predictor may offer this in place of `FastRollout`: latents far ahead, not step by step.

    The latent k steps ahead is predicted from z and the first k actions, up to `span` of them; what
    lies further goes on from the latent that `span` actions lead to. It is not the number that
    feeding predictions back gives, except for k = 1, and has to be trained. Where it is offered,
    training and planning roll out by it: s plans from the same z, so that what is made of z alone
    is made once.
    """

    span: int

    def rollout_prefixes(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b s u a"]
    ) -> Float[Tensor, "b s h n d"]:
        """Return the h = u - t + 1 latents after z; actions 0..t-1 belong to the steps of z."""
        ...


@runtime_checkable
class LatentCost(Protocol):
    """A cost may also offer this: the latents behind it, for planners that move them as well.

    `cost(plans)` is `cost.score(z, plans)` of `z = cost.imagine(plans)`, and these are the latents
    that `cost.foresee` leaves as they are: `z = cost.foresee(z, plans)`. An agent's cost has it.
    """

    def __call__(self, plans: Float[Tensor, "b s h a"]) -> Float[Tensor, "b s"]:
        """Return the cost of every plan."""
        ...

    def imagine(self, plans: Float[Tensor, "b s h a"]) -> Float[Tensor, "b s h n d"]:
        """Return the latent that every step of every plan leads to, one after the other."""
        ...

    def foresee(
        self, z: Float[Tensor, "b s h n d"], plans: Float[Tensor, "b s h a"]
    ) -> Float[Tensor, "b s h n d"]:
        """Return the latent that every step leads to from those before it in `z`, all at once."""
        ...

    def score(
        self, z: Float[Tensor, "b s h n d"], plans: Float[Tensor, "b s h a"]
    ) -> Float[Tensor, "b s"]:
        """Return the cost of visiting the latents `z` by the actions of the plans."""
        ...


@runtime_checkable
class LearnedCost(Protocol):
    """The network that `train_cost.py` trains: `MyCost(dim, num_tokens, *, ...)`, an objective too.

    `objectives.TemporalDistance` is one. A goal k steps away is (1 - discount^k) / (1 - discount)
    away.
    """

    discount: float

    def between(
        self, z: Float[Tensor, "*b n d"], goal: Float[Tensor, "*b n d"]
    ) -> Float[Tensor, "*b"]:
        """Return the discounted steps from each latent to its goal."""
        ...


@runtime_checkable
class LatentPolicy(Protocol):
    """What `train_cost.py --policy` trains: `MyPolicy(dim, num_tokens, action_dim, *, ...)`.

    An `nn.Module`; `methods.temporal_distance.GoalPolicy` is one. An action holds all of a step's.
    """

    def __call__(
        self, z: Float[Tensor, "*b n d"], goal: Float[Tensor, "*b n d"]
    ) -> Float[Tensor, "*b a"]:
        """Return what to do at each latent on the way to its goal's."""
        ...


@runtime_checkable
class Planner(Protocol):
    """Minimise a cost over actions: `MyPlanner(low, high, horizon, *, ...)`.

    `low` and `high` are `(a,)` bounds; every action that is evaluated or returned lies within them.
    A planner sees a cost, never a model; if it needs more than costs, a `LatentCost`, and says so
    by an attribute `needs_latents = True`. The plan of an episode depends on no other episode, and
    candidates whose cost is not finite are never returned. It draws its samples from a generator of
    its own, seeded by its `seed` option. Agents plan within `torch.no_grad`: a planner that follows
    slopes enables gradients itself, and leaves none in the parameters behind the cost.

    Example:
        >>> import torch
        >>> from jepa_world.planners.cem import CEM
        >>> planner = CEM(torch.tensor([-1.0]), torch.tensor([1.0]), 5)
        >>> plan = planner(lambda a: (a - 0.5).square().sum((-1, -2)), torch.zeros(1, 5, 1))
        >>> plan.shape
        torch.Size([1, 5, 1])
    """

    def __call__(self, cost: Cost, start: Float[Tensor, "b h a"]) -> Float[Tensor, "b h a"]:
        """Return the best plan found around `start`: zeros, the last plan shifted, a policy's."""
        ...


@runtime_checkable
class BudgetEnv(Protocol):
    """An environment may also offer this: how long its episodes are, if nothing else is asked."""

    budget: int
    """Steps in which a goal can be reached."""


@runtime_checkable
class SimulatorEnv(Protocol):
    """An environment may also offer this: true distances, for the ceiling of a perfect model."""

    tolerance: float
    """The largest distance that counts as success: `info["success"]` says the same."""

    def goal_distances(self, actions: Float[np.ndarray, "s h a"]) -> Float[np.ndarray, "s h"]:
        """Return the true distance to the goal (in the unit of the tolerance) after every action.

        Starts from the present state, which is left as it was; nothing is rendered.
        """
        ...

    def goal_distance(self) -> float:
        """Return the true distance to the goal now, in the unit of the tolerance."""
        ...


@runtime_checkable
class NamedStateEnv(Protocol):
    """An environment may also offer this: what the numbers of `info["state"]` and others are.

    Example:
        >>> from jepa_world.envs import make
        >>> make("reach", size=32).unwrapped.quantities["state"][1]
        Quantity(name='elbow', unit='rad', period=6.283185307179586)
    """

    quantities: Mapping[str, Sequence[tuple[str, str, float]]]
    """By entry of `info` (`state`, `proprio`), for each of its numbers in order: name, unit, and
    where an angle repeats, 0 for what does not."""


@runtime_checkable
class ImplausibleEnv(Protocol):
    """An environment may also offer this: pictures that cannot be the next ones."""

    def implausible(
        self, generator: np.random.Generator
    ) -> dict[str, UInt8[np.ndarray, "hh ww c"]]:
        """Return the present picture with a thing changed, by the name of the change.

        Ours have "teleport", "colour" and "vanished". The present state is left as it was.
        """
        ...
