"""Scores of objects in masks of two classes, from integer counts per image; see `unet.objects`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from pipelines.evaluation.findings import Finding, format_csv
from pipelines.evaluation.intervals import Integers
from pipelines.evaluation.per_image import ImageCounts, gather_rows, split_keys
from pipelines.evaluation.table import show
from pipelines.loading.dataset import DataSet
from shards.documents import Count, convert
from shards.sample import DataError
from unet.metrics import divide
from unet.objects import ObjectCounts, count_objects

OBJECTS_CSV = "objects.csv"


@dataclass(frozen=True, slots=True)
class ObjectScores:
    """Scores of the objects of a split: the entry `objects` of scores.json."""

    of: str
    """Name of the second class."""
    true: Count
    predicted: Count
    matched: Count
    precision: float | None
    """matched / predicted."""
    recall: float | None
    """matched / true."""
    f1: float | None
    count_error: float | None
    """Mean over images of |predicted - true|."""
    count_bias: float | None
    """Mean over images of predicted - true."""
    true_area: float | None
    """Mean pixels of a true object."""
    predicted_area: float | None
    iou: float = 0.5
    """Objects match above this."""


class ImageObjects:
    """Counts of objects per image of a split; a rank holds those of its own images."""

    def __init__(self, images: ImageCounts) -> None:
        """`images`: counts of the same split, which know the images of each rank."""
        self.ranges, self.first = images.ranges, images.first
        shape = (len(images.rows), len(ObjectCounts._fields))
        self.rows: NDArray[np.uint32] = np.zeros(shape, np.uint32)

    def update(self, prediction: Tensor, mask: Tensor, position: Tensor) -> None:
        """Add images of one size, on the CPU.

        Args:
            prediction: class indices uint8 [B, H, W], on any device.
            mask: class indices uint8 [B, H, W]; 255 is ignored.
            position: int64 [B], on the CPU: positions of the images in the split.
        """
        pairs = zip(prediction.cpu().numpy(), mask.cpu().numpy(), strict=True)
        for place, pair in zip(position.tolist(), pairs, strict=True):
            self.rows[place - self.first] = count_objects(*pair)

    def gather(self, accelerator: Accelerator) -> NDArray[np.uint32] | None:
        """Gather the rows [N, 5] of all ranks on the main process; returns None elsewhere.

        Every rank must call this.
        """
        return gather_rows(self.rows, self.ranges, accelerator)


def refuse_other_classes(names: Sequence[str]) -> None:
    """Raise DataError unless there are two classes."""
    if len(names) != 2:
        raise DataError(
            f"--objects is for two classes, whose second one has objects; these are {len(names)}: "
            f"{', '.join(names)}"
        )


def score_objects(rows: NDArray[np.uint32], name: str) -> ObjectScores:
    """Compute the scores of a split from the counts of its images [N, 5]."""
    counts: Integers = rows.astype(np.int64)
    true, predicted, matched, true_area, predicted_area = counts.sum(axis=0).tolist()
    difference = counts[:, 1] - counts[:, 0]
    return ObjectScores(
        of=name,
        true=true,
        predicted=predicted,
        matched=matched,
        precision=divide(matched, predicted),
        recall=divide(matched, true),
        f1=divide(2 * matched, true + predicted),
        count_error=divide(int(np.abs(difference).sum()), len(counts)),
        count_bias=divide(int(difference.sum()), len(counts)),
        true_area=divide(true_area, true),
        predicted_area=divide(predicted_area, predicted),
    )


def find_objects(
    objects: ImageObjects, data: DataSet, split: str, accelerator: Accelerator
) -> Finding | None:
    """Gather the counts of all ranks and score them; every rank must call this.

    Returns None except on the main process.
    """
    rows = objects.gather(accelerator)
    if rows is None:
        return None
    scores = score_objects(rows, data.manifest.classes[1])
    lines = ([key, *row] for key, row in zip(split_keys(data, split), rows.tolist(), strict=True))
    return Finding(
        "objects",
        asdict(scores),
        format_objects(scores),
        OBJECTS_CSV,
        format_csv(["key", *ObjectCounts._fields], lines),
    )


def format_objects(scores: ObjectScores) -> str:
    """Format the scores in two lines."""
    shown = (show(one).strip() for one in (scores.precision, scores.recall, scores.f1))
    precision, recall, f1 = shown
    error, bias, true_area, predicted_area = (
        "n/a" if one is None else f"{one:{sign}.2f}"
        for one, sign in (
            *((scores.count_error, ""), (scores.count_bias, "+")),
            *((scores.true_area, ""), (scores.predicted_area, "")),
        )
    )
    return (
        f"objects of {scores.of} (IoU > {scores.iou:g}): precision {precision}, recall {recall}, "
        f"F1 {f1}: {scores.matched} matched of {scores.true} true, {scores.predicted} predicted\n"
        f"count error per image {error} (bias {bias}), mean area {true_area} true, "
        f"{predicted_area} predicted"
    )


def read_objects(scores: dict[str, Any]) -> ObjectScores | None:
    """Return the scores of objects in scores.json, if any. Raises ValueError if damaged."""
    plain = scores.get("objects")
    return None if plain is None else convert(plain, ObjectScores)
