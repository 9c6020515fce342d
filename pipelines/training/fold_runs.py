"""The runs of `unet train --folds`: one folder each, in the order of the folds."""

import os
from dataclasses import replace

from pipelines.model.load import list_folds
from pipelines.runtime.errors import UsageError
from pipelines.runtime.run_folder import RunFolder
from pipelines.training.options import TrainConfig


def plan_folds(config: TrainConfig, count: int) -> list[TrainConfig]:
    """Return the configuration of each fold.

    Raises UsageError if the folder holds other runs, or in a sweep.
    """
    if config.tracking.backend == "wandb" and "WANDB_SWEEP_ID" in os.environ:
        raise UsageError(
            f"--folds {count}: a wandb agent starts one run per process, not {count}; sweep with "
            f"--fold 1/{count}"
        )
    if RunFolder(config.run_dir).checkpoints.is_dir():
        raise UsageError(
            f"--run-dir {config.run_dir}: is a run itself; --folds takes the folder of the runs "
            "fold-1, fold-2, ..."
        )
    folds = [
        replace(
            config,
            folds=None,
            fold=f"{number}/{count}",
            run_dir=config.run_dir / f"fold-{number}",
        )
        for number in range(1, count + 1)
    ]
    if others := [*{*list_folds(config.run_dir)} - {fold.run_dir for fold in folds}]:
        raise UsageError(
            f"--run-dir {config.run_dir}: has {min(others).name}, which is none of --folds "
            f"{count}; choose another folder, or move it"
        )
    return folds
