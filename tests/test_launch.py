"""One engine under every launcher: accelerate, torchrun; N processes equal one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ON_CPU

from jepa_world.checkpoint import load_tensors
from jepa_world.data.trajectories import Trajectories

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "accelerate"


def launch(name, *words, **options):
    """Run a root script by accelerate launch with one of the files of configs/accelerate."""
    file = str(CONFIGS / f"{name}.yaml")
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file]
    return execute([*line, *words], **options)


def execute(line, **options):
    environment = os.environ | ON_CPU | {"OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*map(str, line)], env=environment, capture_output=True, text=True, **options
    )


@pytest.mark.parametrize(
    ("name", "processes", "machines"),
    [("cpu_1", 1, 1), ("cpu_2", 2, 1), ("gpu_8", 8, 1), ("nodes_2", 16, 2), ("fsdp_8", 8, 1)],
)
def test_a_launch_file_is_read_whole_by_accelerate(name, processes, machines):
    config: Any = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.num_processes, config.num_machines) == (processes, machines)
    kind = "FSDP" if name == "fsdp_8" else "MULTI_GPU" if processes > 1 else "NO"
    assert config.distributed_type == kind
    assert config.use_cpu == name.startswith("cpu")
    given = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert all(str(config.to_dict()[key]).endswith(str(value)) for key, value in given.items())


def test_several_cpu_processes_that_are_not_started_are_missed(call, monkeypatch, tmp_path):
    """What `accelerate launch --cpu --num_processes 2` leaves in the environment of its one."""
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    ended = call("collect", "--episodes", 2, "--data", tmp_path / "data")
    assert "several processes on a CPU and started one" in ended.complaint()
    assert "--config_file configs/accelerate/cpu_2.yaml" in ended.stderr
    assert not (tmp_path / "data").exists()


def test_more_processes_than_episodes_are_refused(call, monkeypatch, tiny_run, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    words = ("--checkpoint", tiny_run, "--episodes", 2, "--run-dir", tmp_path / "run")
    assert "3 processes for 2 episodes: start fewer" in call("evaluate", *words).complaint()


@pytest.mark.slow
def test_accelerate_starts_the_one_process_that_the_trap_is_about(tiny_words, tiny_data, tmp_path):
    line = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2]
    done = execute([*line, ROOT / "train_world_model.py", *tiny_words, "--data", tiny_data])
    assert done.returncode != 0 and "several processes on a CPU and started one" in done.stderr


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_launched_processes_collect_the_dataset_of_one(tmp_path):
    """Each its share of the files."""
    how = ("--episodes", 7, "--steps", 6, "--image-size", 32, "--shard-episodes", 2, "--data")
    assert execute([sys.executable, ROOT / "collect.py", *how, tmp_path / "one"]).returncode == 0
    done = launch("cpu_2", ROOT / "collect.py", *how, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("7 episodes, 49 frames") == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert Trajectories(tmp_path / "two").num_episodes == 7


@pytest.mark.slow
@pytest.mark.parametrize("command", ["evaluate", "plan"])
def test_launched_processes_plan_what_one_does(command, tiny_run, tmp_path):
    """Episodes are dealt out; all numbers but times are those of one process, the film as well."""
    words = ("--checkpoint", tiny_run, "--episodes", 5, "--budget", 3, "--horizon", 3)
    words += ("--planner.samples", 8, "--run-dir")
    line = [sys.executable, ROOT / f"{command}.py", *words, tmp_path / "one"]
    assert execute(line).returncode == 0
    done = launch("cpu_2", ROOT / f"{command}.py", *words, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("everything this run made is in") == 1
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    times = {"plan_seconds", "wall_seconds", "cpu_seconds", "peak_memory_mb"}
    assert {k: v for k, v in one.items() if k not in times} == {
        k: v for k, v in two.items() if k not in times
    }
    if command == "plan":
        films = [(tmp_path / run / "plan.mp4").read_bytes() for run in ("one", "two")]
        assert films[0] == films[1]


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_results_are_gathered_again_when_one_process_is_late(late, tmp_path):
    """The other one must not take the late one's address of the time before."""
    script = tmp_path / "twice.py"
    script.write_text(
        "import time\n"
        "from jepa_world.processes import gather, launched\n"
        "number, _ = launched()\n"
        "print(gather({'first': [number]}))\n"
        f"time.sleep(number == {late})\n"
        "print(gather({'second': [number]}))\n"
    )
    done = launch("cpu_2", script, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("{'first': [0, 1]}") == 2
    assert done.stdout.count("{'second': [0, 1]}") == 2


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("cpu_1", 1), ("cpu_2", 2), ("fsdp_8", 2)])
def test_accelerate_trains_with_the_processes_of_a_file(
    name, processes, tiny_words, tiny_data, tiny_run, tmp_path
):
    folder = tmp_path / "run"
    words = [*tiny_words, "--data", tiny_data, "--run-dir", folder]
    fewer = ["--num_processes", processes]
    done = launch(name, *fewer, ROOT / "train_world_model.py", *words)
    assert done.returncode == 0, done.stderr
    assert f"{processes} process(es) on cpu" in done.stdout
    assert ("sharded over 2 processes" in done.stdout) == (name == "fsdp_8")
    losses = [
        [line["loss"] for line in map(json.loads, lines) if "loss" in line]
        for lines in (
            (run / "metrics.jsonl").read_text().splitlines() for run in (folder, tiny_run)
        )
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)  # float32, after AdamW


@pytest.mark.slow
def test_sigterm_ends_all_processes_with_one_checkpoint_that_one_process_resumes(
    tiny_words, tiny_data, tmp_path
):
    folder = tmp_path / "run"
    words = [*tiny_words, "--data", tiny_data, "--steps", 5000, "--run-dir", folder]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | ON_CPU | {"PYTHONPATH": str(ROOT)}
    line = [*line, *map(str, (ROOT / "train_world_model.py", *words))]
    process = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (folder / "checkpoint/training.safetensors").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    ends = [text for text in said.splitlines() if text.startswith("train_world_model: asked to")]
    assert len(ends) == 2 and len(set(ends)) == 1, said
    step = load_tensors(folder / "checkpoint" / "training.safetensors")[1]["step"]
    assert f"stopped after step {step} of 5000" in ends[0]
    last = ("--resume", "--run-dir", folder, "--steps", step + 1)
    done = execute([sys.executable, ROOT / "train_world_model.py", *last])
    assert done.returncode == 0, done.stderr
    assert "resumed on 1 process(es), stopped on 2" in done.stdout
    assert "not bit for bit" in done.stdout
