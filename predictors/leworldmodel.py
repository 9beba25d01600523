"""The predictor of LeWorldModel, as its published weights need it.

    x = z + positions,  c = embed(action)
    x = x + gate_1(c) * attend(modulate_1(x, c)),  x = x + gate_2(c) * mlp(modulate_2(x, c))
    z_{t+1} = head(norm(x_t)), a perceptron with batch norm

(https://arxiv.org/abs/2603.19312, section 3.) `adaln` is its smaller, residual relative.

A rollout does each piece of work once. Until the window slides, a step runs its new token alone,
beside what is kept of the others; from then on every position is another one, and nothing can be
kept. Of the last block and of the head only the last token is needed. And attention is computed
relative to the first token of the window, y_0: its weights p do not change when the same vector is
taken from all keys, and they sum to one, so that

    k_j = W_k (y_j - y_0),  v_j = W_v (y_j - y_0),  p = softmax(0, q k_1, .., q k_j)
    attend(y_i) = W_o W_v y_0 + W_o sum_{j >= 1} p_j v_j

and the first token needs neither query nor key nor value, only W_o W_v y_0.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from jepa_world.nn import MLP, Attention, BatchNorm, roll_window, slide_window

ROWS = 512  # sequences rolled out together: more need memory and save no time


class LeWorldModelPredictor(nn.Module):
    """Predict every step from the last `history` steps and their actions.

    Published weights expect actions of mean 0 and deviation 1, several of them side by side:
    `encoders.pretrained.fold_action_statistics` makes them ones of the actions themselves. A token
    sees all tokens of its own step and of the steps before; LeWorldModel has one token a step.

    Args:
        dim: Width of a latent token.
        action_dim: Width of an action.
        depth: Number of blocks.
        heads: Attention heads.
        head_dim: Width of a head.
        hidden: Width of a block's hidden layer.
        head: Width of the hidden layer at the end.
        smooth: Width that actions are mapped to first.
        history: Steps seen, the present one included.
        dropout: In attention, in the hidden layers and after both halves of every block.

    Example:
        >>> import torch
        >>> predictor = LeWorldModelPredictor(32, 2, depth=2, heads=2, head_dim=16, hidden=64)
        >>> predictor(torch.zeros(8, 5, 1, 32), torch.zeros(8, 5, 2)).shape
        torch.Size([8, 5, 1, 32])
        >>> predictor.rollout(torch.zeros(8, 1, 1, 32), torch.zeros(8, 10, 2)).shape
        torch.Size([8, 10, 1, 32])
    """

    def __init__(
        self,
        dim: int,
        action_dim: int,
        *,
        depth: int = 6,
        heads: int = 16,
        head_dim: int = 64,
        hidden: int = 2048,
        head: int = 2048,
        smooth: int = 10,
        history: int = 3,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.history = history
        all_blocks = nn.Linear(dim, depth * 6 * dim)
        self.modulation = nn.Sequential(
            *(nn.Linear(action_dim, smooth), nn.Linear(smooth, 4 * dim), nn.SiLU()),
            *(nn.Linear(4 * dim, dim), nn.SiLU(), all_blocks),
        )
        nn.init.zeros_(all_blocks.weight)
        nn.init.zeros_(all_blocks.bias)
        self.positions = nn.Parameter(torch.randn(history, dim))
        self.blocks = nn.ModuleList(
            _Block(dim, heads, head_dim, hidden, dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(
            nn.Linear(dim, head), BatchNorm(head), nn.GELU(), nn.Linear(head, dim)
        )

    def forward(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b t a"]
    ) -> Float[Tensor, "b t n d"]:
        """Return the next latent of every step."""
        return slide_window(self._window, self.history, z, self.modulation(action))

    def rollout(
        self, z: Float[Tensor, "b t n d"], action: Float[Tensor, "b u a"]
    ) -> Float[Tensor, "b h n d"]:
        """Return the h = u - t + 1 latents after z; a step computes its last window only.

        In training, dropout and batch norm see whole windows.
        """
        if self.training or z.shape[2] > 1:
            return roll_window(self._window, self.history, z, self.modulation(action))
        alone = [cast(_Block, block).attends_alone() for block in self.blocks]
        parts = zip(z.squeeze(2).split(ROWS), action.split(ROWS), strict=True)
        future = torch.cat([self._roll(*part, alone) for part in parts], 1)
        return rearrange(future, "h b d -> b h 1 d")

    def _roll(
        self, z: Float[Tensor, "b t d"], action: Float[Tensor, "b u a"], alone: list[Tensor]
    ) -> Float[Tensor, "h b d"]:
        """Roll out steps of one token; `alone` holds the matrix W_o W_v of every block."""
        latents = list(z.unbind(1))
        known, modulation = len(latents), self._modulation_by_block(action.transpose(0, 1))
        begin, end = 0, 0
        kept: list[_Kept | None] = []
        for step in range(known, action.shape[1] + 1):
            if step == known or step > self.history:
                begin = end = max(0, step - self.history)
                kept = [None for _ in alone]
            positions = self.positions[end - begin : step - begin, None]
            x = torch.stack(latents[end:step]) + positions
            for index, block in enumerate(self.blocks):
                needed = 1 if index + 1 == len(alone) else len(x)
                part = modulation[index][end:step]
                x, kept[index] = cast(_Block, block).extend(
                    x, part, alone[index], kept[index], needed
                )
            latents.append(self.head(self.norm(x[-1])).to(z.dtype))
            end = step
        return torch.stack(latents[known:])

    def _modulation_by_block(self, action: Tensor) -> list[Tensor]:
        """Return `modulation` of the actions, 1 + scale in the place of scale, block by block."""
        *embed, all_blocks = self.modulation
        condition, all_blocks = nn.Sequential(*embed)(action), cast(nn.Linear, all_blocks)
        one = all_blocks.bias.new_tensor([0, 1, 0, 0, 1, 0]).repeat(len(self.blocks))
        bias = all_blocks.bias + one.repeat_interleave(len(all_blocks.bias) // len(one))
        weights, biases = (part.chunk(len(self.blocks)) for part in (all_blocks.weight, bias))
        return [F.linear(condition, *part) for part in zip(weights, biases, strict=True)]

    def _window(self, z: Tensor, modulation: Tensor) -> Tensor:
        """Predict from at most `history` steps `(b k n d)`, modulated by their actions."""
        _, steps, tokens, _ = z.shape
        x = rearrange(z + self.positions[:steps, None], "b k n d -> b (k n) d")
        modulation = repeat(modulation, "b k m -> b (k n) m", n=tokens)
        step = torch.arange(steps, device=z.device).repeat_interleave(tokens)
        mask = step[:, None] >= step
        parts = modulation.chunk(len(self.blocks), -1)
        for block, part in zip(self.blocks, parts, strict=True):
            x = block(x, part, mask)
        return rearrange(self.head(self.norm(x)), "b (k n) d -> b k n d", n=tokens).to(z.dtype)


class _Kept(NamedTuple):
    """What the attention of a block keeps of a window."""

    first: Float[Tensor, "b d"]
    attended: Float[Tensor, "b d"]  # by the first, which sees itself alone
    keys: list[Float[Tensor, "b h e"]]  # of those behind the first, relative to it
    values: list[Float[Tensor, "b h e"]]


class _Block(nn.Module):
    """An AdaLN block that normalises once more, with affine, behind each modulation."""

    def __init__(self, dim: int, heads: int, head_dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.plain = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, head_dim=head_dim, dropout=dropout, qkv_bias=False)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, hidden, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, modulation: Tensor, mask: Tensor) -> Tensor:
        """Return the tokens, each under its own modulation."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
        y = self.norm1(torch.addcmul(shift1, self.plain(x), 1 + scale1))
        x = x + gate1 * self.dropout(self.attention(y, mask))
        y = self.norm2(torch.addcmul(shift2, self.plain(x), 1 + scale2))
        return x + gate2 * self.dropout(self.mlp(y))

    def attends_alone(self) -> Float[Tensor, "d d"]:
        """Return the matrix W_o W_v, by which a token that sees itself alone attends."""
        _, _, value = self.attention.qkv.weight.chunk(3)
        return self.attention.out.weight @ value

    def extend(
        self, x: Tensor, modulation: Tensor, alone: Tensor, kept: _Kept | None, needed: int
    ) -> tuple[Tensor, _Kept]:
        """Return the last `needed` of new tokens `(l b d)`, and what is kept of the window.

        Equal to `forward` of the whole window, without dropout; scales have 1 added already.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
        y = self.norm1(torch.addcmul(shift1, self.plain(x), scale1))
        y, kept = self._attend_relative(y, alone, kept, needed)
        last = (x, gate1, shift2, scale2, gate2)
        x, gate1, shift2, scale2, gate2 = (part[-needed:] for part in last)
        x = torch.addcmul(x, gate1, y)
        y = self.norm2(torch.addcmul(shift2, self.plain(x), scale2))
        return torch.addcmul(x, gate2, self.mlp(y)), kept

    def _attend_relative(
        self, y: Tensor, alone: Tensor, kept: _Kept | None, needed: int
    ) -> tuple[Tensor, _Kept]:
        """Attend to all tokens before, relative to the first: see the top of the file."""
        out, heads = self.attention.out, self.attention.heads
        query, key_value = self.attention.qkv.weight.tensor_split([out.in_features])
        attended = []
        if kept is None:
            first, y = y[0], y[1:]
            attended = [F.linear(first, alone, out.bias)]
            kept = _Kept(first, attended[0], [], [])
        if len(y):
            q = rearrange(F.linear(y[-needed:], query), "i b (h e) -> i b h e", h=heads)
            new = F.linear(y - kept.first, key_value)
            new = rearrange(new, "j b (two h e) -> two j b h e", two=2, h=heads)
            keys, values = ([*old, *tokens] for old, tokens in zip(kept[2:], new, strict=True))
            kept = kept._replace(keys=keys, values=values)
            sees = range(len(keys) - len(q) + 1, len(keys) + 1)
            seen = [_attend(one, keys[:n], values[:n]) for one, n in zip(q, sees, strict=True)]
            seen = rearrange(seen, "i b h e -> i b (h e)")
            attended.extend(kept.attended + F.linear(seen, out.weight))
        return torch.stack(attended[-needed:]), kept


def _attend(
    q: Float[Tensor, "b h e"],
    keys: list[Float[Tensor, "b h e"]],
    values: list[Float[Tensor, "b h e"]],
) -> Float[Tensor, "b h e"]:
    """Attend to a few tokens, and to one of key and value 0.

    Written out: among three tokens torch's attention takes four times as long.
    """
    scores = [torch.zeros_like(q[..., 0]), *(torch.linalg.vecdot(q, key) for key in keys)]
    weights = (torch.stack(scores) * q.shape[-1] ** -0.5).softmax(0)[1:, ..., None]
    seen = weights[0] * values[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        seen = torch.addcmul(seen, weight, value)
    return seen
