"""Masks from class probabilities: predicted class, confidence and class counts.

On GPUs a batch is processed at once and stays on the device, because kernel launches dominate. On
CPUs memory traffic dominates, and PyTorch compares float32 without vector instructions: NumPy takes
a third of the time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unet.temperature import temper_blocks
from unet.tiling import Block, Forward, NetworkGeometry, TileConfig, predict_blocks

FEW_CLASSES = 12
"""Up to this number of classes, comparing a CPU mask with each is faster than a histogram."""
UINT16_MAX = 65_535


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskRule:
    """How probabilities become a mask."""

    threshold: float | None = None
    """With two classes: predict the second where its probability is >= this. None: argmax."""
    min_confidence: float = 0.0
    """Pixels whose predicted class is less probable than this are marked as unsure."""
    stored_dtype: torch.dtype | None = None
    """Dtype of the probabilities to return. float16: all classes. uint16: all but the first, as
    round(65535 p). None: no probabilities."""
    count: bool = False
    """Count the pixels of each class."""
    temperature: float = 1.0
    """Probabilities are first replaced by `unet.temperature.apply_temperature`."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")


ARGMAX = MaskRule()


@dataclass(frozen=True, slots=True)
class PredictedMasks:
    """Prediction for images of equal size, on the device of the logits."""

    classes: Tensor
    """uint8 [B, H, W]."""
    confidence: Tensor
    """Mean probability of the predicted class, float64 [B] (float32 on MPS)."""
    unsure: Tensor | None
    """bool [B, H, W]; None if `MaskRule.min_confidence` is 0."""
    probabilities: Tensor | None
    """float16 [B, K, H, W] or uint16 [B, K - 1, H, W]; None if `MaskRule.stored_dtype` is. On the
    CPU if images are larger than a tile, since they may not fit into GPU memory."""
    counts: Tensor | None = None
    """int64 [B, K + 1]: pixels of each class, then unsure pixels, which count for no class. None
    unless `MaskRule.count`."""


def predict_mask(
    forward: Forward,
    images: Tensor | Sequence[Tensor],
    config: TileConfig,
    network: NetworkGeometry,
    rule: MaskRule = ARGMAX,
    observe: Callable[[Block], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Predict the class of every pixel, by default the argmax; as `predict_masks`.

    Returns:
        `PredictedMasks.classes` and `PredictedMasks.confidence`.
    """
    predicted = predict_masks(forward, images, config, network, rule, observe)
    return predicted.classes, predicted.confidence


def predict_masks(
    forward: Forward,
    images: Tensor | Sequence[Tensor],
    config: TileConfig,
    network: NetworkGeometry,
    rule: MaskRule,
    observe: Callable[[Block], None] | None = None,
) -> PredictedMasks:
    """Predict masks for images of equal size.

    Besides model and images, memory holds the result and what `predict_blocks` needs.

    Args:
        forward: uint8 images [B, C, h, w] -> logits [B, K, h - 2 margin, w - 2 margin].
        images: uint8 [B, C, H, W], or a list of [C, H, W]; H, W >= 1.
        config: tile size, overlap, batch size, test-time augmentation.
        network: geometry of the network behind `forward`; its `UNetConfig` will do.
        rule: how classes are chosen and what is returned with them.
        observe: called with each block of probabilities, at the temperature of the rule.
    """
    height, width = images[0].shape[-2:]
    shape = (len(images), height, width)
    classes = total = unsure = kept = None
    num_classes = 0
    blocks = predict_blocks(forward, images, config, network)
    for block in temper_blocks(blocks, rule.temperature, observe):
        best, index = choose_classes(block.probability, rule.threshold)
        if classes is None or total is None:
            num_classes = max(2, block.probability.shape[1])
            classes = index.new_empty(shape, dtype=torch.uint8)
            # MPS has no float64.
            wide = torch.float32 if best.device.type == "mps" else torch.float64
            total = best.new_zeros(len(images), dtype=wide)
            if rule.min_confidence > 0:
                unsure = index.new_empty(shape, dtype=torch.bool)
        place = (block.images, block.rows, block.columns)
        classes[place] = index
        # Rows first: on a CPU, summing float32 in float64 is several times slower.
        total[block.images] += best.sum(dim=-1).sum(dim=-1, dtype=total.dtype)
        if unsure is not None:
            unsure[place] = best < rule.min_confidence
        if rule.stored_dtype is not None:
            part = quantise(block.probability, rule.stored_dtype)
            if kept is None:
                complete = part.shape[-2:] == (height, width)
                kept = part.new_empty(
                    (len(images), part.shape[1], height, width),
                    device=part.device if complete else "cpu",
                )
            kept[block.images, :, block.rows, block.columns] = part
        # Frees its batch of probabilities before the next forward pass.
        del block
    assert classes is not None
    assert total is not None
    if kept is not None and rule.stored_dtype is not None:
        kept = kept.view(rule.stored_dtype)
    counts = count_classes(classes, unsure, num_classes) if rule.count else None
    return PredictedMasks(classes, total / (height * width), unsure, kept, counts)


def choose_classes(probability: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """Choose a class for each pixel.

    Args:
        probability: float32 [N, K, h, w]; with two classes, that of the second alone
            [N, 1, h, w].
        threshold: with two classes, the minimum probability of the second.

    Returns:
        The probability of the chosen class, float32 [N, h, w], and its index, of any integer dtype
        [N, h, w]. Ties go to the lowest index.
    """
    if probability.shape[1] == 1:
        second = probability[:, 0]
        if threshold is None:
            return (second - 0.5).abs_().add_(0.5), exceeds(second, 0.5)
        chosen = second >= threshold
        return torch.where(chosen, second, 1 - second), chosen.view(torch.uint8)
    if probability.device.type != "cpu":
        return probability.max(dim=1)
    # On a CPU, max with indices is not vectorised: it takes 3 to 8 times as long.
    best, *others = probability.unbind(dim=1)
    index = None
    for number, other in enumerate(others, start=1):
        higher = exceeds(other, best)
        if index is None:
            best, index = torch.maximum(best, other), higher
        else:
            torch.maximum(index, higher.mul_(number), out=index)
            torch.maximum(best, other, out=best)
    assert index is not None
    return best, index


def exceeds(values: Tensor, bound: Tensor | float) -> Tensor:
    """Compare element-wise: uint8 1 where `values` > `bound`, else 0."""
    if values.device.type != "cpu":
        return (values > bound).view(torch.uint8)
    other = bound.numpy() if isinstance(bound, Tensor) else np.float32(bound)
    return torch.from_numpy(np.greater(values.numpy(), other).view(np.uint8))


def quantise(probability: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert probabilities as `MaskRule.stored_dtype` asks, on their device.

    Args:
        probability: as for `choose_classes`.
        dtype: float16 or uint16.

    Returns:
        float16 [N, K, h, w], or the bits of uint16 as int16 [N, K - 1, h, w].
    """
    two = probability.shape[1] == 1
    if dtype == torch.float16:
        both = torch.cat([1 - probability, probability], dim=1) if two else probability
        return both.half()
    # Rounding can push sums of weighted tiles above 1. Few devices support uint16.
    others = probability if two else probability[:, 1:]
    return (others * UINT16_MAX).round_().clamp_(max=UINT16_MAX).int().to(torch.int16)


def count_classes(classes: Tensor, unsure: Tensor | None, num_classes: int) -> Tensor:
    """Count the pixels of each class in each image.

    Does not synchronise with a GPU, as `torch.bincount` would to find the largest value.

    Args:
        classes: uint8 [B, H, W].
        unsure: bool [B, H, W], pixels that count for no class; or None.
        num_classes: K.

    Returns:
        int64 [B, K + 1] on the device of `classes`; the last column counts unsure pixels.
    """
    if unsure is not None:
        classes = torch.where(unsure, num_classes, classes)
    if classes.device.type != "cpu":
        each = [(classes == index).sum(dim=(1, 2)) for index in range(num_classes + 1)]
        return torch.stack(each, dim=1)
    if num_classes > FEW_CLASSES:
        flat = classes.flatten(1)
        return torch.stack([torch.bincount(row, minlength=num_classes + 1) for row in flat])
    counts = torch.zeros((len(classes), num_classes + 1), dtype=torch.int64)
    for count, image in zip(counts, classes.numpy(), strict=True):
        for index in range(1, num_classes + (unsure is not None)):
            count[index] = int(np.count_nonzero(image == index))
        count[0] = image.size - count.sum()
    return counts
