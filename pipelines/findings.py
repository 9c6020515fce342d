"""What the best checkpoint of a run makes of its data: scores, and the worst and best pictures."""

import base64
import csv
import io
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from pipelines.checkpoint import CHECKPOINTS, LoadedModel, load_model, require_spec
from pipelines.dataset import DataSet
from pipelines.gallery import panels, predict_some
from pipelines.page import Gallery, Strip
from pipelines.per_image import SCORES_CSV, Floats, ImageCounts, image_scores, lowest
from pipelines.progress import progress
from pipelines.record import Record, read_json
from pipelines.scoring import SCORES
from shards.index import Manifest, read_manifest
from shards.sample import DataError
from shards.store import Store
from unet import SegmentationScores, TileConfig, UNet

MOST_SCORED = 64
"""Pictures that are scored where `unet evaluate` has not scored them all."""
WORST, BEST = 6, 4
"""Pictures that are shown."""
SIDE = 320
"""Longest side of a picture on the page, in pixels: ten times four of them stay below 6 MB."""
SMALL = 160
"""Pictures with no longer side show their pixels."""


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found. All that depends on something that is no longer there is empty."""

    loaded: LoadedModel | None = None
    manifest: Manifest | None = None
    """Of the data that the run was trained on, where it is still there."""
    scores: dict[str, Any] | None = None
    """As in `scores.json`."""
    of: str = ""
    """Which pictures the scores are of."""
    galleries: tuple[Gallery, ...] = ()
    among: str = ""
    """Which pictures those shown were chosen from."""
    notes: tuple[str, ...] = ()
    """What could not be found, a sentence each."""


def find(
    record: Record, accelerator: Accelerator, place: str | None, *, pictures: bool
) -> Findings:
    """Load the best checkpoint, take the scores of `unet evaluate` or score some, and draw.

    `place`: of the data, if not where the run had it. `pictures`: whether data is read at all.
    This process does it alone, without meeting other ranks.
    """
    checkpoints = record.run_dir / CHECKPOINTS
    if not any((checkpoints / name).is_dir() for name in ("best", "last")):
        return Findings(notes=("There is no checkpoint yet, and so no pictures.",))
    try:
        loaded = load_model(str(record.run_dir))
    except DataError as error:
        return Findings(notes=(f"No pictures: {error}.",))
    notes: list[str] = []
    scores = read_scores(record, loaded, notes)
    split = scores["split"] if scores else "val"
    found = Findings(loaded=loaded, scores=scores, of=which(scores) if scores else "")
    if not pictures:
        return replace(found, notes=tuple(notes))
    place = place or record.setting("data")
    try:
        manifest = open_manifest(record, place)
        found = replace(found, manifest=manifest)
        manifest = replace(manifest, image_format=loaded.image_format)
        data = DataSet(Store(str(place)), manifest, None, workers=0)
        found = look(found, record, data, split, loaded.model.to(accelerator.device), accelerator)
    except (DataError, OSError) as error:
        notes.append(f"No pictures: {error}.")
    return replace(found, notes=tuple(notes))


def which(scores: dict[str, Any]) -> str:
    """Which pictures scores.json is of, and if they were predicted in an uncommon way."""
    mirrored = ", each with its mirror images (--tta)" if scores.get("tta") is True else ""
    return f"all {scores['split']} pictures{mirrored}"


def read_scores(record: Record, loaded: LoadedModel, notes: list[str]) -> dict[str, Any] | None:
    """RUN/scores.json, if it is of these weights and of the run's own data."""
    scores = read_json(record.run_dir / SCORES, notes)
    if not scores:
        return None
    if scores.get("checkpoint") != loaded.digest:
        notes.append(f"{SCORES} is of another checkpoint; it is left out.")
        return None
    if scores.get("manifest") != trained_on(record):
        notes.append(f"{SCORES} is of other data than the run was trained on; it is left out.")
        return None
    if not is_scores(scores, loaded.spec.classes):
        notes.append(f"{SCORES} is damaged.")
        return None
    return scores


def is_scores(plain: dict[str, Any], classes: tuple[str, ...]) -> bool:
    """Whether this is what `unet evaluate` writes of these classes."""
    confusion, counted = plain.get("confusion"), plain.get("counted")
    objects = [plain.get(name) for name in ("classes", "macro", "micro", "per_image")]
    objects += objects[0].values() if isinstance(objects[0], dict) else []
    return (
        all(isinstance(part, dict) for part in objects)
        and tuple(plain["classes"]) == classes
        and isinstance(plain.get("split"), str)
        and isinstance(counted, list)
        and isinstance(confusion, list)
        and [len(row) for row in confusion if isinstance(row, list)]
        == [len(classes)] * len(classes)
        and all(isinstance(pixels, int) for row in confusion for pixels in row)
    )


def trained_on(record: Record) -> Any:
    """sha256 of the manifest of the run's data; None where it is not known."""
    fixed = record.last.get("fixed")
    return fixed.get("manifest") if isinstance(fixed, dict) else None


def open_manifest(record: Record, place: Any) -> Manifest:
    """The manifest of the run's data. Raises DataError where it is gone or has changed."""
    if not isinstance(place, str):
        raise DataError("where the data is, is not known; say it with --data")
    manifest = read_manifest(place)
    if manifest.digest != trained_on(record):
        raise DataError(f"{place} is not the data set that the run was trained on")
    return manifest


def look(
    found: Findings,
    record: Record,
    data: DataSet,
    split: str,
    model: UNet,
    accelerator: Accelerator,
) -> Findings:
    """Choose the worst and the best pictures of a split, and draw them.

    Raises DataError for what cannot be read.
    """
    num_images = data.manifest.split(split, data.store).samples
    tiles = tiles_of(record, found.scores or {})
    dice = read_dice(record.run_dir / SCORES_CSV, num_images) if found.scores else None
    among = found.of
    if dice is None:
        scores, dice, among = score_some(model, accelerator, data, split, tiles)
        found = replace(found, scores=found.scores or scores, of=found.of or among)
    known = int((~np.isnan(dice)).sum())
    best = lowest(-dice, min(BEST, known // 2))
    worst = lowest(dice, min(WORST, known - len(best)))
    galleries = []
    for title, positions in (("The worst", worst), ("The best", best)):
        again = predict_some(model, accelerator, data, split, positions, tiles)
        strips = tuple(
            Strip(
                shown.key,
                float(dice[position]),
                encode(panels(shown, data.manifest.palette, SIDE)),
                small=max(shown.mask.shape) <= SMALL,
            )
            for position, shown in zip(positions, again, strict=True)
        )
        if strips:
            galleries.append(Gallery(title, strips))
    return replace(found, galleries=tuple(galleries), among=among)


def tiles_of(record: Record, scores: dict[str, Any]) -> TileConfig:
    """How pictures were cut for these scores, else in validation; by default where that is lost."""
    given = record.setting("tiles")
    told = {**(given if isinstance(given, dict) else {}), **scores}
    try:
        return TileConfig(**{f.name: told[f.name] for f in fields(TileConfig) if f.name in told})
    except (TypeError, ValueError):
        return TileConfig()


def read_dice(path: Path, num_images: int) -> Floats | None:
    """The column `dice` of scores.csv [N], NaN where it is empty; None if it is of other data."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            cells = (line["dice"] for line in csv.DictReader(file))
            dice = np.array([float(cell) if cell else np.nan for cell in cells])
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return None
    return dice if len(dice) == num_images else None


def score_some(
    model: UNet, accelerator: Accelerator, data: DataSet, split: str, tiles: TileConfig
) -> tuple[dict[str, Any], Floats, str]:
    """Scores of at most `MOST_SCORED` pictures, evenly spread over a split.

    Returns what `scores.json` would hold of them, the Dice of each picture of the split [N], NaN
    where it was not looked at, and which pictures they are.
    """
    spec = require_spec(model)
    num_images = data.manifest.splits[split].samples
    most = min(num_images, MOST_SCORED)
    positions = [number * num_images // most for number in range(most)]
    counts = ImageCounts((most,), len(spec.classes), batch_size=1, rank=0, world=1)
    metric = SegmentationScores(spec.classes, spec.counted)
    # Other ranks are not asked.
    metric.distributed_available_fn = lambda: False
    again = predict_some(model, accelerator, data, split, positions, tiles)
    with progress(total=most, desc="report", unit="picture") as bar:
        for number, shown in enumerate(again):
            prediction, mask = torch.tensor(shown.prediction)[None], torch.tensor(shown.mask)[None]
            metric.update(prediction, mask)
            counts.update(prediction, mask, torch.tensor([number]))
            bar.update()
    dice = np.full(num_images, np.nan)
    dice[positions] = image_scores(counts.rows, spec.counted).macro[:, 0]
    of = (
        f"all {split} pictures"
        if most == num_images
        else (f"{most} of {num_images:,} {split} pictures, evenly spread")
    )
    return metric.scores().to_plain(), dice, of


def encode(parts: list[Image.Image]) -> tuple[str, ...]:
    """Picture, truth, prediction and difference as data: URIs."""
    image, mask, prediction, difference = parts
    return (
        data_uri(image, "jpeg", quality=82),
        data_uri(mask.quantize(256, dither=Image.Dither.NONE), "png", optimize=True),
        data_uri(prediction.quantize(256, dither=Image.Dither.NONE), "png", optimize=True),
        data_uri(difference, "jpeg", quality=82),
    )


def data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    """A picture that lies in the page."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
