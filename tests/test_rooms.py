import numpy as np
import pytest

from jepa_world import envs
from jepa_world.envs.rooms import DOOR


@pytest.fixture(scope="module")
def rooms():
    env = envs.make("rooms", size=32).unwrapped
    yield env
    env.close()


def test_wall_and_door_are_drawn_anew_and_start_and_goal_lie_apart(rooms):
    walls = set()
    for seed in range(20):
        _, info = rooms.reset(seed=seed)
        wall, door = info["state"][4:]
        walls.add((wall, door))
        assert (info["configuration"][0] - wall) * (rooms._ways.goal[0] - wall) < 0
        assert not info["success"]
    assert len(walls) == 20


def test_a_given_wall_is_kept_and_seen(rooms):
    pictures = []
    for wall, door in ((-0.1, 0.0), (0.1, 0.0), (0.1, 0.15)):
        options = {"wall": wall, "door": door, "start": (-0.2, 0.0), "goal": (0.2, 0.0)}
        picture, info = rooms.reset(seed=0, options=options)
        np.testing.assert_array_equal(info["state"][4:], [wall, door])
        np.testing.assert_allclose(info["proprio"], [-0.2, 0.0, wall, door], rtol=1e-6)
        pictures.append(picture.astype(int))
    assert np.abs(pictures[0] - pictures[1]).mean() > 3
    assert np.abs(pictures[1] - pictures[2]).mean() > 2


def test_the_wall_is_passed_through_the_door_alone(rooms):
    passed = 0
    for seed in range(4):
        _, info = rooms.reset(seed=seed)
        generator = np.random.default_rng(seed)
        guided = rooms.guide(generator)
        before = info["state"]
        for step in range(60):
            action = next(guided) if seed % 2 else np.sign(generator.standard_normal(2))
            state = rooms.step(action if step % 3 else before[2:4].round() + action)[4]["state"]
            if (state[0] - state[4]) * (before[0] - before[4]) < 0:
                passed += 1
                assert abs((state[1] + before[1]) / 2 - state[5]) < DOOR / 2
            before = state
        rooms.reset(options={"start": before[:2], "wall": before[4], "door": before[5]})
    assert passed >= 1


def test_a_ball_pressed_against_the_wall_stays_in_its_room(rooms):
    for wall in (-0.1, 0.03):
        options = {"start": (-0.2, -0.1), "goal": (0.2, 0.0), "wall": wall, "door": 0.1}
        _, info = rooms.reset(options=options)
        for _ in range(20):
            *_, info = rooms.step(np.array([1.0, 0.0]))
        assert info["state"][0] == pytest.approx(wall - 0.015 - 0.02, abs=0.005)


def test_the_distance_is_the_way_through_the_door(rooms):
    options = {"start": (-0.2, 0.2), "goal": (0.2, 0.2), "wall": 0.0, "door": -0.05}
    rooms.reset(options=options)
    edge = np.hypot(0.2 - 0.015, 0.2)  # from either side to the upper edge of the door, at y = 0
    assert rooms.goal_distance() == pytest.approx(2 * edge + 0.03, abs=1e-4)
    rooms.reset(options=options | {"goal": (-0.1, 0.1)})
    assert rooms.goal_distance() == pytest.approx(np.hypot(0.1, 0.1))


def test_the_picture_of_a_room_upside_down_is_upside_down(rooms):
    options = {"start": (-0.15, 0.1), "goal": (0.2, 0.0), "wall": 0.04, "door": 0.1}
    plain, _ = rooms.reset(options=options)
    other, _ = rooms.reset(options=options | {"start": (-0.15, -0.1), "door": -0.1})
    assert np.abs(plain[::-1].astype(int) - other).mean() < 0.5


def test_the_expert_passes_the_door(rooms):
    for seed in range(3):
        _, info = rooms.reset(seed=seed)
        actions = rooms.expert(np.random.default_rng(0))
        for _ in range(50):
            *_, info = rooms.step(next(actions))
        assert info["success"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"walls": 0.1}, "unknown reset options.*known: start, goal, wall, door, factors"),
        ({"wall": 0.2}, "wall is 0.2, expected a number within 0.1 of 0"),
        ({"door": (0.0, 0.1)}, "door is .*expected a number within 0.15 of 0"),
        ({"start": (0, 0, 0)}, r"start is .*expected \(x, y\)"),
        ({"wall": 0.0, "door": 0.1, "goal": (0.0, 0.0)}, "goal is .*nearer to a wall"),
        ({"goal": (0.0, 0.24)}, "goal is .*nearer to a wall"),
    ],
)
def test_refuses_bad_reset_options(rooms, options, message):
    with pytest.raises(ValueError, match=message):
        rooms.reset(options=options)
