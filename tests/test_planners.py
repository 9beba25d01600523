import pytest
import torch

from jepa_world.planners.cem import CEM
from jepa_world.planners.random_shooting import RandomShooting
from jepa_world.testing import check_planner

LOW, HIGH = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0])
PLANNERS = [CEM, RandomShooting]


def distance_to(target):
    return lambda actions: (actions - target).square().sum((-1, -2))


def rough(actions):
    """A cost without any slope to follow."""
    return (1000 * actions).sin().sum((-1, -2))


@pytest.mark.parametrize("planner", PLANNERS)
def test_planner_keeps_its_contract(planner):
    low, high = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([1.0, 0.5, 8.0])
    check_planner(lambda: planner(low, high, 6), low, high, 6)


def test_cem_finds_the_optimum_of_a_quadratic():
    target = torch.linspace(-0.8, 0.8, 10).view(5, 2)
    search = CEM(LOW, HIGH, 5, samples=128, iterations=20, correlation=0.5)
    assert (search(distance_to(target), torch.zeros(1, 5, 2)) - target).abs().max() < 0.05


def test_cem_is_better_than_random_shooting_with_as_many_samples():
    cost, start = distance_to(0.5), torch.zeros(1, 10, 2)
    found = [cost(planner(LOW, HIGH, 10)(cost, start)) for planner in PLANNERS]
    assert found[0] < 0.3 * found[1]


def test_cem_reaches_a_bound_when_the_optimum_lies_outside():
    plan = CEM(LOW, HIGH, 5, iterations=8)(distance_to(3.0), torch.zeros(1, 5, 2))
    assert plan.max() <= 1.0
    assert plan.min() > 0.95


@pytest.mark.parametrize("planner", PLANNERS)
def test_plan_of_an_episode_does_not_depend_on_the_others(planner):
    target, start = torch.rand(3, 1, 5, 2) * 2 - 1, torch.zeros(3, 5, 2)
    together = planner(LOW, HIGH, 5)(distance_to(target), start)
    alone = planner(LOW, HIGH, 5)(distance_to(target[1:2]), start[1:2])
    torch.testing.assert_close(together[1:2], alone)


@pytest.mark.parametrize("planner", PLANNERS)
def test_seed_fixes_the_plans_and_each_call_draws_anew(planner):
    start = torch.full((1, 5, 2), -0.8)
    first, second = planner(LOW, HIGH, 5, seed=3), planner(LOW, HIGH, 5, seed=3)
    cost = distance_to(torch.linspace(-0.5, 0.5, 10).view(5, 2))
    plans = [[p(cost, start) for _ in range(2)] for p in (first, second)]
    assert torch.equal(plans[0][0], plans[1][0])
    assert torch.equal(plans[0][1], plans[1][1])
    assert not torch.equal(plans[0][0], plans[0][1])
    assert not torch.equal(plans[0][0], planner(LOW, HIGH, 5, seed=4)(cost, start))


@pytest.mark.parametrize("planner", PLANNERS)
def test_plan_is_never_worse_than_its_start(planner):
    search = planner(LOW, HIGH, 5, samples=16)
    for seed in range(20):
        start = torch.rand(4, 5, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        plan = search(rough, start)
        assert (rough(plan) <= rough(start) + 1e-3).all()


@pytest.mark.parametrize("planner", PLANNERS)
def test_samples_without_a_finite_cost_are_never_chosen(planner):
    def cost(actions):
        total = distance_to(0.3)(actions)
        return total.where(actions[..., 0, 0] < 0.0, torch.tensor([torch.nan, torch.inf])[0])

    plan = planner(LOW, HIGH, 2, samples=200)(cost, torch.full((1, 2, 2), -0.5))
    assert plan[0, 0, 0] < 0.0
    assert plan.isfinite().all()


@pytest.mark.parametrize("planner", PLANNERS)
def test_episode_without_a_finite_cost_is_named(planner):
    def cost(actions):
        return distance_to(0.0)(actions) * torch.tensor([[1.0], [torch.nan]])

    with pytest.raises(ValueError, match=r"finite cost in episodes \[1\]"):
        planner(LOW, HIGH, 2)(cost, torch.zeros(2, 2, 2))


def evaluated(planner, start):
    """Return the candidates of every iteration of a search without preference."""
    seen = []

    def cost(actions):
        seen.append(actions.clone())
        return torch.zeros(actions.shape[:2])

    planner(cost, start)
    return seen[:-1]  # the last holds the mean alone


def test_noise_is_correlated_in_the_first_half_and_white_in_the_second():
    low, high = torch.full((2,), -100.0), torch.full((2,), 100.0)
    options = {"std": 0.01, "min_std": 0.01, "momentum": 1.0, "keep_elites": 0}
    planner = CEM(low, high, 12, samples=4000, correlation=0.8, **options)
    for iteration, actions in enumerate(evaluated(planner, torch.zeros(1, 12, 2))):
        noise = actions[0, 1:]
        correlation = (noise[:, 1:] * noise[:, :-1]).mean() / noise.square().mean()
        assert abs(correlation - (0.8 if iteration < 3 else 0.0)) < 0.02
        torch.testing.assert_close(noise.std(0), torch.ones(12, 2), atol=0.05, rtol=0)


def test_mean_and_best_samples_are_evaluated_again():
    costs = []

    def cost(actions):
        costs.append(rough(actions))
        return costs[-1]

    CEM(LOW, HIGH, 5)(cost, torch.zeros(1, 5, 2))
    best = [c.min().item() for c in costs[:-1]]
    assert best == sorted(best, reverse=True)


def test_start_is_evaluated_and_clamped():
    start = torch.full((1, 3, 2), 5.0)
    assert torch.equal(evaluated(CEM(LOW, HIGH, 3), start)[0][0, 0], torch.ones(3, 2))


def test_spread_never_falls_below_its_minimum():
    planner = CEM(LOW, HIGH, 10, iterations=30, samples=256, min_std=0.1, keep_elites=0)
    last = []

    def cost(actions):
        last[:] = [actions, *last[:1]]
        return distance_to(0.0)(actions)

    planner(cost, torch.zeros(1, 10, 2))
    assert abs(last[1][0, 1:].std() - 0.1) < 0.01


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ({"elites": 64}, "2, 64, 40"),
        ({"iterations": 0}, "0 and 0.95"),
        ({"correlation": 1.0}, "1.0"),
    ],
)
def test_cem_refuses_options_that_make_no_search(option, given):
    with pytest.raises(ValueError, match=given):
        CEM(LOW, HIGH, 5, **option)
