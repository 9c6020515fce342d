"""Exact scores: integer counts are summed over images and ranks and divided once, at the end.

Dice = 2 tp / (2 tp + fp + fn), IoU = tp / (tp + fp + fn).
    global     tp, fp, fn summed over all pixels of all images
    per image  the score of each image, then for each class the mean over images, then the mean over
               classes
    macro      mean over the counted classes; micro: their tp, fp, fn pooled
Dice and IoU are 0 / 0 for a class that is neither in the mask nor in the prediction of an image, or
of any image. `Empty` sets the score in this case:
    skip       None ("n/a"), excluded from all means
    one, zero  1 or 0, included in the means
An image without valid pixels (all 255) is excluded under every policy. Precision and recall are
None if they would divide by 0.
"""

import warnings
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from unet.losses import IGNORE

Empty = Literal["skip", "one", "zero"]
"""Dice and IoU of a class that is neither in the mask nor in the prediction."""
EMPTY_SCORES: dict[Empty, float | None] = {"skip": None, "one": 1.0, "zero": 0.0}
PIXELS = 2**22
"""Pixels counted at a time, so that memory does not grow with the size of the images."""
FIXED_POINT = 2**32
"""Per-image scores are summed as multiples of 2^-32: exact in any order of summation."""


@dataclass(frozen=True, slots=True)
class ClassScores:
    """Scores of one class; None if the denominator is 0."""

    name: str
    dice: float | None
    iou: float | None
    precision: float | None
    recall: float | None
    tp: int
    fp: int
    fn: int
    image_dice: float | None
    """Mean of the per-image Dice."""
    image_iou: float | None
    images: int
    """Images with the class in mask or prediction."""


@dataclass(frozen=True, slots=True)
class MeanScores:
    """Mean Dice and mean IoU."""

    dice: float | None
    iou: float | None


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a model over a set of images."""

    empty_policy: Empty
    num_images: int
    num_valid: int
    """Images with a pixel that is not 255."""
    counted: tuple[int, ...]
    """Indices of the classes that enter the means."""
    macro: MeanScores
    micro: MeanScores
    per_image: MeanScores
    classes: tuple[ClassScores, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Number of pixels, [true class][predicted class]."""

    def to_plain(self) -> dict[str, Any]:
        """Convert to the content of `scores.json`."""
        plain = asdict(self)
        plain["classes"] = {scores.pop("name"): scores for scores in plain["classes"]}
        plain["counted"] = [self.classes[i].name for i in self.counted]
        return plain


class Counts(NamedTuple):
    """int64 sums from which all scores are computed, under any policy; K classes."""

    confusion: Tensor
    """Number of pixels [K, K], [true class, predicted class]."""
    image_dice: Tensor
    """Sum of the per-image Dice [K], in units of 2^-32."""
    image_iou: Tensor
    """Sum of the per-image IoU [K], in units of 2^-32."""
    image_count: Tensor
    """Number of images [K] with the class in mask or prediction."""
    num_images: Tensor
    """Number of images []."""
    num_valid: Tensor
    """Number of images [] with a valid pixel."""


class SegmentationScores(Metric):
    """Confusion counts as int64 sums; `compute()` and `scores()` first add those of all ranks.

    Both are collective: every rank must call them. A rank without images contributes zeros.
    """

    full_state_update = False
    confusion: Tensor
    image_dice: Tensor
    image_iou: Tensor
    image_count: Tensor
    num_images: Tensor
    num_valid: Tensor

    def __init__(
        self, classes: tuple[str, ...], counted: tuple[int, ...], empty: Empty = "skip"
    ) -> None:
        # No cache, since `add` changes the state without `update`.
        super().__init__(compute_with_cache=False)
        self.names, self.counted = classes, counted
        self.empty: Empty = empty
        k = len(classes)
        for name, shape in (
            ("confusion", (k, k)),
            ("image_dice", (k,)),
            ("image_iou", (k,)),
            ("image_count", (k,)),
            ("num_images", ()),
            ("num_valid", ()),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, mask: Tensor) -> None:
        """Count class indices: prediction and mask uint8 [B, H, W]; 255 in the mask is ignored."""
        self.add(confusion_per_image(prediction, mask, len(self.names)))

    def add(self, confusion: Tensor) -> None:
        """Add the confusion of each image, int64 [B, K, K], as `confusion_per_image` returns it."""
        tp = confusion.diagonal(dim1=1, dim2=2)
        both = confusion.sum(dim=1) + confusion.sum(dim=2)
        seen = both > 0
        self.confusion += confusion.sum(dim=0)
        self.image_dice += to_fixed_point(2 * tp, both).sum(dim=0)
        self.image_iou += to_fixed_point(tp, both - tp).sum(dim=0)
        self.image_count += seen.sum(dim=0)
        self.num_images += len(confusion)
        self.num_valid += seen.any(dim=1).sum()

    def compute(self) -> Counts:
        """Return the sums; torchmetrics reduces them over ranks first."""
        return Counts(
            self.confusion,
            self.image_dice,
            self.image_iou,
            self.image_count,
            self.num_images,
            self.num_valid,
        )

    def scores(self) -> Scores:
        """Compute the scores over the images of all ranks."""
        counts = Counts(*sum_over_ranks(self))
        confusion, num_valid = counts.confusion, int(counts.num_valid)
        tp = confusion.diagonal().tolist()
        fp = (confusion.sum(dim=0) - confusion.diagonal()).tolist()
        fn = (confusion.sum(dim=1) - confusion.diagonal()).tolist()
        images, image_dice, image_iou = (
            sums.tolist() for sums in (counts.image_count, counts.image_dice, counts.image_iou)
        )
        absent = EMPTY_SCORES[self.empty] if num_valid else None

        def image_mean(total: int, present: int) -> float | None:
            if absent is None:
                return divide(total, present * FIXED_POINT)
            total += int(absent) * (num_valid - present) * FIXED_POINT
            return divide(total, num_valid * FIXED_POINT)

        classes = tuple(
            ClassScores(
                name=name,
                dice=divide(2 * tp[c], 2 * tp[c] + fp[c] + fn[c], absent),
                iou=divide(tp[c], tp[c] + fp[c] + fn[c], absent),
                precision=divide(tp[c], tp[c] + fp[c]),
                recall=divide(tp[c], tp[c] + fn[c]),
                tp=tp[c],
                fp=fp[c],
                fn=fn[c],
                image_dice=image_mean(image_dice[c], images[c]),
                image_iou=image_mean(image_iou[c], images[c]),
                images=images[c],
            )
            for c, name in enumerate(self.names)
        )
        pooled_tp, *wrong = (sum(values[c] for c in self.counted) for values in (tp, fp, fn))
        counted = [classes[c] for c in self.counted]
        return Scores(
            empty_policy=self.empty,
            num_images=int(counts.num_images),
            num_valid=num_valid,
            counted=self.counted,
            macro=MeanScores(mean([s.dice for s in counted]), mean([s.iou for s in counted])),
            micro=MeanScores(
                divide(2 * pooled_tp, 2 * pooled_tp + sum(wrong), absent),
                divide(pooled_tp, pooled_tp + sum(wrong), absent),
            ),
            per_image=MeanScores(
                mean([s.image_dice for s in counted]), mean([s.image_iou for s in counted])
            ),
            classes=classes,
            confusion=tuple(tuple(row) for row in confusion.tolist()),
        )


def confusion_per_image(prediction: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each image by their class in the mask and in the prediction.

    Does not synchronise with the device: no value is copied and no shape depends on one. Integer
    sums are exact in any order, on GPUs too.

    Args:
        prediction: class indices, uint8 [B, H, W].
        mask: class indices, uint8 [B, H, W]; 255 is ignored.
        num_classes: K.

    Returns:
        Number of pixels [image, true class, predicted class], int64 [B, K, K].

    Raises:
        RuntimeError: if a value is not a class; on a GPU, at the next synchronisation.
    """
    batch, k = len(mask), num_classes
    counts = torch.zeros(batch, k * k + 1, dtype=torch.int64, device=mask.device)
    rows = max(1, PIXELS // max(1, batch * mask.shape[2]))
    for p, m in zip(prediction.split(rows, dim=1), mask.split(rows, dim=1), strict=True):
        ignored = m == IGNORE
        for fits, what in (((m < k) | ignored, "mask"), (p < k, "predicted")):
            torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
                fits.all(), f"a {what} value is not a class"
            )
        # Ignored pixels go into an extra cell, which is dropped.
        cell = torch.where(ignored, k * k, m.long() * k + p.long()).flatten(1)
        part = torch.zeros_like(counts, dtype=torch.int32)
        one = torch.ones((), dtype=torch.int32, device=mask.device)
        counts += part.scatter_add_(1, cell, one.expand_as(cell))
    return counts[:, :-1].unflatten(1, (k, k))


def sum_over_ranks(metric: Metric) -> list[Tensor]:
    """Sum the states of a metric over all ranks, on the CPU. Every rank must call it."""
    with warnings.catch_warnings():
        # A rank without images is valid here.
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        return [tensor.cpu() for tensor in metric.compute()]


def to_fixed_point(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide and round to a multiple of 2^-32: int64, 0 where the denominator is 0."""
    # MPS has no float64. On other devices, nothing is copied.
    device = "cpu" if numerator.device.type == "mps" else numerator.device
    ratio = numerator.to(device).double() / denominator.to(device).clamp(min=1).double()
    return (ratio * FIXED_POINT).round().long().to(numerator.device)


def divide(numerator: int, denominator: int, absent: float | None = None) -> float | None:
    """Divide; returns `absent` if the denominator is 0."""
    return numerator / denominator if denominator else absent


def mean(values: list[float | None]) -> float | None:
    """Average the values that are not None; returns None if all are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


MeanName = Literal["dice", "iou", "image_dice", "image_iou"]
"""Means over the counted classes: global scores, or means of per-image scores."""


def mean_of(scores: Scores, name: MeanName) -> float | None:
    """Return one of the mean scores; None if undefined."""
    means = scores.per_image if name.startswith("image_") else scores.macro
    return means.iou if name.endswith("iou") else means.dice
