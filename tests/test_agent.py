import pytest
import torch
from torch import nn

from jepa_world import SIGReg, WorldModel
from jepa_world.agent import Agent, GoalCost
from jepa_world.config import Part
from jepa_world.interfaces import LatentCost
from jepa_world.methods.world_model import rollout
from jepa_world.objectives import effort, keep_out, summed_distance, weighted_sum
from jepa_world.planners.cem import CEM
from jepa_world.predictors.adaln import AdaLNPredictor
from jepa_world.predictors.block_causal import BlockCausalPredictor
from jepa_world.predictors.mlp import MLPPredictor
from jepa_world.predictors.prefix import PrefixPredictor
from jepa_world.registry import PARTS

LOW, HIGH = -torch.ones(2), torch.ones(2)


class Position(nn.Module):
    """Encode a picture as the two numbers in its first pixel."""

    dim, num_tokens = 2, 1

    def forward(self, video, keep=None):
        return (video[:, :, :2, 0, 0] * 255 - 128).unsqueeze(2) / 10


class Mover(nn.Module):
    """z' = z + a: what a plan costs, and which plan is best, is known."""

    def forward(self, z, action):
        return z + action.unsqueeze(2)


class Delayed(nn.Module):
    """An action takes effect a step late: z'(t) = z(t) + a(t - 1)."""

    def forward(self, z, action):
        before = torch.cat([torch.zeros_like(action[:, :1]), action[:, :-1]], dim=1)
        return z + before.unsqueeze(2)


class PrefixMover(Mover):
    """The same, two actions at a time: z'' = z + a + a'."""

    span = 2

    def rollout_prefixes(self, z, action):
        actions = action[:, :, z.shape[1] - 1 :].unsqueeze(3)
        return z[:, None, -1:] + actions.cumsum(2)


class Recorder:
    """A planner that returns numbered plans and keeps what it was asked."""

    def __init__(self, horizon=3):
        self.horizon, self.starts = horizon, []

    def __call__(self, cost, start):
        self.starts.append(start.clone())
        assert cost(start[:, None].expand(-1, 5, -1, -1)).shape == (len(start), 5)
        number = torch.arange(self.horizon)[:, None] / 10 + len(self.starts)
        return number.expand(len(start), self.horizon, 2).clone()


def picture(*positions):
    """Draw each position, in tenths, as a picture."""
    frames = torch.zeros(len(positions), 4, 4, 3, dtype=torch.uint8)
    frames[:, 0, 0, :2] = (torch.tensor(positions) * 10 + 128).round().byte()
    return frames


def model(predictor):
    return WorldModel(Position(), predictor, SIGReg(), weight=0.0)


def drive(agent, start, goal, steps, *, delayed=False):
    """Act in the true system, which is the model's."""
    z, before = torch.tensor(start), torch.zeros(len(start), 2)
    agent.reset(picture(*goal))
    for _ in range(steps):
        action = agent.act(picture(*z.tolist()))
        z, before = z + (before if delayed else action), action
    return z


def test_it_reaches_the_goals_of_all_episodes():
    agent = Agent(model(Mover()), CEM(LOW, HIGH, 4, min_std=0.01), torch.zeros(4, 2))
    goals = [[2.5, -1.5], [-3.0, 0.0], [0.0, 0.0]]
    z = drive(agent, [[0.0, 0.0], [0.5, 0.5], [0.0, 0.0]], goals, 8)
    assert (z - torch.tensor(goals)).abs().max() < 0.2


def test_with_history_it_knows_the_action_that_is_still_to_take_effect():
    def missed(history):
        planner = CEM(LOW, HIGH, 4, iterations=8, min_std=0.01)
        agent = Agent(model(Delayed()), planner, torch.zeros(4, 2), history=history)
        z = drive(agent, [[0.0, 0.0]], [[2.0, -2.0]], 12, delayed=True)
        return (z - torch.tensor([[2.0, -2.0]])).abs().max()

    assert missed(2) < 0.2 and missed(3) < 0.2
    assert missed(1) > 2 * missed(2)


def test_each_search_starts_from_the_rest_of_the_last_plan():
    planner = Recorder()
    agent = Agent(model(Mover()), planner, torch.full((3, 2), 0.5))
    agent.reset(picture([0.0, 0.0]))
    actions = [agent.act(picture([0.0, 0.0]))[0, 0].item() for _ in range(3)]
    starts = [start[0, :, 0].tolist() for start in planner.starts]
    assert actions == [1.0, 2.0, 3.0]
    assert starts[0] == [0.5, 0.5, 0.5]
    assert starts[1] == pytest.approx([1.1, 1.2, 0.0])
    assert starts[2] == pytest.approx([2.1, 2.2, 0.0])


@pytest.mark.parametrize("history", [1, 2, 4])
def test_latents_and_actions_of_the_past_belong_together(history):
    """Latent k and action k were seen and taken at the same step, whatever the history."""
    seen = []

    class Spy(nn.Module):
        def forward(self, z, action):
            seen.append((z[0, :, 0, 0].clone(), action[0, :, 0].clone()))
            return z + action.unsqueeze(2)

    agent = Agent(model(Spy()), Recorder(), torch.zeros(3, 2), history=history)
    agent.reset(picture([9.0, 9.0]))
    for step in range(6):
        seen.clear()
        agent.act(picture([float(step), 0.0]))
        z, action = seen[0]
        known = min(history, step + 1)
        assert z.tolist() == pytest.approx(list(range(step - known + 1, step + 1)), abs=1e-5)
        assert action[:-1].tolist() == list(range(step - known + 2, step + 1))  # plan k begins k


def test_a_new_episode_forgets_the_last_one():
    agent = Agent(model(Delayed()), CEM(LOW, HIGH, 4), torch.zeros(4, 2), history=3)
    first = drive(agent, [[0.0, 0.0]], [[1.0, 1.0]], 3, delayed=True)
    agent.planner = CEM(LOW, HIGH, 4)
    torch.testing.assert_close(
        drive(agent, [[0.0, 0.0]], [[1.0, 1.0]], 3, delayed=True), first, rtol=0, atol=0
    )


def test_imagination_is_the_rollout_of_the_model():
    agent = Agent(model(Mover()), Recorder(), torch.zeros(3, 2))
    agent.reset(picture([0.0, 0.0]))
    agent.act(picture([1.0, -1.0]))
    plans = torch.rand(1, 7, 3, 2)
    expected = torch.tensor([1.0, -1.0]) + plans.cumsum(2)
    torch.testing.assert_close(agent.cost.imagine(plans).squeeze(3), expected)


PLANNERS = sorted(set(PARTS["planner"]) - {"random_shooting"})


def drive_by(name, start, goal, objective, steps=10, predictor=Mover):
    planner = Part(name).build("planner", LOW, HIGH, 6)
    agent = Agent(model(predictor()), planner, torch.zeros(6, 2), objective=objective)
    return drive(agent, [start], [goal], steps)[0]


@pytest.mark.parametrize("predictor", [Mover, PrefixMover])
@pytest.mark.parametrize("name", PLANNERS)
def test_every_planner_reaches_the_goal(name, predictor):
    z = drive_by(name, [0.0, 0.0], [2.5, -1.5], summed_distance, predictor=predictor)
    assert (z - torch.tensor([2.5, -1.5])).abs().max() < 0.25


def test_an_objective_of_ones_own_decides():
    def stay_out_of_the_left(z, plans, goal):
        left = (z[..., 0] < -0.01).flatten(2).any(-1)
        return summed_distance(z, plans, goal) + 1000 * left

    planner = CEM(LOW, HIGH, 4, iterations=8, min_std=0.01)
    agent = Agent(model(Mover()), planner, torch.zeros(4, 2), objective=stay_out_of_the_left)
    z = drive(agent, [[1.0, 0.0]], [[-2.0, 1.0]], 8)
    assert z[0, 0] > -0.15 and abs(z[0, 1] - 1.0) < 0.2


@pytest.mark.parametrize("name", PLANNERS)
def test_constraints_are_costs_beside_the_goal_s(name):
    """A goal within the place to keep out of is approached to its edge; effort holds back."""
    place = keep_out(torch.zeros(1, 1, 2), radius=2.0)
    z = drive_by(name, [4.0, 0.0], [0.0, 0.0], weighted_sum((1.0, summed_distance), (20.0, place)))
    assert 1.7 < z.norm() < 2.4
    z = drive_by(
        name, [4.0, 0.0], [0.0, 0.0], weighted_sum((1.0, summed_distance), (100.0, effort))
    )
    assert z.norm() > 3.0


STEPWISE = ["mlp", "adaln", "block_causal", "of ones own"]


@pytest.fixture(params=[*STEPWISE, "prefix"])
def cost(request):
    """Return the cost of an agent that has seen two frames, for two episodes."""
    predictors = {
        "mlp": lambda: MLPPredictor(4, 2, width=16, history=2),
        "adaln": lambda: AdaLNPredictor(4, 2, width=16, depth=2, heads=2),
        "block_causal": lambda: BlockCausalPredictor(4, 2, width=32, depth=2, heads=2),
        "prefix": lambda: PrefixPredictor(4, 2, width=16, depth=1, heads=2, span=2),
        "of ones own": Delayed,
    }
    predictor = predictors[request.param]()
    dim = 2 if request.param == "of ones own" else 4
    generator = torch.Generator().manual_seed(0)
    for parameter in predictor.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    z, goal = (torch.randn(2, t, 1, dim, generator=generator) for t in (2, 1))
    actions = torch.rand(2, 1, 2, generator=generator)
    return GoalCost(model(predictor), z, actions, goal[:, 0], summed_distance)


def test_an_agent_s_cost_offers_its_latents_and_a_rollout_is_what_it_foresees(cost):
    plans = torch.rand(2, 3, 5, 2, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert isinstance(cost, LatentCost)
    z = cost.imagine(plans)
    torch.testing.assert_close(cost.foresee(z, plans), z)
    torch.testing.assert_close(cost(plans), cost.score(z, plans))


def test_it_foresees_each_step_from_the_latents_before_it_alone(cost):
    generator = torch.Generator().manual_seed(1)
    plans = torch.rand(2, 3, 5, 2, generator=generator) * 2 - 1
    z = torch.randn(2, 3, 5, 1, cost.z.shape[-1], generator=generator)
    foreseen = cost.foresee(z, plans)
    later = z.clone()
    later[:, :, 2:] += 1
    torch.testing.assert_close(cost.foresee(later, plans)[:, :, :3], foreseen[:, :, :3])
    first = cost.imagine(plans)[:, :, :1]
    torch.testing.assert_close(foreseen[:, :, :1], first)
    assert not torch.allclose(foreseen[:, :, 1:], cost.imagine(plans)[:, :, 1:])


@pytest.mark.parametrize("cost", STEPWISE, indirect=True)
def test_slopes_of_its_cost_are_those_of_the_plain_rollout(cost):
    plans = torch.rand(2, 1, 5, 2, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (slope,) = torch.autograd.grad(cost(plans).sum(), plans)
    actions = torch.cat([cost.actions, plans[:, 0]], 1)
    z = rollout(cost.model.predictor, cost.z, actions)[:, None]
    (plain,) = torch.autograd.grad(cost.score(z, plans).sum(), plans)
    torch.testing.assert_close(slope, plain)


@pytest.mark.parametrize("predictor", [MLPPredictor, AdaLNPredictor, PrefixPredictor])
def test_half_precision_rates_nearly_the_same_plans_in_float32(predictor):
    model = WorldModel(Position(), predictor(2, 2), SIGReg(), weight=0.0).eval()
    for value in model.parameters():  # the last layer of a new predictor is zero
        nn.init.normal_(value, std=0.05)
    z, goal, plans = torch.randn(2, 1, 1, 2), torch.randn(2, 1, 2), torch.rand(2, 6, 4, 2)
    parts = (model, z, plans[:, 0, :0], goal, summed_distance)
    whole, half = GoalCost(*parts), GoalCost(*parts, half=True)
    with torch.no_grad():
        future = half.imagine(plans)
        assert future.dtype == torch.float32 and not torch.equal(future, whole.imagine(plans))
        torch.testing.assert_close(half(plans), whole(plans), rtol=0.05, atol=0.05)
        foreseen = half.foresee(future, plans)
        assert foreseen.dtype == torch.float32
        torch.testing.assert_close(foreseen, whole.foresee(future, plans), rtol=0.05, atol=0.05)


def test_an_agent_of_half_precision_acts_in_float32():
    model = WorldModel(Position(), MLPPredictor(2, 2), SIGReg(), weight=0.0)
    agents = [
        Agent(model, CEM(LOW, HIGH, 3), torch.zeros(3, 2), half=half) for half in (False, True)
    ]
    picture = torch.full((1, 8, 8, 3), 100, dtype=torch.uint8)
    acted = []
    for agent in agents:
        agent.reset(picture)
        acted.append(agent.act(picture))
        assert agent.cost.half is agent.half
    assert acted[1].dtype == torch.float32
    torch.testing.assert_close(*acted, rtol=0, atol=0.3)
