"""All measurements that need a GPU, in commands of at most eight minutes.

    tests/benchmarks/gpu.sh --out DIR                     # installs the wheels of a folder first
    python tests/benchmarks/gpu.py --out DIR [--isbi FOLDER] [--only step predict] [--budget 480]
    python tests/benchmarks/gpu.py --out DIR --rehearse   # every step on a CPU, with tiny sizes

Steps are ordered by importance, so that an interrupted run is still useful: the limits of the card
are needed to interpret all other figures; the bare training step selects the settings of all later
steps; `unet train` and `unet predict` are the product; the tests check correctness; learning takes
four minutes and depends least on the GPU; the rest of the grid adds detail.

    limits    the bf16 matrix rate, copy bandwidth, versions; whether torch.compile works here
    step      a training step of `modern` at batch 32 in three variants, compared with public
              single-file loops
    train     `unet train` from shards, compared with the bare step; SIGTERM, resume, NCCL with one
              rank
    predict   `unet predict` from a folder to shards, compared with the bare forward pass, by stage
    tests     the tests marked gpu; messages when out of memory or short of GPUs
    learn     Dice on isbi2012 after 90 seconds, compared with the public loop (requires --isbi)
    grid      the fourth variant, compiled without channels_last (a minute to compile, of least
              interest); segmentation_models_pytorch; other batch sizes; batch norm

All rows take longer than eight minutes. Three runs that do not, into the same --out (their rows add
up, and each knows the figures of the earlier ones):

    --only limits step train predict    seven minutes
    --only limits tests learn           seven minutes
    --only limits grid                  five minutes

The rows of a step share a process, which imports torch and compiles once. Every row has a time
limit. A row that fails ends that process, since its error may have left the GPU in a bad state; a
new process takes the remaining rows. Rows that would start after --budget seconds are skipped; none
runs for more than 60 seconds beyond it. DIR/gpu.json and DIR/gpu.md are updated after every figure;
DIR/gpu.log contains the output of the processes. `expected` is an estimate made before the first
run on a GPU.

Exits with 0 only if no row failed.
"""

import argparse
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

import psutil
from gpu_bench import LOG, REPO, Bench, Figure, NotApplicableError, last_lines
from gpu_table import RESULTS, Table, known_figures

GRACE = 60
"""Seconds beyond --budget after which a row is killed."""
STARTING = 90
"""Seconds within which a process must start its first row."""
PATIENCE = 3
"""Factor on the time limits in a rehearsal, on a busy machine."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement: a function `module:name`, called with a `Bench` and `arguments`."""

    step: str
    name: str
    limit: float
    """Time limit in seconds."""
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)


def step_row(step: str, name: str, limit: float, expected: str = "", **settings: Any) -> Row:
    """Define a row for our training step."""
    return Row(step, name, limit, "gpu_steps:ours", {**settings, "expected": expected})


TESTS = (
    "tests/pipelines/test_gpu.py",
    "tests/pipelines/test_step.py",
    "tests/pipelines/test_memory_probe.py",
    "tests/pipelines/test_predict_speed.py",
    "tests/pipelines/test_saving.py",
    "tests/unet/test_calibration.py",
    "tests/unet/test_masks.py",
    "tests/unet/test_metrics.py",
)
"""Files with tests marked gpu."""
FASTEST = {"channels_last": True, "compiled": True}
ROWS = (
    Row("limits", "card", 120, "gpu_steps:card"),
    Row("limits", "compiler", 90, "gpu_steps:compiler"),
    Row("limits", "packages", 60, "gpu_steps:packages"),
    step_row("step", "eager", 60, "160 ms"),
    step_row("step", "eager, channels_last", 45, "155 ms", channels_last=True),
    step_row("step", "compiled, channels_last", 120, "105 ms", **FASTEST),
    Row("step", "public loop", 45, "gpu_steps:public"),
    Row("step", "public loop, channels_last", 45, "gpu_steps:public", {"channels_last": True}),
    Row("train", "shards", 90, "gpu_train:pack_shards"),
    Row("train", "unet train", 150, "gpu_train:train"),
    Row("train", "resumed", 120, "gpu_train:resume"),
    Row("train", "accelerate launch, one rank", 120, "gpu_train:launched"),
    Row("predict", "forward", 120, "gpu_predict:forward"),
    Row("predict", "unet predict", 90, "gpu_predict:predict"),
    Row("predict", "unet predict, compiled", 120, "gpu_predict:predict", {"compiled": True}),
    Row("predict", "everything but the network", 90, "gpu_predict:ceiling"),
    Row("predict", "stages", 60, "gpu_predict:stages"),
    Row("predict", "one large image", 120, "gpu_predict:large"),
    Row("tests", "pytest -m gpu", 240, "gpu_train:pytest_gpu", {"files": TESTS[:1]}),
    Row("tests", "pytest -m gpu, other files", 240, "gpu_train:pytest_gpu", {"files": TESTS[1:]}),
    Row("tests", "out of memory", 90, "gpu_train:out_of_memory"),
    Row("tests", "more ranks than GPUs", 60, "gpu_train:too_many_ranks"),
    Row("learn", "unet train", 160, "gpu_train:learn"),
    Row("learn", "public loop", 140, "gpu_train:learn_public"),
    step_row("grid", "compiled", 120, "120 ms", compiled=True),
    Row("grid", "smp resnet34, channels_last", 60, "gpu_steps:smp"),
    step_row("grid", "batch 8", 60, batch=8, **FASTEST),
    step_row("grid", "batch 16", 60, batch=16, **FASTEST),
    step_row("grid", "batch 64", 60, batch=64, **FASTEST),
    step_row(
        "grid", "batch norm, eager, channels_last", 45, "120 ms", norm="batch", channels_last=True
    ),
    step_row("grid", "batch norm, compiled, channels_last", 60, norm="batch", **FASTEST),
    step_row("grid", "batch 8, eager, channels_last", 45, batch=8, channels_last=True),
    step_row("grid", "batch 64, eager, channels_last", 45, batch=64, channels_last=True),
)
STEPS = tuple(dict.fromkeys(row.step for row in ROWS))


# ------------------------------------------------------------------------------ the worker process


def work(arguments: argparse.Namespace) -> None:
    """Measure the given rows in order; sends events to the parent."""
    with os.fdopen(arguments.events, "w", buffering=1) as events:

        def send(**event: Any) -> None:
            events.write(json.dumps(event) + "\n")

        bench = Bench(
            work=arguments.work,
            out=arguments.out,
            isbi=arguments.isbi,
            rehearse=arguments.rehearse,
            send=lambda figure: send(figure=asdict(figure)),
            known=known_figures(arguments.out / RESULTS),
        )
        for number in arguments.worker:
            row = ROWS[number]
            bench.start_row(row.step, row.name)
            send(start=number)
            print(f"\n=== {row.step}: {row.name}", flush=True)
            module, _, name = row.function.partition(":")
            try:
                getattr(importlib.import_module(module), name)(bench, **row.arguments)
            except NotApplicableError as reason:
                send(state="skipped", message=str(reason))
            except Exception as error:
                traceback.print_exc()
                send(state="failed", message=f"{type(error).__name__}: {error}"[-1000:])
                # An error may leave the GPU in a bad state.
                raise SystemExit(1) from error
            else:
                send(state="done", message="")


# ------------------------------------------------------------------------------ the parent process


class Worker:
    """A process that measures rows, and the events it sends."""

    def __init__(self, numbers: Sequence[int], arguments: argparse.Namespace, log: TextIO) -> None:
        self.log = arguments.out / LOG
        receiving, sending = os.pipe()
        flags = ["--out", arguments.out, "--work", arguments.work, "--events", sending]
        flags += ["--isbi", arguments.isbi] if arguments.isbi else []
        flags += ["--rehearse"] if arguments.rehearse else []
        self.process = subprocess.Popen(
            [sys.executable, sys.argv[0], *map(str, flags), "--worker", *map(str, numbers)],
            pass_fds=[sending],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        os.close(sending)
        self.events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self.forward_events, args=(receiving,), daemon=True).start()

    def forward_events(self, receiving: int) -> None:
        """Queue the events of the process, then None at the end."""
        with os.fdopen(receiving) as lines:
            for line in lines:
                self.events.put(json.loads(line))
        self.events.put(None)

    def next_event(self, deadline: float) -> dict[str, Any] | None:
        """Wait for an event; None if the process has ended. Raises queue.Empty at the deadline."""
        return self.events.get(timeout=max(0.0, deadline - time.monotonic()))

    @property
    def last_lines(self) -> str:
        """The last lines of the log."""
        return last_lines(self.log.read_text(errors="replace"))

    def kill(self) -> None:
        """Kill the process and all its descendants, including ranks in their own sessions."""
        started = []
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for one in started:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait()


def measure(numbers: list[int], table: Table, arguments: argparse.Namespace, log: TextIO) -> None:
    """Measure rows in one process; after a failure, the remaining ones in a new process."""
    while numbers and table.seconds < arguments.budget:
        worker = Worker(numbers, arguments, log)
        try:
            numbers = follow(worker, numbers, table, arguments)
        finally:
            worker.kill()
    for number in numbers:
        message = f"the budget of {arguments.budget:.0f} s was spent"
        table.finish(table.results[number], "skipped", message, 0.0)


def follow(
    worker: Worker, numbers: list[int], table: Table, arguments: argparse.Namespace
) -> list[int]:
    """Record the events of a process until it ends or times out; returns the remaining rows."""
    left, start, limit = list(numbers), time.monotonic(), STARTING
    row, hard = table.results[left[0]], table.start + arguments.budget + GRACE
    patience = PATIENCE if arguments.rehearse else 1
    while left:
        try:
            event = worker.next_event(min(start + patience * limit, hard))
        except queue.Empty:
            event = {"state": "failed", "message": f"timed out: {worker.last_lines}"}
        if event is None:
            code = worker.process.wait()
            event = {"state": "failed", "message": f"exited with {code}: {worker.last_lines}"}
        if "start" in event:
            if table.seconds > arguments.budget:
                return left
            row, start = table.results[event["start"]], time.monotonic()
            limit = ROWS[event["start"]].limit
        elif "figure" in event:
            row.figures.append(Figure(**event["figure"]))
            table.write()
        else:
            table.finish(row, event["state"], event["message"], time.monotonic() - start)
            del left[0]
            if event["state"] == "failed":
                return left
    return left


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny sizes")
    parser.add_argument("--isbi", type=Path, help="folder with images, masks and split.csv")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, metavar="STEP")
    parser.add_argument("--budget", type=float, default=480, help="seconds; later rows are skipped")
    parser.add_argument("--work", type=Path, help="folder for data and runs; default: temporary")
    parser.add_argument("--worker", nargs="+", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--events", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.worker:
        work(arguments)
        return 0
    for name in ("out", "isbi"):
        if (path := getattr(arguments, name)) is not None:
            setattr(arguments, name, path.resolve())
    arguments.out.mkdir(parents=True, exist_ok=True)
    # On SIGTERM, clean up the processes that were started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ.update(ENVIRONMENT)
    paths = (str(REPO), os.environ.get("PYTHONPATH", ""))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if arguments.rehearse:
        os.environ["OMP_NUM_THREADS"] = "1"
    rows = {number: row for number, row in enumerate(ROWS) if row.step in arguments.only}
    names = [(row.step, row.name) for row in ROWS]
    try:
        table = Table(arguments.out, names, [*rows], rehearsal=arguments.rehearse)
    except ValueError as error:
        print(f"--out {arguments.out}: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, (arguments.out / LOG).open("a") as log:
        arguments.work = (arguments.work or Path(folder)).resolve()
        arguments.work.mkdir(parents=True, exist_ok=True)
        for _, numbers in groupby(rows, key=lambda number: ROWS[number].step):
            measure(list(numbers), table, arguments, log)
    failed = [number for number in rows if table.results[number].state == "failed"]
    print(f"{len(failed)} of {len(rows)} rows failed; {arguments.out / 'gpu.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
