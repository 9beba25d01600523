"""Learn how many steps lie between latents, from the order of frames alone: a cost for planning.

    d(z, g) <- 1 + discount * d(z', g),   d(z, g) <- 1 where z' is the goal's own frame

z' is the latent a step after z in the data, g a later frame of the same episode or any frame of
any. The loss is an expectile: a target below the estimate weighs more than one above it, so that d
comes near the shortest way that the data shows, pieced together from different episodes, and not
the mean way. No actions and no rewards are needed; the encoder stays as it is.

Expectiles of a value without actions: IQL, https://arxiv.org/abs/2110.06169, section 4.2; goals in
hindsight and steps to them: HIQL, https://arxiv.org/abs/2307.11949, section 4.1.
"""

import copy

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from jepa_world.interfaces import Encoder
from jepa_world.methods.world_model import Output, WorldModel, as_video, follow
from jepa_world.objectives import TemporalDistance


class TemporalDistanceLearning(nn.Module):
    """A frozen world model, a distance between its latents, and the loss of the distance.

    The weights have the names of a `WorldModel`'s with a `cost`, but for those of `target`.

    Args:
        model: Its encoder and its predictor are frozen, and stay in evaluation mode.
        cost: What learns.
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
        *,
        expectile: float = 0.1,
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        self.encoder: Encoder = model.encoder.requires_grad_(False)  # type: ignore[attr-defined]
        self.predictor = model.predictor.requires_grad_(False)  # type: ignore[attr-defined]
        self.cost = cost
        self.target = copy.deepcopy(cost).requires_grad_(False)
        self.expectile, self.momentum, self.followed = expectile, momentum, -1
        self.train()

    def train(self, mode: bool = True) -> "TemporalDistanceLearning":
        """Set the mode of the cost; what is frozen stays in evaluation mode."""
        super().train(mode)
        for part in self.children():
            part.train(mode and part is self.cost)
        return self

    def forward(self, batch: dict[str, Tensor], step: int) -> Output:
        """Return the loss of latents, the frames that follow them, and g goals of each.

        `latent (b 2+g n d)` holds all three, or `pixels (b 2+g hh ww c)` their frames; `reached
        (b g)` says where the goal is the frame that follows.
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
