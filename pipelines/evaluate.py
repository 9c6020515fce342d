"""`unet evaluate`: exact scores of a checkpoint, or of predictions, for any number of ranks."""

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

from pipelines import scoring
from pipelines.checkpoint import LoadedModel, find_checkpoint, load_model
from pipelines.config import RunError, UsageError, run_command
from pipelines.counting import count_split
from pipelines.dataset import DataConfig, DataSet, open_data, split_in_use
from pipelines.devices import choose_batch_size, start
from pipelines.failures import out_of_memory, summary
from pipelines.gallery import Predicted, panels, predict_some, side_by_side
from pipelines.per_image import SCORES_CSV, Floats, ImageCounts, lowest, write_scores
from pipelines.predictions import open_predictions
from shards.images import encode_png
from shards.index import Manifest, read_manifest
from shards.sample import DataError, Palette
from shards.store import is_url
from shards.writer import write_atomically, write_json
from unet import DataSpec, Empty, Scores, SurfaceScores, TileConfig
from unet.model import counted_classes

TILES = ("tile", "overlap", "tta")
"""How pictures are predicted; scores.json says it."""
SURFACE_TOLERANCE = 2.0
WORST = "worst"
"""Folder of the worst pictures, beside the scores."""
WORST_SIDE = 1000
"""Longest side of a picture in there, in pixels."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataConfig, TileConfig):
    """Score a checkpoint, or masks that were predicted, on every picture of a split."""

    checkpoint: str | None = None
    """Run folder (its best, else last, checkpoint), checkpoint folder or hub id."""
    predictions: str | None = None
    """Instead of a checkpoint: what unet predict wrote, a folder or a URL. Masks are found by the
    keys of the pictures."""
    split: str = "val"
    """Split to score on."""
    out: Path | None = None
    """Folder for scores.json, scores.csv and worst; left out: the folder that is scored."""
    rank_timeout: float = 60
    """Minutes that a rank waits for the others, once its own pictures are scored, before it takes
    them for lost and ends."""
    worst: int = 8
    """Pictures with the lowest Dice to draw into OUT/worst: picture, truth, prediction and their
    difference, side by side. 0: none."""
    empty: Empty = "skip"
    """Dice and IoU of a class that is neither in a picture's mask nor in its prediction, or in no
    picture at all: in no mean, or 1, or 0."""
    surface: bool = False
    """Also score boundaries for each picture, on the CPU: HD95 in pixels and surface Dice. Needs
    unet-shards[scipy]."""
    surface_tolerance: float = SURFACE_TOLERANCE
    """Pixels that boundaries may lie apart and still agree, for surface Dice."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        TileConfig.__post_init__(self)
        if (self.checkpoint is None) == (self.predictions is None):
            raise ValueError("give either --checkpoint or --predictions")
        if self.predictions is not None:
            for name in TILES:
                if getattr(self, name) != getattr(TileConfig(), name):
                    raise ValueError(f"--{name} is for a --checkpoint; --predictions are made")
        if self.worst < 0:
            raise ValueError(f"--worst {self.worst} is no number of pictures")
        if not (isfinite(self.surface_tolerance) and self.surface_tolerance >= 0):
            raise ValueError(f"--surface-tolerance {self.surface_tolerance} is no number from 0 on")
        if self.surface_tolerance != SURFACE_TOLERANCE and not self.surface:
            raise ValueError("--surface-tolerance needs --surface")


def run(config: EvaluateConfig) -> int:
    """Score, print the table, write the JSON, the CSV and the worst pictures."""
    if config.surface and find_spec("scipy") is None:
        raise UsageError("--surface needs SciPy: pip install 'unet-shards[scipy]'")
    manifest = read_manifest(config.data)
    split = manifest.split(config.split, config.data)
    out = folder_of(config)
    loaded = None
    if config.checkpoint is not None:
        loaded = load_model(config.checkpoint)
        refuse_other_data(config, loaded.spec, manifest)
        # The range of 16-bit pictures is part of what the model has learned.
        manifest = replace(manifest, image_format=loaded.image_format)
    accelerator = start(rank_timeout=config.rank_timeout)
    batch_size = choose_batch_size(config.batch_size, accelerator.device)
    config = replace(config, batch_size=batch_size)
    in_use = split_in_use(manifest, config.split)
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
        # Written last, so that what lies beside it belongs to it.
        (out / scoring.SCORES).unlink(missing_ok=True)
        dice = write_scores(
            out / SCORES_CSV, rows, data, config.split, manifest.classes, counted, config.empty
        )
        about = {"split": config.split, "manifest": manifest.digest, **scored.about}
        plain = {**about, **scoring.to_plain(scored.scores, surface_scores)}
        write_json(out / scoring.SCORES, plain)
        print(scoring.table(scored.scores, surface_scores))
        where = f"{out / scoring.SCORES}, {SCORES_CSV}"
        print(f"{scored.scores.num_images} pictures of {config.split}: {where}")
        draw_worst(out / WORST, config.worst, scored.again, manifest.palette, dice)
    accelerator.end_training()
    return 0


def folder_of(config: EvaluateConfig) -> Path:
    """Where scores go. Raises UsageError where that must be said."""
    if config.out is not None:
        return config.out
    scored = config.checkpoint or config.predictions or ""
    here = not is_url(scored) if config.predictions else isinstance(find_checkpoint(scored), Path)
    if not here:
        flag = "checkpoint" if config.checkpoint else "predictions"
        raise UsageError(f"--{flag} {scored} is no folder here: say where scores go with --out")
    return Path(scored)


@dataclass(frozen=True, slots=True)
class Scored:
    """What was scored, and how it did."""

    scores: Scores
    about: dict[str, Any]
    """What scores.json says of it."""
    again: Callable[[Sequence[int]], Iterator[Predicted]]
    """The pictures at some places of the split, with truth and prediction."""


def score_model(
    config: EvaluateConfig,
    loaded: LoadedModel,
    accelerator: Accelerator,
    data: DataSet,
    surface: SurfaceScores | None,
    images: ImageCounts,
) -> Scored:
    """Predict every picture and score it. Raises RunError where a GPU's memory runs out."""
    model = loaded.model.to(accelerator.device)
    counting = {"empty": config.empty, "surface": surface, "images": images}
    try:
        scores = scoring.score(model, accelerator, data, config.split, config, **counting)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise RunError(
            f"the memory of this GPU ({accelerator.device}) does not suffice ({summary(error)}); "
            "lower --batch-size or --tile"
        ) from error
    again = partial(predict_some, model, accelerator, data, config.split, tiles=config)
    tiles = {name: getattr(config, name) for name in TILES}
    return Scored(scores, {"checkpoint": loaded.digest, **tiles}, again)


def score_predictions(
    config: EvaluateConfig,
    accelerator: Accelerator,
    data: DataSet,
    surface: SurfaceScores | None,
    images: ImageCounts,
) -> Scored:
    """Score every picture by the mask that was predicted for it."""
    assert config.predictions is not None
    predictions = open_predictions(config.predictions, data, config.split)
    if predictions.others and accelerator.is_main_process:
        print(
            f"{config.predictions}: {predictions.others} masks of pictures that are not in "
            f"{config.split}",
            file=sys.stderr,
        )
    scores = count_split(
        predictions.beside,
        accelerator,
        data,
        config.split,
        batch_size=config.num_together,
        empty=config.empty,
        surface=surface,
        images=images,
    )
    # As for a checkpoint, as far as it was written down.
    about = {name: predictions.job.get(name) for name in ("checkpoint", *TILES)}
    return Scored(scores, {**about, "predictions": predictions.manifest.digest}, predictions.some)


def refuse_other_data(config: EvaluateConfig, spec: DataSpec, manifest: Manifest) -> None:
    """Raise DataError where a checkpoint is made for other classes or other pictures."""
    if spec.classes != manifest.classes:
        raise DataError(
            f"{config.checkpoint} knows the classes {', '.join(spec.classes)}, "
            f"{config.data} has {', '.join(manifest.classes) or 'none'}; they must be the same"
        )
    if spec.channels != manifest.image_format.channels:
        raise DataError(
            f"{config.checkpoint} was trained on {spec.channels} pictures, "
            f"{config.data} holds {manifest.image_format.channels}; they must be the same"
        )


def draw_worst(
    folder: Path,
    most: int,
    again: Callable[[Sequence[int]], Iterator[Predicted]],
    palette: Palette,
    dice: Floats,
) -> None:
    """Draw the pictures with the lowest `dice` [N] with truth and prediction, the worst first."""
    for old in folder.glob("[0-9]*-[01].[0-9][0-9][0-9][0-9]-*.png"):
        old.unlink()
    positions = lowest(dice, most)
    if not positions:
        return
    folder.mkdir(exist_ok=True)
    for number, (position, shown) in enumerate(zip(positions, again(positions), strict=True), 1):
        # A key of shards that others wrote may be anything.
        key = re.sub(r"[^A-Za-z0-9_%-]", "_", shown.key)[-90:]
        name = f"{number:0{len(str(len(positions)))}d}-{dice[position]:.4f}-{key}.png"
        drawn = side_by_side(panels(shown, palette, WORST_SIDE))
        write_atomically(folder / name, encode_png(drawn))
    print(f"the worst {len(positions)}: {folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_command(EvaluateConfig, run, argv, "evaluate")


if __name__ == "__main__":
    sys.exit(main())
