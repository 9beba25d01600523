"""Disks that are full or read-only: real ones, mounted in a namespace of their own."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOUNT = ["unshare", "--mount", "--map-root-user", "sh", "-euc"]

pytestmark = pytest.mark.slow


@pytest.fixture
def on_disk(tmp_path):
    """Run lines of shell where `$disk` is a disk of this size; `kept` has what they copy there."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()

    def run(size, lines):
        mount = f"mount -t tmpfs -o size={size} tmpfs {disk}; disk={disk}; kept={kept}; "
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        environment |= {"ACCELERATE_USE_CPU": "1", "HOME": str(tmp_path)}
        done = subprocess.run(
            [*MOUNT, mount + lines], capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        if "unshare: " in done.stderr or "mount: " in done.stderr:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        return done, kept

    return run


def command(*words):
    return shlex.join(map(str, (sys.executable, ROOT / "train_world_model.py", *words)))


def complaints(done):
    """Return what commands said on stderr, without the bars of their progress."""
    lines = done.stderr.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith("train_world_model: ")]


def test_a_disk_that_fills_up_costs_a_line_and_with_room_again_nothing(
    on_disk, tiny_words, tiny_data
):
    """One checkpoint fits, a second beside it does not: resumed, it equals one straight through."""
    train = command(*tiny_words, "--data", tiny_data, "--run-dir")
    done, kept = on_disk(
        "3m",
        f"{train} $disk/run || echo ended with $?; ls -A $disk/run/checkpoint > $kept/names; "
        f"mount -o remount,size=30m $disk; {train} $disk/run --resume; {train} $kept/whole; "
        "cp -r $disk/run $kept/run",
    )
    assert done.returncode == 0 and "ended with 2" in done.stdout, done.stderr
    assert len(complaints(done)) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "cannot write" in complaints(done)[0] and "No space left" in complaints(done)[0]
    assert (kept / "names").read_text().split() == [
        "config.yaml",
        "model.safetensors",
        "training.safetensors",
    ]
    for name in (
        "checkpoint/training.safetensors",
        "checkpoint/model.safetensors",
        "metrics.jsonl",
    ):
        assert (kept / "run" / name).read_bytes() == (kept / "whole" / name).read_bytes(), name


def test_a_run_that_becomes_read_only_costs_a_line_and_data_that_are_do_not_matter(
    on_disk, tiny_words, tiny_data
):
    """Trained from a disk that cannot be written; then nothing of a run there can go on."""
    train = command(*tiny_words, "--run-dir")
    done, kept = on_disk(
        "30m",
        f"cp -r {tiny_data} $disk/data; {train} $disk/run --data $disk/data; "
        f"mount -o remount,ro $disk; {train} $kept/run --data $disk/data; "
        f"{train} $disk/run --resume --steps 8 || echo resumed, ended with $?; "
        f"{train} $disk/new --data $disk/data || echo new, ended with $?; "
        "cp -r $disk/run $kept/first",
    )
    assert done.returncode == 0, done.stderr
    assert "resumed, ended with 2" in done.stdout and "new, ended with 2" in done.stdout
    assert len(complaints(done)) == 2 and "Traceback" not in done.stderr, done.stderr
    assert all("Read-only file system" in line for line in complaints(done))
    weights = [kept / name / "checkpoint" / "model.safetensors" for name in ("first", "run")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
