"""`unet report`: one HTML page about a run, that opens from disk, without a network or a script."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import run_command
from pipelines.devices import start
from pipelines.summary import write_report


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Write a page about a run: curves, scores, confusion, the worst and best pictures, settings.

    Also of a run that goes on. Scores are those of `unet evaluate` where it was given this
    checkpoint, else of at most 64 validation pictures.
    """

    run_dir: Path
    """Folder of the run."""
    out: Path | None = None
    """The page; left out: report.html in the run folder."""
    data: str | None = None
    """Folder of shards or URL, where the data of the run has moved."""
    pictures: bool = True
    """Read pictures of the data and predict them with the best checkpoint."""


def run(config: ReportConfig) -> int:
    """Write it, on one rank."""
    accelerator = start()
    if accelerator.is_main_process:
        path = write_report(
            config.run_dir,
            accelerator,
            out=config.out,
            data=config.data,
            pictures=config.pictures,
        )
        print(f"report: {path}")
    accelerator.end_training()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_command(ReportConfig, run, argv, "report")


if __name__ == "__main__":
    sys.exit(main())
