"""An action-conditioned predictor on the latents of a frozen encoder (V-JEPA 2-AC, 2506.09985).

    loss = mean |predict(z_t, a_t) - z_{t+1}| + mean |rollout(z_1, a_1..a_k) - z_{k+1}|, k = 2..T

Teacher forcing over the whole window, and a rollout of T = 2 steps from its first frame, in which
the first prediction is fed back, with equal weights (section 3.1). The encoder does not learn, so
nothing collapses. Latents are layer-normed: encoder and predictor must have `normalise`, where they
offer it. With T = 1 and squared distances it is the loss of DINO-WM
(https://arxiv.org/abs/2411.04983).
"""

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from jepa_world.interfaces import Encoder, PrefixRollout
from jepa_world.losses import DISTANCES, Distance
from jepa_world.methods.world_model import Output


class VJEPA2AC(nn.Module):
    """A frozen encoder and a predictor with its loss.

    The weights have the names of a `WorldModel`'s: `WorldModel(encoder, predictor, ...)` plans with
    the same parts.

    Args:
        encoder: Part that maps video to latents; it is frozen, and stays in evaluation mode.
        predictor: Part that maps latents, actions and, if the batch has them, states to the next
            latents.
        rollout: Steps T of the rollout; 1 leaves teacher forcing alone.
        distance: Between latents predicted and latents that came.
        cost: What imagined latents cost, learned on this encoder's before; stays as it is.
        policy: What to do on the way to a goal, likewise.

    Example:
        >>> import torch
        >>> from jepa_world.encoders.vit import ViTEncoder
        >>> from jepa_world.predictors.block_causal import BlockCausalPredictor
        >>> encoder = ViTEncoder((1, 3, 16, 16), dim=32, depth=1, heads=2, normalise=True)
        >>> predictor = BlockCausalPredictor(32, 2, rows=2, width=32, heads=2, normalise=True)
        >>> pixels = torch.randint(0, 256, (8, 4, 16, 16, 3), dtype=torch.uint8)
        >>> batch = {"pixels": pixels, "action": torch.zeros(8, 4, 2)}
        >>> sorted(VJEPA2AC(encoder, predictor)(batch, step=0).terms)
        ['rollout', 'teacher_forcing']
    """

    def __init__(
        self,
        encoder: nn.Module,
        predictor: nn.Module,
        *,
        rollout: int = 2,
        distance: Distance = "l1",
        cost: nn.Module | None = None,
        policy: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder: Encoder = encoder.requires_grad_(False).eval()  # type: ignore[assignment]
        self.cost, self.policy = (part and part.requires_grad_(False) for part in (cost, policy))
        self.predictor = predictor
        self.rollout = rollout
        self.distance: Distance = distance

    def train(self, mode: bool = True) -> "VJEPA2AC":
        """Set the mode of the predictor; the encoder's statistics stay as they are."""
        super().train(mode)
        for part in self.children():
            part.train(mode and part is self.predictor)
        return self

    def forward(self, batch: dict[str, Tensor], step: int) -> Output:
        """Return the loss of windows: `pixels (b t hh ww c)` bytes, `action (b t a)`.

        Frames that were encoded before are given as `latent (b t n d)`. Action t leads from frame t
        to frame t + 1; the last one is not used, nor is the last of `state (b t s)`, where there is
        one.

        Raises:
            ValueError: a window of no more frames than the rollout has steps.
        """
        z = batch["latent"] if "latent" in batch else self.encode(batch["pixels"])
        if z.shape[1] <= self.rollout:
            raise ValueError(f"a rollout of {self.rollout} steps in windows of {z.shape[1]} frames")
        given = [batch[name][:, :-1] for name in ("action", "state") if name in batch]
        forced, distance = self.predictor(z[:, :-1], *given).to(z), DISTANCES[self.distance]
        terms = {"teacher_forcing": distance(forced, z[:, 1:])}
        if self.rollout > 1:
            ahead = self._ahead(z[:, :1], forced[:, :1], given)
            terms["rollout"] = distance(ahead, z[:, 2 : self.rollout + 1])
        latent = rearrange(z, "b t n d -> (b t n) d")
        loss = torch.stack(list(terms.values())).sum()
        return Output(loss, {name: term.detach() for name, term in terms.items()}, latent)

    def _ahead(self, z: Tensor, following: Tensor, given: list[Tensor]) -> Tensor:
        """Return the latents 2..T steps after the first, of which the next is known already."""
        if isinstance(self.predictor, PrefixRollout):
            ahead = self.predictor.rollout_prefixes(z, given[0][:, None, : self.rollout])
            return ahead[:, 0, 1:].to(z)
        fed = torch.cat([z, following], 1)
        for known in range(2, self.rollout + 1):
            following = self.predictor(fed, *(x[:, :known] for x in given))[:, -1:].to(z)
            fed = torch.cat([fed, following], 1)
        return fed[:, 2:]

    @torch.no_grad()
    def encode(self, pixels: UInt8[Tensor, "b t hh ww c"]) -> Float[Tensor, "b t n d"]:
        """Encode byte frames, channels last as environments and datasets hold them."""
        whole = torch.get_default_dtype()  # out of autocast's half precision
        video = rearrange(pixels, "b t hh ww c -> b t c hh ww").to(whole) / 255
        return self.encoder(video).to(whole)
