"""Published LeWorldModels, against what stable-worldmodel computed with the same random weights.

`benchmarks/leworldmodel.py --record tests/leworldmodel.safetensors` made the record.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from einops import rearrange
from planning import HORIZON, leworldmodel_agent, random_plans

from jepa_world import Agent, SIGReg, WorldModel
from jepa_world.checkpoint import load_tensors
from jepa_world.encoders.leworldmodel import LeWorldModelEncoder
from jepa_world.encoders.pretrained import (
    fold_action_statistics,
    fold_pixel_statistics,
    load_leworldmodel,
)
from jepa_world.methods.world_model import load_world_model, rollout
from jepa_world.nn import IMAGENET_MEAN, IMAGENET_STD
from jepa_world.planners.cem import CEM
from jepa_world.predictors.leworldmodel import LeWorldModelPredictor
from jepa_world.testing import check_encoder, check_predictor

RECORD, FACTS = load_tensors(Path(__file__).with_name("leworldmodel.safetensors"))
WEIGHTS = {k.removeprefix("weights/"): v for k, v in RECORD.items() if k.startswith("weights/")}
OLD_NAMES = (
    ("encoder.layers.", "encoder.encoder.layer."),
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)


def old_name(name):
    """Return the name that a weight has in files of older versions of transformers."""
    if name.startswith("encoder."):
        for new, old in OLD_NAMES:
            name = name.replace(new, old)
    return name


@pytest.fixture
def write(tmp_path):
    """Write a folder as published, some weights and facts replaced."""

    def folder(weights=WEIGHTS, **changes):
        torch.save(dict(weights), tmp_path / "weights.pt")
        config = FACTS["config"] | changes
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return folder


@pytest.fixture
def parts(write):
    """The two parts of the recorded model, of pixels in [0, 1]."""
    encoder, predictor, _ = load_leworldmodel(write())
    fold_pixel_statistics(encoder)
    return encoder, predictor


def near(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("named", [str, old_name], ids=["new names", "old names"])
def test_it_computes_what_stable_worldmodel_computed(named, write):
    folder = write({named(name): value for name, value in WEIGHTS.items()})
    encoder, predictor, _ = load_leworldmodel(folder)
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    z = encoder((RECORD["pixels"] / 255 - mean) / std)
    near(z.squeeze(2), RECORD["latent"])
    near(predictor(z, RECORD["plans"][:, 0, :3]).squeeze(2), RECORD["following"])
    for sample in range(3):
        future = predictor.rollout(z[:, :1], RECORD["plans"][:, sample])
        near(future.squeeze(2), RECORD["future"][:, sample])


def test_an_agent_rates_plans_as_stable_worldmodel_did(parts):
    def terminal(z, plans, goal):
        return (z[:, :, -1] - goal[:, None]).square().sum((-1, -2))

    encoder, predictor = parts
    model = WorldModel(encoder, predictor, SIGReg(), weight=0.0)
    planner = CEM(-torch.ones(4), torch.ones(4), 6)
    agent = Agent(model, planner, torch.zeros(6, 4), objective=terminal)
    pixels, goal = (rearrange(RECORD[k], "b t c y x -> b t y x c") for k in ("pixels", "goal"))
    agent.reset(goal[:, 0])
    agent.act(pixels[:, 0])
    with torch.no_grad():
        near(agent.cost(RECORD["plans"]), RECORD["cost"])


def shaken(**options):
    """A small predictor that is far from doing nothing."""
    torch.manual_seed(0)
    shape = {"depth": 2, "heads": 3, "head_dim": 8, "hidden": 24, "head": 20}
    predictor = LeWorldModelPredictor(12, 4, **shape, **options).eval()
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return predictor


@torch.no_grad()
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (520, 1), (3, 2)])
@pytest.mark.parametrize("known", [1, 3, 6])
@pytest.mark.parametrize("history", [1, 3, 4])
def test_a_rollout_is_whole_windows_one_after_the_other(history, known, batch, tokens):
    predictor = shaken(history=history)
    z, action = torch.randn(batch, known, tokens, 12), torch.randn(batch, known + 5, 4)
    near(predictor.rollout(z, action), rollout(predictor, z, action))


def test_slopes_of_a_rollout_are_those_of_whole_windows():
    predictor = shaken()
    z, action = torch.randn(2, 1, 1, 12), torch.randn(2, 5, 4, requires_grad=True)
    futures = predictor.rollout(z, action), rollout(predictor, z, action)
    found, expected = (torch.autograd.grad(f.square().sum(), action)[0] for f in futures)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_in_training_a_rollout_has_dropout():
    predictor = shaken(dropout=0.5).train()
    z, action = torch.randn(4, 1, 1, 12), torch.randn(4, 5, 4)
    assert not torch.equal(predictor.rollout(z, action), predictor.rollout(z, action))


@torch.no_grad()
def test_costs_in_the_published_size_are_those_of_the_published_loop():
    agent, published, _ = leworldmodel_agent(1)
    plans = random_plans(6, HORIZON)
    torch.testing.assert_close(agent.cost(plans), published(plans), atol=0, rtol=1e-4)


def test_the_weights_file_may_be_named_itself(write):
    encoder, _, parts = load_leworldmodel(write() / "weights.pt")
    assert parts.observation_shape == (1, 3, 14, 14) and parts.action_dim == 4
    assert not encoder.training


@pytest.mark.parametrize("named", [str, old_name], ids=["new names", "old names"])
@pytest.mark.parametrize("name", list(WEIGHTS))
def test_every_weight_is_needed_as_it_is(name, named, write):
    if name.endswith("num_batches_tracked"):
        return
    others = {named(k): v for k, v in WEIGHTS.items() if k != name}
    with pytest.raises(ValueError, match=r"the weights (lack|hold unknown) '"):
        load_leworldmodel(write(others))
    wider = torch.zeros(*WEIGHTS[name].shape, 2)
    with pytest.raises(ValueError, match=r"the weights hold '.*' of shape \(.*\), expected \("):
        load_leworldmodel(write(others | {named(name): wider}))


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ({"decoder.weight": torch.ones(2)}, {}, "hold unknown 'decoder.weight'"),
        ({"encoder.pooler.weight": torch.ones(2)}, {}, "hold unknown 'pooler.weight'"),
        ({"predictor.transformer.input_proj.bias": torch.ones(2)}, {}, "unknown 'predictor.trans"),
        ({"predictor.pos_embedding": torch.ones(1, 4, 12)}, {}, "'positions' of shape (1, 4, 12)"),
        ({"step": 3}, {}, "'step' is a int, not a weight"),
        ({}, {"encoder": {"size": "tiny"}}, "config.json lacks 'image_size'"),
        ({}, {"predictor": None}, "config.json has no section 'predictor'"),
        (
            {},
            {"encoder": FACTS["config"]["encoder"] | {"hidden_act": "relu"}},
            "gives the encoder 'hidden_act', which is not known here",
        ),
        (
            {},
            {"encoder": FACTS["config"]["encoder"] | {"size": "vast"}},
            "config.json names the size 'vast', known are",
        ),
        (
            {},
            {"predictor": FACTS["config"]["predictor"] | {"depth": 3}},
            "the weights lack 'blocks.2.attention.out.bias'",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(weights, changes, message, write):
    folder = write(WEIGHTS | weights, **changes)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_leworldmodel(folder)
    assert "\n" not in str(error.value)


def test_files_that_are_missing_or_damaged_are_one_line(write, tmp_path):
    folder = write()
    data = (folder / "weights.pt").read_bytes()
    (folder / "weights.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        load_leworldmodel(folder)
    (folder / "weights.pt").unlink()
    with pytest.raises(ValueError, match="No such file"):
        load_leworldmodel(folder)
    (write() / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json' cannot be read: Expecting"):
        load_leworldmodel(folder)
    (write() / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json beside its weights"):
        load_leworldmodel(folder)


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("touched"),)


def test_a_pickled_object_is_not_loaded(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write()
    torch.save({**WEIGHTS, "object": Harmful()}, folder / "weights.pt")
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        load_leworldmodel(folder)
    assert not (tmp_path / "touched").exists()


@torch.no_grad()
def test_statistics_of_actions_are_folded_into_the_predictor(write):
    mean, std = torch.tensor([0.1, -0.4]), torch.tensor([0.5, 2.0])
    _, plain, _ = load_leworldmodel(write())
    _, folded, _ = load_leworldmodel(write())
    fold_action_statistics(folded, mean.tolist(), std.tolist())
    z, action = torch.randn(2, 3, 1, 12), torch.randn(2, 3, 4)
    normalised = (action - mean.repeat(2)) / std.repeat(2)
    near(folded(z, action), plain(z, normalised))


@pytest.mark.parametrize(("mean", "std"), [((), ()), ((0.0,) * 3, (1.0,) * 3), ((0.0,), (0.0,))])
def test_statistics_that_do_not_fit_the_actions_are_refused(mean, std, parts):
    with pytest.raises(ValueError, match="actions of 4 numbers need a mean and a positive"):
        fold_action_statistics(parts[1], mean, std)


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_both_parts_keep_their_contracts(num_tokens):
    encoder = LeWorldModelEncoder((1, 3, 28, 28), dim=8, width=32, depth=2, heads=2, hidden=32)
    check_encoder(encoder, (1, 3, 28, 28))
    predictor = LeWorldModelPredictor(8, 2, depth=2, heads=2, head_dim=8, hidden=16, head=16)
    check_predictor(predictor, 8, 2, num_tokens=num_tokens)
    with pytest.raises(ValueError, match="28 x 30 does not divide into patches of 14"):
        LeWorldModelEncoder((1, 3, 28, 30))


def test_the_published_size_has_18_million_parameters():
    with torch.device("meta"):
        encoder = LeWorldModelEncoder((1, 3, 224, 224))
        predictor = LeWorldModelPredictor(192, 10)
    counts = [sum(p.numel() for p in part.parameters()) for part in (encoder, predictor)]
    assert round(sum(counts) / 1e6, 1) == 18.0 and round(counts[1] / 1e6, 1) == 11.7


def test_it_is_imported_and_planned_with_from_the_command_line(write, call, tiny_data, tmp_path):
    run = tmp_path / "imported"
    words = ("--weights", write(), "--data", tiny_data, "--run-dir", run)
    ended = call("import_leworldmodel", *words)
    assert ended.code == 0, ended.stderr
    assert "is 2 of the environment, with actions of 2 numbers" in ended.stdout
    model, description = load_world_model(run)
    statistics = json.loads((run / "results.json").read_text())
    encoder, predictor, _ = load_leworldmodel(write())
    fold_pixel_statistics(encoder)
    fold_action_statistics(predictor, statistics["action_mean"], statistics["action_std"])
    pixels, z, action = torch.rand(2, 1, 3, 14, 14), torch.randn(2, 3, 1, 12), torch.randn(2, 3, 4)
    with torch.no_grad():
        assert torch.equal(model.encoder(pixels), encoder(pixels))
        assert torch.equal(model.predictor(z, action), predictor(z, action))
    assert (description["env"], description["stride"]) == ("jepa_world/Reach-v0", 2)
    budget = ("--episodes", 2, "--budget", 5, "--horizon", 3, "--planner.samples", 8)
    for command in ("plan", "evaluate"):
        left = tmp_path / command
        ended = call(command, "--checkpoint", run, *budget, "--run-dir", left)
        assert ended.code == 0, ended.stderr
        assert json.loads((left / "results.json").read_text())["success_end"]["n"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --data, the dataset, or --action-mean and --action-std"),
        (("--action-mean", 0, 0), "give --data, the dataset, or --action-mean and"),
        (("--action-mean", 0, 0, 0, "--action-std", 1, 1, 1), "actions of 4 numbers need"),
        (("--data", "nowhere"), "dataset nowhere does not exist"),
    ],
)
def test_a_wrong_word_ends_in_one_line(words, message, write, call, tmp_path):
    folder = tmp_path / "refused"
    ended = call("import_leworldmodel", "--weights", write(), *words, "--run-dir", folder)
    assert message in ended.complaint() and not folder.exists()
