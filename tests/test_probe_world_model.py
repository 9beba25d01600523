import json
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from jepa_world import envs
from jepa_world.checkpoint import write_yaml
from jepa_world.commands.plan import shipped
from jepa_world.commands.probe_world_model import (
    ProbeWorldModel,
    fit_read_outs,
    judge,
    quantities_of,
    robustness,
    surprise,
    values_of,
)
from jepa_world.encoders.conv import ConvEncoder
from jepa_world.envs import Quantity
from jepa_world.methods.world_model import WorldModel
from jepa_world.registry import UserError
from jepa_world.sigreg import SIGReg

SHORT = ("--episodes", 6, "--moments", 6, "--horizon", 3, "--decoder-steps", 3)


class Copy(nn.Module):
    """Predicts that nothing changes."""

    def forward(self, z, action):
        return z


def copying(channels=3, size=32):
    torch.manual_seed(0)
    encoder = ConvEncoder((1, channels, size, size), dim=8, width=4, stages=2)
    return WorldModel(encoder, Copy(), SIGReg(), weight=0.0).eval()


def walks(count):
    """Return two positions, one step apart, and the rates that bring the first to the second."""
    random = np.random.default_rng(0)
    rate = random.normal(size=(count, 2))
    after = 3 * random.normal(size=(count, 2))
    return np.stack([after - rate, after], 1).astype(np.float32), {"place": after, "rate": rate}


def test_a_latent_that_is_the_state_tells_it_and_rates_need_two():
    z, values = walks(1500)
    fit, held = slice(0, 1000), slice(1000, 1500)
    fit_values, held_values = ({k: v[part] for k, v in values.items()} for part in (fit, held))
    read_outs = fit_read_outs(torch.from_numpy(z[fit]), fit_values, 0)
    told = judge(read_outs, torch.from_numpy(z[held]), held_values)
    for probe in ("linear", "MLP"):
        assert told["one latent"][probe]["place"] > 0.99
        assert told["one latent"][probe]["rate"] < 0.1
        assert min(told["two latents"][probe].values()) > 0.99
    noise = torch.from_numpy(z[held]).flip(0)
    assert max(judge(read_outs, noise, held_values)["one latent"]["linear"].values()) < 0.1


def test_what_does_not_vary_is_not_judged():
    z, values = walks(200)
    values["wall"] = np.full((200, 1), 0.3)
    z = torch.from_numpy(z)
    told = judge(fit_read_outs(z, values, 0), z, values)
    assert set(told["one latent"]["linear"]) == {"place", "rate"}


def test_angles_are_read_as_cosine_and_sine_of_what_can_be_seen():
    angles = np.array([[0.3], [0.3 + np.pi / 2], [-0.2]])
    full, quarter = (
        values_of({"state": angles}, {"state": [Quantity("turn", "rad", period)]})["turn"]
        for period in (2 * np.pi, np.pi / 2)
    )
    np.testing.assert_allclose(full, np.concatenate([np.cos(angles), np.sin(angles)], 1))
    np.testing.assert_allclose(quarter[0], quarter[1])
    assert np.abs(quarter[0] - quarter[2]).max() > 0.5


class Still(gym.Env):
    """Noise that differs between episodes and stays as it is; what comes next may be asked for."""

    observation_space = gym.spaces.Box(0, 255, (32, 32, 3), np.uint8)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    quantities = {"state": (("x", "m", 0.0),)}  # noqa: RUF012

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.picture = self.np_random.integers(0, 256, (32, 32, 3)).astype(np.uint8)
        return self.picture, {}

    def step(self, action):
        return self.picture, 0.0, False, False, {}

    def implausible(self, generator):
        return {"the same": self.picture, "inverted": 255 - self.picture}


def test_numbers_without_names_are_counted_and_too_many_names_refused():
    columns = {"state": np.zeros((4, 2)), "proprio": np.zeros((4, 1))}
    named = quantities_of(gym.Env(), columns)
    assert [q.name for part in named.values() for q in part] == ["state 0", "state 1", "proprio 0"]
    with pytest.raises(UserError, match="names 1 numbers of its state, there are 2"):
        quantities_of(Still(), columns)


def test_what_cannot_come_next_surprises_and_what_came_does_not():
    found = surprise(copying(), Still(), ProbeWorldModel(moments=12), stride=2)
    for score in ("prediction error", "latent change", "pixel difference"):
        assert found["the same"][score]["auroc"] == 0.5
        assert found["inverted"][score]["auroc"] == 1.0
        assert found["inverted"][score]["n"] == 12
    assert surprise(copying(), gym.Env(), ProbeWorldModel(), 1) == {}


def test_a_factor_that_is_not_seen_moves_nothing_and_light_does():
    env, model = envs.make("push", size=32), copying()
    named = {"state": env.unwrapped.quantities["state"]}
    read_outs = {"linear": lambda z: z[:, :1].expand(-1, 11)}  # of 10 quantities, one an angle
    found = robustness(model, read_outs, env, named, ProbeWorldModel(moments=5))
    assert set(found) == {"none", *env.reset(seed=0)[1]["factors"]}
    at_rest = {"disc x", "disc y", "block x", "block y", "block angle"}
    assert set(found["none"]["linear"]) == at_rest
    assert found["friction"] == found["none"] and found["none"]["shift"] == 0.0
    assert found["light"]["shift"] > 0.01 and found["camera"]["shift"] > 0.01


@pytest.mark.parametrize(
    "words",
    [("evaluate", "--probe", "--env", "reach"), ("evaluate", "--probe"), ("probe_world_model",)],
)
def test_a_world_model_is_judged_by_whichever_name(call, tiny_run, tmp_path, words):
    run = tmp_path / "run"
    ended = call(*words, "--checkpoint", tiny_run, *SHORT, "--run-dir", run)
    assert ended.code == 0, ended.stderr
    results = json.loads((run / "results.json").read_text())
    assert results["env"] == "jepa_world/Reach-v0" and results["units"]["elbow rate"] == "rad/s"
    assert set(results["R^2"]) == {"model", "random encoder"}
    for rows in results["R^2"].values():
        for probes in rows.values():
            assert all(set(told) == set(results["units"]) for told in probes.values())
    assert list(results["surprise"]) == ["teleport", "colour", "vanished"]
    assert len(results["factors"]) == 9 and "decoder_R^2" in results
    assert {"decoder.png", "imagined.png", "decoder"} <= {path.name for path in run.iterdir()}
    assert "elbow rate [rad/s]" in ended.stdout and "vanished" in ended.stdout


def test_a_dataset_gives_the_frames_that_judge(call, tiny_run, tiny_data, tmp_path):
    words = ("--checkpoint", tiny_run, "--data", tiny_data, "--moments", 2, "--decoder-steps", 0)
    ended = call("evaluate", "--probe", *words, "--run-dir", tmp_path / "run")
    assert ended.code == 0, ended.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["fitted_on"], results["judged_on"]) == (7 * 12, 12)  # of the last episode
    assert not (tmp_path / "run" / "decoder.png").exists() and "decoder_R^2" not in results


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--env", "push", "--checkpoint", "tiny"), "trained for env 'jepa_world/Reach-v0', not"),
        (("--env", "arm_joint"), "no model is shipped for env 'arm_joint'"),
        (("--checkpoint", "nowhere"), "no checkpoint in 'nowhere'"),
        (
            ("--env", "reach", "--checkpoint", "lejepa"),
            "the method 'lejepa', expected 'world_model'",
        ),
        (
            ("--env", "reach", "--data", "tiny_data"),
            "frames of .*: \\(32, 32, 3\\), the checkpoint",
        ),
        (("--env", "reach", "--data", "nowhere"), "dataset nowhere does not exist"),
        (("--env", "reach", "--moments", 1), "--moments is 1: give at least 2"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_one_line(
    call, tiny_run, tiny_data, tmp_path, words, message
):
    folder = tmp_path / "lejepa"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(
        (shipped("reach") / "model.safetensors").read_bytes()
    )
    write_yaml(folder / "config.yaml", {"method": "lejepa"})
    places = {"tiny": tiny_run, "tiny_data": tiny_data, "lejepa": folder}
    given = [places.get(word, word) for word in words]
    complaint = call("evaluate", "--probe", *given, "--run-dir", tmp_path / "run").complaint()
    assert re.search(message, complaint), complaint
    assert not (tmp_path / "run").exists()
