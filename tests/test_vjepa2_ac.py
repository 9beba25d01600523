import pytest
import torch

from jepa_world import SIGReg, WorldModel
from jepa_world.encoders.vit import ViTEncoder
from jepa_world.methods.vjepa2_ac import VJEPA2AC
from jepa_world.predictors.block_causal import BlockCausalPredictor
from jepa_world.predictors.prefix import PrefixPredictor


def make(*, state_dim=0, rollout=2):
    torch.manual_seed(0)
    encoder = ViTEncoder((1, 3, 16, 24), dim=24, depth=1, heads=2, normalise=True)
    predictor = BlockCausalPredictor(
        24, 2, rows=2, state_dim=state_dim, width=32, depth=1, heads=2, normalise=True
    )
    return VJEPA2AC(encoder, predictor, rollout=rollout), encoder, predictor


def windows(state_dim=0):
    torch.manual_seed(1)
    batch = {"pixels": torch.randint(0, 256, (3, 4, 16, 24, 3), dtype=torch.uint8)}
    batch["action"] = torch.rand(3, 4, 2) * 2 - 1
    return batch | ({"state": torch.randn(3, 4, state_dim)} if state_dim else {})


@pytest.mark.parametrize("state_dim", [0, 3])
@pytest.mark.parametrize("rollout", [1, 2, 3])
def test_the_loss_is_teacher_forcing_and_a_rollout_in_equal_parts(rollout, state_dim):
    model, _, predictor = make(state_dim=state_dim, rollout=rollout)
    batch = windows(state_dim)
    output, z = model(batch, step=0), model.encode(batch["pixels"])
    given = [batch[name] for name in ("action", "state") if name in batch]
    forced = predictor(z[:, :3], *(x[:, :3] for x in given))
    rolled = predictor.rollout(z[:, :1], *(x[:, :rollout] for x in given))[:, 1:]
    expected = {"teacher_forcing": (forced - z[:, 1:]).abs().mean()}
    if rollout > 1:
        expected["rollout"] = (rolled - z[:, 2 : rollout + 1]).abs().mean()
    torch.testing.assert_close(output.terms, {k: v.detach() for k, v in expected.items()})
    torch.testing.assert_close(output.loss, torch.stack(list(expected.values())).sum())


def test_prefixes_are_rolled_out_at_once():
    _, encoder, _ = make()
    predictor = PrefixPredictor(24, 2, span=3, width=32, depth=1, heads=2)
    torch.nn.init.normal_(predictor.out.weight)
    model, batch = VJEPA2AC(encoder, predictor, rollout=3, distance="l2"), windows()
    output, z = model(batch, step=0), model.encode(batch["pixels"])
    ahead = predictor.rollout_prefixes(z[:, :1], batch["action"][:, None, :3])[:, 0]
    torch.testing.assert_close(output.terms["rollout"], (ahead - z[:, 1:])[:, 1:].square().mean())
    output.loss.backward()
    gradient = predictor.positions.grad
    assert gradient is not None and bool((gradient.abs().sum(1) > 0).all())


def test_the_encoder_does_not_learn_and_its_statistics_stay():
    model, encoder, predictor = make()
    model.eval().train()
    assert predictor.training and not encoder.training
    model(windows(), step=0).loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in encoder.parameters())
    assert all(p.grad is not None for p in predictor.parameters())


def test_a_few_steps_halve_the_error_on_one_batch():
    (model, _, predictor), batch = make(), windows()
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        loss = model(batch, step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_world_model_of_the_same_parts_has_the_same_weights():
    model, encoder, predictor = make()
    world = WorldModel(encoder, predictor, SIGReg(), weight=0.0)
    assert world.state_dict().keys() == model.state_dict().keys()


def test_windows_too_short_for_the_rollout_are_refused():
    batch = {name: value[:, :2] for name, value in windows().items()}
    with pytest.raises(ValueError, match="a rollout of 2 steps in windows of 2 frames"):
        make()[0](batch, step=0)
