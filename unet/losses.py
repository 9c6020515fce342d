"""Losses on logits, in float32: the mean over samples of one value per sample.

Each value depends only on the valid pixels of its sample (mask != 255) and is 0 if there are none.
The mean over samples is linear, so splitting a batch over ranks or accumulation steps of equal size
does not change the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet.blocks import centre_crop

IGNORE = 255
"""Mask value of pixels that are ignored everywhere."""

LOSSES = ("cross_entropy", "bce", "focal", "dice", "tversky")
"""Names of all losses. The first three are means over pixels, the others compare regions."""


USED_BY = {
    "focal_gamma": ("focal",),
    "tversky_fp": ("tversky",),
    "tversky_fn": ("tversky",),
    "label_smoothing": ("cross_entropy", "bce"),
    "class_weights": ("cross_entropy", "bce", "focal"),
    "border_weight": ("cross_entropy", "bce", "focal"),
}
"""Settings that have an effect on some losses only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Losses: their weights and settings.

    Counted classes are all except `background`.
    """

    cross_entropy: float = 1.0
    """Weight of the pixel-wise cross-entropy."""
    dice: float = 1.0
    """Weight of the soft Dice loss over the counted classes."""
    bce: float = 0.0
    """Weight of the binary cross-entropy of each class against all others."""
    focal: float = 0.0
    """Weight of the focal loss."""
    tversky: float = 0.0
    """Weight of the Tversky loss over the counted classes."""
    focal_gamma: float = 2.0
    """How strongly the focal loss down-weights easy pixels; 0: not at all."""
    tversky_fp: float = 0.3
    """Cost of a false positive in the Tversky loss (alpha)."""
    tversky_fn: float = 0.7
    """Cost of a false negative in the Tversky loss (beta)."""
    label_smoothing: float = 0.0
    """Share of the label that cross_entropy and bce spread evenly over all classes."""
    class_weights: Literal["none", "inverse", "inverse_sqrt"] = "none"
    """inverse: in the losses over pixels, weight each pixel by the inverse frequency of its class
    in the training split, with a mean weight of 1. inverse_sqrt: by the square root of that, which
    costs the common classes less."""
    border_weight: float = 0.0
    """Extra weight of pixels between two close cells in the losses over pixels (w0; 10 in the U-Net
    paper). Requires shards packed with --border-sigma. 0: off."""

    def __post_init__(self) -> None:
        numbers = ("focal_gamma", "tversky_fp", "tversky_fn", "border_weight")
        for name in (*LOSSES, *numbers):
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"loss.{name} must be a finite number >= 0, got {value}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing must be in [0, 1), got {self.label_smoothing}")
        summed = [name for name in LOSSES if getattr(self, name)]
        if not summed:
            names = ", ".join(f"loss.{name}" for name in LOSSES)
            raise ValueError(f"every loss has weight 0; raise at least one of {names}")
        for field in fields(self):
            losses = USED_BY.get(field.name, LOSSES)
            if getattr(self, field.name) != field.default and not {*losses} & {*summed}:
                names = " or ".join(f"loss.{name}" for name in losses)
                raise ValueError(f"loss.{field.name} has no effect without {names} above 0")


class SegmentationLoss(nn.Module):
    """Weighted sum of the losses with a weight > 0.

    Args:
        config: weights and settings.
        counted: indices of the classes that the losses over regions include.
        class_weights: weight of a pixel of each class in the losses over pixels; None: 1.
    """

    weights: Tensor
    counted: Tensor
    class_weights: Tensor | None

    def __init__(
        self,
        config: LossConfig,
        counted: tuple[int, ...],
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.names = tuple(name for name in LOSSES if getattr(config, name) > 0)
        weights = torch.tensor([float(getattr(config, name)) for name in self.names])
        self.register_buffer("weights", weights, persistent=False)
        indices = torch.tensor(counted, dtype=torch.int64)
        self.register_buffer("counted", indices, persistent=False)
        table = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", table, persistent=False)

    def forward(
        self, logits: Tensor | Sequence[Tensor], mask: Tensor, border: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss; with deep supervision, the average over levels, weighted 1, 1/2, 1/4...

        Args:
            logits: [B, K, H, W]; with deep supervision, followed by those of coarser levels,
                [B, K, >= H / 2, >= W / 2], ..., as `UNet` returns them.
            mask: uint8 [B, H, W], or larger: the logits are for its centre.
            border: uint8, the size of the mask: 255 where two cells touch; None: all 0.

        Returns:
            The loss [], and its terms [len(names)], unweighted and detached, for logging.
        """
        finest, *coarser = [logits] if isinstance(logits, Tensor) else logits
        terms = self.compute_terms(finest, mask, border)
        for level, coarse in enumerate(coarser, start=1):
            sampled = subsample(mask, level)
            height, width = sampled.shape[-2:]
            sampled_border = None if border is None else subsample(border, level)
            inside = coarse[..., :height, :width]
            terms = terms + self.compute_terms(inside, sampled, sampled_border) * 0.5**level
        terms = terms / sum(0.5**level for level in range(1 + len(coarser)))
        return (terms * self.weights).sum(), terms.detach()

    def compute_terms(self, logits: Tensor, mask: Tensor, border: Tensor | None) -> Tensor:
        """Compute the losses of the logits of one level, float32 [len(names)]."""
        size = logits.shape[-2:]
        mask = centre_crop(mask, size)
        border = None if border is None else centre_crop(border, size)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            weight = self.weigh_pixels(mask, border)
            return torch.stack(
                [self.compute_term(name, logits, mask, weight) for name in self.names]
            )

    def compute_term(
        self, name: str, logits: Tensor, mask: Tensor, weight: Tensor | None
    ) -> Tensor:
        """Compute one of the losses: [], the mean over samples."""
        c = self.config
        match name:
            case "cross_entropy":
                values = cross_entropy(logits, mask, weight, smoothing=c.label_smoothing)
            case "bce":
                values = binary_cross_entropy(logits, mask, weight, smoothing=c.label_smoothing)
            case "focal":
                values = focal_loss(logits, mask, weight, gamma=c.focal_gamma)
            case "dice":
                values = dice_loss(logits, mask, self.counted)
            case "tversky":
                values = tversky_loss(logits, mask, self.counted, fp=c.tversky_fp, fn=c.tversky_fn)
            case _:
                raise ValueError(f"unknown loss {name!r}")
        return values.mean()

    def weigh_pixels(self, mask: Tensor, border: Tensor | None) -> Tensor | None:
        """Compute the weight of each pixel, float32 [B, H, W]; None: 1.

        w(x) = w_c(x) + w0 exp(-(d1 + d2)^2 / (2 sigma^2)): Ronneberger et al. 2015, equation 2.
        """
        table = self.class_weights
        weight = None
        if table is not None:
            weight = table[mask.long().clamp(max=len(table) - 1)]
        if border is not None and self.config.border_weight:
            extra = border.float() * (self.config.border_weight / 255)
            weight = 1 + extra if weight is None else weight + extra
        return weight


def subsample(x: Tensor, level: int) -> Tensor:
    """Return the pixel in the middle of each square of 2^level x 2^level pixels: [..., h, w]."""
    step = 2**level
    return x[..., step // 2 :: step, step // 2 :: step]


def inverse_frequency(pixels: Sequence[int], power: float = 1.0) -> tuple[float, ...]:
    """Compute a weight per class: (1 / pixels of the class)^power, with a mean over pixels of 1.

    With power 1, all classes have the same total weight. A class without pixels gets 1.
    """
    present = [count for count in pixels if count]
    scale = sum(present) / sum(count ** (1 - power) for count in present)
    return tuple(scale / count**power if count else 1.0 for count in pixels)


def average_pixels(values: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
    """Sum weighted values over the valid pixels of each sample, divided by their number: -> [B].

    Dividing by the sum of the weights would cancel them in a sample with a single class.

    Args:
        values: [B, H, W].
        mask: uint8 [B, H, W].
        weight: [B, H, W]; None: 1.
    """
    valid = mask != IGNORE
    values = values * (valid if weight is None else valid * weight)
    return values.sum(dim=(1, 2)) / valid.sum(dim=(1, 2)).clamp(min=1)


def cross_entropy(
    logits: Tensor, mask: Tensor, weight: Tensor | None = None, *, smoothing: float = 0.0
) -> Tensor:
    """Mean of -log p(class) over the valid pixels of a sample: [B, K, H, W], [B, H, W] -> [B].

    With label smoothing s (Szegedy et al. 2016), the target is (1 - s) one-hot + s / K.
    """
    values = F.cross_entropy(
        logits, mask.long(), ignore_index=IGNORE, reduction="none", label_smoothing=smoothing
    )
    return average_pixels(values, mask, weight)


def binary_cross_entropy(
    logits: Tensor, mask: Tensor, weight: Tensor | None = None, *, smoothing: float = 0.0
) -> Tensor:
    """Mean over classes and valid pixels of the sigmoid cross-entropy of each class: -> [B].

    With label smoothing s, the target is (1 - s) y + s / 2.
    """
    target = one_hot(logits, mask) * (1 - smoothing) + smoothing / 2
    values = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=1)
    return average_pixels(values, mask, weight)


def focal_loss(
    logits: Tensor, mask: Tensor, weight: Tensor | None = None, *, gamma: float = 2.0
) -> Tensor:
    """Mean of -(1 - p(class))^gamma log p(class) over valid pixels (Lin et al. 2017): -> [B]."""
    values = F.cross_entropy(logits, mask.long(), ignore_index=IGNORE, reduction="none")
    # Kept away from 0, where the gradient of a power below 1 is infinite.
    missing = (-torch.expm1(-values)).clamp(min=1e-12)
    return average_pixels(missing**gamma * values, mask, weight)


def dice_loss(logits: Tensor, mask: Tensor, counted: Tensor) -> Tensor:
    """1 - soft Dice, the mean over the classes `counted` [C]: [B, K, H, W], [B, H, W] -> [B].

    The soft Dice of a class is (2 sum(p g) + 1) / (sum(p) + sum(g) + 1), with sums over the valid
    pixels of a sample. The 1 (one pixel) keeps a gradient when a class is absent, but makes missing
    an object of a few pixels too cheap; cross-entropy compensates for that.
    """
    overlap, predicted, true = sum_regions(logits, mask, counted)
    return average_regions((2 * overlap + 1) / (predicted + true + 1), mask)


def tversky_loss(logits: Tensor, mask: Tensor, counted: Tensor, *, fp: float, fn: float) -> Tensor:
    """1 - Tversky index (Salehi et al. 2017), the mean over the classes `counted` [C]: -> [B].

    The index is (tp + 1) / (tp + fp * false positives + fn * false negatives + 1), soft sums as in
    `dice_loss`.
    """
    overlap, predicted, true = sum_regions(logits, mask, counted)
    wrong = fp * (predicted - overlap) + fn * (true - overlap)
    return average_regions((overlap + 1) / (overlap + wrong + 1), mask)


def average_regions(score: Tensor, mask: Tensor) -> Tensor:
    """Compute 1 - the mean over classes, 0 for a sample without a valid pixel: [B, C] -> [B]."""
    return (1 - score).mean(dim=1) * (mask != IGNORE).flatten(1).any(dim=1)


def sum_regions(logits: Tensor, mask: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute sum(p g), sum(p) and sum(g) over the valid pixels of each sample: [B, C] each.

    p are softmax probabilities; g is 1 where the mask has the class.

    Args:
        logits: [B, K, H, W].
        mask: uint8 [B, H, W].
        counted: indices of the counted classes, int64 [C], on the same device.
    """
    # All classes at once: the gradient of selecting one class is as large as the logits, and a loop
    # would write K of them. Bool, since floats would take as much memory as the logits.
    present = has_class(mask, logits.shape[1])
    probability = logits.softmax(dim=1)
    sums = (
        (probability * present).sum(dim=(2, 3)),
        (probability * (mask != IGNORE)[:, None]).sum(dim=(2, 3)),
        present.sum(dim=(2, 3)),
    )
    overlap, predicted, true = (of_all.index_select(1, counted) for of_all in sums)
    return overlap, predicted, true


def has_class(mask: Tensor, num_classes: int) -> Tensor:
    """Compare the mask with each class index: bool [B, K, H, W], False where the mask is 255."""
    classes = torch.arange(num_classes, device=mask.device).view(1, -1, 1, 1)
    return mask[:, None] == classes


def one_hot(logits: Tensor, mask: Tensor) -> Tensor:
    """One-hot encode the mask: [B, K, H, W] in the dtype of the logits, 0 where the mask is 255."""
    return has_class(mask, logits.shape[1]).to(logits.dtype)
