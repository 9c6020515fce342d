"""Results of the best checkpoint of a run: scores, and the worst and best images."""

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

from pipelines.drawing.panels import draw_panels
from pipelines.evaluation.breakdown import read_breakdown
from pipelines.evaluation.calibration import read_calibration
from pipelines.evaluation.examples import predict_examples
from pipelines.evaluation.groups import number_groups, read_groups
from pipelines.evaluation.intervals import estimate_intervals, read_intervals
from pipelines.evaluation.objects import read_objects
from pipelines.evaluation.per_image import SCORES_CSV, Floats, ImageCounts, image_scores, lowest
from pipelines.evaluation.table import to_plain
from pipelines.loading.dataset import DataSet
from pipelines.loading.sample_size import choose_num_images
from pipelines.model.load import LoadedModel, load_model, require_spec
from pipelines.reporting.page import Gallery, Strip
from pipelines.reporting.run_record import RunRecord, number, read_json
from pipelines.runtime.errors import parse_part
from pipelines.runtime.progress import progress
from pipelines.runtime.run_folder import RunFolder
from shards.folds import assign_folds
from shards.manifest import Manifest, SplitInfo, read_manifest
from shards.sample import DataError
from shards.store import Store
from unet import TileConfig, UNet
from unet.metrics import SegmentationScores, confusion_per_image

MAX_SCORED = 64
"""Images that are scored if `unet evaluate` has not scored them all."""
MIN_SCORED, SCORED_SHARE = 8, 0.05
"""Images to score also after a short training, else by the work of scoring as a share of it."""
WORST, BEST = 6, 4
"""Number of images to show."""
SIDE = 320
"""Longest side of an image on the page, in pixels: ten rows of four stay below 6 MB."""
SMALL = 160
"""Images up to this side are shown with visible pixels."""


@dataclass(frozen=True, slots=True)
class CheckpointResults:
    """Results of the best checkpoint; fields are empty when their source is missing."""

    loaded: LoadedModel | None = None
    manifest: Manifest | None = None
    """Of the training data, if it still exists."""
    scores: dict[str, Any] | None = None
    """As in `scores.json`."""
    of: str = ""
    """Which images the scores cover."""
    galleries: tuple[Gallery, ...] = ()
    among: str = ""
    """Which images the galleries were chosen from."""
    notes: tuple[str, ...] = ()
    """What is missing, a sentence each."""


def load_results(
    record: RunRecord, accelerator: Accelerator, place: str | None, *, images: bool
) -> CheckpointResults:
    """Load the best checkpoint, read the scores of `unet evaluate` or score a sample, and draw.

    `place` is the location of the data, if it has moved; `images` is whether data is read at all.
    Runs on one process, without meeting other ranks.
    """
    folder = RunFolder(record.run_dir)
    if not folder.best.is_dir() and not folder.last.is_dir():
        return CheckpointResults(notes=("There are no images: the run has no checkpoint yet.",))
    try:
        loaded = load_model(str(record.run_dir))
    except DataError as error:
        return CheckpointResults(notes=(f"No images: {error}.",))
    notes: list[str] = []
    scores = read_scores(record, loaded, notes)
    split = scores["split"] if scores else "val"
    results = CheckpointResults(
        loaded=loaded, scores=scores, of=describe_coverage(scores) if scores else ""
    )
    if not images:
        return replace(results, notes=tuple(notes))
    place = place or record.setting("data")
    try:
        manifest = open_manifest(record, place)
        results = replace(results, manifest=manifest)
        manifest = replace(manifest, image_format=loaded.stored_format(manifest.image_format))
        data = DataSet(Store(str(place)), manifest, None, workers=0)
        model = loaded.members[0].to(accelerator.device)
        results = draw_extremes(results, record, data, split, model, accelerator)
    except (DataError, OSError) as error:
        notes.append(f"No images: {error}.")
    return replace(results, notes=tuple(notes))


def describe_coverage(scores: dict[str, Any]) -> str:
    """Describe which images scores.json covers, and whether with test-time augmentation."""
    mirrored = ", with test-time augmentation (--tta)" if scores.get("tta") is True else ""
    return f"all {scores['split']} images{mirrored}"


def read_scores(record: RunRecord, loaded: LoadedModel, notes: list[str]) -> dict[str, Any] | None:
    """Read RUN/scores.json if it belongs to these weights and to the data of the run."""
    path = RunFolder(record.run_dir).scores
    scores = read_json(path, notes)
    if not scores:
        return None
    if scores.get("checkpoint") != loaded.digest:
        notes.append(f"{path.name} belongs to another checkpoint and is not shown.")
        return None
    if scores.get("manifest") != trained_on(record):
        notes.append(f"{path.name} belongs to other data than the training data and is not shown.")
        return None
    if not is_scores(scores, loaded.spec.classes):
        notes.append(f"{path.name} is damaged.")
        return None
    return scores


def is_scores(plain: dict[str, Any], classes: tuple[str, ...]) -> bool:
    """Return whether `plain` has the form that `unet evaluate` writes for these classes."""
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
        and has_valid_details(plain)
    )


def has_valid_details(plain: dict[str, Any]) -> bool:
    """Return whether what was measured on request, if anything, is not damaged."""
    try:
        read_calibration(plain)
        read_objects(plain)
        read_intervals(plain)
        read_breakdown(plain)
    except ValueError:
        return False
    return True


def trained_on(record: RunRecord) -> Any:
    """Return the sha256 of the manifest of the training data; None if unknown."""
    fixed = record.last.get("fixed")
    return fixed.get("manifest") if isinstance(fixed, dict) else None


def open_manifest(record: RunRecord, place: Any) -> Manifest:
    """Read the manifest of the training data. Raises DataError if it is missing or has changed."""
    if not isinstance(place, str):
        raise DataError("the location of the training data is unknown; set it with --data")
    manifest = read_manifest(place)
    if manifest.digest != trained_on(record):
        raise DataError(f"{place} is not the data that the run was trained on")
    if (fold := record.setting("fold")) is not None:
        number, count = parse_part("fold", str(fold))
        return assign_folds(place, manifest, count).hold_out(number)
    return manifest


def draw_extremes(
    results: CheckpointResults,
    record: RunRecord,
    data: DataSet,
    split: str,
    model: UNet,
    accelerator: Accelerator,
) -> CheckpointResults:
    """Draw the worst and the best images of a split.

    Raises DataError if a sample cannot be read.
    """
    num_images = data.manifest.split(split, data.store).samples
    tiles = read_tiles(record, results.scores or {})
    dice = read_dice(record.run_dir / SCORES_CSV, num_images) if results.scores else None
    among = results.of
    if dice is None:
        num_scored = choose_num_scored(record, data.manifest.splits[split])
        scores, dice, among = score_sample(model, accelerator, data, split, tiles, num_scored)
        results = replace(results, scores=results.scores or scores, of=results.of or among)
    known = int((~np.isnan(dice)).sum())
    best = lowest(-dice, min(BEST, known // 2))
    worst = lowest(dice, min(WORST, known - len(best)))
    galleries = []
    for title, positions in (("The worst", worst), ("The best", best)):
        examples = predict_examples(model, accelerator, data, split, positions, tiles)
        strips = tuple(
            Strip(
                example.key,
                float(dice[position]),
                encode(draw_panels(example, data.manifest.palette, SIDE)),
                small=max(example.mask.shape) <= SMALL,
            )
            for position, example in zip(positions, examples, strict=True)
        )
        if strips:
            galleries.append(Gallery(title, strips))
    return replace(results, galleries=tuple(galleries), among=among)


def read_tiles(record: RunRecord, scores: dict[str, Any]) -> TileConfig:
    """Return the tiles of these scores, else of validation, else the default."""
    configured = record.setting("tiles")
    known = {**(configured if isinstance(configured, dict) else {}), **scores}
    try:
        return TileConfig(**{f.name: known[f.name] for f in fields(TileConfig) if f.name in known})
    except (TypeError, ValueError):
        return TileConfig()


def read_dice(path: Path, num_images: int) -> Floats | None:
    """Read the column `dice` of scores.csv, float64 [N], NaN where empty; None if N differs."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            cells = (line["dice"] for line in csv.DictReader(file))
            dice = np.array([float(cell) if cell else np.nan for cell in cells])
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return None
    return dice if len(dice) == num_images else None


def choose_num_scored(record: RunRecord, split: SplitInfo) -> int:
    """Choose how many images to score: at most `MAX_SCORED`, less after a short training."""
    position, crop = number(record.last.get("position")), number(record.setting("crop_size"))
    affordable = MAX_SCORED
    if position is not None and crop is not None:
        pixels = round(position * crop**2)
        affordable = choose_num_images(
            split, trained_pixels=pixels, share=SCORED_SHARE, min_images=MIN_SCORED
        )
    return min(split.samples, MAX_SCORED, affordable)


def score_sample(
    model: UNet,
    accelerator: Accelerator,
    data: DataSet,
    split: str,
    tiles: TileConfig,
    num_scored: int,
) -> tuple[dict[str, Any], Floats, str]:
    """Score `num_scored` images, evenly spread over a split.

    Returns the contents of `scores.json`, the Dice of each image of the split [N] (NaN where it
    was not scored), and a description of the images.
    """
    spec = require_spec(model)
    num_images = data.manifest.splits[split].samples
    positions = [number * num_images // num_scored for number in range(num_scored)]
    counts = ImageCounts((num_scored,), len(spec.classes), batch_size=1, rank=0, world=1)
    metric = SegmentationScores(spec.classes, spec.counted)
    # Only this rank is here.
    metric.distributed_available_fn = lambda: False
    examples = predict_examples(model, accelerator, data, split, positions, tiles)
    with progress(total=num_scored, desc="report", unit="image") as bar:
        for number, example in enumerate(examples):
            prediction = torch.tensor(example.prediction)[None]
            mask = torch.tensor(example.mask)[None]
            confusion = confusion_per_image(prediction, mask, len(spec.classes))
            metric.add(confusion)
            counts.update(confusion, torch.tensor([number]), example.mask.shape)
            bar.update()
    dice = np.full(num_images, np.nan)
    dice[positions] = image_scores(counts.rows, spec.counted).macro[:, 0]
    of = (
        f"all {split} images"
        if num_scored == num_images
        else f"{num_scored} of {num_images:,} {split} images, evenly spread"
    )
    units = number_groups(read_groups(data, split, positions))
    intervals = estimate_intervals(counts.rows, spec.classes, spec.counted, units=units)
    return to_plain(metric.scores(), intervals=intervals), dice, of


def encode(parts: list[Image.Image]) -> tuple[str, ...]:
    """Encode image, mask, prediction and difference as data: URIs."""
    image, mask, prediction, difference = parts
    return (
        data_uri(image, "jpeg", quality=82),
        data_uri(mask.quantize(256, dither=Image.Dither.NONE), "png", optimize=True),
        data_uri(prediction.quantize(256, dither=Image.Dither.NONE), "png", optimize=True),
        data_uri(difference, "jpeg", quality=82),
    )


def data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    """Encode an image as a data: URI."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
