"""Goals some steps ahead of the start, as most published comparisons of world models have them."""

from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import numpy as np

from jepa_world.envs import EnvError


class GoalsAhead(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose goal is where a policy gets to, some steps ahead of the start.

    A goal drawn anywhere may be out of reach of a short episode; this one never is. The policy
    plays from the start, the episode then begins there anew.

    Args:
        env: Its reset takes `start` and `goal`, and its `info` has "configuration", which is
            either.
        steps: Steps to the goal.
        guide: Makes the policy of an episode, an iterator over actions, from a generator.

    Raises:
        EnvError: at reset, where `info` has no configuration.

    Example:
        >>> from jepa_world.envs import make
        >>> always_on = lambda generator: iter([np.ones(2, np.float32)] * 3)
        >>> env = GoalsAhead(make("reach", size=32), 3, always_on)
        >>> _, info = env.reset(seed=0)
        >>> for _ in range(3):
        ...     *_, info = env.step(np.ones(2, np.float32))
        >>> info["success"]
        True
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        steps: int,
        guide: Callable[[np.random.Generator], Iterator[np.ndarray]],
    ) -> None:
        super().__init__(env)
        self.steps = steps
        self.guide = guide

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin at a start, with the goal some steps ahead of it."""
        if seed is None:
            seed = int(self.unwrapped.np_random.integers(2**31))
        _, info = self.env.reset(seed=seed, options=options)
        if "configuration" not in info:
            raise EnvError("the environment gives no info['configuration']: no goals steps ahead")
        start, actions = info["configuration"], self.guide(np.random.default_rng(seed))
        for _ in range(self.steps):
            *_, terminated, truncated, info = self.env.step(next(actions))
            if terminated or truncated:
                break
        found = {"start": start, "goal": info["configuration"]}
        return self.env.reset(seed=seed, options={**(options or {}), **found})
