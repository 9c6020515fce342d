"""The contents of a run folder, also of a run that is training or was killed in mid-write."""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from pipelines.runtime.environment import describe_environment, lines_of
from pipelines.runtime.run_folder import CHECKPOINT_STATE, RunFolder
from pipelines.runtime.strict_yaml import load_typed_yaml, read_text
from shards.documents import parse_json
from shards.local_files import read_file
from shards.sample import DataError

MIN_POINTS = 500
"""Long curves keep between this many points and twice as many."""
MAX_TEXT = 100_000
"""Characters of config.yaml to keep."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A value over the steps of a run."""

    steps: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(slots=True)
class Thinner:
    """Thins a growing curve: when it is too long, pairs of points are averaged.

    All means cover the same number of points, except the last.
    """

    points: list[tuple[float, float]] = field(default_factory=list)
    width: int = 1
    """Points averaged into each kept point."""
    step_sum: float = 0.0
    value_sum: float = 0.0
    held: int = 0

    def add(self, step: float, value: float) -> None:
        """Add a point."""
        self.step_sum += step
        self.value_sum += value
        self.held += 1
        if self.held < self.width:
            return
        self.points.append(self.mean())
        self.step_sum, self.value_sum, self.held = 0.0, 0.0, 0
        if len(self.points) == 2 * MIN_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [((a[0] + b[0]) / 2, (a[1] + b[1]) / 2) for a, b in pairs]
            self.width *= 2

    def mean(self) -> tuple[float, float]:
        """Average the points that are not kept yet."""
        return self.step_sum / self.held, self.value_sum / self.held

    def curve(self) -> Curve:
        """Return the curve so far."""
        points = [*self.points, self.mean()] if self.held else self.points
        return Curve(tuple(p[0] for p in points), tuple(p[1] for p in points))


@dataclass(frozen=True, slots=True)
class Metrics:
    """The contents of metrics.jsonl."""

    curves: dict[str, Curve]
    """By name: `train/loss`, `val/dice`, …"""
    last_step: int | None
    latest: dict[str, float]
    """The last value of each metric."""
    best: dict[str, float]
    """The validation scores of the best step, with `step`; empty before the first validation."""
    notes: tuple[str, ...]
    """What was ignored, a sentence each."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The contents of a run folder."""

    run_dir: Path
    config: dict[str, Any]
    """config.yaml; empty if missing."""
    config_text: str
    metrics: Metrics
    state: dict[str, Any]
    """RUN/state.json, how the run ended; empty if it has not."""
    last: dict[str, Any]
    """state.json of the last checkpoint; empty if there is none."""
    environment: dict[str, Any]
    """Versions and devices."""
    notes: tuple[str, ...]
    """What is missing or damaged, a sentence each."""

    @property
    def name(self) -> str:
        """Name of the run: that of its folder."""
        return self.run_dir.resolve().name

    def setting(self, *path: str) -> Any:
        """Return a value of the configuration; None if unknown."""
        value: Any = self.config
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value


def read_record(run_dir: Path) -> RunRecord:
    """Read a run folder. Raises DataError if it is not a run folder."""
    folder = RunFolder(run_dir)
    if not folder.config.exists() and not folder.metrics.exists():
        raise DataError(
            f"--run-dir {run_dir} is not a run folder: it has neither {folder.config.name} nor "
            f"{folder.metrics.name}; use the --run-dir of unet train"
        )
    notes: list[str] = []
    config, text = read_config(folder.config, notes)
    best = read_json(folder.best / CHECKPOINT_STATE, notes)
    metrics = read_metrics(folder.metrics, number(best.get("step")))
    environment = read_json(folder.environment, notes)
    if not environment:
        environment = describe_environment()
        notes.append("Versions and devices are those of the process that made this page.")
    return RunRecord(
        run_dir=run_dir,
        config=config,
        config_text=text,
        metrics=metrics,
        state=read_json(folder.state, notes),
        last=read_json(folder.last / CHECKPOINT_STATE, notes),
        environment=environment,
        notes=(*metrics.notes, *notes),
    )


def read_config(path: Path, notes: list[str]) -> tuple[dict[str, Any], str]:
    """Read the resolved configuration, parsed and as text."""
    if not path.exists():
        notes.append(f"{path.name} is missing.")
        return {}, ""
    text, plain = "", None
    with suppress(yaml.YAMLError):
        text = read_text(path)
        plain = load_typed_yaml(text)
    if not isinstance(plain, dict):
        notes.append(f"{path.name} is damaged.")
        plain = {}
    if len(text) > MAX_TEXT:
        notes.append(f"{path.name} is truncated after {MAX_TEXT:,} characters.")
    return plain, text[:MAX_TEXT]


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing or damaged."""
    try:
        return parse_json(read_file(path))
    except FileNotFoundError:
        pass
    except ValueError:
        notes.append(f"{path.name} is damaged.")
    return {}


def read_metrics(path: Path, best_step: float | None) -> Metrics:
    """Read the curves of metrics.jsonl in one pass and bounded memory.

    `best_step` is the step of the best checkpoint; None: the one with the highest `val/dice`.
    """
    thinners: dict[str, Thinner] = {}
    best: dict[str, float] = {}
    latest: dict[str, float] = {}
    last_step, damaged, cut, not_finite = None, 0, False, 0
    for line in lines_of(path):
        # Only the last line can be incomplete.
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
            not_finite += not isfinite(value)
        if "val/dice" in values and is_better(values, best, best_step):
            best = {k: v for k, v in values.items() if k == "step" or k.startswith("val/")}
    notes = (
        (not path.exists(), f"{path.name} does not exist yet."),
        (cut, f"The last line of {path.name} is incomplete and is ignored."),
        (damaged, f"{damaged:,} lines of {path.name} are damaged and are ignored."),
        (not_finite, f"{not_finite:,} values in {path.name} are not finite and are ignored."),
    )
    curves = {name: thinner.curve() for name, thinner in thinners.items()}
    return Metrics(
        curves, last_step, latest, best, tuple(note for applies, note in notes if applies)
    )


def parse_line(line: str) -> dict[str, float] | None:
    """Parse the numbers of a line that has a `step`; None if it is damaged."""
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
    """Return whether to show these scores instead of the best so far."""
    if best_step is not None and best_step in (values["step"], best.get("step")):
        return values["step"] == best_step
    return not best or values["val/dice"] > best["val/dice"]


def number(value: Any) -> float | None:
    """Convert a JSON number to float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
