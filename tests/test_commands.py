import base64
import dataclasses
import json
import re
import shutil
from itertools import product
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
from PIL import Image

from jepa_world.checkpoint import load_tensors, save_tensors, write_yaml
from jepa_world.config import read_yaml
from jepa_world.data.trajectories import Trajectories
from jepa_world.data.video import read_video, video_times

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("--episodes", 2, "--budget", 3, "--horizon", 3, "--planner.samples", 8)
RATE = {"rate", "n", "low", "high"}
WRONG = """
import torch
from torch import nn

class Short(nn.Module):
    def __init__(self, dim, action_dim):
        super().__init__()
        self.f = nn.Linear(dim + action_dim, dim)

    def forward(self, z, action):
        return z[:, 1:]

class Prophet(Short):
    def forward(self, z, action):
        return self.f(torch.cat([z.flip(1), action.unsqueeze(2)], -1))

class Blind(nn.Module):
    def __init__(self, observation_shape):
        super().__init__()
"""


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copy_of(tmp_path):
    """Copy a run or a dataset, to be spoiled."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / folder.name))


@pytest.fixture
def refuses(call, tmp_path, monkeypatch):
    """Run a command that must refuse, and leave no run folder."""
    monkeypatch.chdir(tmp_path)

    def run(message, command, *words):
        if command == "train_world_model":
            words += ("--precision", "no")
        complaint = call(command, *words, "--run-dir", tmp_path / "refused").complaint()
        assert complaint.startswith(f"{command}: ") and re.search(message, complaint), complaint
        assert not (tmp_path / "refused").exists()

    return run


@pytest.fixture(scope="module")
def planned(tiny_run, shell, tmp_path_factory):
    """A run of `plan.py` with a tiny budget, in a process of its own."""
    folder = tmp_path_factory.mktemp("planned")
    ended = shell("plan.py", "--checkpoint", tiny_run, *SHORT, "--run-dir", "run", cwd=folder)
    assert ended.code == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "everything this run made is in run"
    return folder / "run"


@pytest.fixture(scope="module")
def evaluated(tiny_run, shell, tmp_path_factory):
    """A run of `evaluate.py` over two models."""
    folder = tmp_path_factory.mktemp("evaluated")
    other = shutil.copytree(tiny_run, folder / "other")
    words = ("--checkpoint", tiny_run, other, *SHORT, "--run-dir", folder / "run")
    ended = shell("evaluate.py", *words)
    assert ended.code == 0, ended.stderr
    return folder / "run"


def results_of(folder):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads((folder / "results.json").read_text(), parse_constant=refuse)


def test_plan_leaves_its_numbers(planned):
    results = results_of(planned)
    assert RATE == set(results["success_end"]) == set(results["success_ever"])
    assert {"median", "p95"} == set(results["plan_seconds"])
    assert (results["budget"], results["tolerance"], len(results["seeds"])) == (3, 0.05, 2)
    assert {"versions", "device", "wall_seconds"} <= set(results)
    assert len(results["final_distances"]) == 2


def test_plan_leaves_a_video_a_picture_and_a_page_that_holds_both(planned):
    frames = read_video(planned / "plan.mp4", video_times(planned / "plan.mp4"))
    assert len(frames) == 2 * (3 + 1) and frames.std() > 10
    Image.open(planned / "plan.png").verify()
    page = (planned / "report.html").read_text()
    held = [base64.b64decode(data) for data in re.findall(r'src="data:.*?;base64,(.*?)"', page)]
    assert held == [(planned / name).read_bytes() for name in ("plan.mp4", "plan.png")]
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


def test_the_configuration_a_run_leaves_repeats_it(planned, tiny_run, call, tmp_path):
    words = ("--config", planned / "config.yaml", "--run-dir", tmp_path / "again")
    assert call("plan", *words).code == 0
    first, again = results_of(planned), results_of(tmp_path / "again")
    for key in ("success_end", "success_ever", "seeds", "final_distances", "checkpoint"):
        assert first[key] == again[key]


def test_evaluate_leaves_floor_and_ceiling_beside_the_models(evaluated):
    results = results_of(evaluated)
    keys = ("random_floor", "simulator_ceiling", *product(["models"], results["models"]))
    for rates in (
        results,
        *(results[k] if isinstance(k, str) else results[k[0]][k[1]] for k in keys),
    ):
        assert RATE == set(rates["success_end"]) == set(rates["success_ever"])
    assert results["success_end"]["n"] == 4 and results["random_floor"]["success_end"]["n"] == 2
    assert {"plan_seconds", "seeds", "tolerance", "budget"} <= set(results)
    assert all({"planner", "horizon"} <= set(model) for model in results["models"].values())
    distances = list(results["final_distances"].values())
    assert len(distances) == 2 and distances[0] == distances[1]


def test_evaluate_and_plan_agree_on_the_same_episodes(planned, evaluated):
    assert results_of(planned)["seeds"] == results_of(evaluated)["seeds"]
    other = next(iter(results_of(evaluated)["final_distances"].values()))
    assert results_of(planned)["final_distances"] == other


def test_recorded_episodes_are_those_evaluated_and_are_trained_on(
    evaluated, tiny_run, tiny_data, tiny_words, call, tmp_path
):
    words = ("--checkpoint", tiny_run, *SHORT, "--no-ceiling", "--record", tmp_path / "planned")
    assert call("evaluate", *words, "--run-dir", tmp_path / "run").code == 0
    distances, *_ = results_of(tmp_path / "run")["final_distances"].values()
    assert distances in results_of(evaluated)["final_distances"].values()
    data = Trajectories(tmp_path / "planned")
    assert (data.env, data.lengths.tolist()) == ("jepa_world/Reach-v0", [4, 4])
    batch = data.read(data.windows(4), 4)
    assert batch["pixels"].std() > 10 and np.abs(batch["action"][:, :3]).max() <= 1
    assert not batch["action"][:, 3].any() and np.abs(batch["state"]).max() > 0
    both = ("--data", tiny_data, tmp_path / "planned", "--run-dir", tmp_path / "both")
    ended = call("train_world_model", *tiny_words, *both)
    assert ended.code == 0 and "9 episodes" in ended.stdout, ended
    again = call("evaluate", *words, "--run-dir", tmp_path / "again").complaint()
    assert re.search("--record .*planned is there already", again)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("plan", ("--env", "raech"), "'raech'; nearest: reach"),
        ("plan", ("--env", "Raech-v0", "--checkpoint", "RUN"), "unknown env 'Raech-v0'; nearest: "),
        ("plan", ("--env", "none:Env-v0", "--checkpoint", "RUN"), "env 'none:Env-v0' cannot"),
        ("plan", ("--env", "CartPole-v1", "--checkpoint", "RUN"), "for env 'jepa_world/Reach-v0'"),
        ("plan", ("--episode", 3), "--episode.*nearest: --episodes"),
        ("plan", ("--planner", "cme"), "unknown planner 'cme'; nearest: cem"),
        ("plan", ("--planner.elite", 3), r"--planner\.elite.*nearest: --planner\.elites"),
        ("plan", ("--planner.elites", 999, "--checkpoint", "RUN"), "elites < samples, got"),
        ("plan", ("--objective", "efort", "--checkpoint", "RUN"), "'efort'; nearest: effort"),
        ("plan", ("--objective", "effort=x", "--checkpoint", "RUN"), "'x' is no weight, as in"),
        ("plan", ("--objective", "effort=-1", "--checkpoint", "RUN"), "'-1' is no weight"),
        ("plan", ("--objective", "torch:zeros", "--checkpoint", "RUN"), "objective failed on inp"),
        ("plan", ("--objective", "torch:zeroes", "--checkpoint", "RUN"), "no function 'zeroes'"),
        ("plan", ("--episodes", 0, "--checkpoint", "RUN"), "--episodes is 0: give at least 1"),
        ("plan", ("--budget", 0, "--checkpoint", "RUN"), "--budget is 0: give at least 1"),
        ("plan", ("--horizon", 0, "--checkpoint", "RUN"), "--horizon is 0: give at least 1"),
        ("plan", ("--history", 0, "--checkpoint", "RUN"), "--history is 0: give at least 1"),
        ("plan", ("--tolerance", "nan", "--checkpoint", "RUN"), "--tolerance is nan"),
        ("plan", ("--tolerance", 9, "--checkpoint", "RUN"), "nearly all episodes begin within"),
        ("plan", ("--checkpoint", "nowhere"), "no checkpoint in 'nowhere': it is not a folder"),
        ("evaluate", ("--episodes", -1), "--episodes is -1"),
        ("evaluate", ("--checkpoint", "RUN", "nowhere"), "no checkpoint in 'nowhere'"),
        ("train_world_model", ("--data", "nowhere"), "dataset nowhere does not exist"),
        ("train_world_model", ("--data", "DATA", "nowhere"), "dataset nowhere does not exist"),
        ("train_world_model", ("--data",), "--data names no dataset"),
        ("train_world_model", ("--encoder", "cnov"), "unknown encoder 'cnov'; nearest: conv"),
        ("train_world_model", ("--predictor", "mpl"), "unknown predictor 'mpl'; nearest: mlp"),
        ("train_world_model", ("--steps", 0, "--data", "DATA"), "--steps is 0"),
        ("train_world_model", ("--frames", 1, "--data", "DATA"), "--frames is 1: give at least 2"),
        ("train_world_model", ("--frames", 99, "--data", "DATA"), "more than the 0 samples"),
        ("train_world_model", ("--log-every", 0, "--data", "DATA"), "--log-every is 0"),
        ("train_world_model", ("--lr", "nan", "--data", "DATA"), "--lr is nan"),
        ("train_world_model", ("--encoder.width", -4, "--data", "DATA"), "'conv' cannot be built"),
        (
            "train_world_model",
            ("--encoder.stages", 9, "--data", "DATA"),
            "too small for 9 halvings",
        ),
        ("train_world_model", ("--resume", "--data", "DATA"), "nothing to resume in"),
        ("train_world_model", ("--loop.log-with", "wandb", "--data", "DATA"), "pip install wandb"),
    ],
)
def test_a_wrong_word_ends_in_one_line(refuses, tiny_run, tiny_data, command, words, message):
    stands_for = {"RUN": tiny_run, "DATA": tiny_data}
    refuses(message, command, *(stands_for.get(word, word) for word in words))


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_damaged_checkpoint_ends_in_one_line(refuses, copy_of, tiny_run, name, damage):
    file = copy_of(tiny_run) / "checkpoint" / name
    data = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(data[: len(data) // 2 if damage == "cut" else 0])
    refuses(rf"{name}|the checkpoint (gives|describes)", "plan", "--checkpoint", file.parents[1])


def test_a_checkpoint_of_another_env_action_or_frame_ends_in_one_line(refuses, copy_of, tiny_run):
    folder = copy_of(tiny_run)
    description = read_yaml(folder / "checkpoint" / "config.yaml")

    def spoil(message, **changes):
        write_yaml(folder / "checkpoint" / "config.yaml", description | changes)
        refuses(message, "evaluate", "--checkpoint", folder)

    spoil("trained for env 'Other-v0', not for 'reach'", env="Other-v0")
    spoil("predictor.action_in.weight.*another model", action_dim=3)
    spoil("encoder.projector.*another model", observation_shape=[1, 3, 40, 40])
    spoil("holds the method 'lejepa'", method="lejepa")
    spoil("unknown encoder 'none'", encoder={"name": "none"})
    spoil("has no option 'widht'", encoder=description["encoder"] | {"widht": 3})
    spoil("the checkpoint gives the action_dim 'many': expected", action_dim="many")


def test_a_model_for_another_action_size_ends_in_one_line(refuses, copy_of, tiny_run):
    folder = copy_of(tiny_run)
    file = folder / "checkpoint" / "config.yaml"
    write_yaml(file, read_yaml(file) | {"action_dim": 3})
    tensors, facts = load_tensors(file.with_name("model.safetensors"))
    wide = tensors["predictor.action_in.weight"].new_zeros(16, 3)
    tensors["predictor.action_in.weight"] = wide
    save_tensors(file.with_name("model.safetensors"), tensors, facts)
    refuses(r"actions of 'reach' are \(2,\), the checkpoint expects \(3,\)", "plan",
            "--checkpoint", folder)  # fmt: skip


def test_an_env_without_a_goal_ends_in_one_line(refuses, copy_of, tiny_run):
    class Goalless(gym.Env):
        observation_space = gym.spaces.Box(0, 255, (32, 32, 3), np.uint8)
        action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

        def reset(self, *, seed=None, options=None):
            return np.zeros((32, 32, 3), np.uint8), {}

    gym.register("Goalless-v0", entry_point=lambda **options: Goalless())
    folder = copy_of(tiny_run)
    file = folder / "checkpoint" / "config.yaml"
    write_yaml(file, read_yaml(file) | {"env": "Goalless-v0"})
    refuses(r"gives no info\['goal'\]", "plan", "--env", "Goalless-v0", "--checkpoint", folder)


def test_an_env_that_knows_success_alone_is_planned_in(call, copy_of, tiny_run, tmp_path):
    from jepa_world.envs import make

    class Plain(gym.Env):
        """Reach without its true distances."""

        def __init__(self):
            inner = make("reach", size=32)
            self.reset, self.step = inner.reset, inner.step
            self.observation_space, self.action_space = inner.observation_space, inner.action_space

    gym.register("Plain-v0", entry_point=lambda **options: Plain())
    folder = copy_of(tiny_run)
    file = folder / "checkpoint" / "config.yaml"
    write_yaml(file, read_yaml(file) | {"env": None})
    words = ("--env", "Plain-v0", "--checkpoint", folder, *SHORT)
    for command in ("plan", "evaluate"):
        ended = call(command, *words, "--run-dir", tmp_path / command)
        assert ended.code == 0, ended.stderr
        assert "simulator_ceiling" not in results_of(tmp_path / command)


def test_a_dataset_cut_short_ends_in_one_line(refuses, copy_of, tiny_data):
    folder = copy_of(tiny_data)
    (shard,) = folder.glob("*.h5")
    data = shard.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.99):
        shard.write_bytes(data[: int(share * len(data))])
        refuses("damaged or cut short", "train_world_model", "--data", folder)
    shard.unlink()
    refuses("0 of 8 episodes", "train_world_model", "--data", folder)


@pytest.mark.parametrize("column", ["action", "state", "proprio"])
def test_a_number_that_is_not_finite_ends_in_one_line(refuses, copy_of, tiny_data, column):
    folder = copy_of(tiny_data)
    with h5py.File(next(folder.glob("*.h5")), "r+") as file:
        stored = file[column]
        assert isinstance(stored, h5py.Dataset)
        stored[17] = np.nan
    message = rf"episode 1 \({column} is not finite in row 4\)"
    refuses(message, "train_world_model", "--data", folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--predictor", "wrong_parts:Short"), r"predictor returned \(3, 0, 1, 32\), expected"),
        (("--predictor", "wrong_parts:Prophet"), "predictor looks into the future"),
        (("--encoder", "wrong_parts:Blind"), "encoder 'wrong_parts:Blind' .*`dim`"),
        (("--predictor", "wrong_parts:Missing"), "no class 'Missing'"),
    ],
)
def test_a_part_that_breaks_its_contract_ends_in_one_line(
    refuses, tiny_data, tmp_path, words, message
):
    (tmp_path / "wrong_parts.py").write_text(WRONG)
    refuses(message, "train_world_model", *words, "--data", tiny_data)


def test_a_run_folder_that_holds_something_is_left_as_it_is(call, tiny_run, tiny_data, tiny_words):
    before = contents(tiny_run)
    for command, words in (
        ("train_world_model", (*tiny_words, "--data", tiny_data)),
        ("plan", ("--checkpoint", tiny_run, *SHORT)),
        ("evaluate", ("--checkpoint", tiny_run, *SHORT)),
    ):
        complaint = call(command, *words, "--run-dir", tiny_run).complaint()
        assert "is not empty: nothing is overwritten" in complaint
    assert contents(tiny_run) == before


def test_a_run_folder_that_cannot_be_made_ends_in_one_line(call, tiny_run, tmp_path):
    (tmp_path / "file").write_text("")
    words = ("--checkpoint", tiny_run, *SHORT, "--run-dir", tmp_path / "file" / "run")
    assert "cannot write the run folder" in call("plan", *words).complaint()


def test_a_loss_that_explodes_ends_in_one_line_after_the_progress(
    call, tiny_data, tiny_words, tmp_path
):
    words = [*tiny_words, "--data", tiny_data, "--lr", 1e30, "--steps", 30, "--log-every", 1]
    ended = call("train_world_model", *words, "--run-dir", tmp_path / "run")
    last = ended.stderr.splitlines()[-1]
    assert ended.code == 2 and "Traceback" not in ended.stderr
    assert re.search("train_world_model: .* lower --lr; the last good checkpoint is in", last)


def test_no_opengl_ends_in_one_line(shell, tiny_run, tmp_path):
    words = ("plan.py", "--checkpoint", tiny_run, "--run-dir", tmp_path / "run")
    none = {"MUJOCO_GL": "egl", "__EGL_VENDOR_LIBRARY_FILENAMES": "/nowhere.json"}
    complaint = shell(*words, cwd=tmp_path, **none).complaint()
    assert complaint.startswith("plan: OpenGL does not start") and "libegl1" in complaint
    assert not (tmp_path / "run").exists()


def test_real_processes_say_the_same(shell, tmp_path):
    assert "nearest: --episodes" in shell("plan.py", "--episode", 3, cwd=tmp_path).complaint()
    assert "nearest: cem" in shell("evaluate.py", "--planner", "cm", cwd=tmp_path).complaint()
    assert "at least 1" in shell("collect.py", "--episodes", 0, cwd=tmp_path).complaint()
    assert not list(tmp_path.iterdir())


def test_one_entry_point_has_all_commands(monkeypatch, capsys):
    from jepa_world.commands import COMMANDS, main

    def run(*words):
        monkeypatch.setattr("sys.argv", ["jepa-world", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == (0 if "--help" in words else 2)
        return "".join(capsys.readouterr())

    assert all(command in run("--help") for command in COMMANDS)
    assert run("paln").startswith("paln: unknown command 'paln'; nearest: plan")
    assert "--checkpoint" in run("plan", "--help")
    assert "--regulariser.weight" in run("train-world-model", "--help")


def test_a_seed_of_the_planner_is_an_option_that_counts(call, tiny_run, tmp_path):
    def distances(*words):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        ended = call("evaluate", "--checkpoint", tiny_run, *SHORT, *words, "--run-dir", folder)
        assert ended.code == 0, ended.stderr
        return list(results_of(folder)["final_distances"].values())

    assert distances() == distances("--planner.seed", 0) != distances("--planner.seed", 1)


OWN_COST = """
def hold_still(z, plans, goal):
    return plans.abs().sum((-1, -2))
"""


def test_an_objective_is_a_sum_of_named_functions_ones_own_among_them(
    call, tiny_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_cost.py").write_text(OWN_COST)
    (tmp_path / "goal.yaml").write_text("objective: [summed_distance, smoothness=0.1]\n")

    def run(*words):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        ended = call("evaluate", "--checkpoint", tiny_run, *SHORT, *words, "--run-dir", folder)
        assert ended.code == 0, ended.stderr
        saved = read_yaml(folder / "config.yaml")["objective"]
        return saved, next(iter(results_of(folder)["final_distances"].values()))

    plain, held = run(), run("--objective", "summed_distance", "own_cost:hold_still=1e4")
    still = run("--objective", "effort")
    assert plain[0] is None and run("--config", "goal.yaml")[0][1] == "smoothness=0.1"
    assert held[1] == pytest.approx(still[1], abs=0.02) and held[1] != plain[1]


@pytest.mark.parametrize(
    "planner", ["icem", "mppi", "predictive_sampling", "cem_gradient", "grasp"]
)
def test_every_planner_is_a_flag_away(call, tiny_run, tmp_path, planner):
    words = ("--planner", planner, *SHORT[:6], "--run-dir", tmp_path / "run")
    ended = call("plan", "--checkpoint", tiny_run, *words)
    assert ended.code == 0, ended.stderr


def test_a_planner_that_needs_slopes_has_no_ceiling_and_says_so(call, tiny_run, tmp_path):
    words = ("--planner", "gradient", *SHORT[:6], "--run-dir", tmp_path / "run")
    ended = call("evaluate", "--checkpoint", tiny_run, *words)
    assert ended.code == 0 and "no ceiling, the true simulator gives only costs" in ended.stdout
    assert "simulator_ceiling" not in results_of(tmp_path / "run")


def test_no_configuration_has_a_field_that_nobody_reads():
    from jepa_world.commands.collect import Collect
    from jepa_world.commands.evaluate import Evaluate
    from jepa_world.commands.plan import Plan
    from jepa_world.commands.train_world_model import TrainWorldModel

    for config in (Collect, Evaluate, Plan, TrainWorldModel):
        modules = {base.__module__.replace(".", "/") for base in config.__mro__[:-1]}
        text = "".join((ROOT / f"{module}.py").read_text() for module in modules)
        for item in dataclasses.fields(config):
            assert re.search(rf"\bconfig\.{item.name}\b|\"{item.name}\"", text), item.name
