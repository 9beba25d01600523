"""Learn how many steps lie between latents, from the order of frames alone: a cost for planning.

With it, if asked, what the data does at a latent on the way to a later one: where searches begin.

    d(z, g) <- 1 + discount * d(z', g),   d(z, g) <- 1 where z' is the goal's own frame

z' is the latent a step after z in the data, g a later frame of the same episode or any frame of
any. The loss is an expectile: a target below the estimate weighs more than one above it, so that d
comes near the shortest way that the data shows, pieced together from different episodes, and not
the mean way. No actions and no rewards are needed; the encoder stays as it is.

    policy(z, g) <- a, the actions from z, g a later frame of its episode

Expectiles of a value without actions: IQL, https://arxiv.org/abs/2110.06169, section 4.2; goals in
hindsight and steps to them: HIQL, https://arxiv.org/abs/2307.11949, section 4.1;
imitation with goals in hindsight: https://arxiv.org/abs/1906.05838, section 4.
"""

import copy

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from jepa_world.interfaces import Encoder
from jepa_world.methods.world_model import Output, WorldModel, as_video, follow
from jepa_world.objectives import TemporalDistance, between_latents, both_and_change


class GoalPolicy(nn.Module):
    """What to do at a latent on the way to a goal's: the mean of what the data did.

    It sees latents of a world model, so it can act in imagination: an agent's search begins with
    the plan that it makes there.

    Args:
        dim: Width of a latent token.
        num_tokens: Tokens of a latent.
        action_dim: Numbers of an action, all of a step's.
        width: Units of a hidden layer.
        depth: Number of hidden layers.

    Raises:
        ValueError: no hidden layer.

    Example:
        >>> policy = GoalPolicy(32, 1, 2)
        >>> policy(torch.zeros(5, 1, 32), torch.ones(5, 1, 32)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self, dim: int, num_tokens: int, action_dim: int, *, width: int = 512, depth: int = 3
    ) -> None:
        super().__init__()
        self.layers = between_latents(dim * num_tokens, action_dim, width, depth)

    def forward(
        self, z: Float[Tensor, "*b n d"], goal: Float[Tensor, "*b n d"]
    ) -> Float[Tensor, "*b a"]:
        """Return the actions of a step."""
        return self.layers(both_and_change(z, goal))


class TemporalDistanceLearning(nn.Module):
    """A frozen world model, a distance between its latents, and the loss of the distance.

    The weights have the names of a `WorldModel`'s with a `cost` and a `policy`, but for those of
    `target`.

    Args:
        model: Its encoder and its predictor are frozen, and stay in evaluation mode.
        cost: What learns.
        policy: What learns beside it, if anything: `GoalPolicy`.
        expectile: Weight of a target above the estimate, 1 less it of one below: 0.5 is the mean
            way of the data, near 0 the shortest.
        momentum: Of the moving average of the cost that gives the targets.

    Example:
        >>> from jepa_world.encoders.conv import ConvEncoder
        >>> from jepa_world.predictors.mlp import MLPPredictor
        >>> model = WorldModel(ConvEncoder((1, 3, 64, 64)), MLPPredictor(32, 2))
        >>> learning = TemporalDistanceLearning(model, TemporalDistance(32, 1))
        >>> batch = {"latent": torch.randn(8, 6, 1, 32), "reached": torch.zeros(8, 4).bool()}
        >>> sorted(learning(batch, step=0).terms)
        ['distance', 'temporal']
    """

    def __init__(
        self,
        model: WorldModel,
        cost: TemporalDistance,
        policy: nn.Module | None = None,
        *,
        expectile: float = 0.1,
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        self.encoder: Encoder = model.encoder.requires_grad_(False)  # type: ignore[attr-defined]
        self.predictor = model.predictor.requires_grad_(False)  # type: ignore[attr-defined]
        self.cost, self.policy = cost, policy
        self.target = copy.deepcopy(cost).requires_grad_(False)
        self.expectile, self.momentum, self.followed = expectile, momentum, -1
        self.train()

    def train(self, mode: bool = True) -> "TemporalDistanceLearning":
        """Set the mode of what learns; what is frozen stays in evaluation mode."""
        super().train(mode)
        for part in self.children():
            part.train(mode and part in (self.cost, self.policy))
        return self

    def forward(self, batch: dict[str, Tensor], step: int) -> Output:
        """Return the loss of latents, the frames that follow them, and g goals of each.

        `latent (b 2+g n d)` holds all three, or `pixels (b 2+g hh ww c)` their frames; `reached
        (b g)` says where the goal is the frame that follows. The policy also needs `action (b a)`,
        from the first frame to the second, and `later (b g)`, where the goal lies on the way.
        """
        z = batch["latent"] if "latent" in batch else self.encode(batch["pixels"])
        if self.training and step > 0 and self.followed != step - 1:  # once a step, as teachers do
            self.followed = step - 1
            follow(self.target, self.cost, self.momentum)
        here, following, goals = z[:, :1], z[:, 1:2], z[:, 2:]
        here, following = here.expand_as(goals), following.expand_as(goals)
        estimate = self.cost.between(here, goals)
        aim = self._aim(following, goals, batch["reached"])
        weight = torch.where(aim < estimate, 1 - self.expectile, self.expectile)
        at_goal = self.cost.between(goals, goals)
        scale = 1 - self.cost.discount  # of distances: all are within 0 and 1 / scale
        loss = scale * ((weight * (aim - estimate).square()).mean() + 0.2 * at_goal.square().mean())
        terms = {"temporal": loss.detach(), "distance": estimate.detach().mean()}
        if self.policy is not None:
            error = self.policy(here, goals) - batch["action"].unsqueeze(1)
            imitation = error[batch["later"]].square().mean()
            loss, terms = loss + imitation, {**terms, "imitation": imitation.detach()}
        return Output(loss, terms, rearrange(z[:, 0], "b n d -> (b n) d"))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Float[Tensor, "b t n d"]:
        """Encode byte frames `(b t hh ww c)`, channels last."""
        return self.encoder(as_video(pixels)).to(torch.get_default_dtype())

    @torch.no_grad()
    def _aim(
        self,
        following: Float[Tensor, "b g n d"],
        goals: Float[Tensor, "b g n d"],
        reached: Bool[Tensor, "b g"],
    ) -> Float[Tensor, "b g"]:
        ahead = self.target.between(following, goals).masked_fill(reached, 0.0)
        return 1 + self.cost.discount * ahead
