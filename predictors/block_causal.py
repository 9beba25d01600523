"""A transformer over the tokens of all steps, each step behind its action: V-JEPA 2-AC.

A step is [action, (state), frame tokens]; its tokens see each other and all steps before, and the
outputs of its frame tokens are the next frame's. Rotary positions: time, row and column of a frame
token, time alone of the others. (https://arxiv.org/abs/2506.09985, section 3.)
"""

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from jepa_world.nn import Block, grid_index, rotary_positions

Seen = tuple[Tensor, Tensor]  # keys and values of one block


class BlockCausalPredictor(nn.Module):
    """Predict every step from all steps before it and their actions.

    With `state_dim`, every step also has a state (a robot's pose), given as a third argument to
    `forward` and `rollout`; without it, there is no such token.

    Args:
        dim: Width of a latent token.
        action_dim: Width of an action.
        rows: Rows that the tokens of a frame form; they divide into as many columns as they make.
        state_dim: Width of a state; 0 for none.
        width: Width of the transformer.
        depth: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Width of a block's hidden layer, as a multiple of `width`.
        normalise: Bring every output token to mean 0 and deviation 1, as latents that are fed back
            must be where the encoder's are.

    Raises:
        ValueError: the width does not divide into heads, or heads too narrow for rotary positions.

    Example:
        >>> import torch
        >>> predictor = BlockCausalPredictor(32, 2, rows=2, width=64, depth=2)
        >>> predictor(torch.zeros(8, 5, 4, 32), torch.zeros(8, 5, 2)).shape
        torch.Size([8, 5, 4, 32])
        >>> predictor.rollout(torch.zeros(8, 1, 4, 32), torch.zeros(8, 10, 2)).shape
        torch.Size([8, 10, 4, 32])
    """

    def __init__(
        self,
        dim: int,
        action_dim: int,
        *,
        rows: int = 1,
        state_dim: int = 0,
        width: int = 128,
        depth: int = 3,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        self.rows, self.head_dim, self.normalise = rows, width // heads, normalise
        self.embed = nn.Linear(dim, width)
        self.action = nn.Linear(action_dim, width)
        self.state = nn.Linear(state_dim, width) if state_dim else None
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio=mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = nn.Linear(width, dim)
        rotary_positions(self.head_dim, grid_index(1, 1, 1))  # refuses narrow heads now, not later

    def forward(
        self,
        z: Float[Tensor, "b t n d"],
        action: Float[Tensor, "b t a"],
        state: Float[Tensor, "b t s"] | None = None,
    ) -> Float[Tensor, "b t n d"]:
        """Return the next latent of every step.

        Raises:
            ValueError: the tokens do not form rows, or a state is missing or not expected.
        """
        _, steps, tokens, _ = z.shape
        conditions = self._conditions(action, state)
        rotary = self._rotary(steps, tokens, conditions)
        x, mask = self._tokens(z, conditions), self._mask(steps, tokens, conditions)
        for block in self.blocks:
            x = block(x, mask, rotary)
        return self._latents(x, steps, tokens)

    def rollout(
        self,
        z: Float[Tensor, "b t n d"],
        action: Float[Tensor, "b u a"],
        state: Float[Tensor, "b u s"] | None = None,
    ) -> Float[Tensor, "b h n d"]:
        """Return the h = u - t + 1 latents after z; each step is computed once.

        Keys and values of the steps behind are kept: their tokens see nothing that comes later.

        Raises:
            ValueError: the tokens do not form rows, or a state is missing or not expected.
        """
        known, tokens = z.shape[1:3]
        if action.shape[1] == known:  # nothing is fed back: no keys and values need be kept
            return self(z, action, state)[:, -1:]
        conditions = self._conditions(action, state)
        rotary = self._rotary(action.shape[1], tokens, conditions)
        rotary = rearrange(rotary, "two (t m) e -> two t m e", t=action.shape[1])
        seen: list[Seen | None] = [None] * len(self.blocks)
        future: list[Tensor] = []
        start, given = 0, z
        for end in range(known, action.shape[1] + 1):
            steps = slice(start, end)
            places = rearrange(rotary[:, steps], "two t m e -> two (t m) e")
            given, seen = self._extend(given, conditions[:, steps], places, seen)
            future.append(given)
            start = end
        return torch.cat(future, 1)

    def _extend(
        self, z: Tensor, conditions: Tensor, rotary: Tensor, past: list[Seen | None]
    ) -> tuple[Tensor, list[Seen | None]]:
        """Return the latent after the last of the steps `z`, which follow those of `past`."""
        _, steps, tokens, _ = z.shape
        x, mask = self._tokens(z, conditions), self._mask(steps, tokens, conditions)
        seen: list[Seen | None] = []
        for block, before in zip(self.blocks, past, strict=True):
            x, whole = cast(Block, block).extend(x, before, mask, rotary)
            seen.append(whole)
        return self._latents(x, steps, tokens)[:, -1:], seen

    def _conditions(self, action: Tensor, state: Tensor | None) -> Float[Tensor, "b t c w"]:
        """Return the tokens of a step that are not of its frame."""
        if (self.state is None) != (state is None):
            expected = "no state" if self.state is None else "a state for every step"
            raise ValueError(f"predictor was built to be given {expected}: see state_dim")
        if self.state is None or state is None:
            return self.action(action).unsqueeze(2)
        return torch.stack([self.action(action), self.state(state)], 2)

    def _tokens(self, z: Tensor, conditions: Tensor) -> Float[Tensor, "b l w"]:
        steps = torch.cat([conditions, self.embed(z)], 2)
        return rearrange(steps, "b t m w -> b (t m) w").to(self.norm.weight.dtype)

    def _latents(self, x: Tensor, steps: int, tokens: int) -> Float[Tensor, "b t n d"]:
        frames = rearrange(x, "b (t m) w -> b t m w", t=steps)[:, :, -tokens:]
        z = self.out(self.norm(frames))
        return F.layer_norm(z, z.shape[-1:]) if self.normalise else z

    def _mask(self, steps: int, tokens: int, conditions: Tensor) -> Tensor | None:
        """Return where a token (rows) may see another (columns); None: everywhere."""
        if steps == 1:
            return None
        step = torch.arange(steps, device=conditions.device)
        step = step.repeat_interleave(tokens + conditions.shape[2])
        return step[:, None] >= step

    def _rotary(self, steps: int, tokens: int, conditions: Tensor) -> Float[Tensor, "two l e"]:
        if tokens % self.rows:
            raise ValueError(
                f"predictor is built for frames of {self.rows} rows, which {tokens} tokens do not "
                "form: set rows"
            )
        frame = grid_index(1, self.rows, tokens // self.rows)
        step = torch.cat([frame.new_zeros(conditions.shape[2], 3), frame])
        index = repeat(step, "m axes -> t m axes", t=steps).clone()
        index[..., 0] = torch.arange(steps)[:, None]
        index = rearrange(index, "t m axes -> (t m) axes")
        return rotary_positions(self.head_dim, index).to(conditions.device)
