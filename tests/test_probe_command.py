import json

import numpy as np
import pytest
import torch

from jepa_world.checkpoint import save_tensors, write_yaml
from jepa_world.data.images import make_shapes
from jepa_world.encoders.vit import ViTEncoder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of 120 pictures of two textures."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    images = make_shapes(400, seed=0)
    for texture in (0, 2):
        (folder / str(texture)).mkdir()
        for i in np.flatnonzero(images.classes["texture"] == texture)[:60]:
            Image.fromarray(images.pixels[i]).save(folder / str(texture) / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A vision transformer of pictures of 16 pixels, as any method leaves it."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint"
    torch.manual_seed(0)
    encoder = ViTEncoder((1, 3, 16, 16), patch=4, dim=16, depth=1, heads=2)
    tensors = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    tensors["projector.weight"] = torch.zeros(3)
    save_tensors(folder / "model.safetensors", tensors, {})
    part = {"name": "vit", "patch": 4, "dim": 16, "depth": 1, "heads": 2}
    write_yaml(folder / "config.yaml", {"encoder": part, "observation_shape": [1, 3, 16, 16]})
    return folder.parent


def test_a_checkpoint_is_judged_beside_what_costs_nothing(call, data, checkpoint, tmp_path):
    words = (
        "--data",
        data,
        "--image-size",
        16,
        "--draws",
        2,
        "--supervised-steps",
        2,
        "--precision",
        "no",
    )
    run = tmp_path / "run"
    ended = call("evaluate", "--probe", *words, "--checkpoint", checkpoint, "--run-dir", run)
    assert ended.code == 0, ended.stderr
    results = json.loads((run / "results.json").read_text())
    names = ["raw pixels", "PCA 64", "random encoder", "supervised", str(checkpoint)]
    assert list(results["features"]) == names
    for row in results["features"].values():
        assert {"linear", "knn", "white knn", "1-shot", "10-shot"} == row["class"].keys()
        assert row["class"]["linear"]["n"] == results["judged_on"] == 24
        assert 1 <= row["effective_rank"] <= row["dim"]
    assert results["features"]["raw pixels"]["dim"] == 3 * 16 * 16
    assert {"neighbours.png", "tokens.png"} <= {path.name for path in run.iterdir()}
    assert all(name in ended.stdout for name in names)


def test_the_test_part_is_left_alone_while_tuning(call, data, tmp_path):
    words = ("--data", data, "--image-size", 16, "--draws", 1, "--validation")
    assert call("probe", *words, "--run-dir", tmp_path / "run").code == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["fitted_on"], results["judged_on"]) == (92, 4)  # of 96; 24 are the test part


def test_an_encoder_of_other_images_is_refused(call, data, checkpoint, tmp_path):
    words = ("--data", data, "--image-size", 24, "--checkpoint", checkpoint)
    ended = call("probe", *words, "--run-dir", tmp_path / "run")
    assert "takes (1, 3, 16, 16) (frames" in ended.complaint()
    assert "the data has (1, 3, 24, 24)" in ended.stderr and not (tmp_path / "run").exists()


def test_images_without_labels_are_refused(call, data, tmp_path):
    ended = call("probe", "--data", data / "0", "--run-dir", tmp_path / "run")
    assert "has no labels" in ended.complaint()
