import json
import sys

import numpy as np
import pytest
import torch

from jepa_world.data.trajectories import Trajectories


@pytest.fixture
def cloning(monkeypatch, capsys):
    """Run the script in this process; return its exit code and what it said."""
    import behaviour_cloning

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["behaviour_cloning.py", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            behaviour_cloning.main()
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr()

    return run


SMALL = (
    *("--encoder.dim", 8, "--encoder.width", 4, "--encoder.stages", 2, "--width", 16),
    *("--batch-size", 16, "--log-every", 10, "--precision", "no"),
)


def test_goals_are_later_frames_of_the_same_episode_and_all_of_them(tiny_data):
    from behaviour_cloning import Pairs

    training, _ = Trajectories(tiny_data).split(0.3)
    pairs, ends = Pairs(training, 0), np.cumsum(training.lengths) - 1
    index = np.arange(len(pairs.starts))
    assert len(index) == (training.lengths - 1).sum()
    seen = [set() for _ in index]
    for step in range(400):
        goals = pairs.goals(index, step)
        for ahead, goal in zip(seen, goals.tolist(), strict=True):
            ahead.add(goal)
        np.testing.assert_array_equal(pairs.goals(index[::3], step), goals[::3])
    for start, later in zip(pairs.starts.tolist(), seen, strict=True):
        end = int(ends[ends >= start][0])
        assert later == set(range(start + 1, end + 1))
    batch = pairs(index[:4], 0)
    now = training.read(pairs.starts[:4], 1)
    np.testing.assert_array_equal(batch["pixels"][:, :1], now["pixels"])
    np.testing.assert_array_equal(batch["action"], now["action"][:, 0])


def test_a_policy_learns_actions_that_the_goal_tells():
    """Two frames of one colour each; the action is the difference of their brightness."""
    from behaviour_cloning import Cloned, ClonedPolicy

    from jepa_world.encoders.conv import ConvEncoder

    torch.manual_seed(0)
    encoder = ConvEncoder((1, 3, 16, 16), dim=8, width=4, stages=2)
    model = Cloned(encoder, 1, width=32, depth=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def batch(count):
        grey = torch.randint(0, 256, (count, 2, 1, 1, 1), dtype=torch.uint8)
        action = (grey[:, 1].float() - grey[:, 0].float()).flatten(1) / 255
        return {"pixels": grey.expand(-1, -1, 16, 16, 3), "action": action}

    for step in range(300):
        optimizer.zero_grad()
        model(batch(64), step).loss.backward()
        optimizer.step()
    policy, held_out = ClonedPolicy(model.eval()), batch(50)
    errors = []
    for frames, action in zip(held_out["pixels"].numpy(), held_out["action"], strict=True):
        policy.reset(np.ascontiguousarray(frames[1]))
        errors.append(policy.act(np.ascontiguousarray(frames[0]))[0] - float(action))
    assert np.square(errors).mean() < 0.1 * float(held_out["action"].var())


def test_results_of_a_policy_are_those_of_evaluate_with_the_same_episodes(
    cloning, call, tiny_data, tiny_run, tmp_path
):
    runs = [tmp_path / "cloned0", tmp_path / "cloned1"]
    for seed, run in enumerate(runs):
        words = ("--data", tiny_data, *SMALL, "--steps", 20, "--seed", seed, "--run-dir", run)
        code, said = cloning("train", *words)
        assert code == 0, said.err
    trained = json.loads((runs[0] / "results.json").read_text())
    assert trained["step"] == 20 and trained["cpu_seconds"] > 0 and trained["action_error"] > 0
    protocol = ("--episodes", 4, "--budget", 6, "--ahead", 5, "--tolerance", 0.04)
    code, said = cloning(
        "evaluate", "--policy", *runs, *protocol, "--run-dir", tmp_path / "evaluated"
    )
    assert code == 0, said.err
    words = ("--planner.samples", 8, "--horizon", 3, "--run-dir", tmp_path / "model")
    assert call("evaluate", "--checkpoint", tiny_run, *protocol, *words).code == 0
    cloned, planned = (
        json.loads((tmp_path / name / "results.json").read_text())
        for name in ("evaluated", "model")
    )
    assert cloned.keys() == planned.keys() - {"simulator_ceiling"}
    assert list(cloned["models"]) == [str(run) for run in runs]
    assert cloned["success_end"]["n"] == 8
    for name in ("seeds", "random_floor", "tolerance", "budget", "env"):
        assert cloned[name] == planned[name]


def test_a_policy_trains_for_so_many_cpu_seconds_and_again_from_its_config(
    cloning, tiny_data, tmp_path
):
    one, two = tmp_path / "one", tmp_path / "two"
    words = ("--data", tiny_data, *SMALL, "--seconds", 1, "--run-dir", one)
    code, said = cloning("train", *words)
    assert code == 0, said.err
    assert json.loads((one / "results.json").read_text())["step"] > 5
    code, said = cloning("train", "--config", one / "config.yaml", "--run-dir", two)
    assert code == 0, said.err
    weights = [run / "checkpoint" / "model.safetensors" for run in (one, two)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_what_is_no_policy_is_refused_in_one_line(cloning, tiny_run, tmp_path):
    code, said = cloning("evaluate", "--policy", tiny_run, "--run-dir", tmp_path / "run")
    assert code == 2 and "holds the method 'world_model'" in said.err
    assert len(said.err.splitlines()) == 1
    for words in ((), ("--polisy", tiny_run)):
        code, said = cloning("evaluate", *words)
        assert code == 2 and "--policy" in said.err
