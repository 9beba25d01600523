"""Record what happens in an environment, as datasets hold it."""

from typing import Any

import gymnasium
import numpy as np

STATE_COLUMNS = ("state", "proprio")  # of info, recorded where the environment gives them


class Recorder(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment that keeps the pictures, actions and states of its present episode.

    Example:
        >>> from jepa_world.envs import make
        >>> env = Recorder(make("reach", size=32))
        >>> _ = env.reset(seed=0)
        >>> _ = env.step(env.action_space.sample())
        >>> {name: rows.shape for name, rows in env.recorded_episode().items()}
        {'pixels': (2, 32, 32, 3), 'action': (2, 2), 'state': (2, 4), 'proprio': (2, 4)}
    """

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, and forget the one before."""
        observation, info = self.env.reset(**options)
        self._names = [name for name in STATE_COLUMNS if name in info]
        self._frames, self._taken = [(observation, info)], []
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._taken.append(action)
        self._frames.append((observation, {name: info[name] for name in self._names}))
        return observation, reward, terminated, truncated, info

    def recorded_episode(self) -> dict[str, np.ndarray]:
        """Return the columns so far, one row for every frame; the action at the last is zero."""
        pixels, states = zip(*self._frames, strict=True)
        actions = [*self._taken, np.zeros(self.env.action_space.shape or ())]
        return {
            "pixels": np.stack(pixels),
            "action": np.stack(actions).astype(np.float32),
            **{name: np.stack([state[name] for state in states]) for name in self._names},
        }
