"""Scores per hospital, scanner, patient, ...: the images of a split by a label of each."""

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.groups import GROUP, find_grouped_shards, number_groups
from pipelines.evaluation.intervals import (
    ClassIntervals,
    Integers,
    Intervals,
    estimate_intervals,
    sum_by,
)
from pipelines.evaluation.per_image import Floats, divide_counts, split_keys
from pipelines.evaluation.table import show, show_bounds
from pipelines.loading.dataset import DataSet
from pipelines.runtime.errors import describe_read_error
from shards.documents import Count, Positive, convert
from shards.sample import AggregateDataError, DataError, encode_key
from shards.writer import name_path
from unet.metrics import Empty, MeanScores

PARTS_CSV = "groups.csv"
NO_GROUP = "(no group)"
"""Label of images without a group."""
MAX_LINES = 40
"""Parts in the printed table."""


@dataclass(frozen=True, slots=True)
class Labels:
    """How the images of a split are grouped."""

    per: str
    """`group`, or the name of a column."""
    values: tuple[str, ...] | None
    """Label of each image; None: its group, which is read after scoring."""
    num_others: int = 0
    """Rows of the file for images that are not in the split."""


@dataclass(frozen=True, slots=True)
class Part:
    """The scores of the images of a split that share a value."""

    value: str
    num_images: Positive
    macro: MeanScores
    classes: dict[str, MeanScores]
    intervals: Intervals


@dataclass(frozen=True, slots=True)
class Breakdown:
    """The scores of a split by the label of its images: the entry `groups` of scores.json."""

    per: str
    parts: tuple[Part, ...]
    """Sorted by label."""
    num_others: Count = 0
    """Rows of the file for images that are not in the split."""


def break_down(
    labels: Labels,
    rows: NDArray[np.uint32],
    groups: Sequence[str | None],
    names: tuple[str, ...],
    counted: tuple[int, ...],
    empty: Empty,
) -> Breakdown:
    """Score the images of each label.

    Args:
        labels: how the images are grouped.
        rows: counts per image, uint32 [N, 2 + 3 K].
        groups: group of each image [N].
        names: of the K classes.
        counted: indices of the classes that enter the macro mean.
        empty: score of a class that is absent from mask and prediction.
    """
    units = None if labels.values is None else number_groups(groups)
    values = labels.values or [NO_GROUP if group is None else group for group in groups]
    found = sorted({*values})
    numbers = number_labels(values, found)
    tp, fp, fn = np.split(sum_by(numbers, rows[:, 2:].astype(np.int64)), 3, axis=1)
    scores = divide_counts(tp, fp + fn, counted, empty)
    order, ends = np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers))
    parts = []
    for number, own in enumerate(np.split(order, ends[:-1])):
        within = None if units is None else np.unique(units[own], return_inverse=True)[1]
        classes = scores.classes[number]
        parts.append(
            Part(
                found[number],
                len(own),
                make_scores(scores.macro[number]),
                {name: make_scores(classes[:, c]) for c, name in enumerate(names)},
                estimate_intervals(rows[own], names, counted, empty, within),
            )
        )
    return Breakdown(labels.per, tuple(parts), labels.num_others)


def make_scores(scores: Floats) -> MeanScores:
    """Convert Dice and IoU, float64 [2], NaN if undefined."""
    dice, iou = (None if score != score else score for score in scores.tolist())
    return MeanScores(dice, iou)


def read_breakdown(scores: dict[str, Any]) -> Breakdown | None:
    """Return the scores per group in scores.json, if any. Raises ValueError if damaged."""
    plain = scores.get("groups")
    return None if plain is None else convert(plain, Breakdown)


def number_labels(labels: Sequence[str], names: Sequence[str]) -> Integers:
    """Return the index of each label among `names`, int64 [N]."""
    number = {name: n for n, name in enumerate(names)}
    return np.array([number[label] for label in labels], dtype=np.int64)


def read_labels(per: str, columns: Path | None, data: DataSet, split: str) -> Labels:
    """Read the labels of the images of a split.

    Args:
        per: a column of `columns`; without a file, `group`.
        columns: CSV file.
        data: the data set.
        split: its split.

    Raises DataError if the data set has no groups, or if the file has not exactly one value for
    every image.
    """
    if columns is not None:
        return read_column(columns, per, [*split_keys(data, split)], split)
    reader = data.reader(split)
    if not find_grouped_shards(reader, range(len(reader.shards))):
        raise DataError(
            f"--per {GROUP}: {data.store} has no groups in {split}; pack it with --group-by, or "
            "use --columns"
        )
    return Labels(per, None)


def read_column(path: Path, column: str, keys: Sequence[str], split: str) -> Labels:
    """Read the value of a column for each key.

    The file has a column `key`, as in scores.csv, or `path`, relative to the packed folder. Raises
    DataError if a column is missing, a row is damaged, or a key has no value or two rows.
    """
    values: dict[str, str] = {}
    wanted, problems, num_others = {*keys}, list[str](), 0
    for line, key, value in iter_rows(path, column):
        if key not in wanted:
            num_others += 1
        elif key in values:
            problems.append(f"{path}, line {line} is a second row of {key}")
        elif not value:
            problems.append(f"{path}, line {line} has no {column} of {key}")
        else:
            values[key] = value
    if problems:
        raise AggregateDataError(problems, "correct the file")
    if missing := [f"{path} has no row of {key}" for key in keys if key not in values]:
        raise AggregateDataError(missing, f"add a row for every image of {split}")
    return Labels(column, tuple(values[key] for key in keys), num_others)


def iter_rows(path: Path, column: str) -> Iterator[tuple[int, str, str]]:
    """Yield line number, key and value of the rows of a CSV file. Raises DataError if damaged."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            header = [name.strip() for name in next(lines, [])]
            by_key = "key" in header
            if not by_key and "path" not in header:
                raise DataError(f"--columns {path} has neither a column key nor path")
            if header.count(column) != 1:
                named = ", ".join(header)
                found = "two columns" if column in header else "no column"
                raise DataError(f"--columns {path} has {found} {column}; its columns are {named}")
            name, place = header.index("key" if by_key else "path"), header.index(column)
            for row in lines:
                if row and len(row) != len(header):
                    raise DataError(
                        f"{path}, line {lines.line_num} has {len(row)} cells, its header "
                        f"{len(header)}; correct the file"
                    )
                if row:
                    key = row[name] if by_key else encode_key(row[name])
                    yield lines.line_num, key, row[place].strip()
    except OSError as error:
        raise DataError(f"--columns {describe_read_error(error, path)}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"--columns {path} is not a CSV file in UTF-8: {error}") from error


def format_parts(breakdown: Breakdown) -> str:
    """Format a line per part, at most 40, with its number of images and macro scores."""
    shown = breakdown.parts[:MAX_LINES]
    width = max(12, len(breakdown.per), *(len(part.value) for part in shown)) + 2
    bounds = f"{'95% interval':>18}"
    lines = [f"{breakdown.per:<{width}}  images    Dice{bounds}     IoU{bounds}"]
    for part in shown:
        own = part.intervals.macro
        dice = f"{show(part.macro.dice)}{show_bounds(own.dice)}"
        iou = f"{show(part.macro.iou)}{show_bounds(own.iou)}"
        lines.append(f"{part.value:<{width}}{part.num_images:8d}{dice}{iou}".rstrip())
    if more := len(breakdown.parts) - len(shown):
        lines.append(f"and {more} more: {PARTS_CSV}")
    if breakdown.num_others:
        lines.append(f"ignoring {breakdown.num_others} rows of images that are not in the split")
    return "\n".join(lines)


def write_parts(path: Path, breakdown: Breakdown) -> None:
    """Atomically write a line per part: label, images, units, macro scores, those of each class.

    A cell without a score is empty.
    """
    names = ["", *(f"/{name}" for name in breakdown.parts[0].classes)]
    header = [
        f"{metric}{end}{name}"
        for name in names
        for metric in ("dice", "iou")
        for end in ("", "_low", "_high")
    ]
    temporary = path.with_name(f".{path.name}.tmp")
    with name_path(path), temporary.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow([breakdown.per, "images", "units", *header])
        for part in breakdown.parts:
            cells = fill_cells(part.macro, part.intervals.macro)
            for name, scores in part.classes.items():
                cells += fill_cells(scores, part.intervals.classes[name])
            lines.writerow([part.value, part.num_images, part.intervals.num_units, *cells])
    os.replace(temporary, path)


def fill_cells(scores: MeanScores, intervals: ClassIntervals) -> list[float | None]:
    """Return six cells: Dice and IoU, each with its lower and upper bound."""
    low, high = intervals.dice or (None, None)
    lower, upper = intervals.iou or (None, None)
    return [scores.dice, low, high, scores.iou, lower, upper]
