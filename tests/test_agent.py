import pytest
import torch
from torch import nn

from jepa_world import SIGReg, WorldModel
from jepa_world.agent import Agent, summed_distance
from jepa_world.planners.cem import CEM

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
    torch.testing.assert_close(agent.imagine(plans).squeeze(3), expected)


def test_the_objective_prefers_to_arrive_early_and_to_stay():
    goal = torch.zeros(1, 1, 2)
    late, early, passing = (
        torch.tensor(x)[None, None, :, None, None].expand(1, 1, 3, 1, 2)
        for x in ([1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 2.0])
    )
    assert (
        summed_distance(early, goal) < summed_distance(late, goal) < summed_distance(passing, goal)
    )


def test_an_objective_of_ones_own_decides():
    def stay_out_of_the_left(z, goal):
        left = (z[..., 0] < -0.01).flatten(2).any(-1)
        return summed_distance(z, goal) + 1000 * left

    planner = CEM(LOW, HIGH, 4, iterations=8, min_std=0.01)
    agent = Agent(model(Mover()), planner, torch.zeros(4, 2), objective=stay_out_of_the_left)
    z = drive(agent, [[1.0, 0.0]], [[-2.0, 1.0]], 8)
    assert z[0, 0] > -0.15 and abs(z[0, 1] - 1.0) < 0.2
