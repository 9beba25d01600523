"""I-JEPA: predict the tokens of hidden blocks from visible ones, with SIGReg or an EMA teacher.

    with SIGReg:  loss = |predict(z_context) - z*|^2 + weight * SIGReg(z_context)
                         + whole * ((1 - s) |q - q*|^2 + s * SIGReg(q))
    with teacher: loss = smooth-L1(predict(z_context) - normalise(z_teacher))

z* are the target tokens as the same encoder sees them together, without gradient unless
`stop_gradient` is off; targets and what SIGReg sees are centred at every position over the batch,
so that a token cannot score with what its position tells. q is a projection of the mean context
token, q* that of the mean target token: what is seen foretells what is hidden as a whole. Context
and targets may be two views of an image. An image is a clip of one frame: `methods.vjepa` builds
the same two classes for video.
(I-JEPA, arXiv 2301.08243; SIGReg, 2511.08544. docs/ijepa.md has what else was tried.)
"""

import copy
import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from jepa_world.config import part_from_dict
from jepa_world.data.augmentation import Augmentation, flip_together, random_numbers
from jepa_world.interfaces import Encoder, MaskedPredictor
from jepa_world.losses import DISTANCES, Distance
from jepa_world.masking import Grid, Masks, MultiBlockMasks
from jepa_world.methods.world_model import Output, follow
from jepa_world.nn import projection_head, sharing_weights, sum_over_processes, take_tokens
from jepa_world.registry import UserError
from jepa_world.sigreg import SIGReg

GROUP = 256  # targets that see each other: attention does not grow with the square of their number


class DrawMasks(Protocol):
    """Draws the masks of samples, and has the seed of all that is drawn for them."""

    @property
    def seed(self) -> int:
        """Return the seed."""
        ...

    def __call__(self, index: Int[Tensor, " b"], step: int) -> Masks:
        """Return the masks of the samples `index` of the data at a step."""
        ...

    def for_grid(self, grid: Grid) -> "DrawMasks":
        """Return the same kind of masks on another grid of tokens."""
        ...


@runtime_checkable
class OnGrid(Protocol):
    """What I-JEPA asks of an encoder beside its contract: tokens on a grid."""

    dim: int
    grid: Grid


@runtime_checkable
class ForClips(Protocol):
    """An encoder may also offer this: itself for clips of another shape, sharing all weights."""

    def for_clips(self, observation_shape: tuple[int, int, int, int]) -> nn.Module:
        """Return the encoder for clips `(t, c, hh, ww)`."""
        ...


@runtime_checkable
class ForGrid(Protocol):
    """A masked predictor may also offer this: itself for another grid, sharing all weights."""

    def for_grid(self, grid: Grid) -> nn.Module:
        """Return the predictor for a grid of tokens."""
        ...


Shape = tuple[int, int, int, int]


class IJEPA(nn.Module):
    """Encoder and masked predictor without a teacher.

    Args:
        encoder: Part built for single images, with tokens on a grid.
        predictor: Part that tells tokens from others.
        sigreg: The regulariser.
        masks: Draws what is seen and what is predicted.
        weight: Of SIGReg of tokens (without the factor N) against the prediction error.
        final_weight: Where this weight falls to, geometrically; as it is, if nothing is said.
        steps: Of training, over which it falls.
        whole: Of foretelling what is hidden as a whole, a LeJEPA loss of projected mean tokens; 0
            leaves it out.
        views: Makes the image that is seen and the one that is foretold; without, both are it.
        share: Of SIGReg (which includes the factor N) in the loss of the whole.
        shape: `(t, c, hh, ww)` of the clips that the parts are built for. Batches of other shapes
            are then allowed: the parts are taken for these, and share their weights.
        distance: Between tokens predicted and tokens to predict.
        stop_gradient: Whether targets are taken as given. Without, what is hidden learns to be
            foretold, too, and SIGReg alone keeps it apart (LeJEPA, LeWorldModel).

    Example:
        >>> import torch
        >>> from jepa_world.encoders.vit import ViTEncoder
        >>> from jepa_world.predictors.masked import MaskedTransformer
        >>> encoder = ViTEncoder((1, 3, 32, 32), patch=4, dim=64, depth=2, heads=2)
        >>> predictor = MaskedTransformer(64, encoder.grid, width=32, depth=1, heads=1)
        >>> masks = MultiBlockMasks(encoder.grid)
        >>> method = IJEPA(encoder, predictor, SIGReg(slices=64), masks, weight=3.0)
        >>> pixels = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
        >>> output = method({"pixels": pixels, "index": torch.arange(8)}, step=0)
        >>> sorted(output.terms)
        ['prediction', 'sigreg', 'whole', 'whole_sigreg']
    """

    def __init__(
        self,
        encoder: nn.Module,
        predictor: nn.Module,
        sigreg: SIGReg,
        masks: DrawMasks,
        *,
        weight: float,
        final_weight: float | None = None,
        steps: int = 1,
        whole: float = 1.0,
        views: Augmentation | None = None,
        share: float = 0.04,
        shape: Shape | None = None,
        distance: Distance = "l2",
        stop_gradient: bool = True,
    ) -> None:
        super().__init__()
        self.encoder: Encoder = encoder  # type: ignore[assignment]
        self.predictor: MaskedPredictor = predictor  # type: ignore[assignment]
        self.sigreg, self.masks, self.views = sigreg, masks, views
        self.shape = shape
        self.distance: Distance = distance
        self.stop_gradient = stop_gradient
        self.projector = projection_head(self.encoder.dim, 128, 64) if whole else None
        self.fall, self.steps = (1.0 if final_weight is None else final_weight / weight), steps
        self.weights = {"prediction": 1.0, "sigreg": weight}
        if whole:
            self.weights |= {"whole": whole * (1 - share), "whole_sigreg": whole * share}

    def forward(self, batch: dict[str, Tensor], step: int) -> Output:
        """Return the loss of images or clips, bytes, and their `index (b)` in the data.

        `pixels` are `(b hh ww c)` or `(b t hh ww c)`; of another shape than the encoder was built
        for if both parts can be had for it.
        """
        return fitted(self, batch["pixels"]).loss(batch, step)

    def loss(self, batch: dict[str, Tensor], step: int) -> Output:
        """Return the loss of clips of the shape that all parts are for."""
        seen, foretold, masks = _inputs(batch, self.masks, self.views, step)
        z = _full_precision(self.encoder(seen, keep=masks.context))
        targets, mean = self.targets(foretold, masks)
        predicted = _full_precision(self.predictor(z, *masks))
        tokens = centre_positions(z, masks.context, _length(self.encoder))
        terms = {
            "prediction": DISTANCES[self.distance](predicted, targets),
            "sigreg": sigreg_of_tokens(self.sigreg, tokens, step),
        }
        if self.projector is not None:
            q = _full_precision(self.projector(z.mean(1)))
            terms |= {"whole": (q - mean).square().mean(), "whole_sigreg": self.sigreg(q, step)}
        fallen = self.fall ** min(1.0, step / self.steps)
        weights = self.weights | {"sigreg": self.weights["sigreg"] * fallen}
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        latent = z.detach().mean(1)
        return Output(loss, {name: term.detach() for name, term in terms.items()}, latent)

    def targets(
        self, video: Float[Tensor, "b t c hh ww"], masks: Masks
    ) -> tuple[Float[Tensor, "b m d"], Tensor]:
        """Return the tokens to predict, all that the pass computes, and their projected mean."""
        groups = masks.target.chunk(-(-masks.target.shape[1] // GROUP), 1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.stop_gradient):
            parts = [self.encoder(video, keep=group) for group in groups]
            z = _full_precision(torch.cat(parts, 1))
            mean = z.mean(1) if self.projector is None else self.projector(z.mean(1))
            return centre_positions(z, masks.target, _length(self.encoder)), _full_precision(mean)


class TeacherIJEPA(nn.Module):
    """The published method, the yardstick: the target encoder is a moving average of the student.

    The targets are the layer-normed tokens of the teacher for the whole image, the distance is
    smooth-L1 (I-JEPA) or L1 (V-JEPA); all targets are predicted in one pass. `encoder` is the
    teacher, which is what the papers evaluate; `student` is what is trained.

    Args:
        encoder: Part built for single images, with tokens on a grid; copied for the student.
        predictor: Part that tells tokens from others.
        masks: Draws what is seen and what is predicted.
        momentum: Of the average at the first step; rises linearly to 1.
        steps: Of the whole training.
        views: Makes the student's image and the teacher's; without, both see the image itself.
        shape: `(t, c, hh, ww)` of the clips that the parts are built for. Batches of other shapes
            are then allowed: the parts are taken for these, and share their weights.
        distance: Between tokens predicted and tokens to predict.

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
        views: Augmentation | None = None,
        shape: Shape | None = None,
        distance: Distance = "smooth_l1",
    ) -> None:
        super().__init__()
        self.student: Encoder = copy.deepcopy(encoder)  # type: ignore[assignment]
        self.encoder: Encoder = encoder.requires_grad_(False)  # type: ignore[assignment]
        self.predictor: MaskedPredictor = predictor  # type: ignore[assignment]
        self.masks, self.momentum, self.steps, self.followed = masks, momentum, steps, -1
        self.views, self.shape = views, shape
        self.distance: Distance = distance

    def forward(self, batch: dict[str, Tensor], step: int) -> Output:
        """Return the loss of a batch as `IJEPA` has it; in training, first follow the student."""
        if self.training and step > 0 and self.followed != step - 1:  # once a step
            self.follow(step - 1)
        return fitted(self, batch["pixels"]).loss(batch, step)

    def loss(self, batch: dict[str, Tensor], step: int) -> Output:
        """Return the loss of clips of the shape that all parts are for."""
        seen, foretold, masks = _inputs(batch, self.masks, self.views, step)
        z = _full_precision(self.student(seen, keep=masks.context))
        predicted = _full_precision(self.predictor(z, *masks))
        prediction = DISTANCES[self.distance](predicted, self.targets(foretold, masks))
        return Output(prediction, {"prediction": prediction.detach()}, z.detach().mean(1))

    @torch.no_grad()
    def targets(self, video: Float[Tensor, "b t c hh ww"], masks: Masks) -> Float[Tensor, "b m d"]:
        """Return the teacher's layer-normed tokens to predict, of the whole image."""
        z = rearrange(self.encoder(video), "b t n d -> b (t n) d")
        z = take_tokens(_full_precision(z), masks.target)
        return F.layer_norm(z, z.shape[-1:])

    def follow(self, step: int) -> None:
        """Move the teacher towards the student, as after optimiser step `step`."""
        self.followed = step
        momentum = self.momentum + (1 - self.momentum) * min(1.0, step / self.steps)
        follow(self.get_submodule("encoder"), self.get_submodule("student"), momentum)


M = TypeVar("M", IJEPA, TeacherIJEPA)


def fitted(method: M, pixels: UInt8[Tensor, "b *t hh ww c"]) -> M:
    """Return the method for clips of this shape; it shares all weights.

    Raises:
        ValueError: the encoder, the predictor or the masks are for clips of one shape only.
    """
    frames = 1 if pixels.ndim == 4 else pixels.shape[1]
    rows, columns, channels = pixels.shape[-3:]
    shape = (frames, channels, rows, columns)
    if method.shape in (None, shape):
        return method
    other = sharing_weights(method)
    for name in ("encoder", "student"):
        if name in other._modules:
            other._modules[name] = _for_clips(method.get_submodule(name), shape)
    grid = cast(OnGrid, other.encoder).grid
    if not isinstance(method.predictor, ForGrid):
        raise ValueError(f"masked predictor has no `for_grid`, and clips of {shape} came")
    other._modules["predictor"] = method.predictor.for_grid(grid)
    other.masks, other.shape = method.masks.for_grid(grid), shape
    return other


def _for_clips(encoder: nn.Module, shape: Shape) -> nn.Module:
    if not isinstance(encoder, ForClips):
        raise ValueError(f"encoder has no `for_clips`, and clips of {shape} came")
    return encoder.for_clips(shape)


def centre_positions(
    z: Float[Tensor, "b k d"], index: Int[Tensor, "b k"], length: int
) -> Float[Tensor, "b k d"]:
    """Take from every token the mean of its position over the batch, of all processes together."""
    flat, tokens = index.flatten(), rearrange(z, "b k d -> (b k) d")
    total = sum_over_processes(z.new_zeros(length, z.shape[2]).index_add(0, flat, tokens))
    count = sum_over_processes(z.new_zeros(length).index_add(0, flat, z.new_ones(len(flat))))
    return z - (total / count.clamp(min=1).unsqueeze(1))[index]


def sigreg_of_tokens(
    regulariser: SIGReg, z: Float[Tensor, "b k d"], step: int
) -> Float[Tensor, ""]:
    """Return SIGReg of all tokens of a batch, without its factor N."""
    tokens = rearrange(z, "b k d -> (b k) d")
    return regulariser(tokens, step) / sum_over_processes(z.new_tensor(float(len(tokens))))


def build_ijepa(description: dict[str, Any]) -> IJEPA | TeacherIJEPA:
    """Build the method from the `config.yaml` of its checkpoint.

    Raises:
        UserError: a key is missing or does not fit, or a part cannot be built.
    """

    def masks(grid: Grid, seed: int) -> DrawMasks:
        context, target = (float(description["masks"][key]) for key in ("context", "target"))
        return MultiBlockMasks(grid, context=context, target=target, seed=seed)

    distance: Distance = "l2" if description.get("teacher") is None else "smooth_l1"
    return assemble(description, masks, "I-JEPA", distance)


def assemble(
    description: dict[str, Any],
    masks: Callable[[Grid, int], DrawMasks],
    name: str,
    distance: Distance,
    *,
    any_shape: bool = False,
) -> IJEPA | TeacherIJEPA:
    """Build a masked-prediction method from its description.

    Args:
        description: What the `config.yaml` of a checkpoint holds.
        masks: Makes what draws masks, from the grid of tokens and a seed.
        name: What errors call the method.
        distance: Between tokens predicted and tokens to predict.
        any_shape: Whether batches of other clips than described may come.

    Raises:
        UserError: a key is missing or does not fit, or a part cannot be built.
    """
    try:
        frames, channels, rows, columns = (int(n) for n in description["observation_shape"])
        part, predicts = (part_from_dict(description[k]) for k in ("encoder", "masked_predictor"))
        regular = description["sigreg"]
        slices, seed, weight = (regular[key] for key in ("slices", "seed", "weight"))
        final, fall_steps = regular.get("final_weight"), max(1, int(regular.get("steps", 1)))
        final = None if final is None else float(final)
        if final is not None and not 0 < final <= weight:
            raise ValueError(f"sigreg: final_weight {final} is not above 0, at most {weight}")
        smallest, colour = (float(description["views"][key]) for key in ("crop", "colour"))
        whole, teacher = float(description["whole"]), description["teacher"]
        stop_gradient = bool(description.get("stop_gradient", True))
        momentum, steps = (teacher["momentum"], teacher["steps"]) if teacher is not None else (0, 0)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"not the description of {name}: {error!r}") from error
    shape = (frames, channels, rows, columns)
    encoder = part.build("encoder", shape)
    if not (isinstance(encoder, nn.Module) and isinstance(encoder, OnGrid)):
        raise UserError(f"encoder {part.name!r} has no `grid` (t, rows, columns) of tokens")
    try:
        draw = masks(encoder.grid, seed)
    except ValueError as error:
        raise UserError(str(error)) from error
    except (KeyError, TypeError) as error:
        raise UserError(f"not the description of {name}: {error!r}") from error
    predictor = predicts.build("masked_predictor", encoder.dim, encoder.grid)
    changed = smallest < 1 or colour > 0
    views = Augmentation.of_strength((smallest, 1.0), colour) if changed else None
    built_for = shape if any_shape else None
    if teacher is not None:
        return TeacherIJEPA(
            *(encoder, predictor, draw),
            momentum=momentum,
            steps=steps,
            views=views,
            shape=built_for,
            distance=distance,
        )
    return IJEPA(
        *(encoder, predictor, SIGReg(slices=slices, seed=seed), draw),
        weight=weight,
        final_weight=final,
        steps=fall_steps,
        whole=whole,
        views=views,
        shape=built_for,
        distance=distance,
        stop_gradient=stop_gradient,
    )


def _inputs(
    batch: dict[str, Tensor], draw: DrawMasks, views: Augmentation | None, step: int
) -> tuple[Float[Tensor, "b t c hh ww"], Float[Tensor, "b t c hh ww"], Masks]:
    """Return what is seen and what is foretold, clips with values in [0, 1], and their masks.

    Two views are flipped together, or a token would be foretold at the mirrored place.
    """
    index = batch["index"].cpu()
    clips = clips_from_bytes(batch["pixels"])
    masks = Masks(*(kept.to(clips.device) for kept in draw(index, step)))
    if views is None:
        return clips, clips, masks
    numbers = flip_together(random_numbers(index, views=2, seed=draw.seed, step=step))
    seen, foretold = (views(clips, own) for own in numbers)
    return seen, foretold, masks


def clips_from_bytes(pixels: UInt8[Tensor, "b *t hh ww c"]) -> Float[Tensor, "b t c hh ww"]:
    """Return clips, or images as clips of one frame, as floats in [0, 1]."""
    clips = pixels.unsqueeze(1) if pixels.ndim == 4 else pixels
    return rearrange(clips, "b t hh ww c -> b t c hh ww").to(torch.get_default_dtype()) / 255


def _length(encoder: Encoder) -> int:
    """Return the number of tokens of a clip."""
    return math.prod(cast(OnGrid, encoder).grid)


def _full_precision(z: Tensor) -> Tensor:
    """Bring latents out of autocast's half precision."""
    return z.to(torch.get_default_dtype())
