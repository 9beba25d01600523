import json
import re

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from jepa_world.checkpoint import load_weights
from jepa_world.config import read_yaml
from jepa_world.data.images import make_shapes
from jepa_world.encoders.vit import ViTEncoder
from jepa_world.masking import MultiBlockMasks
from jepa_world.methods.ijepa import (
    IJEPA,
    TeacherIJEPA,
    build_ijepa,
    centre_positions,
    sigreg_of_tokens,
)
from jepa_world.predictors.masked import MaskedTransformer
from jepa_world.registry import UserError
from jepa_world.sigreg import SIGReg
from jepa_world.testing import check_masked_predictor

DESCRIPTION = {
    "observation_shape": [1, 3, 16, 16],
    "encoder": {"name": "vit", "patch": 4, "dim": 32, "depth": 1, "heads": 2},
    "masked_predictor": {"name": "transformer", "width": 16, "depth": 1, "heads": 1},
    "masks": {"context": 0.3, "target": 0.5},
    "views": {"crop": 0.7, "colour": 0.5},
    "whole": 1.0,
    "teacher": None,
    "sigreg": {"slices": 32, "seed": 0, "weight": 10.0},
}
TEACHER = DESCRIPTION | {"teacher": {"momentum": 0.9, "steps": 10}}


def batch(count=32):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=generator)
    return {"pixels": pixels, "index": torch.arange(count)}


def built(description):
    torch.manual_seed(0)
    return build_ijepa(description)


def test_it_is_large_for_constant_tokens_and_for_what_positions_alone_tell():
    of_position = torch.randn(1, 9, 8).expand(32, -1, -1)
    index = torch.arange(9).expand(32, -1)
    centred = centre_positions(of_position, index, 9)
    torch.testing.assert_close(centred, torch.zeros(32, 9, 8), atol=1e-5, rtol=0)
    assert sigreg_of_tokens(SIGReg(slices=16), centred, 0) > 0.3


def test_sigreg_of_tokens_does_not_grow_with_their_number():
    few, many = torch.randn(32, 4, 8) * 2, torch.randn(128, 9, 8) * 2
    values = [sigreg_of_tokens(SIGReg(slices=256), z, 0).item() for z in (few, many)]
    assert values[0] == pytest.approx(values[1], rel=0.5)  # nine times as many tokens


def test_the_two_views_differ_but_are_flipped_alike(monkeypatch):
    """An image that is dark on the left is so in both views, or bright there in both."""
    half = torch.zeros(64, 16, 16, 3, dtype=torch.uint8)
    half[:, :, 8:] = 200
    method, seen = built(DESCRIPTION), []
    encoder = method.get_submodule("encoder")
    encode = encoder.forward
    monkeypatch.setattr(
        encoder, "forward", lambda video, keep: (seen.append(video), encode(video, keep))[1]
    )
    method({"pixels": half, "index": torch.arange(64)}, step=0)
    right = [(view[..., 8:].mean((1, 2, 3, 4)) > view[..., :8].mean((1, 2, 3, 4))) for view in seen]
    assert torch.equal(right[0], right[1]) and 10 < right[0].sum() < 54
    assert not torch.equal(seen[0], seen[1])


def test_tokens_are_centred_over_the_images_that_have_them():
    index = torch.tensor([[0, 2], [0, 1], [0, 2]])
    z = torch.tensor([[1.0, 4.0], [2.0, 7.0], [6.0, 8.0]]).unsqueeze(-1)
    centred = centre_positions(z, index, 4).squeeze(-1)
    assert centred.tolist() == [[-2.0, -2.0], [-1.0, 0.0], [3.0, 2.0]]


@pytest.mark.parametrize("description", [DESCRIPTION, TEACHER], ids=["sigreg", "teacher"])
def test_hidden_pixels_reach_the_loss_through_the_target_only(description):
    """What is neither context nor target changes no prediction; gradients come from the context."""
    method = built(description)
    output = method(batch(), step=0)
    output.loss.backward()
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    frozen = {name for name, p in method.named_parameters() if not p.requires_grad}
    expected = "encoder." if description["teacher"] else "nothing"
    assert all(name.startswith(expected) for name in frozen)
    assert output.latent.shape == (32, 32)


def test_masks_and_slices_change_with_the_step_and_come_back():
    method = built(DESCRIPTION)
    first, again, later = (method(batch(), step=step).loss for step in (0, 0, 1))
    assert first == again and first != later


def test_the_teacher_follows_the_student_with_a_momentum_that_rises_to_one():
    method = built(TEACHER)
    student = method.get_submodule("student.norm").get_parameter("weight")
    teacher = method.get_submodule("encoder.norm").get_parameter("weight")
    with torch.no_grad():
        student.add_(1.0)
    for step, expected in ((0, 1.0), (1, 1.1), (11, 1.1)):
        method(batch(), step)
        torch.testing.assert_close(teacher, torch.full((32,), expected))
    with torch.no_grad():
        student.add_(1.0)
    method.eval()(batch(), step=2)
    torch.testing.assert_close(teacher, torch.full((32,), 1.1))


@pytest.mark.parametrize(("weight", "collapses"), [(0.0, True), (10.0, False)])
def test_sigreg_alone_keeps_tokens_from_collapsing(weight, collapses):
    torch.manual_seed(0)
    encoder = ViTEncoder((1, 3, 16, 16), patch=4, dim=16, depth=1, heads=2)
    predictor = MaskedTransformer(16, encoder.grid, width=16, depth=1, heads=1)
    masks = MultiBlockMasks(encoder.grid)
    method = IJEPA(encoder, predictor, SIGReg(slices=32), masks, weight=weight, whole=0.0)
    optimizer = torch.optim.Adam(method.parameters(), 3e-3)
    for step in range(40):
        method(batch(), step).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    video = batch()["pixels"].permute(0, 3, 1, 2)[:, None] / 255
    spread = method.encoder(video)[:, 0].std(0).mean()
    assert spread < 0.25 if collapses else spread > 0.5


def _loss_and_gradients(rank, processes, folder):
    """Compute on this process's share of the batch; average gradients as data parallelism does."""
    torch.set_num_threads(1)
    if processes > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=processes)
    method = built(DESCRIPTION)
    size = 32 // processes
    mine = {key: value[rank * size : (rank + 1) * size] for key, value in batch().items()}
    loss = method(mine, step=2).loss
    loss.backward()
    gradients = [p.grad for p in method.parameters() if p.grad is not None]
    if processes > 1:
        for value in (loss.data, *gradients):
            dist.all_reduce(value)
            value /= processes
        dist.destroy_process_group()
    torch.save((loss.detach(), gradients), f"{folder}/{processes}-{rank}.pt")


def test_two_processes_have_the_loss_and_the_gradients_of_one(tmp_path):
    _loss_and_gradients(0, 1, tmp_path)
    spawn(_loss_and_gradients, (2, str(tmp_path)), nprocs=2)
    one, *two = (torch.load(tmp_path / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    for part in two:
        torch.testing.assert_close(part, one, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": {"name": "conv", "stages": 2}}, "encoder 'conv' has no `grid`"),
        ({"masks": {"context": 0.9}}, "not the description of I-JEPA: .*target"),
        ({"masks": {"context": 0.9, "target": 0.5}}, "each needs one, and together"),
        ({"teacher": {}}, "not the description of I-JEPA: .*momentum"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        build_ijepa(DESCRIPTION | change)


def test_a_masked_predictor_keeps_its_contract():
    predictor = MaskedTransformer(8, (2, 3, 3), width=16, depth=1, heads=2)
    check_masked_predictor(predictor, 8, (2, 3, 3))


@pytest.mark.parametrize("description", [DESCRIPTION, TEACHER], ids=["sigreg", "ema"])
def test_a_resumed_run_equals_the_uninterrupted_one(description, resumes_exactly):
    resumes_exactly(lambda: built(description), batch(64)["pixels"])


def test_a_teacher_is_built_where_the_description_has_one():
    assert isinstance(built(TEACHER), TeacherIJEPA) and isinstance(built(DESCRIPTION), IJEPA)


TINY = (
    *("--encoder.dim", 16, "--encoder.depth", 1, "--encoder.patch", 8),
    *("--masked-predictor.width", 16, "--masked-predictor.depth", 1),
    *("--steps", 4, "--batch-size", 16, "--log-every", 2, "--checkpoint-every", 2),
    *("--precision", "no"),
)


@pytest.fixture
def pictures(tmp_path):
    """A folder of pictures of two classes."""
    from PIL import Image

    for number, pixels in enumerate(make_shapes(60, seed=0).pixels):
        file = tmp_path / "pictures" / f"{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return tmp_path / "pictures"


@pytest.mark.parametrize("teacher", ["none", "ema"])
def test_a_run_trains_probes_and_leaves_a_model_that_loads(teacher, call, pictures, tmp_path):
    words = (*TINY, "--teacher", teacher, "--data", pictures, "--image-size", 32, "--run-dir")
    ended = call("train_ijepa", *words, tmp_path / "straight")
    assert ended.code == 0 and "linear class: " in ended.stdout, ended.stderr
    results = json.loads((tmp_path / "straight" / "results.json").read_text())
    assert (tmp_path / "straight" / "masks.png").is_file()
    assert results["probe"].keys() == {"trained", "random"} and "prediction" in results
    description = read_yaml(tmp_path / "straight" / "checkpoint" / "config.yaml")
    method = build_ijepa(description)
    load_weights(method, tmp_path / "straight" / "checkpoint" / "model.safetensors")
    assert isinstance(method, TeacherIJEPA) == (teacher == "ema")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--masks", 0.8, 0.5), "each needs one, and together at most 16"),
        (("--encoder", "conv"), "encoder 'conv' has no `grid`"),
        (("--views", 0, 1), "--views .* give a share in"),
        (("--weights", 1, -1), "--weights .* give two numbers"),
        (("--encoder.patch", 5), "does not divide into patches"),
        (("--masked-predictor.heads", 3), "does not divide into 3 heads"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(words, message, call, pictures, tmp_path):
    tiny = TINY[6:] if words[0] == "--encoder" else TINY  # without the options of `vit`
    line = (*tiny, *words, "--data", pictures, "--image-size", 32, "--run-dir", tmp_path / "run")
    assert re.search(message, call("train_ijepa", *line).complaint())
    assert not (tmp_path / "run").exists()
