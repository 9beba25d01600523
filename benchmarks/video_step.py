"""Time and memory of a step of V-JEPA: SIGReg against the EMA teacher, and growth with the clip.

    python benchmarks/video_step.py

Measured as in masked_step.py. The published form has the teacher see the whole clip, and a
predictor in which all tokens attend to each other; ours encodes the hidden tokens alone, and every
target asks the context alone (`cross`). Both predict every hidden token, of the same masks.
"""

import torch
from masked_step import Recipe, compare

from jepa_world.predictors.masked import CrossMaskedTransformer

TINY = {"patch": 8, "tubelet": 2, "dim": 96, "depth": 4, "heads": 3, "positions": "rotary"}
SMALL = {"patch": 16, "tubelet": 2, "dim": 384, "depth": 12, "heads": 6, "positions": "rotary"}


def tiny(frames: int, image: int, batch: int, kind: str) -> Recipe:
    """Return the recipe of `train_vjepa.py` on clips of this shape."""
    tokens = frames // 2 * (image // 8) ** 2
    name = f"tiny recipe: {frames} frames of {image} px, {tokens} tokens, batch {batch}, {kind}"
    predictor = {"width": 64, "depth": 2, "heads": 2}
    cross = CrossMaskedTransformer
    return Recipe(name, image, batch, TINY, predictor, 64, 12, frames, kind, cross)  # type: ignore[arg-type]


def main() -> None:
    torch.set_num_threads(1)
    for kind in ("short", "long"):
        compare(tiny(16, 48, 32, kind))
        name = f"ViT-S/16, 16 frames of 112 px, batch 2, predictor 12 x 384, {kind}"
        predictor = {"width": 384, "depth": 12, "heads": 12}
        sizes = (SMALL, predictor, 256, 4, 16, kind, CrossMaskedTransformer)
        compare(Recipe(name, 112, 2, *sizes))  # type: ignore[arg-type]
    grown = [compare(tiny(frames, 48, 16, "short")) for frames in (8, 16, 32, 64)]
    print("\ntwice the frames: " + ratios(grown))
    grown = [compare(tiny(16, image, 8, "short")) for image in (48, 96, 192)]
    print("\nfour times the pixels: " + ratios(grown))


def ratios(grown: list[dict[str, float]]) -> str:
    """Return how much longer each step takes than the one before."""
    pairs = list(zip(grown[1:], grown[:-1], strict=True))
    return "; ".join(
        f"{form} " + ", ".join(f"{more[form] / less[form]:.2f}" for more, less in pairs)
        for form in grown[0]
    )


if __name__ == "__main__":
    main()
