"""Backbones of other libraries, where they are installed."""

import importlib
import importlib.util
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from jepa_world.commands.train_world_model import TrainWorldModel, encode_once
from jepa_world.config import Part, parse
from jepa_world.data.augmentation import Augmentation
from jepa_world.data.images import make_shapes
from jepa_world.data.trajectories import Trajectories
from jepa_world.encoders.foreign import TransformersEncoder
from jepa_world.encoders.pretrained import load_vjepa2
from jepa_world.methods.lejepa import LeJEPA
from jepa_world.methods.vjepa2_ac import VJEPA2AC
from jepa_world.methods.world_model import load_world_model
from jepa_world.predictors.concat import ConcatPredictor
from jepa_world.probes import effective_rank
from jepa_world.registry import UserError
from jepa_world.sigreg import SIGReg
from jepa_world.testing import check_encoder
from jepa_world.training import make_accelerator

ROOT = Path(__file__).resolve().parents[1]
IMAGE = (1, 3, 32, 32)
needs_transformers = pytest.mark.skipif(
    not importlib.util.find_spec("transformers"), reason="needs transformers"
)
needs_timm = pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="needs timm")
TRANSFORMERS = {
    "ResNet": ("layer_type=basic", "embedding_size=8", "hidden_sizes=8,16", "depths=1,1"),
    "ConvNextV2": ("hidden_sizes=8,16", "depths=1,1", "num_stages=2", "patch_size=4"),
    "Swin": ("embed_dim=8", "depths=1,1", "num_heads=2,2", "window_size=4", "patch_size=4"),
}
TIMM = {"resnet10t": False, "maxvit_rmlp_pico_rw_256": True}


def trained_without_collapse(encoder):
    """Train a few steps, with one setting for all of them."""
    views = (Augmentation(scale=(0.4, 1.0)), 2), (Augmentation(), 0)
    method = LeJEPA(
        *(encoder, SIGReg(slices=64)),
        weight=0.05,
        global_views=views[0],
        local_views=views[1],
        projection=16,
        hidden=64,
    )
    optimizer = torch.optim.AdamW(method.parameters(), 1e-3, weight_decay=0.05)
    batch = {"pixels": torch.from_numpy(make_shapes(64, seed=0).pixels), "index": torch.arange(64)}
    losses: list[float] = []
    for step in range(12):
        output = method(batch, step)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    latent = method(batch, 12).latent
    return losses[-1] < losses[1] and latent.std(0).min() > 0.1 and effective_rank(latent) > 4


@needs_transformers
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("model", TRANSFORMERS)
def test_a_model_of_transformers_is_an_encoder_and_trains(model):
    torch.manual_seed(0)
    encoder = TransformersEncoder(IMAGE, model=model, options=TRANSFORMERS[model])
    check_encoder(encoder, IMAGE)
    assert trained_without_collapse(encoder)


@needs_timm
@pytest.mark.parametrize("model", TIMM)
def test_a_model_of_timm_is_an_encoder_and_trains(model):
    from jepa_world.encoders.foreign import TimmEncoder

    torch.manual_seed(0)
    encoder = TimmEncoder((1, 3, 32, 32), model=model, fits=TIMM[model])
    check_encoder(encoder, IMAGE)
    assert trained_without_collapse(encoder)


@needs_transformers
def test_a_model_that_transformers_does_not_have_is_named():
    with pytest.raises(UserError, match="no ResNotModel with a ResNotConfig"):
        Part("transformers", {"model": "ResNot"}).build("encoder", IMAGE)
    with pytest.raises(UserError, match="option 'depths' is not of the form name=value"):
        Part("transformers", {"options": ("depths",)}).build("encoder", IMAGE)


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_a_library_that_is_missing_is_named_with_its_extra(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"pip install 'jepa-world\[{library}\]'"):
        Part(library).build("encoder", IMAGE)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 64, "patch_size": 8}
VITS = {  # model -> tokens before the patches, further options
    "ViT": (1, {"image_size": 32}),
    "IJepa": (0, {"image_size": 32}),
    "Dinov2": (1, {"image_size": 48}),
    "Dinov2WithRegisters": (5, {"image_size": 48, "num_register_tokens": 4}),
    "DINOv3ViT": (3, {"image_size": 32, "num_register_tokens": 2}),
    "VJEPA2": (0, {"crop_size": 32, "frames_per_clip": 4, "pred_hidden_size": 36}),
}
VITS["VJEPA2"][1].update(pred_num_attention_heads=2, pred_num_hidden_layers=1)
every_vit = pytest.mark.parametrize("model", VITS)
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def save(tmp_path):
    """Save a model of transformers with random weights, as its hub has it."""

    def folder(model, **changes):
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = getattr(transformers, f"{model}Config")(**SMALL | VITS[model][1] | changes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = getattr(transformers, f"{model}Model")(config).eval()
            for parameter in built.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
            built.save_pretrained(tmp_path / "models")
        return tmp_path / "models", built

    return folder


def encoder_of(folder, *words):
    """Build the encoder that the command line has for a folder, with its weights."""
    line = ["--encoder", str(folder), *map(str, words)]
    config = parse(TrainWorldModel, line, program="train_world_model")
    assert config.frozen == folder
    encoder = config.encoder.build("encoder", IMAGE)
    encoder.load_weights(folder)
    return encoder.eval()


@quiet
@every_vit
@torch.no_grad()
def test_a_folder_of_transformers_is_an_encoder_of_its_patches(model, save):
    folder, built = save(model)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.1]})
    )
    encoder, frames = encoder_of(folder), torch.rand(2, 3, 32, 32)
    normalised = (frames - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor(
        [0.2, 0.3, 0.1]
    )[:, None, None]
    if model == "VJEPA2":
        expected = built(normalised[:, None].expand(-1, 2, -1, -1, -1), skip_predictor=True)
    else:
        expected = built(normalised)
    patches = expected.last_hidden_state[:, VITS[model][0] :]
    assert (encoder.num_tokens, encoder.dim) == (16, 32)
    torch.testing.assert_close(encoder(frames[:, None])[:, 0], patches, atol=1e-5, rtol=1e-5)
    mean = encoder_of(folder, "--encoder.tokens", "mean")(frames[:, None])
    torch.testing.assert_close(mean[:, 0, 0], patches.mean(1), atol=1e-5, rtol=1e-5)
    if VITS[model][0]:
        cls = encoder_of(folder, "--encoder.tokens", "cls")(frames[:, None])
        first = expected.last_hidden_state[:, 0]
        torch.testing.assert_close(cls[:, 0, 0], first, atol=1e-5, rtol=1e-5)
    else:
        with pytest.raises(UserError, match="has no CLS token: choose the tokens patches or mean"):
            encoder_of(folder, "--encoder.tokens", "cls")


@quiet
@every_vit
@pytest.mark.parametrize("tokens", ["patches", "mean"])
def test_a_vision_transformer_keeps_the_contract_at_another_size_too(model, tokens, save):
    folder, _ = save(model)
    encoder = encoder_of(folder, "--encoder.tokens", tokens, "--encoder.resize", 40)
    check_encoder(encoder, IMAGE)
    assert encoder.num_tokens == (25 if tokens == "patches" else 1)


@quiet
@torch.no_grad()
def test_vjepa2_of_transformers_sees_frames_as_our_own_does(save):
    folder, _ = save("VJEPA2")
    encoder, frames = encoder_of(folder), torch.rand(2, 1, 3, 32, 32)
    ours = load_vjepa2(folder, source="transformers")[0].for_clips(IMAGE)
    normalised = (frames - encoder.frames.mean) / encoder.frames.std
    torch.testing.assert_close(encoder(frames), ours(normalised), atol=1e-5, rtol=1e-5)


@quiet
@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        ("num_hidden_layers", 3, "has missing weights, the first is 'encoder.layer.2"),
        ("num_hidden_layers", 1, "has unexpected weights, the first is 'encoder.layer.1"),
        ("patch_size", 16, "has mismatched weights, the first is 'embeddings."),
    ],
)
def test_weights_of_another_model_are_refused(word, value, message, save):
    folder, _ = save("Dinov2")
    options = tuple(
        f"{key}={item}" for key, item in (SMALL | {"image_size": 48, word: value}).items()
    )
    encoder = TransformersEncoder(IMAGE, model="Dinov2", options=options)
    with pytest.raises(ValueError, match=message):
        encoder.load_weights(folder)
    with pytest.raises(ValueError, match="cannot be read"):
        encoder.load_weights(folder / "nowhere")


def test_a_folder_that_is_not_of_one_encoder_is_refused(tmp_path):
    def refused(text):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError) as error:
            parse(TrainWorldModel, ["--encoder", str(tmp_path)], program="train_world_model")
        return str(error.value)

    assert "describes None, expected one encoder" in refused("{}")
    assert "describes ['BertForMaskedLM'], expected" in refused(
        '{"architectures": ["BertForMaskedLM"]}'
    )
    assert "cannot be read as JSON" in refused("{")
    assert "holds list, expected keys and values" in refused("[]")


@quiet
@torch.no_grad()
def test_every_frame_is_encoded_once_and_read_as_it_was(save, tiny_data, tmp_path):
    folder, _ = save("Dinov2")
    encoder, store = encoder_of(folder), Trajectories(tiny_data)
    seen: list[int] = []
    encoder.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    method = VJEPA2AC(encoder, ConcatPredictor(32, 4, width=32, heads=2))
    accelerator = make_accelerator("no", "none", tmp_path)
    latents = encode_once(method, store, tmp_path / "features.npy", accelerator)
    assert latents is not None and latents.shape == (8 * 13, 16, 32) and sum(seen) == 8 * 13
    _, held_out = store.split(0.25)
    windows = held_out.windows(3, stride=2)
    cached = held_out.with_latents(latents).read(windows, 3, stride=2)
    plain = held_out.read(windows, 3, stride=2)
    assert "pixels" not in cached and np.array_equal(cached["action"], plain["action"])
    method.cpu()
    expected = method.encode(torch.from_numpy(plain["pixels"]))
    torch.testing.assert_close(torch.from_numpy(cached["latent"]), expected, atol=2e-3, rtol=2e-3)
    losses = []
    for batch in (cached, plain):
        del batch["state"], batch["proprio"]  # the predictor takes none
        losses.append(method.eval()({k: torch.from_numpy(v) for k, v in batch.items()}, 0).loss)
    torch.testing.assert_close(losses[0], losses[1], atol=2e-3, rtol=2e-3)
    before = len(seen)
    assert encode_once(method, store, tmp_path / "features.npy", accelerator) is not None
    assert len(seen) == before  # what is there is not made again


@quiet
@needs_transformers
def test_dino_wm_is_one_configuration(save, call, tiny_data, tiny_words, tmp_path):
    folder, _ = save("Dinov2")
    run = tmp_path / "run"
    shared = [word for word in zip(tiny_words[::2], tiny_words[1::2], strict=True)]
    shared = [w for pair in shared if not pair[0].startswith(("--encoder", "--pred")) for w in pair]
    words = ("--config", ROOT / "configs/dino_wm.yaml", "--encoder", folder, "--encoder.resize", 24)
    small = ("--predictor.width", 32, "--predictor.depth", 1, "--predictor.heads", 2)
    words = (*words, *small, "--predict.stride", 2, *shared, "--data", tiny_data)
    ended = call("train_world_model", *words, "--run-dir", run)
    assert ended.code == 0, ended.stderr
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert "teacher_forcing" in line and "rollout" not in line and line["open_loop_error"] > 0
    assert not list(run.glob("features*"))
    for file in folder.iterdir():
        file.unlink()  # the checkpoint needs it no more
    model, description = load_world_model(run)
    assert (model.encoder.num_tokens, description["stride"]) == (9, 2)
    assert description["predictor"]["history"] == 3
    budget = ("--episodes", 2, "--budget", 4, "--planner.samples", 35, "--planner.iterations", 2)
    words = ("--config", ROOT / "configs/dino_wm_cem.yaml", "--checkpoint", run, *budget)
    ended = call("evaluate", *words, "--run-dir", tmp_path / "evaluated")
    assert ended.code == 0, ended.stderr


@needs_timm
@torch.no_grad()
def test_weights_of_a_file_of_timm_are_loaded_strictly(tmp_path):
    from jepa_world.encoders.foreign import TimmEncoder

    timm = importlib.import_module("timm")

    torch.manual_seed(0)
    name = "vit_tiny_patch16_224"
    built = timm.create_model(name, pretrained=False, img_size=32).eval()
    torch.save(built.state_dict(), tmp_path / "weights.pth")
    encoder = TimmEncoder(IMAGE, model=name, fits=True).eval()
    encoder.load_weights(tmp_path / "weights.pth")
    frames = torch.rand(2, 1, 3, 32, 32)
    expected = built.forward_features((frames[:, 0] - encoder.frames.mean) / encoder.frames.std)
    torch.testing.assert_close(encoder(frames)[:, 0], expected[:, 1:], atol=1e-5, rtol=1e-5)
    cls = TimmEncoder(IMAGE, model=name, fits=True, tokens="cls")
    assert (cls.num_tokens, cls.dim) == (1, 192)
    with pytest.raises(ValueError, match="does not fit the model"):
        TimmEncoder(IMAGE, model="resnet10t").load_weights(tmp_path / "weights.pth")
