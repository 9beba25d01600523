"""Random views of images as batched tensor code: crop, flip, blur, colour, solarise.

Cropping, resizing, flipping and blurring are linear and act on rows and columns apart, so a view is
two small matrix products, R X C^T, with one R and one C for every image; the resizing kernel widens
with the crop, so nothing aliases. Saturation, hue and greyness are one 3 x 3 colour matrix.

Every random number is a function of (seed, step, sample): a view depends neither on the batch
around it nor on the number of processes.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

NUMBERS = 14  # random numbers a view is made of
_TO_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


@dataclass(frozen=True)
class Augmentation:
    """Random views of a batch of images.

    The defaults crop and flip only. `Augmentation.of_strength` has the colour operations of DINO
    (https://arxiv.org/abs/2104.14294, after BYOL, https://arxiv.org/abs/2006.07733, table 6).

    Args:
        scale: Least and largest share of the image's area that a crop keeps.
        aspect: Least and largest ratio of a crop's width to its height, where it fits.
        flip: Probability of a horizontal flip.
        jitter: Largest relative change of brightness and contrast; half of it of saturation, a
            quarter of it as a turn of the hue. Eight views in ten are changed.
        grey: Probability of losing colour.
        blur: Probability of a Gaussian blur, of up to a 64th of the side.
        solarise: Probability of inverting what is brighter than 1/2.

    Example:
        >>> import torch
        >>> images, index = torch.rand(8, 3, 32, 32), torch.arange(8)
        >>> numbers = random_numbers(index, views=2, seed=0, step=0)
        >>> Augmentation(scale=(0.3, 1.0), jitter=0.4)(images, numbers[0]).shape
        torch.Size([8, 3, 32, 32])
    """

    scale: tuple[float, float] = (0.3, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.0
    grey: float = 0.0
    blur: float = 0.0
    solarise: float = 0.0

    @classmethod
    def of_strength(cls, scale: tuple[float, float], strength: float) -> "Augmentation":
        """Return crops and flips with the published colour operations times `strength`."""
        s = strength
        return cls(scale=scale, jitter=0.4 * s, grey=0.2 * s, blur=0.5 * s, solarise=0.2 * s)

    def __call__(
        self, images: Float[Tensor, "b *t c hh ww"], numbers: Float[Tensor, "b k"]
    ) -> Float[Tensor, "b *t c hh ww"]:
        """Return one view of every image or clip, values in [0, 1], made from its uniform numbers.

        All frames of a clip are cut and coloured alike: what moved moves as before.
        """
        u = dict(zip(_NAMES, numbers.to(images).unbind(1), strict=True))
        clips = images.unsqueeze(1) if images.ndim == 4 else images
        rows, columns = self._resampling(u, *images.shape[-2:])
        x = rows[:, None, None] @ clips @ columns[:, None, None].mT
        if self.jitter or self.grey:
            below = self._recolour(rearrange(x, "b t c hh ww -> b c (t hh) ww"), u)
            x = rearrange(below, "b c (t hh) ww -> b t c hh ww", t=clips.shape[1])
        if self.solarise:
            chosen = (u["solarise"] < self.solarise).view(-1, 1, 1, 1, 1)
            x = torch.where(chosen & (x > 0.5), 1 - x, x)
        return x.reshape(images.shape)

    def _resampling(
        self, u: dict[str, Tensor], height: int, width: int
    ) -> tuple[Float[Tensor, "b hh hh"], Float[Tensor, "b ww ww"]]:
        """Return the row and the column matrix of crop, resize, flip and blur."""
        area = _between(u["area"], *self.scale) * height * width
        ratio = _between(u["aspect"], *map(math.log, self.aspect)).exp()
        crop_width = (area * ratio).sqrt().clamp(max=width)
        crop_height = (area / ratio).sqrt().clamp(max=height)
        top = u["top"] * (height - crop_height)
        left = u["left"] * (width - crop_width)
        rows = _resize(top, crop_height, height)
        columns = _resize(left, crop_width, width)
        flipped = (u["flip"] < self.flip).view(-1, 1, 1)
        columns = torch.where(flipped, columns.flip(1), columns)
        if not self.blur:
            return rows, columns
        sigma = _between(u["sigma"], 0.0, 1 / 64) * (u["blur"] < self.blur)
        return _blur(sigma, height) @ rows, _blur(sigma, width) @ columns

    def _recolour(self, x: Tensor, u: dict[str, Tensor]) -> Tensor:
        """Change brightness and contrast of any image, saturation and hue of one with colours."""
        amount = self.jitter * (u["jitter"] < 0.8)
        x = x * (1 + amount * (2 * u["brightness"] - 1)).view(-1, 1, 1, 1)
        if x.shape[1] == 3:
            saturation = 1 + amount / 2 * (2 * u["saturation"] - 1)
            saturation = saturation * (u["grey"] >= self.grey)
            turn = 2 * math.pi * amount / 4 * (2 * u["hue"] - 1)
            x = einsum(_colour_matrix(saturation, turn), x, "b k c, b c hh ww -> b k hh ww")
        mean = x.mean((1, 2, 3), keepdim=True)
        contrast = (1 + amount * (2 * u["contrast"] - 1)).view(-1, 1, 1, 1)
        return (mean + contrast * (x - mean)).clamp(0, 1)


_NAMES = (
    *("area", "aspect", "top", "left", "flip", "sigma", "blur"),
    *("jitter", "brightness", "contrast", "saturation", "hue", "grey", "solarise"),
)


def random_numbers(
    index: Int[Tensor, " b"], *, views: int, seed: int, step: int
) -> Float[Tensor, "v b k"]:
    """Draw the uniform numbers of `views` views of the samples `index`, on the CPU in float32.

    A sample's numbers are a function of (seed, step, its index in the data) alone.
    """
    drawn = [
        np.random.default_rng((seed, step, sample)).random((views, NUMBERS), np.float32)
        for sample in index.tolist()
    ]
    return torch.from_numpy(np.stack(drawn, 1))


def flip_together(numbers: Float[Tensor, "v b k"]) -> Float[Tensor, "v b k"]:
    """Give all views of a sample the flip of the first: left stays left between them."""
    flip, shared = _NAMES.index("flip"), numbers.clone()
    shared[..., flip] = numbers[0, :, flip]
    return shared


def _between(u: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * u


def _resize(start: Float[Tensor, " b"], length: Float[Tensor, " b"], size: int) -> Tensor:
    """Return matrices (b size size) that stretch [start, start + length) of a line to all of it.

    Triangle kernel, as wide as an output pixel or an input pixel, whichever is more; the weights of
    an output pixel add up to 1.
    """
    pixel = torch.arange(size, device=start.device, dtype=start.dtype) + 0.5
    step = (length / size).view(-1, 1, 1)
    centre = start.view(-1, 1, 1) + step * pixel.view(-1, 1)
    weight = (1 - (pixel - centre).abs() / step.clamp(min=1)).clamp(min=0)
    return weight / weight.sum(-1, keepdim=True)


def _blur(sigma: Float[Tensor, " b"], size: int) -> Tensor:
    """Return matrices (b size size) of a Gaussian blur; `sigma` is a share of the side."""
    pixel = torch.arange(size, device=sigma.device, dtype=sigma.dtype)
    distance = (pixel - pixel.view(-1, 1)) / (sigma * size).clamp(min=1e-3).view(-1, 1, 1)
    weight = torch.exp(-distance.square() / 2)
    return weight / weight.sum(-1, keepdim=True)


def _colour_matrix(saturation: Float[Tensor, " b"], turn: Float[Tensor, " b"]) -> Tensor:
    """Return matrices (b 3 3) on RGB that scale and rotate the chrominance plane of YIQ."""
    to_yiq = torch.tensor(_TO_YIQ, device=turn.device, dtype=turn.dtype)
    cos, sin = saturation * turn.cos(), saturation * turn.sin()
    zero, one = torch.zeros_like(turn), torch.ones_like(turn)
    entries = [one, zero, zero, zero, cos, -sin, zero, sin, cos]
    turned = torch.stack(entries, -1).view(-1, 3, 3)
    return torch.linalg.inv(to_yiq) @ turned @ to_yiq
