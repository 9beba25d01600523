"""Compare LeWorldModels of stable-worldmodel with ours: `python benchmarks/leworldmodel.py`.

Where `stable-worldmodel` and `transformers` are installed beside this package: a model of theirs
gets random weights, is saved as the published ones are (`weights.pt` and `config.json`), read by
`load_leworldmodel`, and both encode the same pixels, predict under the same actions, roll plans out
and rate them. Printed are the largest differences, relative to the largest value. `--record FILE`
keeps a tiny model with what theirs computes, as tests/leworldmodel.safetensors has it.
"""

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from stable_worldmodel.wm.lewm import LeWM  # pyright: ignore[reportMissingImports]
from stable_worldmodel.wm.lewm.module import (  # pyright: ignore[reportMissingImports]
    MLP,
    Embedder,
    Predictor,
)
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from jepa_world.checkpoint import save_tensors
from jepa_world.encoders.pretrained import (
    fold_pixel_statistics,
    load_leworldmodel,
)
from jepa_world.encoders.vit import SIZES
from jepa_world.nn import IMAGENET_MEAN, IMAGENET_STD

PUBLISHED = {
    "encoder": {"size": "tiny", "patch_size": 14, "image_size": 224},
    "predictor": {
        **{"num_frames": 3, "input_dim": 192, "hidden_dim": 192, "output_dim": 192, "depth": 6},
        **{"heads": 16, "mlp_dim": 2048, "dim_head": 64, "dropout": 0.1, "emb_dropout": 0.0},
    },
    "action_encoder": {"input_dim": 10, "emb_dim": 192},
    "projector": {"input_dim": 192, "output_dim": 192, "hidden_dim": 2048},
    "pred_proj": {"input_dim": 192, "output_dim": 192, "hidden_dim": 2048},
}
TINY = {
    "encoder": {
        **{"size": "tiny", "patch_size": 7, "image_size": 14, "hidden_size": 16},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    },
    "predictor": {
        **{"num_frames": 3, "input_dim": 12, "hidden_dim": 12, "output_dim": 12, "depth": 2},
        **{"heads": 3, "mlp_dim": 24, "dim_head": 8, "dropout": 0.1, "emb_dropout": 0.0},
    },
    "action_encoder": {"input_dim": 4, "emb_dim": 12, "smoothed_dim": 6},
    "projector": {"input_dim": 16, "output_dim": 12, "hidden_dim": 24},
    "pred_proj": {"input_dim": 12, "output_dim": 12, "hidden_dim": 20},
}


def theirs(config: dict[str, dict[str, Any]]) -> LeWM:
    """Build a model of stable-worldmodel with random weights and statistics."""
    options = dict(config["encoder"])
    width, depth, heads, ratio = SIZES[options.pop("size")]
    facts: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
    }
    facts |= {"intermediate_size": int(width * ratio), **options}
    encoder = ViTModel(ViTConfig(**facts), add_pooling_layer=False, use_mask_token=False)
    perceptrons = [
        MLP(**config[name], norm_fn=nn.BatchNorm1d) for name in ("projector", "pred_proj")
    ]
    predictor, actions = Predictor(**config["predictor"]), Embedder(**config["action_encoder"])
    model = LeWM(encoder, predictor, actions, *perceptrons).eval()
    torch.manual_seed(0)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            nn.init.uniform_(value, 0.5, 1.5)
        elif value.is_floating_point():
            nn.init.normal_(value, std=0.15)
    return model


def inputs(config: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """Return bytes of three frames and a goal for two episodes, and three plans for each."""
    side, width = config["encoder"]["image_size"], config["action_encoder"]["input_dim"]
    torch.manual_seed(1)
    pixels = torch.randint(0, 256, (2, 4, 3, side, side), dtype=torch.uint8)
    return {
        **{"pixels": pixels[:, :3], "goal": pixels[:, 3:]},
        **{"plans": torch.randn(2, 3, 6, width)},
    }


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels / 255 - mean) / std


@torch.no_grad()
def of_theirs(model: LeWM, given: dict[str, Tensor]) -> dict[str, Tensor]:
    plans = given["plans"]
    pixels, goal = (normalised(given[name]) for name in ("pixels", "goal"))
    actions = plans[:, 0, :3]
    seen = model.encode({"pixels": pixels, "action": actions})
    futures, costs = [], []
    for episode in range(len(plans)):  # get_cost takes one at a time
        one = slice(episode, episode + 1)
        info = {
            "pixels": repeat(pixels[one, :1], "b t c y x -> b s t c y x", s=plans.shape[1]),
            "goal": repeat(goal[one], "b t c y x -> b s t c y x", s=plans.shape[1]),
            "action": plans[one, :, :1],
        }
        costs.append(model.get_cost(info, plans[one]))
        futures.append(info["predicted_emb"][:, :, 1:])
    return {
        "latent": seen["emb"],
        "following": model.predict(seen["emb"], seen["act_emb"]),
        "future": torch.cat(futures),
        "cost": torch.cat(costs),
    }


@torch.no_grad()
def of_ours(folder: Path, given: dict[str, Tensor]) -> dict[str, Tensor]:
    encoder, predictor, _ = load_leworldmodel(folder)
    fold_pixel_statistics(encoder)
    pixels, goal = (encoder(given[name] / 255) for name in ("pixels", "goal"))
    plans = given["plans"]
    start = repeat(pixels[:, :1], "b t n d -> (b s) t n d", s=plans.shape[1])
    future = predictor.rollout(start, plans.flatten(0, 1)).squeeze(2).unflatten(0, plans.shape[:2])
    return {
        "latent": pixels.squeeze(2),
        "following": predictor(pixels, plans[:, 0, :3]).squeeze(2),
        "future": future,
        "cost": (future[:, :, -1] - goal[:, :, 0]).square().sum(-1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path)
    record = parser.parse_args().record
    print(f"stable-worldmodel {version('stable-worldmodel')}, torch {torch.__version__}")
    for size, config in (("published", PUBLISHED), ("tiny", TINY)):
        model, given = theirs(config), inputs(config)
        expected = of_theirs(model, given)
        with tempfile.TemporaryDirectory() as name:
            torch.save(model.state_dict(), Path(name) / "weights.pt")
            (Path(name) / "config.json").write_text(json.dumps(config))
            found = of_ours(Path(name), given)
        for key, value in expected.items():
            gap = float((found[key] - value).abs().max() / value.abs().max())
            print(f"{size} size, {key} {tuple(value.shape)}: {gap:.1e}")
        if record is not None and size == "tiny":
            weights = {f"weights/{key}": value for key, value in model.state_dict().items()}
            save_tensors(record, {**weights, **given, **expected}, {"config": config})


if __name__ == "__main__":
    main()
