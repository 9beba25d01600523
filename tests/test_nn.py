import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from jepa_world.nn import (
    MLP,
    AdaLNBlock,
    Attention,
    BatchNorm,
    Block,
    Projector,
    grid_index,
    rotary_positions,
    rotate,
    sincos_positions,
    take_tokens,
)


def test_causal_attention_does_not_see_the_future():
    attention = Attention(16, 2, causal=True)
    x = torch.randn(2, 5, 16)
    changed = x.clone()
    changed[:, 3:] = 7.0
    torch.testing.assert_close(attention(changed)[:, :3], attention(x)[:, :3])


def test_attention_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="dim 10 does not divide into 3 heads"):
        Attention(10, 3)
    assert Attention(10, 3, head_dim=4)(torch.randn(1, 2, 10)).shape == (1, 2, 10)


def test_attention_under_bfloat16_autocast_has_the_gradients_of_float32():
    attention, x = Attention(16, 2), torch.randn(2, 5, 16)
    attention(x).square().mean().backward()
    full = [parameter.grad for parameter in attention.parameters()]
    attention.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(x)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    half = [parameter.grad for parameter in attention.parameters()]
    torch.testing.assert_close(half, full, atol=0.01, rtol=0.05)


def test_block_is_equivariant_to_the_order_of_tokens():
    block, x = Block(16, 2), torch.randn(2, 5, 16)
    order = torch.randperm(5)
    torch.testing.assert_close(block(x)[:, order], block(x[:, order]))


def test_adaln_block_without_modulation_is_the_identity_and_its_gates_have_a_gradient():
    x, modulation = torch.randn(2, 5, 16), torch.zeros(2, 5, 96, requires_grad=True)
    y = AdaLNBlock(16, 2)(x, modulation)
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert modulation.grad is not None
    moved = modulation.grad.abs().sum((0, 1)).unflatten(0, (6, 16)).sum(1) > 0
    assert moved.tolist() == [False, False, True, False, False, True]


def test_adaln_block_modulates_every_position_by_itself():
    block, x, modulation = AdaLNBlock(16, 2), torch.randn(1, 4, 16), torch.randn(1, 4, 96)
    changed = modulation.clone()
    changed[:, 2] += 1.0
    own = torch.eye(4, dtype=torch.bool)  # no position sees another
    moved = (block(x, changed, own) - block(x, modulation, own)).abs().sum(-1)[0] > 1e-4
    assert moved.tolist() == [False, False, True, False]


def test_positions_are_the_published_formula_in_one_dimension():
    positions = sincos_positions(8, 10)
    omega = 10000.0 ** (-torch.arange(4) / 4)
    expected = torch.cat([torch.sin(3 * omega), torch.cos(3 * omega)])
    torch.testing.assert_close(positions[3], expected)


def test_positions_of_an_image_encode_the_column_first():
    positions = sincos_positions(16, 2, 3).view(2, 3, 16)
    assert torch.equal(positions[0, :, :8], positions[1, :, :8])
    assert torch.equal(positions[:, 0, 8:], positions[:, 2, 8:])


def test_positions_of_a_clip_are_distinct_and_raster_ordered():
    positions = sincos_positions(20, 2, 3, 4)
    assert positions.shape == (24, 20)
    assert len(positions.unique(dim=0)) == 24
    assert torch.equal(positions.view(2, 3, 4, 20)[:, 1, 2, :12], positions[[6, 18], :12])
    with pytest.raises(ValueError, match="dim 4 is too small for positions on 3 axes"):
        sincos_positions(4, 2, 2, 2)


def test_rotary_positions_are_the_published_form_with_repeated_frequencies():
    x, index = torch.randn(2, 1, 4, 10), torch.tensor([[0, 0], [1, 0], [0, 2], [5, 3]])
    turned = rotate(x, rotary_positions(10, index))
    for place, (row, column) in enumerate(index.tolist()):
        for c in range(8):  # two frequencies on each axis; two channels are not turned
            angle = torch.tensor((row if c < 4 else column) * 10000.0 ** (-(c % 2) / 2))
            partner = -x[:, 0, place, c + 1] if c % 2 == 0 else x[:, 0, place, c - 1]
            expected = x[:, 0, place, c] * angle.cos() + partner * angle.sin()
            torch.testing.assert_close(turned[:, 0, place, c], expected)
    assert torch.equal(turned[..., 8:], x[..., 8:]) and torch.equal(turned[:, :, 0], x[:, :, 0])


def test_rotary_positions_give_each_axis_an_even_share_of_a_head():
    cos, sin = rotary_positions(64, grid_index(2, 3, 4))
    assert cos.shape == (24, 64) and bool((cos[:, 60:] == 1).all() and (sin[:, 60:] == 0).all())
    by_axis = sin.view(2, 3, 4, 64)
    assert torch.equal(by_axis[:, 0, 0, :20], by_axis[:, 2, 3, :20])
    assert torch.equal(by_axis[0, :, 0, 20:40], by_axis[1, :, 3, 20:40])
    assert torch.equal(by_axis[0, 0, :, 40:], by_axis[1, 2, :, 40:])
    for narrow in (4, 9):
        with pytest.raises(ValueError, match=f"heads of {narrow} channels .* at least 6"):
            rotary_positions(narrow, grid_index(1, 1, 1))


def test_attention_with_rotary_positions_does_not_depend_on_the_order_of_tokens():
    block, x, order = Block(24, 2), torch.randn(2, 6, 24), torch.rand(2, 6).argsort(1)
    rotary = rotary_positions(12, grid_index(1, 2, 3))
    given = block(take_tokens(x, order), rotary=rotary[:, order])
    torch.testing.assert_close(given, take_tokens(block(x, rotary=rotary), order))
    assert not torch.allclose(block(x, rotary=rotary), block(x))


def test_take_tokens_takes_per_sample():
    tokens = torch.arange(6.0).view(2, 3, 1)
    taken = take_tokens(tokens, torch.tensor([[2, 0], [1, 1]]))
    assert taken.flatten(1).tolist() == [[2.0, 0.0], [4.0, 4.0]]


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_torchs_on_one_process(affine):
    ours, theirs = BatchNorm(6, affine=affine), nn.BatchNorm2d(6, affine=affine)
    for training in (True, True, False):
        ours.train(training)
        theirs.train(training)
        maps = 2 * torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last) + 1
        y = ours(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(y, theirs(maps))
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_batch_norm_keeps_bfloat16():
    y = BatchNorm(6)(torch.randn(8, 3, 6, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert y.float().mean((0, 1)).abs().max() < 0.02


def test_projector_gives_every_channel_mean_zero_and_variance_one():
    for hidden in (None, 32):
        z = Projector(16, 8, hidden=hidden)(5 * torch.randn(64, 16) + 3)
        torch.testing.assert_close(z.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
        torch.testing.assert_close(z.var(0, correction=0), torch.ones(8), atol=1e-3, rtol=0)


def _normalised_network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), BatchNorm(5), nn.GELU(), Projector(5, 2, hidden=4))
    return network.double(), torch.randn(7, 3).double() * 3 + 10, torch.randn(7, 2).double()


def _train_a_part(rank, processes, folder):
    """Give rank 0 three samples and rank 1 four; average gradients as data parallelism does."""
    if processes > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    network, x, target = _normalised_network()
    mine = slice(None) if processes == 1 else (slice(0, 3), slice(3, 7))[rank]
    x = x[mine].requires_grad_()
    y = network(x)
    loss = (y - target[mine]).square().sum() * processes / 7
    loss.backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    if processes > 1:
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= processes
        dist.destroy_process_group()
    assert x.grad is not None
    result = (y.detach(), x.grad / processes, gradients, list(network.buffers()))
    torch.save(result, f"{folder}/{processes}-{rank}.pt")


def test_batch_norm_on_two_processes_equals_one(tmp_path):
    _train_a_part(0, 1, tmp_path)
    spawn(_train_a_part, (2, str(tmp_path)), nprocs=2)
    one = torch.load(tmp_path / "1-0.pt")
    parts = [torch.load(tmp_path / f"2-{rank}.pt") for rank in range(2)]
    for index in (0, 1):  # outputs and input gradients, sample by sample
        torch.testing.assert_close(torch.cat([p[index] for p in parts]), one[index])
    for part in parts:  # parameter gradients and running statistics, the same everywhere
        torch.testing.assert_close(part[2:], one[2:])


def test_a_perceptron_is_the_same_without_gradient_and_leaves_its_input():
    perceptron, x = MLP(8, 16, dropout=0.5).eval(), torch.randn(4, 8)
    kept, expected = x.clone(), perceptron(x)
    assert expected.requires_grad
    with torch.no_grad():
        assert torch.equal(perceptron(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert perceptron(x).dtype == torch.bfloat16
    assert torch.equal(x, kept)
