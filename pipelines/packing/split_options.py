"""Options of `check` and `pack`: how samples are split, and identical images in two splits."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.packing.duplicates import DuplicatePolicy
from pipelines.runtime.errors import parse_part
from shards.folders.splits import SplitRule


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitOptions:
    """Train, val and test split."""

    val_fraction: float | None = None
    """Fraction of the samples in val, chosen by a hash of the key; default: 0.1. Where files,
    folders or names of lists declare splits: the fraction of train that becomes val; default: 0."""
    test_fraction: float = 0.0
    """Fraction of the samples in test."""
    group_by: str | None = None
    """Regular expression; images in whose paths it matches the same text stay in one split."""
    fold: str | None = None
    """i/k: of k folds of the samples (or of a declared train), chosen by a hash of the key, fold i
    (from 1) is val."""
    split_file: tuple[Path, ...] = ()
    """A CSV file with the columns path,split; or lists named train.txt, val.txt, test.txt."""
    split_folders: bool = False
    """The first folder in an image's path names its split: train, val, test."""

    def __post_init__(self) -> None:
        self.make_rule()

    def make_rule(self) -> SplitRule:
        """Build the rule that assigns pairs to splits."""
        return SplitRule(
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            group_by=self.group_by,
            fold=None if self.fold is None else parse_part("--fold", self.fold),
            files=self.split_file,
            by_folder=self.split_folders,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DuplicateOptions:
    """Identical images in different splits."""

    duplicates: DuplicatePolicy = "error"
    """Identical images in different splits: refuse them, or keep each with its group in the first
    of their splits (train, val, test)."""
