"""A small residual network for images of 28 to 96 pixels: tokens are the places of its last map.

A stem and one or more basic blocks a stage, as in the network for small images of ResNet
(https://arxiv.org/abs/1512.03385, section 4.2); channels double where the map halves. Methods of
views read the mean token: nearly blind to where things are, which is what views ask for.
"""

import math

from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, channels_last, nn

from jepa_world.nn import BatchNorm, take_tokens


class ResNetEncoder(nn.Module):
    """Encode each frame by itself into a map of tokens of `width * 2^(stages - 1)` channels.

    Frames of another size than `observation_shape` give a map of another size.

    Args:
        observation_shape: `(t, c, hh, ww)`; any t is accepted later.
        width: Channels of the first stage; every later one has twice as many.
        stages: Each halves the map, the first one in the stem.
        blocks: Basic blocks in a stage.

    Raises:
        ValueError: the frame is smaller than 2^stages pixels, or width is less than 16 (with so
            few channels the convolutions of torch 2.13 can crash on several CPU threads).

    Example:
        >>> import torch
        >>> encoder = ResNetEncoder((1, 3, 32, 32), width=16)
        >>> encoder(torch.rand(2, 4, 3, 32, 32)).shape
        torch.Size([2, 4, 4, 128])
    """

    def __init__(
        self,
        observation_shape: tuple[int, int, int, int],
        *,
        width: int = 32,
        stages: int = 4,
        blocks: int = 1,
    ) -> None:
        super().__init__()
        _, channels, rows, columns = observation_shape
        if min(rows, columns) >> stages == 0:
            raise ValueError(
                f"a frame of {rows} x {columns} pixels is too small for {stages} halvings; "
                "use more pixels or fewer stages"
            )
        if width < 16:
            raise ValueError(
                f"width {width} is no multiple of 16: with fewer channels torch can crash"
            )
        self.stem = _Convolution(channels, width, stride=2)
        layers: list[nn.Module] = []
        out = width
        for stage in range(stages):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                layers.append(_Block(out, width * 2**stage, stride))
                out = width * 2**stage
        self.blocks = nn.Sequential(*layers)
        self.grid = (1, math.ceil(rows / 2**stages), math.ceil(columns / 2**stages))
        self.dim, self.num_tokens = out, math.prod(self.grid)

    def forward(
        self, video: Float[Tensor, "b t c hh ww"], keep: Int[Tensor, "b k"] | None = None
    ) -> Tensor:
        """Return `(b t n d)`, or `(b k d)` of the tokens `keep`."""
        frames = rearrange(video, "b t c hh ww -> (b t) c hh ww")
        maps = self.blocks(self.stem(frames.contiguous(memory_format=channels_last)).relu())
        z = rearrange(maps.float(), "(b t) c y x -> b t (y x) c", b=len(video))
        return z if keep is None else take_tokens(z.flatten(1, 2), keep)


class _Convolution(nn.Module):
    """A convolution and a batch norm."""

    def __init__(self, channels: int, out: int, *, size: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, size, stride, padding=size // 2, bias=False)
        self.norm = BatchNorm(out)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(rearrange(self.conv(x), "f c hh ww -> f hh ww c"))
        return rearrange(x, "f hh ww c -> f c hh ww")


class _Block(nn.Module):
    """Two convolutions around which the map is carried, scaled down where they scale it down."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = _Convolution(channels, out, stride=stride)
        self.second = _Convolution(out, out)
        changes = stride > 1 or channels != out
        self.carry = _Convolution(channels, out, size=1, stride=stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        carried = x if self.carry is None else self.carry(x)
        return (carried + self.second(self.first(x).relu_())).relu_()
