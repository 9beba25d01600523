import numpy as np
import pytest

from jepa_world import envs
from jepa_world.envs.maze import CELL, LAYOUTS, Ways
from jepa_world.policies import smooth_actions

MAZES = ["maze", "maze_medium", "maze_large"]


@pytest.fixture(scope="module", params=MAZES)
def maze(request):
    env = envs.make(request.param, size=16).unwrapped
    yield env
    env.close()


def middles(env):
    """Return the middles of all free cells."""
    rows, columns = env.walls.shape
    free = np.argwhere(~env.walls) + 0.5
    return CELL * np.stack([free[:, 1] - columns / 2, rows / 2 - free[:, 0]], 1)


def in_a_free_cell(env, place):
    return (np.abs(middles(env) - place).max(1) <= CELL / 2).any()


def test_walls_are_never_crossed_nor_entered(maze):
    actions = np.random.default_rng(0).choice([-1.0, 1.0], (25, 2)).repeat(4, axis=0)
    _, info = maze.reset(seed=0)
    before = place = info["configuration"]
    for action in actions:
        place = maze.step(action)[4]["configuration"]
        assert in_a_free_cell(maze, place)
        assert in_a_free_cell(maze, (before + place) / 2)
        before = place
    maze.reset(options={"start": place, "goal": place})  # refused, were it in a wall


def test_ways_are_distances_round_the_walls(maze):
    places = middles(maze)
    lengths = []
    for goal in places:
        maze._ways.aim(goal)
        lengths.append(maze._ways(places))
    lengths = np.stack(lengths)
    straight = np.linalg.norm(places[:, None] - places, axis=-1)
    assert np.isfinite(lengths).all()
    assert (lengths >= straight - 1e-9).all() and (np.diag(lengths) == 0).all()
    np.testing.assert_allclose(lengths, lengths.T, atol=1e-9)
    detours = lengths[:, :, None] + lengths  # from a over b to c
    assert (lengths <= detours.min(1) + 1e-9).all()
    next_to = np.isclose(straight, CELL)
    np.testing.assert_allclose(lengths[next_to], CELL)
    assert (lengths > 2 * straight).any()  # somewhere a wall lies between


def test_no_way_leads_between_walls_that_touch_at_a_corner():
    env = envs.make("maze", size=16, layout="##### #..## #.#.# #...# #####").unwrapped
    env.reset(options={"start": (0.0, 0.1), "goal": (0.1, 0.0)})
    assert env.goal_distance() > 0.3  # 0.14 through the corner


def test_ways_bend_round_a_box_as_geometry_says():
    corners = 1.0001 * np.array([[-1, 1], [1, 1], [1, -1]])
    ways = Ways(np.array([[-1.0, -1.0, 1.0, 1.0]]), corners)
    ways.aim(np.array([2.0, 0.0]))
    lengths = ways(np.array([[-2.0, 0.0], [0.0, 2.0], [0.0, 3.0]]))
    expected = [2 * np.sqrt(2) + 2, 2 * np.sqrt(2), np.sqrt(13)]
    np.testing.assert_allclose(lengths, expected, atol=1e-3)


def test_a_mirrored_maze_looks_and_moves_as_the_mirror_image():
    rows = LAYOUTS["medium"].split()
    plain = envs.make("maze", layout=" ".join(rows))
    mirrored = envs.make("maze", layout=" ".join(row[::-1] for row in rows))
    start, goal = np.array([-0.25, 0.25]), np.array([0.25, -0.25])
    first, info = plain.reset(options={"start": start, "goal": goal})
    second, other = mirrored.reset(options={"start": start * [-1, 1], "goal": goal * [-1, 1]})
    assert np.abs(first[:, ::-1].astype(int) - second).mean() < 0.5
    for action in np.random.default_rng(0).uniform(-1, 1, (20, 2)):
        *_, info = plain.step(action)
        *_, other = mirrored.step(action * [-1, 1])
    np.testing.assert_allclose(other["configuration"], info["configuration"] * [-1, 1], atol=1e-6)
    assert mirrored.unwrapped.goal_distance() == pytest.approx(plain.unwrapped.goal_distance())


def test_the_expert_gets_to_every_goal(maze):
    for seed in range(2):
        _, info = maze.reset(seed=seed)
        actions = maze.expert(np.random.default_rng(0))
        for _ in range(70):
            *_, info = maze.step(next(actions))
        assert info["success"]


def test_guides_see_more_of_a_maze_than_random_actions():
    env = envs.make("maze_large", size=16).unwrapped
    seen = {"guided": set(), "random": set()}
    for policy, cells in seen.items():
        env.reset(seed=0)
        generator = np.random.default_rng(0)
        guided = env.guide(generator)
        actions = guided if policy == "guided" else iter(smooth_actions(generator, 120, 2))
        for _ in range(120):
            place = env.step(next(actions))[4]["configuration"]
            cells.add(tuple(np.floor(place / CELL).astype(int)))
    assert len(seen["guided"]) > 1.5 * len(seen["random"])


def test_start_and_goal_are_drawn_in_different_free_cells(maze):
    for seed in range(20):
        _, info = maze.reset(seed=seed)
        assert in_a_free_cell(maze, info["configuration"]) and not info["success"]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("huge", "layout is 'huge', expected small, medium, large, or rows of # and ."),
        ("### #.# ##", "rows of # and . of one length"),
        ("##### #..x# #####", "rows of # and ."),
        ("#.### #..## #####", "must be walls"),
        ("##### #.#.# #####", "a way between any two"),
        ("### #.# ###", "two free cells"),
    ],
)
def test_refuses_bad_layouts_in_one_line(layout, message):
    with pytest.raises(envs.EnvError, match=message) as refused:
        envs.make("maze", layout=layout)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"begin": (0, 0)}, "unknown reset options.*known: start, goal, factors"),
        ({"start": (0, 0, 0)}, r"start is .*expected \(x, y\)"),
        ({"goal": (-0.1, 0.0)}, "goal is .*nearer to a wall"),
        ({"goal": (0.0, 0.14)}, "goal is .*nearer to a wall"),
    ],
)
def test_refuses_bad_reset_options(options, message):
    with pytest.raises(ValueError, match=message):
        envs.make("maze", size=16).reset(options=options)
