"""A decoder of frozen latents: what a latent still shows of its picture. For looking only.

    loss = mean |mean picture + decode(z) - pixels|^2

Nothing of a world model is trained by it, and no command acts on what it draws.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from jepa_world.methods.world_model import Output

SIDE = 64  # pixels; larger pictures are drawn this small


class Decoder(nn.Module):
    """Draw a picture from a latent: a hidden layer, then transposed convolutions from 4 x 4 on.

    Args:
        dim: Numbers of a latent, all its tokens together.
        mean: The mean of the pictures, which `small` gives: only what differs is learned.
        hidden: Width of the hidden layer.
        width: Channels of the largest map; every smaller one has twice as many, up to 128.

    Example:
        >>> import torch
        >>> pixels = torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
        >>> decoder = Decoder(32, small(pixels).mean(0))
        >>> batch = {"latent": torch.zeros(8, 32), "pixels": pixels}
        >>> sorted(decoder(batch, step=0).terms), decoder.draw(batch["latent"]).shape
        (['squared_error'], torch.Size([8, 64, 64, 3]))
    """

    mean: Tensor

    def __init__(
        self, dim: int, mean: Float[Tensor, "c hh ww"], *, hidden: int = 512, width: int = 16
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        channels, *sides = mean.shape
        doublings = max(1, (max(sides) - 1).bit_length() - 2)
        widths = [min(128, width * 2**left) for left in reversed(range(doublings))]
        self.first = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, 16 * widths[0])
        )
        layers: list[nn.Module] = []
        for before, after in zip(widths, [*widths[1:], channels], strict=True):
            layers += [nn.GELU(), nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, batch: dict[str, Tensor], step: int) -> Output:
        """Return the loss of `latent (b d)` beside `pixels (b hh ww c)`, bytes."""
        loss = F.mse_loss(self.decode(batch["latent"]).float(), small(batch["pixels"]))
        return Output(loss, {"squared_error": loss.detach()}, batch["latent"].float())

    def decode(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b c hh ww"]:
        """Return pictures, about 0 to 1."""
        maps = self.layers(rearrange(self.first(z), "b (d y x) -> b d y x", y=4, x=4))
        if maps.shape[1:] != self.mean.shape:  # sides that are no power of two
            maps = F.interpolate(maps, self.mean.shape[1:], mode="bilinear")
        return self.mean + maps

    @torch.no_grad()
    def draw(self, z: Float[Tensor, "n d"]) -> UInt8[Tensor, "n hh ww c"]:
        """Return pictures as bytes, channels last."""
        parts = [self.decode(part).clamp(0, 1) for part in z.split(500)]
        return rearrange((torch.cat(parts) * 255).round().byte(), "n c hh ww -> n hh ww c")


def small(pixels: UInt8[Tensor, "b hh ww c"]) -> Float[Tensor, "b c hh ww"]:
    """Return frames as a decoder is to draw them: 0 to 1, at most `SIDE` pixels a side."""
    images = rearrange(pixels, "b hh ww c -> b c hh ww").float() / 255
    rows, columns = images.shape[2:]
    scale = max(rows, columns) / SIDE
    if scale <= 1:
        return images
    return F.adaptive_avg_pool2d(images, (round(rows / scale), round(columns / scale)))
