"""Supervised training of an encoder: what its labels would have given it, as a yardstick.

loss = cross-entropy(linear(encode(crop)), label)
"""

import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

from jepa_world.data.augmentation import Augmentation, random_numbers
from jepa_world.interfaces import Encoder
from jepa_world.methods.ijepa import clips_from_bytes
from jepa_world.methods.world_model import Output


class Supervised(nn.Module):
    """Encoder and linear classifier with their common loss.

    Args:
        encoder: Part built for images or clips; its tokens are averaged.
        classes: Number of labels.
        augmentation: Makes the one view of an image that is seen.
        seed: Of the views.

    Example:
        >>> import torch
        >>> from jepa_world.encoders.conv import ConvEncoder
        >>> method = Supervised(ConvEncoder((1, 3, 32, 32)), 10, Augmentation(scale=(0.5, 1.0)))
        >>> pixels = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
        >>> batch = {"pixels": pixels, "index": torch.arange(8), "class": torch.arange(8)}
        >>> sorted(method(batch, step=0).terms)
        ['accuracy']
    """

    def __init__(
        self, encoder: nn.Module, classes: int, augmentation: Augmentation, *, seed: int = 0
    ) -> None:
        super().__init__()
        self.encoder: Encoder = encoder  # type: ignore[assignment]
        self.classifier = nn.Linear(self.encoder.dim, classes)
        self.augmentation, self.seed = augmentation, seed

    def forward(self, batch: dict[str, Tensor], step: int) -> Output:
        """Return the loss of a batch: `pixels` as `IJEPA` has them, `index (b)`, `class (b)`."""
        (numbers,) = random_numbers(batch["index"], views=1, seed=self.seed, step=step)
        clips = self.augmentation(clips_from_bytes(batch["pixels"]), numbers)
        z = reduce(self.encoder(clips), "b t n d -> b d", "mean")
        scores = self.classifier(z).float()
        right = (scores.argmax(1) == batch["class"]).float().mean()
        loss = F.cross_entropy(scores, batch["class"])
        return Output(loss, {"accuracy": right.detach()}, z.detach().float())
