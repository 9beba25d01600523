"""An action-conditioned JEPA world model trained end to end with SIGReg (LeWorldModel, 2603.19312).

    loss = mean |predict(z_t, a_t) - z_{t+1}|^2 + weight * SIGReg(z), z = encode(pixels)

No stop-gradient, no EMA teacher, no reconstruction: SIGReg per time step keeps the latents from
collapsing. The prediction term is open loop over the whole window, unless true latents are to be
given on the way: every predicted latent is fed back, so that errors which would build up while
planning are seen in training.

The alternatives, to compare with: VICReg's terms in the place of SIGReg, no regulariser at all, or
a teacher (`TeacherWorldModel`).
"""

import copy
import math
from collections.abc import Callable
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
    load_state,
    load_tensors,
    observation_shape,
)
from jepa_world.config import part_from_dict, read_yaml
from jepa_world.interfaces import Encoder, FastRollout, Predictor, PrefixRollout
from jepa_world.losses import DISTANCES, Distance
from jepa_world.objectives import TemporalDistance
from jepa_world.registry import UserError

Regularise = Callable[[Float[Tensor, "g n d"], int], Float[Tensor, ""]]
"""Keeps latents from collapsing: what `SIGReg` and `losses.VICReg` are; the int is the step."""


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
        regulariser: Of the latents of each time step over the batch, `SIGReg` or another; without,
            nothing but batch norm in the encoder, if it has any, hinders a collapse.
        weight: Of the regulariser (SIGReg includes the factor N) against the prediction error, at
            first: a large weight soon makes the latents hold the whole picture.
        change: Regularises what changes over a window as well, the last latent less the first: its
            standard deviation becomes this share of that between any two latents. What never
            changes in an episode, such as a wall, foretells itself; without this it may be all that
            latents hold. Not if not given.
        final_weight: Where the weight falls to, geometrically: a small one leaves them smooth, so
            that they can be predicted and distances mean something. Constant if not given.
        steps: Of training, over which the weight falls.
        open_loop: Steps predicted before the true latent is given again: 1 is teacher forcing, as
            in LeWorldModel. The whole window if not given.
        distance: Between latents predicted and latents that came.
        cost: What imagined latents cost, learned after the rest (`methods.temporal_distance`);
            agents minimise it in place of the distance between latents.
        policy: What to do on the way to a goal, learned with it: agents' searches begin there.

    Example:
        >>> import torch
        >>> from jepa_world.encoders.conv import ConvEncoder
        >>> from jepa_world.predictors.mlp import MLPPredictor
        >>> from jepa_world.sigreg import SIGReg
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
        regulariser: Regularise | None = None,
        *,
        weight: float = 1.0,
        change: float | None = None,
        final_weight: float | None = None,
        steps: int = 1,
        open_loop: int | None = None,
        distance: Distance = "l2",
        cost: TemporalDistance | None = None,
        policy: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder: Encoder = encoder  # type: ignore[assignment]
        self.predictor: Predictor = predictor  # type: ignore[assignment]
        self.cost, self.policy = cost, policy
        self.regulariser = regulariser
        self.weight = weight
        self.change = change
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
        terms = {"prediction": prediction.detach()}
        latent = rearrange(z.detach(), "b t n d -> (b t n) d")
        if self.regulariser is None:
            return Output(prediction, terms, latent)
        regular = self.regulariser(rearrange(z, "b t n d -> (t n) b d"), step)
        terms[type(self.regulariser).__name__.lower()] = regular.detach()
        if self.change is not None:
            change = (z[:, -1] - z[:, 0]) / (math.sqrt(2) * self.change)
            of_change = self.regulariser(rearrange(change, "b n d -> n b d"), step)
            terms["change"] = of_change.detach()
            regular = regular + of_change
        done = min(1.0, step / self.steps)
        weight = self.weight ** (1 - done) * self.final_weight**done
        return Output(prediction + weight * regular, terms, latent)

    def predict(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b t a"]
    ) -> Float[Tensor, "b t-1 n d"]:
        """Predict all latents but the first, from the true ones of every `open_loop`-th step."""
        stretches = [
            self.rollout(z[:, : start + 1], action[:, :end])
            for start, end in stretches_of(z.shape[1], self.open_loop)
        ]
        return torch.cat(stretches, 1)

    def encode(self, pixels: UInt8[Tensor, "b t hh ww c"]) -> Float[Tensor, "b t n d"]:
        """Encode byte frames, channels last as environments and datasets hold them."""
        return self.encoder(as_video(pixels))

    def rollout(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b u a"]
    ) -> Float[Tensor, "b h n d"]:
        """Predict the h = u - t + 1 latents after `z`, in the way that the predictor offers.

        Actions 0..t-1 belong to the steps of `z`, the rest to the steps that are predicted.
        """
        return roll_out(self.predictor, z, action)

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


class TeacherWorldModel(nn.Module):
    """The yardstick: targets come from a moving average of the encoder, and nothing regularises.

        loss = mean |predict(z_t, a_t) - z*_{t+1}|^2,   z = student(pixels), z* = encode(pixels)

    No gradient enters z*. It is the teacher of V-JEPA 2 (arXiv 2506.09985, section 2.1: a fixed
    momentum), its latents as they are, so that predictions can be fed back. Only the frames that
    the predictor is given are encoded with a gradient. `encoder` is the teacher, and plans;
    `student` is what is trained. The names of the other weights are a `WorldModel`'s.

    Args:
        encoder: Part that maps video to latents; copied for the student.
        predictor: Part that maps latents and actions to the next latents.
        momentum: Of the average. V-JEPA 2's is .99925, for a hundred times the steps that
            `configs/world_reach.yaml` has.
        open_loop: As in `WorldModel`.
        distance: As in `WorldModel`.

    Example:
        >>> import torch
        >>> from jepa_world.encoders.conv import ConvEncoder
        >>> from jepa_world.predictors.mlp import MLPPredictor
        >>> model = TeacherWorldModel(ConvEncoder((1, 3, 64, 64)), MLPPredictor(32, 2))
        >>> pixels = torch.randint(0, 256, (8, 4, 64, 64, 3), dtype=torch.uint8)
        >>> output = model({"pixels": pixels, "action": torch.zeros(8, 4, 2)}, step=0)
        >>> sorted(output.terms)
        ['prediction']
    """

    def __init__(
        self,
        encoder: nn.Module,
        predictor: nn.Module,
        *,
        momentum: float = 0.99,
        open_loop: int | None = None,
        distance: Distance = "l2",
    ) -> None:
        super().__init__()
        self.student: Encoder = copy.deepcopy(encoder)  # type: ignore[assignment]
        self.encoder: Encoder = encoder.requires_grad_(False)  # type: ignore[assignment]
        self.predictor: Predictor = predictor  # type: ignore[assignment]
        self.momentum, self.followed = momentum, -1
        self.open_loop = open_loop
        self.distance: Distance = distance

    def forward(self, batch: dict[str, Tensor], step: int) -> Output:
        """Return the loss of windows as `WorldModel` has it; in training, first follow the student.

        The teacher follows step k at the beginning of step k + 1: a checkpoint between them, and a
        batch in parts, change nothing.
        """
        if self.training and step > 0 and self.followed != step - 1:
            self.followed = step - 1
            follow(self.get_submodule("encoder"), self.get_submodule("student"), self.momentum)
        whole = torch.get_default_dtype()  # out of autocast's half precision
        video, action = as_video(batch["pixels"]), batch["action"]
        stretches = stretches_of(video.shape[1], self.open_loop)
        given = self.student(video[:, : stretches[-1][0] + 1]).to(whole)
        ahead = [
            roll_out(self.predictor, given[:, : start + 1], action[:, :end])
            for start, end in stretches
        ]
        with torch.no_grad():
            z = self.encoder(video).to(whole)
        prediction = DISTANCES[self.distance](torch.cat(ahead, 1).to(whole), z[:, 1:])
        latent = rearrange(z, "b t n d -> (b t n) d")
        return Output(prediction, {"prediction": prediction.detach()}, latent)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the parameters of a teacher towards those of its student; 1 leaves them."""
    for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
        slow.lerp_(fast, 1 - momentum)


def stretches_of(frames: int, open_loop: int | None) -> list[tuple[int, int]]:
    """Return where a window's predictions begin anew from true latents, and where they end."""
    last = frames - 1
    stretch = open_loop or last
    return [(start, min(start + stretch, last)) for start in range(0, last, stretch)]


def as_video(pixels: UInt8[Tensor, "b t hh ww c"]) -> Float[Tensor, "b t c hh ww"]:
    """Return byte frames, channels last, as encoders have them."""
    return rearrange(pixels, "b t hh ww c -> b t c hh ww").to(torch.get_default_dtype()) / 255


def roll_out(
    predictor: Predictor, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b u a"]
) -> Float[Tensor, "b h n d"]:
    """Predict the h = u - t + 1 latents after `z`, in the way that the predictor offers."""
    if isinstance(predictor, PrefixRollout):
        return predictor.rollout_prefixes(z, action[:, None])[:, 0]
    if isinstance(predictor, FastRollout):
        return predictor.rollout(z, action)
    return rollout(predictor, z, action)


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


def build_learned(
    description: dict[str, Any], encoder: Any, file: Path, trusted: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Build the cost and the policy that a checkpoint's `config.yaml` describes, if it does.

    Raises:
        UserError: one cannot be built, or is not trusted.
    """
    latent = (encoder.dim, encoder.num_tokens)
    facts = {"cost": latent, "policy": (*latent, description["action_dim"])}
    return {
        kind: build_part(description, kind, *known, file=file, trusted=trusted)
        for kind, known in facts.items()
        if kind in description
    }


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
    encoder, predictor = load_parts(description, file, trusted)
    learned = build_learned(description, encoder, file, trusted)
    model = WorldModel(encoder, predictor, **learned)
    tensors, _ = load_tensors(file)
    beside = {"student": description.get("regulariser") == "ema", "target": "cost" in description}
    tensors = {key: x for key, x in tensors.items() if not beside.get(key.partition(".")[0])}
    load_state(model, tensors, str(file))
    return model.eval(), description
