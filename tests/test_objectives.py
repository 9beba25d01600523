import pytest
import torch

from jepa_world.objectives import effort, keep_out, smoothness, summed_distance, weighted_sum
from jepa_world.testing import check_objective

NOWHERE = torch.zeros(1, 1, 2)


def path(*points):
    """Return latents (1 1 h 1 2) that visit points of a plane."""
    return torch.tensor(points)[None, None, :, None]


def plan(*actions):
    return torch.tensor(actions)[None, None, :, None]


@pytest.mark.parametrize(
    "objective", [summed_distance, effort, smoothness, keep_out(torch.zeros(2, 3, 4), 9.0)]
)
def test_an_objective_keeps_its_contract_and_has_a_slope(objective):
    check_objective(objective, 3, 4, 5, 2)
    z, plans = torch.randn(2, 3, 5, 3, 4), torch.randn(2, 3, 5, 2)
    z[0, 0], plans[0, 0] = 0.0, 0.0  # at the goal, at rest, in the middle of what to keep out of
    costs = objective(z.requires_grad_(), plans.requires_grad_(), torch.zeros(2, 3, 4))
    slopes = torch.autograd.grad(costs.sum(), [z, plans], allow_unused=True)
    given = [slope for slope in slopes if slope is not None]
    assert given and all(slope.isfinite().all() and slope.any() for slope in given)


def test_the_goal_cost_prefers_to_arrive_early_and_to_stay():
    late, early, passing = (
        path(*((x, x) for x in steps)) for steps in ([1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1, 2])
    )
    costs = [summed_distance(z, plan(0.0), NOWHERE) for z in (early, late, passing)]
    assert costs[0] < costs[1] < costs[2]


def test_effort_is_the_sum_of_squares():
    assert effort(NOWHERE, plan(0.5, -1.0, 0.0), NOWHERE).item() == 1.25


def test_smoothness_counts_changes_and_not_what_is_held():
    held, jerked = plan(0.7, 0.7, 0.7), plan(0.0, 1.0, -1.0)
    assert smoothness(NOWHERE, held, NOWHERE).item() == 0.0
    assert smoothness(NOWHERE, jerked, NOWHERE).item() == 1.0 + 4.0
    assert smoothness(NOWHERE, jerked + 0.3, NOWHERE).item() == pytest.approx(5.0)


def test_keep_out_counts_how_deep_the_nearest_place_is_entered():
    stay_out = keep_out(torch.tensor([[[0.0, 0.0]], [[10.0, 0.0]]]), radius=2.0)
    for points, expected in (
        ([(5.0, 0.0), (0.0, 3.0)], 0.0),
        ([(1.0, 0.0), (5.0, 5.0)], 0.5),
        ([(0.0, 0.0), (10.0, 1.0)], 1.0 + 0.5),
    ):
        assert stay_out(path(*points), plan(0.0, 0.0), NOWHERE).item() == pytest.approx(expected)


@pytest.mark.parametrize(("avoid", "radius"), [(torch.zeros(1, 1, 2), 0.0), (torch.zeros(2), 1.0)])
def test_keep_out_refuses_what_is_no_place(avoid, radius):
    with pytest.raises(ValueError, match="need a radius above 0 and latents"):
        keep_out(avoid, radius)


def test_a_weighted_sum_is_one():
    z, plans, goal = torch.randn(2, 3, 4, 1, 5), torch.randn(2, 3, 4, 2), torch.randn(2, 1, 5)
    total = weighted_sum((2.0, summed_distance), (0.1, effort))(z, plans, goal)
    expected = 2 * summed_distance(z, plans, goal) + 0.1 * effort(z, plans, goal)
    torch.testing.assert_close(total, expected)
