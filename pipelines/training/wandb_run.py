"""What a wandb run holds besides metrics: its place, masks, summaries and the lineage of artifacts.

wandb is only reached through the run that Accelerate started, which has imported it.
"""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.drawing.panels import Example
from pipelines.model.checkpoint_files import hash_file
from shards.manifest import MANIFEST, Manifest
from shards.sample import IGNORE, Uint8
from shards.store import is_url
from unet.weights import WEIGHTS

MAX_NAME = 128
"""Characters in the name of an artifact."""


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


def record_data(run: Any, data: str, manifest: Manifest) -> None:
    """Declare the data set as an input of a run: its URL and the sha256 of its manifest."""
    place = data.rstrip("/") if is_url(data) else Path(data).resolve().as_uri()
    name = name_artifact("data", place.rsplit("/", 1)[-1])
    counts = {name: split.samples for name, split in manifest.splits.items()}
    about = {"classes": [*manifest.classes], "samples": counts}
    artifact = refer(name, "dataset", MANIFEST, f"{place}/{MANIFEST}", manifest.digest, about)
    # run.use_artifact is this, but waits for the server, and refuses offline runs.
    run._log_artifact(artifact, is_user_created=True, use_after_commit=True)


def record_model(run: Any, checkpoint: Path, run_id: str, *, upload: bool) -> None:
    """Declare a checkpoint as an output of a run: its path and the sha256 of its weights.

    `upload`: upload its files.
    """
    name = name_artifact(run_id, "best")
    if upload:
        run.log_artifact(str(checkpoint), name=name, type="model")
        return
    weights = checkpoint / WEIGHTS
    run.log_artifact(refer(name, "model", WEIGHTS, weights.as_uri(), hash_file(weights), {}))


def refer(name: str, kind: str, file: str, url: str, sha256: str, metadata: dict[str, Any]) -> Any:
    """Return an artifact that refers to a file by URL and sha256: neither is read or uploaded."""
    wandb = sys.modules["wandb"]
    artifact = wandb.Artifact(name, type=kind, metadata={**metadata, "sha256": sha256})
    # add_reference would read local files, need boto3 for S3, and take no other digest.
    entry = wandb.sdk.artifacts.artifact_manifest_entry.ArtifactManifestEntry
    artifact.manifest.add_entry(entry(path=file, ref=url, digest=sha256))
    return artifact


def name_artifact(*parts: str) -> str:
    """Join parts to a name that wandb accepts."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(parts))[:MAX_NAME]
