import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ON_CPU

from jepa_world.checkpoint import load_weights
from jepa_world.config import read_yaml
from jepa_world.data.augmentation import Augmentation
from jepa_world.data.images import make_shapes
from jepa_world.encoders.conv import ConvEncoder
from jepa_world.encoders.resnet import ResNetEncoder
from jepa_world.encoders.vit import ViTEncoder
from jepa_world.methods.lejepa import LeJEPA, build_lejepa
from jepa_world.probes import image_features
from jepa_world.sigreg import SIGReg
from jepa_world.testing import check_encoder

ROOT = Path(__file__).resolve().parents[1]
SMALL = (
    *("--encoder.width", "16", "--encoder.stages", "3", "--views", "2", "1"),
    *("--steps", "4", "--batch-size", "16", "--log-every", "2", "--checkpoint-every", "2"),
    *("--precision", "no", "--projection", "8"),
)


def method(encoder=None, *, weight=0.05, views=(2, 2)):
    torch.manual_seed(0)
    return LeJEPA(
        encoder or ConvEncoder((1, 3, 32, 32), dim=16, width=4, stages=3),
        SIGReg(slices=64),
        weight=weight,
        global_views=(Augmentation(scale=(0.3, 1.0)), views[0]),
        local_views=(Augmentation(scale=(0.1, 0.3)), views[1]),
        projection=8,
        hidden=64,
    )


def batch(count=64):
    return {
        "pixels": torch.from_numpy(make_shapes(count, seed=0).pixels),
        "index": torch.arange(count),
    }


@pytest.fixture
def data(tmp_path):
    """A folder of twenty pictures of two classes."""
    from PIL import Image

    images = make_shapes(60, seed=0)
    for i, pixels in enumerate(images.pixels):
        file = tmp_path / "pictures" / f"{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return tmp_path / "pictures"


def test_the_loss_is_agreement_with_the_mean_of_the_global_views_and_sigreg_of_each():
    model = method(weight=0.25).eval()
    output = model(batch(), step=3)
    views = model.views(batch()["pixels"], batch()["index"], 3)
    z = torch.stack([model.projector(model.encode(view)) for view in views])
    agreement = torch.stack([(z[:2].mean(0) - own).square().mean() for own in z]).mean()
    gaussian = torch.stack([model.sigreg(own, 3) for own in z]).mean()
    torch.testing.assert_close(output.terms["invariance"], agreement)
    torch.testing.assert_close(output.terms["sigreg"], gaussian)
    torch.testing.assert_close(output.loss, 0.75 * agreement + 0.25 * gaussian)


def test_identical_views_agree_whatever_the_encoder():
    model = method()
    same = Augmentation(scale=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.0)
    model.global_views, model.local_views = (same, 2), (same, 1)
    assert model(batch(), step=0).terms["invariance"] < 1e-10


def test_views_are_new_at_every_step_and_the_same_again_at_the_same():
    model, (pixels, index) = method(), batch(4).values()
    first = model.views(pixels, index, 0)
    assert first.shape == (4, 4, 3, 32, 32)
    torch.testing.assert_close(model.views(pixels, index, 0), first, rtol=0, atol=0)
    assert (model.views(pixels, index, 1) - first).abs().mean() > 0.01
    torch.testing.assert_close(model.views(pixels[2:], index[2:], 0), first[:, 2:])


@pytest.mark.parametrize("weight", [0.0, 0.2])
def test_sigreg_alone_keeps_the_projections_from_collapsing(weight):
    model = method(weight=weight, views=(2, 0))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(40):
        model(batch(), step).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    spread = model(batch(), 40).latent.std(0).mean()
    assert spread > 0.5 if weight else spread < 0.2


@pytest.mark.parametrize(
    "encoder",
    [
        ConvEncoder((1, 3, 32, 32), dim=16, width=4, stages=3),
        ResNetEncoder((1, 3, 32, 32), width=16, stages=2),
        ViTEncoder((1, 3, 32, 32), dim=32, depth=1, heads=2),
    ],
    ids=["conv", "resnet", "vit"],
)
def test_any_encoder_of_images_gets_gradients_everywhere(encoder):
    model = method(encoder)
    model(batch(16), step=0).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_features_of_resnet_are_read_in_parts():
    encoder = ResNetEncoder((1, 3, 33, 48), width=16, stages=3).eval()
    assert encoder.grid == (1, 5, 6)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 33, 48, 3), np.uint8)
    whole, parts = (image_features(encoder, pixels, cells=cells) for cells in (1, 2))
    with torch.no_grad():
        tokens = encoder(torch.from_numpy(pixels).permute(0, 3, 1, 2)[:, None] / 255)[:, 0]
    torch.testing.assert_close(whole, tokens.mean(1))
    upper_left = tokens.unflatten(1, (5, 6))[:, :3, :3].mean((1, 2))
    torch.testing.assert_close(parts.unflatten(1, (-1, 4))[..., 0], upper_left)


@pytest.mark.parametrize("options", [{}, {"width": 16, "stages": 2, "blocks": 2}])
def test_resnet_keeps_its_contract(options):
    check_encoder(ResNetEncoder((1, 3, 32, 32), **options), (1, 3, 32, 32))


def test_a_run_trains_probes_and_leaves_a_model_that_loads(call, data, tmp_path):
    words = ("--data", data, "--image-size", 32, "--run-dir", tmp_path / "run")
    ended = call("train_lejepa", *SMALL, *words)
    assert ended.code == 0, ended.stderr
    assert "linear class" in ended.stdout and "random encoder" in ended.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["probe"]["trained"].keys() == {"linear class"} and results["step"] == 4
    description = read_yaml(tmp_path / "run" / "checkpoint" / "config.yaml")
    model = build_lejepa(description)
    load_weights(model, tmp_path / "run" / "checkpoint" / "model.safetensors")
    z = image_features(model.eval().encoder, make_shapes(10, seed=0).pixels, batch_size=3)
    assert z.shape == (10, 64) and z.isfinite().all()


def test_a_resumed_run_equals_the_uninterrupted_one(resumes_exactly):
    resumes_exactly(method, batch()["pixels"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--views", 0, 2), "give one global view or more"),
        (("--crops", 0.5, 0.3, 1.0), "three rising shares"),
        (("--sigreg-weight", 2), "give at most 1"),
        (("--data", "nowhere"), "no images at"),
        (("--encoder", "vit", "--encoder.patch", 5), "does not divide into patches"),
        (("--encoder.stages", 6), "too small for 6 halvings"),
        (("--batch-size", 10_000), "more than the 5700 samples"),
    ],
)
def test_a_wrong_choice_is_one_line_and_leaves_nothing(words, message, call, tmp_path):
    ended = call("train_lejepa", "--precision", "no", *words, "--run-dir", tmp_path / "run")
    assert message in ended.complaint()
    assert not (tmp_path / "run").exists()


def test_two_processes_train_as_one(call, data, tmp_path):
    """The samples, the views, the batch norms and SIGReg are those of the whole batch."""
    words = [
        *SMALL,
        "--log-every",
        1,
        "--lr",
        1e-4,
        "--data",
        data,
        "--image-size",
        32,
        "--run-dir",
    ]
    assert call("train_lejepa", *words, tmp_path / "one").code == 0
    environment = os.environ | ON_CPU | {"OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    line = [*launch, *map(str, (ROOT / "train_lejepa.py", *words, tmp_path / "two"))]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("one", "two")]
    for one, two in zip(*(map(json.loads, text.splitlines()) for text in texts), strict=True):
        found = [[line[key] for key in ("loss", "gradient_norm")] for line in (one, two)]
        np.testing.assert_allclose(*found, rtol=1e-3)
