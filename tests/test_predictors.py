from itertools import product
from typing import cast

import pytest
import torch
import torch.nn.functional as F

from jepa_world.predictors.adaln import AdaLNPredictor
from jepa_world.predictors.block_causal import BlockCausalPredictor
from jepa_world.predictors.concat import ConcatPredictor
from jepa_world.predictors.gru import GRUPredictor
from jepa_world.predictors.masked import MaskedTransformer
from jepa_world.predictors.mlp import MLPPredictor
from jepa_world.predictors.prefix import PrefixPredictor
from jepa_world.testing import check_masked_predictor, check_predictor

PREDICTORS = {
    "mlp": lambda: MLPPredictor(8, 2, width=32),
    "mlp-deep": lambda: MLPPredictor(8, 2, width=16, depth=3, history=3),
    "mlp-residual": lambda: MLPPredictor(8, 2, width=16, depth=4, history=2, residual=True),
    "adaln": lambda: AdaLNPredictor(8, 2, width=32, depth=2, heads=2),
    "adaln-dropout": lambda: AdaLNPredictor(8, 2, width=32, depth=2, heads=2, dropout=0.1),
    "block_causal": lambda: BlockCausalPredictor(8, 2, width=32, depth=2, heads=2),
    "block_causal-normalised": lambda: BlockCausalPredictor(
        8, 2, width=16, depth=1, heads=1, normalise=True
    ),
    "concat": lambda: ConcatPredictor(8, 2, width=32, depth=2, heads=2),
    "concat-dropout": lambda: ConcatPredictor(8, 2, width=32, depth=1, heads=2, dropout=0.1),
    "gru": lambda: GRUPredictor(8, 2, width=16),
    "gru-deep": lambda: GRUPredictor(8, 2, width=16, depth=2),
}
PREFIX = {
    "prefix": lambda: PrefixPredictor(8, 2, width=32, depth=2, heads=2),
    "prefix-long": lambda: PrefixPredictor(8, 2, width=32, depth=1, heads=2, span=10),
    "prefix-step": lambda: PrefixPredictor(8, 2, width=32, depth=1, heads=2, span=1),
}
ALL = PREDICTORS | PREFIX
every_predictor = pytest.mark.parametrize("build", ALL.values(), ids=ALL)
with_rollout = pytest.mark.parametrize("build", PREDICTORS.values(), ids=PREDICTORS)


def shaken(predictor):
    """Move a predictor away from the copy it starts as."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return predictor.eval()


@every_predictor
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_predictor_keeps_its_contract(build, num_tokens):
    check_predictor(build(), 8, 2, num_tokens=num_tokens)


@pytest.mark.parametrize("name", sorted(name for name in ALL if "block_causal" not in name))
def test_predictor_starts_as_a_copy(name):
    build = ALL[name]
    z = torch.randn(2, 4, 1, 8)
    assert torch.equal(build()(z, torch.randn(2, 4, 2)), z)


@with_rollout
@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("known", [1, 2, 5])
def test_rollout_equals_step_by_step_calls(build, known, num_tokens):
    predictor = shaken(build())
    z, action = torch.randn(2, known, num_tokens, 8), torch.randn(2, known + 4, 2)
    stepwise = z
    for step in range(known, known + 5):
        following = predictor(stepwise, action[:, :step])[:, -1:]
        stepwise = torch.cat([stepwise, following], 1)
    torch.testing.assert_close(predictor.rollout(z, action), stepwise[:, known:])


@pytest.mark.parametrize(
    "predictor",
    [
        MLPPredictor(8, 2, history=2),
        AdaLNPredictor(8, 2, width=32, depth=3, history=2),
        ConcatPredictor(8, 2, width=32, depth=3, history=2),
    ],
    ids=["mlp", "adaln", "concat"],
)
def test_only_the_history_is_seen(predictor):
    predictor = shaken(predictor)
    z, action = torch.randn(1, 5, 1, 8), torch.randn(1, 5, 2)
    old_z, old_action = z.clone(), action.clone()
    old_z[:, 2], old_action[:, 2] = 9.0, 9.0
    moved = (predictor(old_z, old_action) - predictor(z, action)).abs().flatten(2).sum(2)[0] > 1e-4
    assert moved.tolist() == [False, False, True, True, False]


def test_mlp_repeats_the_first_step_where_the_past_is_missing():
    predictor = shaken(MLPPredictor(8, 2, history=3))
    z, action = torch.randn(2, 1, 1, 8), torch.randn(2, 1, 2)
    repeated = predictor(z.expand(-1, 3, -1, -1), action.expand(-1, 3, -1))[:, -1:]
    torch.testing.assert_close(predictor(z, action), repeated)


def test_residual_layers_of_an_mlp_add_and_take_no_notice_of_size():
    predictor = shaken(MLPPredictor(8, 2, width=16, depth=3, residual=True))
    plain = MLPPredictor(8, 2, width=16, depth=3)
    assert set(plain.state_dict()) == set(predictor.state_dict())
    layer, x = cast(torch.nn.Linear, predictor.hidden[0]), torch.randn(5, 16)
    torch.testing.assert_close(layer(x) - x, layer(9 * x) - 9 * x, rtol=1e-4, atol=1e-4)
    normed = (x - x.mean(-1, keepdim=True)) / x.std(-1, correction=0, keepdim=True)
    linear = normed @ layer.weight.T + layer.bias
    torch.testing.assert_close(layer(x), x + linear * linear.sigmoid(), rtol=1e-4, atol=1e-4)


def test_tokens_of_a_step_see_each_other_but_mlp_tokens_do_not():
    z, action = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2)
    changed = z.clone()
    changed[:, :, 1] += 1.0
    sees_others = {"mlp": False, "gru": False, "adaln": True, "block_causal": True}
    for name, sees in (sees_others | {"concat": True, "prefix": True}).items():
        predictor = shaken(ALL[name]())
        gap = (predictor(changed, action) - predictor(z, action))[0, 0, 0].abs().sum()
        assert bool(gap > 1e-4) == sees


def plain_prefix(predictor, z, actions):
    """Predict the latent (n d) that one prefix of actions (k a) leads to from z (n d), alone.

    One sequence [tokens of z, actions], one query after the other, no cache.
    """
    tokens, steps = len(z), range(len(actions))
    latent = predictor.present(predictor.token_in(z)[None])[0]
    x = torch.cat([latent, predictor.action_in(actions) + predictor.positions[: len(actions)]])
    for block in predictor.ahead:
        width, heads = x.shape[1], block.attention.heads
        query, key, value = block.attention.qkv(block.norm1(x)).chunk(3, 1)
        found = []
        for last in [tokens] * tokens + [tokens + step + 1 for step in steps]:
            for q, k, v in zip(*(m.chunk(heads, -1) for m in (query, key, value)), strict=True):
                weights = (k[:last] @ q[len(found) // heads] / q.shape[1] ** 0.5).softmax(0)
                found.append(weights @ v[:last])
        x = x + block.attention.out(torch.stack(found).view(len(x), width))
        x = x + block.mlp(block.norm2(x))
    x = predictor.norm(x)
    moved = predictor.token_out(x[:tokens]) + predictor.prefix_out(x[-1])
    return z + predictor.out(F.silu(moved))


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_prefixes_of_all_plans_at_once_equal_each_by_itself(num_tokens):
    predictor = shaken(PrefixPredictor(8, 2, width=32, depth=2, heads=2, span=4))
    z, action = torch.randn(2, 1, num_tokens, 8), torch.randn(2, 3, 4, 2)
    found = predictor.rollout_prefixes(z, action)
    for b, s, k in product(range(2), range(3), range(4)):
        alone = plain_prefix(predictor, z[b, 0], action[b, s, : k + 1])
        torch.testing.assert_close(found[b, s, k], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("known", [1, 3])
@pytest.mark.parametrize("span", [1, 2, 10])
def test_prefixes_are_predicted_from_the_last_latent_span_by_span(span, known):
    predictor = shaken(PrefixPredictor(8, 2, width=32, depth=2, heads=2, span=span))
    z, action = torch.randn(2, known, 3, 8), torch.randn(2, 1, known + 4, 2)
    found = predictor.rollout_prefixes(z, action)[:, 0]
    assert found.shape == (2, 5, 3, 8)
    present = z[:, -1:]
    for step in range(5):
        begin, inside = step // span * span, step % span
        start = present if begin == 0 else found[:, begin - 1 : begin]
        prefix = action[:, :, known - 1 + begin : known + begin + inside]
        alone = predictor.rollout_prefixes(start, prefix)[:, 0, -1]
        torch.testing.assert_close(found[:, step], alone)


@pytest.mark.parametrize("span", [2, 10])
def test_a_latent_of_a_plan_depends_on_the_actions_before_it_alone(span):
    predictor = shaken(PrefixPredictor(8, 2, width=32, depth=2, heads=2, span=span))
    z, action = torch.randn(1, 1, 2, 8), torch.randn(1, 2, 6, 2, requires_grad=True)
    future = predictor.rollout_prefixes(z, action)
    for step in range(6):
        (slope,) = torch.autograd.grad(future[0, 1, step].sum(), action, retain_graph=True)
        reached = slope[0].abs().sum(-1) > 0
        assert reached.tolist() == [[False] * 6, [now <= step for now in range(6)]]


def test_a_prefix_is_not_its_steps_one_by_one():
    predictor = shaken(PrefixPredictor(8, 2, width=32, depth=2, heads=2, span=5))
    z, action = torch.randn(2, 1, 1, 8), torch.randn(2, 3, 2)
    at_once, stepwise = predictor.rollout_prefixes(z, action[:, None])[:, 0], z
    for step in range(3):
        stepwise = torch.cat([stepwise, predictor(stepwise, action[:, : step + 1])[:, -1:]], 1)
    torch.testing.assert_close(at_once[:, :1], stepwise[:, 1:2])
    assert not torch.allclose(at_once[:, 1:], stepwise[:, 2:], atol=0.01)


def test_a_prefix_predictor_has_the_weights_of_adaln_and_few_of_them_are_used_for_an_action():
    with torch.device("meta"):
        prefix, adaln = PrefixPredictor(32, 2), AdaLNPredictor(32, 2)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (prefix, adaln, prefix.ahead)]
    assert abs(sizes[0] / sizes[1] - 1) < 0.05
    assert sizes[2] < 0.33 * sizes[0]


def test_a_recurrent_state_remembers_what_a_short_window_forgets():
    z, action = torch.randn(1, 9, 1, 8), torch.randn(1, 9, 2)
    other = torch.cat([z[:, :1] + 1, z[:, 1:]], 1)
    for name, remembers in (("gru", True), ("adaln", False), ("concat", False)):
        predictor = shaken(ALL[name]())
        gap = (predictor(other, action) - predictor(z, action))[:, -1].abs().sum()
        assert bool(gap > 1e-5) == remembers, name


@pytest.mark.parametrize("name", ["mlp", "adaln", "block_causal", "concat", "gru", "prefix"])
def test_predictor_learns_linear_dynamics(name):
    torch.manual_seed(0)
    predictor = ALL[name]()
    turn, push = torch.linalg.qr(torch.randn(8, 8))[0], torch.randn(2, 8)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=1e-2)
    errors = []
    for _ in range(150):
        z, action = torch.randn(64, 1, 1, 8), torch.rand(64, 1, 2) * 2 - 1
        target = z @ turn + (action @ push).unsqueeze(2)
        loss = (predictor(z, action) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert errors[-1] < 0.2 * errors[0]  # the first is that of a copy


@pytest.mark.parametrize("grid", [(1, 3, 4), (2, 2, 3)], ids=["image", "clip"])
@pytest.mark.parametrize("positions", ["sincos", "rotary"])
@pytest.mark.parametrize("mask_tokens", [1, 3])
def test_masked_predictor_keeps_its_contract(grid, positions, mask_tokens):
    options = {"width": 32, "depth": 1, "heads": 2, "positions": positions}
    check_masked_predictor(MaskedTransformer(8, grid, **options, mask_tokens=mask_tokens), 8, grid)


def test_masked_predictor_asks_by_the_mask_token_that_is_chosen():
    predictor = MaskedTransformer(8, (1, 2, 3), width=12, depth=1, heads=2, mask_tokens=3).eval()
    given = torch.randn(2, 2, 8), torch.tensor([[0, 1], [2, 5]]), torch.tensor([[3], [1]])
    one, other = (predictor(*given, mask_token=number) for number in (0, 2))
    assert not torch.allclose(one, other)
    with torch.no_grad():
        predictor.mask_token[2] = predictor.mask_token[0]
    torch.testing.assert_close(predictor(*given, mask_token=2), one)
    with pytest.raises(ValueError, match="needs a mask token, got mask_tokens=0"):
        MaskedTransformer(8, (1, 2, 3), mask_tokens=0)
