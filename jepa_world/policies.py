"""What acts while trajectories are recorded: smooth random actions, guides and experts.

Random actions follow an Ornstein-Uhlenbeck process, a_t = rho a_(t-1) + sqrt(1 - rho^2) sigma
noise, clipped to [-1, 1]. A guide or an expert is a script of an environment that sees its true
state. Nothing here needs torch: collecting processes stay small.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, Protocol, runtime_checkable

import gymnasium
import numpy as np
from jaxtyping import Bool, Float, Float32

from jepa_world.registry import UserError

PolicyName = Literal["random", "guided", "expert"]
STILL_STEPS = 5.0  # mean length of a still segment


@runtime_checkable
class GuidedEnv(Protocol):
    """An environment may offer this: what to do in it so that something happens.

    Random actions seldom touch an object, and seldom pass a door.
    """

    def guide(self, generator: np.random.Generator) -> Iterator[Float[np.ndarray, " a"]]:
        """Yield actions without end, each for the state that the environment is then in.

        They lead to what is worth recording, whatever the goal is; random choices, and any noise,
        come from the generator. What is yielded need not have been executed.
        """
        ...


@runtime_checkable
class ExpertEnv(Protocol):
    """An environment may also offer this: a script that solves it from the true state."""

    def expert(self, generator: np.random.Generator) -> Iterator[Float[np.ndarray, " a"]]:
        """Yield actions without end that lead to the goal and stay there."""
        ...


def usual_policy(env: gymnasium.Env[Any, Any]) -> PolicyName:
    """Return who acts where nothing else is said: the guide, in an environment that has one."""
    return "guided" if isinstance(env.unwrapped, GuidedEnv) else "random"


def actions_of(
    env: gymnasium.Env[Any, Any],
    policy: PolicyName,
    generator: np.random.Generator,
    steps: int,
    *,
    correlation: float = 0.8,
    spread: float = 0.7,
    still: float = 0.15,
) -> Iterator[Float32[np.ndarray, " a"]]:
    """Yield the actions of a policy for an episode that has begun; zero in still segments.

    Raises:
        UserError: the environment has no guide, or no expert.
    """
    if policy == "random":
        width = math.prod(env.action_space.shape or ())
        options = {"correlation": correlation, "spread": spread, "still": still}
        yield from smooth_actions(generator, steps, width, **options)
        return
    check_policy(env, policy)
    inner: Any = env.unwrapped
    script = inner.guide(generator) if policy == "guided" else inner.expert(generator)
    for rests in still_steps(generator.random(steps), still):
        action = np.zeros(env.action_space.shape or ()) if rests else next(script)
        yield action.clip(-1.0, 1.0).astype(np.float32)


def check_policy(env: gymnasium.Env[Any, Any], policy: PolicyName) -> None:
    """Check that an environment offers what a policy needs.

    Raises:
        UserError: it has no guide, or no expert.
    """
    inner = env.unwrapped
    if policy == "guided" and not isinstance(inner, GuidedEnv):
        raise UserError("policy 'guided' needs an environment with a method `guide`")
    if policy == "expert" and not isinstance(inner, ExpertEnv):
        raise UserError("policy 'expert' needs an environment with a method `expert`")


def smooth_actions(
    generator: np.random.Generator,
    steps: int,
    action_dim: int,
    *,
    correlation: float = 0.8,
    spread: float = 0.7,
    still: float = 0.15,
) -> Float32[np.ndarray, "t a"]:
    """Draw an Ornstein-Uhlenbeck action sequence in [-1, 1], zero in still segments.

    The process begins stationary. Whether a step is still is a Markov chain: it stays so for
    `STILL_STEPS` steps on average, and is so at the share `still` of all steps.
    """
    noise = spread * generator.standard_normal((steps, action_dim))
    noise[1:] *= np.sqrt(1.0 - correlation**2)
    rests = still_steps(generator.random(steps), still)
    actions = np.zeros((steps, action_dim), np.float32)
    value = np.zeros(action_dim)
    for step in range(steps):
        value = correlation * value + noise[step]
        if not rests[step]:
            actions[step] = value.clip(-1.0, 1.0)
    return actions


def still_steps(chance: Float[np.ndarray, " t"], still: float) -> Bool[np.ndarray, " t"]:
    """Return which steps are still, from numbers uniform in [0, 1)."""
    enter = still / (1.0 - still) / STILL_STEPS
    rests = np.empty(len(chance), bool)
    for step, number in enumerate(chance):
        stays = 1.0 - 1.0 / STILL_STEPS if step and rests[step - 1] else enter
        rests[step] = number < (stays if step else still)
    return rests
