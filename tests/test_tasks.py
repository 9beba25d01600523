"""What all tasks of the package promise, one by one."""

import gymnasium
import numpy as np
import pytest

from jepa_world import envs
from jepa_world.commands.plan import goals_ahead
from jepa_world.evaluation import unsolved_seeds
from jepa_world.interfaces import ImplausibleEnv, NamedStateEnv
from jepa_world.policies import actions_of, usual_policy
from jepa_world.registry import UserError
from jepa_world.testing import check_env

TASKS = ["reach", "push", "maze_medium", "rooms"]


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    env = envs.make(request.param, size=32)
    yield env.unwrapped
    env.close()


@pytest.mark.parametrize("name", envs.SHORT_NAMES)
def test_a_task_keeps_the_contract(name):
    check_env(envs.make(name, size=32))


@pytest.mark.parametrize("name", envs.SHORT_NAMES)
def test_a_tolerance_that_is_not_above_zero_is_refused(name):
    for tolerance in (0.0, float("nan")):
        with pytest.raises(ValueError, match=r"toleranc.* above 0"):
            gymnasium.make(envs.SHORT_NAMES[name], tolerance=tolerance)


def test_every_factor_alone_changes_pictures_or_motion_and_never_the_start(task):
    def played(env):
        actions = actions_of(env, usual_policy(env), np.random.default_rng(0), 25, still=0.0)
        return [env.step(action)[4]["state"] for action in actions]

    plain, info = task.reset(seed=4)
    moved = played(task)
    for name in info["factors"]:
        varied, other = task.reset(seed=4, options={"factors": {name: "random"}})
        differing = {n for n, v in other["factors"].items() if (v != info["factors"][n]).any()}
        assert differing == {name}
        np.testing.assert_array_equal(other["configuration"], info["configuration"])
        assert (varied != plain).any() or not np.array_equal(played(task), moved), name


@pytest.mark.parametrize("name", envs.SHORT_NAMES)
def test_a_task_names_its_numbers_and_shows_what_cannot_come_next(name):
    env = envs.make(name, size=32)
    assert isinstance(env.unwrapped, NamedStateEnv) and isinstance(env.unwrapped, ImplausibleEnv)
    seen, _ = env.reset(seed=2)
    pictures = env.unwrapped.implausible(np.random.default_rng(0))
    assert list(pictures) == ["teleport", "colour", "vanished"]
    changed = {kind: (picture != seen).any(-1) for kind, picture in pictures.items()}
    assert (changed["vanished"] >= changed["colour"]).all()  # the thing, where it is
    assert (changed["teleport"] & ~changed["vanished"]).any()  # and where it is not
    env.close()


def test_a_factor_drawn_does_not_depend_on_which_others_are(task):
    _, info = task.reset(seed=4, options={"factors": "random"})
    for name, value in info["factors"].items():
        _, alone = task.reset(seed=4, options={"factors": {name: "random"}})
        np.testing.assert_array_equal(alone["factors"][name], value)


def test_factors_of_the_constructor_hold_for_every_episode_until_a_reset_says_otherwise():
    env = envs.make("reach", size=16, factors={"light": (0.5, 0.6, 0.7), "zoom": "random"})
    first, second = (env.reset(seed=seed)[1]["factors"] for seed in (0, 1))
    np.testing.assert_array_equal(first["light"], [0.5, 0.6, 0.7])
    np.testing.assert_array_equal(second["light"], [0.5, 0.6, 0.7])
    assert first["zoom"] != second["zoom"]
    _, info = env.reset(seed=0, options={"factors": None})
    assert info["factors"]["zoom"] == 1.0


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"lihgt": 1.0}, r"unknown factors \['lihgt'\]; known: light, "),
        ({"light": 0.7}, r"light is 0.7, expected 3 numbers within 0.5 to 1.0"),
        ({"light": (0.7, 0.7, 0.2)}, r"light is \[0.7, 0.7, 0.2\], expected 3 numbers within"),
        ({"zoom": float("nan")}, "zoom is nan"),
        ({"zoom": "wide"}, "zoom is 'wide', expected 1 number within 0.9 to 1.1"),
        ("wild", "factors is 'wild', expected 'random' or a value by name"),
        ([1.0], r"factors is \[1.0\], expected 'random'"),
    ],
)
def test_bad_factors_are_refused_in_one_line(factors, message):
    with pytest.raises(envs.EnvError, match=message) as refused:
        envs.make("reach", size=16, factors=factors)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=message):
        envs.make("reach", size=16).reset(options={"factors": factors})


def test_goals_ahead_are_reached_in_so_many_steps_and_repeat_under_their_seed(task):
    env = goals_ahead(task, 12)
    for seed in unsolved_seeds(env, 2, 0, task.tolerance):
        _, info = env.reset(seed=seed)
        again, repeated = env.reset(seed=seed)
        np.testing.assert_array_equal(repeated["goal"], info["goal"])
        actions = env.get_wrapper_attr("guide")(np.random.default_rng(seed))
        for _ in range(12):
            again, *_, info = env.step(next(actions))
        assert info["success"]
        assert np.abs(again.astype(int) - info["goal"]).mean() < 1


class Silent(gymnasium.Wrapper):
    def reset(self, **options):
        return self.env.reset(**options)[0], {}


def test_goals_ahead_need_a_step_and_a_configuration():
    env = envs.make("reach", size=16)
    with pytest.raises(UserError, match="--ahead is 0"):
        goals_ahead(env, 0)
    with pytest.raises(UserError, match="configuration"):
        goals_ahead(Silent(env), 5)
