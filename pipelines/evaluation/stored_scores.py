"""The scores that `unet evaluate` wrote: read back with the counts of every image."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.per_image import COUNTS, FIRST_COLUMNS, SCORES_CSV
from pipelines.model.checkpoint_files import hash_file
from pipelines.model.load import find_checkpoint, list_folds
from pipelines.runtime.errors import describe_read_error
from pipelines.runtime.run_folder import SCORES, RunFolder
from shards.documents import Count, convert, parse_json
from shards.manifest import MANIFEST, read_manifest
from shards.sample import DataError
from unet.metrics import Empty
from unet.weights import WEIGHTS

MAX_PIXELS = 2**32
"""Pixels of an image, exclusive."""


class MissingScoresError(DataError):
    """A folder has no scores, or those of other weights or masks; the message has no remedy."""


@dataclass(frozen=True, slots=True)
class StoredClass:
    """Pixels of a class over the split."""

    tp: Count
    fp: Count
    fn: Count


@dataclass(frozen=True, slots=True)
class Header:
    """The entries of scores.json that a comparison reads."""

    split: str
    manifest: str
    """sha256 of the manifest of the data."""
    empty_policy: Empty
    counted: tuple[str, ...]
    classes: dict[str, StoredClass]
    checkpoint: str | tuple[str, ...] | None = None
    """sha256 of the weights; of several models, of each."""
    predictions: str | None = None


@dataclass(frozen=True, slots=True)
class StoredScores:
    """The scores of a split, per image."""

    place: Path
    """Folder that they were read from."""
    header: Header
    keys: tuple[str, ...]
    """Keys of the images, in the order of the split."""
    groups: tuple[str | None, ...]
    rows: NDArray[np.uint32]
    """Counts of each image, uint32 [N, 2 + 3 K], as `ImageCounts.gather` returns them."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by index."""
        return tuple(self.header.classes)

    @property
    def counted(self) -> tuple[int, ...]:
        """Indices of the classes that enter the means."""
        return tuple(self.classes.index(name) for name in self.header.counted)


def read_stored_scores(place: Path) -> StoredScores:
    """Read scores.json and scores.csv of a folder.

    Raises DataError if they are missing, damaged, or do not belong together.
    """
    header = read_header(place)
    refuse_stale(place, header)
    keys, groups, rows = read_counts(place / SCORES_CSV, tuple(header.classes))
    sums = rows[:, 2:].sum(axis=0, dtype=np.int64).reshape(3, -1).T.tolist()
    expected = [[c.tp, c.fp, c.fn] for c in header.classes.values()]
    if sums != expected:
        raise DataError(
            f"{place / SCORES_CSV} does not add up to {SCORES}; run unet evaluate again"
        )
    return StoredScores(place, header, keys, groups, rows)


def refuse_stale(place: Path, header: Header) -> None:
    """Raise MissingScoresError if a folder has other weights or masks than those scored."""
    scored, now = header.predictions or header.checkpoint, None
    if folds := list_folds(place):
        digests = [hash_weights(fold) for fold in folds]
        now = digests[0] if len(digests) == 1 else tuple(digests)
    elif RunFolder(place).checkpoints.is_dir() or (place / WEIGHTS).is_file():
        now = hash_weights(place)
    elif (place / MANIFEST).is_file():
        now = read_manifest(place).digest
    if now is not None and now != scored:
        raise MissingScoresError(
            f"{place / SCORES} belongs to another checkpoint or other masks than {place} has now"
        )


def hash_weights(place: Path) -> str:
    """Compute the sha256 of the weights of a run or checkpoint folder that exists."""
    return hash_file(Path(find_checkpoint(str(place), "unet compare")) / WEIGHTS)


def read_header(place: Path) -> Header:
    """Read the entries of scores.json that a comparison needs.

    Raises MissingScoresError if there is none, DataError if it is damaged.
    """
    path = place / SCORES
    try:
        plain = parse_json(path.read_bytes())
        names = Header.__dataclass_fields__
        kept: dict[str, Any] = {name: plain[name] for name in names if name in plain}
        if isinstance(kept.get("classes"), dict):
            kept["classes"] = {
                name: {count: values[count] for count in COUNTS}
                for name, values in kept["classes"].items()
            }
        header = convert(kept, Header)
        if not header.classes or not {*header.counted} <= {*header.classes}:
            raise ValueError("classes that are counted are missing")
    except FileNotFoundError as error:
        raise MissingScoresError(f"{place} has no {SCORES}") from error
    except OSError as error:
        raise DataError(describe_read_error(error, path)) from error
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged ({error}); run unet evaluate again") from error
    return header


def read_counts(
    path: Path, classes: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str | None, ...], NDArray[np.uint32]]:
    """Read keys, groups and counts, uint32 [N, 2 + 3 K], of the images in scores.csv."""
    names = [f"{count}/{name}" for count in COUNTS for name in classes]
    keys, groups, rows = list[str](), list[str | None](), list[NDArray[np.uint32]]()
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = csv.reader(file, strict=True)
            header = next(lines, [])
            if missing := [name for name in (*FIRST_COLUMNS, *names) if name not in header]:
                raise ValueError(f"no column {missing[0]}")
            key, group = header.index("key"), header.index("group")
            columns = [header.index(name) for name in ("width", "height", *names)]
            for row in lines:
                keys.append(row[key])
                groups.append(row[group] or None)
                rows.append(parse_counts([row[column] for column in columns]))
    except OSError as error:
        raise DataError(describe_read_error(error, path)) from error
    except (ValueError, IndexError, csv.Error) as error:
        raise DataError(f"{path} is damaged ({error}); run unet evaluate again") from error
    if len({*keys}) < len(keys):
        raise DataError(f"{path} has two images of one key; pack them under unique names")
    return tuple(keys), tuple(groups), np.array(rows, np.uint32).reshape(len(keys), len(columns))


def parse_counts(cells: Sequence[str]) -> NDArray[np.uint32]:
    """Parse the numbers of pixels of an image. Raises ValueError for anything else."""
    if not all(cell.isascii() and cell.isdigit() and int(cell) < MAX_PIXELS for cell in cells):
        raise ValueError("a count is not a number of pixels")
    return np.array([int(cell) for cell in cells], np.uint32)
