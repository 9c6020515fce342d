"""Results of gpu.py on disk: gpu.json and gpu.md, to which every run adds its rows."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_bench import Figure

WIDTH = 100
"""Maximum characters of a printed figure; gpu.json and gpu.md are not truncated."""
RESULTS = "gpu.json"


@dataclass(slots=True)
class Result:
    """State and figures of a row."""

    step: str
    name: str
    state: str = "skipped"
    """done, failed or skipped."""
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)
    message: str = "the run ended before this row"
    """Reason for a failure or a skip."""


def known_figures(path: Path) -> dict[tuple[str, str, str], Any]:
    """Read {(step, row, figure): value} of the rows measured so far, by this run or earlier."""
    return {
        (row["step"], row["name"], figure["name"]): figure["value"]
        for row in json.loads(path.read_text())["rows"]
        for figure in row["figures"]
    }


class Table:
    """Results so far, written to disk after every figure.

    Rows of earlier runs into the same folder are kept, except for those that this run measures.

    Args:
        out: folder of gpu.json and gpu.md.
        names: (step, name) of all rows, in the order of the table.
        measured: indices into `names` of the rows that this run measures.
        rehearsal: whether this run is a rehearsal.

    Raises ValueError if the folder has results of measurements and this is a rehearsal, or the
    other way round.
    """

    def __init__(
        self,
        out: Path,
        names: Sequence[tuple[str, str]],
        measured: Sequence[int],
        *,
        rehearsal: bool,
    ) -> None:
        self.out, self.rehearsal = out, rehearsal
        self.started, self.start = datetime.now(UTC), time.monotonic()
        self.runs, earlier = self.read()
        self.results: dict[int, Result] = {}
        for number, name in enumerate(names):
            if number in measured:
                self.results[number] = Result(*name)
            elif name in earlier:
                self.results[number] = earlier[name]
        self.write()

    def read(self) -> tuple[list[dict[str, Any]], dict[tuple[str, str], Result]]:
        """Read the runs so far and their rows."""
        path = self.out / RESULTS
        if not path.exists():
            return [], {}
        plain = json.loads(path.read_text())
        if plain["rehearsal"] != self.rehearsal:
            kind = "a rehearsal" if plain["rehearsal"] else "measurements"
            raise ValueError(f"contains the results of {kind}; use another folder")
        rows = [
            Result(**{**row, "figures": [Figure(**figure) for figure in row["figures"]]})
            for row in plain["rows"]
        ]
        return plain["runs"], {(row.step, row.name): row for row in rows}

    @property
    def seconds(self) -> float:
        """Seconds since the start of this run."""
        return time.monotonic() - self.start

    def write(self) -> None:
        """Replace gpu.json and gpu.md."""
        plain = {
            "rehearsal": self.rehearsal,
            "runs": self.all_runs(),
            "rows": [asdict(result) for result in self.results.values()],
        }
        replace_file(self.out / RESULTS, json.dumps(plain, indent=1) + "\n")
        replace_file(self.out / "gpu.md", "\n".join(self.lines()) + "\n")

    def all_runs(self) -> list[dict[str, Any]]:
        """Return start and duration of the earlier runs and of this one."""
        started = self.started.isoformat(sep=" ", timespec="minutes")
        return [*self.runs, {"started": started, "seconds": round(self.seconds, 1)}]

    def lines(self) -> Iterator[str]:
        """Yield the lines of the Markdown table."""
        kind = "Rehearsal on a CPU: its figures are meaningless" if self.rehearsal else "Measured"
        runs = [f"{run['started']}, {run['seconds']:.0f} s" for run in self.all_runs()]
        yield f"{kind}; {'; '.join(runs)}.\n"
        yield markdown_row("step", "row", "figure", "measured", "expected (estimate)")
        yield markdown_row(*["---"] * 5)
        for result in self.results.values():
            head = (result.step, result.name)
            for figure in result.figures:
                yield markdown_row(*head, figure.name, figure.text, figure.expected)
            if result.state != "done":
                yield markdown_row(*head, result.state.upper(), result.message, "")

    def finish(self, result: Result, state: str, message: str, seconds: float) -> None:
        """Record the final state of a row and print its figures."""
        result.state, result.message, result.seconds = state, message, round(seconds, 1)
        self.write()
        figures = []
        for figure in result.figures:
            estimate = f" (expected {figure.expected})" if figure.expected else ""
            figures.append(f"{figure.name} {figure.text}"[:WIDTH] + estimate)
        head = f"[{self.seconds:.0f} s] {result.step}: {result.name}: {state}"
        print(f"{head} {message}"[: 3 * WIDTH], "; ".join(figures), sep=" -- ", flush=True)


def markdown_row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def replace_file(path: Path, text: str) -> None:
    """Replace a file atomically."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)
