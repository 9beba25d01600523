"""A decoder of frozen latents: what a latent still shows of its picture. For looking only.

    loss = mean |decode(z) - pixels|^2

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
    """Draw a picture from a latent by transposed convolutions, from 4 x 4 cells on.

    Args:
        dim: Numbers of a latent, all its tokens together.
        frame_shape: `(hh, ww, c)` of the frames that were encoded.
        width: Channels of the largest map; every smaller one has twice as many, up to 128.

    Example:
        >>> import torch
        >>> decoder = Decoder(32, (64, 64, 3))
        >>> batch = {"latent": torch.zeros(8, 32), "pixels": torch.zeros(8, 64, 64, 3).byte()}
        >>> sorted(decoder(batch, step=0).terms), decoder.draw(batch["latent"]).shape
        (['squared_error'], (8, 64, 64, 3))
    """

    def __init__(self, dim: int, frame_shape: tuple[int, int, int], *, width: int = 16) -> None:
        super().__init__()
        rows, columns, channels = frame_shape
        scale = max(1.0, max(rows, columns) / SIDE)
        self.size = round(rows / scale), round(columns / scale)
        doublings = max(1, (max(self.size) - 1).bit_length() - 2)
        widths = [min(128, width * 2**left) for left in reversed(range(doublings))]
        self.first = nn.Linear(dim, widths[0] * 16)
        layers: list[nn.Module] = []
        for before, after in zip(widths, [*widths[1:], channels], strict=True):
            layers += [nn.GELU(), nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, batch: dict[str, Tensor], step: int) -> Output:
        """Return the loss of `latent (b d)` beside `pixels (b hh ww c)`, bytes."""
        drawn = self.decode(batch["latent"]).float()
        loss = F.mse_loss(drawn, self.small(batch["pixels"]))
        return Output(loss, {"squared_error": loss.detach()}, batch["latent"].float())

    def decode(self, z: Float[Tensor, "b d"]) -> Float[Tensor, "b c hh ww"]:
        """Return pictures, about 0 to 1, of at most `SIDE` pixels a side."""
        maps = rearrange(self.first(z), "b (d y x) -> b d y x", y=4, x=4)
        maps = self.layers(maps)
        if maps.shape[2:] != self.size:
            maps = F.interpolate(maps, self.size, mode="bilinear", align_corners=False)
        return maps

    def small(self, pixels: UInt8[Tensor, "b hh ww c"]) -> Float[Tensor, "b c hh ww"]:
        """Return frames as the decoder is to draw them."""
        images = rearrange(pixels, "b hh ww c -> b c hh ww").float() / 255
        return images if images.shape[2:] == self.size else F.adaptive_avg_pool2d(images, self.size)

    @torch.no_grad()
    def draw(self, z: Float[Tensor, "n d"]) -> UInt8[Tensor, "n hh ww c"]:
        """Return pictures as bytes, channels last."""
        parts = [self.decode(part).clamp(0, 1) for part in z.split(500)]
        return rearrange((torch.cat(parts) * 255).round().byte(), "n c hh ww -> n hh ww c")
