"""Doubtful masks: the images of a split, ranked by the disagreement of their mask with the model.

The error of a class in an image is 1 - Dice. It is compared with the errors of that class in all
images of the split that have it in mask or prediction: the score is (error - median) / MAD, where
the MAD, the median absolute deviation, is at least 0.01. A class that is difficult everywhere does
not hide one that is wrong here. The largest score over the counted classes ranks the image. A model
that has not seen the image judges best: that of the fold which held it out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.drawing.contact_sheet import CELL, Cell, draw_contact_sheet, shorten
from pipelines.drawing.outlines import LEGEND, draw_outlines
from pipelines.drawing.panels import Example
from pipelines.evaluation.findings import format_csv
from pipelines.evaluation.groups import read_groups
from pipelines.evaluation.per_image import Floats, split_keys
from pipelines.loading.dataset import DataSet
from shards.images.files import encode_png
from shards.writer import write_atomically
from unet.spec import counted_classes

SUSPECTS_CSV, SUSPECTS_PNG = "suspects.csv", "suspects.png"
COLUMNS = ("rank", "key", "group", "score", "class", "dice", "only_in_mask", "only_in_prediction")
MIN_DEVIATION = 0.01
"""Smallest deviation of the errors of a class: where a model is near perfect, all are equal."""
MAX_DRAWN = 60
"""Images on the contact sheet."""
CAPTION = CELL // 7
"""Characters of a caption."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """An image whose mask and prediction differ."""

    position: int
    """In the split."""
    score: float
    class_index: int
    """Of the class with that score."""
    dice: float
    """Of that class in the image."""
    missing: int
    """Pixels of the class in the mask only."""
    added: int
    """Pixels of the class in the prediction only."""

    def cells(self, names: Sequence[str]) -> tuple[object, ...]:
        """Return the cells of suspects.csv after the group; `names`: of the classes."""
        score, dice = round(self.score, 4), round(self.dice, 6)
        return score, names[self.class_index], dice, self.missing, self.added


def write_suspects(
    out: Path,
    max_suspects: int,
    data: DataSet,
    split: str,
    rows: NDArray[np.uint32],
    load_examples: Callable[[Sequence[int]], Iterator[Example]],
) -> None:
    """Write suspects.csv and the contact sheet suspects.png, the largest score first.

    Images whose mask equals the prediction are no suspects.

    Args:
        out: folder.
        max_suspects: number of images.
        data: the data set.
        split: its split.
        rows: counts per image, uint32 [N, 2 + 3 K].
        load_examples: loads the images at some positions of the split.
    """
    names = data.manifest.classes
    found = rank_images(rows, counted_classes(names))[:max_suspects]
    positions = [one.position for one in found]
    wanted, keys = {*positions}, dict[int, str]()
    for position, key in enumerate(split_keys(data, split)):
        if position in wanted:
            keys[position] = key
    lines = (
        (rank, keys[one.position], group, *one.cells(names))
        for rank, (one, group) in enumerate(
            zip(found, read_groups(data, split, positions), strict=True), start=1
        )
    )
    write_atomically(out / SUSPECTS_CSV, format_csv(COLUMNS, lines))
    if not found:
        print(f"no suspects: mask and prediction are equal in every image of {split}")
        return
    shown = found[:MAX_DRAWN]
    images, palette = draw_outlines([*load_examples(positions[:MAX_DRAWN])], CELL)
    cells = []
    for rank, (one, image) in enumerate(zip(shown, images, strict=True), start=1):
        start = f"{rank}, Dice {one.dice:.2f}: "
        key = shorten(keys[one.position], CAPTION - len(start))
        cells.append(Cell(start + key, image, None))
    write_atomically(out / SUSPECTS_PNG, encode_png(draw_contact_sheet(cells, palette, LEGEND)))
    print(f"{len(found)} suspects: {out / SUSPECTS_CSV}, {SUSPECTS_PNG}")


def rank_images(rows: NDArray[np.uint32], counted: tuple[int, ...]) -> list[Suspect]:
    """Rank images by their score, then by their error, from counts uint32 [N, 2 + 3 K].

    Images without a wrong pixel of a counted class are left out.
    """
    if not counted:
        return []
    of = [*counted]
    tp, fp, fn = (part[:, of] for part in np.split(rows[:, 2:].astype(np.int64), 3, axis=1))
    wrong, size = fp + fn, 2 * tp + fp + fn
    error = np.where(size > 0, wrong / np.maximum(size, 1), np.nan)
    scores = np.stack([standardise(column) for column in error.T], axis=1)
    # A class that is absent, or has no wrong pixel, is never the reason.
    scores = np.where(wrong > 0, scores, -np.inf)
    worst = scores.argmax(axis=1)
    every = np.arange(len(rows))
    chosen, errors = scores[every, worst], error[every, worst]
    order = np.lexsort((-errors, -chosen))
    return [
        Suspect(
            n,
            float(chosen[n]),
            of[worst[n]],
            1 - float(errors[n]),
            int(fn[n, worst[n]]),
            int(fp[n, worst[n]]),
        )
        for n in order.tolist()
        if chosen[n] > -np.inf
    ]


def standardise(error: Floats) -> Floats:
    """Return (error - median) / MAD of the errors of a class [N]; NaN where it is absent."""
    known = error[~np.isnan(error)]
    if not len(known):
        return error
    median = np.median(known)
    return (error - median) / max(float(np.median(np.abs(known - median))), MIN_DEVIATION)
