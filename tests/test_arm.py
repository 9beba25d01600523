"""The arm is the published one, keeps its limits, and goes where it is led."""

# pyright: reportAttributeAccessIssue=false
# (mujoco's names come from a compiled module without stubs)

import mujoco
import numpy as np
import pytest

from jepa_world import envs
from jepa_world.envs import panda
from jepa_world.envs.arm import BOX
from jepa_world.pictures import in_colour
from jepa_world.testing import check_env

CORNERS = np.stack(np.meshgrid(*BOX.T, indexing="ij"), -1).reshape(-1, 3)


@pytest.fixture(params=["arm", "arm_joint"])
def arm(request):
    env = envs.make(request.param, size=16, render_mode="rgb_array").unwrapped
    yield env
    env.close()


@pytest.fixture
def led():
    env = envs.make("arm", size=16).unwrapped
    yield env
    env.close()


def published_tip(angles):
    """Multiply the transforms of the table of Franka's documentation: a, d, alpha a row."""
    table = [
        (0, 0.333, 0),
        (0, 0, -np.pi / 2),
        (0, 0.316, np.pi / 2),
        (0.0825, 0, np.pi / 2),
        (-0.0825, 0.384, -np.pi / 2),
        (0, 0, np.pi / 2),
        (0.088, 0, np.pi / 2),
        (0, 0.107 + 0.1034, 0),
    ]
    frame = np.eye(4)
    for (a, d, alpha), theta in zip(table, [*angles, 0.0], strict=True):
        ca, sa, ct, st = np.cos(alpha), np.sin(alpha), np.cos(theta), np.sin(theta)
        frame = frame @ [
            [ct, -st, 0, a],
            [st * ca, ct * ca, -sa, -d * sa],
            [st * sa, ct * sa, ca, d * ca],
            [0, 0, 0, 1],
        ]
    return frame[:3, 3]


def test_kinematics_equal_the_published_chain_and_those_of_mujoco():
    model = mujoco.MjModel.from_xml_path(str(envs.__path__[0]) + "/arm.xml")
    data = mujoco.MjData(model)
    linear, angular = np.zeros((3, model.nv)), np.zeros((3, model.nv))
    many = np.random.default_rng(0).uniform(panda.LOW, panda.HIGH, (20, 7))
    tips, _, jacobians = panda.chain(many)
    for angles, tip, jacobian in zip(many, tips, jacobians, strict=True):
        np.testing.assert_allclose(tip, published_tip(angles), atol=1e-12)
        data.qpos[:7] = angles
        mujoco.mj_forward(model, data)
        np.testing.assert_allclose(tip, data.site("tip").xpos, atol=1e-7)
        mujoco.mj_jacSite(model, data, linear, angular, model.site("tip").id)
        expected = np.concatenate([linear[:, :7], angular[:, :7]])
        np.testing.assert_allclose(jacobian, expected, atol=1e-6)


def test_limits_of_the_model_are_those_of_the_kinematics():
    model = mujoco.MjModel.from_xml_path(str(envs.__path__[0]) + "/arm.xml")
    np.testing.assert_array_equal(model.jnt_range[:7], np.stack([panda.LOW, panda.HIGH], -1))


def test_keeps_the_contract(arm):
    check_env(arm)


def test_limits_of_angles_and_speeds_hold_whatever_is_asked(arm):
    generator = np.random.default_rng(0)
    for seed in range(4):
        arm.reset(seed=seed)
        for _ in range(12):
            action = np.sign(generator.uniform(-1, 1, arm.action_space.shape))
            for _ in range(6):
                state = arm.step(action)[4]["state"]
                assert (state[:7] > panda.LOW).all() and (state[:7] < panda.HIGH).all()
                assert (np.abs(state[7:]) < panda.SPEED / 0.99).all()
                assert panda.chain(state[:7])[0][2] > 0.0, "through the table"


def test_speeds_of_the_joints_are_bounded_even_next_to_a_singularity():
    stretched = np.array([0.0, 0.8, 0.0, -0.08, 0.0, 1.6, 0.0])
    speeds = panda.follow(stretched, np.array([10.0, 0.0, 0.0]))
    assert (np.abs(speeds) <= panda.SPEED + 1e-12).all() and np.isfinite(speeds).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_tip_moves_along_the_axis_asked_for_and_rests_at_zero(led, axis):
    _, info = led.reset(options={"start": (0.45, 0.0, 0.25)})
    before = info["proprio"][:3]
    action = np.zeros(3)
    action[axis] = 0.5
    for _ in range(4):
        led.step(action)
    *_, info = led.step(np.zeros(3))
    moved = info["proprio"][:3] - before
    assert moved[axis] == pytest.approx(0.08, abs=0.008)
    assert np.abs(np.delete(moved, axis)).max() < 0.005
    later = [led.step(np.zeros(3))[4]["proprio"][:3] for _ in range(20)]
    np.testing.assert_allclose(later[-1], info["proprio"][:3], atol=2e-3)


@pytest.mark.parametrize("corner", CORNERS, ids=str)
def test_every_corner_of_the_box_is_reached_with_the_hand_down(corner):
    tip, rotation, _ = panda.chain(panda.posture(corner))
    np.testing.assert_allclose(tip, corner, atol=1e-3)
    np.testing.assert_allclose(rotation, panda.DOWN, atol=0.02)


def test_the_same_place_has_one_posture_however_it_was_reached(led):
    led.reset(options={"start": (0.40, -0.2, 0.15)})
    for action in ([1, 1, 0], [0, 1, 1], [-1, 0, 1], [1, 1, -1]):
        for _ in range(4):
            led.step(np.array(action))
    _, _, _, _, info = [led.step(np.zeros(3)) for _ in range(20)][-1]
    expected = panda.posture(info["proprio"][:3].astype(float))
    np.testing.assert_allclose(info["configuration"], expected, atol=0.02)


def test_the_servo_of_the_joints_reaches_the_asked_speed_in_a_step():
    env = envs.make("arm_joint", size=16).unwrapped
    env.reset(options={"start": panda.REST})
    action = np.array([0.4, -0.2, 0.3, 0.1, -0.5, 0.2, 1.0])
    *_, info = env.step(action)
    np.testing.assert_allclose(info["state"][7:], 1.5 * action, rtol=0.05, atol=0.01)


def test_goal_set_as_start_is_a_success_and_looks_alike(arm):
    observation, info = arm.reset(options={"start": (0.5, 0.1, 0.2), "goal": (0.5, 0.1, 0.2)})
    np.testing.assert_array_equal(observation, info["goal"])
    assert info["success"] is True and arm.goal_distance() < 1e-12


def test_distance_and_reward_are_those_of_the_tip_in_metres(led):
    _, info = led.reset(options={"start": (0.40, 0.0, 0.20), "goal": (0.40, 0.3, 0.20)})
    assert led.goal_distance() == pytest.approx(0.3, abs=1e-3)
    _, reward, *_, info = led.step(np.zeros(3))
    assert reward == pytest.approx(-0.3, abs=1e-3) and info["success"] is False


def test_two_views_tell_apart_what_one_does_not(led):
    near, far = (led.reset(options={"start": (x, 0.0, 0.2)})[0].astype(int) for x in (0.35, 0.55))
    left, right = (led.reset(options={"start": (0.45, y, 0.2)})[0].astype(int) for y in (-0.2, 0.2))
    assert np.abs(near - far)[..., 3:].mean() > 3.0
    assert np.abs(left - right)[..., :3].mean() > 3.0


@pytest.mark.parametrize(("name", "object"), [("arm", "tip"), ("cube", "cube")])
def test_every_factor_alone_changes_the_picture_and_never_the_start(name, object):
    env = envs.make(name, size=32)
    plain, info = env.reset(seed=4)
    assert f"{object}_color" in info["factors"]
    for factor in info["factors"]:
        varied, other = env.reset(seed=4, options={"factors": {factor: "random"}})
        np.testing.assert_array_equal(other["configuration"], info["configuration"])
        assert (varied != plain).any(), factor


def test_render_shows_the_views_side_by_side(arm):
    observation, _ = arm.reset(seed=0)
    np.testing.assert_array_equal(arm.render(), in_colour(observation))
    assert arm.render().shape == (16, 32, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"begin": 0}, "unknown reset options.*known: start, goal, factors"),
        ({"start": (0, 0)}, "start is .*seven joint angles.*or the place of the tip"),
        ({"goal": (0, 0, 0, 0.5, 0, 0, 0)}, "goal is .*within the limits"),
        ({"goal": (2.0, 0, 0.2)}, "goal: the hand, held down, does not reach"),
        ({"goal": (float("nan"), 0, 0)}, "goal is"),
    ],
)
def test_refuses_bad_reset_options(led, options, message):
    with pytest.raises(ValueError, match=message):
        led.reset(options=options)


@pytest.mark.parametrize("action", [np.zeros(2), np.array([np.nan, 0.0, 0.0])])
def test_refuses_bad_actions(led, action):
    led.reset(seed=0)
    with pytest.raises(ValueError, match="expected 3 finite numbers"):
        led.step(action)
