"""What several test files share: a tiny dataset, a tiny trained model, ways to run a command."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the fastest for nets this small

ROOT = Path(__file__).resolve().parents[1]
ON_CPU = {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}  # two processes, one GPU
TINY = {
    "encoder.dim": "8",
    "encoder.width": "4",
    "encoder.stages": "2",
    "predictor.width": "16",
    "regulariser.slices": "16",
    "steps": "6",
    "batch-size": "8",
    "log-every": "2",
    "checkpoint-every": "3",
    "precision": "no",
}

FEW = (
    *("--log-every", 1, "--checkpoint-every", 2, "--precision", "no", "--loop.keep", 2),
    *("--steps", 12, "--batch-size", 8),
)
TOKENS = (
    *("--encoder.dim", 32, "--encoder.depth", 1, "--encoder.heads", 2, "--encoder.patch", 8),
    *("--masked-predictor.width", 16, "--masked-predictor.depth", 1),
)
COMMANDS = [
    ("train_lejepa",),
    ("train_ijepa", "--teacher", "none"),
    ("train_ijepa", "--teacher", "ema"),
    ("train_vjepa", "--teacher", "none"),
    ("train_vjepa", "--teacher", "ema"),
    ("train_world_model",),
    ("train_world_model", "--regulariser.name", "ema"),
    ("train_cost", "--cost.width", 16, "--policy", "cloned", "--policy.width", 16),
]


def pytest_runtest_setup() -> None:
    """Draw the same numbers in every run, whatever ran before in this process."""
    torch.manual_seed(0)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    def complaint(self) -> str:
        """Return the one line on stderr of a command that refused its input."""
        lines = self.stderr.splitlines()
        assert self.code == 2 and len(lines) == 1, f"exit code {self.code}\n{self.stderr}"
        return lines[0]


@pytest.fixture(scope="session")
def tiny_words():
    """Flags that make a world model tiny; others can be given behind them."""
    return [word for key, value in TINY.items() for word in (f"--{key}", value)]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Eight episodes of reach, of 12 steps and 32 pixels."""
    from jepa_world.commands.collect import Collect, collect

    folder = tmp_path_factory.mktemp("data") / "reach"
    return collect(Collect(episodes=8, steps=12, workers=1, image_size=32, data=folder))


@pytest.fixture(scope="session")
def tiny_run(tiny_data, tiny_words, tmp_path_factory):
    """The run folder of a world model trained for 6 steps on frames of 32 pixels."""
    from jepa_world.commands.train_world_model import TrainWorldModel, run
    from jepa_world.config import parse

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    words = [*tiny_words, "--data", str(tiny_data), "--run-dir", str(folder)]
    run(parse(TrainWorldModel, words, program="train_world_model"))
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command in this process: `call("plan", "--episodes", 2)`."""
    from jepa_world.commands import main

    def run(command, *words):
        monkeypatch.setattr(sys, "argv", [command, *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            main(command)
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def shell():
    """Run Python in a process of its own: `shell("plan.py", "--help", cwd=folder)`."""

    def run(*words, cwd=ROOT, **environment):
        line = [
            sys.executable,
            *(str(ROOT / w) if str(w).endswith(".py") else str(w) for w in words),
        ]
        done = subprocess.run(
            line, cwd=cwd, env=os.environ | environment, capture_output=True, text=True
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def resumes_exactly(tmp_path):
    """Assert that a training on samples that is stopped after five of six steps goes on exactly."""
    from jepa_world.training import Training, make_accelerator, train

    def assert_for(build, pixels, **others):
        def fit(folder, *, stop=99, resume=False):
            steps = iter(range(stop))

            def read(index, step):
                next(steps)
                samples = {"pixels": pixels, "index": torch.arange(len(pixels)), **others}
                return {name: values[index] for name, values in samples.items()}

            how = {"steps": 6, "batch_size": 16, "lr": 1e-2, "weight_decay": 0.0, "log_every": 1}
            train(
                *(build(), read, len(pixels)),
                Training(**how, resume=resume, checkpoint_every=2),
                accelerator=make_accelerator("no", "none", folder),
                run_dir=folder,
            )

        fit(tmp_path / "whole")
        with pytest.raises(StopIteration):
            fit(tmp_path / "halves", stop=5)
        fit(tmp_path / "halves", resume=True)
        for name in ("checkpoint/model.safetensors", "metrics.jsonl"):
            one, two = ((tmp_path / run / name).read_bytes() for run in ("whole", "halves"))
            assert one == two, name

    return assert_for


@pytest.fixture
def words(request, tmp_path, tiny_data, tiny_words, tiny_run):
    """The command line of a tiny training of every kind, with data of its own."""
    if request.param[0] == "train_world_model":
        return [*request.param, *tiny_words, "--data", tiny_data, *FEW]
    if request.param[0] == "train_cost":
        return [*request.param, "--checkpoint", tiny_run, "--data", tiny_data, *FEW]
    if request.param[0] == "train_vjepa":
        from jepa_world.data.motion import letters, write_motion_clips

        videos = write_motion_clips(tmp_path / "videos", letters(40, seed=0), seed=0)
        cut = ("--clips.size", 16, "--clips.frames", 4, "--clips.fps", 4)
        return [*request.param, *TOKENS, *cut, "--data", videos.parent, *FEW]  # no labels
    pictures = write_pictures(tmp_path / "pictures")
    own = TOKENS if request.param[0] == "train_ijepa" else ("--encoder.width", 16)
    return [*request.param, *own, "--data", pictures, "--image-size", 16, *FEW]


def write_pictures(folder):
    from PIL import Image

    from jepa_world.data.images import make_shapes

    for number, pixels in enumerate(make_shapes(60, seed=0).pixels):
        file = folder / f"{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return folder
