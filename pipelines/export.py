"""`unet export`: write a checkpoint as one portable file, verified against the model."""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from pipelines.model.export_file import (
    TOLERANCE,
    RunFile,
    compare_logits,
    one_line,
    quiet,
    read_onnx,
    read_torch,
    refuse_windows,
    sides_name,
    size_name,
    sizes_to_try,
    write_onnx,
    write_torch,
)
from pipelines.model.load import LoadedModel, load_models, refuse_no_checkpoint
from pipelines.runtime.command import run_command
from pipelines.runtime.errors import RunError, UsageError
from pipelines.runtime.outputs import compare, read_previous, require_writable_file
from shards.writer import flush_to_disk, name_path

SUFFIX = {"onnx": ".onnx", "torch": ".pt2"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Write a checkpoint as one file that onnxruntime or torch can run without this package.

    It maps `image`, uint8 [batch, channels, height, width], to `logits`, float32 [batch, classes,
    height, width]. Normalisation and padding are included; classes, palette and the data spec are
    its metadata. The file is loaded again and compared with the model at several sizes before it
    gets its name; an existing file is replaced.
    """

    checkpoint: tuple[str, ...]
    """Run folder (its best, else last, checkpoint), checkpoint folder or hub id. Several, or the
    folder of runs fold-1, fold-2, ...: an ensemble in one file,
    whose logits are the logarithms of the averaged probabilities."""
    out: Path
    """The file to write: .onnx, or .pt2 with `--format torch`."""
    format: Literal["onnx", "torch"] = "onnx"
    """`onnx`: for onnxruntime and others that read ONNX. `torch`: for torch.export.load."""

    def __post_init__(self) -> None:
        refuse_no_checkpoint(self.checkpoint)
        suffix = SUFFIX[self.format]
        if self.out.suffix != suffix:
            raise ValueError(f"--out {self.out} must end in {suffix} with --format {self.format}")


def run(config: ExportConfig) -> int:
    """Export, verify and rename the file, and print what was verified."""
    if config.format == "onnx":
        require_onnx()
    require_writable_file("--out", config.out)
    loaded = load_models(config.checkpoint)
    for member in loaded.members:
        refuse_windows(member)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with (
        name_path(config.out),
        tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=config.out.parent) as folder,
    ):
        file = Path(folder) / config.out.name
        run_file = export(loaded, config.format, file)
        difference = compare_logits(loaded, run_file)
        num_bytes = sum(part.stat().st_size for part in file.parent.iterdir())
        done = compare(read_previous(config.out), file.read_bytes())
        rename_into_place(file, config.out)
    sizes = ", ".join(size_name(size) for size in sizes_to_try(loaded))
    print(f"{config.out}: {num_bytes / 1e6:,.1f} MB, for images of {sides_name(loaded)}{done}")
    print(
        f"verified on {sizes}: logits differ from the model's by at most "
        f"{difference:.1g} of the largest (allowed: {TOLERANCE:.1g})"
    )
    return 0


def require_onnx() -> None:
    """Raise UsageError if a library that writes or runs ONNX is missing."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]
    if missing:
        raise UsageError(
            f"--format onnx requires {' and '.join(missing)}: pip install 'unet-shards[export]'"
        )


def export(loaded: LoadedModel, form: str, file: Path) -> RunFile:
    """Write the file and load it again. Raises RunError if torch or onnxruntime fails."""
    try:
        with quiet():
            if form == "onnx":
                write_onnx(loaded, file)
                return read_onnx(file)
            write_torch(loaded, file)
            return read_torch(file)
    except OSError:
        raise
    except Exception as error:  # exporters raise whatever the graph provokes
        raise RunError(
            f"torch {torch.__version__} cannot export this model as {form}: {one_line(error)}"
        ) from error


def rename_into_place(file: Path, out: Path) -> None:
    """Rename the file, after its companion, so that a visible file is always complete."""
    parts = sorted(file.parent.iterdir(), key=lambda part: part == file)
    if len(parts) > 1:
        # An old graph would otherwise be read with the new weights.
        out.unlink(missing_ok=True)
    for part in parts:
        flush_to_disk(part)
        part.replace(out.with_name(part.name))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return run_command(ExportConfig, run, argv, "export")


if __name__ == "__main__":
    sys.exit(main())
