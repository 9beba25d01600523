import json

import pytest
import torch

from jepa_world import SIGReg, WorldModel
from jepa_world.encoders.conv import ConvEncoder
from jepa_world.methods.world_model import load_world_model
from jepa_world.predictors.mlp import MLPPredictor
from jepa_world.predictors.prefix import PrefixPredictor

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
