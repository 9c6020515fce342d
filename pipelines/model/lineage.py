"""Lineage in wandb: data sets and models as inputs and outputs of a run, by URL and sha256.

wandb is only reached through the run that Accelerate started, which has imported it.
"""

import re
import sys
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_url

from pipelines.model.checkpoint_files import hash_file, read_state
from pipelines.model.load import find_checkpoint
from pipelines.runtime.run_folder import CHECKPOINT_STATE, RunFolder
from shards.manifest import MANIFEST, Manifest
from shards.store import is_url
from unet.weights import WEIGHTS

BEST = "best"
"""Suffix of the name of a run's best checkpoint; of the last one, if it did not validate."""
MAX_NAME = 128
"""Characters in the name of an artifact."""


def record_data(run: Any, data: str, manifest: Manifest, *, output: bool = False) -> None:
    """Declare a data set as input or output of a run: its URL and the sha256 of its manifest."""
    place = data.rstrip("/") if is_url(data) else Path(data).resolve().as_uri()
    name = name_artifact("data", place.rsplit("/", 1)[-1])
    counts = {name: split.samples for name, split in manifest.splits.items()}
    about = {"classes": [*manifest.classes], "samples": counts}
    artifact = refer(name, "dataset", MANIFEST, f"{place}/{MANIFEST}", manifest.digest, about)
    if output:
        run.log_artifact(artifact)
    else:
        use(run, artifact)


def record_model(run: Any, checkpoint: Path, run_id: str, *, upload: bool) -> None:
    """Declare the best checkpoint as an output of a run: its path and the sha256 of its weights.

    `upload`: upload its files.
    """
    name = name_artifact(run_id, BEST)
    if upload:
        run.log_artifact(str(checkpoint), name=name, type="model")
        return
    weights = checkpoint / WEIGHTS
    run.log_artifact(refer(name, "model", WEIGHTS, weights.as_uri(), hash_file(weights), {}))


def record_used_model(run: Any, checkpoint: str, sha256: str) -> None:
    """Declare a checkpoint as an input of a run, under the name that its training gave it.

    Args:
        run: the wandb run.
        checkpoint: run folder, checkpoint folder or hub id.
        sha256: of its weights.
    """
    found = find_checkpoint(checkpoint)
    if isinstance(found, str):
        name, url = name_artifact(*found.split("/")), hf_hub_url(found, WEIGHTS)
    else:
        name, url = name_checkpoint(found.resolve()), (found.resolve() / WEIGHTS).as_uri()
    use(run, refer(name, "model", WEIGHTS, url, sha256, {}))


def name_checkpoint(folder: Path) -> str:
    """Name a checkpoint after its training and whether it is the best; others after their folder.

    `folder`: absolute, RUN/checkpoints/step-00012000 in a run folder.
    """
    if not (folder / CHECKPOINT_STATE).exists():
        return name_artifact("model", folder.name)
    run_id = read_state(folder, dict[str, Any])[0].get("tracking_id") or folder.parents[1].name
    run = RunFolder(folder.parents[1])
    recorded = run.best if run.best.is_dir() else run.last
    return name_artifact(str(run_id), BEST if recorded.resolve() == folder else folder.name)


def use(run: Any, artifact: Any) -> None:
    """Declare an artifact as an input of a run."""
    # run.use_artifact is this, but waits for the server, and refuses offline runs.
    run._log_artifact(artifact, is_user_created=True, use_after_commit=True)


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
