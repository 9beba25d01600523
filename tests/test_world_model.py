import json
from functools import partial
from typing import cast

import pytest
import torch
from einops import rearrange
from torch import nn

from jepa_world import SIGReg, WorldModel
from jepa_world.checkpoint import load_tensors
from jepa_world.encoders.conv import ConvEncoder
from jepa_world.losses import VICReg
from jepa_world.methods.world_model import TeacherWorldModel, load_world_model
from jepa_world.predictors.mlp import MLPPredictor
from jepa_world.predictors.prefix import PrefixPredictor
from jepa_world.probes import collapse_report

FRAMES = 6


def make(predictor, **options):
    torch.manual_seed(0)
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    encoder = ConvEncoder((1, 3, 16, 16), dim=8, width=4, stages=2)
    return WorldModel(encoder, predictor, SIGReg(slices=16), weight=0.0, **options).eval()


def windows():
    torch.manual_seed(1)
    pixels = torch.randint(0, 256, (3, FRAMES, 16, 16, 3), dtype=torch.uint8)
    return {"pixels": pixels, "action": torch.rand(3, FRAMES, 2) * 2 - 1}


@pytest.mark.parametrize("open_loop", [None, 1, 2, 3, 5])
def test_every_latent_is_predicted_from_the_true_one_of_so_many_steps_before(open_loop):
    model, batch = make(MLPPredictor(8, 2, width=16), open_loop=open_loop), windows()
    z, action = model.encode(batch["pixels"]), batch["action"]
    errors = []
    for step in range(FRAMES - 1):
        start = step // (open_loop or FRAMES) * (open_loop or FRAMES)
        latent = z[:, start : start + 1]
        for now in range(start, step + 1):
            latent = model.predictor(latent, action[:, now : now + 1])
        errors.append((latent[:, 0] - z[:, step + 1]).square().mean())
    expected = torch.stack(errors).mean()
    torch.testing.assert_close(model(batch, step=0).terms["prediction"], expected)


@pytest.mark.parametrize(("distance", "power"), [("l1", 1), ("l2", 2)])
def test_prefixes_of_one_start_are_learned_together(distance, power):
    predictor = PrefixPredictor(8, 2, span=FRAMES - 1, width=16, depth=1, heads=2)
    model, batch = make(predictor, distance=distance), windows()
    z, action = model.encode(batch["pixels"]), batch["action"]
    ahead = predictor.rollout_prefixes(z[:, :1], action[:, None, :-1])[:, 0]
    output = model(batch, step=0)
    error = (ahead - z[:, 1:]).abs().pow(power).mean()
    torch.testing.assert_close(output.terms["prediction"], error)
    output.loss.backward()
    gradient = predictor.positions.grad
    assert gradient is not None and bool((gradient.abs().sum(1) > 0).all())


@pytest.mark.parametrize("name", ["adaln", "block_causal", "concat", "gru", "prefix"])
def test_a_predictor_is_trained_and_planned_with_from_the_command_line(
    name, call, tiny_data, tiny_words, tmp_path
):
    run = tmp_path / "run"
    narrow = [] if name == "gru" else ["--predictor.heads", 2]
    words = ("--predictor", name, *narrow, "--predict.open-loop", 2)
    ended = call("train_world_model", "--data", tiny_data, *tiny_words, *words, "--run-dir", run)
    assert ended.code == 0, ended.stderr
    model, description = load_world_model(run)
    assert description["predictor"]["name"] == name
    assert model.rollout(torch.zeros(2, 1, 1, 8), torch.zeros(2, 4, 2)).shape == (2, 4, 1, 8)
    budget = ("--episodes", 2, "--budget", 2, "--horizon", 4, "--planner.samples", 8)
    ended = call("evaluate", "--checkpoint", run, *budget, "--run-dir", tmp_path / "evaluated")
    assert ended.code == 0, ended.stderr
    results = json.loads((tmp_path / "evaluated" / "results.json").read_text())
    assert results["success_end"]["n"] == 2


def test_a_step_of_the_model_may_be_several_of_the_environment(
    call, tiny_data, tiny_words, tmp_path
):
    run = tmp_path / "run"
    words = ("--predict.stride", 3, "--data", tiny_data, "--run-dir", run)
    ended = call("train_world_model", *tiny_words, *words)
    assert ended.code == 0, ended.stderr
    _, description = load_world_model(run)
    assert (description["stride"], description["action_dim"]) == (3, 6)
    budget = ("--episodes", 2, "--horizon", 2, "--planner.samples", 8)
    words = ("--checkpoint", run, *budget, "--budget", 7, "--run-dir", tmp_path / "evaluated")
    ended = call("evaluate", *words)
    assert ended.code == 0, ended.stderr
    words = ("--checkpoint", run, *budget, "--budget", 2, "--run-dir", tmp_path / "refused")
    assert "--budget is 2: the model's steps are 3 each" in call("plan", *words).complaint()


@pytest.mark.parametrize("frozen", [False, True])
def test_flags_of_prediction_reach_the_loss(
    frozen, call, tiny_data, tiny_run, tiny_words, tmp_path
):
    words = ("--data", tiny_data, *tiny_words, "--seed", 3)
    words += ("--frozen", tiny_run) if frozen else ()
    losses = set()
    for number, flags in enumerate(
        [(), ("--predict.open-loop", 1), ("--predict.distance", "l1" if not frozen else "l2")]
    ):
        run = tmp_path / str(number)
        ended = call("train_world_model", *words, *flags, "--run-dir", run)
        assert ended.code == 0, ended.stderr
        losses.add(json.loads((run / "results.json").read_text())["loss"])
    assert len(losses) == 3


@pytest.mark.parametrize("steps", [0, 4])
def test_more_steps_than_a_window_has_are_refused(steps, call, tiny_data, tmp_path):
    words = ("--data", tiny_data, "--predict.open-loop", steps, "--run-dir", tmp_path / "run")
    complaint = call("train_world_model", *words).complaint()
    assert f"--predict.open-loop is {steps}: give 1 to 3, the steps in windows of 4" in complaint


class Linear(nn.Module):
    """An encoder that nothing in it keeps from collapsing."""

    dim, num_tokens = 8, 1

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(3 * 16 * 16, 8)

    def forward(self, video, keep=None):
        return self.map(rearrange(video, "b t c hh ww -> b t 1 (c hh ww)"))


def moving(count):
    """Return windows of a bright square; actions move it."""
    generator = torch.Generator().manual_seed(0)
    action = torch.randint(-1, 2, (count, 4, 2), generator=generator)
    start = torch.randint(3, 10, (count, 1, 2), generator=generator)
    corner = start + torch.cat([torch.zeros(count, 1, 2), action[:, :-1].cumsum(1)], 1).long()
    rows, columns = (corner[..., axis, None] - torch.arange(16) for axis in (0, 1))
    inside = ((rows.abs() < 3)[..., :, None] & (columns.abs() < 3)[..., None, :])[..., None]
    return {"pixels": (255 * inside).expand(-1, -1, -1, -1, 3).byte(), "action": action.float()}


def trained(build, *, steps=150):
    """Train on squares that move; return what the report says of held-out latents."""
    torch.manual_seed(0)
    model, batch = build(Linear(), MLPPredictor(8, 2, width=32)), moving(64)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        model(batch, step).loss.backward()
        optimizer.step()
    return collapse_report(model.eval()(moving(100), steps).latent)


def test_latents_collapse_without_a_regulariser_and_not_with_one():
    assert "collapsed to a point" in trained(WorldModel)["warning"]
    for regulariser in (SIGReg(slices=64), VICReg()):
        kept = trained(partial(WorldModel, regulariser=regulariser))
        assert kept["largest_std"] > 0.7 and "collapsed" not in kept["warning"]


def test_targets_are_a_moving_average_without_gradient():
    torch.manual_seed(0)
    model, batch = (
        TeacherWorldModel(Linear(), MLPPredictor(8, 2, width=16), momentum=0.9),
        moving(8),
    )
    slow, fast = (model.get_parameter(f"{part}.map.weight") for part in ("encoder", "student"))
    model(batch, step=0).loss.backward()
    assert slow.grad is None and fast.grad is not None and fast.grad.abs().sum() > 0
    before = slow.clone()
    with torch.no_grad():
        fast.add_(1.0)
    expected = 0.9 * before + 0.1 * fast
    output = model(batch, step=1)
    torch.testing.assert_close(slow, expected)
    model(batch, step=1)  # the second part of a batch: once a step
    torch.testing.assert_close(slow, expected)
    video = rearrange(batch["pixels"], "b t hh ww c -> b t c hh ww") / 255
    predicted = model.student(video[:, :1])
    errors = []
    for now in range(3):
        predicted = model.predictor(predicted, batch["action"][:, now : now + 1])
        errors.append((predicted - model.encoder(video)[:, now + 1 : now + 2]).square().mean())
    torch.testing.assert_close(output.terms["prediction"], torch.stack(errors).mean())
    model.eval()(batch, step=2)
    torch.testing.assert_close(slow, expected)


def test_a_teacher_resumes_exactly(resumes_exactly):
    def build():
        torch.manual_seed(0)
        encoder = ConvEncoder((1, 3, 16, 16), dim=8, width=4, stages=2)
        return TeacherWorldModel(encoder, MLPPredictor(8, 2, width=16))

    resumes_exactly(build, **moving(32))


@pytest.mark.parametrize("name", ["sigreg", "vicreg", "ema", "none"])
def test_every_regulariser_leaves_a_model_to_plan_with(name, call, tiny_data, tiny_words, tmp_path):
    run = tmp_path / "run"
    words = ("--data", tiny_data, *tiny_words, "--regulariser.name", name, "--run-dir", run)
    ended = call("train_world_model", *words)
    assert ended.code == 0, ended.stderr
    metrics = json.loads((run / "results.json").read_text())
    assert {"sigreg", "vicreg"} & metrics.keys() == {name} - {"ema", "none"}
    weights, _ = load_tensors(run / "checkpoint" / "model.safetensors")
    assert any(key.startswith("student.") for key in weights) == (name == "ema")
    model, description = load_world_model(run)
    assert description["regulariser"] == name
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[key], rtol=0, atol=0)
    words = ("--checkpoint", run, "--episodes", 1, "--budget", 2, "--horizon", 3)
    ended = call("evaluate", *words, "--planner.samples", 8, "--run-dir", tmp_path / "evaluated")
    assert ended.code == 0, ended.stderr
    ended = call(
        *("train_world_model", "--encoder", run, "--data", tiny_data, *tiny_words[-12:]),
        *("--run-dir", tmp_path / "frozen"),
    )
    assert ended.code == 0, ended.stderr
    again, known = (
        cast(nn.Module, found.encoder).state_dict()
        for found in (load_world_model(tmp_path / "frozen")[0], model)
    )
    torch.testing.assert_close(again, known, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--regulariser.name", "ema", "--regulariser.weight", 1, 1), "'ema' has none"),
        (("--regulariser.weight", 0.1, -1), "weight is 0.1 -1.0: give at least 0"),
        (("--regulariser.slices", 0), "--regulariser.slices is 0: give at least 1"),
        (("--regulariser.name", "vicref"), "vicref"),
    ],
)
def test_regularisers_that_cannot_be_are_refused(words, message, call, tiny_data, tmp_path):
    words = ("--data", tiny_data, *words, "--run-dir", tmp_path / "run")
    assert message in call("train_world_model", *words).complaint()


def test_another_regulariser_does_not_resume_a_run(call, tiny_run):
    words = ("--resume", "--run-dir", tiny_run, "--regulariser.name", "none")
    assert "a model with regulariser 'sigreg'" in call("train_world_model", *words).complaint()


def test_the_change_over_a_window_tells_what_only_differs_between_episodes_from_what_moves():
    model = WorldModel(ConvEncoder((1, 3, 32, 32)), MLPPredictor(32, 2), VICReg(), change=0.8)
    still = torch.randn(64, 1, 1, 32, generator=torch.Generator().manual_seed(0)).expand(
        -1, 4, 1, 32
    )
    moving = torch.randn(64, 4, 1, 32, generator=torch.Generator().manual_seed(0))
    batch = {"pixels": torch.zeros(64, 4, 32, 32, 3).byte(), "action": torch.zeros(64, 4, 2)}
    terms = {}
    for name, z in (("still", still), ("moving", moving)):
        model.encode = lambda pixels, z=z: z
        terms[name] = model(batch, step=0).terms
    assert terms["still"]["vicreg"] < 0.2 and terms["still"]["change"] > 0.9
    assert terms["moving"]["vicreg"] < 0.2 and terms["moving"]["change"] < 0.2
