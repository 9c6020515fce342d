"""Scores per image: counted on each rank, gathered, and written as `scores.csv`."""

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from pipelines.loading.dataset import DataSet
from shards.order import EvalPlan
from shards.writer import name_path
from unet import TileConfig
from unet.metrics import Empty

SCORES_CSV = "scores.csv"
FIRST_COLUMNS = ("key", "width", "height", "group", "dice", "iou")
COUNTS = ("tp", "fp", "fn")
"""Pixels of a class in an image: true positives, false positives, false negatives."""
MAX_GATHERED = 2**22
"""Numbers that each rank sends in one gather."""
LINES = 4096
"""Images whose scores are computed together."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PendingCounts:
    """Counts of a batch that are being copied from the device."""

    own: NDArray[np.int64]
    """Rows of the images [B] on this rank."""
    size: tuple[int, int]
    """Height and width."""
    counted: Tensor
    """int64 [B, 3 K], on the CPU."""
    arrived: torch.cuda.Event | None
    """Recorded when the copy from a GPU is complete; None on a CPU."""


class ImageCounts:
    """Counts per image of a split: 12 bytes per class, no Python objects.

    `rows`, uint32 [N, 2 + 3 K], in the order of the split: width, height, then true positives,
    false positives and false negatives of each of K classes. A rank holds those of its own images,
    which are consecutive; `gather` collects all of them on the main process.
    """

    def __init__(
        self, sizes: tuple[int, ...], num_classes: int, *, batch_size: int, rank: int, world: int
    ) -> None:
        """`sizes`: samples per shard; `batch_size`: of reading, which assigns images to ranks."""
        plans = [EvalPlan(sizes, batch_size, some, world) for some in range(world)]
        ends = [min(plan.chunk_bounds()[1] * batch_size, sum(sizes)) for plan in plans]
        self.ranges = [*zip([0, *ends[:-1]], ends, strict=True)]
        self.num_classes = num_classes
        self.first, last = self.ranges[rank]
        self._rows = np.zeros((last - self.first, 2 + 3 * num_classes), dtype=np.uint32)
        self._pending: PendingCounts | None = None

    def update(self, confusion: Tensor, position: Tensor, size: tuple[int, int]) -> None:
        """Add images of one size.

        Their counts are copied while the device computes, and stored at the next call or read.

        Args:
            confusion: int64 [B, K, K], from `unet.metrics.confusion_per_image`.
            position: int64 [B], on the CPU: positions of the images in the split.
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
        self._store_pending()
        self._pending = PendingCounts(position.numpy() - self.first, size, counted, arrived)

    @property
    def rows(self) -> NDArray[np.uint32]:
        """Counts of the images of this rank, uint32 [N, 2 + 3 K]."""
        self._store_pending()
        return self._rows

    def _store_pending(self) -> None:
        """Wait for the pending counts and store them."""
        if (coming := self._pending) is None:
            return
        if coming.arrived is not None:
            coming.arrived.synchronize()
        height, width = coming.size
        self._rows[coming.own, :2] = width, height
        self._rows[coming.own, 2:] = coming.counted.numpy()
        self._pending = None

    def gather(self, accelerator: Accelerator) -> NDArray[np.uint32] | None:
        """Gather the rows of all ranks on the main process; returns None elsewhere.

        Every rank must call this. Rows are gathered in parts, as integers.
        """
        return gather_rows(self.rows, self.ranges, accelerator)


def gather_rows(
    rows: NDArray[np.uint32], ranges: Sequence[tuple[int, int]], accelerator: Accelerator
) -> NDArray[np.uint32] | None:
    """Gather rows of integers on the main process, in parts; returns None elsewhere.

    Every rank must call this.

    Args:
        rows: of the images of this rank [N, C].
        ranges: first image and end of each rank.
        accelerator: ranks and device.
    """
    columns, num_images = rows.shape[1], ranges[-1][1]
    whole = np.zeros((num_images, columns), np.uint32) if accelerator.is_main_process else None
    max_rows = max(last - first for first, last in ranges)
    size = min(max_rows, MAX_GATHERED // columns)
    for start in range(0, max_rows, size):
        mine = rows[start : start + size].astype(np.int64)
        padded = np.pad(mine, ((0, size - len(mine)), (0, 0)))
        everyone = accelerator.gather(torch.from_numpy(padded).to(accelerator.device))
        assert isinstance(everyone, Tensor)
        if whole is None:
            continue
        for part, (first, last) in zip(everyone.split(size), ranges, strict=True):
            here = whole[first + start : min(first + start + size, last)]
            here[:] = part[: len(here)].cpu().numpy()
    return whole


def open_counts(
    data: DataSet, split: str, tiles: TileConfig, accelerator: Accelerator
) -> ImageCounts:
    """Make the counts of this rank for a split that is read in batches of `tiles`."""
    shards = data.manifest.split(split, data.store).shards
    return ImageCounts(
        tuple(shard.samples for shard in shards),
        len(data.manifest.classes),
        batch_size=tiles.effective_batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )


@dataclass(frozen=True, slots=True)
class ImageScores:
    """Scores of N images; NaN if undefined by the policy for empty masks."""

    macro: Floats
    """Means over the counted classes [N, 2]: Dice, IoU."""
    classes: Floats
    """Scores per class [N, 2, K]: Dice, IoU."""


def image_scores(
    rows: NDArray[np.uint32], counted: tuple[int, ...], empty: Empty = "skip"
) -> ImageScores:
    """Compute scores per image from counts, by the formulas and policy of `unet.metrics`."""
    tp, fp, fn = np.split(rows[:, 2:].astype(np.int64), 3, axis=1)
    return divide_counts(tp, fp + fn, counted, empty)


def divide_counts(
    tp: NDArray[Any], wrong: NDArray[Any], counted: tuple[int, ...], empty: Empty
) -> ImageScores:
    """Compute scores from true positives and false positives + false negatives, [N, K] each."""
    both = 2 * tp + wrong
    present = both > 0
    ratios = [(2 * tp) / np.maximum(both, 1), tp / np.maximum(both - tp, 1)]
    classes = np.stack(ratios, axis=1)
    # An image without counted pixels has no score.
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
    groups: Sequence[str | None],
) -> Floats:
    """Atomically write a line per image, in the order of the split.

    Key, width, height, group, scores, and the counts of pixels from which they were computed, which
    `read_counts` reads. A cell without a score or group is empty. Returns the Dice of each image
    [N], averaged over the counted classes; NaN if undefined.
    """
    names = [f"{score}/{name}" for score in ("dice", "iou", *COUNTS) for name in classes]
    temporary = path.with_name(f".{path.name}.tmp")
    keys, dice = split_keys(data, split), np.empty(len(rows))
    with name_path(path), temporary.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow([*FIRST_COLUMNS, *names])
        for start in range(0, len(rows), LINES):
            part = rows[start : start + LINES]
            scores = image_scores(part, counted, empty)
            dice[start : start + LINES] = scores.macro[:, 0]
            values = np.concatenate([scores.macro, scores.classes.reshape(len(part), -1)], axis=1)
            own = groups[start : start + LINES]
            for (width, height, *counts), numbers, group in zip(
                part.tolist(), values.tolist(), own, strict=True
            ):
                cells = ("" if number != number else number for number in numbers)
                lines.writerow([next(keys), width, height, group, *cells, *counts])
    os.replace(temporary, path)
    return dice


def split_keys(data: DataSet, split: str) -> Iterator[str]:
    """Yield the keys of a split in its order, from the .idx files."""
    reader = data.reader(split)
    for number, shard in enumerate(reader.shards):
        index = reader.open_offsets([number])[number]
        yield from (index[row].key for row in range(shard.samples))


def lowest(dice: Floats, max_images: int) -> list[int]:
    """Return the indices of the lowest `dice` [N], without NaN, lowest first."""
    known = np.flatnonzero(~np.isnan(dice))
    order = np.argsort(dice[known], kind="stable")
    return known[order[:max_images]].tolist()
