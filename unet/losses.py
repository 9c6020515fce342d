"""Losses on logits, in float32, as a mean over samples of a value per sample.

Each value looks at its own sample's valid pixels only (mask != 255) and is 0 where there is none.
A mean over samples is linear in the samples, so splitting a batch over ranks or accumulation steps
of equal size changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet.blocks import centre_crop

IGNORE = 255
"""Mask value of pixels that count nowhere."""

LOSSES = ("cross_entropy", "bce", "focal", "dice", "tversky")
"""What can be summed up. The first three are a mean over pixels, the others look at regions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """How much of each loss is summed up. The classes that count: all but `background`."""

    cross_entropy: float = 1.0
    """Weight of the pixel-wise cross-entropy."""
    dice: float = 1.0
    """Weight of the soft Dice loss over the classes that count."""
    bce: float = 0.0
    """Weight of the binary cross-entropy of each class against all others."""
    focal: float = 0.0
    """Weight of the focal loss."""
    tversky: float = 0.0
    """Weight of the Tversky loss over the classes that count."""
    focal_gamma: float = 2.0
    """How much less the focal loss looks at pixels that are nearly right; 0: not at all."""
    tversky_fp: float = 0.3
    """What a false positive costs in the Tversky loss (alpha)."""
    tversky_fn: float = 0.7
    """What a false negative costs in the Tversky loss (beta)."""
    label_smoothing: float = 0.0
    """Share of the truth that cross_entropy and bce spread over all classes alike."""
    class_weights: Literal["none", "inverse", "inverse_sqrt"] = "none"
    """inverse: in the losses over pixels, a pixel weighs as much as its class is rare in the
    training split, all classes together as much as before. inverse_sqrt: as the root of that, which
    costs the common classes less."""
    border_weight: float = 0.0
    """What pixels between two close cells weigh more in the losses over pixels (w0, 10 in the paper
    of 2015); needs shards of unet pack --border-sigma. 0 is off."""

    def __post_init__(self) -> None:
        numbers = ("focal_gamma", "tversky_fp", "tversky_fn", "border_weight")
        for name in (*LOSSES, *numbers):
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"loss.{name} must be a number from 0 on, got {value}")
        summed = [name for name in LOSSES if getattr(self, name)]
        if not summed:
            raise ValueError(f"one of the loss weights must be above 0: {', '.join(LOSSES)}")
        weighs = self.border_weight > 0 or self.class_weights != "none"
        if weighs and not {"cross_entropy", "bce", "focal"} & {*summed}:
            raise ValueError(
                "loss.border_weight and loss.class_weights weigh pixels; give one of "
                "loss.cross_entropy, loss.bce and loss.focal"
            )
        if self.label_smoothing and not {"cross_entropy", "bce"} & {*summed}:
            raise ValueError("loss.label_smoothing is of loss.cross_entropy and loss.bce; give one")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss.label_smoothing must be in [0, 1), got {self.label_smoothing}")


class SegmentationLoss(nn.Module):
    """The weighted sum of the losses whose weight is not 0.

    Args:
        config: the weights.
        counted: indices of the classes that the losses over regions look at.
        class_weights: what a pixel of each class weighs in the losses over pixels; None: 1.
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
        self, logits: Tensor, mask: Tensor, border: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss [], and its parts [len(names)], unweighted and detached, for the log.

        Args:
            logits: [B, K, H, W].
            mask: uint8 [B, H, W], or larger: its middle is what the logits are of.
            border: uint8 [B, H, W], as the mask: 255 where two cells touch; None: nowhere.
        """
        size = logits.shape[-2:]
        mask = centre_crop(mask, size)
        border = None if border is None else centre_crop(border, size)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            weight = self.pixel_weight(mask, border)
            parts = torch.stack([self.part(name, logits, mask, weight) for name in self.names])
            return (parts * self.weights).sum(), parts.detach()

    def part(self, name: str, logits: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
        """One of the losses [], a mean over samples."""
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
            case _:
                values = tversky_loss(logits, mask, self.counted, fp=c.tversky_fp, fn=c.tversky_fn)
        return values.mean()

    def pixel_weight(self, mask: Tensor, border: Tensor | None) -> Tensor | None:
        """What each pixel weighs, float32 [B, H, W]; None: 1.

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


def inverse_frequency(pixels: Sequence[int], power: float = 1.0) -> tuple[float, ...]:
    """What a pixel of each class weighs: (1 / pixels of the class)^power, 1 on average over pixels.

    With a power of 1 all classes weigh the same. A class without pixels weighs 1.
    """
    present = [count for count in pixels if count]
    scale = sum(present) / sum(count ** (1 - power) for count in present)
    return tuple(scale / count**power if count else 1.0 for count in pixels)


def over_pixels(values: Tensor, mask: Tensor, weight: Tensor | None) -> Tensor:
    """The weighted sum over each sample's valid pixels by their number: [B, H, W] -> [B].

    Not by the sum of the weights: a sample of one class would then not feel them.
    """
    valid = mask != IGNORE
    values = values * (valid if weight is None else valid * weight)
    return values.sum(dim=(1, 2)) / valid.sum(dim=(1, 2)).clamp(min=1)


def cross_entropy(
    logits: Tensor, mask: Tensor, weight: Tensor | None = None, *, smoothing: float = 0.0
) -> Tensor:
    """Mean of -log p(class) over each sample's valid pixels: [B, K, H, W], [B, H, W] -> [B].

    With label smoothing (Szegedy et al. 2016) the truth is (1 - s) of its class and s / K of each.
    """
    values = F.cross_entropy(
        logits, mask.long(), ignore_index=IGNORE, reduction="none", label_smoothing=smoothing
    )
    return over_pixels(values, mask, weight)


def binary_cross_entropy(
    logits: Tensor, mask: Tensor, weight: Tensor | None = None, *, smoothing: float = 0.0
) -> Tensor:
    """Mean over classes and valid pixels of each class's own cross-entropy, with sigmoids: -> [B].

    With label smoothing the truth is (1 - s) y + s / 2.
    """
    truth = one_hot(logits, mask) * (1 - smoothing) + smoothing / 2
    values = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(dim=1)
    return over_pixels(values, mask, weight)


def focal_loss(
    logits: Tensor, mask: Tensor, weight: Tensor | None = None, *, gamma: float = 2.0
) -> Tensor:
    """Mean of -(1 - p(class))^gamma log p(class) over valid pixels (Lin et al. 2017): -> [B]."""
    values = F.cross_entropy(logits, mask.long(), ignore_index=IGNORE, reduction="none")
    # Away from 0, where a power below 1 has no slope.
    missing = (-torch.expm1(-values)).clamp(min=1e-12)
    return over_pixels(missing**gamma * values, mask, weight)


def dice_loss(logits: Tensor, mask: Tensor, counted: Tensor) -> Tensor:
    """1 - soft Dice, a mean over the classes `counted` [C]: [B, K, H, W], [B, H, W] -> [B].

    Soft Dice of a class is (2 sum(p g) + 1) / (sum(p) + sum(g) + 1), the sums over one sample's
    valid pixels. The 1 (a pixel) keeps the gradient alive where a class is absent; its price is
    that missing an object of a few pixels costs less than it should, which cross-entropy makes up.
    """
    overlap, predicted, true = region_sums(logits, mask, counted)
    score = (2 * overlap + 1) / (predicted + true + 1)
    return (1 - score).mean(dim=1) * (mask != IGNORE).flatten(1).any(dim=1)


def tversky_loss(logits: Tensor, mask: Tensor, counted: Tensor, *, fp: float, fn: float) -> Tensor:
    """1 - Tversky index (Salehi et al. 2017), a mean over the classes `counted` [C]: -> [B].

    The index is (tp + 1) / (tp + fp * false positives + fn * false negatives + 1), soft sums as in
    `dice_loss`.
    """
    overlap, predicted, true = region_sums(logits, mask, counted)
    wrong = fp * (predicted - overlap) + fn * (true - overlap)
    score = (overlap + 1) / (overlap + wrong + 1)
    return (1 - score).mean(dim=1) * (mask != IGNORE).flatten(1).any(dim=1)


def region_sums(logits: Tensor, mask: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sum(p g), sum(p) and sum(g) over each sample's valid pixels, for the counted classes [B, C].

    p are softmax probabilities, g is 1 where the mask has the class.

    Args:
        logits: [B, K, H, W].
        mask: uint8 [B, H, W].
        counted: indices of the classes, int64 [C], on the same device.
    """
    # All classes at once: the gradient of one class taken by itself is as large as that of all, and
    # a loop would write K of them. As bytes, since floats would take as much as the logits.
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
    """Where the mask has each class, bool [B, K, H, W]; nowhere under 255."""
    classes = torch.arange(num_classes, device=mask.device).view(1, -1, 1, 1)
    return mask[:, None] == classes


def one_hot(logits: Tensor, mask: Tensor) -> Tensor:
    """1 where the mask has the class, as floats [B, K, H, W]; 0 everywhere under 255."""
    return has_class(mask, logits.shape[1]).to(logits.dtype)
