import gymnasium
import numpy as np
import pytest

from jepa_world.commands.plan import Planning, make_planners
from jepa_world.config import Part
from jepa_world.envs import make
from jepa_world.envs.blocks import ActionBlocks
from jepa_world.planners.grasp import GRASP
from jepa_world.search import SingleActions


@pytest.fixture
def pair():
    """The same environment twice, the second in blocks of three actions."""
    envs = make("reach", size=32), ActionBlocks(make("reach", size=32), 3)
    yield envs
    for env in envs:
        env.close()


def test_a_block_is_its_actions_one_by_one(pair):
    plain, blocks = pair
    assert blocks.action_space.shape == (6,)
    for env in pair:
        env.reset(seed=3)
    actions = np.random.default_rng(0).uniform(-1, 1, (4, 3, 2)).astype(np.float32)
    for block in actions:
        steps = [plain.step(action) for action in block]
        seen, total, terminated, truncated, info = blocks.step(block.reshape(6))
        assert np.array_equal(seen, steps[-1][0])
        assert total == pytest.approx(sum(float(step[1]) for step in steps))
        assert not (terminated or truncated) and isinstance(info["success"], bool)
    assert plain.unwrapped.goal_distance() == blocks.unwrapped.goal_distance()


def test_a_block_ends_with_the_episode():
    env = ActionBlocks(gymnasium.wrappers.TimeLimit(make("reach", size=32).unwrapped, 5), 3)
    env.reset(seed=0)
    ends = [env.step(np.zeros(6, np.float32))[3] for _ in range(2)]
    assert ends == [False, True]
    env.close()


def test_blocks_are_planned_action_by_action_unless_a_planner_needs_their_latents(pair):
    plain, blocks = pair
    for env, planner, kind in ((blocks, "icem", SingleActions), (blocks, "grasp", GRASP)):
        build, start = make_planners(Planning(planner=Part(planner), horizon=4), env)
        assert isinstance(build(0), kind) and start.shape == (4, 6)
    assert not isinstance(make_planners(Planning(), plain)[0](0), SingleActions)
