import numpy as np
import pytest

from jepa_world import envs
from jepa_world.envs.push import EDGE, STEP
from jepa_world.policies import smooth_actions

FAR = (0.0, 0.2, 0.0, -0.1, 0.0)  # a goal that is not where the block starts


@pytest.fixture(scope="module", params=["push", "push_square"])
def push(request):
    env = envs.make(request.param, size=16).unwrapped
    yield env
    env.close()


def states(env, start, actions, **factors):
    """Return the configurations from a start on, under actions."""
    _, info = env.reset(options={"start": start, "goal": FAR, "factors": factors})
    rows = [info["configuration"], *(env.step(action)[4]["configuration"] for action in actions)]
    return np.stack(rows)


def turned(places, angle):
    """Turn places (..., 2) about the origin."""
    cos, sin = np.cos(angle), np.sin(angle)
    return places @ np.array([[cos, sin], [-sin, cos]])


SHOVE = np.repeat([[0.6, 0.1], [0.5, -0.3], [-0.4, 0.2]], [9, 4, 3], axis=0)


@pytest.mark.parametrize("angle", [np.pi / 2, 0.7])
def test_no_direction_of_the_table_is_another(push, angle):
    start = np.array([-0.14, 0.02, 0.0, 0.0, 0.4])
    plain = states(push, start, SHOVE)
    assert np.linalg.norm(plain[-1, 2:4]) > 0.05 and abs(plain[-1, 4] - 0.4) > 0.1
    begun = np.array([*turned(start[:2], angle), 0.0, 0.0, 0.4 + angle])
    other = states(push, begun, turned(SHOVE, angle))
    np.testing.assert_allclose(other[:, :2], turned(plain[:, :2], angle), atol=2e-3)
    np.testing.assert_allclose(other[:, 2:4], turned(plain[:, 2:4], angle), atol=2e-3)
    np.testing.assert_allclose(other[:, 4], plain[:, 4] + angle, atol=2e-2)


def test_a_mirror_image_moves_as_the_mirror_image(push):
    flip = np.array([-1, 1, -1, 1, -1])
    plain = states(push, np.array([-0.14, 0.02, 0.0, 0.0, 0.0]), SHOVE)
    other = states(push, flip * plain[0], SHOVE * [-1, 1])
    np.testing.assert_allclose(other, flip * plain, atol=1e-3)


def test_the_block_moves_only_when_it_is_touched_and_soon_rests(push):
    away = states(push, (-0.2, -0.2, 0.0, 0.1, 1.0), [(0.5, 0.1)] * 8)
    np.testing.assert_array_equal(away[:, 2:], np.tile(away[0, 2:], (9, 1)))
    np.testing.assert_allclose(away[2:, 0] - away[1:-1, 0], 0.5 * STEP, rtol=0.02)
    shoved = states(push, (-0.14, 0.01, 0.0, 0.0, 0.0), [(1, 0)] * 5 + [(-1, 0)] * 6)
    assert shoved[-1, 2] > 0.01
    np.testing.assert_allclose(shoved[-1, 2:], shoved[-3, 2:], atol=1e-4)


def test_nothing_leaves_the_table_and_the_disc_stays_out_of_the_block(push):
    actions = np.random.default_rng(0).choice([-1.0, 1.0], (30, 2)).repeat(5, axis=0)
    push.reset(options={"start": (-0.14, 0.0, 0.0, 0.0, 0.5)})
    for step, action in enumerate(actions):
        place = push.step(action)[4]["configuration"]
        assert np.abs(place[:4]).max() < EDGE
        if step % 10 == 0:
            push.reset(options={"start": place, "goal": place})  # refused, lay the disc in it


@pytest.mark.parametrize("size", [0.8, 1.0, 1.2])
def test_a_larger_block_is_touched_from_farther_away(size):
    env = envs.make("push_square", size=16).unwrapped
    path = states(env, (-0.15, 0.0, 0.0, 0.0, 0.0), [(0.2, 0)] * 22, block_size=size)
    touched = np.flatnonzero(path[:, 2] > 1e-4)[0]
    assert path[touched, 0] == pytest.approx(-(0.05 * size + 0.02), abs=0.006)


def test_slippery_blocks_follow_less():
    env = envs.make("push_square", size=16).unwrapped
    along = [(0.5, 0.4)] * 10  # presses and slides
    rough, smooth = (
        states(env, (-0.1, -0.03, 0.0, 0.0, 0.0), along, friction=f) for f in (2.0, 0.2)
    )
    assert rough[-1, 3] > smooth[-1, 3] + 0.005


def test_distance_is_the_larger_of_place_and_angle_in_tolerances():
    env = envs.make("push", size=16, tolerance=0.03, angle_tolerance=0.5).unwrapped
    start = np.array([0.0, -0.2, 0.05, 0.0, 0.2])
    for offset, distance in (
        ((0.01, 0.0, 0.0), 0.01),
        ((0.0, 0.0, 0.25), 0.015),
        ((0.01, 0.0, -0.25), 0.015),
        ((0.0, 0.02, 2 * np.pi + 0.1), 0.02),
        ((0.0, 0.0, np.pi), 0.03 * np.pi / 0.5),
    ):
        _, info = env.reset(options={"start": start, "goal": start + np.array([0.2, 0.0, *offset])})
        assert env.goal_distance() == pytest.approx(distance)
        assert info["success"] == (distance <= 0.03)


def test_whoever_succeeds_succeeds_under_every_wider_tolerance():
    options = {"start": (0.0, -0.2, 0.0, 0.0, 0.0), "goal": (0.0, -0.2, 0.0, 0.015, 0.3)}
    found = [
        envs.make("push", size=16, tolerance=t, angle_tolerance=a).reset(options=options)[1]
        for t, a in ((0.01, 0.2), (0.01, 0.35), (0.016, 0.2), (0.016, 0.35), (0.1, 3.0))
    ]
    assert [info["success"] for info in found] == [False] * 3 + [True, True]


def test_a_square_looks_the_same_after_a_quarter_turn_and_a_t_does_not(push):
    here = np.array([0.0, -0.2, 0.0, 0.0, 0.3])
    pictures = [
        push.reset(options={"start": here + np.array([0, 0, 0, 0, turn]), "goal": here})
        for turn in (0.0, np.pi / 2)
    ]
    square = push.period < 2
    assert [info["success"] for _, info in pictures] == [True, square]
    assert (np.abs(pictures[0][0].astype(int) - pictures[1][0]).mean() < 0.5) == square
    told_apart = np.abs(pictures[0][1]["proprio"] - pictures[1][1]["proprio"]).max() > 1e-6
    assert told_apart != square


def test_the_expert_pushes_the_block_to_most_goals(push):
    reached = 0
    for seed in range(4):
        _, info = push.reset(seed=seed)
        actions = push.expert(np.random.default_rng(0))
        for _ in range(100):
            *_, info = push.step(next(actions))
        reached += info["success"]
    assert reached >= 3


def test_guides_move_the_block_where_random_actions_seldom_do(push):
    moved = {"guided": 0, "random": 0}
    for seed in range(8):
        generator = np.random.default_rng(seed)
        for policy in moved:
            _, info = push.reset(seed=seed)
            before = info["configuration"][2:]
            guided = push.guide(generator)
            actions = guided if policy == "guided" else iter(smooth_actions(generator, 40, 2))
            for _ in range(40):
                *_, info = push.step(next(actions))
            moved[policy] += np.abs(info["configuration"][2:] - before).max() > 0.03
    assert moved["guided"] == 8 and moved["random"] <= 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wall": 0.1}, "unknown reset options.*known: start, goal, factors"),
        ({"start": (0, 0, 0)}, r"start is .*expected \(disc x, y, block x, y, angle\)"),
        ({"goal": (0, 0.3, 0, 0, 0)}, r"goal is .*within 0.25 m"),
        ({"goal": (0, 0.2, 0, float("nan"), 0)}, "goal is"),
        ({"start": (0.03, 0, 0, 0, 0)}, "the disc lies in the block"),
    ],
)
def test_refuses_bad_reset_options(push, options, message):
    with pytest.raises(ValueError, match=message):
        push.reset(options=options)


@pytest.mark.parametrize(
    ("option", "message"),
    [({"block": "u"}, "'u', expected 't' or 'square'"), ({"tolerance": 0}, "tolerances above 0")],
)
def test_refuses_bad_options(option, message):
    with pytest.raises(envs.EnvError, match=message):
        envs.make("push", **option)
