"""A small strided convolutional encoder: one vector latent for every frame.

Every stage halves the map and doubles the channels (convolution, batch norm, ReLU); a projector
with a final batch norm (`jepa_world.nn.Projector`) maps what is left to the latent.
"""

from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, channels_last, nn

from jepa_world.nn import BatchNorm, Projector, take_tokens


class ConvEncoder(nn.Module):
    """Encode each frame by itself into one token; the default on a CPU.

    Fastest where video is a permuted view of `(b t hh ww c)` memory, as image bytes are: nothing is
    copied then.

    Args:
        observation_shape: `(t, c, hh, ww)`; any t is accepted later.
        dim: Width of the latent.
        width: Channels of the first stage; every later one has twice as many.
        stages: Number of halvings.
        hidden: Width of the projector's hidden layer; none makes the projector linear.
        patches: Make a token of every place of the last map, in place of one of all: as many rows
            and columns as the frame has after its halvings.

    Raises:
        ValueError: the frame is smaller than 2^stages pixels.

    Example:
        >>> import torch
        >>> encoder = ConvEncoder((1, 3, 64, 64), dim=32)
        >>> encoder(torch.rand(2, 4, 3, 64, 64)).shape
        torch.Size([2, 4, 1, 32])
    """

    def __init__(
        self,
        observation_shape: tuple[int, int, int, int],
        *,
        dim: int = 32,
        width: int = 16,
        stages: int = 4,
        hidden: int | None = 256,
        patches: bool = False,
    ) -> None:
        super().__init__()
        _, channels, rows, columns = observation_shape
        if min(rows, columns) >> stages == 0:
            raise ValueError(
                f"a frame of {rows} x {columns} pixels is too small for {stages} halvings; "
                "use more pixels or fewer stages"
            )
        widths = [channels, *(width * 2**stage for stage in range(stages))]
        self.stages = nn.Sequential(*map(_Stage, widths[:-1], widths[1:]))
        area = -(-rows // 2**stages) * -(-columns // 2**stages)
        self.dim, self.num_tokens = dim, area if patches else 1
        self.projector = Projector(area // self.num_tokens * widths[-1], dim, hidden=hidden)

    def forward(
        self, video: Float[Tensor, "b t c hh ww"], keep: Int[Tensor, "b k"] | None = None
    ) -> Tensor:
        """Return `(b t n d)`, or `(b k d)` of the tokens `keep`."""
        frames = rearrange(video, "b t c hh ww -> (b t) c hh ww")
        maps = self.stages(frames.contiguous(memory_format=channels_last))
        maps = rearrange(maps, "f c hh ww -> f (hh ww c)")
        z = self.projector(rearrange(maps, "f (n c) -> (f n) c", n=self.num_tokens))
        z = rearrange(z, "(b t n) d -> b t n d", b=len(video), n=self.num_tokens)
        return z if keep is None else take_tokens(z.flatten(1, 2), keep)


class _Stage(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False)
        self.norm = BatchNorm(out)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(rearrange(self.conv(x), "f c hh ww -> f hh ww c"))
        return rearrange(x.relu_(), "f hh ww c -> f c hh ww")
