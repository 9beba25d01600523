"""What encoding once saves: `python benchmarks/frozen_features.py`.

A training step of DINO-WM's recipe (configs/dino_wm.yaml) on one thread, the frames of the batch
encoded in it, against the same step on latents that were encoded before and are read from a file,
as `train_world_model.py --frozen` does. The encoder is DINOv2-small with random weights.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from jepa_world.commands.train_world_model import TrainWorldModel
from jepa_world.config import parse
from jepa_world.methods.vjepa2_ac import VJEPA2AC

ROOT = Path(__file__).resolve().parents[1]


def cpu_seconds(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return statistics.median(times)


def measure(words: list[str], batch: int, repeats: int) -> None:
    """Print what a step costs with the encoder of these flags in it, and without."""
    line = ["--config", str(ROOT / "configs/dino_wm.yaml"), *words]
    config = parse(TrainWorldModel, line, program="frozen_features")
    encoder = config.encoder.build("encoder", (1, 3, 64, 64))
    predictor = config.predictor.build("predictor", encoder.dim, 10)
    method = VJEPA2AC(encoder, predictor, rollout=1, distance="l2").train()
    pixels = torch.randint(0, 256, (1000, 64, 64, 3), dtype=torch.uint8)
    rows = torch.randint(0, 1000, (batch, config.frames))
    action = torch.rand(batch, config.frames, 10)
    with tempfile.TemporaryDirectory() as folder:
        shape = (1000, encoder.num_tokens, encoder.dim)
        latents = np.lib.format.open_memmap(Path(folder) / "f.npy", "w+", np.float16, shape)

        def read() -> torch.Tensor:
            return torch.from_numpy(latents[rows.numpy()].astype(np.float32))

        def every_time() -> None:
            method({"pixels": pixels[rows], "action": action}, 0).loss.backward()

        def once() -> None:
            method({"latent": read(), "action": action}, 0).loss.backward()

        reading = cpu_seconds(read, 20)
        slow, fast = (cpu_seconds(step, repeats) for step in (every_time, once))
    frame = (slow - fast) / rows.numel()
    print(
        f"{config.predictor.name} on {encoder.num_tokens} tokens, {batch} x {config.frames} frames"
    )
    print(
        f"  a step that encodes: {slow:.2f} CPU-s; on latents: {fast:.3f}; {slow / fast:.1f} times"
    )
    print(f"  encoding a frame: {1000 * frame:.0f} CPU-ms; reading a batch: {1000 * reading:.1f}")
    print(f"  a frame on the disk: {2 * encoder.num_tokens * encoder.dim / 1000:.1f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resize", default="98", help="side of the encoder's frames")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    size = ["--encoder.resize", given.resize]
    for words in (size, [*size, "--encoder.tokens", "mean", "--predictor", "mlp"]):
        measure(words, given.batch_size, given.repeats)


if __name__ == "__main__":
    main()
