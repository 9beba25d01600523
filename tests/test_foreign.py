"""Backbones of other libraries, where they are installed."""

import importlib.util
import sys

import pytest
import torch

from jepa_world.config import Part
from jepa_world.data.augmentation import Augmentation
from jepa_world.data.images import make_shapes
from jepa_world.encoders.foreign import TransformersEncoder
from jepa_world.methods.lejepa import LeJEPA
from jepa_world.probes import effective_rank
from jepa_world.registry import UserError
from jepa_world.sigreg import SIGReg
from jepa_world.testing import check_encoder

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
