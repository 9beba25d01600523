"""Weights of others: equal outputs with random weights, in the layouts of Meta and transformers."""

import json
import warnings

import pytest
import torch

from jepa_world.encoders.pretrained import (
    fold_pixel_statistics,
    load_ijepa,
    save_for_transformers,
    to_transformers,
)
from jepa_world.encoders.vit import ViTEncoder

SIZES = [  # image, patch, dim, depth, heads, hidden
    ((32, 32), 8, 64, 2, 4, 256),
    ((32, 48), 8, 48, 3, 3, 96),
    ((56, 28), 14, 96, 2, 2, 419),
]
IDS = ["square", "wide", "tall"]


def theirs(size, **changes):
    """Return a transformers model with random weights, positions included."""
    transformers = pytest.importorskip("transformers")
    image, patch, dim, depth, heads, hidden = size
    torch.manual_seed(0)
    config = transformers.IJepaConfig(
        hidden_size=dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=hidden,
        image_size=list(image),
        patch_size=patch,
        **{"layer_norm_eps": 1e-6} | changes,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.IJepaModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def outputs(model, encoder, image):
    """Return the tokens of both for the same pictures."""
    video = torch.rand(2, 1, 3, *image)
    return model(video[:, 0]).last_hidden_state, encoder(video)[:, 0]


@pytest.mark.parametrize("size", SIZES, ids=IDS)
def test_it_computes_what_transformers_computes(size):
    model = theirs(size)
    weights = model.state_dict()
    encoder = load_ijepa(weights, source="transformers", image_size=size[0], heads=size[4])
    expected, found = outputs(model, encoder, size[0])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES, ids=IDS)
def test_a_folder_of_transformers_tells_everything_itself(size, tmp_path):
    model = theirs(size, layer_norm_eps=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    expected, found = outputs(model, load_ijepa(tmp_path, source="transformers"), size[0])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES, ids=IDS)
def test_what_is_exported_is_read_by_transformers_and_by_us(size, tmp_path):
    transformers = pytest.importorskip("transformers")
    image, patch, dim, depth, heads, _ = size
    encoder = ViTEncoder((1, 3, *image), patch=patch, dim=dim, depth=depth, heads=heads).eval()
    save_for_transformers(encoder, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.IJepaModel.from_pretrained(tmp_path).eval()
    expected, found = outputs(model, encoder, image)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    again = load_ijepa(tmp_path, source="transformers")
    for name, value in encoder.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=0, rtol=0)


def metas(encoder, prefix=""):
    """Return an encoder's weights as Meta's files name them."""
    names = {"embed.": "patch_embed.proj.", ".attention.": ".attn.", ".attn.out.": ".attn.proj."}
    names |= {".mlp.0.": ".mlp.fc1.", ".mlp.3.": ".mlp.fc2."}
    weights = {"pos_embed": encoder.positions[None]}
    for name, value in encoder.state_dict().items():
        if name == "embed.weight":
            shape = (-1, encoder.patch, encoder.patch, 3)
            value = value.reshape(shape).permute(0, 3, 1, 2)
        for ours, other in names.items():
            name = name.replace(ours, other)
        weights[name] = value
    return {prefix + name: value.clone() for name, value in weights.items()}


def make(seed):
    torch.manual_seed(seed)
    return ViTEncoder((1, 3, 32, 32), dim=64, depth=2, heads=2).eval()


def test_the_teacher_of_a_file_of_metas_is_preferred(tmp_path):
    student, teacher = make(0), make(1)
    content = {"encoder": metas(student, "module."), "target_encoder": metas(teacher, "module.")}
    torch.save(content | {"predictor": {}, "epoch": 300, "opt": {}}, tmp_path / "a.pth.tar")
    video = torch.rand(2, 1, 3, 32, 32)
    for given, expected in (
        (tmp_path / "a.pth.tar", teacher),
        ({"encoder": content["encoder"]}, student),
        (metas(student), student),
    ):
        loaded = load_ijepa(given, heads=2)
        torch.testing.assert_close(loaded(video), expected(video))
        assert loaded.state_dict().keys() == expected.state_dict().keys()


def test_learned_positions_are_kept_with_the_encoder():
    weights = metas(make(0))
    weights["pos_embed"] = torch.randn(1, 16, 64)
    encoder = load_ijepa(weights, heads=2)
    assert torch.equal(encoder.state_dict()["positions"], weights["pos_embed"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.attn.qkv.bias"), r"lack 'blocks\.1\.attention\.qkv\.bias'"),
        (lambda w: w.update(head=torch.zeros(1)), "hold unknown 'head'"),
        (lambda w: w.update({"norm.bias": torch.zeros(3)}), r"'norm\.bias' of shape \(3,\)"),
        (lambda w: w.pop("pos_embed"), "not the weights of an I-JEPA encoder: 'positions'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    weights = metas(make(0))
    change(weights)
    with pytest.raises(ValueError, match=message):
        load_ijepa(weights, heads=2)


def test_facts_that_no_weight_tells_are_asked_for(tmp_path):
    weights = metas(make(0))
    with pytest.raises(ValueError, match=r"width 64 is none of the published .* give heads="):
        load_ijepa(weights)
    weights["pos_embed"] = torch.randn(1, 24, 64)
    with pytest.raises(ValueError, match=r"24 positions .* give image_size=\(height, width\)"):
        load_ijepa(weights, heads=2)
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        load_ijepa(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"u", b".", b"\x80\x02.", b"\x80\x02K\x00R.", b"no pickle"]
)
def test_bytes_that_are_no_pickle_are_refused_in_one_line(content, tmp_path):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read as weights alone: .+$"):
        load_ijepa(tmp_path / "w.pth")


def test_an_encoder_of_clips_is_not_exported():
    with pytest.raises(ValueError, match=r"grid \(2, 2, 2\): IJepaModel takes one frame"):
        to_transformers(ViTEncoder((4, 3, 16, 16), tubelet=2, dim=64, depth=1, heads=2))


@pytest.mark.parametrize("other", [{"stem": 4}, {"positions": "rotary"}])
def test_an_encoder_of_another_kind_is_not_exported(other):
    encoder = ViTEncoder((1, 3, 16, 16), dim=64, depth=1, heads=2, **other)
    with pytest.raises(ValueError, match="stem or rotary positions, which IJepaModel lacks"):
        to_transformers(encoder)


def test_pixel_statistics_do_not_go_into_a_stem():
    with pytest.raises(ValueError, match="the encoder has a stem"):
        fold_pixel_statistics(ViTEncoder((1, 3, 16, 16), dim=64, depth=1, heads=2, stem=4))


def test_the_exported_configuration_is_json():
    assert json.loads(json.dumps(to_transformers(make(0))[1]))["image_size"] == [32, 32]
