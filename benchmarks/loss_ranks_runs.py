"""Check that LeJEPA's training loss ranks runs without labels (arXiv 2511.08544, section 6.1).

    python benchmarks/loss_ranks_runs.py --data FOLDER --run-dir runs/ranks   # idx files

Runs of all weights x learning rates x widths, equal steps; each is scored by its loss over the last
tenth of them and by a linear probe on held-out images of the training part. Printed: Spearman's
correlation of the two, for the loss itself and for loss / weight^a; the paper has a = .4.
"""

import argparse
import json
from itertools import product
from pathlib import Path

import numpy as np
import torch

from jepa_world.checkpoint import load_weights
from jepa_world.commands.train_lejepa import TrainLejepa, run
from jepa_world.config import Part, read_yaml
from jepa_world.data.images import hold_out, load_images
from jepa_world.methods.lejepa import build_lejepa
from jepa_world.probes import image_features, knn_probe, linear_probe, spearman

WEIGHTS, RATES, WIDTHS = (0.005, 0.02, 0.08, 0.3), (5e-4, 2e-3), (16, 24)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    whole, _ = load_images(options.data)
    training, held_out = hold_out(whole)
    fit = training.take(np.arange(15_000))
    fit_y, y = (torch.from_numpy(images.classes["class"]) for images in (fit, held_out))
    rows: list[tuple[float, float, float]] = []
    print("weight     lr  width    loss  linear  k-NN")
    for weight, rate, width in product(WEIGHTS, RATES, WIDTHS):
        folder = options.run_dir / f"weight{weight}-lr{rate}-width{width}"
        flags = TrainLejepa(
            data=options.data,
            encoder=Part("resnet", {"width": width}),
            crops=(0.4, 0.7, 1.0),
            colour=1.5,
            sigreg_weight=weight,
            steps=options.steps,
            lr=rate,
            log_every=5,
            checkpoint_every=options.steps,
            run_dir=folder,
        )
        if not (folder / "results.json").is_file():
            run(flags)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        loss = float(np.mean([json.loads(line)["loss"] for line in lines[-len(lines) // 10 :]]))
        method = build_lejepa(read_yaml(folder / "checkpoint" / "config.yaml")).eval()
        load_weights(method, folder / "checkpoint" / "model.safetensors")
        fit_z, z = (image_features(method.encoder, images.pixels) for images in (fit, held_out))
        linear, knn = (
            float((predicted == y).float().mean())
            for predicted in (linear_probe(fit_z, fit_y, z), knn_probe(fit_z, fit_y, z))
        )
        rows.append((weight, loss, linear))
        print(f"{weight:6} {rate:6} {width:6} {loss:7.4f} {linear:7.3f} {knn:5.3f}", flush=True)
    weights, losses, accuracies = (list(column) for column in zip(*rows, strict=True))
    for power in (0.0, 0.2, 0.4, 0.6, 1.0):
        scores = [-loss / w**power for loss, w in zip(losses, weights, strict=True)]
        print(
            f"{len(rows)} runs, loss / weight^{power}: Spearman {spearman(scores, accuracies):.2f}"
        )


if __name__ == "__main__":
    main()
