"""`unet evaluate`: score a checkpoint or stored predictions, exactly, on any number of ranks."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from pipelines.drawing.panels import Example, draw_panels, side_by_side
from pipelines.evaluation import score, table
from pipelines.evaluation.breakdown import (
    PARTS_CSV,
    Labels,
    break_down,
    format_parts,
    read_labels,
    write_parts,
)
from pipelines.evaluation.examples import predict_examples
from pipelines.evaluation.groups import GROUP, number_groups, read_groups
from pipelines.evaluation.intervals import estimate_intervals
from pipelines.evaluation.per_image import SCORES_CSV, Floats, ImageCounts, lowest, write_scores
from pipelines.evaluation.score import count_split
from pipelines.evaluation.stored_predictions import open_predictions
from pipelines.loading.dataset import DataSet, LoadingOptions, open_data, split_bytes_in_use
from pipelines.model.checkpoint_files import read_state
from pipelines.model.forward import place_model
from pipelines.model.load import (
    EnsemblePlace,
    LoadedModel,
    expand_folds,
    find_checkpoint,
    list_folds,
    load_models,
)
from pipelines.runtime.command import run_command
from pipelines.runtime.devices import choose_batch_size, refuse_rank_timeout, start
from pipelines.runtime.errors import RunError, UsageError
from pipelines.runtime.failures import out_of_memory, summary
from pipelines.runtime.outputs import compare, read_previous, require_writable
from pipelines.runtime.run_folder import CHECKPOINT_STATE, SCORES
from pipelines.runtime.yaml_flags import Flat, refuse_unused
from shards.images.files import encode_png
from shards.manifest import Manifest, read_manifest
from shards.sample import DataError, Palette
from shards.store import is_url
from shards.writer import write_atomically, write_json
from unet import DataSpec, Empty, Scores, Surface, SurfaceScores, TileConfig
from unet.spec import counted_classes

TILES = ("tile", "overlap", "tta")
"""Settings of prediction that scores.json records."""
SURFACE_TOLERANCE = 2.0
WORST = "worst"
"""Folder of the worst images, beside the scores."""
WORST_SIDE = 1000
"""Longest side of an image in that folder, in pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricOptions:
    """Metrics."""

    empty: Empty = "skip"
    """Dice and IoU of a class that is absent from both mask and prediction, of an image or of the
    split: excluded from means, 1, or 0."""
    surface: bool = False
    """Also score boundaries per image, on the CPU: HD95 in pixels, and surface Dice. Requires
    unet-shards[scipy]."""
    surface_tolerance: float = SURFACE_TOLERANCE
    """Distance in pixels up to which boundaries agree, for surface Dice."""

    per: str | None = None
    """Also score the images of each group (`pack --group-by`), or of each value of a column of
    --columns: hospital, scanner, ..."""
    columns: Path | None = None
    """CSV file with a row per image: its key, as in scores.csv, or its path in the packed folder,
    and more columns."""

    def __post_init__(self) -> None:
        if self.columns is not None and self.per is None:
            raise ValueError("--columns requires --per COLUMN")
        if self.per not in (None, GROUP) and self.columns is None:
            raise ValueError(f"--per {self.per} requires --columns FILE.csv, which has that column")
        if not (isfinite(self.surface_tolerance) and self.surface_tolerance >= 0):
            raise ValueError(
                f"--surface-tolerance must be a number >= 0, got {self.surface_tolerance}"
            )
        if not self.surface:
            refuse_unused(self, "requires --surface", "surface_tolerance")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Score a checkpoint, or stored predictions, on every image of a split."""

    USAGE: ClassVar[str] = "--checkpoint CHECKPOINT --data DATA"
    """Arguments of the usual call, which `--help` lists first."""
    data: str
    """Folder of shards, or a URL such as s3://bucket/folder."""
    checkpoint: tuple[str, ...] = ()
    """Run folder (its best, else last, checkpoint), checkpoint folder or hub id. Several, or the
    folder of the runs of unet train --folds: an ensemble, which averages their probabilities."""
    ensemble_on: EnsemblePlace = "device"
    """Memory that holds the models of an ensemble: all on the device, or all on the host, from
    where each is copied for every batch of tiles."""
    predictions: str | None = None
    """Instead of a checkpoint: the output of unet predict, a folder or a URL. Masks are matched to
    images by key."""
    split: str = "val"
    """Split to score on."""
    out: Path | None = None
    """Folder for scores.json, scores.csv and worst. Default: the folder that is scored."""
    rank_timeout: float = 60
    """Minutes that a rank waits for the others, after scoring its own images."""
    worst: int = 8
    """Number of images with the lowest Dice to draw into OUT/worst: image, mask, prediction and
    difference, side by side."""
    metrics: Flat[MetricOptions] = field(default_factory=MetricOptions)
    tiles: Flat[TileConfig] = field(default_factory=TileConfig)
    loading: Flat[LoadingOptions] = field(default_factory=LoadingOptions)

    def __post_init__(self) -> None:
        refuse_rank_timeout(self.rank_timeout)
        self.loading.refuse_local_cache(self.data)
        if bool(self.checkpoint) == (self.predictions is not None):
            raise ValueError("give either --checkpoint or --predictions")
        if self.predictions is not None:
            refuse_unused(
                self.tiles, "requires --checkpoint; --predictions are already made", *TILES
            )
        if self.predictions is not None and self.ensemble_on == "host":
            raise ValueError("--ensemble-on host requires --checkpoint")
        if self.worst < 0:
            raise ValueError(f"--worst must be >= 0, got {self.worst}")


def run(config: EvaluateConfig) -> int:
    """Score the split; print the table; write scores.json, scores.csv and the worst images."""
    if config.metrics.surface and find_spec("scipy") is None:
        raise UsageError("--surface requires SciPy: pip install 'unet-shards[scipy]'")
    manifest = read_manifest(config.data, "--data")
    split = manifest.split(config.split, config.data)
    out = folder_of(config)
    loaded, differences = None, list[str]()
    if config.checkpoint:
        refuse_trained_on(config)
        loaded = load_models(config.checkpoint, on_host=config.ensemble_on == "host")
        refuse_incompatible_checkpoint(config, loaded.spec, manifest)
        differences = loaded.describe_differences(manifest.image_format)
        # The model was trained with its own range of 16-bit values.
        manifest = replace(manifest, image_format=loaded.stored_format(manifest.image_format))
    require_writable("--out", out, "use --out to write the scores elsewhere")
    accelerator = start(rank_timeout=config.rank_timeout)
    if accelerator.is_main_process and differences:
        print("\n".join(differences), file=sys.stderr)
    batch_size = choose_batch_size(config.tiles.batch_size, accelerator.device)
    config = replace(config, tiles=replace(config.tiles, batch_size=batch_size))
    in_use = split_bytes_in_use(manifest, config.split)
    data = open_data(
        config.data, config.loading, manifest, [config.split], accelerator, in_use, "raise it"
    )
    labels = None
    if config.metrics.per is not None:
        labels = read_labels(config.metrics.per, config.metrics.columns, data, config.split)
    surface = None
    if config.metrics.surface:
        counted, tolerance = counted_classes(manifest.classes), config.metrics.surface_tolerance
        surface = SurfaceScores(manifest.classes, counted, tolerance).to(accelerator.device)
    images = ImageCounts(
        tuple(shard.samples for shard in split.shards),
        len(manifest.classes),
        batch_size=config.tiles.effective_batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    measured = score.Metrics(config.metrics.empty, surface, images)
    if loaded is not None:
        scored = score_model(config, loaded, accelerator, data, measured)
    else:
        scored = score_predictions(config, accelerator, data, measured)
    surface_scores = None if surface is None else surface.scores()
    rows = images.gather(accelerator)
    if rows is not None:
        write_results(config, out, data, scored, surface_scores, rows, labels)
    accelerator.end_training()
    return 0


def refuse_trained_on(config: EvaluateConfig) -> None:
    """Raise UsageError if train or val would be scored by a model of a fold of both."""
    if config.split not in ("train", "val"):
        return
    for path in (path for one in config.checkpoint for path in expand_folds(one)):
        folder = find_checkpoint(path)
        if not isinstance(folder, Path) or not (folder / CHECKPOINT_STATE).exists():
            continue
        fixed = read_state(folder, dict[str, Any])[0].get("fixed")
        if isinstance(fixed, dict) and fixed.get("fold") is not None:
            raise UsageError(
                f"--split {config.split}: --checkpoint {path} was trained with --fold "
                f"{fixed['fold']} on a part of these images; use --split test"
            )


def write_results(
    config: EvaluateConfig,
    out: Path,
    data: DataSet,
    scored: "ScoredSplit",
    surface: Surface | None,
    rows: NDArray[np.uint32],
    labels: Labels | None,
) -> None:
    """Print the tables; write scores.json, scores.csv, groups.csv and the worst images.

    `rows`: counts per image of the whole split, from `ImageCounts.gather`.
    """
    manifest, split, empty = data.manifest, config.split, config.metrics.empty
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
    (out / PARTS_CSV).unlink(missing_ok=True)
    dice = write_scores(
        out / SCORES_CSV, rows, data, split, manifest.classes, counted, empty, groups
    )
    if labels is not None:
        parts = break_down(labels, rows, groups, manifest.classes, counted, empty)
        print(format_parts(parts))
        write_parts(out / PARTS_CSV, parts)
        plain["groups"] = asdict(parts)
    about = {"split": split, "manifest": manifest.digest, **scored.about}
    write_json(out / SCORES, {**about, **plain})
    done = compare(previous, (out / SCORES).read_bytes())
    print(f"{scored.scores.num_images} images of {split}: {out / SCORES}, {SCORES_CSV}{done}")
    draw_worst(out / WORST, config.worst, scored.load_examples, manifest.palette, dice)


def folder_of(config: EvaluateConfig) -> Path:
    """Return the folder for the scores. Raises UsageError if --out is required and missing."""
    if config.out is not None:
        return config.out
    flag, scored = "checkpoint", " ".join(config.checkpoint)
    if config.predictions is not None:
        flag, scored = "predictions", config.predictions
        is_local = not is_url(scored)
    else:
        is_local = len(config.checkpoint) == 1 and (
            bool(list_folds(Path(scored))) or isinstance(find_checkpoint(scored), Path)
        )
    if not is_local:
        raise UsageError(
            f"--{flag} {scored} is not a local folder; use --out to choose where scores are written"
        )
    return Path(scored)


@dataclass(frozen=True, slots=True)
class ScoredSplit:
    """The scores of a split and where they come from."""

    scores: Scores
    about: dict[str, Any]
    """Provenance, as recorded in scores.json."""
    load_examples: Callable[[Sequence[int]], Iterator[Example]]
    """Load the images at some positions of the split, with mask and prediction."""


def score_model(
    config: EvaluateConfig,
    loaded: LoadedModel,
    accelerator: Accelerator,
    data: DataSet,
    measured: score.Metrics,
) -> ScoredSplit:
    """Predict and score every image of the split. Raises RunError if GPU memory runs out."""
    model = loaded.model
    try:
        place_model(model, accelerator.device)
        scores = score.score(model, accelerator, data, config.split, config.tiles, measured)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise RunError(
            f"the GPU ({accelerator.device}) is out of memory ({summary(error)}); "
            "lower --batch-size or --tile"
            + ", or use --ensemble-on host"
            * (len(loaded.members) > 1)
        ) from error
    load_examples = partial(
        predict_examples, model, accelerator, data, config.split, tiles=config.tiles
    )
    tiles = {name: getattr(config.tiles, name) for name in TILES}
    return ScoredSplit(scores, {"checkpoint": loaded.digest, **tiles}, load_examples)


def score_predictions(
    config: EvaluateConfig,
    accelerator: Accelerator,
    data: DataSet,
    measured: score.Metrics,
) -> ScoredSplit:
    """Score the stored prediction of every image of the split."""
    assert config.predictions is not None
    predictions = open_predictions(config.predictions, data, config.split)
    if predictions.num_others and accelerator.is_main_process:
        print(
            f"{config.predictions}: ignoring {predictions.num_others} masks of images that "
            "are not in "
            f"{config.split}",
            file=sys.stderr,
        )
    scores = count_split(
        predictions.attach,
        accelerator,
        data,
        config.split,
        config.tiles.effective_batch_size,
        measured,
    )
    # As for a checkpoint, as far as job.json records it.
    about = {name: predictions.job.get(name) for name in ("checkpoint", *TILES)}
    return ScoredSplit(
        scores, {**about, "predictions": predictions.manifest.digest}, predictions.load_examples
    )


def refuse_incompatible_checkpoint(
    config: EvaluateConfig, spec: DataSpec, manifest: Manifest
) -> None:
    """Raise DataError if a checkpoint has other classes or channels than the data."""
    checkpoint = config.checkpoint[0]
    if spec.classes != manifest.classes:
        raise DataError(
            f"--checkpoint {checkpoint} has the classes {', '.join(spec.classes)}, --data "
            f"{config.data} has {', '.join(manifest.classes) or 'none'}; they must be the same"
        )
    if spec.channels != manifest.image_format.channels:
        raise DataError(
            f"--checkpoint {checkpoint} was trained on {spec.channels} images, --data "
            f"{config.data} has {manifest.image_format.channels}; they must be the same"
        )


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return run_command(EvaluateConfig, run, argv, "evaluate")


if __name__ == "__main__":
    sys.exit(main())
