"""The main job, as a newcomer meets it: no argument, the model that comes with the package."""

import json
from pathlib import Path

import pytest

from jepa_world.checkpoint import load_tensors
from jepa_world.commands.plan import SHIPPED, shipped
from jepa_world.methods.world_model import load_world_model

MEGABYTES = 10


@pytest.mark.parametrize("folder", sorted(SHIPPED.glob("*")), ids=lambda folder: folder.name)
def test_a_shipped_model_is_small_finite_and_all_ours(folder):
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.yaml"}
    tensors, _ = load_tensors(folder / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert sum(tensor.nbytes for tensor in tensors.values()) < MEGABYTES * 2**20
    model, description = load_world_model(folder)
    assert not model.training and description["env"]


def test_without_arguments_plan_reaches_goals_and_says_where_it_is_shown(shell, tmp_path):
    ended = shell("plan.py", cwd=tmp_path)
    assert ended.code == 0, ended.stderr
    *_, last = ended.stdout.splitlines()
    folder = Path(tmp_path / last.removeprefix("everything this run made is in "))
    made = {"config.yaml", "results.json", "plan.mp4", "plan.png", "report.html"}
    assert {path.name for path in folder.iterdir()} == made
    results = json.loads((folder / "results.json").read_text())
    assert results["success_end"]["n"] == 10 and results["success_end"]["rate"] >= 0.9
    assert results["checkpoint"] == str(shipped("reach"))
