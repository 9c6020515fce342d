"""`unet compare`: whether scores on the same images differ, with intervals and p-values."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines import cli
from pipelines.evaluation.comparison import compare, format_comparison
from pipelines.evaluation.stored_scores import read_stored_scores
from pipelines.evaluation.unscored import find_unscored
from pipelines.reporting.comparison_page import render_comparisons
from pipelines.runtime.command import run_command
from pipelines.runtime.outputs import require_writable
from pipelines.runtime.yaml_flags import Positional
from shards.sample import DataError
from shards.writer import write_atomically, write_json

COMPARISON = "comparison.json"
PAGE = "comparison.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """Compare scores on the same images: each folder with the first, with p-values.

    The folders are runs, checkpoints, outputs of unet predict, or what unet evaluate wrote to its
    --out. Those without scores are scored first, with --data. Prints the difference per class with
    its interval and p-value, and writes them as JSON and as one page with a scatter plot and the
    images that changed most.
    """

    folder: Positional[tuple[Path, ...]]
    """Folders to compare, at least two: A B [C ...]."""
    data: str | None = None
    """Folder of shards, or a URL: score the folders without scores on it, as unet evaluate does."""
    split: str | None = None
    """Split that is compared. Default: that of the scores; val if no folder has any."""
    out: Path = Path("comparison")
    """Folder for comparison.json and comparison.html."""

    def __post_init__(self) -> None:
        if len(self.folder) < 2:
            raise ValueError(
                f"give at least two folders, got {len(self.folder)}; for example: "
                "unet compare RUN1 RUN2"
            )
        if twice := [str(place) for place in self.folder if self.folder.count(place) > 1]:
            raise ValueError(f"{twice[0]} is listed twice; name each folder once")


def run(config: CompareConfig) -> int:
    """Compare each folder with the first; print the tables; write the JSON file and the page."""
    require_writable("--out", config.out)
    if code := score_missing(config):
        return code
    first, *others = (read_stored_scores(place) for place in config.folder)
    comparisons = [compare(first, other) for other in others]
    print("\n\n".join(format_comparison(comparison) for comparison in comparisons))
    plain = {"comparisons": [comparison.to_plain() for comparison in comparisons]}
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / COMPARISON, plain)
    page = render_comparisons(comparisons)
    write_atomically(config.out / PAGE, page.encode("utf-8", "backslashreplace"))
    print(f"{config.out / COMPARISON}, {PAGE}")
    return 0


def score_missing(config: CompareConfig) -> int:
    """Score the folders without scores, as `unet evaluate`; return the exit code of a failed one.

    Raises DataError with the commands if --data is missing, or if there are several processes.
    """
    unscored, split = find_unscored(config.folder, config.split)
    commands = [folder.arguments(config.data, split) for folder in unscored]
    lines = [shlex.join(["unet", *command]) for command in commands]
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if lines and (config.data is None or not alone):
        reasons = ", ".join(folder.reason for folder in unscored)
        remedy = "add --data SHARDS" if alone else "run unet compare in one process"
        raise DataError(f"{reasons}; {remedy}, or run: {' && '.join(lines)}")
    for line, command in zip(lines, commands, strict=True):
        print(line, flush=True)
        if code := cli.main(command):
            return code
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(CompareConfig, run, argv, "compare")


if __name__ == "__main__":
    sys.exit(main())
