"""`unet report`: one HTML page about a run, which opens offline and without scripts."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.reporting.compose import write_report
from pipelines.runtime.command import run_command
from pipelines.runtime.devices import start
from pipelines.runtime.outputs import require_writable_file
from pipelines.runtime.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """Write a page about a run: curves, scores, confusion, worst and best images, settings.

    The run may still be training. Scores are those of `unet evaluate` if it has scored the best
    checkpoint, else of at most 64 validation images.
    """

    run_dir: Path
    """Run folder."""
    out: Path | None = None
    """File to write. Default: report.html in the run folder."""
    data: str | None = None
    """Folder of shards or URL, if the data has moved since training."""
    pictures: bool = True
    """Show images of the data with predictions of the best checkpoint."""


def run(config: ReportConfig) -> int:
    """Write the report on the main process."""
    page = config.out or RunFolder(config.run_dir).report
    if config.run_dir.is_dir():
        require_writable_file("--out", page, "use --out to write the report elsewhere")
    accelerator = start()
    if accelerator.is_main_process:
        written = write_report(
            config.run_dir,
            accelerator,
            out=config.out,
            data=config.data,
            images=config.pictures,
        )
        print(f"report: {written}")
    accelerator.end_training()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(ReportConfig, run, argv, "report")


if __name__ == "__main__":
    sys.exit(main())
