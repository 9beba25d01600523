"""Building blocks shared by encoders, predictors and methods."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported once a process group is there, it would keep it alive
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]


M = TypeVar("M", bound=nn.Module)


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def several_processes() -> bool:
    """Tell whether more than one process shares this computation."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_processes(x: Tensor) -> Tensor:
    """Sum a tensor over all processes, differentiably; the tensor itself when there is one process.

    Every process gets the same sum, and the backward pass sums the gradients of all of them. When
    each process computes the same loss from the sum and the data-parallel wrapper then averages
    parameter gradients, the result is the gradient of one process that holds all samples.
    """
    if not several_processes():
        return x
    return _SumOverProcesses.apply(x)  # type: ignore[no-any-return]


class BatchNorm(nn.Module):
    """Normalise the last axis over all others, with the statistics of all processes together.

    On one process this is torch's batch norm. On several, mean and variance are those of the whole
    batch, differentiably (torch's SyncBatchNorm refuses CPU tensors): N processes equal one.
    A map `(b c hh ww)` in channels-last memory is `(b hh ww c)` at no cost.
    (https://arxiv.org/abs/1502.03167, algorithm 1.)

    Example:
        >>> import torch
        >>> BatchNorm(32, affine=False)(torch.randn(8, 4, 1, 32)).shape
        torch.Size([8, 4, 1, 32])
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, dim: int, *, affine: bool = True, momentum: float = 0.1, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Return the normalised tensor; in training mode, also move the running statistics."""
        rows = x.reshape(-1, x.shape[-1])
        if self.training and several_processes():
            rows = self._normalise_over_processes(rows)
        else:
            rows = F.batch_norm(
                rows,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                self.momentum,
                self.eps,
            )
        return rows.view(x.shape)

    def _normalise_over_processes(self, rows: Tensor) -> Tensor:
        x = rows.to(self.running_mean.dtype)
        own_var, own_mean = torch.var_mean(x, 0, correction=0)
        count = sum_over_processes(x.new_tensor(len(x)))
        share = len(x) / count
        mean = sum_over_processes(share * own_mean)
        var = sum_over_processes(share * (own_var + (own_mean - mean).square()))
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return torch.addcmul(shift, x, scale).to(rows.dtype)


class Attention(nn.Module):
    """Multi-head self-attention (https://arxiv.org/abs/1706.03762, section 3.2).

    `head_dim` need not be dim / heads: LeWorldModel has 16 heads of 64 at dim 192.

    Example:
        >>> import torch
        >>> Attention(64, 4, causal=True)(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        if head_dim is None and dim % heads:
            raise ValueError(f"dim {dim} does not divide into {heads} heads; give head_dim")
        width = heads * (head_dim or dim // heads)
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.qkv = nn.Linear(dim, 3 * width, bias=qkv_bias)
        self.out = nn.Linear(width, dim)

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        mask: Tensor | None = None,
        rotary: Tensor | None = None,
    ) -> Float[Tensor, "b l d"]:
        """Attend from every position to every position, or to those where `mask` (l, l) is true.

        `rotary` turns queries and keys: see `rotary_positions`.
        """
        return self.attend(*self.project(x, rotary), mask)

    def project(
        self, x: Float[Tensor, "b l d"], rotary: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values `(b h l e)`, the first two turned by `rotary`."""
        qkv = rearrange(self.qkv(x), "b l (three h e) -> three b h l e", three=3, h=self.heads)
        if rotary is None:
            q, k, v = qkv
            return q, k, v
        q, k = rotate(qkv[:2], rotary)
        return q, k, qkv[2]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Float[Tensor, "b l d"]:
        """Return what `project`'s queries find among keys and values, projected to tokens."""
        dropout = self.dropout if self.training else 0.0
        attend = _attend_in_float32 if q.is_cpu else F.scaled_dot_product_attention
        y = attend(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=self.causal)
        return self.out(rearrange(y, "b h l e -> b l (h e)"))


def _attend_in_float32(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
) -> Tensor:
    """Attend in float32 at least: on a CPU the backward pass in bfloat16 is ten times slower."""
    if q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal)
    with torch.autocast(q.device.type, enabled=False):
        y = F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask, dropout_p, is_causal
        )
    return y.to(q.dtype)


class MLP(nn.Sequential):
    """Two linear maps with a GELU between them."""

    def __init__(self, dim: int, hidden: int, *, out: int | None = None, dropout: float = 0.0):
        super().__init__(
            nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, out or dim)
        )

    def forward(self, input: Tensor) -> Tensor:
        """Map each vector by itself; without gradient the GELU needs no memory of its own."""
        if torch.is_grad_enabled():
            return super().forward(input)
        first, _, dropout, last = self
        return last(dropout(torch.ops.aten.gelu_(first(input))))


class Block(nn.Module):
    """Pre-LayerNorm transformer block (https://arxiv.org/abs/2010.11929, equations 2 and 3).

    Example:
        >>> import torch
        >>> Block(64, 4)(torch.randn(2, 5, 64)).shape
        torch.Size([2, 5, 64])
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads, causal=causal, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = math.floor(dim * mlp_ratio + 1e-6)  # a ratio such as 419 / 96 gives 419
        self.mlp = MLP(dim, hidden, dropout=dropout)

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        mask: Tensor | None = None,
        rotary: Tensor | None = None,
    ) -> Float[Tensor, "b l d"]:
        """Return tokens that have exchanged information, where `mask` (l, l) is true."""
        x = x + self.attention(self.norm1(x), mask, rotary)
        return x + self.mlp(self.norm2(x))

    def extend(
        self,
        x: Float[Tensor, "b l d"],
        past: tuple[Tensor, Tensor] | None,
        mask: Tensor | None = None,
        rotary: Tensor | None = None,
    ) -> tuple[Float[Tensor, "b l d"], tuple[Tensor, Tensor]]:
        """Return tokens that also see the keys and values `past` (b h p e), and these with theirs.

        Equal to `forward` of all tokens, where no token of the past may see a later one.
        """
        q, k, v = self.attention.project(self.norm1(x), rotary)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        x = x + self.attention.attend(q, k, v, mask)
        return x + self.mlp(self.norm2(x)), (k, v)


class CrossAttention(nn.Module):
    """Attention of queries to other tokens, without a linear map at its end.

    Example:
        >>> import torch
        >>> CrossAttention(64, 4)(torch.randn(2, 1, 64), torch.randn(2, 5, 64)).shape
        torch.Size([2, 1, 64])
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} does not divide into {heads} heads")
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)

    def forward(
        self, query: Float[Tensor, "b q d"], x: Float[Tensor, "b l d"]
    ) -> Float[Tensor, "b q d"]:
        """Return what the queries find among the tokens `x`."""
        q = rearrange(self.q(query), "b q (h e) -> b h q e", h=self.heads)
        k, v = rearrange(self.kv(x), "b l (two h e) -> two b h l e", two=2, h=self.heads)
        attend = _attend_in_float32 if q.is_cpu else F.scaled_dot_product_attention
        y = attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False)
        return rearrange(y, "b h q e -> b q (h e)")


class AttentiveProbe(nn.Module):
    """Classify by one learned query that attends to the tokens of a frozen encoder.

    V-JEPA (https://arxiv.org/abs/2404.08471) has the query and its cross-attention block, V-JEPA 2
    (https://arxiv.org/abs/2506.09985) three blocks of self-attention before it.

    Args:
        dim: Width of a token.
        classes: Number of scores.
        heads: Attention heads.
        depth: Blocks of self-attention before the query.

    Raises:
        ValueError: the width does not divide into heads.

    Example:
        >>> import torch
        >>> AttentiveProbe(64, 10, heads=4, depth=1)(torch.randn(2, 5, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(self, dim: int, classes: int, *, heads: int = 16, depth: int = 0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.query = nn.Parameter(torch.empty(dim))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim)
        self.out = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.query, std=0.02)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b classes"]:
        """Return the scores of the classes."""
        for block in self.blocks:
            x = block(x)
        query = self.query.expand(len(x), 1, -1)
        pooled = query + self.attention(query, self.norm1(x))
        return self.out(pooled + self.mlp(self.norm2(pooled)))[:, 0]


class AdaLNBlock(nn.Module):
    """Transformer block modulated at every position: AdaLN.

    The modulation holds a shift, a scale and a gate for attention, then the same for the MLP. Where
    it is zero the block is the identity: AdaLN-zero computes it by a linear map of the condition
    that starts at zero. (DiT, https://arxiv.org/abs/2212.09748, section 3.2.)

    Example:
        >>> import torch
        >>> x, modulation = torch.randn(2, 5, 64), torch.zeros(2, 5, 6 * 64)
        >>> torch.equal(AdaLNBlock(64, 4)(x, modulation), x)
        True
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(dim, heads, head_dim=head_dim, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = MLP(dim, int(dim * mlp_ratio), dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b l d"],
        modulation: Float[Tensor, "b l 6*d"],
        mask: Tensor | None = None,
    ) -> Float[Tensor, "b l d"]:
        """Return the tokens, each under its own modulation."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
        y = self.attention(torch.addcmul(shift1, self.norm1(x), 1 + scale1), mask)
        x = x + gate1 * self.dropout(y)
        y = self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2))
        return x + gate2 * self.dropout(y)


Window = Callable[[Float[Tensor, "b k n d"], Float[Tensor, "b k c"]], Float[Tensor, "b k n d"]]
"""Predict the next latent of each of k steps, from these steps and their conditions alone."""


def slide_window(
    window: Window, history: int, z: Float[Tensor, "b t n d"], condition: Float[Tensor, "b t c"]
) -> Float[Tensor, "b t n d"]:
    """Return the next latent of every step, predicted from the last `history` steps only."""
    first = window(z[:, :history], condition[:, :history])
    if z.shape[1] <= history:
        return first
    later = window(
        rearrange(z[:, 1:].unfold(1, history, 1), "b t n d k -> (b t) k n d"),
        rearrange(condition[:, 1:].unfold(1, history, 1), "b t c k -> (b t) k c"),
    )
    later = rearrange(later[:, -1], "(b t) n d -> b t n d", b=len(z))
    return torch.cat([first, later], 1)


def roll_window(
    window: Window, history: int, z: Float[Tensor, "b t n d"], condition: Float[Tensor, "b u c"]
) -> Float[Tensor, "b h n d"]:
    """Return the h = u - t + 1 latents after z, predictions fed back; one window for each."""
    known = z.shape[1]
    for step in range(known, condition.shape[1] + 1):
        seen = slice(max(0, step - history), step)
        z = torch.cat([z, window(z[:, seen], condition[:, seen])[:, -1:]], 1)
    return z[:, known:]


class Projector(nn.Sequential):
    """Head that ends in a batch norm without affine: every channel has mean 0 and variance 1.

    SIGReg asks for N(0, I); the head leaves it the shape and the correlations. With `hidden` it is
    an MLP as in LeWorldModel (https://arxiv.org/abs/2603.19312), without it one linear map. It
    stays out of autocast, so that losses see latents in float32.

    Example:
        >>> import torch
        >>> Projector(64, 32)(torch.randn(8, 64)).shape
        torch.Size([8, 32])
    """

    def __init__(self, dim: int, out: int, *, hidden: int | None = None) -> None:
        layers: list[nn.Module] = []
        if hidden is not None:
            layers = [nn.Linear(dim, hidden, bias=False), BatchNorm(hidden), nn.GELU()]
            dim = hidden
        super().__init__(*layers, nn.Linear(dim, out, bias=False), BatchNorm(out, affine=False))

    def forward(self, input: Float[Tensor, "... d"]) -> Float[Tensor, "... e"]:
        """Return the projections, in the precision of the weights."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(next(self.parameters()).dtype))


def projection_head(dim: int, hidden: int, out: int) -> nn.Sequential:
    """Return the MLP of LeJEPA: two hidden layers with batch norm, a linear end.

    (https://arxiv.org/abs/2511.08544, section 5.)
    """
    return nn.Sequential(
        *(nn.Linear(dim, hidden, bias=False), BatchNorm(hidden), nn.ReLU()),
        *(nn.Linear(hidden, hidden, bias=False), BatchNorm(hidden), nn.ReLU()),
        nn.Linear(hidden, out),
    )


def sincos_positions(dim: int, *shape: int) -> Float[Tensor, "l d"]:
    """Return fixed sine-cosine positions of a grid with one, two or three axes, in raster order.

    An axis of e channels has [sin(p w), cos(p w)] with w_i = 10000^(-i / (e / 2)), p the integer
    position (https://arxiv.org/abs/1706.03762, section 3.5). The last axis (columns) comes first in
    the channels, as in I-JEPA; channels that do not divide stay zero.

    Raises:
        ValueError: fewer than two channels for an axis.
    """
    pairs = dim // (2 * len(shape))
    if pairs == 0:
        raise ValueError(f"dim {dim} is too small for positions on {len(shape)} axes")
    omega = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    axes = torch.meshgrid(*(torch.arange(length) for length in shape), indexing="ij")
    angles = [axis.flatten()[:, None] * omega for axis in reversed(axes)]
    positions = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], -1)
    return F.pad(positions, (0, dim - positions.shape[-1])).float()


def sincos_of_grid(dim: int, grid: tuple[int, int, int]) -> Float[Tensor, "l d"]:
    """Return `sincos_positions` of time, rows and columns; without the time of a single step.

    Raises:
        ValueError: fewer than two channels for an axis.
    """
    return sincos_positions(dim, *(grid if grid[0] > 1 else grid[1:]))


def grid_index(*shape: int) -> Int[Tensor, "l axes"]:
    """Return the place of every cell of a grid on each of its axes, in raster order."""
    axes = torch.meshgrid(*(torch.arange(length) for length in shape), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], -1)


def rotary_positions(head_dim: int, index: Int[Tensor, "l axes"]) -> Float[Tensor, "two l e"]:
    """Return cosines and sines that turn the channels of a head by the places `index`.

    Every axis (time, row, column) has e = 2 ((head_dim / axes) / 2) channels, divisions rounded
    down; the rest is not turned. Of the k = e / 2 frequencies w_i = 10000^(-i / k), channel c has
    number c mod k, as the published weights need it, although `rotate` pairs neighbours: with
    different angles in a pair, attention depends on places, not on their differences alone.
    (V-JEPA 2, https://arxiv.org/abs/2506.09985, section 2.1.)

    Raises:
        ValueError: fewer than two channels for an axis, or an odd number in all.
    """
    axes = index.shape[-1]
    pairs = head_dim // axes // 2
    if pairs == 0 or head_dim % 2:
        raise ValueError(
            f"heads of {head_dim} channels have no rotary positions on {axes} axes: give an even "
            f"width of a head, at least {2 * axes}"
        )
    omega = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = repeat(index.double()[..., None] * omega, "l axes k -> l (axes twice k)", twice=2)
    angles = F.pad(angles, (0, head_dim - angles.shape[-1]))
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(
    x: Float[Tensor, "... b h l e"], rotary: Float[Tensor, "two ... l e"]
) -> Float[Tensor, "... b h l e"]:
    """Turn the channels of each pair of neighbours: x cos + (-x_2, x_1) sin.

    `rotary` is that of `rotary_positions`, `(2 l e)` for all samples or `(2 b l e)` for each. The
    turning is done in its precision.
    """
    cos, sin = rotary.unsqueeze(-3)  # the heads of a sample share it
    left, right = rearrange(x, "... (e two) -> two ... e", two=2)
    partner = rearrange([-right, left], "two ... e -> ... (e two)")
    return torch.addcmul(x * cos, partner, sin).to(x.dtype)


def sharing_weights(module: M) -> M:
    """Return another module with the same parameters, and parts and buffers to be exchanged in it.

    `copy.copy` is not for modules whose parameters are sharded: it would build them anew.
    """
    other = object.__new__(type(module))
    other.__dict__ = dict(module.__dict__)
    other._modules, other._buffers = dict(module._modules), dict(module._buffers)
    return other


def take_tokens(tokens: Float[Tensor, "b l d"], index: Tensor) -> Float[Tensor, "b k d"]:
    """Return the tokens at `index` (b, k), per sample."""
    return tokens.gather(1, repeat(index, "b k -> b k d", d=tokens.shape[-1]))
