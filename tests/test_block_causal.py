"""V-JEPA 2-AC against an implementation that follows its description token by token."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from jepa_world.predictors.block_causal import BlockCausalPredictor
from jepa_world.testing import check_predictor

ROWS, COLUMNS, STEPS = 2, 3, 4


def make(**options):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"rows": ROWS, "width": 32, "depth": 2, "heads": 2}
    predictor = BlockCausalPredictor(8, 2, **sizes | options).eval()
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return predictor


def inputs(state_dim=0, batch=2) -> list[torch.Tensor]:
    """Return latents, actions and, where there are any, states."""
    torch.manual_seed(1)
    z, action = torch.randn(batch, STEPS, ROWS * COLUMNS, 8), torch.randn(batch, STEPS, 2)
    return [z, action, torch.randn(batch, STEPS, state_dim)] if state_dim else [z, action]


def turned(vector, place):
    """Rotate one head's vector by (time, row, column), channel by channel."""
    share = 2 * (len(vector) // 3 // 2)
    out = vector.clone()
    for axis, position in enumerate(place):
        for channel in range(share):
            angle = position / 10000 ** ((channel % (share // 2)) / (share // 2))
            c = axis * share + channel
            partner = -vector[c + 1] if channel % 2 == 0 else vector[c - 1]
            out[c] = vector[c] * math.cos(angle) + partner * math.sin(angle)
    return out


def plain_attention(attention, x, places):
    """Attend with a dense mask, head by head: to no token of a later step."""
    weight, bias = attention.qkv.weight, attention.qkv.bias
    width, size = x.shape[1], x.shape[1] // attention.heads
    later = torch.tensor([[key[0] > query[0] for key in places] for query in places])
    heads = []
    for head in range(attention.heads):
        rows = [
            slice(part * width + head * size, part * width + (head + 1) * size) for part in range(3)
        ]
        q, k, v = (x @ weight[r].T + bias[r] for r in rows)
        q, k = (
            torch.stack([turned(*pair) for pair in zip(m, places, strict=True)]) for m in (q, k)
        )
        scores = (q @ k.T / math.sqrt(size)).masked_fill(later, -torch.inf)
        heads.append(scores.softmax(1) @ v)
    return torch.cat(heads, 1) @ attention.out.weight.T + attention.out.bias


def plain(predictor, z, action, state=None):
    """Predict the next frames of one sample `(t n d)`, one token after the other."""
    tokens, places = [], []
    for t in range(len(z)):
        tokens.append(predictor.action(action[t]))
        if state is not None:
            tokens.append(predictor.state(state[t]))
        places += [(t, 0, 0)] * (1 if state is None else 2)
        for n in range(ROWS * COLUMNS):
            tokens.append(predictor.embed(z[t, n]))
            places.append((t, n // COLUMNS, n % COLUMNS))
    x = torch.stack(tokens)
    for block in predictor.blocks:
        x = x + plain_attention(block.attention, block.norm1(x), places)
        x = x + block.mlp(block.norm2(x))
    each = len(x) // len(z)
    frames = [x[(t + 1) * each - ROWS * COLUMNS : (t + 1) * each] for t in range(len(z))]
    return predictor.out(predictor.norm(torch.stack(frames)))


@torch.no_grad()
@pytest.mark.parametrize("state_dim", [0, 3])
def test_it_computes_what_its_description_says(state_dim):
    predictor, given = make(state_dim=state_dim), inputs(state_dim)
    found = predictor(*given)
    for sample in range(2):
        expected = plain(predictor, *(x[sample] for x in given))
        torch.testing.assert_close(found[sample], expected, atol=1e-5, rtol=1e-5)


def test_predictor_in_double_precision_stays_there():
    predictor = make().double()
    z, action = (x.double() for x in inputs())
    expected = plain(predictor, z[0], action[0])
    torch.testing.assert_close(predictor(z, action)[0], expected, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("state_dim", [0, 3])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("known", [1, 2, STEPS])
def test_rollout_with_its_cache_equals_calls_step_by_step(known, normalise, state_dim):
    predictor = make(state_dim=state_dim, normalise=normalise)
    z, *conditions = inputs(state_dim, batch=6)
    stepwise = z[:, :known]
    for step in range(known, STEPS + 1):
        following = predictor(stepwise, *(x[:, :step] for x in conditions))[:, -1:]
        stepwise = torch.cat([stepwise, following], 1)
    rolled = predictor.rollout(z[:, :known], *conditions)
    torch.testing.assert_close(rolled, stepwise[:, known:], atol=1e-5, rtol=1e-5)


def test_gradients_flow_through_a_rollout_to_the_first_action_and_state():
    predictor = make(state_dim=3)
    z, *conditions = (x.requires_grad_() for x in inputs(3))
    predictor.rollout(z[:, :1], *conditions)[:, -1].square().sum().backward()
    for condition in conditions:
        assert condition.grad is not None and bool((condition.grad.abs().sum(-1) > 0).all())
    assert all(parameter.grad is not None for parameter in predictor.parameters())


def test_states_are_causal_too():
    predictor, (z, action, state) = make(state_dim=3), inputs(3)
    changed = state.clone()
    changed[:, 2] += 1.0
    moved = (predictor(z, action, changed) - predictor(z, action, state)).abs().amax((0, 2, 3))
    assert (moved > 1e-4).tolist() == [False, False, True, True]


def test_frames_of_several_rows_keep_the_contract():
    check_predictor(make(), 8, 2, num_tokens=6)


def test_normalised_outputs_have_mean_zero_and_deviation_one():
    z = make(normalise=True)(*inputs())
    torch.testing.assert_close(z, F.layer_norm(z, (8,)), atol=1e-4, rtol=1e-4)


def test_what_cannot_be_predicted_is_told():
    z, action, state = inputs(3)
    with pytest.raises(ValueError, match="given a state for every step: see state_dim"):
        make(state_dim=3)(z, action)
    with pytest.raises(ValueError, match="given no state: see state_dim"):
        make().rollout(z, action, state)
    with pytest.raises(ValueError, match="frames of 2 rows, which 5 tokens do not form"):
        make()(z[:, :, :5], action)
    with pytest.raises(ValueError, match="heads of 4 channels have no rotary positions"):
        BlockCausalPredictor(8, 2, width=16, heads=4)


def test_the_published_size_has_305_million_parameters():
    with torch.device("meta"):
        predictor = BlockCausalPredictor(
            1408, 7, rows=16, state_dim=7, width=1024, depth=24, heads=16, normalise=True
        )
    assert round(sum(p.numel() for p in predictor.parameters()) / 1e6) == 305
