"""Folders without scores: the arguments of `unet evaluate` that score them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.evaluation.stored_scores import MissingScoresError, read_header, refuse_stale
from pipelines.model.load import list_folds
from pipelines.runtime.run_folder import RunFolder
from pipelines.runtime.strict_yaml import load_typed_yaml, read_text
from shards.manifest import MANIFEST
from shards.sample import DataError
from unet.weights import WEIGHTS


@dataclass(frozen=True, slots=True)
class Unscored:
    """A folder without scores of its weights or masks."""

    place: Path
    reason: str
    """What is missing."""
    flag: str
    """Flag of unet evaluate that takes it: --checkpoint or --predictions."""
    data: str | None
    """Data set that a run was trained on, if known."""

    def arguments(self, data: str | None, split: str) -> list[str]:
        """Return the arguments of `unet` that score it; without `data`, on that of its training."""
        place = data or self.data or "SHARDS"
        return ["evaluate", self.flag, str(self.place), "--data", place, "--split", split]


def find_unscored(places: Sequence[Path], split: str | None) -> tuple[list[Unscored], str]:
    """Return the folders without scores, and the split to score: that of the others, else val.

    `split`: the requested one. Raises DataError if a folder was scored on another one, if its
    scores are damaged, or if it cannot be scored.
    """
    unscored, scored_on = list[Unscored](), dict[str, Path]()
    for place in places:
        try:
            header = read_header(place)
            refuse_stale(place, header)
            scored_on.setdefault(header.split, place)
        except MissingScoresError as error:
            unscored.append(describe_unscored(place, error))
    wanted = split or next(iter(scored_on), "val")
    if others := {name: place for name, place in scored_on.items() if name != wanted}:
        name, place = next(iter(others.items()))
        one = f"--split {split}" if split else f"{scored_on[wanted]} has scores of {wanted}"
        raise DataError(
            f"{one}, {place} has scores of {name}; run unet evaluate on the same split for both"
        )
    return unscored, wanted


def describe_unscored(place: Path, error: MissingScoresError) -> Unscored:
    """Describe how a folder is scored. Raises DataError if it has neither weights nor masks."""
    runs = list_folds(place)
    if runs or RunFolder(place).checkpoints.is_dir() or (place / WEIGHTS).is_file():
        return Unscored(place, str(error), "--checkpoint", find_data(runs[0] if runs else place))
    if (place / MANIFEST).is_file():
        return Unscored(place, str(error), "--predictions", None)
    raise DataError(
        f"{place} holds no run, checkpoint, predictions or scores; name a folder that unet train, "
        "predict or evaluate has written"
    ) from error


def find_data(run_dir: Path) -> str | None:
    """Return the data set that a run was trained on; None if its config.yaml has none."""
    try:
        plain: Any = load_typed_yaml(read_text(RunFolder(run_dir).config))
    except (OSError, DataError, yaml.YAMLError):
        return None
    data = plain.get("data") if isinstance(plain, dict) else None
    return data if isinstance(data, str) else None
