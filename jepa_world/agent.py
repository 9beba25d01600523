"""Act in an environment by planning in latent space: receding-horizon control.

At every step the observation is encoded, the planner minimises the summed distance between the
latents a plan is predicted to visit and the goal's latent, the first action is executed, and the
rest of the plan, shifted, starts the next search; where the world model has a policy, what that
would do in imagination does.
"""

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Float, UInt8
from torch import Tensor

from jepa_world.interfaces import LatentPolicy, Planner, PrefixRollout
from jepa_world.methods.world_model import WorldModel
from jepa_world.objectives import Objective, summed_distance


class Agent:
    """World model + planner + history, for b episodes at once.

    Args:
        model: The world model; put in evaluation mode.
        planner: Any `interfaces.Planner`.
        start: The plan that the first search of an episode starts from, `(h a)`; of a model with a
            policy, only its length counts.
        history: Past observations given to the predictor, the present one included.
        objective: What is minimised; a user's own constraints go here (`jepa_world.objectives`).
        half: Predict in bfloat16 (autocast), and rate what is predicted in float32.

    Example:
        >>> import torch
        >>> from jepa_world import SIGReg, WorldModel
        >>> from jepa_world.encoders.conv import ConvEncoder
        >>> from jepa_world.planners.cem import CEM
        >>> from jepa_world.predictors.mlp import MLPPredictor
        >>> encoder, predictor = ConvEncoder((1, 3, 64, 64), dim=32), MLPPredictor(32, 2)
        >>> model = WorldModel(encoder, predictor, SIGReg(), weight=0.01)
        >>> agent = Agent(model, CEM(-torch.ones(2), torch.ones(2), 5), torch.zeros(5, 2))
        >>> agent.reset(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
        >>> agent.act(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        model: WorldModel,
        planner: Planner,
        start: Float[Tensor, "h a"],
        *,
        history: int = 1,
        objective: Objective = summed_distance,
        half: bool = False,
    ) -> None:
        self.model = model.eval()
        self.planner = planner
        self.start = start
        self.history = history
        self.objective = objective
        self.half = half

    @torch.no_grad()
    def reset(self, goal: UInt8[Tensor, "b hh ww c"]) -> None:
        """Begin episodes that should end looking like `goal`."""
        self.goal = self.model.encode(goal[:, None])[:, 0]  # b n d
        self.z = self.goal.new_zeros(len(goal), 0, *self.goal.shape[1:])
        self.plan = repeat(self.start, "h a -> b h a", b=len(goal))
        self.actions = self.plan[:, :0]

    @torch.no_grad()
    def act(self, observation: UInt8[Tensor, "b hh ww c"]) -> Float[Tensor, "b a"]:
        """Return the first action of the best plan found from here."""
        if self.z.shape[1]:
            self.actions = torch.cat([self.actions, self.plan[:, :1]], dim=1)
            self.plan = torch.cat([self.plan[:, 1:], torch.zeros_like(self.plan[:, :1])], dim=1)
        self.z = torch.cat([self.z, self.model.encode(observation[:, None])], dim=1)
        self.z = self.z[:, -self.history :]
        self.actions = self.actions[:, self.actions.shape[1] - self.z.shape[1] + 1 :]
        self.cost = GoalCost(
            *(self.model, self.z, self.actions, self.goal, self.objective), half=self.half
        )
        start = self.plan if self.model.policy is None else self.proposed(self.model.policy)
        self.plan = self.planner(self.cost, start)
        return self.plan[:, 0]

    def proposed(self, policy: LatentPolicy) -> Float[Tensor, "b h a"]:
        """Return what a policy does in imagination from here."""
        z, actions = self.z, self.actions
        for _ in range(len(self.start)):
            action = policy(z[:, -1], self.goal)
            actions = torch.cat([actions, action[:, None]], 1)
            z = torch.cat([z, self.model.rollout(z, actions)], 1)
        return actions[:, -len(self.start) :]


@dataclass(frozen=True)
class GoalCost:
    """What plans cost from one moment on, for all episodes: an `interfaces.LatentCost`."""

    model: WorldModel
    z: Float[Tensor, "b t n d"]  # the latents seen, the present one last
    actions: Float[Tensor, "b u a"]  # those between them: u = t - 1
    goal: Float[Tensor, "b n d"]
    objective: Objective
    half: bool = False

    def __call__(self, plans: Float[Tensor, "b s h a"]) -> Float[Tensor, "b s"]:
        """Return the objective of the latents the model predicts for every plan."""
        return self.score(self.imagine(plans), plans)

    def score(
        self, z: Float[Tensor, "b s h n d"], plans: Float[Tensor, "b s h a"]
    ) -> Float[Tensor, "b s"]:
        """Return the objective of latents, wherever they come from."""
        return self.objective(z, plans, self.goal)

    def imagine(self, plans: Float[Tensor, "b s h a"]) -> Float[Tensor, "b s h n d"]:
        """Predict the latents that every plan would visit from here."""
        with self._half():
            future = self.model.rollout_plans(self.z, self._actions(plans))
        return future.to(self.z.dtype)

    def foresee(
        self, z: Float[Tensor, "b s h n d"], plans: Float[Tensor, "b s h a"]
    ) -> Float[Tensor, "b s h n d"]:
        """Predict the latent after every step, were those before it `z`: one call, no rollout.

        A `PrefixRollout` predictor feeds back every `span`-th latent alone: from there, then.
        """
        if isinstance(self.model.predictor, PrefixRollout):
            return self._foresee_spans(self.model.predictor, z, plans)
        seen = repeat(self.z, "b t n d -> (b s) t n d", s=plans.shape[1])
        visited = rearrange(z[:, :, :-1], "b s h n d -> (b s) h n d")
        actions = rearrange(self._actions(plans), "b s u a -> (b s) u a")
        with self._half():
            following = self.model.predictor(torch.cat([seen, visited], 1), actions)
        future = following[:, -plans.shape[2] :].to(self.z.dtype)
        return rearrange(future, "(b s) h n d -> b s h n d", s=plans.shape[1])

    def _foresee_spans(self, predictor: PrefixRollout, z: Tensor, plans: Tensor) -> Tensor:
        first, *later = plans.split(predictor.span, 2)
        future = [self.imagine(first)]
        for number, actions in enumerate(later, start=1):
            before = rearrange(z[:, :, number * predictor.span - 1], "b s n d -> (b s) 1 n d")
            actions = rearrange(actions, "b s k a -> (b s) 1 k a")
            with self._half():
                stretch = predictor.rollout_prefixes(before, actions).to(self.z.dtype)
            future.append(rearrange(stretch, "(b s) 1 k n d -> b s k n d", s=plans.shape[1]))
        return torch.cat(future, 2)

    def _half(self) -> torch.autocast:
        return torch.autocast(self.z.device.type, torch.bfloat16, enabled=self.half)

    def _actions(self, plans: Tensor) -> Float[Tensor, "b s u a"]:
        """Return the actions of every plan behind those of the past."""
        past = repeat(self.actions, "b u a -> b s u a", s=plans.shape[1])
        return torch.cat([past, plans], 2)
