"""The main job, as a newcomer meets it: no argument, the model that comes with the package."""

import json
from pathlib import Path

import pytest
import ship
import torch
from safetensors.torch import load_file

from jepa_world.checkpoint import load_tensors
from jepa_world.commands.plan import SHIPPED, Planning, open_env, shipped
from jepa_world.methods.world_model import load_world_model
from jepa_world.registry import UserError

MEGABYTES = 7


def test_all_shipped_models_together_are_small():
    files = SHIPPED.glob("*/model.safetensors")
    assert 0 < sum(file.stat().st_size for file in files) < MEGABYTES * 1e6


@pytest.mark.parametrize("folder", sorted(SHIPPED.glob("*")), ids=lambda folder: folder.name)
def test_a_shipped_model_is_finite_and_all_ours(folder):
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.yaml"}
    tensors, _ = load_tensors(folder / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    model, description = load_world_model(folder)
    assert not model.training and description["env"] and description["mujoco"]


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


def test_what_is_shipped_is_a_run_in_few_bytes_and_nothing_is_overwritten(
    tiny_run, tmp_path, monkeypatch
):
    monkeypatch.setattr(ship, "SHIPPED", tmp_path)
    folder = ship.ship(tiny_run, "reach")
    one, two = (load_world_model(path)[0].state_dict() for path in (tiny_run, folder))
    assert all(torch.allclose(two[k], x, rtol=1e-3, atol=0.005) for k, x in one.items())
    assert any(not torch.equal(two[k], x) for k, x in one.items())
    files = (tiny_run / "checkpoint" / "model.safetensors", folder / "model.safetensors")
    whole, small = (sum(x.nbytes for x in load_file(file).values()) for file in files)
    assert small < 0.4 * whole  # these matrices are small: scales and biases count
    with pytest.raises(UserError, match="nothing is overwritten"):
        ship.ship(tiny_run, "reach")


def test_a_model_of_another_main_version_of_mujoco_is_said_to_be(tiny_run, capsys):
    _, description = load_world_model(tiny_run)
    open_env(Planning(), description)
    assert "MuJoCo" not in capsys.readouterr().out
    open_env(Planning(), {**description, "mujoco": "1.50.0"})
    assert "trained with MuJoCo 1.50.0, here is" in capsys.readouterr().out
