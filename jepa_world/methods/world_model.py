"""An action-conditioned JEPA world model trained end to end with SIGReg (LeWorldModel, 2603.19312).

    loss = mean |predict(z_t, a_t) - z_{t+1}|^2 + weight * SIGReg(z), z = encode(pixels)

No stop-gradient, no EMA teacher, no reconstruction: SIGReg per time step keeps the latents from
collapsing. The prediction term is open loop over the whole window, unless true latents are to be
given on the way: every predicted latent is fed back, so that errors which would build up while
planning are seen in training.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from jepa_world.checkpoint import (
    build_part,
    described_part,
    find_checkpoint,
    load_weights,
    observation_shape,
)
from jepa_world.config import part_from_dict, read_yaml
from jepa_world.interfaces import Encoder, FastRollout, Predictor, PrefixRollout
from jepa_world.losses import DISTANCES, Distance
from jepa_world.registry import UserError
from jepa_world.sigreg import SIGReg


class Output(NamedTuple):
    """What a method returns for one batch."""

    loss: Tensor  # scalar, differentiable
    terms: dict[str, Tensor]  # scalars for the log
    latent: Float[Tensor, "n d"]  # detached features for the health report


class WorldModel(nn.Module):
    """Encoder and predictor with their common loss.

    Args:
        encoder: Part that maps video to latents.
        predictor: Part that maps latents and actions to the next latents.
        sigreg: The regulariser.
        weight: Of SIGReg (which includes the factor N) against the prediction error, at first:
            a large weight soon makes the latents hold the whole picture.
        final_weight: Where the weight falls to, geometrically: a small one leaves them smooth, so
            that they can be predicted and distances mean something. Constant if not given.
        steps: Of training, over which the weight falls.
        open_loop: Steps predicted before the true latent is given again: 1 is teacher forcing, as
            in LeWorldModel. The whole window if not given.
        distance: Between latents predicted and latents that came.

    Example:
        >>> import torch
        >>> from jepa_world.encoders.conv import ConvEncoder
        >>> from jepa_world.predictors.mlp import MLPPredictor
        >>> parts = ConvEncoder((1, 3, 64, 64)), MLPPredictor(32, 2), SIGReg(slices=64)
        >>> model = WorldModel(*parts, weight=0.1, final_weight=0.01, steps=1000)
        >>> pixels = torch.randint(0, 256, (8, 4, 64, 64, 3), dtype=torch.uint8)
        >>> output = model({"pixels": pixels, "action": torch.zeros(8, 4, 2)}, step=0)
        >>> sorted(output.terms)
        ['prediction', 'sigreg']
    """

    def __init__(
        self,
        encoder: nn.Module,
        predictor: nn.Module,
        sigreg: SIGReg,
        *,
        weight: float,
        final_weight: float | None = None,
        steps: int = 1,
        open_loop: int | None = None,
        distance: Distance = "l2",
    ) -> None:
        super().__init__()
        self.encoder: Encoder = encoder  # type: ignore[assignment]
        self.predictor: Predictor = predictor  # type: ignore[assignment]
        self.sigreg = sigreg
        self.weight = weight
        self.final_weight = weight if final_weight is None else final_weight
        self.steps = steps
        self.open_loop = open_loop
        self.distance: Distance = distance

    def forward(self, batch: dict[str, Tensor], step: int) -> Output:
        """Return the loss of windows: `pixels (b t hh ww c)` bytes, `action (b t a)`.

        Action t leads from frame t to frame t + 1; the last one is not used.
        """
        whole = torch.get_default_dtype()  # out of autocast's half precision
        z = self.encode(batch["pixels"]).to(whole)
        predicted = self.predict(z, batch["action"]).to(whole)
        prediction = DISTANCES[self.distance](predicted, z[:, 1:])
        regulariser = self.sigreg(rearrange(z, "b t n d -> (t n) b d"), step)
        terms = {"prediction": prediction.detach(), "sigreg": regulariser.detach()}
        latent = rearrange(z.detach(), "b t n d -> (b t n) d")
        done = min(1.0, step / self.steps)
        weight = self.weight ** (1 - done) * self.final_weight**done
        return Output(prediction + weight * regulariser, terms, latent)

    def predict(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b t a"]
    ) -> Float[Tensor, "b t-1 n d"]:
        """Predict all latents but the first, from the true ones of every `open_loop`-th step."""
        last = z.shape[1] - 1
        stretch = self.open_loop or last
        starts = range(0, last, stretch)
        ends = (min(start + stretch, last) for start in starts)
        stretches = [
            self.rollout(z[:, : start + 1], action[:, :end])
            for start, end in zip(starts, ends, strict=True)
        ]
        return torch.cat(stretches, 1)

    def encode(self, pixels: UInt8[Tensor, "b t hh ww c"]) -> Float[Tensor, "b t n d"]:
        """Encode byte frames, channels last as environments and datasets hold them."""
        video = rearrange(pixels, "b t hh ww c -> b t c hh ww").to(torch.get_default_dtype()) / 255
        return self.encoder(video)

    def rollout(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b u a"]
    ) -> Float[Tensor, "b h n d"]:
        """Predict the h = u - t + 1 latents after `z`, in the way that the predictor offers.

        Actions 0..t-1 belong to the steps of `z`, the rest to the steps that are predicted.
        """
        if isinstance(self.predictor, PrefixRollout):
            return self.predictor.rollout_prefixes(z, action[:, None])[:, 0]
        if isinstance(self.predictor, FastRollout):
            return self.predictor.rollout(z, action)
        return rollout(self.predictor, z, action)

    def rollout_plans(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b s u a"]
    ) -> Float[Tensor, "b s h n d"]:
        """Predict the h = u - t + 1 latents after `z` under each of s sequences of actions."""
        if isinstance(self.predictor, PrefixRollout):
            return self.predictor.rollout_prefixes(z, action)
        samples = action.shape[1]
        seen = repeat(z, "b t n d -> (b s) t n d", s=samples)
        future = self.rollout(seen, rearrange(action, "b s u a -> (b s) u a"))
        return rearrange(future, "(b s) h n d -> b s h n d", s=samples)


def rollout(
    predictor: Predictor, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b u a"]
) -> Float[Tensor, "b h n d"]:
    """Roll any predictor out step by step: the reference for `FastRollout`."""
    known = z.shape[1]
    for step in range(known, action.shape[1] + 1):
        following = predictor(z, action[:, :step])[:, -1:]
        z = torch.cat([z, following], dim=1)
    return z[:, known:]


def build_parts(description: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Build the encoder and the predictor that a command describes; the user has named both.

    Args:
        description: `observation_shape`, `action_dim` and the two parts with their options.

    Raises:
        UserError: a part cannot be built, or is no encoder.
    """
    parts = {kind: part_from_dict(description[kind]) for kind in ("encoder", "predictor")}
    shape = tuple(description["observation_shape"])
    encoder = _checked(parts["encoder"].build("encoder", shape), parts["encoder"].name)
    dim, action_dim = encoder.dim, description["action_dim"]
    return encoder, parts["predictor"].build("predictor", dim, action_dim)


def load_parts(
    description: dict[str, Any], file: Path, trusted: tuple[str, ...]
) -> tuple[nn.Module, nn.Module]:
    """Build the encoder and the predictor that a checkpoint's `config.yaml` describes.

    Args:
        description: `observation_shape`, `action_dim` and the two parts with their options.
        file: Their weights, which they cannot be larger than.
        trusted: Packages outside jepa_world whose parts may be imported.

    Raises:
        UserError: a key is missing or does not fit, or a part is not trusted.
    """
    shape = observation_shape(description)
    for key, default in (("action_dim", None), ("stride", 1)):
        number = description.get(key, default)
        if type(number) is not int or not 0 < number < 2**16:
            raise UserError(f"the checkpoint gives the {key} {number!r}: expected a number above 0")
    for kind in ("encoder", "predictor"):  # before either is imported
        described_part(description, kind)
    words: Any = {"file": file, "trusted": trusted}
    encoder = build_part(description, "encoder", shape, **words)
    encoder = _checked(encoder, described_part(description, "encoder").name)
    facts = (encoder.dim, description["action_dim"])
    return encoder, build_part(description, "predictor", *facts, **words)


def _checked(encoder: Any, name: str) -> Any:
    """Return a module that keeps the contract of an encoder.

    Raises:
        UserError: it does not.
    """
    if not (isinstance(encoder, nn.Module) and isinstance(encoder, Encoder)):
        raise UserError(f"encoder {name!r} is no nn.Module with `dim` and `num_tokens`, both int")
    return encoder


def load_world_model(
    path: Path, trusted: tuple[str, ...] = ()
) -> tuple[WorldModel, dict[str, Any]]:
    """Load a world model from a run folder or a checkpoint folder, in evaluation mode.

    Returns:
        The model, and its description: `env`, `observation_shape`, `action_dim` and the parts.

    Raises:
        UserError: no checkpoint there, damaged, of another method, or with a part not trusted.
    """
    folder = find_checkpoint(path)
    description = read_yaml(folder / "config.yaml")
    method = description.get("method")
    if method != "world_model":
        raise UserError(f"{str(folder)!r} holds the method {method!r}, expected 'world_model'")
    file = folder / "model.safetensors"
    model = WorldModel(*load_parts(description, file, trusted), SIGReg(), weight=0.0)
    load_weights(model, file)
    return model.eval(), description
