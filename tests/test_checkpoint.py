import json

import pytest
import torch
from torch import nn

from jepa_world.checkpoint import (
    find_checkpoint,
    in_few_bits,
    load_tensors,
    load_weights,
    save_tensors,
    write_atomically,
    write_json,
    write_yaml,
)
from jepa_world.config import read_yaml
from jepa_world.registry import UserError, require_trust


@pytest.fixture
def saved(tmp_path):
    """The file of a small network, and the network."""
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    save_tensors(tmp_path / "model.safetensors", network.state_dict(), {"step": 7})
    return tmp_path / "model.safetensors", network


def test_weights_come_back_bit_for_bit_with_their_facts(saved):
    path, network = saved
    fresh = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    load_weights(fresh, path)
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in network.state_dict().items())
    assert load_tensors(path)[1] == {"step": 7}


def test_the_same_weights_are_the_same_bytes(saved, tmp_path):
    path, network = saved
    save_tensors(tmp_path / "again.safetensors", network.state_dict(), {"step": 7})
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_few_bits_are_a_sixth_of_the_bytes_and_half_a_step_off_at_most(tmp_path):
    torch.manual_seed(0)
    linear = nn.Linear(256, 256)
    with torch.no_grad():  # rows each of their own scale
        linear.weight[:3] *= torch.tensor([[0.0], [1e-7], [1e4]])
    network = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), linear)
    path, before = tmp_path / "model.safetensors", network.state_dict()
    save_tensors(path, in_few_bits(before), {})
    assert path.stat().st_size < sum(x.nbytes for x in before.values()) / 6
    after, _ = load_tensors(path)
    assert {k: x.shape for k, x in after.items()} == {k: x.shape for k, x in before.items()}
    for name, runs, steps in (("0.weight", (16, 1, -1), 254), ("2.weight", (256, 8, -1), 14)):
        width = 2 * before[name].reshape(runs).abs().amax(-1) / steps
        off = (after[name] - before[name]).reshape(runs).abs().amax(-1)
        assert torch.all(off <= 0.51 * width + 2**-24) and off.max() > 0
    assert torch.equal(after["0.bias"], before["0.bias"].half())
    assert torch.equal(after["1.num_batches_tracked"], before["1.num_batches_tracked"])
    load_weights(network, path)


@pytest.mark.parametrize("scale", [torch.ones(3, 1), torch.ones(5, 1), torch.ones(3, 3)])
def test_a_scale_that_fits_no_weights_is_damage(tmp_path, scale):
    whole = {"weight": torch.ones(3, 4, dtype=torch.int8), "weight/scale": scale}
    if scale.shape == (3, 1):
        whole["bias/scale"] = torch.ones(3)  # of a tensor that is not there
    save_tensors(tmp_path / "model.safetensors", whole, {})
    with pytest.raises(UserError, match=r"damaged: '(weight|bias)/scale'"):
        load_tensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.7, 0.99])
def test_a_file_cut_short_anywhere_is_refused(saved, share):
    path, network = saved
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match="damaged"):
        load_weights(network, path)


def test_a_missing_file_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint file .*none\.safetensors"):
        load_weights(saved[1], tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), r"\(4,\), the model's is \(5,\)"),
        (nn.Sequential(nn.Linear(3, 4)), "holds unknown '1.bias' .5 names differ"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.PReLU()), "lacks '3.wei"),
    ],
)
def test_another_model_is_refused_and_left_as_it_was(saved, other, message):
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_weights(other, saved[0])
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    def write(part):
        part.write_text("half of")
        raise OSError("disk full")

    path = tmp_path / "file"
    path.write_text("whole")
    with pytest.raises(UserError, match=r"cannot write '.*file': disk full; .* is whole"):
        write_atomically(path, write)
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_values_that_yaml_or_json_cannot_hold_leave_the_old_file(tmp_path):
    write_yaml(tmp_path / "a.yaml", {"b": 1})
    write_json(tmp_path / "a.json", {"b": 1})
    for write, name in ((write_yaml, "a.yaml"), (write_json, "a.json")):
        with pytest.raises(Exception, match="object"):
            write(tmp_path / name, {"b": object()})
    assert read_yaml(tmp_path / "a.yaml") == json.loads((tmp_path / "a.json").read_text())


def test_json_without_numbers_that_json_does_not_have(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1.5, float("inf")], "c": {"d": (float("nan"), True)}})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "b": [1.5, None],
        "c": {"d": [None, True]},
    }


def test_a_checkpoint_is_found_in_a_run_and_in_its_own_folder(tiny_run):
    assert find_checkpoint(tiny_run) == find_checkpoint(tiny_run / "checkpoint")


@pytest.mark.parametrize("name", ["none", "empty", "half", "file"])
def test_a_folder_without_checkpoint_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    write_yaml(tmp_path / "half" / "checkpoint" / "config.yaml", {"method": "world_model"})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="give a run folder"):
        find_checkpoint(tmp_path / name)


@pytest.mark.parametrize("path", ["evil:Encoder", "evil.deep:Encoder", "jepa_world_evil:Encoder"])
def test_a_class_outside_the_package_needs_the_users_word(path):
    package = path.partition(":")[0].partition(".")[0]
    with pytest.raises(UserError, match=f"add --trust {package}$"):
        require_trust("the file", path, ())
    require_trust("the file", path, (package,))
    require_trust("the file", "jepa_world.encoders.conv:ConvEncoder", ())


def test_a_checkpoint_that_is_not_trusted_runs_no_code_of_its_own(tiny_run, tmp_path, monkeypatch):
    from jepa_world.methods.world_model import load_world_model

    description = read_yaml(tiny_run / "checkpoint" / "config.yaml")
    description["predictor"] = {"name": "own_evil_part:Part"}
    write_yaml(tmp_path / "checkpoint" / "config.yaml", description)
    weights = (tiny_run / "checkpoint" / "model.safetensors").read_bytes()
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(weights)
    (tmp_path / "own_evil_part.py").write_text("open('ran', 'w').close()\nclass Part: ...\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--trust own_evil_part"):
        load_world_model(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "key", ["encoder", "predictor", "observation_shape", "action_dim", "method"]
)
def test_a_description_that_lacks_a_key_is_refused(tiny_run, tmp_path, key):
    from jepa_world.methods.world_model import load_world_model

    description = read_yaml(tiny_run / "checkpoint" / "config.yaml")
    del description[key]
    write_yaml(tmp_path / "config.yaml", description)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=key):
        load_world_model(tmp_path)
