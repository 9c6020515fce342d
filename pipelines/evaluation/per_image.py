"""Scores image by image: counted on each rank, brought together, written as `scores.csv`."""

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from pipelines.loading.dataset import DataSet
from shards.order import EvalPlan
from unet import Empty

SCORES_CSV = "scores.csv"
MOST_GATHERED = 2**22
"""Numbers of one rank that are brought together at one time."""
LINES = 4096
"""Images whose counts are turned into scores at one time."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Coming:
    """Counts of a batch on their way from the device."""

    own: NDArray[np.int64]
    """Rows of the images [B]."""
    size: tuple[int, int]
    """Height and width."""
    counted: Tensor
    """int64 [B, 3 K], on the CPU."""
    arrived: torch.cuda.Event | None
    """Of a GPU: when they are there; None: now."""


class ImageCounts:
    """What was counted in each image of a split: 12 bytes for each class, no Python object.

    Width, height, then true positives, false positives and false negatives of each of K classes:
    `rows`, uint32 [N, 2 + 3 K], in the order of the split. A rank holds those of its own images,
    which follow each other; `gather` gives all of them to the main process.
    """

    def __init__(
        self, sizes: tuple[int, ...], num_classes: int, *, batch_size: int, rank: int, world: int
    ) -> None:
        """`sizes`: samples of each shard; `batch_size`: as they are read, which decides whose."""
        plans = [EvalPlan(sizes, batch_size, some, world) for some in range(world)]
        ends = [min(plan.chunk_bounds()[1] * batch_size, sum(sizes)) for plan in plans]
        self.ranges = [*zip([0, *ends[:-1]], ends, strict=True)]
        self.num_classes = num_classes
        self.first, last = self.ranges[rank]
        self._rows = np.zeros((last - self.first, 2 + 3 * num_classes), dtype=np.uint32)
        self._coming: Coming | None = None

    def update(self, confusion: Tensor, position: Tensor, size: tuple[int, int]) -> None:
        """Count images of one size (height, width) by their confusions.

        They arrive while the device goes on, and become rows at the next call, or when asked for.

        Args:
            confusion: int64 [B, K, K], of `unet.confusion_per_image`.
            position: int64 [B], on the CPU: where in the split the images are.
            size: height and width.
        """
        tp = confusion.diagonal(dim1=1, dim2=2)
        fp, fn = confusion.sum(dim=1) - tp, confusion.sum(dim=2) - tp
        on_gpu = confusion.device.type == "cuda"
        counted = torch.cat([tp, fp, fn], dim=1).to("cpu", non_blocking=on_gpu)
        arrived = None
        if on_gpu:
            arrived = torch.cuda.Event()
            arrived.record()
        self._take_in()
        self._coming = Coming(position.numpy() - self.first, size, counted, arrived)

    @property
    def rows(self) -> NDArray[np.uint32]:
        """Of all images counted so far on this rank, uint32 [N, 2 + 3 K]."""
        self._take_in()
        return self._rows

    def _take_in(self) -> None:
        """Fill the rows of the images that were counted last."""
        if (coming := self._coming) is None:
            return
        if coming.arrived is not None:
            coming.arrived.synchronize()
        height, width = coming.size
        self._rows[coming.own, :2] = width, height
        self._rows[coming.own, 2:] = coming.counted.numpy()
        self._coming = None

    def gather(self, accelerator: Accelerator) -> NDArray[np.uint32] | None:
        """The rows of the whole split on the main process, None elsewhere.

        Every rank must make the call. Some rows travel at a time, as whole numbers.
        """
        columns, num_images = self.rows.shape[1], self.ranges[-1][1]
        is_main = accelerator.is_main_process
        whole = np.zeros((num_images, columns), np.uint32) if is_main else None
        most = max(last - first for first, last in self.ranges)
        size = min(most, MOST_GATHERED // columns)
        for begin in range(0, most, size):
            mine = self.rows[begin : begin + size].astype(np.int64)
            padded = np.pad(mine, ((0, size - len(mine)), (0, 0)))
            everyone = accelerator.gather(torch.from_numpy(padded).to(accelerator.device))
            assert isinstance(everyone, Tensor)
            if whole is None:
                continue
            for part, (first, last) in zip(everyone.split(size), self.ranges, strict=True):
                here = whole[first + begin : min(first + begin + size, last)]
                here[:] = part[: len(here)].cpu().numpy()
        return whole


@dataclass(frozen=True, slots=True)
class ImageScores:
    """Scores of N images; NaN where the policy gives none."""

    macro: Floats
    """Means over the classes that count [N, 2]: Dice, IoU."""
    classes: Floats
    """Of each class [N, 2, K]: Dice, IoU."""


def image_scores(
    rows: NDArray[np.uint32], counted: tuple[int, ...], empty: Empty = "skip"
) -> ImageScores:
    """The scores of images from their counts, by the formulas and policy of `unet.metrics`."""
    tp, fp, fn = np.split(rows[:, 2:].astype(np.int64), 3, axis=1)
    both = 2 * tp + fp + fn
    present = both > 0
    ratios = [(2 * tp) / np.maximum(both, 1), tp / np.maximum(both - tp, 1)]
    classes = np.stack(ratios, axis=1)
    # An image without a pixel that counts says nothing of any class.
    absent = np.where(present.any(axis=1), {"skip": np.nan, "one": 1.0, "zero": 0.0}[empty], np.nan)
    classes = np.where(present[:, None], classes, absent[:, None, None])
    of = classes[:, :, list(counted)]
    known = ~np.isnan(of)
    number = known.sum(axis=2)
    total = np.where(known, of, 0).sum(axis=2)
    macro = np.where(number > 0, total / np.maximum(number, 1), np.nan)
    return ImageScores(macro, classes)


def write_scores(
    path: Path,
    rows: NDArray[np.uint32],
    data: DataSet,
    split: str,
    classes: tuple[str, ...],
    counted: tuple[int, ...],
    empty: Empty,
) -> Floats:
    """A line for each image, in the order of the split: key, width, height and its scores.

    A cell is empty where there is no score. The file is there whole or not at all. Returns the
    Dice of each image [N], a mean over the classes that count, NaN where there is none.
    """
    names = [f"{score}/{name}" for score in ("dice", "iou") for name in classes]
    temporary = path.with_name(f".{path.name}.tmp")
    keys, dice = split_keys(data, split), np.empty(len(rows))
    with temporary.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["key", "width", "height", "dice", "iou", *names])
        for begin in range(0, len(rows), LINES):
            part = rows[begin : begin + LINES]
            scores = image_scores(part, counted, empty)
            dice[begin : begin + LINES] = scores.macro[:, 0]
            values = np.concatenate([scores.macro, scores.classes.reshape(len(part), -1)], axis=1)
            for (width, height), numbers in zip(part[:, :2].tolist(), values.tolist(), strict=True):
                cells = ("" if number != number else number for number in numbers)
                lines.writerow([next(keys), width, height, *cells])
    os.replace(temporary, path)
    return dice


def split_keys(data: DataSet, split: str) -> Iterator[str]:
    """The keys of a split in its order, out of the shards' indexes."""
    reader = data.reader(split)
    for number, shard in enumerate(reader.shards):
        index = reader.open_offsets([number])[number]
        yield from (index[row].key for row in range(shard.samples))


def lowest(dice: Floats, most: int) -> list[int]:
    """The places of the lowest numbers of dice [N], at most so many; NaN is none of them."""
    known = np.flatnonzero(~np.isnan(dice))
    order = np.argsort(dice[known], kind="stable")
    return known[order[:most]].tolist()
