"""A finished prediction job as a wandb run: what it read and what it wrote, by URL and sha256."""

import sys

from accelerate import Accelerator

from pipelines.inference.input_readers import Inputs, ShardInputs
from pipelines.inference.job import read_state
from pipelines.inference.options import PredictConfig
from pipelines.model.lineage import name_artifact, record_data, record_used_model
from pipelines.model.load import LoadedModel, expand_folds
from pipelines.runtime.wandb_run import find_wandb_run, start_wandb
from shards.manifest import read_manifest
from shards.store import Store

ID_LENGTH = 12
"""Hexadecimal digits of the manifest's sha256 in the id of a run."""


def record_job(
    project: str,
    config: PredictConfig,
    store: Store,
    inputs: Inputs,
    loaded: LoadedModel,
    tracked: Accelerator,
) -> None:
    """Record a finished job in a project of wandb, on the main process.

    Inputs of the run are the models and, if the images came from one, the data set; its output is
    the data set of masks. Nothing is uploaded. A rerun continues the same run, since its id is
    derived from the masks. An error is printed: the masks are complete without it.

    Args:
        project: name of the project.
        config: settings of the job.
        store: the output folder.
        inputs: its images.
        loaded: its model.
        tracked: created with wandb as its tracker.
    """
    try:
        manifest, state = read_manifest(store), read_state(store)
        named = [path for checkpoint in config.checkpoint for path in expand_folds(checkpoint)]
        place = config.out.rstrip("/") if store.local is None else str(store.local.resolve())
        read = {"checkpoint": named, "input": config.input, "out": place}
        start_wandb(
            tracked,
            project,
            {**config.settings(), **read},
            id=f"predict-{manifest.digest[:ID_LENGTH]}",
            name=name_artifact(place.rsplit("/", 1)[-1]),
            job_type="predict",
            dir=None if store.local is None else str(store.local),
        )
        run = find_wandb_run(tracked)
        digests = [loaded.digest] if isinstance(loaded.digest, str) else loaded.digest
        for checkpoint, digest in zip(named, digests, strict=True):
            record_used_model(run, checkpoint, digest)
        if isinstance(inputs, ShardInputs):
            record_data(run, config.input, read_manifest(config.input))
        record_data(run, config.out, manifest, output=True)
        run.summary.update({"images": state.images, "errors": state.errors})
    except Exception as error:  # whatever wandb raises
        print(
            f"warning: the job was not recorded in wandb ({' '.join(str(error).split())[:200]}); "
            f"the masks in {store} are complete",
            file=sys.stderr,
        )
