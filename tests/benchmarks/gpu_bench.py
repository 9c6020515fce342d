"""Shared by the measurements of gpu.py: sizes and reporting. Does not import torch."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

REPO = Path(__file__).resolve().parents[2]
LOG = "gpu.log"
"""File in --out with the output of all processes."""


TUNED = "samples/s, cudnn.benchmark"
"""Speed of a bare step under the setting that `unet train` uses."""


class NotApplicableError(Exception):
    """The row cannot be measured here, for the given reason; it is skipped, not failed."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value."""

    name: str
    value: float | str
    unit: str = ""
    expected: str = ""
    """An estimate made before the first run, or a goal."""

    @property
    def text(self) -> str:
        """Value and unit, formatted."""
        value = f"{self.value:.4g}" if isinstance(self.value, float) else str(self.value)
        return f"{value} {self.unit}".strip()


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of data, networks and measurements."""

    side: int = 512
    """Side of crops, and of images to predict."""
    batch: int = 32
    network: dict[str, int] = field(default_factory=dict)
    """Overrides of the preset modern."""
    width: int = 64
    """Base channels of the public network."""
    matrix: int = 8192
    copied: int = 2**32
    """Bytes copied to measure bandwidth."""
    warmup: int = 5
    steps: int = 20
    pairs: int = 4000
    """Training pairs of 512 x 512."""
    few_pairs: int = 64
    """Pairs for runs that end at their first step."""
    images: int = 2560
    """Images of 512 x 512 to predict."""
    val_fraction: float = 0.1
    log_every: int = 10
    settle: int = 40
    """Steps of `unet train` before its speed is measured."""
    window: int = 100
    """Steps over which it is measured."""
    watched: int = 30
    """Steps that are profiled and checked for synchronisations."""
    predicted: int = 16
    """Images per forward pass of `unet predict`."""
    per_shard: int = 256
    stage_images: int = 64
    large: int = 20_000
    learn_seconds: float = 90
    oom_batch: int = 512


REHEARSAL = Sizes(
    side=32,
    batch=2,
    network={"base_channels": 2, "depth": 1},
    width=4,
    matrix=64,
    copied=2**20,
    warmup=1,
    steps=2,
    pairs=12,
    few_pairs=12,
    images=12,
    val_fraction=0.4,
    log_every=1,
    settle=1,
    window=3,
    watched=3,
    predicted=2,
    per_shard=2,
    stage_images=2,
    large=700,
    learn_seconds=2,
    oom_batch=64,
)


@dataclass(slots=True)
class Bench:
    """Context of a measurement."""

    work: Path
    """Folder for data and runs, shared by all rows."""
    out: Path
    isbi: Path | None
    rehearse: bool
    send: Callable[[Figure], None]
    known: dict[tuple[str, str, str], Any]
    """{(step, row, figure): value} measured so far."""
    step: str = ""
    row: str = ""

    @property
    def sizes(self) -> Sizes:
        return REHEARSAL if self.rehearse else Sizes()

    @property
    def device(self) -> "torch.device":
        """The GPU, or the CPU in a rehearsal."""
        import torch

        if not self.rehearse and not torch.cuda.is_available():
            raise RuntimeError("no CUDA device; --rehearse runs on a CPU")
        return torch.device("cpu" if self.rehearse else "cuda")

    @property
    def backend(self) -> str:
        """Backend of torch.compile: a rehearsal traces without generating code."""
        return "eager" if self.rehearse else "inductor"

    def start_row(self, step: str, row: str) -> None:
        """Attribute the following figures to a row."""
        self.step, self.row = step, row

    def report(self, name: str, value: float | str, unit: str = "", expected: str = "") -> None:
        """Record a figure immediately, since later code may fail."""
        figure = Figure(name, value, unit, expected)
        self.known[self.step, self.row, name] = value
        print(f"{name}: {figure.text}", flush=True)
        self.send(figure)

    def report_ratio(
        self, name: str, value: float, step: str, row: str, figure: str, expected: str = ""
    ) -> None:
        """Record the ratio of a value to that of another row, if that was measured."""
        if (other := self.known.get((step, row, figure))) is not None:
            self.report(name, value / other, "", expected)

    def batch(self, size: int | None) -> int:
        """Return a batch size of the grid, reduced in a rehearsal."""
        if size is None:
            return self.sizes.batch
        return max(1, size // 16) if self.rehearse else size

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment for a process of the product."""
        tiny = {"TORCH_COMPILE_DISABLE": "1", "ACCELERATE_USE_CPU": "true"}
        return {**os.environ, **(tiny if self.rehearse else {}), **more}


def last_lines(text: str, count: int = 4, width: int = 300) -> str:
    """Join the last lines of an output, without frames and empty lines."""
    lines = [re.sub("[\u2500-\u257f]", "", line).strip() for line in text.splitlines()]
    return " / ".join(line[-width:] for line in [line for line in lines if line][-count:])
