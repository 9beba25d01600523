import copy
import re

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from jepa_world.nn import BatchNorm
from jepa_world.objectives import summed_distance
from jepa_world.registry import UserError
from jepa_world.testing import (
    ContractError,
    check_encoder,
    check_env,
    check_masked_predictor,
    check_objective,
    check_planner,
    check_predictor,
)


class MyPredictor(nn.Module):
    """A right one: z + W [z, a]."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, z, action):
        action = action.unsqueeze(2).expand(-1, -1, z.shape[2], -1)
        return z + self.linear(torch.cat([z, action], -1))


class LastStepOnly(MyPredictor):
    def forward(self, z, action):
        return super().forward(z, action)[:, -1:]


class SeesLaterLatents(MyPredictor):
    def forward(self, z, action):
        return super().forward(z.mean(1, keepdim=True).expand_as(z), action)


class SeesNextAction(MyPredictor):
    def forward(self, z, action):
        return super().forward(z, torch.cat([action[:, 1:], action[:, -1:]], 1))


class Noisy(MyPredictor):
    def forward(self, z, action):
        return super().forward(z, action) + torch.randn_like(z)


class NotANumber(MyPredictor):
    def forward(self, z, action):
        return super().forward(z, action).log()


class Detached(MyPredictor):
    def forward(self, z, action):
        return super().forward(z, action).detach()


class IgnoresAction(MyPredictor):
    def forward(self, z, action):
        return super().forward(z, torch.zeros_like(action))


class UnusedWeight(MyPredictor):
    def __init__(self):
        super().__init__()
        self.spare = nn.Linear(2, 2)


class MixesBatch(MyPredictor):
    def forward(self, z, action):
        return super().forward(z - z.mean(0), action)


class Crashes(MyPredictor):
    def forward(self, z, action):
        return super().forward(z, action[..., :1])


class ReturnsTuple(MyPredictor):
    def forward(self, z, action):
        return super().forward(z, action), None


class WrongRollout(MyPredictor):
    def rollout(self, z, action):
        return self(z[:, -1:].expand(-1, action.shape[1] - z.shape[1] + 1, -1, -1), action[:, 1:])


@pytest.mark.parametrize(
    ("predictor", "promise"),
    [
        (LastStepOnly, "returned (3, 1, 1, 4), expected (3, 5, 1, 4): one latent for every input"),
        (SeesLaterLatents, "looks into the future: changing the latent of step 1 changes its outp"),
        (SeesNextAction, "looks into the future: changing the action of step 1 changes its output"),
        (Noisy, "predictor is not deterministic in evaluation mode"),
        (NotANumber, "predictor returned NaN or infinity"),
        (Detached, "predictor returned a tensor without gradient"),
        (IgnoresAction, "predictor passes no gradient to action"),
        (UnusedWeight, "predictor passes no gradient to parameter spare.weight"),
        (MixesBatch, "predictor mixes samples"),
        (Crashes, "predictor failed on input (3, 1, 1, 4), (3, 1, 2): RuntimeError: "),
        (ReturnsTuple, "predictor returned tuple, expected a tensor"),
        (WrongRollout, "predictor.rollout differs from calling it step by step at step 2"),
    ],
)
def test_broken_predictor_is_told_its_promise(predictor, promise):
    check_predictor(MyPredictor(), 4, 2)
    with pytest.raises(ContractError, match=re.escape(promise)):
        check_predictor(predictor(), 4, 2)


class MyPrefix(MyPredictor):
    """A right one: a latent k steps ahead has moved by the sum of the first k actions."""

    span = 4

    def rollout_prefixes(self, z, action):
        return self.step(z[:, -1:], action[:, :, z.shape[1] - 1 :].cumsum(2))

    def step(self, z, prefix):
        z, prefix = z[:, None].expand(-1, *prefix.shape[1:3], -1, -1), prefix.flatten(0, 1)
        return self(z.flatten(0, 1), prefix).unflatten(0, z.shape[:2])


class PrefixOfOldLatent(MyPrefix):
    def rollout_prefixes(self, z, action):
        return super().rollout_prefixes(z[:, :1].expand_as(z), action)


class PrefixOfWholePlan(MyPrefix):
    def rollout_prefixes(self, z, action):
        future = super().rollout_prefixes(z, action)
        return torch.cat([future[:, :, :1], future[:, :, -1:].expand_as(future[:, :, 1:])], 2)


class PrefixOfLastAction(MyPrefix):
    def rollout_prefixes(self, z, action):
        return self.step(z[:, -1:], action[:, :, z.shape[1] - 1 :])


class PrefixOfAllPlans(MyPrefix):
    def rollout_prefixes(self, z, action):
        return super().rollout_prefixes(z, action.mean(1, keepdim=True).expand_as(action))


class PrefixTooShort(MyPrefix):
    def rollout_prefixes(self, z, action):
        return super().rollout_prefixes(z, action)[:, :, 1:]


class PrefixBeyondItsSpan(MyPrefix):
    span = 2


@pytest.mark.parametrize(
    ("predictor", "promise"),
    [
        (PrefixOfOldLatent, "rollout_prefixes differs from calling the predictor at step 1"),
        (PrefixOfWholePlan, "rollout_prefixes shows an action of step 3 at step 2"),
        (PrefixOfLastAction, "rollout_prefixes ignores the action of step 2 at step 3"),
        (PrefixOfAllPlans, "rollout_prefixes mixes plans"),
        (PrefixTooShort, "rollout_prefixes returned (3, 1, 3, 1, 4), expected (3, 1, 4, 1, 4)"),
        (PrefixBeyondItsSpan, "rollout_prefixes does not go on from the latent after its span"),
    ],
)
def test_broken_prefix_rollout_is_told_its_promise(predictor, promise):
    check_predictor(MyPrefix(), 4, 2)
    with pytest.raises(ContractError, match=re.escape(promise)):
        check_predictor(predictor(), 4, 2)


@torch.inference_mode()
def test_check_works_in_inference_mode():
    check_predictor(MyPredictor(), 4, 2)


def test_contract_error_is_a_users_mistake_in_one_line():
    assert issubclass(ContractError, UserError)
    with pytest.raises(ContractError) as raised:
        check_predictor(Crashes(), 4, 2)
    assert "\n" not in str(raised.value)


class MyMaskedPredictor(nn.Module):
    """The mean of the context, and a table of positions."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 4)
        self.read = nn.Linear(4, 4)

    def forward(self, context, seen, unseen):
        return self.read(context + self.table(seen)).mean(1, keepdim=True) + self.table(unseen)


class NoPositions(MyMaskedPredictor):
    def forward(self, context, seen, unseen):
        return super().forward(context, seen, unseen * 0)


class SortsTargets(MyMaskedPredictor):
    def forward(self, context, seen, unseen):
        return super().forward(context, seen, unseen.sort(1).values)


class FirstOfTheContext(MyMaskedPredictor):
    def forward(self, context, seen, unseen):
        return super().forward(context[:, :1], seen[:, :1], unseen)


class OneTarget(MyMaskedPredictor):
    def forward(self, context, seen, unseen):
        return super().forward(context, seen, unseen[:, :1])


class IgnoresContext(MyMaskedPredictor):
    def forward(self, context, seen, unseen):
        return super().forward(context.detach(), seen, unseen)


class NoisyTargets(MyMaskedPredictor):
    def forward(self, context, seen, unseen):
        return super().forward(context, seen, unseen) + torch.randn(())


class MixesPictures(MyMaskedPredictor):
    def forward(self, context, seen, unseen):
        return super().forward(context, seen, unseen) + context.mean()


@pytest.mark.parametrize(
    ("predictor", "promise"),
    [
        (NoPositions, "does not tell the positions of targets apart"),
        (SortsTargets, "does not follow the order of its targets"),
        (FirstOfTheContext, "depends on the order of the context"),
        (OneTarget, "one latent for every target"),
        (IgnoresContext, "passes no gradient to context"),
        (NoisyTargets, "not deterministic"),
        (MixesPictures, "mixes samples"),
    ],
)
def test_broken_masked_predictor_is_told_its_promise(predictor, promise):
    torch.manual_seed(0)
    check_masked_predictor(MyMaskedPredictor(), 4, (1, 2, 4))
    with pytest.raises(ContractError, match=promise):
        check_masked_predictor(predictor(), 4, (1, 2, 4))


class MyEncoder(nn.Module):
    """A right one: each frame's pixels through batch norm and a linear map."""

    def __init__(self):
        super().__init__()
        self.dim, self.num_tokens = 4, 1
        self.norm = BatchNorm(48)
        self.linear = nn.Linear(48, 4)

    def forward(self, video, keep=None):
        z = self.linear(self.norm(video.flatten(2))).unsqueeze(2)
        return z if keep is None else z.flatten(1, 2).gather(1, keep[..., None].expand(-1, -1, 4))


class NoDim(MyEncoder):
    def __init__(self):
        super().__init__()
        del self.dim


class WrongDim(MyEncoder):
    def __init__(self):
        super().__init__()
        self.dim = 5


class VectorOnly(MyEncoder):
    def forward(self, video, keep=None):
        return super().forward(video, keep).squeeze(2)


class IgnoresKeep(MyEncoder):
    def forward(self, video, keep=None):
        return super().forward(video)


class SortsKeep(MyEncoder):
    def forward(self, video, keep=None):
        return super().forward(video, None if keep is None else keep.sort(1).values)


class MixesFrames(MyEncoder):
    def forward(self, video, keep=None):
        return super().forward(video - video.mean(1, keepdim=True), keep)


class DividesByZero(MyEncoder):
    def forward(self, video, keep=None):
        return super().forward(video / video.amax((2, 3, 4), keepdim=True), keep)


@pytest.mark.parametrize(
    ("encoder", "frames", "promise"),
    [
        (NoDim, 1, "encoder lacks an attribute: `dim` and `num_tokens`"),
        (WrongDim, 1, "encoder returned (3, 1, 1, 4), expected (3, 1, 1, 5)"),
        (VectorOnly, 1, "encoder returned (3, 1, 4), expected (3, 1, 1, 4)"),
        (IgnoresKeep, 3, "expected (3, 1, 4): (b k dim) with keep (b k)"),
        (SortsKeep, 3, "all tokens in `keep` differs"),
        (MixesFrames, 1, "not encoded each by itself"),
        (DividesByZero, 1, "encoder returned NaN or infinity for finite input"),
    ],
)
def test_broken_encoder_is_told_its_promise(encoder, frames, promise):
    check_encoder(MyEncoder(), (frames, 3, 4, 4))
    with pytest.raises(ContractError, match=re.escape(promise)):
        check_encoder(encoder(), (frames, 3, 4, 4))


@pytest.mark.parametrize("part", [MyEncoder, MyPredictor])
def test_checked_part_and_random_state_are_left_as_they_were(part):
    module = part().train()
    before, random = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    check_encoder(module, (1, 3, 4, 4)) if part is MyEncoder else check_predictor(module, 4, 2)
    assert module.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in module.parameters())
    torch.testing.assert_close(module.state_dict(), before, atol=0, rtol=0)


LOW, HIGH = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 2.0])


def middle(cost, start):
    plan = ((LOW + HIGH) / 2).to(start).expand_as(start)
    cost(plan[:, None])
    return plan


def unbounded(cost, start):
    cost(start[:, None] + 1.0)
    return middle(cost, start)


def returns_start(cost, start):
    return start.clone()


def overwrites_start(cost, start):
    return start.mul_(0.5)


def last_step(cost, start):
    return start[:, -1:]


def flattens(cost, start):
    cost(start)
    return middle(cost, start)


def unseeded(cost, start):
    return middle(cost, start) + 0.01 * torch.randn_like(start)


def draws_globally(cost, start):
    torch.rand(1)
    return middle(cost, start)


def trains_the_model(cost, start):
    with torch.enable_grad():
        cost(start[:, None]).sum().backward()
    return middle(cost, start)


def single(cost, start):
    return middle(cost, start).float()


def averages(cost, start):
    return 0.9 * middle(cost, start) + 0.1 * start.mean(0)


def least_whatever_it_is(cost, start):
    plans = torch.stack([middle(cost, start), HIGH.to(start).expand_as(start)], 1)
    return plans[torch.arange(len(start)), cost(plans).argmin(1)]


@pytest.mark.parametrize(
    ("planner", "promise"),
    [
        (unbounded, "planner evaluated an action outside its bounds"),
        (returns_start, "planner returned a plan no better than its start"),
        (overwrites_start, "planner changed `start` in place"),
        (last_step, "planner returned (2, 1, 2), expected (2, 3, 2)"),
        (flattens, "planner evaluated (2, 3, 2), expected (2, samples, 3, 2)"),
        (unseeded, "planner returned two plans under the same seed"),
        (draws_globally, "planner drew from the global random state"),
        (trains_the_model, "planner left a gradient in a parameter behind the cost"),
        (single, "planner returned torch.float32 on cpu, expected torch.float64 on cpu"),
        (averages, "planner mixes episodes"),
        (least_whatever_it_is, "planner returned a plan whose cost is not finite"),
    ],
)
def test_broken_planner_is_told_its_promise(planner, promise):
    check_planner(lambda: middle, LOW, HIGH, 3)
    with pytest.raises(ContractError, match=re.escape(promise)):
        check_planner(lambda: planner, LOW, HIGH, 3)


@pytest.mark.parametrize(
    ("objective", "promise"),
    [
        (lambda z, plans, goal: plans.square().sum(-1), "objective returned (2, 3, 4), expected"),
        (lambda z, plans, goal: plans[:, :, 0, 0].log(), "objective returned NaN or infinity"),
        (lambda z, goal: z.sum(), "objective failed on input (2, 3, 4, 1, 8), (2, 3, 4, 2)"),
        (lambda z, plans, goal: z.sum((2, 3, 4)) / z.std(), "objective mixes plans"),
    ],
)
def test_broken_objective_is_told_its_promise(objective, promise):
    check_objective(summed_distance, 1, 8, 4, 2)
    with pytest.raises(ContractError, match=re.escape(promise)):
        check_objective(objective, 1, 8, 4, 2)


class DotEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A right one: a bright pixel moves along a line; `goal_distances` is exact."""

    tolerance = 0.49
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)
    observation_space = gymnasium.spaces.Box(0, 255, (1, 8, 1), np.uint8)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        drawn = self.np_random.uniform(0, 7, 2)
        self.x = float((options or {}).get("start", drawn[0]))
        self.goal = float((options or {}).get("goal", drawn[1]))
        factors = (options or {}).get("factors", {"light": 1.0})
        random = {"light": self.np_random.uniform(0.2, 0.8)}
        self.light = (random if factors == "random" else factors)["light"]
        return self.picture(self.x), self.info()

    def step(self, action):
        self.x = float(np.clip(self.x + action[0], 0, 7))
        return self.picture(self.x), -self.goal_distance(), False, False, self.info()

    def picture(self, x):
        frame = np.zeros((1, 8, 1), np.uint8)
        frame[0, round(x)] = 255 * self.light
        return frame

    def info(self):
        return {
            "goal": self.picture(self.goal),
            "success": self.goal_distance() <= 0.49,
            "configuration": self.x,
            "factors": {"light": self.light},
        }

    def guide(self, generator):
        while True:
            yield generator.uniform(-1, 1, 1)

    def implausible(self, generator):
        return {"vanished": np.zeros((1, 8, 1), np.uint8)}

    def goal_distance(self):
        return abs(self.x - self.goal)

    def goal_distances(self, actions):
        x, distances = np.full(len(actions), self.x), []
        for step in range(actions.shape[1]):
            x = np.clip(x + actions[:, step, 0], 0, 7)
            distances.append(abs(x - self.goal))
        return np.stack(distances, 1)


class WideActions(DotEnv):
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)


class FloatFrames(DotEnv):
    observation_space = gymnasium.spaces.Box(0.0, 1.0, (1, 8, 1), np.float32)


class NoGoal(DotEnv):
    def info(self):
        return {"success": False}


class GoalAsPosition(DotEnv):
    def info(self):
        return {**super().info(), "goal": np.array([self.goal])}


class SuccessAsNumber(DotEnv):
    def info(self):
        return {**super().info(), "success": int(self.goal_distance() < 0.5)}


class Unseeded(DotEnv):
    calls = 0

    def picture(self, x):
        self.calls += 1
        return np.full((1, 8, 1), self.calls % 256, np.uint8)

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed, options=options)
        return (np.zeros_like(observation) if options is None else observation), info


class NeverThere(DotEnv):
    def info(self):
        return {**super().info(), "success": False}


class StartsElsewhere(DotEnv):
    def info(self):
        return {**super().info(), "configuration": self.x + 0.1}


class KeepsFactors(DotEnv):
    def reset(self, *, seed=None, options=None):
        kept = {"factors": {"light": self.light}} if "light" in vars(self) else {}
        return super().reset(seed=seed, options=kept | (options or {}))


class FactorsMove(DotEnv):
    def reset(self, *, seed=None, options=None):
        moved = {"start": 1.0} if "factors" in (options or {}) else {}
        return super().reset(seed=seed, options=moved | (options or {}))


class Indifferent(DotEnv):
    def picture(self, x):
        self.light = 1.0
        return super().picture(x)


class WildGuide(DotEnv):
    def guide(self, generator):
        while True:
            yield np.array([3.0])


class MoodyGuide(DotEnv):
    moods = 0

    def guide(self, generator):
        while True:
            self.moods += 1
            yield np.array([0.01 * self.moods])


class Nameless(DotEnv):
    quantities = {"configuration": (("x", "m", 0.0), ("y", "m", 0.0))}  # noqa: RUF012


class SeesNothing(DotEnv):
    def implausible(self, generator):
        return {"teleport": self.picture(self.x)}


class ReallyMoves(DotEnv):
    def implausible(self, generator):
        self.x = (self.x + 4) % 7
        return {"teleport": self.picture(self.x)}


class Lenient(DotEnv):
    tolerance = 100.0


class Foresees(DotEnv):
    def goal_distances(self, actions):
        return super().goal_distances(actions) + 1.0


@pytest.mark.parametrize(
    ("env", "promise"),
    [
        (WideActions, "expected a Box in [-1, 1]"),
        (FloatFrames, "expected a Box of uint8"),
        (NoGoal, "env gives no info ['goal']"),
        (GoalAsPosition, "env gives an info['goal'] that is not in its observation space"),
        (SuccessAsNumber, "env gives info['success'] as int, expected bool"),
        (NeverThere, "env started at the goal, but the frame or `success` disagrees"),
        (StartsElsewhere, "env set to start at an info['configuration'] starts somewhere else"),
        (KeepsFactors, "env keeps factors of an earlier episode"),
        (FactorsMove, "env starts elsewhere under other factors of the same seed"),
        (Indifferent, "env shows the same picture under random factors"),
        (WildGuide, "env.guide yields [3.], not in"),
        (MoodyGuide, "env.guide yields other actions from the same generator"),
        (Nameless, "env.quantities has 2 different names for the 1 numbers of"),
        (SeesNothing, "env.implausible shows for 'teleport' the present picture"),
        (ReallyMoves, "env.implausible changed what comes next"),
        (Lenient, "env's `success` disagrees with its distance and tolerance"),
        (Foresees, "env.goal_distances disagrees with what happens at step 0"),
    ],
)
def test_broken_env_is_told_its_promise(env, promise):
    check_env(DotEnv(), configuration=3.0)
    with pytest.raises(ContractError, match=re.escape(promise)):
        check_env(env(), configuration=3.0)


def test_env_that_differs_under_one_seed_is_told():
    with pytest.raises(ContractError, match=r"same seed"):
        check_env(Unseeded())
