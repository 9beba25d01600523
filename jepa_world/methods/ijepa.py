"""I-JEPA: predict the tokens of hidden blocks from visible ones, with SIGReg or an EMA teacher.

    with SIGReg:  loss = |predict(z_context) - z*|^2 + weight * SIGReg(z_context)
    with teacher: loss = smooth-L1(predict(z_context) - normalise(z_teacher))

z* are tokens of the same encoder where it sees context and target together, without gradient;
targets and what SIGReg sees are centred at every position over the batch, so that a token cannot
score with what its position tells. SIGReg compares tokens of different images only: see
`sigreg_between_images`.
(I-JEPA, arXiv 2301.08243; SIGReg, 2511.08544. docs/ijepa.md has what else was tried.)
"""

import copy
from collections.abc import Callable
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from jepa_world.config import part_from_dict
from jepa_world.interfaces import Encoder, MaskedPredictor
from jepa_world.masking import Grid, Masks, MultiBlockMasks
from jepa_world.methods.world_model import Output
from jepa_world.nn import sum_over_processes, take_tokens
from jepa_world.registry import UserError
from jepa_world.sigreg import SIGReg, sigreg

DrawMasks = Callable[[Int[Tensor, " b"], int], Masks]
"""Return the masks of the samples `index` at a step."""


@runtime_checkable
class OnGrid(Protocol):
    """What I-JEPA asks of an encoder beside its contract: tokens on a grid."""

    dim: int
    grid: Grid


class IJEPA(nn.Module):
    """Encoder and masked predictor without a teacher.

    Args:
        encoder: Part built for single images, with tokens on a grid.
        predictor: Part that tells tokens from others.
        sigreg: The regulariser.
        masks: Draws what is seen and what is predicted.
        weight: Of SIGReg (without the factor N) against the prediction error.

    Example:
        >>> import torch
        >>> from jepa_world.encoders.vit import ViTEncoder
        >>> from jepa_world.predictors.masked import MaskedTransformer
        >>> encoder = ViTEncoder((1, 3, 32, 32), patch=4, dim=64, depth=2, heads=2)
        >>> predictor = MaskedTransformer(64, encoder.grid, width=32, depth=1, heads=1)
        >>> masks = MultiBlockMasks(encoder.grid)
        >>> method = IJEPA(encoder, predictor, SIGReg(slices=64), masks, weight=10.0)
        >>> pixels = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
        >>> output = method({"pixels": pixels, "index": torch.arange(8)}, step=0)
        >>> sorted(output.terms)
        ['prediction', 'sigreg']
    """

    def __init__(
        self,
        encoder: nn.Module,
        predictor: nn.Module,
        sigreg: SIGReg,
        masks: DrawMasks,
        *,
        weight: float,
    ) -> None:
        super().__init__()
        self.encoder: Encoder = encoder  # type: ignore[assignment]
        self.predictor: MaskedPredictor = predictor  # type: ignore[assignment]
        self.sigreg, self.masks, self.weight = sigreg, masks, weight

    def forward(self, batch: dict[str, Tensor], step: int) -> Output:
        """Return the loss of images: `pixels (b hh ww c)` bytes, `index (b)` in the data."""
        video, masks = _inputs(batch, self.masks, step)
        z = _whole(self.encoder(video, keep=masks.context))
        predicted = _whole(self.predictor(z, *masks))
        prediction = (predicted - self.targets(video, masks)).square().mean()
        tokens = centre_positions(z, masks.context, self.encoder.num_tokens)
        regulariser = sigreg_between_images(self.sigreg, tokens, step)
        terms = {"prediction": prediction.detach(), "sigreg": regulariser.detach()}
        return Output(prediction + self.weight * regulariser, terms, z.detach().mean(1))

    @torch.no_grad()
    def targets(self, video: Float[Tensor, "b 1 c hh ww"], masks: Masks) -> Float[Tensor, "b m d"]:
        """Return the tokens to predict; the pass computes the tokens of the two masks only."""
        keep = torch.cat([masks.target, masks.context], 1)
        z = _whole(self.encoder(video, keep=keep))[:, : masks.target.shape[1]]
        return centre_positions(z, masks.target, self.encoder.num_tokens)


class TeacherIJEPA(nn.Module):
    """The published method, the yardstick: the target encoder is a moving average of the student.

    The targets are the layer-normed tokens of the teacher for the whole image, the distance is
    smooth-L1; all targets are predicted in one pass, as in V-JEPA. `encoder` is the teacher, which
    is what the papers evaluate; `student` is what is trained.

    Args:
        encoder: Part built for single images, with tokens on a grid; copied for the student.
        predictor: Part that tells tokens from others.
        masks: Draws what is seen and what is predicted.
        momentum: Of the average at the first step; rises linearly to 1.
        steps: Of the whole training.

    Example:
        >>> import torch
        >>> from jepa_world.encoders.vit import ViTEncoder
        >>> from jepa_world.predictors.masked import MaskedTransformer
        >>> encoder = ViTEncoder((1, 3, 32, 32), patch=4, dim=64, depth=2, heads=2)
        >>> predictor = MaskedTransformer(64, encoder.grid, width=32, depth=1, heads=1)
        >>> method = TeacherIJEPA(encoder, predictor, MultiBlockMasks(encoder.grid))
        >>> pixels = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
        >>> output = method({"pixels": pixels, "index": torch.arange(8)}, step=0)
        >>> sorted(output.terms)
        ['prediction']
    """

    def __init__(
        self,
        encoder: nn.Module,
        predictor: nn.Module,
        masks: DrawMasks,
        *,
        momentum: float = 0.996,
        steps: int = 1000,
    ) -> None:
        super().__init__()
        self.student: Encoder = copy.deepcopy(encoder)  # type: ignore[assignment]
        self.encoder: Encoder = encoder.requires_grad_(False)  # type: ignore[assignment]
        self.predictor: MaskedPredictor = predictor  # type: ignore[assignment]
        self.masks, self.momentum, self.steps = masks, momentum, steps

    def forward(self, batch: dict[str, Tensor], step: int) -> Output:
        """Return the loss of images; in training mode, first follow the student's last step."""
        if self.training and step > 0:
            self.follow(step - 1)
        video, masks = _inputs(batch, self.masks, step)
        z = _whole(self.student(video, keep=masks.context))
        predicted = _whole(self.predictor(z, *masks))
        prediction = F.smooth_l1_loss(predicted, self.targets(video, masks))
        return Output(prediction, {"prediction": prediction.detach()}, z.detach().mean(1))

    @torch.no_grad()
    def targets(self, video: Float[Tensor, "b 1 c hh ww"], masks: Masks) -> Float[Tensor, "b m d"]:
        """Return the teacher's layer-normed tokens to predict, of the whole image."""
        z = take_tokens(_whole(self.encoder(video)[:, 0]), masks.target)
        return F.layer_norm(z, z.shape[-1:])

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move the teacher towards the student, as after optimiser step `step`."""
        momentum = self.momentum + (1 - self.momentum) * min(1.0, step / self.steps)
        teacher, student = (cast(nn.Module, part) for part in (self.encoder, self.student))
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.lerp_(fast, 1 - momentum)


def centre_positions(
    z: Float[Tensor, "b k d"], index: Int[Tensor, "b k"], length: int
) -> Float[Tensor, "b k d"]:
    """Take from every token the mean of its position over the batch, of all processes together."""
    flat, tokens = index.flatten(), rearrange(z, "b k d -> (b k) d")
    total = sum_over_processes(z.new_zeros(length, z.shape[2]).index_add(0, flat, tokens))
    count = sum_over_processes(z.new_zeros(length).index_add(0, flat, z.new_ones(len(flat))))
    return z - (total / count.clamp(min=1).unsqueeze(1))[index]


def sigreg_between_images(
    regulariser: SIGReg, z: Float[Tensor, "b k d"], step: int
) -> Float[Tensor, ""]:
    """Return SIGReg, without its factor N, over pairs of tokens of different images.

    The statistic is a mean over pairs of samples. Tokens of one image should be alike where they
    show one thing, but the pairs of an image push them apart: a Gaussian has no clusters. Let A be
    the statistic of all tokens and G the mean of those of each image; with b images of the same
    number of tokens, the pairs between images have the mean (b A - G) / (b - 1), exactly. For
    independent Gaussian tokens it is 0 on average, and can be negative.
    """
    images, tokens = z.shape[:2]
    directions = regulariser.draw(z.shape[2], regulariser.slices, seed=regulariser.seed, step=step)
    rule = {"knots": regulariser.knots, "t_max": regulariser.t_max}
    b = sum_over_processes(z.new_tensor(float(images)))
    all_pairs = sigreg(rearrange(z, "b k d -> (b k) d"), directions, **rule) / (b * tokens)
    own_pairs = sigreg(z, directions, **rule, across_processes=False) / tokens
    return (b * all_pairs - own_pairs) / (b - 1)


def build_ijepa(description: dict[str, Any]) -> IJEPA | TeacherIJEPA:
    """Build the method from the `config.yaml` of its checkpoint.

    Raises:
        UserError: a key is missing or does not fit, or a part cannot be built.
    """
    try:
        shape = tuple(int(size) for size in description["observation_shape"])
        parts = {
            kind: part_from_dict(description[kind]) for kind in ("encoder", "masked_predictor")
        }
        context, target = (float(description["masks"][key]) for key in ("context", "target"))
        slices, seed, weight = (description["sigreg"][key] for key in ("slices", "seed", "weight"))
        teacher = description["teacher"]
        momentum, steps = (teacher["momentum"], teacher["steps"]) if teacher is not None else (0, 0)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"not the description of I-JEPA: {error!r}") from error
    encoder = parts["encoder"].build("encoder", shape)
    if not (isinstance(encoder, nn.Module) and isinstance(encoder, OnGrid)):
        name = parts["encoder"].name
        raise UserError(f"encoder {name!r} has no `grid` (t, rows, columns) of tokens")
    try:
        masks = MultiBlockMasks(encoder.grid, context=context, target=target, seed=seed)
    except ValueError as error:
        raise UserError(str(error)) from error
    predictor = parts["masked_predictor"].build("masked_predictor", encoder.dim, encoder.grid)
    if teacher is not None:
        return TeacherIJEPA(encoder, predictor, masks, momentum=momentum, steps=steps)
    return IJEPA(encoder, predictor, SIGReg(slices=slices, seed=seed), masks, weight=weight)


def _inputs(
    batch: dict[str, Tensor], draw: DrawMasks, step: int
) -> tuple[Float[Tensor, "b 1 c hh ww"], Masks]:
    """Return bytes, channels last, as clips of one frame in [0, 1], and their masks."""
    pixels: UInt8[Tensor, "b hh ww c"] = batch["pixels"]
    video = rearrange(pixels, "b hh ww c -> b 1 c hh ww").to(torch.get_default_dtype()) / 255
    masks = draw(batch["index"].cpu(), step)
    return video, Masks(*(index.to(pixels.device) for index in masks))


def _whole(z: Tensor) -> Tensor:
    """Bring latents out of autocast's half precision."""
    return z.to(torch.get_default_dtype())
