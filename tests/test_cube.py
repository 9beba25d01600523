"""The cube is carried by the expert, kept by closed fingers, and never thrown."""

from typing import Any

import numpy as np
import pytest

from jepa_world import envs
from jepa_world.commands.plan import goals_ahead
from jepa_world.envs import panda
from jepa_world.testing import check_env


@pytest.fixture
def cube():
    env = envs.make("cube", size=16, render_mode="rgb_array").unwrapped
    yield env
    env.close()


def play(env, script, steps):
    return [env.step(next(script)) for _ in range(steps)][-1][4]


def test_keeps_the_contract(cube):
    check_env(cube)


def test_the_expert_carries_the_cube_to_its_goal_and_withdraws(cube):
    for seed in range(4):
        cube.reset(seed=seed)
        info = play(cube, cube.expert(np.random.default_rng(0)), 60)
        assert info["success"] and cube.goal_distance() < 0.01, seed
        assert cube.tip[2] > 0.2, "the hand is back"


def test_closed_fingers_keep_the_cube_while_the_hand_rests(cube):
    cube.reset(seed=1)
    script = cube.expert(np.random.default_rng(0))
    while cube.cube[2] < 0.1:
        cube.step(next(script))
    held = cube.cube
    for _ in range(20):
        cube.step(np.zeros(4))
    np.testing.assert_allclose(cube.cube, held, atol=0.02)


def test_a_cube_in_the_air_is_a_start_too(cube):
    cube.reset(seed=1)
    script = cube.expert(np.random.default_rng(0))
    info = play(cube, script, 18)
    assert cube.cube[2] > 0.1
    cube.reset(options={"start": info["configuration"]})
    for _ in range(5):
        cube.step(np.zeros(4))
    assert cube.cube[2] > 0.09


def test_a_goal_shows_the_cube_held_where_it_is_to_be(cube):
    goal = cube.reset(seed=0, options={"goal": (0.5, 0.1)})[1]["goal"]
    place = np.array([0.5, 0.1, 0.02])
    held = [*panda.posture(place), 0.02, 0.02, *place, 1.0, 0.0, 0.0, 0.0, 0.02, 0.02]
    observation, info = cube.reset(seed=0, options={"goal": (0.5, 0.1), "start": held})
    assert info["success"] and np.abs(cube.tip - place).max() < 1e-3
    np.testing.assert_array_equal(goal, observation)
    with pytest.raises(ValueError, match="does not reach"):
        cube.reset(options={"goal": (2.0, 0.0)})


def test_nothing_is_thrown_whatever_is_asked(cube):
    generator = np.random.default_rng(0)
    for seed in range(3):
        cube.reset(seed=seed)
        for place in generator.uniform([-0.02, -0.02, 0.0], [0.02, 0.02, 0.02], (4, 3)):
            for _ in range(10):
                towards = (cube.cube + place - cube.tip) / 0.04
                action = np.clip([*towards, generator.uniform(-1, 1)], -1.0, 1.0)
                *_, info = cube.step(action)
                assert np.abs(info["state"][25:28]).max() < 2.0, "m/s of the cube"
        assert np.linalg.norm(cube.cube) < 1.0 and cube.cube[2] < 0.4


def test_the_guide_lifts_and_moves_the_cube(cube):
    heights, places = [], []
    for seed in range(3):
        cube.reset(seed=seed)
        script = cube.guide(np.random.default_rng(seed))
        for _ in range(60):
            cube.step(next(script))
            heights.append(cube.cube[2])
        places.append(np.linalg.norm(cube.cube - cube.reset(seed=seed)[1]["state"][9:12]))
    assert np.mean(np.array(heights) > 0.04) > 0.1
    assert max(places) > 0.05


def test_goals_of_the_guide_some_steps_ahead_are_reached_by_it(cube):
    env: Any = goals_ahead(cube, 30)
    env.reset(seed=3)
    script = env.guide(np.random.default_rng(3))
    assert play(env, script, 30)["success"]


def test_distance_is_that_of_the_cube_in_metres(cube):
    _, info = cube.reset(options={"start": (0.45, -0.1), "goal": (0.45, 0.2)})
    assert cube.goal_distance() == pytest.approx(0.3)
    assert info["success"] is False
    assert cube.reset(options={"start": (0.45, 0.18), "goal": (0.45, 0.2)})[1]["success"]


@pytest.mark.parametrize("value", [(0.4, 0.1, 0.2), (np.nan, 0.0), np.zeros(16)])
def test_refuses_bad_reset_options(cube, value):
    with pytest.raises(ValueError, match=r"goal is .*x and y in metres"):
        cube.reset(options={"goal": value})
