"""What saves memory changes no number; freed memory that is kept is not cleared again."""

import copy
import json
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from jepa_world.encoders.conv import ConvEncoder
from jepa_world.encoders.resnet import ResNetEncoder
from jepa_world.encoders.vit import PooledViTEncoder, ViTEncoder
from jepa_world.masking import MultiBlockMasks
from jepa_world.memory import recompute_blocks, sharded
from jepa_world.methods.ijepa import IJEPA, TeacherIJEPA
from jepa_world.methods.world_model import WorldModel
from jepa_world.predictors.adaln import AdaLNPredictor
from jepa_world.predictors.block_causal import BlockCausalPredictor
from jepa_world.predictors.concat import ConcatPredictor
from jepa_world.predictors.leworldmodel import LeWorldModelPredictor
from jepa_world.predictors.masked import CrossMaskedTransformer, MaskedTransformer
from jepa_world.predictors.mlp import MLPPredictor
from jepa_world.predictors.prefix import PrefixPredictor
from jepa_world.registry import UserError
from jepa_world.sigreg import SIGReg

SHAPE = (1, 3, 16, 16)
SMALL: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 2}
BLOCKS: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2}


def world_model(predictor, pooled=False):
    encoder = PooledViTEncoder(SHAPE, width=16, dim=16, depth=2, heads=2, hidden=None)
    if not pooled:
        encoder = ViTEncoder(SHAPE, **SMALL)
    return WorldModel(encoder, predictor, SIGReg(slices=8))


def masked(predictor, teacher=False):
    encoder = ViTEncoder(SHAPE, patch=4, positions="rotary", dim=24, depth=2, heads=2)
    parts = encoder, predictor(24, encoder.grid, **BLOCKS)
    masks = MultiBlockMasks(encoder.grid)
    return (
        TeacherIJEPA(*parts, masks)
        if teacher
        else IJEPA(*parts, SIGReg(slices=8), masks, weight=1.0)
    )


METHODS = {
    "masked": lambda: masked(MaskedTransformer),
    "masked teacher": lambda: masked(CrossMaskedTransformer, teacher=True),
    "adaln, dropout": lambda: world_model(AdaLNPredictor(16, 2, dropout=0.3, **BLOCKS)),
    "concat, dropout": lambda: world_model(ConcatPredictor(16, 2, dropout=0.3, **BLOCKS)),
    "block causal": lambda: world_model(BlockCausalPredictor(16, 2, rows=2, **BLOCKS)),
    "prefixes": lambda: world_model(PrefixPredictor(16, 2, **BLOCKS)),
    "leworldmodel, dropout": lambda: world_model(
        LeWorldModelPredictor(16, 2, depth=2, heads=2, head_dim=8, hidden=32, head=32), pooled=True
    ),
    "only the encoder": lambda: world_model(MLPPredictor(16, 2, width=16)),
}


def backward(method):
    """Return the loss of a batch, all gradients and buffers, and the bytes that autograd kept."""
    kept = 0

    def keep(tensor):
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4, 4, 16, 16, 3), dtype=torch.uint8, generator=random)
    images = pixels[:, 0] if isinstance(method, IJEPA | TeacherIJEPA) else pixels
    torch.manual_seed(3)
    batch = {"pixels": images, "index": torch.arange(4), "action": torch.ones(4, 4, 2)}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = method(batch, 1).loss
    after = torch.rand(1)  # the same numbers are drawn for what follows
    loss.backward()
    found = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "after": after, **found, **dict(method.named_buffers())}, kept


@pytest.mark.parametrize("name", METHODS)
def test_blocks_that_compute_again_give_the_same_gradients_bit_for_bit(name):
    """Dropout, the statistics of batch norm outside the blocks, and the names of weights too."""
    torch.manual_seed(0)
    plain = METHODS[name]()
    for parameter in plain.parameters():  # heads that start at zero pass no gradient on
        nn.init.normal_(parameter, std=0.1)
    again = copy.deepcopy(plain)
    recompute_blocks(again)
    assert plain.state_dict().keys() == again.state_dict().keys()
    (one, much), (two, little) = backward(plain), backward(again)
    assert one.keys() == two.keys() and len(one) > 20
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert little < 0.75 * much, (little, much)


def test_dropout_is_drawn_in_the_blocks_that_compute_again():
    torch.manual_seed(0)
    method = METHODS["adaln, dropout"]()
    for parameter in method.parameters():
        nn.init.normal_(parameter, std=0.1)
    recompute_blocks(method)
    one, _ = backward(method)
    method.predictor.eval()
    assert backward(method)[0]["loss"] != one["loss"]


def test_a_command_trains_the_same_weights_with_blocks_that_compute_again(
    tiny_data, tmp_path, call
):
    words = "--encoder vit --encoder.dim 16 --encoder.depth 2 --encoder.heads 2 --steps 3"
    words += " --predictor adaln --predictor.width 16 --predictor.dropout 0.1 --batch-size 4"
    words += f" --encoder.patch 16 --precision no --data {tiny_data} --run-dir"
    for name, flags in (("kept", ()), ("again", ("--loop.recompute",))):
        assert call("train_world_model", *words.split(), tmp_path / name, *flags).code == 0
    one, two = (tmp_path / n / "checkpoint" / "training.safetensors" for n in ("kept", "again"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.slow
def test_compiled_it_trains_as_it_does_plain_with_blocks_that_compute_again(
    tiny_data, tmp_path, call
):
    words = "--encoder vit --encoder.dim 16 --encoder.depth 2 --encoder.heads 2 --encoder.patch 16"
    words += " --predictor adaln --predictor.width 16 --predictor.depth 2 --steps 3 --batch-size 4"
    words += f" --log-every 1 --precision no --data {tiny_data} --run-dir"
    ways = {"plain": (), "compiled": ("--loop.compile", "--loop.recompute")}
    for name, flags in ways.items():
        assert call("train_world_model", *words.split(), tmp_path / name, *flags).code == 0
    one, two = ((tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ways)
    for plain, compiled in zip(map(json.loads, one), map(json.loads, two), strict=True):
        for name in ("loss", "gradient_norm"):
            assert compiled[name] == pytest.approx(plain[name], rel=1e-3)


@pytest.mark.parametrize("encoder", [ConvEncoder, ResNetEncoder])
def test_blocks_with_batch_norm_are_not_run_twice(encoder):
    """It would count its batch twice: nothing is left to compute again, which is said."""
    with pytest.raises(UserError, match=r"--loop.recompute: .*drop it, or choose a transformer"):
        recompute_blocks(encoder((1, 3, 32, 32), stages=2))


def test_a_number_that_cannot_be_shared_out_is_told_by_its_name():
    model = nn.Sequential(nn.Linear(2, 2))
    model.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(UserError, match="'scale' is a single number"):
        sharded(model, torch.device("cpu"))


def test_batch_norm_beside_blocks_counts_its_batch_once():
    encoder = nn.ModuleDict({"vit": ViTEncoder(SHAPE, **SMALL), "norm": nn.BatchNorm1d(16)})
    recompute_blocks(encoder)
    z = encoder["vit"](torch.rand(4, 1, *SHAPE[1:]))
    encoder["norm"](z.flatten(0, 2)).square().mean().backward()
    assert encoder["norm"].num_batches_tracked == 1


FAULTS = """
import resource, sys
import torch
from jepa_world.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for count in range(30):
    if count == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    part = torch.zeros(10_000_000)
    del part
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
def test_freed_memory_is_kept():
    found = {
        how: int(subprocess.check_output([sys.executable, "-c", FAULTS, how], text=True))
        for how in ("kept", "returned")
    }
    assert found["kept"] < 1000 < 20_000 < found["returned"], found
