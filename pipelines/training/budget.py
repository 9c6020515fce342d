"""The length of a run in steps or minutes, and what ends it early, agreed on by all ranks."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from types import FrameType

import torch
from accelerate import Accelerator

from pipelines.runtime.errors import STOPPED

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to save a checkpoint and exit."""
FORWARD_SECONDS = 2.0
"""torchrun sends its ranks the Ctrl-C that they got from the terminal already: within this time."""
AGREE_SECONDS = 1.0
"""About how often ranks agree: signals and the clock take effect within this time."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a run; whichever is reached first ends it."""

    steps: int | None
    minutes: float | None

    def progress(self, step: int, seconds: float) -> float:
        """Return the share of the run done after `step` steps and `seconds` seconds, 0 to 1."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(step / self.steps)
        if self.minutes is not None:
            shares.append(seconds / (60 * self.minutes))
        return min(1.0, max(shares))


@dataclass(frozen=True, slots=True)
class NotFinite:
    """The first step at which a watched value was not finite on any rank."""

    step: int
    """Counted from 1."""
    names: tuple[str, ...]
    """Names of the watched values that were not finite at that step."""


class Budget:
    """Counts steps; about every second, ranks agree on the clock and on signals.

    Between two agreements the clock is stopped, so that all ranks set the same learning rate and
    make the same number of steps.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        limits: Limits,
        *,
        watched: Sequence[str] = ("loss",),
        saves: Callable[[int], bool] = lambda _: False,
        step: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Start or resume counting, and handle SIGINT, SIGTERM and SIGUSR1.

        Args:
            accelerator: provides the ranks.
            limits: what ends the run.
            watched: names of the values passed to `watch`.
            saves: whether weights are saved after a step; ranks agree before, so that weights that
                are not finite are never saved.
            step: step of the checkpoint to resume from.
            seconds: training time of that checkpoint.
        """
        self.accelerator, self.limits = accelerator, limits
        self.watched, self.saves = tuple(watched), saves
        self.step, self.seconds = step, seconds
        self.start = time.monotonic() - seconds
        self.every, self.agreed, self.next_agreement = 1, step, step + 1
        self.stop_requested = False
        self.first_sigint = 0.0
        self.interrupted = False
        # On the device: the 1-based step at which each value was first not finite, else 0. float32
        # counts exactly up to 16.7 million, and every device supports it.
        self.bad_steps = torch.zeros(len(self.watched), device=accelerator.device)
        for number in STOPPING:
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Request a stop at the next agreement; from then on, SIGINT ends the process at once."""
        self.stop_requested = True
        if number == signal.SIGINT:
            self.first_sigint = time.monotonic()
            signal.signal(signal.SIGINT, self.on_second_sigint)
            if self.accelerator.is_main_process:
                write_line("Ctrl-C: saving a checkpoint; once more ends at once, without saving")

    def on_second_sigint(self, number: int, frame: FrameType | None) -> None:
        """End at once, unless a launcher has forwarded the first one."""
        forwards = "TORCHELASTIC_RUN_ID" in os.environ
        if not forwards or time.monotonic() - self.first_sigint > FORWARD_SECONDS:
            end_at_once(number, frame)

    @property
    def progress(self) -> float:
        """Share of the run that is done, equal on all ranks."""
        return self.limits.progress(self.step, self.seconds)

    @property
    def spent(self) -> bool:
        """Whether a limit is reached, equal on all ranks."""
        return self.progress >= 1

    def watch(self, values: torch.Tensor) -> None:
        """Record values [watched] that are not finite, without synchronising with the device."""
        here = torch.full_like(self.bad_steps, self.step + 1)
        first = (self.bad_steps == 0) & ~torch.isfinite(values.detach())
        self.bad_steps = torch.where(first, here, self.bad_steps)

    def advance(self) -> NotFinite | None:
        """Count a step. Returns the first values that were not finite, if ranks agreed on some."""
        self.step += 1
        done = self.limits.progress(self.step, self.seconds) >= 1
        if self.step < self.next_agreement and not done and not self.saves(self.step):
            return None
        return self.agree()

    def agree(self) -> NotFinite | None:
        """Share stop requests, the clock of rank 0 and bad steps in one small collective."""
        accelerator = self.accelerator
        clock = time.monotonic() - self.start if accelerator.is_main_process else 0.0
        mine = torch.cat([self.bad_steps.new_tensor([self.stop_requested, clock]), self.bad_steps])
        everyone = accelerator.gather(mine[None])
        assert isinstance(everyone, torch.Tensor)
        stop, seconds = everyone[:, :2].sum(dim=0).tolist()
        steps = self.step - self.agreed
        per_step = max(1e-6, (seconds - self.seconds) / max(1, steps))
        self.seconds = seconds
        self.interrupted = stop > 0
        self.every = max(1, min(1000, round(AGREE_SECONDS / per_step)))
        self.next_agreement = self.step + self.every
        self.agreed = self.step
        bad = everyone[:, 2:]
        if not bad.any():
            return None
        step = bad[bad > 0].min()
        found = (bad == step).any(dim=0).tolist()
        return NotFinite(int(step), tuple(compress(self.watched, found)))


def ignore_repeated_signal() -> None:
    """Ignore SIGUSR1, which schedulers may repeat: at exit, Python restores that it kills."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def end_at_once(_number: int, _frame: FrameType | None) -> None:
    """End this process without cleanup, as SIGKILL would, with the exit code of Ctrl-C."""
    write_line("Ctrl-C again: ended at once; rerun the same command to resume from its checkpoints")
    os._exit(STOPPED)


def write_line(line: str) -> None:
    """Write a line to stderr in a signal handler, where buffered streams may be in use."""
    os.write(2, f"\n{line}\n".encode())
