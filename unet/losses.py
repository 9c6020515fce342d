"""Losses on logits, in float32, as a mean over samples of a value per sample.

Each value looks at its own sample's valid pixels only (mask != 255) and is 0 where there is none.
A mean over samples is linear in the samples, so splitting a batch over ranks or accumulation steps
of equal size changes nothing.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = 255
"""Mask value of pixels that count nowhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """How much of each loss is summed up."""

    cross_entropy: float = 1.0
    """Weight of the pixel-wise cross-entropy."""
    dice: float = 1.0
    """Weight of the soft Dice loss over the classes that count (all but `background`)."""

    def __post_init__(self) -> None:
        if self.cross_entropy < 0 or self.dice < 0 or self.cross_entropy + self.dice == 0:
            raise ValueError("loss weights must be 0 or more, and one of them above 0")


class SegmentationLoss(nn.Module):
    """The weighted sum of the losses whose weight is not 0."""

    def __init__(self, config: LossConfig, counted: tuple[int, ...]) -> None:
        """`counted`: indices of the classes that the Dice loss looks at."""
        super().__init__()
        self.names = tuple(n for n in ("cross_entropy", "dice") if getattr(config, n) > 0)
        self.weights = tuple(getattr(config, n) for n in self.names)
        self.counted = counted

    def forward(self, logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K, H, W] and mask uint8 [B, H, W] -> the loss, and its parts [len(names)].

        The parts are unweighted and detached: for the log.
        """
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            values = {
                "cross_entropy": lambda: cross_entropy(logits, mask),
                "dice": lambda: dice_loss(logits, mask, self.counted),
            }
            parts = torch.stack([values[name]().mean() for name in self.names])
            return (parts * parts.new_tensor(self.weights)).sum(), parts.detach()


def cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean of -log p(class) over each sample's valid pixels: [B, K, H, W], [B, H, W] -> [B]."""
    per_pixel = F.cross_entropy(logits, mask.long(), ignore_index=IGNORE, reduction="none")
    num_valid = (mask != IGNORE).sum(dim=(1, 2)).clamp(min=1)
    return per_pixel.sum(dim=(1, 2)) / num_valid


def dice_loss(logits: Tensor, mask: Tensor, counted: tuple[int, ...]) -> Tensor:
    """1 - soft Dice, a mean over the counted classes: [B, K, H, W], [B, H, W] -> [B].

    Soft Dice of a class is (2 sum(p g) + 1) / (sum(p) + sum(g) + 1), the sums over one sample's
    valid pixels. The 1 (a pixel) keeps the gradient alive where a class is absent; its price is
    that missing an object of a few pixels costs less than it should, which cross-entropy makes up.
    """
    valid = mask != IGNORE
    probability = logits.softmax(dim=1)
    losses = []
    for index in counted:
        p = probability[:, index] * valid
        g = mask == index
        overlap = (p * g).sum(dim=(1, 2))
        total = p.sum(dim=(1, 2)) + g.sum(dim=(1, 2))
        losses.append(1 - (2 * overlap + 1) / (total + 1))
    return torch.stack(losses).mean(dim=0) * valid.flatten(1).any(dim=1)
