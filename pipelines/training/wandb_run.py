"""What the wandb run of a training holds besides metrics: its place, masks and summaries."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.drawing.panels import Example
from shards.manifest import Manifest
from shards.sample import IGNORE, Uint8


def describe_run(run_dir: Path, fold: str | None, group: str | None) -> dict[str, str | None]:
    """Return name, group and job type of a run.

    Args:
        run_dir: run folder, absolute.
        fold: i/k, if it trains a fold.
        group: requested group.
    """
    if fold is None:
        return {"name": run_dir.name, "group": group, "job_type": "train"}
    return {"name": run_dir.name, "group": group or run_dir.parent.name, "job_type": "fold"}


def keep_maxima(run: Any, names: tuple[str, ...]) -> None:
    """Let the summary of a run hold the maxima of these metrics instead of their last values."""
    for name in names:
        run.define_metric(name, summary="max")


def draw_masks(example: Example, manifest: Manifest, max_side: int) -> Any:
    """Return a wandb.Image with mask and prediction as layers, no side longer than `max_side`."""
    height, width = example.mask.shape
    factor = min(1.0, max_side / max(width, height))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))

    def shrink(pixels: Uint8, resample: Image.Resampling) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(pixels)).resize(size, resample)

    names = {**dict(enumerate(manifest.classes)), IGNORE: "ignore"}
    layers = {
        name: {
            "mask_data": np.asarray(shrink(indices, Image.Resampling.NEAREST)),
            "class_labels": names,
        }
        for name, indices in (("prediction", example.prediction), ("ground_truth", example.mask))
    }
    image = np.broadcast_to(example.image, (height, width, 3))
    drawn = shrink(image, Image.Resampling.BOX)
    return sys.modules["wandb"].Image(drawn, masks=layers, caption=example.key)
