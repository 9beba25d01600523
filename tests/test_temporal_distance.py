import json

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from jepa_world.agent import Agent
from jepa_world.checkpoint import load_tensors
from jepa_world.commands.plan import HORIZON, NARROW, Planning, narrow
from jepa_world.commands.train_cost import triples
from jepa_world.config import Part
from jepa_world.data.trajectories import Trajectories, write_shard
from jepa_world.methods.temporal_distance import GoalPolicy, TemporalDistanceLearning
from jepa_world.methods.world_model import WorldModel, load_world_model
from jepa_world.objectives import TemporalDistance
from jepa_world.testing import check_objective

RING = 8
NO = ("--precision", "no")


class Circle(nn.Module):
    """Encodes frame number k, a byte, as a place on a circle."""

    dim, num_tokens = 2, 1

    def forward(self, video, keep=None):
        angle = video[:, :, 0, 0, 0] * 255 * (2 * torch.pi / RING)
        return torch.stack([angle.cos(), angle.sin()], -1).unsqueeze(2)


def learned(expectile=0.1, steps=600):
    """The distance on a ring that is walked one way around, by ones and at times by rests."""
    torch.manual_seed(0)
    places = torch.arange(RING).view(RING, 1, 1, 1)
    z = Circle()(places.expand(RING, 1, 1, 1).unsqueeze(1) / 255.0)[:, 0]
    cost = TemporalDistance(2, 1, width=64, depth=2, discount=0.9)
    method = TemporalDistanceLearning(
        WorldModel(Circle(), nn.Identity()), cost, expectile=expectile, momentum=0.9
    )
    optimizer = torch.optim.Adam(cost.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        here, goal = torch.randint(RING, (2, 128), generator=generator)
        rests = torch.rand(128, generator=generator) < 0.5
        following = (here + ~rests) % RING
        latent = torch.stack([z[here], z[following], z[goal]], 1)
        output = method({"latent": latent, "reached": (following == goal)[:, None]}, step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    with torch.no_grad():
        return cost.between(z[:, None].expand(-1, RING, 1, 2), z[None])


def test_the_distance_is_the_shortest_way_and_knows_one_way_streets():
    distance = learned()
    steps = (torch.arange(RING) - torch.arange(RING)[:, None]) % RING
    true = (1 - 0.9**steps) / (1 - 0.9)
    assert (distance - true).abs().max() < 1.0
    assert distance[0, RING - 1] > distance[RING - 1, 0] + 3
    later = learned(expectile=0.5)  # half of all steps are rests: the mean way is longer
    assert later[0, 3] > distance[0, 3] + 0.5


def test_the_distance_keeps_the_contract_of_an_objective():
    check_objective(TemporalDistance(32, 2), 2, 32, 5, 3)
    with pytest.raises(ValueError, match="a discount in"):
        TemporalDistance(4, 1, discount=1.0)


def test_goals_lie_later_in_the_episode_and_what_is_reached_is_the_next_frame(tmp_path):
    frames = [np.full((n, 2, 2, 3), 0, np.uint8) for n in (9, 5)]
    for number, frame in enumerate(frames):
        frame += (100 * number + np.arange(len(frame), dtype=np.uint8))[:, None, None, None]
    acts = [np.arange(len(f), dtype=np.float32)[:, None] for f in frames]
    episodes = [{"pixels": f, "action": a} for f, a in zip(frames, acts, strict=True)]
    write_shard(tmp_path / "a.h5", episodes)
    data = Trajectories(tmp_path)
    windows = data.windows(2, 2)
    numbers = np.random.default_rng(0).random((len(windows), 4))
    batch = triples(data, windows, windows, numbers, 2, 0.8)
    seen = batch["pixels"][:, :, 0, 0, 0].long().numpy()
    here, following, goals = seen[:, 0], seen[:, 1], seen[:, 2:]
    assert (following == here + 2).all() and (goals[:, :2] // 100 == here[:, None] // 100).all()
    assert (goals[:, :2] > here[:, None]).all() and ((goals[:, :2] - here[:, None]) % 2 == 0).all()
    assert (batch["reached"].numpy()[:, :2] == (goals[:, :2] == following[:, None])).all()
    assert not batch["reached"][:, 2:].any()
    assert batch["later"].tolist() == [[True, True, False, False]] * len(windows)
    assert np.array_equal(batch["action"], data.read(windows, 1, 2)["action"][:, 0])


def test_the_command_leaves_the_model_as_it_was_and_agents_use_the_cost(
    call, tiny_run, tiny_data, tmp_path
):
    words = ("--data", tiny_data, "--steps", 3, "--batch-size", 8, "--cost.width", 16, *NO)
    ended = call("train_cost", "--checkpoint", tiny_run, *words, "--run-dir", tmp_path / "run")
    assert ended.code == 0, ended.stderr
    model, description = load_world_model(tmp_path / "run")
    assert description["cost"]["width"] == 16 and isinstance(model.cost, TemporalDistance)
    before, _ = load_tensors(tiny_run / "checkpoint" / "model.safetensors")
    after, _ = load_tensors(tmp_path / "run" / "checkpoint" / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    planned = ("--episodes", 1, "--budget", 2, "--run-dir", tmp_path / "plan")
    assert call("plan", "--checkpoint", tmp_path / "run", *planned).code == 0
    refused = call("plan", "--checkpoint", tiny_run, "--objective", "learned").complaint()
    assert "the checkpoint has no cost, train_cost makes one" in refused


def test_the_policy_learns_the_way_to_what_came_later_and_nothing_of_other_goals():
    torch.manual_seed(0)
    z = Circle()(torch.arange(RING).view(RING, 1, 1, 1, 1) / 255.0)[:, 0]
    policy = GoalPolicy(2, 1, 1, width=64, depth=2)
    model = WorldModel(Circle(), nn.Identity())
    method = TemporalDistanceLearning(model, TemporalDistance(2, 1, width=8), policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    later, imitation = torch.tensor([[True, False]]).expand(128, 2), float("inf")
    for step in range(300):
        here, steps = torch.randint(RING, (128,)), torch.randint(1, RING // 2, (128,))
        way = torch.randint(2, (128,)) * 2 - 1
        there = torch.stack([(here + way) % RING, (here + way * steps) % RING], 1)
        elsewhere = torch.randint(RING, (128, 1))
        latent = torch.cat([z[here, None], z[there], z[elsewhere]], 1)
        batch = {"latent": latent, "reached": torch.zeros(128, 2).bool(), "later": later}
        output = method(batch | {"action": way[:, None].float()}, step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        imitation = float(output.terms["imitation"])
    assert imitation < 0.1
    goals = (torch.arange(RING) + 2) % RING
    with torch.no_grad():
        assert (policy(z, z[goals]) > 0.5).all() and (policy(z[goals], z) < -0.5).all()


def test_searches_begin_with_what_the_policy_does_in_imagination(
    call, tiny_run, tiny_data, tmp_path
):
    words = ("--data", tiny_data, "--steps", 3, "--batch-size", 8, "--cost.width", 16, *NO)
    words += ("--checkpoint", tiny_run)
    policy = ("--policy", "cloned", "--policy.width", 16, "--run-dir", tmp_path / "run")
    ended = call("train_cost", *words, *policy)
    assert ended.code == 0, ended.stderr
    model, description = load_world_model(tmp_path / "run")
    assert description["policy"]["width"] == 16 and isinstance(model.policy, GoalPolicy)
    starts = []
    agent = Agent(model, lambda cost, start: starts.append(start) or start, torch.zeros(3, 2))
    frames = torch.randint(0, 256, (2, 2, *description["observation_shape"][2:], 3)).byte()
    agent.reset(frames[1])
    agent.act(frames[0])
    z, goal = model.encode(frames[:1].transpose(0, 1))[:, 0], model.encode(frames[1][:, None])[:, 0]
    for step in range(3):
        action = model.policy(z, goal)
        assert torch.allclose(starts[0][:, step], action, atol=1e-5)
        z = model.rollout(z[:, None], action[:, None])[:, 0]
    planned = ("--episodes", 1, "--budget", 2, "--run-dir", tmp_path / "plan")
    assert call("plan", "--checkpoint", tmp_path / "run", *planned).code == 0
    told = yaml.safe_load((tmp_path / "plan" / "config.yaml").read_text())["planner"]
    used = json.loads((tmp_path / "plan" / "results.json").read_text())
    assert used["planner"] == {**told, "std": NARROW} and used["horizon"] == HORIZON
    asked = Planning(planner=Part(told.pop("name"), told))
    assert narrow(asked, model).planner.options == {**told, "std": NARROW}
    for planner in (Part("icem", {"std": 0.9, "samples": 9}), Part("random_shooting")):
        assert narrow(Planning(planner=planner), model).planner == planner

    again = ("--checkpoint", tmp_path / "run", "--run-dir", tmp_path / "cost")
    assert call("train_cost", *words, *again).code == 0
    without, _ = load_world_model(tmp_path / "cost")
    assert without.policy is None and without.cost is not None
    assert narrow(asked, without) == asked


def test_a_predictor_trained_again_keeps_the_cost_and_the_policy(
    call, tiny_run, tiny_data, tiny_words, tmp_path
):
    learned, steps = tmp_path / "learned", ("--steps", 3, "--batch-size", 8, *NO)
    words = ("--data", tiny_data, *steps, "--cost.width", 16, "--policy", "cloned")
    words += ("--checkpoint", tiny_run, "--policy.width", 16, "--run-dir", learned)
    assert call("train_cost", *words).code == 0
    for name, flags, kept in (("same", (), True), ("other", ("--predict.stride", 2), False)):
        run = tmp_path / name
        words = ("--data", tiny_data, *tiny_words, *flags, "--frozen", learned, "--run-dir", run)
        ended = call("train_world_model", *words)
        assert ended.code == 0, ended.stderr
        (old, _), (new, _) = (load_world_model(path) for path in (learned, run))
        assert (new.cost is not None) == (new.policy is not None) == kept
        before, after = old.state_dict(), new.state_dict()
        changed = {key.partition(".")[0] for key in after if not before[key].equal(after[key])}
        assert changed == {"predictor"}


def test_a_policy_of_another_shape_is_refused(call, tiny_run, tiny_data, tmp_path):
    words = ("--checkpoint", tiny_run, "--data", tiny_data, "--policy", "torch.nn:Bilinear", *NO)
    refused = call("train_cost", *words, "--run-dir", tmp_path / "run").complaint()
    assert "policy 'torch.nn:Bilinear'" in refused


def test_another_dataset_is_refused(call, tiny_run, tiny_data, tmp_path):
    refused = call("train_cost", "--checkpoint", tiny_run, "--data", tmp_path, *NO).complaint()
    assert "has no .h5 file" in refused
    other = yaml.safe_load((tiny_data / "dataset.yaml").read_text())
    other["settings"]["env"] = "jepa_world/Maze-v0"
    for file in tiny_data.glob("*.h5"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(other))
    refused = call("train_cost", "--checkpoint", tiny_run, "--data", tmp_path, *NO).complaint()
    assert "collected in 'jepa_world/Maze-v0', the model is of 'jepa_world/Reach-v0'" in refused


def test_targets_follow_once_a_step_however_many_parts_a_batch_has():
    method = TemporalDistanceLearning(
        WorldModel(Circle(), nn.Identity()), TemporalDistance(2, 1, width=8), momentum=0.5
    )
    batch = {"latent": torch.randn(4, 3, 1, 2), "reached": torch.zeros(4, 1).bool()}
    fast, slow = (list(net.parameters())[1] for net in (method.cost, method.target))
    with torch.no_grad():
        fast += 1
    before = slow.clone()
    for _ in range(3):
        method(batch, step=1)
    assert torch.allclose(slow, before + 0.5)
    method.eval()(batch, step=9)
    assert torch.allclose(slow, before + 0.5)


def test_a_cost_without_a_distance_is_refused(call, tiny_run, tiny_data, tmp_path):
    words = ("--checkpoint", tiny_run, "--data", tiny_data, "--cost", "torch.nn:Bilinear", *NO)
    refused = call("train_cost", *words, "--run-dir", tmp_path / "run").complaint()
    assert "cost 'torch.nn:Bilinear'" in refused
