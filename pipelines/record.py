"""What a run has left in its folder, also one that goes on or was killed while it wrote a line."""

import json
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator

from pipelines.checkpoint import CHECKPOINTS, STATE
from shards.sample import DataError
from shards.writer import write_json

MOST_POINTS = 500
"""A curve keeps between so many points and twice as many."""
MOST_TEXT = 100_000
"""Characters of config.yaml that are kept."""
CONFIG, METRICS, ENVIRONMENT = "config.yaml", "metrics.jsonl", "environment.json"
PACKAGES = (
    *("unet-shards", "torch", "accelerate", "webdataset", "torchmetrics", "numpy", "pillow"),
    *("safetensors", "wandb"),
)


@dataclass(frozen=True, slots=True)
class Curve:
    """A number over the steps of a run."""

    steps: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(slots=True)
class Thinner:
    """A curve that grows point by point and stays small: when it is long, pairs become their mean.

    All means are over the same number of points, but for the last.
    """

    points: list[tuple[float, float]] = field(default_factory=list)
    width: int = 1
    """Points that were given for each that is kept."""
    step_sum: float = 0.0
    value_sum: float = 0.0
    held: int = 0

    def add(self, step: float, value: float) -> None:
        """One more point."""
        self.step_sum += step
        self.value_sum += value
        self.held += 1
        if self.held < self.width:
            return
        self.points.append(self.mean())
        self.step_sum, self.value_sum, self.held = 0.0, 0.0, 0
        if len(self.points) == 2 * MOST_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [((a[0] + b[0]) / 2, (a[1] + b[1]) / 2) for a, b in pairs]
            self.width *= 2

    def mean(self) -> tuple[float, float]:
        """Of the points that are not yet kept."""
        return self.step_sum / self.held, self.value_sum / self.held

    def curve(self) -> Curve:
        """What there is."""
        points = [*self.points, self.mean()] if self.held else self.points
        return Curve(tuple(p[0] for p in points), tuple(p[1] for p in points))


@dataclass(frozen=True, slots=True)
class Metrics:
    """What metrics.jsonl holds."""

    curves: dict[str, Curve]
    """By the names of DESIGN: `train/loss`, `val/dice`, ..."""
    last_step: int | None
    latest: dict[str, float]
    """The last number under each name."""
    best: dict[str, float]
    """The validation scores of the best step, with `step`; empty before the first validation."""
    notes: tuple[str, ...]
    """What was passed over, a sentence each."""


@dataclass(frozen=True, slots=True)
class Record:
    """A run folder, read."""

    run_dir: Path
    config: dict[str, Any]
    """Of config.yaml; empty where there is none."""
    config_text: str
    metrics: Metrics
    state: dict[str, Any]
    """RUN/state.json, how the run ended; empty where it has not."""
    last: dict[str, Any]
    """The state in the last checkpoint; empty where there is none."""
    environment: dict[str, Any]
    """Versions and devices."""
    notes: tuple[str, ...]
    """What is missing or damaged, a sentence each."""

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.run_dir.resolve().name

    def setting(self, *path: str) -> Any:
        """A value of the configuration; None where it is not known."""
        value: Any = self.config
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value


def read_record(run_dir: Path) -> Record:
    """Read a run folder. Raises DataError where it is none."""
    if not (run_dir / CONFIG).exists() and not (run_dir / METRICS).exists():
        raise DataError(f"{run_dir} is no run folder: it has neither {CONFIG} nor {METRICS}")
    notes: list[str] = []
    config, text = read_config(run_dir / CONFIG, notes)
    checkpoints = run_dir / CHECKPOINTS
    best = read_json(checkpoints / "best" / STATE, notes)
    metrics = read_metrics(run_dir / METRICS, number(best.get("step")))
    environment = read_json(run_dir / ENVIRONMENT, notes)
    if not environment:
        environment = describe_environment()
        notes.append("Versions and devices are those of the program that made this page.")
    return Record(
        run_dir=run_dir,
        config=config,
        config_text=text,
        metrics=metrics,
        state=read_json(run_dir / STATE, notes),
        last=read_json(checkpoints / "last" / STATE, notes),
        environment=environment,
        notes=(*metrics.notes, *notes),
    )


def read_config(path: Path, notes: list[str]) -> tuple[dict[str, Any], str]:
    """The resolved configuration, and as it stands in its file."""
    if not path.exists():
        notes.append(f"There is no {CONFIG}.")
        return {}, ""
    text = path.read_text(errors="replace")
    try:
        plain = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        plain = None
    if not isinstance(plain, dict):
        notes.append(f"{CONFIG} is damaged.")
        plain = {}
    if len(text) > MOST_TEXT:
        notes.append(f"{CONFIG} is cut after {MOST_TEXT:,} characters.")
    return plain, text[:MOST_TEXT]


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object; empty where there is no such file, or one that is damaged."""
    try:
        plain = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        plain = None
    if not isinstance(plain, dict):
        notes.append(f"{path.name} is damaged.")
        return {}
    return plain


def read_metrics(path: Path, best_step: float | None) -> Metrics:
    """Curves of metrics.jsonl, read once, in memory that does not grow with it.

    `best_step`: of the best checkpoint; None: the best is where `val/dice` is highest.
    """
    thinners: dict[str, Thinner] = {}
    best: dict[str, float] = {}
    latest: dict[str, float] = {}
    last_step, damaged, cut, endless = None, 0, False, 0
    for line in lines_of(path):
        # Only a last line can lack its end.
        cut = not line.endswith("\n")
        values = parse_line(line)
        if values is None:
            damaged += not cut
            continue
        cut, last_step = False, int(values["step"])
        latest |= values
        for name, value in values.items():
            if name != "step" and isfinite(value):
                thinners.setdefault(name, Thinner()).add(values["step"], value)
            endless += not isfinite(value)
        if "val/dice" in values and is_better(values, best, best_step):
            best = {k: v for k, v in values.items() if k == "step" or k.startswith("val/")}
    told = (
        (not path.exists(), f"There is no {METRICS} yet."),
        (cut, f"The last line of {METRICS} is cut; it is left out."),
        (damaged, f"{damaged:,} lines of {METRICS} are damaged; they are left out."),
        (endless, f"{endless:,} numbers in {METRICS} are not finite; they are left out."),
    )
    curves = {name: thinner.curve() for name, thinner in thinners.items()}
    return Metrics(curves, last_step, latest, best, tuple(note for is_so, note in told if is_so))


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a text file, which may not be there."""
    if path.exists():
        with path.open(errors="replace", newline="\n") as file:
            yield from file


def parse_line(line: str) -> dict[str, float] | None:
    """The numbers of a line, with `step`; None where it is no such line."""
    try:
        plain = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(plain, dict):
        return None
    values = {name: number(value) for name, value in plain.items()}
    known = {name: value for name, value in values.items() if value is not None}
    return known if isfinite(known.get("step", float("nan"))) else None


def is_better(values: dict[str, float], best: dict[str, float], best_step: float | None) -> bool:
    """Whether these are the scores to show rather than those found so far."""
    if best_step is not None and best_step in (values["step"], best.get("step")):
        return values["step"] == best_step
    return not best or values["val/dice"] > best["val/dice"]


def number(value: Any) -> float | None:
    """A number of a JSON file; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def write_environment(run_dir: Path, accelerator: Accelerator) -> None:
    """Write down what a run runs on, in RUN/environment.json. For the main process."""
    write_json(run_dir / ENVIRONMENT, describe_environment(accelerator))


def describe_environment(accelerator: Accelerator | None = None) -> dict[str, Any]:
    """Versions, and what this process computes on; with how many others, if that is given."""
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    plain: dict[str, Any] = {
        "gpus": gpus,
        "cpu": cpu_name(lines_of(Path("/proc/cpuinfo"))),
        "cpus": os.cpu_count(),
        "memory_bytes": memory,
        "platform": platform.platform(terse=True),
        "versions": {"python": platform.python_version(), **dict(versions())},
    }
    if accelerator is not None:
        plain["ranks"] = accelerator.num_processes
        plain["device"] = accelerator.device.type
        plain["precision"] = accelerator.mixed_precision
    return plain


def cpu_name(cpuinfo: Iterable[str]) -> str:
    """The model that Linux names, elsewhere the kind of processor."""
    for line in cpuinfo:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def versions() -> Iterator[tuple[str, str]]:
    """Of the packages that decide what a run computes and writes."""
    for package in PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            # Ours, where it is run from its sources.
            continue
