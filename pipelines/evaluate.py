"""`unet evaluate`: score a checkpoint or stored predictions, exactly, on any number of ranks."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from pipelines.drawing.panels import Example, draw_panels, side_by_side
from pipelines.evaluation import score, table
from pipelines.evaluation.examples import predict_examples
from pipelines.evaluation.per_image import SCORES_CSV, Floats, ImageCounts, lowest, write_scores
from pipelines.evaluation.score import count_split
from pipelines.evaluation.stored_predictions import open_predictions
from pipelines.loading.dataset import DataConfig, DataSet, open_data, split_bytes_in_use
from pipelines.model.load import LoadedModel, find_checkpoint, load_model
from pipelines.runtime.command import run_command
from pipelines.runtime.devices import choose_batch_size, start
from pipelines.runtime.errors import RunError, UsageError
from pipelines.runtime.failures import out_of_memory, summary
from shards.images.files import encode_png
from shards.manifest import Manifest, read_manifest
from shards.sample import DataError, Palette
from shards.store import is_url
from shards.writer import write_atomically, write_json
from unet import DataSpec, Empty, Scores, SurfaceScores, TileConfig
from unet.spec import counted_classes

TILES = ("tile", "overlap", "tta")
"""Settings of prediction that scores.json records."""
SURFACE_TOLERANCE = 2.0
WORST = "worst"
"""Folder of the worst images, beside the scores."""
WORST_SIDE = 1000
"""Longest side of an image in that folder, in pixels."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataConfig, TileConfig):
    """Score a checkpoint, or stored predictions, on every image of a split."""

    checkpoint: str | None = None
    """Run folder (its best, else last, checkpoint), checkpoint folder or hub id."""
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
    empty: Empty = "skip"
    """Dice and IoU of a class that is absent from both mask and prediction, of an image or of the
    split: excluded from means, 1, or 0."""
    surface: bool = False
    """Also score boundaries per image, on the CPU: HD95 in pixels, and surface Dice. Requires
    unet-shards[scipy]."""
    surface_tolerance: float = SURFACE_TOLERANCE
    """Distance in pixels up to which boundaries agree, for surface Dice."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        TileConfig.__post_init__(self)
        if (self.checkpoint is None) == (self.predictions is None):
            raise ValueError("give either --checkpoint or --predictions")
        if self.predictions is not None:
            for name in TILES:
                if getattr(self, name) != getattr(TileConfig(), name):
                    raise ValueError(
                        f"--{name} requires --checkpoint; --predictions are already made"
                    )
        if self.worst < 0:
            raise ValueError(f"--worst must be >= 0, got {self.worst}")
        if not (isfinite(self.surface_tolerance) and self.surface_tolerance >= 0):
            raise ValueError(
                f"--surface-tolerance must be a number >= 0, got {self.surface_tolerance}"
            )
        if self.surface_tolerance != SURFACE_TOLERANCE and not self.surface:
            raise ValueError("--surface-tolerance requires --surface")


def run(config: EvaluateConfig) -> int:
    """Score the split; print the table; write scores.json, scores.csv and the worst images."""
    if config.surface and find_spec("scipy") is None:
        raise UsageError("--surface requires SciPy: pip install 'unet-shards[scipy]'")
    manifest = read_manifest(config.data)
    split = manifest.split(config.split, config.data)
    out = folder_of(config)
    loaded = None
    if config.checkpoint is not None:
        loaded = load_model(config.checkpoint)
        refuse_incompatible_checkpoint(config, loaded.spec, manifest)
        # The range of 16-bit images is part of what the model has learned.
        manifest = replace(manifest, image_format=loaded.image_format)
    accelerator = start(rank_timeout=config.rank_timeout)
    batch_size = choose_batch_size(config.batch_size, accelerator.device)
    config = replace(config, batch_size=batch_size)
    in_use = split_bytes_in_use(manifest, config.split)
    data = open_data(config, manifest, [config.split], accelerator, in_use, "raise it")
    counted, surface = counted_classes(manifest.classes), None
    if config.surface:
        tolerance = config.surface_tolerance
        surface = SurfaceScores(manifest.classes, counted, tolerance).to(accelerator.device)
    images = ImageCounts(
        tuple(shard.samples for shard in split.shards),
        len(manifest.classes),
        batch_size=config.num_together,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    if loaded is not None:
        scored = score_model(config, loaded, accelerator, data, surface, images)
    else:
        scored = score_predictions(config, accelerator, data, surface, images)
    surface_scores = None if surface is None else surface.scores()
    rows = images.gather(accelerator)
    if rows is not None:
        out.mkdir(parents=True, exist_ok=True)
        # Written last, so that the files beside it always belong to it.
        (out / table.SCORES).unlink(missing_ok=True)
        dice = write_scores(
            out / SCORES_CSV, rows, data, config.split, manifest.classes, counted, config.empty
        )
        about = {"split": config.split, "manifest": manifest.digest, **scored.about}
        plain = {**about, **table.to_plain(scored.scores, surface_scores)}
        write_json(out / table.SCORES, plain)
        print(table.table(scored.scores, surface_scores))
        where = f"{out / table.SCORES}, {SCORES_CSV}"
        print(f"{scored.scores.num_images} images of {config.split}: {where}")
        draw_worst(out / WORST, config.worst, scored.load_examples, manifest.palette, dice)
    accelerator.end_training()
    return 0


def folder_of(config: EvaluateConfig) -> Path:
    """Return the folder for the scores. Raises UsageError if --out is required and missing."""
    if config.out is not None:
        return config.out
    scored = config.checkpoint or config.predictions or ""
    is_local = (
        not is_url(scored) if config.predictions else isinstance(find_checkpoint(scored), Path)
    )
    if not is_local:
        flag = "checkpoint" if config.checkpoint else "predictions"
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
    surface: SurfaceScores | None,
    images: ImageCounts,
) -> ScoredSplit:
    """Predict and score every image of the split. Raises RunError if GPU memory runs out."""
    model = loaded.model.to(accelerator.device)
    counting = {"empty": config.empty, "surface": surface, "images": images}
    try:
        scores = score.score(model, accelerator, data, config.split, config, **counting)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise RunError(
            f"the GPU ({accelerator.device}) is out of memory ({summary(error)}); "
            "lower --batch-size or --tile"
        ) from error
    load_examples = partial(predict_examples, model, accelerator, data, config.split, tiles=config)
    tiles = {name: getattr(config, name) for name in TILES}
    return ScoredSplit(scores, {"checkpoint": loaded.digest, **tiles}, load_examples)


def score_predictions(
    config: EvaluateConfig,
    accelerator: Accelerator,
    data: DataSet,
    surface: SurfaceScores | None,
    images: ImageCounts,
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
        batch_size=config.num_together,
        empty=config.empty,
        surface=surface,
        images=images,
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
    if spec.classes != manifest.classes:
        raise DataError(
            f"--checkpoint {config.checkpoint} has the classes {', '.join(spec.classes)}, --data "
            f"{config.data} has {', '.join(manifest.classes) or 'none'}; they must be the same"
        )
    if spec.channels != manifest.image_format.channels:
        raise DataError(
            f"--checkpoint {config.checkpoint} was trained on {spec.channels} images, --data "
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
