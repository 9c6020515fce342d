"""`unet evaluate`: exact scores of a checkpoint on a split, for any number of ranks."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import isfinite
from pathlib import Path

from accelerate import Accelerator

from pipelines import scoring
from pipelines.checkpoint import find_checkpoint, load_model
from pipelines.config import UsageError, run_command
from pipelines.dataset import DataConfig, DataSet, open_data, split_in_use
from pipelines.devices import start
from pipelines.gallery import panels, predict_some, side_by_side
from pipelines.per_image import SCORES_CSV, Floats, ImageCounts, lowest, write_scores
from shards.images import encode_png
from shards.index import Manifest, read_manifest
from shards.sample import DataError
from shards.writer import write_atomically, write_json
from unet import DataSpec, Empty, SurfaceScores, TileConfig, UNet

SURFACE_TOLERANCE = 2.0
WORST = "worst"
"""Folder of the worst pictures, beside the scores."""
WORST_SIDE = 1000
"""Longest side of a picture in there, in pixels."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataConfig, TileConfig):
    """Score a checkpoint on every picture of a split, at its own size."""

    checkpoint: str
    """Run folder (its best, else last, checkpoint), checkpoint folder or hub id."""
    split: str = "val"
    """Split to score on."""
    out: Path | None = None
    """Folder for scores.json, scores.csv and worst; left out: the run or checkpoint folder."""
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
    if config.out is None and not isinstance(find_checkpoint(config.checkpoint), Path):
        raise UsageError(
            f"--checkpoint {config.checkpoint} is no folder here: say where scores go with --out"
        )
    loaded = load_model(config.checkpoint)
    out = config.out or Path(config.checkpoint)
    refuse_other_data(config, loaded.spec, manifest)
    # The range of 16-bit pictures is part of what the model has learned.
    manifest = replace(manifest, image_format=loaded.image_format)
    accelerator = start()
    model = loaded.model.to(accelerator.device)
    in_use = split_in_use(manifest, config.split)
    data = open_data(config, manifest, [config.split], accelerator, in_use, "raise it")
    spec, surface = loaded.spec, None
    if config.surface:
        tolerance = config.surface_tolerance
        surface = SurfaceScores(spec.classes, spec.counted, tolerance).to(accelerator.device)
    images = ImageCounts(
        tuple(shard.samples for shard in split.shards),
        len(spec.classes),
        batch_size=config.batch_size,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
    )
    scores = scoring.score(
        model,
        accelerator,
        data,
        config.split,
        config,
        empty=config.empty,
        surface=surface,
        images=images,
    )
    surface_scores = None if surface is None else surface.scores()
    rows = images.gather(accelerator)
    if rows is not None:
        out.mkdir(parents=True, exist_ok=True)
        # Written last, so that what lies beside it belongs to it.
        (out / scoring.SCORES).unlink(missing_ok=True)
        dice = write_scores(
            out / SCORES_CSV, rows, data, config.split, spec.classes, spec.counted, config.empty
        )
        about = {"split": config.split, "checkpoint": loaded.digest, "manifest": manifest.digest}
        tiles = {name: getattr(config, name) for name in ("tile", "overlap", "tta")}
        plain = {**about, **tiles, **scoring.to_plain(scores, surface_scores)}
        write_json(out / scoring.SCORES, plain)
        print(scoring.table(scores, surface_scores))
        where = f"{out / scoring.SCORES}, {SCORES_CSV}"
        print(f"{scores.num_images} pictures of {config.split}: {where}")
        draw_worst(out / WORST, config, model, accelerator, data, dice)
    accelerator.end_training()
    return 0


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
    config: EvaluateConfig,
    model: UNet,
    accelerator: Accelerator,
    data: DataSet,
    dice: Floats,
) -> None:
    """Predict the pictures with the lowest `dice` [N] again and draw them, the worst first."""
    for old in folder.glob("[0-9]*-[01].[0-9][0-9][0-9][0-9]-*.png"):
        old.unlink()
    positions = lowest(dice, config.worst)
    if not positions:
        return
    folder.mkdir(exist_ok=True)
    again = predict_some(model, accelerator, data, config.split, positions, config)
    for number, (position, shown) in enumerate(zip(positions, again, strict=True), 1):
        # A key of shards that others wrote may be anything.
        key = re.sub(r"[^A-Za-z0-9_%-]", "_", shown.key)[-90:]
        name = f"{number:0{len(str(len(positions)))}d}-{dice[position]:.4f}-{key}.png"
        drawn = side_by_side(panels(shown, data.manifest.palette, WORST_SIDE))
        write_atomically(folder / name, encode_png(drawn))
    print(f"the worst {len(positions)}: {folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_command(EvaluateConfig, run, argv, "evaluate")


if __name__ == "__main__":
    sys.exit(main())
