"""The fold that a checkpoint of `unet train --fold` was trained on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.model.checkpoint_files import read_state
from pipelines.runtime.errors import parse_part
from pipelines.runtime.run_folder import CHECKPOINT_STATE
from shards.documents import Sha256
from shards.sample import DataError


@dataclass(frozen=True, slots=True)
class TrainedFold:
    """The fold of a model: it was trained on all samples of train and val but these."""

    fold: str
    """i/k, as `--fold` takes it."""
    manifest: Sha256
    """sha256 of the manifest of its data."""

    @property
    def number(self) -> int:
        """Number of the fold, from 1."""
        return parse_part("fold", self.fold)[0]

    @property
    def count(self) -> int:
        """Number of folds."""
        return parse_part("fold", self.fold)[1]


def read_trained_fold(folder: Path) -> TrainedFold | None:
    """Read the fold of a checkpoint; None if it was trained on the whole train split.

    Raises DataError if its state is damaged.
    """
    if not (folder / CHECKPOINT_STATE).exists():
        return None  # weights without a run
    state, _ = read_state(folder, dict[str, Any])
    fixed = state.get("fixed")
    if not isinstance(fixed, dict) or fixed.get("fold") is None:
        return None
    try:
        parse_part("fold", str(fixed["fold"]))
    except ValueError as error:
        raise DataError(f"{folder / CHECKPOINT_STATE} is damaged ({error})") from error
    return TrainedFold(str(fixed["fold"]), str(fixed.get("manifest")))
