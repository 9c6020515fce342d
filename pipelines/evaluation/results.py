"""The results of scoring a split: printed tables, scores.json, scores.csv and the worst images."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.drawing.panels import Example, draw_panels, side_by_side
from pipelines.evaluation import table
from pipelines.evaluation.breakdown import PARTS_CSV, Labels, break_down, format_parts, write_parts
from pipelines.evaluation.findings import Finding
from pipelines.evaluation.groups import number_groups, read_groups
from pipelines.evaluation.intervals import estimate_intervals
from pipelines.evaluation.per_image import SCORES_CSV, Floats, lowest, write_scores
from pipelines.evaluation.suspects import SUSPECTS_CSV, SUSPECTS_PNG
from pipelines.loading.dataset import DataSet
from pipelines.runtime.outputs import compare, read_previous
from pipelines.runtime.run_folder import SCORES
from shards.images.files import encode_png
from shards.sample import Palette
from shards.writer import write_atomically, write_json
from unet import TileConfig
from unet.metrics import Empty, Scores
from unet.spec import counted_classes
from unet.surface import Surface

TILES = ("tile", "overlap", "tta")
"""Settings of prediction that scores.json records."""
FINDINGS = ("calibration.csv", "objects.csv", SUSPECTS_CSV, SUSPECTS_PNG)
"""Files of what is measured on request; those of an earlier scoring are removed."""
WORST = "worst"
"""Folder of the worst images, beside the scores."""
MAX_WORST = 8
"""Default number of images in that folder."""
WORST_SIDE = 1000
"""Longest side of an image in that folder, in pixels."""


@dataclass(frozen=True, slots=True)
class ScoredSplit:
    """The scores of a split and where they come from."""

    scores: Scores
    about: dict[str, Any]
    """Provenance, as recorded in scores.json."""
    load_examples: Callable[[Sequence[int]], Iterator[Example]]
    """Load the images at some positions of the split, with mask and prediction."""


def record_tiles(tiles: TileConfig) -> dict[str, Any]:
    """Return the settings of prediction as scores.json records them."""
    return {name: getattr(tiles, name) for name in TILES}


def write_results(
    out: Path,
    data: DataSet,
    split: str,
    scored: ScoredSplit,
    rows: NDArray[np.uint32],
    *,
    empty: Empty = "skip",
    surface: Surface | None = None,
    labels: Labels | None = None,
    findings: Sequence[Finding] = (),
    max_worst: int = MAX_WORST,
) -> None:
    """Print the tables; write scores.json, scores.csv, groups.csv and the worst images.

    Args:
        out: folder for the files.
        data: the data set.
        split: the split that was scored.
        scored: its scores.
        rows: counts per image of the whole split, from `ImageCounts.gather`.
        empty: policy for empty masks.
        surface: boundary scores.
        labels: values of the images, for a table of each.
        findings: what else was measured.
        max_worst: number of images to draw.
    """
    manifest = data.manifest
    counted = counted_classes(manifest.classes)
    groups = read_groups(data, split, range(len(rows)))
    units = number_groups(groups)
    intervals = estimate_intervals(rows, manifest.classes, counted, empty, units)
    print(table.table(scored.scores, surface, intervals))
    if units is not None and None in groups:
        print(f"{groups.count(None)} images without a group are resampled one by one")
    plain = table.to_plain(scored.scores, surface, intervals)
    out.mkdir(parents=True, exist_ok=True)
    previous = read_previous(out / SCORES)
    # Written last, so that the files beside it always belong to it.
    (out / SCORES).unlink(missing_ok=True)
    for name in (PARTS_CSV, *FINDINGS):
        (out / name).unlink(missing_ok=True)
    dice = write_scores(
        out / SCORES_CSV, rows, data, split, manifest.classes, counted, empty, groups
    )
    if labels is not None:
        parts = break_down(labels, rows, groups, manifest.classes, counted, empty)
        print(format_parts(parts))
        write_parts(out / PARTS_CSV, parts)
        plain["groups"] = asdict(parts)
    for finding in findings:
        print(finding.table)
        write_atomically(out / finding.file, finding.content)
        plain[finding.name] = finding.plain
    about = {"split": split, "manifest": manifest.digest, **scored.about}
    write_json(out / SCORES, {**about, **plain})
    done = compare(previous, (out / SCORES).read_bytes())
    print(f"{scored.scores.num_images} images of {split}: {out / SCORES}, {SCORES_CSV}{done}")
    draw_worst(out / WORST, max_worst, scored.load_examples, manifest.palette, dice)


def draw_worst(
    folder: Path,
    max_images: int,
    load_examples: Callable[[Sequence[int]], Iterator[Example]],
    palette: Palette,
    dice: Floats,
) -> None:
    """Draw the images with the lowest `dice` [N], with mask and prediction, worst first."""
    for old in folder.glob("[0-9]*-[01].[0-9][0-9][0-9][0-9]-*.png"):
        old.unlink()
    positions = lowest(dice, max_images)
    if not positions:
        return
    folder.mkdir(exist_ok=True)
    examples = zip(positions, load_examples(positions), strict=True)
    for number, (position, example) in enumerate(examples, 1):
        # Keys of foreign shards may hold any character.
        key = re.sub(r"[^A-Za-z0-9_%-]", "_", example.key)[-90:]
        name = f"{number:0{len(str(len(positions)))}d}-{dice[position]:.4f}-{key}.png"
        drawn = side_by_side(draw_panels(example, palette, WORST_SIDE))
        write_atomically(folder / name, encode_png(drawn))
    print(f"worst {len(positions)} images: {folder}")
