from typing import Any

import numpy as np
import pytest
import torch
from cmaes import CMA
from scipy.optimize import lsq_linear

from jepa_world.config import Part
from jepa_world.planners.cem import CEM, CEMGradient
from jepa_world.planners.gradient import Gradient
from jepa_world.planners.grasp import GRASP
from jepa_world.planners.icem import ICEM, coloured
from jepa_world.planners.mppi import MPPI, weigh
from jepa_world.planners.predictive_sampling import PredictiveSampling
from jepa_world.planners.random_shooting import RandomShooting
from jepa_world.registry import PARTS
from jepa_world.search import SingleActions, UnsuitedCostError
from jepa_world.testing import check_planner

LOW, HIGH = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0])
SAMPLING = [CEM, ICEM, MPPI, PredictiveSampling]
SLOPES = [Gradient, CEMGradient, GRASP]
SEARCHES = [*SAMPLING, *SLOPES]
PLANNERS = [*SEARCHES, RandomShooting]


class Direct:
    """A cost of actions as one that offers latents: an action leads to the latent equal to it."""

    def __init__(self, cost):
        self.cost = cost

    def __call__(self, plans):
        return self.cost(plans)

    def imagine(self, plans):
        return plans.unsqueeze(3)

    def foresee(self, z, plans):
        return plans.unsqueeze(3)

    def score(self, z, plans):
        return self.cost(z.squeeze(3))


class System:
    """The cost of visiting states z' = step(z, a), one after the other from `present`, (b d)."""

    def __init__(self, step, present, stage):
        self.step, self.present, self.stage = step, present, stage

    def __call__(self, plans):
        return self.score(self.imagine(plans), plans)

    def imagine(self, plans):
        z, visited = self.present[:, None], []
        for action in plans.unbind(2):
            z = self.step(z, action)
            visited.append(z)
        return torch.stack(visited, 2).unsqueeze(3)

    def foresee(self, z, plans):
        present = self.present[:, None, None].expand(-1, z.shape[1], 1, -1)
        before = torch.cat([present, z[:, :, :-1].squeeze(3)], 2)
        return self.step(before, plans).unsqueeze(3)

    def score(self, z, plans):
        return self.stage(z.squeeze(3), plans).sum(-1)


def distance_to(target):
    return Direct(lambda actions: (actions - target).square().sum((-1, -2)))


def rough(actions):
    """A cost whose slope says nothing about where it is low."""
    return (1000 * actions).sin().sum((-1, -2))


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("horizon", [1, 6])
def test_planner_keeps_its_contract(planner, horizon):
    low, high = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([1.0, 0.5, 8.0])
    check_planner(lambda: planner(low, high, horizon), low, high, horizon)


def test_every_planner_of_the_registry_is_tested_here():
    found = [Part(name).build("planner", LOW, HIGH, 3) for name in PARTS["planner"]]
    assert {type(planner) for planner in found} == set(PLANNERS)


@pytest.mark.parametrize("planner", PLANNERS)
def test_bounds_that_are_no_round_numbers_hold_to_the_last_bit(planner):
    low = torch.tensor([-0.1, 1 / 3, 1e-3, 7.7])
    high = torch.tensor([0.1, 2 / 3, 3e-3, 1234.5678])

    class Bounded(Direct):
        def imagine(self, plans):
            assert (plans >= low).all() and (plans <= high).all()
            return super().imagine(plans)

        def __call__(self, plans):
            return self.score(self.imagine(plans), plans)

        def foresee(self, z, plans):
            return self.imagine(plans)

    outwards = Bounded(lambda a: -((a - low) / (high - low) - 0.49).square().sum((-1, -2)))
    for seed in range(5):
        plan = planner(low, high, 4, seed=seed)(outwards, low.expand(2, 4, 4).clone())
        assert (plan >= low).all() and (plan <= high).all()


ENOUGH: dict[Any, dict[str, Any]] = {  # what brings a planner to the optimum of a smooth cost
    CEM: {"samples": 200, "elites": 20, "iterations": 40, "min_std": 0.0, "correlation": 0.5},
    ICEM: {"samples": 300, "elites": 20, "iterations": 30, "decay": 1.0},
    MPPI: {"samples": 200, "iterations": 40, "decay": 0.9},
    PredictiveSampling: {"samples": 200, "iterations": 40, "decay": 0.9, "knots": 6},
    Gradient: {"starts": 4, "steps": 150, "lr": 0.02},
    CEMGradient: {"samples": 100, "iterations": 8, "steps": 60, "lr": 0.02},
    GRASP: {"starts": 4, "rounds": 20, "steps": 15, "lr": 0.02, "weight": 100.0},
}


@pytest.mark.parametrize("planner", SEARCHES)
def test_it_finds_the_optimum_of_a_quadratic(planner):
    target = torch.linspace(-0.8, 0.8, 10).view(5, 2)
    options: dict[str, Any] = ENOUGH[planner] | ({"exponent": 0.5} if planner is ICEM else {})
    plan = planner(LOW, HIGH, 5, **options)(distance_to(target), torch.zeros(1, 5, 2))
    assert (plan - target).abs().max() < 0.05


@pytest.mark.parametrize("planner", SEARCHES)
def test_it_is_better_than_random_shooting(planner):
    cost, start = distance_to(0.5), torch.zeros(1, 10, 2)
    found = [cost(p(LOW, HIGH, 10)(cost, start)) for p in (planner, RandomShooting)]
    assert found[0] < 0.3 * found[1]


@pytest.mark.parametrize("planner", SEARCHES)
def test_it_reaches_a_bound_when_the_optimum_lies_outside(planner):
    plan = planner(LOW, HIGH, 5, **ENOUGH[planner])(distance_to(3.0), torch.zeros(1, 5, 2))
    assert plan.max() <= 1.0
    assert plan.min() > 0.95


A, B = torch.tensor([[1.0, 0.1], [0.0, 1.0]]), torch.tensor([[0.0], [0.1]])  # a cart on a line
EFFORT = 0.01
CARTS = torch.tensor([[1.0, 0.5], [-1.0, 1.0]])  # position and speed, of two episodes
LINEAR = System(
    lambda z, action: z @ A.T + action @ B.T,
    CARTS,
    lambda z, plans: z.square().sum(-1) + EFFORT * plans.square().sum(-1),
)


def riccati(horizon):
    """Return the least costs without bounds, by the backward recursion in float64."""
    a, b, eye = A.double(), B.double(), torch.eye(2).double()
    value = torch.zeros(2, 2).double()
    for _ in range(horizon):
        reached = eye + value
        gain = torch.linalg.solve(EFFORT + b.T @ reached @ b, b.T @ reached @ a)
        value = a.T @ reached @ (a - b @ gain)
    return torch.einsum("bi,ij,bj->b", CARTS.double(), value, CARTS.double())


def bounded_least_squares(horizon, bound):
    """Return the least costs within bounds: the states are linear in the actions."""
    a, b = A.double().numpy(), B.double().numpy()
    power = [np.linalg.matrix_power(a, k) for k in range(horizon + 1)]
    response = np.zeros((2 * horizon, horizon))
    for step in range(horizon):
        for k in range(step + 1):
            response[2 * step : 2 * step + 2, k] = (power[step - k] @ b)[:, 0]
    left = np.vstack([response, EFFORT**0.5 * np.eye(horizon)])
    costs = []
    for cart in CARTS.double().numpy():
        free = np.concatenate([power[step + 1] @ cart for step in range(horizon)])
        right = np.concatenate([-free, np.zeros(horizon)])
        found = lsq_linear(left, right, (-bound, bound), method="bvls", tol=1e-12)
        costs.append(2 * found.cost)
    return torch.tensor(costs)


def excess(planner, horizon, bound, optimum):
    """Return by how much, as a share, the dearer of two plans is dearer than the optimum."""
    search = planner(torch.tensor([-bound]), torch.tensor([bound]), horizon, **ENOUGH[planner])
    plan = search(LINEAR, torch.zeros(2, horizon, 1))
    ratio = LINEAR(plan[:, None])[:, 0] / optimum - 1
    assert plan.abs().max() <= bound and ratio.min() > -1e-4  # nothing is better than the optimum
    return ratio.max()


@pytest.mark.parametrize("horizon", [1, 5, 20])
def test_the_two_references_for_linear_systems_agree_where_no_bound_is_met(horizon):
    torch.testing.assert_close(bounded_least_squares(horizon, 100.0), riccati(horizon))


@pytest.mark.parametrize("planner", SEARCHES)
@pytest.mark.parametrize(
    ("horizon", "sampled", "descended"), [(1, 1e-4, 1e-4), (5, 0.01, 1e-3), (20, 0.3, 0.005)]
)
def test_linear_quadratic_control_is_that_of_riccati(planner, horizon, sampled, descended):
    tolerance = descended if planner in SLOPES else sampled
    assert excess(planner, horizon, 20.0, riccati(horizon)) < tolerance


@pytest.mark.parametrize("planner", SEARCHES)
@pytest.mark.parametrize(
    ("horizon", "sampled", "descended"), [(1, 1e-4, 1e-4), (5, 0.01, 1e-3), (20, 0.05, 0.005)]
)
def test_linear_quadratic_control_within_bounds(planner, horizon, sampled, descended):
    optimum = bounded_least_squares(horizon, 2.0)
    assert (optimum > riccati(horizon) * 1.001).any()  # the bounds matter
    tolerance = descended if planner in SLOPES else sampled
    assert excess(planner, horizon, 2.0, optimum) < tolerance


def test_over_a_long_horizon_latents_of_its_own_beat_descent_through_the_rollout():
    optimum = riccati(50)
    assert excess(GRASP, 50, 20.0, optimum) < 0.005
    assert excess(Gradient, 50, 20.0, optimum) > 0.05
    assert excess(CEM, 50, 20.0, optimum) > 1.0


GOAL = torch.tensor([8.0, 0.0])


def depth_in_wall(point):
    """Return how deep a point is in the wall that is 2 thick, 4 long and square to the way."""
    along, across = 1 - (point[..., 0] - 4).abs(), 2 - point[..., 1].abs()
    return torch.minimum(along, across).clamp(min=0)


def to_the_goal_past_the_wall(planner, **options):
    """Return the path of a point from the origin, in 15 steps of at most 1 in both directions."""

    def stage(z, plans):
        return (z - GOAL).norm(dim=-1) + 20 * depth_in_wall(z)

    system = System(lambda z, action: z + action, torch.zeros(1, 2), stage)
    plan = planner(LOW, HIGH, 15, **options)(system, torch.zeros(1, 15, 2))
    path = plan[0].cumsum(0)
    assert depth_in_wall(path).max() < 0.2
    return path


@pytest.mark.parametrize("planner", SEARCHES)
def test_it_gets_past_a_wall_by_samples_or_other_starts(planner):
    options = {} if planner in (Gradient, GRASP) else {"samples": 200}
    path = to_the_goal_past_the_wall(planner, seed=1, **options)
    assert path[-1, 0] > 5.0


@pytest.mark.parametrize("planner", [Gradient, GRASP])
def test_greedy_descent_from_one_start_stays_before_the_wall(planner):
    path = to_the_goal_past_the_wall(planner, starts=1, steps=100, lr=0.01)
    assert path[-1, 0] < 3.2


WAVES, PHASES = (
    torch.randn(12, 10, generator=torch.Generator().manual_seed(0)),
    torch.linspace(0, 6, 12),
)


def rugged(actions):
    """Twelve plane waves in ten dimensions, in a shallow bowl: many valleys."""
    x = actions.flatten(-2)
    return (x @ WAVES.T + PHASES).sin().sum(-1) + 0.3 * (x - 0.2).square().sum(-1)


@pytest.fixture(scope="module")
def oracle():
    """Return the least cost that CMA-ES finds: Hansen 2016, https://arxiv.org/abs/1604.00772."""
    bounds = np.tile([-1.0, 1.0], (10, 1))
    search = CMA(mean=np.zeros(10), sigma=0.5, bounds=bounds, seed=0, population_size=40)
    least = np.inf
    for _ in range(60):
        asked = np.stack([search.ask() for _ in range(40)])
        costs = rugged(torch.from_numpy(asked).float().view(-1, 5, 2)).tolist()
        search.tell(list(zip(asked, costs, strict=True)))
        least = min(least, *costs)
    return least


RUGGED = {
    CEM: {"samples": 400, "elites": 40, "iterations": 30, "correlation": 0.2},
    ICEM: {"samples": 400, "elites": 40, "iterations": 20, "exponent": 0.5, "decay": 1.05},
    MPPI: {"samples": 400, "iterations": 30, "decay": 0.9, "correlation": 0.2},
    PredictiveSampling: {"samples": 400, "iterations": 30, "decay": 0.9, "knots": 5},
    Gradient: {"starts": 100, "steps": 40, "correlation": 0.2},
    CEMGradient: {"samples": 400, "elites": 40, "iterations": 10, "steps": 20, "correlation": 0.2},
    GRASP: {"starts": 50, "rounds": 4, "steps": 10, "correlation": 0.2},
    RandomShooting: {"samples": 12000},
}


def median_on_rugged(planner):
    start = torch.zeros(1, 5, 2)
    searches = [planner(LOW, HIGH, 5, seed=seed, **RUGGED[planner]) for seed in range(3)]
    found = [rugged(search(Direct(rugged), start)).item() for search in searches]
    return sorted(found)[1]


@pytest.mark.parametrize("planner", SEARCHES)
def test_among_many_valleys_it_finds_one_as_low_as_cma_es_does(planner, oracle):
    assert median_on_rugged(planner) < oracle + 0.05 * abs(oracle)


def test_among_many_valleys_random_shooting_does_not(oracle):
    assert median_on_rugged(RandomShooting) > oracle + 0.1 * abs(oracle)


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
    search = planner(LOW, HIGH, 5)
    for seed in range(20):
        start = torch.rand(4, 5, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        plan = search(Direct(rough), start)
        assert (rough(plan) <= rough(start) + 1e-2).all()


@pytest.mark.parametrize("planner", PLANNERS)
def test_samples_without_a_finite_cost_are_never_chosen(planner):
    def cost(actions):
        total = distance_to(0.3)(actions)
        return total.where(actions[..., 0, 0] < 0.0, torch.tensor([torch.nan, torch.inf])[0])

    plan = planner(LOW, HIGH, 2)(Direct(cost), torch.full((1, 2, 2), -0.5))
    assert plan[0, 0, 0] < 0.0
    assert plan.isfinite().all()


@pytest.mark.parametrize("planner", PLANNERS)
def test_episode_without_a_finite_cost_is_named(planner):
    def cost(actions):
        return distance_to(0.0)(actions) * torch.tensor([[1.0], [torch.nan]])

    with pytest.raises(ValueError, match=r"finite cost in episodes \[1\]"):
        planner(LOW, HIGH, 2)(Direct(cost), torch.zeros(2, 2, 2))


def evaluated(planner, start):
    """Return the candidates of every iteration of a search without preference."""
    seen = []

    def cost(actions):
        seen.append(actions.clone())
        return torch.zeros(actions.shape[:2])

    planner(cost, start)
    return seen


def test_noise_is_correlated_in_the_first_half_and_white_in_the_second():
    low, high = torch.full((2,), -100.0), torch.full((2,), 100.0)
    options = {"std": 0.01, "min_std": 0.01, "momentum": 1.0, "keep_elites": 0}
    planner = CEM(low, high, 12, samples=4000, correlation=0.8, **options)
    *rounds, _ = evaluated(planner, torch.zeros(1, 12, 2))  # the last holds the mean alone
    for iteration, actions in enumerate(rounds):
        noise = actions[0, 1:]
        correlation = (noise[:, 1:] * noise[:, :-1]).mean() / noise.square().mean()
        assert abs(correlation - (0.8 if iteration < 3 else 0.0)) < 0.02
        torch.testing.assert_close(noise.std(0), torch.ones(12, 2), atol=0.05, rtol=0)


@pytest.mark.parametrize("planner", [CEM, ICEM])
def test_the_best_of_an_iteration_is_never_worse_than_that_of_the_one_before(planner):
    costs = []

    def cost(actions):
        costs.append(rough(actions))
        return costs[-1]

    planner(LOW, HIGH, 5)(cost, torch.zeros(1, 5, 2))
    best = [c.min().item() for c in costs[:6]]
    assert best == sorted(best, reverse=True)


@pytest.mark.parametrize("planner", [*SAMPLING, RandomShooting])
def test_start_is_evaluated_and_clamped(planner):
    start = torch.full((1, 3, 2), 5.0)
    assert torch.equal(evaluated(planner(LOW, HIGH, 3), start)[0][0, 0], torch.ones(3, 2))


def test_spread_never_falls_below_its_minimum():
    planner = CEM(LOW, HIGH, 10, iterations=30, samples=256, min_std=0.1, keep_elites=0)
    last = []

    def cost(actions):
        last[:] = [actions, *last[:1]]
        return distance_to(0.0)(actions)

    planner(cost, torch.zeros(1, 10, 2))
    assert abs(last[1][0, 1:].std() - 0.1) < 0.01


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("steps", [31, 64])
def test_coloured_noise_has_its_spectrum_and_unit_variance(exponent, steps):
    white = torch.randn(4000, steps, 1, generator=torch.Generator().manual_seed(0))
    noise = coloured(white, exponent)
    torch.testing.assert_close(noise.std(0), torch.ones(steps, 1), atol=0.05, rtol=0)
    power = torch.fft.rfft(noise, dim=1).abs().square().mean(0)[1:, 0].log()
    frequency = torch.arange(1, len(power) + 1).log()
    slope = ((power - power.mean()) * (frequency - frequency.mean())).sum()
    assert abs(slope / (frequency - frequency.mean()).square().sum() + exponent) < 0.05


def test_icem_draws_fewer_samples_each_round_but_two_an_elite():
    planner = ICEM(LOW, HIGH, 3, samples=100, decay=2.0, elites=10, iterations=5)
    counts = [actions.shape[1] for actions in evaluated(planner, torch.zeros(1, 3, 2))]
    assert counts == [100, 50, 25, 20, 20]


def test_icem_recalls_its_elites_one_step_on_where_an_episode_goes_on():
    planner = ICEM(LOW, HIGH, 4, elites=10, kept=0.3)
    cost = distance_to(torch.linspace(-0.5, 0.5, 8).view(4, 2))
    plan = planner(cost, torch.zeros(2, 4, 2))
    assert planner.last is not None
    _, elites = planner.last
    goes_on = torch.cat([plan[:1, 1:], torch.zeros(1, 1, 2)], 1)
    first, *_ = evaluated(planner, torch.cat([goes_on, torch.full((1, 4, 2), 0.5)]))
    shifted = torch.cat([elites[0, :, 1:], elites[0, :, -1:]], 1)
    assert torch.equal(first[0, 0], goes_on[0]) and torch.equal(first[0, 1:4], shifted)
    assert torch.equal(first[1, :4], torch.full((4, 4, 2), 0.5))  # a new one: its start alone


def test_weights_of_mppi_ignore_the_unit_of_the_cost_and_what_is_not_finite():
    costs = torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0]])
    weights = weigh(costs, 0.5)
    expected = (-(costs - 1) / (0.5 * 2)).softmax(1)  # the median lies 2 above the least
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(weigh(7 * costs - 3, 0.5), weights)
    outlier = weigh(costs.where(costs < 5, 1e9), 0.5)  # takes nothing from the others but itself
    torch.testing.assert_close(
        outlier / outlier[0, 1], (weights / weights[0, 1]).where(costs < 5, 0)
    )
    holed = torch.tensor([[torch.nan, 3.0, 1.0, 2.0, torch.inf, 5.0, 4.0, -torch.inf]])
    torch.testing.assert_close(weigh(holed, 0.5)[:, [1, 2, 3, 5, 6]], weights)
    assert weigh(holed, 0.5)[0, [0, 4, 7]].tolist() == [0, 0, 0]
    torch.testing.assert_close(weigh(torch.full((1, 4), 9.0), 0.5), torch.full((1, 4), 0.25))


def test_a_cold_mppi_takes_the_best_sample_and_a_hot_one_the_mean_of_all():
    def moved(temperature):
        planner = MPPI(LOW, HIGH, 3, samples=50, iterations=1, temperature=temperature)
        seen = evaluated(planner, torch.zeros(1, 3, 2))[0]
        cost = distance_to(torch.tensor([0.3, -0.4]))
        best = seen[0, cost(seen)[0].argmin()]
        averaged = []
        again = MPPI(LOW, HIGH, 3, samples=50, iterations=1, temperature=temperature)
        again(lambda actions: averaged.append(actions) or cost(actions), torch.zeros(1, 3, 2))
        return averaged[-1][0, 0], best, seen[0].mean(0)

    mean, best, _ = moved(1e-6)
    torch.testing.assert_close(mean, best)
    mean, _, centre = moved(1e6)
    torch.testing.assert_close(mean, centre, atol=1e-5, rtol=0)


@pytest.mark.parametrize("knots", [1, 2, 4])
def test_predictive_sampling_draws_straight_lines_between_knots(knots):
    low, high = torch.full((2,), -100.0), torch.full((2,), 100.0)
    planner = PredictiveSampling(low, high, 10, knots=knots, std=0.01, iterations=1)
    noise = evaluated(planner, torch.zeros(1, 10, 2))[0][0, 1:]
    bends = noise.diff(dim=1).diff(dim=1).abs() > 1e-4
    assert bends.any(0).any(-1).sum() <= 2 * max(knots - 2, 0)
    assert (noise.diff(dim=1).abs().max() > 1e-3) == (knots > 1)


@pytest.mark.parametrize("planner", SLOPES)
def test_descent_works_without_grad_and_leaves_none_in_the_model(planner):
    model = torch.nn.Linear(2, 2)
    torch.nn.init.eye_(model.weight)
    cost = Direct(lambda actions: model(actions).square().sum((-1, -2)))
    start = torch.full((1, 4, 2), 0.9)
    with torch.no_grad():
        plan = planner(LOW, HIGH, 4, steps=20)(cost, start)
        assert cost(plan) < 0.5 * cost(start)
    assert not plan.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_descent_is_that_of_adam_with_projection():
    target, plan = torch.tensor([[0.7, 2.0], [-0.4, 0.1]]), torch.zeros(2, 2)
    moment = variance = torch.zeros(2, 2)
    steps, lr = 12, 0.1
    for step in range(1, steps + 1):  # Kingma and Ba 2015, algorithm 1
        gradient = 2 * (plan - target)
        moment, variance = 0.9 * moment + 0.1 * gradient, 0.999 * variance + 0.001 * gradient**2
        mended = moment / (1 - 0.9**step), (variance / (1 - 0.999**step)).sqrt() + 1e-8
        rate = lr * (1 - (step - 1) / steps)
        plan = (plan - 2 * rate * mended[0] / mended[1]).clamp(-1, 1)  # actions span 2
    found = Gradient(LOW, HIGH, 2, starts=1, steps=steps, lr=lr)(
        distance_to(target), torch.zeros(1, 2, 2)
    )
    torch.testing.assert_close(found[0], plan, atol=1e-4, rtol=0)


@pytest.mark.parametrize("planner", SLOPES)
def test_a_cost_without_slope_is_named(planner):
    flat = Direct(lambda actions: (actions.detach() - 0.5).square().sum((-1, -2)))
    with pytest.raises(UnsuitedCostError, match="the cost has none"):
        planner(LOW, HIGH, 3)(flat, torch.zeros(1, 3, 2))


def test_grasp_names_a_cost_without_latents():
    with pytest.raises(UnsuitedCostError, match=r"latents and the cost has none \(interfaces"):
        GRASP(LOW, HIGH, 3)(lambda actions: actions.sum((-1, -2)), torch.zeros(1, 3, 2))


def test_grasp_leaves_the_latents_that_a_cost_handed_out_as_they_are():
    class Keeping(System):
        def imagine(self, plans):
            z = super().imagine(plans)
            kept.append((z, z.clone()))
            return z

    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    system = Keeping(lambda z, action: z + action, torch.ones(1, 2), LINEAR.stage)
    GRASP(LOW, HIGH, 6)(system, torch.zeros(1, 6, 2))
    assert all(torch.equal(z, before) and not z.requires_grad for z, before in kept)


def test_grasp_follows_slopes_through_single_steps_and_never_through_a_rollout():
    class Counting(System):
        rollouts = steps = 0

        def imagine(self, plans):
            assert not torch.is_grad_enabled()
            self.rollouts += 1
            return super().imagine(plans)

        def foresee(self, z, plans):
            assert torch.is_grad_enabled()
            self.steps += 1
            return super().foresee(z, plans)

    system = Counting(lambda z, action: z + action, torch.zeros(1, 2), LINEAR.stage)
    GRASP(LOW, HIGH, 6, rounds=3, steps=5)(system, torch.zeros(1, 6, 2))
    assert (system.rollouts, system.steps) == (1 + 3, 3 * 5)


@pytest.mark.parametrize(
    ("planner", "option", "given"),
    [
        (CEM, {"elites": 64}, "2, 64, 40"),
        (CEM, {"iterations": 0}, "iteration, got 0"),
        (CEM, {"correlation": 1.0}, "1.0"),
        (ICEM, {"samples": 10, "elites": 6}, "10 and 6"),
        (ICEM, {"decay": 0.5}, "decay >= 1, got 6 and 0.5"),
        (MPPI, {"samples": 2}, "got 2 and 6"),
        (MPPI, {"temperature": 0.0}, "above 0, got 0.0"),
        (PredictiveSampling, {"knots": 0}, "got 40, 6 and 0"),
        (Gradient, {"starts": 0}, "one start, got 0"),
        (Gradient, {"steps": 0}, "one step and lr > 0, got 0"),
        (CEMGradient, {"lr": -1.0}, "and -1.0"),
        (CEMGradient, {"elites": 64}, "64, 40"),
        (GRASP, {"rounds": 0}, "one round, got 8 and 0"),
        (GRASP, {"latent_lr": 0.0}, "lr > 0"),
    ],
)
def test_options_that_make_no_search_are_refused(planner, option, given):
    with pytest.raises(ValueError, match=given):
        planner(LOW, HIGH, 5, **option)


def test_single_actions_lead_farther_than_steps_whose_actions_are_drawn_apart():
    def left(plans):  # of 20, for a point that moves by every action
        return (20 - plans.sum((-1, -2))).abs()

    how = {"samples": 20, "elites": 4, "iterations": 1, "correlation": 0.95}
    apart = CEM(-torch.ones(5), torch.ones(5), 5, **how)
    single = SingleActions(CEM(-torch.ones(1), torch.ones(1), 25, **how), 5)
    one, other = (planner(left, torch.zeros(1, 5, 5)) for planner in (apart, single))
    assert left(other) < left(one) - 3


def test_a_search_over_single_actions_keeps_the_contract_and_the_order_of_actions():
    def build():
        return SingleActions(CEM(LOW[:1], HIGH[:1], 12), 4)

    check_planner(build, LOW[:1].repeat(4), HIGH[:1].repeat(4), 3)
    wanted = torch.linspace(-0.8, 0.8, 12).view(3, 4)
    planner = SingleActions(CEM(LOW[:1], HIGH[:1], 12, samples=200, iterations=30), 4)
    plan = planner(lambda plans: (plans - wanted).square().sum((-1, -2)), torch.zeros(1, 3, 4))
    torch.testing.assert_close(plan[0], wanted, atol=0.15, rtol=0)
