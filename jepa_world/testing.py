"""Run anybody's part through its contract, and say in one line which promise it breaks.

Each check works on a copy of the part and restores the global random state: what is checked is left
as it was, its mode and running statistics included. The contracts are in `jepa_world.interfaces`.
"""

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any, cast

import gymnasium
import numpy as np
import torch
from gymnasium.utils import env_checker
from jaxtyping import Float
from torch import Tensor, nn

from jepa_world.interfaces import (
    Encoder,
    FastRollout,
    ImplausibleEnv,
    NamedStateEnv,
    Planner,
    PrefixRollout,
    SimulatorEnv,
)
from jepa_world.objectives import Objective
from jepa_world.policies import ExpertEnv, GuidedEnv
from jepa_world.registry import UserError


class ContractError(UserError):
    """A part broke a promise of its contract."""


def check_encoder(encoder: nn.Module, observation_shape: tuple[int, int, int, int]) -> None:
    """Check an encoder built for clips `(t, c, hh, ww)`.

    Shapes, `dim` and `num_tokens`, `keep`, finite and repeatable latents, samples that do not
    depend on each other in evaluation mode, gradients for all parameters. An encoder built for
    t = 1 must take any number of frames, and encode each by itself.

    Raises:
        ContractError: naming the promise that was broken.

    Example:
        >>> from jepa_world.encoders.conv import ConvEncoder
        >>> check_encoder(ConvEncoder((1, 3, 32, 32)), (1, 3, 32, 32))
    """
    with _probe(encoder) as (probe, generator), torch.no_grad():
        if not isinstance(probe, Encoder):
            raise ContractError("encoder lacks an attribute: `dim` and `num_tokens`, both int")
        video = torch.rand(3, *observation_shape, generator=generator).to(_device(probe))
        z = _encode(probe, probe, video)
        _check_repeatable("encoder", probe, (video,), z)
        _check_samples_apart("encoder", probe, (video,), z)
        _encode(probe, probe, torch.zeros_like(video))
        _check_keep(probe, video, z, generator)
        if observation_shape[0] == 1:
            _check_frames_apart(probe, probe, video)
        _check_gradients("encoder", probe, {"video": video}, needed=())


def check_predictor(
    predictor: nn.Module, dim: int, action_dim: int, *, num_tokens: int = 1
) -> None:
    """Check a predictor of latents `(b t n d)` under actions `(b t a)`.

    Shape, finite and repeatable outputs, no look into the future, samples that do not depend on
    each other in evaluation mode, gradients for latents, actions and all parameters. A `rollout`,
    if there is one, equals step-by-step calls; `rollout_prefixes` equals one call for the first
    step, and sees for every step the actions up to it and no further. Parameters are shaken a
    little first: a predictor that starts as a copy of the latent would pass everything.

    Raises:
        ContractError: naming the promise that was broken.

    Example:
        >>> from jepa_world.predictors.mlp import MLPPredictor
        >>> check_predictor(MLPPredictor(32, 2), 32, 2)
    """
    with _probe(predictor) as (probe, generator), torch.no_grad():
        _shake(probe, generator)
        z = torch.randn(3, 5, num_tokens, dim, generator=generator).to(_device(probe))
        action = torch.rand(3, 5, action_dim, generator=generator).to(z) * 2 - 1
        _predict(probe, z[:, :1], action[:, :1])
        following = _predict(probe, z, action)
        _check_repeatable("predictor", probe, (z, action), following)
        _check_samples_apart("predictor", probe, (z, action), following)
        _check_causal(probe, z, action, following)
        if isinstance(probe, FastRollout):
            _check_rollout(probe, probe, z[:, :2], action)
        if isinstance(probe, PrefixRollout):
            _check_prefixes(probe, probe, z[:, :2], action)
        inputs = {"latent": z, "action": action}
        _check_gradients("predictor", probe, inputs, needed=("latent", "action"))


def check_masked_predictor(predictor: nn.Module, dim: int, grid: tuple[int, int, int]) -> None:
    """Check a predictor of the tokens that were not seen, on a grid `(t', rows, columns)`.

    Shape, finite and repeatable outputs, samples that do not depend on each other in evaluation
    mode, outputs that follow the order of the targets and not that of the context, positions that
    are told apart, gradients for the context and all parameters. Parameters are shaken a little
    first.

    Raises:
        ContractError: naming the promise that was broken.

    Example:
        >>> from jepa_world.predictors.masked import MaskedTransformer
        >>> check_masked_predictor(MaskedTransformer(64, (1, 7, 7)), 64, (1, 7, 7))
    """
    part, length = "masked predictor", int(np.prod(grid))
    with _probe(predictor) as (probe, generator), torch.no_grad():
        _shake(probe, generator)
        order = torch.rand(3, length, generator=generator).argsort(1).to(_device(probe))
        seen, unseen = order[:, : length // 2], order[:, length // 2 :]
        context = torch.randn(*seen.shape, dim, generator=generator).to(_device(probe))

        def predict(context: Tensor, seen: Tensor, unseen: Tensor) -> Tensor:
            predicted = _call(part, probe, context, seen, unseen)
            promise = "one latent for every target"
            return _check_tensor(part, predicted, (*unseen.shape, dim), promise)

        predicted = predict(context, seen, unseen)
        if bool(_gap(predict(context, seen, unseen), predicted).any()):
            raise ContractError(f"{part} is not deterministic in evaluation mode")
        others = torch.cat([context[:1], context[1:].flip(-1) * 0.5])
        if bool(_gap(predict(others, seen, unseen), predicted)[0].any()):
            raise ContractError(
                f"{part} mixes samples in evaluation mode: changing one changes another"
            )
        if bool(_gap(predict(context, seen, unseen.flip(1)), predicted.flip(1)).any()):
            raise ContractError(f"{part} does not follow the order of its targets")
        if bool(_gap(predict(context.flip(1), seen.flip(1), unseen), predicted).any()):
            raise ContractError(f"{part} depends on the order of the context, not on its positions")
        if not bool(_gap(predicted[:, 1:], predicted[:, :-1]).all()):
            raise ContractError(f"{part} does not tell the positions of targets apart")
        inputs = {"context": context, "seen": seen, "unseen": unseen}
        _check_gradients(part, probe, inputs, needed=("context",))


def check_planner(
    build: Callable[[], Planner],
    low: Float[Tensor, "a"],
    high: Float[Tensor, "a"],
    horizon: int,
) -> None:
    """Check a planner; `build` makes a new one, with the same seed each time.

    Shape, device and type of the plan, bounds of all that is evaluated or returned, an input left
    as it was, no gradient left behind, the same plan under the same seed whatever else is drawn, a
    plan that is better than a bad start and does not depend on the other episodes, and none from
    where the cost is not finite. The cost is differentiable and offers its latents.

    Raises:
        ContractError: naming the promise that was broken.

    Example:
        >>> from jepa_world.planners.cem import CEM
        >>> low, high = -torch.ones(2), torch.ones(2)
        >>> check_planner(lambda: CEM(low, high, 5), low, high, 5)
    """
    target = low + (high - low) * torch.tensor([0.25, 0.6])[:, None, None]  # of two episodes
    cost = _Pursuit(low, high, target.expand(2, horizon, -1))
    start = high.expand(2, horizon, -1).clone()
    with cast(Any, torch.random).fork_rng(()), torch.no_grad():
        random = torch.get_rng_state()
        plan = _plan(build(), cost, start)
        if not torch.equal(start, high.expand_as(start)):
            raise ContractError("planner changed `start` in place")
        if bool((cost(plan[:, None]) >= cost(start[:, None])).any()):
            raise ContractError("planner returned a plan no better than its start on a quadratic")
        if cost.weight.grad is not None:
            raise ContractError("planner left a gradient in a parameter behind the cost")
        if not torch.equal(plan, _plan(build(), cost, start)):
            raise ContractError("planner returned two plans under the same seed")
        if not torch.equal(random, torch.get_rng_state()):
            raise ContractError("planner drew from the global random state, not from its own")
        _plan(build(), _Pursuit(low, high, cost.target.double()), start.double())
        _check_episodes_apart(build, cost, start, plan)
        _check_finite_chosen(build, cost, low.expand(2, horizon, -1).clone())


def check_objective(
    objective: Objective, num_tokens: int, dim: int, horizon: int, action_dim: int
) -> None:
    """Check the cost of latents `(b s h n d)` and plans `(b s h a)` for a goal `(b n d)`.

    Shape, finite costs, and a cost of an episode and a plan that does not depend on the others.

    Raises:
        ContractError: naming the promise that was broken.

    Example:
        >>> from jepa_world.objectives import effort
        >>> check_objective(effort, 1, 32, 10, 2)
    """
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 3, horizon, num_tokens, dim, generator=generator)
    plans = torch.rand(2, 3, horizon, action_dim, generator=generator) * 2 - 1
    goal = torch.randn(2, num_tokens, dim, generator=generator)
    costs = _call("objective", objective, z, plans, goal)
    _check_tensor("objective", costs, (2, 3), "one cost for every plan of every episode")
    alone = _call("objective", objective, z[1:, 1:2], plans[1:, 1:2], goal[1:])
    _check_tensor("objective", alone, (1, 1), "one cost for every plan of every episode")
    if not torch.allclose(alone, costs[1:, 1:2], rtol=1e-4, atol=1e-4):
        raise ContractError("objective mixes plans: the cost of one depends on the others")


def check_env(env: gymnasium.Env[Any, Any], *, configuration: Any = None) -> None:
    """Check an environment: gymnasium's own `check_env` and the promises of ours.

    Actions in [-1, 1], an image of bytes, `info["goal"]` like an observation, `info["success"]` a
    bool, the same frames under the same seed. What an environment may offer besides is checked
    where it does:

    - true distances (`SimulatorEnv`) that agree with what happens and with `success`;
    - `info["configuration"]`, a value for the reset options `start` and `goal` that leads back to
      where it was seen, and to the goal if it is the goal;
    - `info["factors"]`, values for the reset option `factors` that lead back to the same picture;
      "random" draws other ones, which change pictures and not the state;
    - a `guide` and an `expert` whose actions are within bounds and follow from their generator;
    - `quantities`, one name for every number of `info["state"]` or whatever it names;
    - `implausible`, pictures that differ from the present one, and leave all as it was.

    Args:
        env: The environment; it is left after a reset.
        configuration: A value for the reset options `start` and `goal`, of an environment that
            reports none. Given to both, the first frame must be the goal and a success.

    Raises:
        ContractError: naming the promise that was broken.
    """
    inner: gymnasium.Env[Any, Any] = env.unwrapped
    _check_spaces(inner)
    unregistered = inner.spec is None  # gymnasium then cannot make it in other render modes
    try:
        env_checker.check_env(inner, skip_render_check=unregistered)
    except Exception as error:
        raise ContractError(f"env fails gymnasium's check_env: {_one_line(error)}") from error
    frames = _episode(inner, seed=1)
    if not np.array_equal(frames, _episode(inner, seed=1)):
        raise ContractError("env showed different frames under the same seed and actions")
    _, info = inner.reset(seed=1)
    if configuration is not None:
        _check_start_is_goal(inner, configuration)
    if "configuration" in info:
        _check_configuration(inner)
    if "factors" in info:
        _check_factors(inner)
    if isinstance(inner, SimulatorEnv):
        _check_distances(inner, inner)
    if isinstance(inner, GuidedEnv):
        _check_script("guide", inner.guide, inner)
    if isinstance(inner, ExpertEnv):
        _check_script("expert", inner.expert, inner)
    if isinstance(inner, NamedStateEnv):
        _check_quantities(inner, inner.reset(seed=1)[1])
    if isinstance(inner, ImplausibleEnv):
        _check_implausible(inner, inner)
    inner.reset(seed=1)


@contextmanager
def _probe(module: nn.Module) -> Generator[tuple[nn.Module, torch.Generator]]:
    """Give a copy in evaluation mode, and a generator; keep the global random state."""
    device = _device(module)
    devices = [device] if device.type == "cuda" else []
    forked = cast(Any, torch.random).fork_rng(devices)
    with forked, torch.inference_mode(False):
        yield copy.deepcopy(module).eval(), torch.Generator().manual_seed(0)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters(), torch.empty(0)).device


def _shake(module: nn.Module, generator: torch.Generator) -> None:
    for parameter in module.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter), alpha=0.05)


def _call(part: str, function: Callable[..., Any], *inputs: Tensor, **options: Tensor) -> Any:
    try:
        return function(*inputs, **options)
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in (*inputs, *options.values()))
        raise ContractError(f"{part} failed on input {shapes}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _check_tensor(part: str, output: Any, shape: tuple[int, ...], promise: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise ContractError(f"{part} returned {type(output).__name__}, expected a tensor")
    if output.shape != shape:
        raise ContractError(f"{part} returned {tuple(output.shape)}, expected {shape}: {promise}")
    if not bool(output.isfinite().all()):
        raise ContractError(f"{part} returned NaN or infinity for finite input")
    return output


def _encode(encoder: Encoder, module: nn.Module, video: Tensor) -> Tensor:
    z = _call("encoder", module, video)
    steps = z.shape[1] if isinstance(z, Tensor) and z.ndim == 4 else video.shape[1]
    expected = (len(video), steps, encoder.num_tokens, encoder.dim)
    z = _check_tensor("encoder", z, expected, "(b t' num_tokens dim)")
    if steps == 0 or video.shape[1] % steps:
        raise ContractError(f"encoder returned {steps} steps for {video.shape[1]} frames")
    return z


def _predict(predictor: nn.Module, z: Tensor, action: Tensor) -> Tensor:
    following = _call("predictor", predictor, z, action)
    promise = "one latent for every input step"
    return _check_tensor("predictor", following, tuple(z.shape), promise)


def _gap(x: Tensor, y: Tensor) -> Tensor:
    """Return where (over samples and steps) two latents differ by more than rounding."""
    return (x - y).abs().flatten(2).amax(2) > 1e-4 * (1 + y.abs().max())


def _check_repeatable(
    part: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    if bool(_gap(module(*inputs), output).any()):
        raise ContractError(f"{part} is not deterministic in evaluation mode")


def _check_samples_apart(
    part: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    others = tuple(torch.cat([x[:1], x[1:].flip(-1) * 0.5]) for x in inputs)
    if bool(_gap(module(*others), output)[0].any()):
        raise ContractError(
            f"{part} mixes samples in evaluation mode: changing one of the batch changes another"
        )


def _check_keep(encoder: nn.Module, video: Tensor, z: Tensor, generator: torch.Generator) -> None:
    tokens = z.flatten(1, 2)
    order = torch.rand(tokens.shape[:2], generator=generator).argsort(1).to(video.device)
    few = order[:, : max(1, tokens.shape[1] // 2)]
    kept = _call("encoder", encoder, video, keep=few)
    _check_tensor("encoder", kept, (*few.shape, z.shape[-1]), "(b k dim) with keep (b k)")
    every = _call("encoder", encoder, video, keep=order)
    expected = tokens.gather(1, order[..., None].expand_as(tokens))
    if bool(_gap(every, expected).any()):
        raise ContractError("encoder with all tokens in `keep` differs from encoder without")


def _check_frames_apart(encoder: Encoder, module: nn.Module, video: Tensor) -> None:
    clip = video.flatten(0, 1)[None]
    z = _encode(encoder, module, clip)
    by_frame = _encode(encoder, module, video).flatten(0, 1)[None]
    if z.shape != by_frame.shape or bool(_gap(z, by_frame).any()):
        raise ContractError(
            "encoder is built for one frame, but frames of a longer video are not encoded each "
            "by itself"
        )


def _check_causal(predictor: nn.Module, z: Tensor, action: Tensor, following: Tensor) -> None:
    for step, name in product((1, 4), ("latent", "action")):
        changed = {"latent": z.clone(), "action": action.clone()}
        changed[name][:, step:] = 5 * changed[name][:, step:].flip(0) + 1
        gap = _gap(predictor(changed["latent"], changed["action"]), following)[:, :step]
        if bool(gap.any()):
            early = int(gap.any(0).nonzero()[0])
            raise ContractError(
                f"predictor looks into the future: changing the {name} of step {step} changes its "
                f"output at step {early}"
            )


def _roll(
    name: str, rollout: Callable[[Tensor, Tensor], Tensor], z: Tensor, action: Tensor
) -> Tensor:
    future = _call(name, rollout, z, action)
    expected = (*action.shape[:-2], action.shape[-2] - z.shape[1] + 1, *z.shape[2:])
    promise = "one latent for every action from the last known step on"
    return _check_tensor(name, future, expected, promise)


def _check_rollout(fast: FastRollout, predictor: nn.Module, z: Tensor, action: Tensor) -> None:
    known = z.shape[1]
    future = _roll("predictor.rollout", fast.rollout, z, action)
    for step in range(known, action.shape[1] + 1):
        z = torch.cat([z, predictor(z, action[:, :step])[:, -1:]], 1)
    gap = _gap(future, z[:, known:])
    if bool(gap.any()):
        step = int(gap.any(0).nonzero()[0]) + 1
        raise ContractError(
            f"predictor.rollout differs from calling it step by step at step {step}"
        )


def _check_prefixes(prefix: PrefixRollout, predictor: nn.Module, z: Tensor, action: Tensor) -> None:
    name, known = "predictor.rollout_prefixes", z.shape[1]

    def roll(*plans: Tensor) -> Tensor:
        return _roll(name, prefix.rollout_prefixes, z, torch.stack(plans, 1))[:, 0]

    future = roll(action)
    following = predictor(z, action[:, :known])[:, -1:]
    if bool(_gap(future[:, :1], following).any()):
        raise ContractError(f"{name} differs from calling the predictor at step 1")
    if bool(_gap(roll(action, 1 - action), future).any()):
        raise ContractError(f"{name} mixes plans: what one leads to depends on another")
    for step in range(1, future.shape[1]):
        changed = action.clone()
        changed[:, known - 1 + step] += 1
        moved = _gap(roll(changed), future).any(0)
        if bool(moved[:step].any()):
            early = int(moved.nonzero()[0]) + 1
            raise ContractError(f"{name} shows an action of step {step + 1} at step {early}")
        if not bool(moved[step:].all()):
            late = step + 1 + int((~moved[step:]).nonzero()[0])
            raise ContractError(f"{name} ignores the action of step {step + 1} at step {late}")
    if prefix.span < future.shape[1]:
        reached, rest = (
            future[:, prefix.span - 1 : prefix.span],
            action[:, known - 1 + prefix.span :],
        )
        onward = _roll(name, prefix.rollout_prefixes, reached, rest[:, None])[:, 0]
        if bool(_gap(onward, future[:, prefix.span :]).any()):
            raise ContractError(f"{name} does not go on from the latent after its span of steps")


def _check_gradients(
    part: str, module: nn.Module, inputs: dict[str, Tensor], *, needed: tuple[str, ...]
) -> None:
    weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
    sources = {name: inputs[name].requires_grad_() for name in needed}
    sources |= {f"parameter {name}": p for name, p in weights.items()}
    if not sources:
        return
    with torch.enable_grad():
        output: Tensor = module.train()(*inputs.values())
        if not output.requires_grad:
            raise ContractError(f"{part} returned a tensor without gradient")
        weighted = (output * torch.linspace(0.5, 1.5, output.shape[-1]).to(output)).sum()
        gradients = cast(
            tuple[Tensor | None, ...],
            torch.autograd.grad(weighted, list(sources.values()), allow_unused=True),
        )
    for name, gradient in zip(sources, gradients, strict=True):
        if gradient is None:
            raise ContractError(f"{part} passes no gradient to {name}")
        if not bool(gradient.isfinite().all()):
            raise ContractError(f"{part} passes NaN or infinity as the gradient of {name}")


class _Pursuit:
    """The squared distance of actions to a target; an action leads to the latent equal to it."""

    def __init__(self, low: Tensor, high: Tensor, target: Float[Tensor, "b h a"]) -> None:
        self.low, self.high, self.target = low, high, target
        self.weight = nn.Parameter(torch.ones((), dtype=target.dtype))

    def __call__(self, plans: Float[Tensor, "b s h a"]) -> Float[Tensor, "b s"]:
        return self.score(self.imagine(plans), plans)

    def imagine(self, plans: Float[Tensor, "b s h a"]) -> Float[Tensor, "b s h n d"]:
        shape = (len(self.target), *self.target.shape[1:])
        if plans.ndim != 4 or (len(plans), *plans.shape[2:]) != shape:
            expected = f"({shape[0]}, samples, {shape[1]}, {shape[2]})"
            raise ContractError(f"planner evaluated {tuple(plans.shape)}, expected {expected}")
        _check_bounds("evaluated", plans, self.low, self.high)
        return self.weight * plans.unsqueeze(3)

    def foresee(
        self, z: Float[Tensor, "b s h n d"], plans: Float[Tensor, "b s h a"]
    ) -> Float[Tensor, "b s h n d"]:
        return self.imagine(plans)

    def score(
        self, z: Float[Tensor, "b s h n d"], plans: Float[Tensor, "b s h a"]
    ) -> Float[Tensor, "b s"]:
        return (z.squeeze(3) - self.target[:, None]).square().sum((-1, -2))


class _Holed(_Pursuit):
    """The same, but not finite where the first action lies above the middle of its range."""

    def score(
        self, z: Float[Tensor, "b s h n d"], plans: Float[Tensor, "b s h a"]
    ) -> Float[Tensor, "b s"]:
        hole = plans[:, :, 0, 0] > (self.low[0] + self.high[0]) / 2
        values = plans.new_tensor([[torch.nan], [-torch.inf]])
        return super().score(z, plans).where(~hole, values)


def _plan(planner: Planner, cost: _Pursuit, start: Tensor) -> Tensor:
    plan = planner(cost, start)
    _check_tensor("planner", plan, tuple(start.shape), "one plan for every episode")
    if (plan.dtype, plan.device) != (start.dtype, start.device):
        given, expected = f"{plan.dtype} on {plan.device}", f"{start.dtype} on {start.device}"
        raise ContractError(f"planner returned {given}, expected {expected}: those of `start`")
    _check_bounds("returned", plan, cost.low, cost.high)
    return plan


def _check_episodes_apart(
    build: Callable[[], Planner], cost: _Pursuit, start: Tensor, plan: Tensor
) -> None:
    others = _Pursuit(cost.low, cost.high, torch.cat([cost.target[:1], cost.target[:1]]))
    beside = _plan(build(), others, torch.cat([start[:1], cost.target[1:]]))
    alone = _plan(build(), _Pursuit(cost.low, cost.high, cost.target[:1]), start[:1])
    span = cost.high - cost.low
    for other in (beside, alone):
        if bool(((other[:1] - plan[:1]).abs() > 1e-3 * span).any()):
            raise ContractError("planner mixes episodes: the plan of one depends on the others")


def _check_finite_chosen(build: Callable[[], Planner], cost: _Pursuit, start: Tensor) -> None:
    holed = _Holed(cost.low, cost.high, cost.target)
    plan = _plan(build(), holed, start)
    if not bool(holed(plan[:, None]).isfinite().all()):
        raise ContractError("planner returned a plan whose cost is not finite")


def _check_bounds(verb: str, actions: Tensor, low: Tensor, high: Tensor) -> None:
    if not bool(((actions >= low) & (actions <= high)).all()):
        raise ContractError(f"planner {verb} an action outside its bounds")


def _check_spaces(env: gymnasium.Env[Any, Any]) -> None:
    action: Any = env.action_space
    observation: Any = env.observation_space
    boxes = [isinstance(space, gymnasium.spaces.Box) for space in (action, observation)]
    if not boxes[0] or np.any(action.low != -1) or np.any(action.high != 1):
        raise ContractError(f"env has action space {action}, expected a Box in [-1, 1]")
    if not boxes[1] or observation.dtype != np.dtype(np.uint8):
        raise ContractError(f"env has observation space {observation}, expected a Box of uint8")
    if len(observation.shape) != 3:
        raise ContractError(f"env has observations {observation.shape}, expected (hh, ww, c)")


def _episode(env: gymnasium.Env[Any, Any], *, seed: int) -> np.ndarray:
    """Return the goal and four frames under a seed, after checking `info` at each."""
    observation, info = env.reset(seed=seed)
    frames: list[Any] = [_goal(env, info), observation]
    for action in _actions(env, 3):
        observation, _, _, _, info = env.step(action)
        _goal(env, info)
        frames.append(observation.copy())
    return np.stack(frames)


def _actions(env: gymnasium.Env[Any, Any], *shape: int) -> np.ndarray:
    space: Any = env.action_space
    return np.random.default_rng(0).uniform(-1, 1, (*shape, *space.shape)).astype(space.dtype)


def _goal(env: gymnasium.Env[Any, Any], info: dict[str, Any]) -> Any:
    if missing := {"goal", "success"} - set(info):
        raise ContractError(f"env gives no info {sorted(missing)}")
    if not env.observation_space.contains(info["goal"]):
        raise ContractError("env gives an info['goal'] that is not in its observation space")
    if not isinstance(info["success"], bool):
        kind = type(info["success"]).__name__
        raise ContractError(f"env gives info['success'] as {kind}, expected bool")
    return info["goal"].copy()


def _check_start_is_goal(env: gymnasium.Env[Any, Any], configuration: Any) -> None:
    options = {"start": configuration, "goal": configuration}
    observation, info = env.reset(seed=1, options=options)
    if not (np.array_equal(observation, info["goal"]) and info["success"]):
        raise ContractError("env started at the goal, but the frame or `success` disagrees")


def _check_configuration(env: gymnasium.Env[Any, Any]) -> None:
    seen, info = env.reset(seed=1)
    for action in _actions(env, 3):
        seen, *_, info = env.step(action)
    there: Any = np.array(info["configuration"])
    again, info = env.reset(seed=1, options={"start": there})
    if not np.allclose(info["configuration"], there, atol=1e-6):
        raise ContractError("env set to start at an info['configuration'] starts somewhere else")
    if np.abs(again.astype(int) - seen).mean() > 1:
        raise ContractError("env shows another picture where info['configuration'] is the same")
    _check_start_is_goal(env, there)


def _check_factors(env: gymnasium.Env[Any, Any]) -> None:
    plain, info = env.reset(seed=1)
    varied, drawn = env.reset(seed=1, options={"factors": "random"})
    again, _ = env.reset(seed=1, options={"factors": drawn["factors"]})
    after, _ = env.reset(seed=1)
    if not np.array_equal(info["configuration"], drawn["configuration"]):
        raise ContractError("env starts elsewhere under other factors of the same seed")
    if np.array_equal(plain, varied):
        raise ContractError("env shows the same picture under random factors")
    if not np.array_equal(varied, again):
        raise ContractError("env given its info['factors'] shows another picture")
    if not np.array_equal(plain, after):
        raise ContractError("env keeps factors of an earlier episode")


def _check_script(
    name: str,
    script: Callable[[np.random.Generator], Iterator[Any]],
    env: gymnasium.Env[Any, Any],
) -> None:
    played: list[Any] = []
    for _ in range(2):
        env.reset(seed=3)
        actions = script(np.random.default_rng(0))
        for _ in range(5):
            action = np.asarray(next(actions)).astype(np.float32)
            if not env.action_space.contains(action):
                raise ContractError(f"env.{name} yields {action}, not in {env.action_space}")
            env.step(action)
            played.append(action)
    if not np.array_equal(played[:5], played[5:]):
        raise ContractError(f"env.{name} yields other actions from the same generator")


def _check_quantities(named: NamedStateEnv, info: dict[str, Any]) -> None:
    for entry, quantities in named.quantities.items():
        names, width = {quantity[0] for quantity in quantities}, np.size(info.get(entry, ()))
        if not len(names) == len(quantities) == width:
            raise ContractError(
                f"env.quantities has {len(names)} different names for the {width} numbers of "
                f"info[{entry!r}]"
            )


def _check_implausible(changed: ImplausibleEnv, env: gymnasium.Env[Any, Any]) -> None:
    before = env.reset(seed=3)[0]
    action = np.zeros(env.action_space.shape or (), np.float32)
    after = env.step(action)[0]
    env.reset(seed=3)
    for name, picture in changed.implausible(np.random.default_rng(0)).items():
        if picture.shape != before.shape or np.array_equal(picture, before):
            raise ContractError(f"env.implausible shows for {name!r} the present picture, or none")
    if not np.array_equal(env.step(action)[0], after):
        raise ContractError("env.implausible changed what comes next")


def _check_distances(simulator: SimulatorEnv, env: gymnasium.Env[Any, Any]) -> None:
    actions = _actions(env, 2, 3)
    env.reset(seed=2)
    before = simulator.goal_distance()
    if not simulator.tolerance > 0:
        raise ContractError(f"env has tolerance {simulator.tolerance}, expected a distance")
    foreseen = simulator.goal_distances(actions)
    if foreseen.shape != (2, 3):
        raise ContractError(f"env.goal_distances returned {foreseen.shape}, expected (2, 3)")
    if simulator.goal_distance() != before:
        raise ContractError("env.goal_distances moved the environment")
    for step, action in enumerate(actions[0]):
        *_, info = env.step(action)
        if info["success"] != (simulator.goal_distance() <= simulator.tolerance):
            raise ContractError("env's `success` disagrees with its distance and tolerance")
        if not np.isclose(foreseen[0, step], simulator.goal_distance(), atol=1e-6):
            raise ContractError(f"env.goal_distances disagrees with what happens at step {step}")
