"""`unet compare`: whether scores on the same images differ, with intervals and p-values."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.evaluation.comparison import compare, format_comparison
from pipelines.evaluation.stored_scores import read_stored_scores
from pipelines.reporting.comparison_page import render_comparisons
from pipelines.runtime.command import run_command
from pipelines.runtime.errors import refuse_url
from pipelines.runtime.outputs import require_writable
from pipelines.runtime.yaml_flags import Positional
from shards.writer import write_atomically, write_json

COMPARISON = "comparison.json"
PAGE = "comparison.html"


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """Compare scores on the same images: each folder with the first, with p-values.

    The folders hold the output of unet evaluate: runs, checkpoints, predicted masks, or its --out.
    Prints the difference per class with its interval and p-value, and writes them as JSON and as
    one page with a scatter plot and the images that changed most.
    """

    folder: Positional[tuple[Path, ...]]
    """Folders that unet evaluate has scored, at least two: A B [C ...]."""
    out: Path = Path("comparison")
    """Folder for comparison.json and comparison.html."""

    def __post_init__(self) -> None:
        for place in self.folder:
            refuse_url("unet compare", place)
        refuse_url("--out", self.out)
        if len(self.folder) < 2:
            raise ValueError(f"give at least two folders, got {len(self.folder)}")
        if twice := [str(place) for place in self.folder if self.folder.count(place) > 1]:
            raise ValueError(f"{twice[0]} is listed twice; name each folder once")


def run(config: CompareConfig) -> int:
    """Compare each folder with the first; print the tables; write the JSON file and the page."""
    first, *others = (read_stored_scores(place) for place in config.folder)
    require_writable("--out", config.out)
    comparisons = [compare(first, other) for other in others]
    print("\n\n".join(format_comparison(comparison) for comparison in comparisons))
    plain = {"comparisons": [comparison.to_plain() for comparison in comparisons]}
    config.out.mkdir(parents=True, exist_ok=True)
    write_json(config.out / COMPARISON, plain)
    page = render_comparisons(comparisons)
    write_atomically(config.out / PAGE, page.encode("utf-8", "backslashreplace"))
    print(f"{config.out / COMPARISON}, {PAGE}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(CompareConfig, run, argv, "compare")


if __name__ == "__main__":
    sys.exit(main())
