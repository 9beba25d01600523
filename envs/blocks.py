"""Steps of several actions, for world models that foresee several at once."""

from typing import Any

import gymnasium
import numpy as np


class ActionBlocks(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose step executes `stride` actions, one after the other.

    An action is theirs side by side, as `Trajectories.read` returns them; rewards are summed. A
    step ends early where the episode does.

    Example:
        >>> from jepa_world.envs import make
        >>> env = ActionBlocks(make("reach", size=32), 5)
        >>> env.action_space.shape
        (10,)
    """

    def __init__(self, env: gymnasium.Env[Any, Any], stride: int) -> None:
        super().__init__(env)
        space = env.action_space
        assert isinstance(space, gymnasium.spaces.Box)
        low, high = (np.tile(bound, stride) for bound in (space.low, space.high))
        self.stride = stride
        self.action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Execute the actions (stride * a) and return what the last of them led to."""
        first, *others = np.split(np.asarray(action), self.stride)
        observation, total, terminated, truncated, info = self.env.step(first)
        for one in others:
            if terminated or truncated:
                break
            observation, reward, terminated, truncated, info = self.env.step(one)
            total = float(total) + float(reward)
        return observation, float(total), terminated, truncated, info
