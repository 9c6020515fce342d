"""Masks from class probabilities: the likeliest class of each pixel, how sure it is, and counts.

On GPUs everything is done for a batch at once and stays there: launches, not arithmetic, are what
costs. On CPUs memory traffic is, and PyTorch compares float32 without vector instructions: NumPy
does it in a third of the time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unet.tiling import Forward, TileConfig, predict_blocks

FEW_CLASSES = 12
"""Up to so many classes, comparing a CPU mask with each takes less time than a histogram."""
UINT16_MAX = 65_535


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskRule:
    """What is made of class probabilities."""

    threshold: float | None = None
    """Of two classes: the second wherever its probability is at least this. None: the likelier."""
    min_confidence: float = 0.0
    """Pixels whose chosen class is less probable are unsure."""
    keep: torch.dtype | None = None
    """float16: the probabilities of all classes are kept. uint16: those of all but the first, as
    round(65535 p). None: they are not."""
    count: bool = False
    """Whether the pixels of each class are counted."""


@dataclass(frozen=True, slots=True)
class Masks:
    """What is predicted for images of one size, on the device of the logits."""

    classes: Tensor
    """uint8 [B, H, W]."""
    confidence: Tensor
    """Mean over each image of the probability of the chosen class, float64 [B] (float32 on
    Apple's GPUs, which know no other)."""
    unsure: Tensor | None
    """bool [B, H, W]; None where no confidence is asked for."""
    probabilities: Tensor | None
    """[B, K, H, W] (all classes) or [B, K - 1, H, W] (all but the first) of the dtype that is kept;
    None where none is. Those of images larger than a tile are on the CPU: on a GPU they may have
    no room."""
    counts: Tensor | None = None
    """Pixels of each class, then unsure ones, which count for no class: int64 [B, K + 1]. None
    where they are not counted."""


def predict_mask(
    forward: Forward,
    images: Tensor | Sequence[Tensor],
    config: TileConfig,
    *,
    margin: int = 0,
    multiple: int = 1,
) -> tuple[Tensor, Tensor]:
    """The likeliest classes of images of one size; the arguments of `predict_masks`.

    Returns:
        `Masks.classes` and `Masks.confidence`.
    """
    found = predict_masks(forward, images, config, MaskRule(), margin=margin, multiple=multiple)
    return found.classes, found.confidence


def predict_masks(
    forward: Forward,
    images: Tensor | Sequence[Tensor],
    config: TileConfig,
    rule: MaskRule,
    *,
    margin: int = 0,
    multiple: int = 1,
) -> Masks:
    """Class indices of images of one size, and what `rule` asks for.

    Beside model and images, memory holds the result and what `predict_blocks` says.

    Args:
        forward: uint8 images [B, C, h, w] -> logits [B, K, h - 2 margin, w - 2 margin].
        images: uint8 [B, C, H, W], or a list of [C, H, W]; H and W from 1 up.
        config: tile, overlap, batch size, mirrors.
        rule: how classes are chosen, and what is kept beside them.
        margin: pixels that the network loses on each side: `UNetConfig.margin`.
        multiple: 2^depth; of no account without a margin.
    """
    height, width = images[0].shape[-2:]
    shape = (len(images), height, width)
    classes = total = unsure = kept = None
    num_classes = 0
    for block in predict_blocks(forward, images, config, margin=margin, multiple=multiple):
        best, index = choose(block.probability, rule.threshold)
        if classes is None or total is None:
            num_classes = max(2, block.probability.shape[1])
            classes = index.new_empty(shape, dtype=torch.uint8)
            # Apple's GPUs have no float64.
            wide = torch.float32 if best.device.type == "mps" else torch.float64
            total = best.new_zeros(len(images), dtype=wide)
            if rule.min_confidence > 0:
                unsure = index.new_empty(shape, dtype=torch.bool)
        place = (block.images, block.rows, block.columns)
        classes[place] = index
        # Rows first: a sum of float32 in float64 takes several times as long on a CPU.
        total[block.images] += best.sum(dim=-1).sum(dim=-1, dtype=total.dtype)
        if unsure is not None:
            unsure[place] = best < rule.min_confidence
        if rule.keep is not None:
            part = compact(block.probability, rule.keep)
            if kept is None:
                whole = part.shape[-2:] == (height, width)
                kept = part.new_empty(
                    (len(images), part.shape[1], height, width),
                    device=part.device if whole else "cpu",
                )
            kept[block.images, :, block.rows, block.columns] = part
        # Else its batch of probabilities would live on through the next forward pass.
        del block
    assert classes is not None
    assert total is not None
    if kept is not None and rule.keep is not None:
        kept = kept.view(rule.keep)
    counts = count_classes(classes, unsure, num_classes) if rule.count else None
    return Masks(classes, total / (height * width), unsure, kept, counts)


def choose(probability: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """Choose a class for each pixel.

    Args:
        probability: of each class, float32 [N, K, h, w]; of two classes, of the second alone
            [N, 1, h, w].
        threshold: of two classes, the least probability of the second.

    Returns:
        How probable the chosen class is, float32 [N, h, w], and its index, an integer of any kind
        [N, h, w]. Of equally probable ones it is the first.
    """
    if probability.shape[1] == 1:
        second = probability[:, 0]
        if threshold is None:
            return (second - 0.5).abs_().add_(0.5), exceeds(second, 0.5)
        chosen = second >= threshold
        return torch.where(chosen, second, 1 - second), chosen.view(torch.uint8)
    if probability.device.type != "cpu":
        return probability.max(dim=1)
    # On a CPU a maximum that keeps its index is not vectorised: it takes 3 to 8 times as long.
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
    """1 where values are greater, uint8 of their shape."""
    if values.device.type != "cpu":
        return (values > bound).view(torch.uint8)
    other = bound.numpy() if isinstance(bound, Tensor) else np.float32(bound)
    return torch.from_numpy(np.greater(values.numpy(), other).view(np.uint8))


def compact(probability: Tensor, dtype: torch.dtype) -> Tensor:
    """Probabilities as they are kept, on their device: see `MaskRule.keep`.

    Args:
        probability: as for `choose`.
        dtype: float16 or uint16.

    Returns:
        float16 [N, K, h, w], or the bits of uint16 as int16 [N, K - 1, h, w].
    """
    two = probability.shape[1] == 1
    if dtype == torch.float16:
        both = torch.cat([1 - probability, probability], dim=1) if two else probability
        return both.half()
    # Sums of weighted tiles may exceed 1 by a rounding. Few devices can fill a tensor of uint16.
    others = probability if two else probability[:, 1:]
    return (others * UINT16_MAX).round_().clamp_(max=UINT16_MAX).int().to(torch.int16)


def count_classes(classes: Tensor, unsure: Tensor | None, num_classes: int) -> Tensor:
    """Count the pixels of each class in each image.

    On a GPU nothing waits for it, as `torch.bincount` would for the largest value.

    Args:
        classes: uint8 [B, H, W].
        unsure: bool [B, H, W]: pixels that count for no class.
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
