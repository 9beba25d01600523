import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from jepa_world import envs
from jepa_world.envs.blocks import ActionBlocks
from jepa_world.evaluation import (
    Episode,
    RandomPolicy,
    Rate,
    Separation,
    SimulatorPolicy,
    plan_seconds,
    run_episode,
    success_end,
    success_ever,
    unsolved_seeds,
)
from jepa_world.planners.cem import CEM
from jepa_world.registry import UserError

PICTURE = np.zeros((4, 4, 3), np.uint8)


class Walk(gym.Env):
    """A point on a line that begins a seed's number from its goal, at 0, in steps of an action."""

    observation_space = gym.spaces.Box(0, 255, PICTURE.shape, np.uint8)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, missing=()):
        self.missing = missing

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = float((seed or 0) % 4)
        return PICTURE, self.info()

    def step(self, action):
        self.position += float(action[0])
        return PICTURE, 0.0, False, False, self.info()

    def info(self):
        info = {"goal": PICTURE, "success": abs(self.position) < 0.5}
        return {key: value for key, value in info.items() if key not in self.missing}


class Measured(Walk):
    """The same, with true distances."""

    tolerance = 0.5

    def goal_distance(self):
        return abs(self.position)

    def goal_distances(self, actions):
        return np.abs(self.position + actions[..., 0].cumsum(-1))


class Constant:
    """Act always the same."""

    def __init__(self, action):
        self.action, self.resets = np.array([action], np.float32), 0

    def reset(self, goal):
        self.resets += 1

    def act(self, observation):
        return self.action


@pytest.fixture(scope="module")
def reach():
    env = envs.make("reach", size=16)
    yield env
    env.close()


@pytest.mark.parametrize(  # known values: Brown, Cai and DasGupta 2001; R binom.confint(wilson)
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (1, 1, 0.207, 1.0), (5, 10, 0.237, 0.763),
     (198, 200, 0.964, 0.997), (8, 20, 0.219, 0.613)],
)  # fmt: skip
def test_wilson_interval_has_the_known_values(successes, n, low, high):
    rate = Rate.of([True] * successes + [False] * (n - successes))
    assert (rate.rate, rate.n) == (pytest.approx(successes / n, abs=5e-5), n)
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=1e-3)


def test_wilson_interval_covers_the_truth_about_19_times_of_20():
    random = np.random.default_rng(0)
    rates = [Rate.of(random.random(50) < 0.9) for _ in range(2000)]
    covered = np.mean([rate.low <= 0.9 <= rate.high for rate in rates])
    assert 0.93 < covered < 0.975


def test_success_at_the_end_is_not_success_ever():
    passing = Episode(0, [1.0, 0.01, 0.5], [])
    arriving = Episode(1, [1.0, 0.5, 0.05], [])
    begun_solved = Episode(2, [0.0, 0.5, 0.5], [])
    episodes = [passing, arriving, begun_solved]
    assert success_end(episodes, 0.05).rate == pytest.approx(1 / 3, abs=1e-3)
    assert success_ever(episodes, 0.05).rate == pytest.approx(2 / 3, abs=1e-3)


@pytest.mark.parametrize("env", [Walk(), Measured()])
def test_starts_that_are_solved_are_replaced(env):
    seeds = unsolved_seeds(env, 30, 0, 0.4)
    assert len(seeds) == len(set(seeds)) == 30
    assert all(seed % 4 for seed in seeds)


def test_other_seeds_are_other_episodes_and_the_same_are_the_same():
    drawn = [unsolved_seeds(Measured(), 50, seed, 0.4) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] and not set(drawn[0]) & set(drawn[2])


def test_an_env_that_is_nearly_always_solved_is_refused():
    with pytest.raises(UserError, match="nearly all episodes begin within the tolerance 10"):
        unsolved_seeds(Measured(), 5, 0, 10)


@pytest.mark.parametrize("name", ["goal", "success"])
def test_an_env_without_goal_or_success_is_refused(name):
    with pytest.raises(UserError, match=rf"gives no info\['{name}'\]"):
        unsolved_seeds(Walk(missing=(name,)), 5, 0, 0.1)


def test_an_episode_lasts_its_budget_whether_or_not_the_goal_is_passed():
    seen, policy = [], Constant(-1.0)
    episode = run_episode(Measured(), policy, 2, 5, watch=seen.append)
    assert episode.distances == [2, 1, 0, 1, 2, 3]
    assert len(episode.seconds) == 5 and len(seen) == 6 and policy.resets == 1


def test_an_env_without_distances_counts_success_alone():
    episode = run_episode(Walk(), Constant(-1.0), 2, 4)
    assert episode.distances == [math.inf, math.inf, 0, math.inf, math.inf]


def test_random_actions_are_the_floor_and_the_simulator_is_the_ceiling(reach):
    seeds = unsolved_seeds(reach, 6, 0, 0.05)
    low, high = torch.from_numpy(reach.action_space.low), torch.from_numpy(reach.action_space.high)
    ceiling = SimulatorPolicy(reach.unwrapped, CEM(low, high, 8), torch.zeros(8, 2))
    floor = RandomPolicy(reach.action_space, 0)
    perfect, chance = (
        [run_episode(reach, policy, seed, 15) for seed in seeds] for policy in (ceiling, floor)
    )
    assert success_end(perfect, 0.05).rate == 1.0
    assert success_end(chance, 0.05).rate <= 0.5


def test_the_simulator_is_the_ceiling_of_blocks_of_actions_too(reach):
    seeds, blocks = unsolved_seeds(reach, 4, 0, 0.05), ActionBlocks(reach, 2)
    low, high = -torch.ones(4), torch.ones(4)
    policy = SimulatorPolicy(reach.unwrapped, CEM(low, high, 5), torch.zeros(5, 4), stride=2)
    assert success_end([run_episode(blocks, policy, seed, 8) for seed in seeds], 0.05).rate == 1.0


def test_the_floor_repeats_under_its_seed():
    def walked(seed):
        policy = RandomPolicy(Walk().action_space, seed)
        return run_episode(Measured(), policy, 3, 6).distances

    assert walked(1) == walked(1) != walked(2)


def test_the_time_of_a_plan_is_its_median_and_95th_percentile():
    episodes = [Episode(0, [], [0.01] * 19), Episode(1, [], [0.5])]
    assert plan_seconds(episodes) == {"median": 0.01, "p95": pytest.approx(0.0345, abs=1e-4)}


def test_a_separation_is_the_share_of_pairs_in_order_and_never_without_an_interval():
    random = np.random.default_rng(0)
    usual, odd = random.normal(0, 1, 40).round(1), random.normal(1, 1, 60).round(1)
    found = Separation.of(usual, odd)
    pairs = [(o > u) + 0.5 * (o == u) for u in usual for o in odd]
    assert found.auroc == pytest.approx(np.mean(pairs), abs=1e-4) and found.n == 40
    assert found.low < found.auroc < found.high
    mirrored = Separation.of(odd, usual)
    assert mirrored.auroc == pytest.approx(1 - found.auroc, abs=1e-4)
    apart, same = Separation.of(range(50), range(50, 100)), Separation.of([1.0] * 50, [1.0] * 50)
    assert (apart.auroc, apart.high) == (1.0, 1.0) and 0.9 < apart.low < 1.0
    assert same.auroc == 0.5 and same.high - same.low == pytest.approx(0.22, abs=1e-3)


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_intervals_of_separations_hold_the_truth_19_times_of_20(shift):
    random = np.random.default_rng(1)
    truth = (1 + math.erf(shift / 2)) / 2  # of two normal distributions
    held = [
        found.low <= truth <= found.high
        for _ in range(400)
        if (found := Separation.of(random.normal(0, 1, 60), random.normal(shift, 1, 60)))
    ]
    assert 0.92 <= np.mean(held) <= 0.995
