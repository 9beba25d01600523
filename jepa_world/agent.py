"""Act in an environment by planning in latent space: receding-horizon control.

At every step the observation is encoded, the planner minimises the summed distance between the
latents a plan is predicted to visit and the goal's latent, the first action is executed, and the
rest of the plan, shifted, starts the next search.
"""

from collections.abc import Callable

import torch
from einops import rearrange, repeat
from jaxtyping import Float, UInt8
from torch import Tensor

from jepa_world.interfaces import Planner
from jepa_world.methods.world_model import WorldModel

Objective = Callable[[Float[Tensor, "b s h n d"], Float[Tensor, "b n d"]], Float[Tensor, "b s"]]
"""Cost of imagined latents, given the goal's latent."""


def summed_distance(
    z: Float[Tensor, "b s h n d"], goal: Float[Tensor, "b n d"]
) -> Float[Tensor, "b s"]:
    """Sum the latent distance to the goal over the horizon: arrive early, and stay.

    Not squared: squares let the first, far steps of a plan drown the last, near ones.
    """
    return torch.linalg.vector_norm(z - goal[:, None, None], dim=(-1, -2)).sum(-1)


class Agent:
    """World model + planner + history, for b episodes at once.

    Args:
        model: The world model; put in evaluation mode.
        planner: Any `interfaces.Planner`.
        start: The plan that the first search of an episode starts from, `(h a)`.
        history: Past observations given to the predictor, the present one included.
        objective: Cost of imagined latents; a user's own constraints go here.

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
    ) -> None:
        self.model = model.eval()
        self.planner = planner
        self.start = start
        self.history = history
        self.objective = objective

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
        self.plan = self.planner(self.cost, self.plan)
        return self.plan[:, 0]

    def cost(self, plans: Float[Tensor, "b s h a"]) -> Float[Tensor, "b s"]:
        """Return the objective of the latents the model predicts for every plan."""
        return self.objective(self.imagine(plans), self.goal)

    def imagine(self, plans: Float[Tensor, "b s h a"]) -> Float[Tensor, "b s h n d"]:
        """Predict the latents that every plan would visit from here."""
        samples = plans.shape[1]
        past = repeat(self.actions, "b u a -> b s u a", s=samples)
        actions = rearrange(torch.cat([past, plans], dim=2), "b s u a -> (b s) u a")
        z = repeat(self.z, "b t n d -> (b s) t n d", s=samples)
        return rearrange(self.model.rollout(z, actions), "(b s) h n d -> b s h n d", s=samples)
