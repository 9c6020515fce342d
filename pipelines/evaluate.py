"""`unet evaluate`: score a checkpoint or stored predictions, exactly, on any number of ranks."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import ClassVar

from accelerate import Accelerator

from pipelines.evaluation import score
from pipelines.evaluation.breakdown import read_labels
from pipelines.evaluation.evidence import (
    OF_MODEL,
    Evidence,
    EvidenceOptions,
    refuse_impossible,
)
from pipelines.evaluation.examples import predict_examples
from pipelines.evaluation.groups import GROUP
from pipelines.evaluation.held_out import CROSS_VALIDATED, HeldOut, hold_out, score_folds
from pipelines.evaluation.per_image import open_counts
from pipelines.evaluation.results import MAX_WORST, TILES, ScoredSplit, record_tiles, write_results
from pipelines.evaluation.score import count_split
from pipelines.evaluation.stored_predictions import open_predictions, read_folds
from pipelines.evaluation.suspects import write_suspects
from pipelines.loading.dataset import DataSet, LoadingOptions, open_data, split_bytes_in_use
from pipelines.model.forward import place_model
from pipelines.model.load import (
    EnsemblePlace,
    LoadedModel,
    expand_folds,
    find_checkpoint,
    list_folds,
    load_models,
)
from pipelines.model.temperature import apply_calibration
from pipelines.runtime.command import run_command
from pipelines.runtime.devices import choose_batch_size, refuse_rank_timeout, start
from pipelines.runtime.errors import RunError, UsageError
from pipelines.runtime.failures import is_out_of_memory, summarise_error
from pipelines.runtime.outputs import require_writable
from pipelines.runtime.terminal import print_lines
from pipelines.runtime.yaml_flags import Flat, refuse_unused
from shards.manifest import Manifest, read_manifest
from shards.masks.borders import has_scipy, needs_scipy
from shards.sample import DataError
from shards.store import is_url
from unet import DataSpec, MaskRule, TileConfig
from unet.metrics import Empty
from unet.spec import counted_classes
from unet.surface import SurfaceScores

SURFACE_TOLERANCE = 2.0


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

    USAGE: ClassVar[str] = "--checkpoint CHECKPOINT --data SHARDS"
    """Arguments of the usual call, which `--help` lists first."""
    data: str
    """Folder of shards, or a URL such as s3://bucket/folder."""
    checkpoint: tuple[str, ...] = ()
    """Run folder (its best, else last, checkpoint), checkpoint folder or hub id. Several, or the
    folder of runs fold-1, fold-2, ...: an ensemble, which averages their probabilities."""
    ensemble_on: EnsemblePlace = "device"
    """Memory that holds the models of an ensemble: all on the device, or all on the host, from
    where each is copied for every batch of tiles."""
    predictions: str | None = None
    """Instead of a checkpoint: the output of unet predict, a folder or a URL. Masks are matched to
    images by key."""
    split: str = "val"
    """Split to score on. Of a run of unet train --fold, val is what that fold held out.
    cross-validated: train and val, each image by the model, of the folds, that held it out."""
    out: Path | None = None
    """Folder for scores.json, scores.csv and worst. Default: the folder that is scored."""
    rank_timeout: float = 60
    """Minutes that a rank waits for the others, after scoring its own images."""
    worst: int = MAX_WORST
    """Number of images with the lowest Dice to draw into OUT/worst: image, mask, prediction and
    difference, side by side."""
    metrics: Flat[MetricOptions] = field(default_factory=MetricOptions)
    evidence: Flat[EvidenceOptions] = field(default_factory=EvidenceOptions)
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
            refuse_unused(
                self.evidence, "requires --checkpoint; masks have no probabilities", *OF_MODEL
            )
        self.evidence.refuse_conflicts(self.split)
        if self.predictions is not None and self.ensemble_on == "host":
            raise ValueError("--ensemble-on host requires --checkpoint")
        if self.split == CROSS_VALIDATED and self.predictions is not None:
            raise ValueError(
                f"--split {CROSS_VALIDATED} requires --checkpoint RUNS, the runs of unet train "
                "--folds"
            )
        if self.split == CROSS_VALIDATED and self.ensemble_on == "host":
            raise ValueError(
                f"--ensemble-on host has no effect with --split {CROSS_VALIDATED}: one model is on "
                "the device at a time"
            )
        if self.worst < 0:
            raise ValueError(f"--worst must be >= 0, got {self.worst}")


def run(config: EvaluateConfig) -> int:
    """Score the split; print the table; write scores.json, scores.csv and the worst images."""
    if config.metrics.surface and not has_scipy():
        raise UsageError(needs_scipy("--surface"))
    manifest = read_manifest(config.data, "--data")
    refuse_impossible(config.evidence, config.checkpoint, manifest.classes)
    out = folder_of(config)
    loaded, messages = None, list[str]()
    if config.checkpoint:
        on_host = config.ensemble_on == "host" or config.split == CROSS_VALIDATED
        loaded = load_models(config.checkpoint, on_host=on_host)
        refuse_incompatible_checkpoint(config, loaded.spec, manifest)
        messages = loaded.describe_differences(manifest.image_format)
        if config.evidence.calibrated:
            loaded, more = apply_calibration(loaded, config.checkpoint, config.tiles)
            messages += more
        # The model was trained with its own range of 16-bit values.
        manifest = replace(manifest, image_format=loaded.stored_format(manifest.image_format))
    held_out = choose_images(config, manifest, loaded)
    messages += [held_out.message] * bool(held_out.message)
    held_out.manifest.split(config.split, config.data)
    require_writable("--out", out, "use --out to write the scores elsewhere")
    accelerator = start(rank_timeout=config.rank_timeout)
    if accelerator.is_main_process and messages:
        print_lines(messages, sys.stderr)
    batch_size = choose_batch_size(config.tiles.batch_size, accelerator.device)
    config = replace(config, tiles=replace(config.tiles, batch_size=batch_size))
    score_and_write(config, out, held_out, loaded, accelerator)
    accelerator.end_training()
    return 0


def choose_images(
    config: EvaluateConfig, manifest: Manifest, loaded: LoadedModel | None
) -> HeldOut:
    """Return the data set in which the split has no images that a model of a fold trained on.

    Raises UsageError or DataError as `hold_out`.
    """
    if loaded is not None:
        paths = (path for one in config.checkpoint for path in expand_folds(one))
        names, folds = [f"--checkpoint {path}" for path in paths], loaded.folds
    else:
        assert config.predictions is not None
        folds = read_folds(config.predictions)
        names = [f"the model of --predictions {config.predictions}"] * len(folds)
    return hold_out(manifest, config.data, config.split, names, folds)


def score_and_write(
    config: EvaluateConfig,
    out: Path,
    held_out: HeldOut,
    loaded: LoadedModel | None,
    accelerator: Accelerator,
) -> None:
    """Score every image of the split on all ranks; print and write the results on the first."""
    manifest = held_out.manifest
    data = open_data(
        config.data,
        config.loading,
        manifest,
        [config.split],
        accelerator,
        split_bytes_in_use(manifest, config.split),
        "raise it",
    )
    labels = None
    if config.metrics.per is not None:
        labels = read_labels(config.metrics.per, config.metrics.columns, data, config.split)
    surface = open_surface(config.metrics, manifest, accelerator)
    images = open_counts(data, config.split, config.tiles, accelerator)
    evidence = Evidence(config.evidence, loaded, data, images, accelerator)
    measured = score.Metrics(
        config.metrics.empty, surface, images, evidence.objects, evidence.probabilities
    )
    if loaded is not None:
        scored = score_model(config, loaded, held_out, accelerator, data, measured)
    else:
        scored = score_predictions(config, accelerator, data, measured)
    surface_scores = None if surface is None else surface.scores()
    findings = evidence.find(config.split)
    rows = images.gather(accelerator)
    if rows is not None:
        write_results(
            out,
            data,
            config.split,
            scored,
            rows,
            empty=config.metrics.empty,
            surface=surface_scores,
            labels=labels,
            findings=findings,
            max_worst=config.worst,
        )
        if number := config.evidence.suspects:
            write_suspects(out, number, data, config.split, rows, scored.load_examples)
        evidence.store_temperature(config.checkpoint, config.tiles)


def open_surface(
    metrics: MetricOptions, manifest: Manifest, accelerator: Accelerator
) -> SurfaceScores | None:
    """Make the boundary scores on the device; None if they were not asked for."""
    if not metrics.surface:
        return None
    counted = counted_classes(manifest.classes)
    scores = SurfaceScores(manifest.classes, counted, metrics.surface_tolerance)
    return scores.to(accelerator.device)


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


def score_model(
    config: EvaluateConfig,
    loaded: LoadedModel,
    held_out: HeldOut,
    accelerator: Accelerator,
    data: DataSet,
    measured: score.Metrics,
) -> ScoredSplit:
    """Predict and score every image of the split. Raises RunError if GPU memory runs out."""
    loaded.refuse_unused(config.tiles)
    model = loaded.model
    try:
        if config.split == CROSS_VALIDATED:
            return score_folds(loaded, held_out, accelerator, data, config.tiles, measured)
        place_model(model, accelerator.device)
        rule = MaskRule(temperature=loaded.temperature)
        scores = score.score(
            model, accelerator, data, config.split, config.tiles, measured, rule=rule
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"the GPU ({accelerator.device}) is out of memory ({summarise_error(error)}); "
            "lower --batch-size or --tile"
            + ", or use --ensemble-on host"
            * (len(loaded.members) > 1 and config.split != CROSS_VALIDATED)
        ) from error
    load_examples = partial(
        predict_examples, model, accelerator, data, config.split, tiles=config.tiles
    )
    about = {"checkpoint": loaded.digest, **record_tiles(config.tiles)}
    return ScoredSplit(scores, about, load_examples)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return run_command(EvaluateConfig, run, argv, "evaluate")


if __name__ == "__main__":
    sys.exit(main())
