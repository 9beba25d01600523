"""LeJEPA: views of an image agree, features are Gaussian; no teacher (arXiv 2511.08544, section 5).

    loss = (1 - weight) * mean_v |mean of the global views - z_v|^2 + weight * mean_v SIGReg(z_v)

z_v is the projection of view v. Without stop-gradient, EMA or predictor, SIGReg alone keeps the
projections from collapsing. The projector is thrown away afterwards: probes read the encoder.
"""

from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from jepa_world.config import part_from_dict
from jepa_world.data.augmentation import Augmentation, random_numbers
from jepa_world.interfaces import Encoder
from jepa_world.methods.world_model import Output
from jepa_world.nn import projection_head
from jepa_world.registry import UserError
from jepa_world.sigreg import SIGReg


class LeJEPA(nn.Module):
    """Encoder and projector with their common loss.

    Args:
        encoder: Part built for single images; its tokens are averaged.
        projection: Width of the projections that are compared and tested.
        hidden: Width of the projector's two hidden layers.
        sigreg: The regulariser.
        weight: Of SIGReg (which includes the factor N) against the invariance, in [0, 1].
        global_views: Makes large crops, and how many of them.
        local_views: Makes small crops, and how many of them.
        seed: Of the views.

    Example:
        >>> import torch
        >>> from jepa_world.encoders.conv import ConvEncoder
        >>> method = LeJEPA(
        ...     ConvEncoder((1, 3, 32, 32)),
        ...     SIGReg(slices=64),
        ...     weight=0.05,
        ...     global_views=(Augmentation(scale=(0.3, 1.0)), 2),
        ...     local_views=(Augmentation(scale=(0.1, 0.3)), 2),
        ... )
        >>> pixels = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
        >>> output = method({"pixels": pixels, "index": torch.arange(8)}, step=0)
        >>> sorted(output.terms)
        ['invariance', 'sigreg']
    """

    def __init__(
        self,
        encoder: nn.Module,
        sigreg: SIGReg,
        *,
        weight: float,
        global_views: tuple[Augmentation, int],
        local_views: tuple[Augmentation, int],
        projection: int = 64,
        hidden: int = 512,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.encoder: Encoder = encoder  # type: ignore[assignment]
        self.projector = projection_head(self.encoder.dim, hidden, projection)
        self.sigreg, self.weight, self.seed = sigreg, weight, seed
        self.global_views, self.local_views = global_views, local_views

    def forward(self, batch: dict[str, Tensor], step: int) -> Output:
        """Return the loss of images: `pixels (b hh ww c)` bytes, `index (b)` in the data."""
        views = self.views(batch["pixels"], batch["index"], step)
        z = self.projector(self.encode(rearrange(views, "v b c hh ww -> (v b) c hh ww")))
        z = rearrange(z, "(v b) k -> v b k", v=len(views)).to(torch.get_default_dtype())
        centre = z[: self.global_views[1]].mean(0)
        invariance = (centre - z).square().mean()
        regulariser = self.sigreg(z, step)
        terms = {"invariance": invariance.detach(), "sigreg": regulariser.detach()}
        loss = (1 - self.weight) * invariance + self.weight * regulariser
        return Output(loss, terms, z[0].detach())

    def views(
        self, pixels: UInt8[Tensor, "b hh ww c"], index: Int[Tensor, " b"], step: int
    ) -> Float[Tensor, "v b c hh ww"]:
        """Return the views of a step, global ones first."""
        images = images_from_bytes(pixels)
        makers = [
            maker for maker, count in (self.global_views, self.local_views) for _ in range(count)
        ]
        numbers = random_numbers(index, views=len(makers), seed=self.seed, step=step)
        return torch.stack([maker(images, own) for maker, own in zip(makers, numbers, strict=True)])

    def encode(self, images: Float[Tensor, "b c hh ww"]) -> Float[Tensor, "b d"]:
        """Return the feature of every image: the mean of its tokens."""
        return reduce(self.encoder(images.unsqueeze(1)), "b t n d -> b d", "mean")


def images_from_bytes(pixels: UInt8[Tensor, "b hh ww c"]) -> Float[Tensor, "b c hh ww"]:
    """Return bytes, channels last, as floats in [0, 1]."""
    return rearrange(pixels, "b hh ww c -> b c hh ww").to(torch.get_default_dtype()) / 255


def build_lejepa(description: dict[str, Any]) -> LeJEPA:
    """Build the method from the `config.yaml` of its checkpoint.

    Raises:
        UserError: a key is missing or does not fit, or the encoder cannot be built.
    """
    try:
        shape = tuple(int(size) for size in description["observation_shape"])
        part, sigreg = part_from_dict(description["encoder"]), dict(description["sigreg"])
        (global_count, local_count), strength = description["views"], description["colour"]
        smallest, middle, largest = description["crops"]
        regulariser = SIGReg(slices=sigreg["slices"], seed=sigreg["seed"])
        projection = int(description["projection"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"not the description of LeJEPA: {error!r}") from error
    return LeJEPA(
        part.build("encoder", shape),
        regulariser,
        weight=sigreg["weight"],
        global_views=(Augmentation.of_strength((middle, largest), strength), global_count),
        local_views=(Augmentation.of_strength((smallest, middle), strength), local_count),
        projection=projection,
        seed=sigreg["seed"],
    )
