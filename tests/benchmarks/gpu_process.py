"""Processes of the product that a measurement starts, waits for, signals and ends."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu_bench import LOG, REPO, Bench, last_lines

LAUNCH = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
OBSERVE = str(Path(__file__).with_name("gpu_observe.py"))


class Process:
    """A command whose output goes to the log; killed at the end of the block if it still runs."""

    def __init__(self, bench: Bench, command: Sequence[object], **environment: str) -> None:
        words = [str(word) for word in command]
        print("$", *words, flush=True)
        self.log = bench.out / LOG
        self.offset = self.log.stat().st_size
        self.begun = time.perf_counter()
        # It prints where this process does: into the log.
        self.process = subprocess.Popen(
            words, cwd=REPO, env=bench.environment(**environment), stderr=subprocess.STDOUT
        )

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.perf_counter() - self.begun

    @property
    def said(self) -> str:
        """What it has printed, and what others printed meanwhile."""
        with self.log.open("rb") as file:
            file.seek(self.offset)
            return file.read().decode(errors="replace")

    def until(self, holds: Callable[[], Any], what: str) -> float:
        """Wait for something; seconds since the start. Raises RuntimeError if it ends before."""
        while not holds():
            if self.process.poll() is not None and not holds():
                code = self.process.returncode
                raise RuntimeError(f"ended with {code} before {what}: {last_lines(self.said)}")
            time.sleep(0.05)
        return self.seconds

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone."""
        self.process.send_signal(number)

    def wait(self, expected: int = 0) -> float:
        """Wait for its end; seconds since the start. Raises RuntimeError for another exit code."""
        code = self.process.wait()
        if code != expected:
            raise RuntimeError(f"ended with {code}, not {expected}: {last_lines(self.said)}")
        return self.seconds

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def run(bench: Bench, command: Sequence[object], **environment: str) -> tuple[int, str]:
    """The exit code of a command, and what it printed."""
    with Process(bench, command, **environment) as process:
        return process.process.wait(), process.said


def verb(name: str) -> tuple[str, ...]:
    """`unet NAME`, from the checkout."""
    return (sys.executable, "-m", f"pipelines.{name}")


def observed(name: str, file: Path) -> tuple[str, ...]:
    """The same, looked at between two SIGUSR2: see gpu_observe.py."""
    file.unlink(missing_ok=True)
    return (sys.executable, OBSERVE, str(file), name)
