"""Exact scores: integers are summed over pictures and ranks, and divided once, at the end.

Dice = 2 tp / (2 tp + fp + fn), IoU = tp / (tp + fp + fn).
    global     tp, fp, fn summed over all pixels of all pictures
    per image  the score of each picture, then for each class the mean over pictures, then the mean
               over classes
    macro      mean over the classes that count; micro: their tp, fp, fn pooled
Dice and IoU are 0 / 0 for a class that is neither in a picture's mask nor in its prediction, and
for one that is in none of all pictures. What it scores there is declared (`Empty`):
    skip       None ("n/a"), and it enters no mean
    one, zero  1 or 0, and it enters the means
A picture without a pixel that counts (all 255) says nothing of any class: no policy scores it.
Precision and recall are None wherever they would divide by 0.
"""

import warnings
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from unet.losses import IGNORE

Empty = Literal["skip", "one", "zero"]
"""What Dice and IoU are of a class that is neither in mask nor in prediction."""
EMPTY_SCORES: dict[Empty, float | None] = {"skip": None, "one": 1.0, "zero": 0.0}

PIXELS = 2**22
"""Pixels that are counted at one time: what that takes does not grow with the images."""

FIXED_POINT = 2**32
"""Scores of single pictures are summed as integers of 1/2^32: exact in any order of summation."""


@dataclass(frozen=True, slots=True)
class ClassScores:
    """One class. None where there is nothing to divide by."""

    name: str
    dice: float | None
    iou: float | None
    precision: float | None
    recall: float | None
    tp: int
    fp: int
    fn: int
    image_dice: float | None
    """Mean of the Dice of single pictures."""
    image_iou: float | None
    images: int
    """Pictures that have the class in mask or prediction."""


@dataclass(frozen=True, slots=True)
class Mean:
    """A pair of mean scores."""

    dice: float | None
    iou: float | None


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of a model over a set of pictures."""

    empty_policy: Empty
    num_images: int
    num_valid: int
    """Those of them that have a pixel that is not 255."""
    counted: tuple[int, ...]
    """Indices of the classes that the means are over."""
    macro: Mean
    micro: Mean
    per_image: Mean
    classes: tuple[ClassScores, ...]
    confusion: tuple[tuple[int, ...], ...]
    """Pixels, [true class][predicted class]."""

    def to_plain(self) -> dict[str, Any]:
        """What `scores.json` holds."""
        plain = asdict(self)
        plain["classes"] = {scores.pop("name"): scores for scores in plain["classes"]}
        plain["counted"] = [self.classes[i].name for i in self.counted]
        return plain


class Counts(NamedTuple):
    """The int64 sums that all scores follow from, whatever the policy. K classes."""

    confusion: Tensor
    """Pixels [K, K], [true class, predicted class]."""
    image_dice: Tensor
    """Sums [K] over pictures of their Dice, in 1/2^32."""
    image_iou: Tensor
    """The same of IoU."""
    image_count: Tensor
    """Pictures [K] that have the class in mask or prediction."""
    num_images: Tensor
    """Pictures [] seen."""
    num_valid: Tensor
    """Pictures [] that have a pixel that counts."""


class SegmentationScores(Metric):
    """Confusion counts as int64 sums; `compute()` and `scores()` add those of all ranks first.

    A rank that saw nothing contributes zeros. Every rank must make the call.
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
        # Not kept, since `add` may change what was computed.
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
        """Count class indices: prediction and mask uint8 [B, H, W]; 255 in the mask is left out."""
        self.add(confusion_per_image(prediction, mask, len(self.names)))

    def add(self, confusion: Tensor) -> None:
        """Count images by their own confusions, int64 [B, K, K], of `confusion_per_image`."""
        tp = confusion.diagonal(dim1=1, dim2=2)
        both = confusion.sum(dim=1) + confusion.sum(dim=2)
        seen = both > 0
        self.confusion += confusion.sum(dim=0)
        self.image_dice += fixed_point(2 * tp, both).sum(dim=0)
        self.image_iou += fixed_point(tp, both - tp).sum(dim=0)
        self.image_count += seen.sum(dim=0)
        self.num_images += len(confusion)
        self.num_valid += seen.any(dim=1).sum()

    def compute(self) -> Counts:
        """The sums over everything that all ranks counted."""
        return Counts(
            self.confusion,
            self.image_dice,
            self.image_iou,
            self.image_count,
            self.num_images,
            self.num_valid,
        )

    def scores(self) -> Scores:
        """The scores over everything that all ranks counted."""
        counts = Counts(*sums_of_all_ranks(self))
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
        pooled = [sum(values[c] for c in self.counted) for values in (tp, fp, fn)]
        of = [classes[c] for c in self.counted]
        return Scores(
            empty_policy=self.empty,
            num_images=int(counts.num_images),
            num_valid=num_valid,
            counted=self.counted,
            macro=Mean(mean([s.dice for s in of]), mean([s.iou for s in of])),
            micro=Mean(
                divide(2 * pooled[0], 2 * pooled[0] + pooled[1] + pooled[2], absent),
                divide(pooled[0], sum(pooled), absent),
            ),
            per_image=Mean(mean([s.image_dice for s in of]), mean([s.image_iou for s in of])),
            classes=classes,
            confusion=tuple(tuple(row) for row in confusion.tolist()),
        )


def confusion_per_image(prediction: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each image by their class in the mask and in the prediction.

    Nothing leaves the device, and no shape depends on a value: nothing is waited for. Sums of
    integers are the same in any order, so that GPUs give them exactly too.

    Args:
        prediction: class indices, uint8 [B, H, W].
        mask: the same; 255 is left out.
        num_classes: K.

    Returns:
        Pixels [image, true class, predicted class], int64 [B, K, K].

    Raises:
        RuntimeError: a value is no class; on a GPU wherever it is next waited for.
    """
    batch, k = len(mask), num_classes
    counts = torch.zeros(batch, k * k + 1, dtype=torch.int64, device=mask.device)
    rows = max(1, PIXELS // max(1, batch * mask.shape[2]))
    for p, m in zip(prediction.split(rows, dim=1), mask.split(rows, dim=1), strict=True):
        ignored = m == IGNORE
        for fits, what in (((m < k) | ignored, "mask"), (p < k, "predicted")):
            torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
                fits.all(), f"a {what} value is no class"
            )
        # What is ignored goes into a cell of its own, which is cut off.
        cell = torch.where(ignored, k * k, m.long() * k + p.long()).flatten(1)
        part = torch.zeros_like(counts, dtype=torch.int32)
        one = torch.ones((), dtype=torch.int32, device=mask.device)
        counts += part.scatter_add_(1, cell, one.expand_as(cell))
    return counts[:, :-1].unflatten(1, (k, k))


def sums_of_all_ranks(metric: Metric) -> list[Tensor]:
    """What `metric.compute()` returns, on the CPU. Every rank must make the call."""
    with warnings.catch_warnings():
        # A rank without a picture is no mistake here.
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        return [tensor.cpu() for tensor in metric.compute()]


def fixed_point(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Numerator / denominator as a multiple of 1/2^32, 0 where the denominator is 0."""
    # Apple's GPUs have no float64; everywhere else nothing leaves the device.
    device = "cpu" if numerator.device.type == "mps" else numerator.device
    ratio = numerator.to(device).double() / denominator.to(device).clamp(min=1).double()
    return (ratio * FIXED_POINT).round().long().to(numerator.device)


def divide(numerator: int, denominator: int, absent: float | None = None) -> float | None:
    """The ratio, or `absent` where there is nothing to divide by."""
    return numerator / denominator if denominator else absent


def mean(values: list[float | None]) -> float | None:
    """The mean of those that are not None; None if all are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
