"""Processes of the product: start, wait, signal, kill."""

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
    """A running command whose output goes to the log; killed on exit from the context."""

    def __init__(self, bench: Bench, command: Sequence[object], **environment: str) -> None:
        words = [str(word) for word in command]
        print("$", *words, flush=True)
        self.log = bench.out / LOG
        self.offset = self.log.stat().st_size
        self.started = time.perf_counter()
        # Inherits stdout, which is the log.
        self.process = subprocess.Popen(
            words, cwd=REPO, env=bench.environment(**environment), stderr=subprocess.STDOUT
        )

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    @property
    def output(self) -> str:
        """The log since the start of the process."""
        with self.log.open("rb") as file:
            file.seek(self.offset)
            return file.read().decode(errors="replace")

    def wait_until(self, condition: Callable[[], Any], what: str) -> float:
        """Wait until a condition is true; returns seconds since the start.

        Raises RuntimeError if the process exits before.
        """
        while not condition():
            if self.process.poll() is not None and not condition():
                code = self.process.returncode
                raise RuntimeError(f"exited with {code} before {what}: {last_lines(self.output)}")
            time.sleep(0.05)
        return self.seconds

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, not to its children."""
        self.process.send_signal(number)

    def wait(self, expected: int = 0) -> float:
        """Wait for the exit; returns seconds since the start.

        Raises RuntimeError for another exit code than expected.
        """
        code = self.process.wait()
        if code != expected:
            raise RuntimeError(f"exited with {code}, not {expected}: {last_lines(self.output)}")
        return self.seconds

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def run(bench: Bench, command: Sequence[object], **environment: str) -> tuple[int, str]:
    """Run a command; returns its exit code and output."""
    with Process(bench, command, **environment) as process:
        return process.process.wait(), process.output


def verb(name: str) -> tuple[str, ...]:
    """Return the command `unet NAME`, run from the checkout."""
    return (sys.executable, "-m", f"pipelines.{name}")


def observe_verb(name: str, file: Path) -> tuple[str, ...]:
    """Return the command `unet NAME`, profiled between two SIGUSR2: see gpu_observe.py."""
    file.unlink(missing_ok=True)
    return (sys.executable, OBSERVE, str(file), name)
