"""How long a run goes on: steps, epochs or minutes; and what ends it early. Ranks agree on it."""

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from types import FrameType

import torch
from accelerate import Accelerator

AGREE_SECONDS = 1.0
"""About how often ranks agree: signals and the clock take effect within this time."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What was asked for; whatever is reached first ends the run."""

    steps: int | None
    minutes: float | None

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run that is done after `step` steps and `seconds` seconds, 0 to 1."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(step / self.steps)
        if self.minutes is not None:
            shares.append(seconds / (60 * self.minutes))
        return min(1.0, max(shares))


@dataclass(frozen=True, slots=True)
class NotFinite:
    """The first step at which something was not finite, on any rank."""

    step: int
    """Counted from 1."""
    names: tuple[str, ...]
    """Of what was watched: what was not finite at that step."""


class Budget:
    """Counts steps and, every second or so, brings all ranks to one view of clock and signals.

    Between two agreements the clock stands still for all, so that every rank sets the same
    learning rate and makes the same number of steps.
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
        """Begin, or go on.

        Args:
            accelerator: knows the ranks.
            limits: what ends the run.
            watched: names of what `watch` is shown.
            saves: whether weights are saved after a step; ranks agree before, so that weights
                which are not finite never are.
            step: where a resumed run stands.
            seconds: the same.
        """
        self.accelerator, self.limits = accelerator, limits
        self.watched, self.saves = tuple(watched), saves
        self.step, self.seconds = step, seconds
        self.began = time.monotonic() - seconds
        self.every, self.agreed, self.next_agreement = 1, step, step + 1
        self.asked_to_stop = False
        self.interrupted = False
        # 1-based step at which each first was not finite, on the device; 0 while it was not.
        # float32 counts steps exactly up to 16.7 million, and every device has it.
        self.bad_steps = torch.zeros(len(self.watched), device=accelerator.device)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.on_signal)

    def on_signal(self, _number: int, _frame: FrameType | None) -> None:
        """Remember that the run should stop."""
        self.asked_to_stop = True

    @property
    def progress(self) -> float:
        """The share of the run that is done, the same on all ranks."""
        return self.limits.progress(self.step, self.seconds)

    @property
    def spent(self) -> bool:
        """Whether what was asked for is done; the same on all ranks."""
        return self.progress >= 1

    def watch(self, values: torch.Tensor) -> None:
        """Remember at which step values [watched] are not finite, without asking the device."""
        here = torch.full_like(self.bad_steps, self.step + 1)
        first = (self.bad_steps == 0) & ~torch.isfinite(values.detach())
        self.bad_steps = torch.where(first, here, self.bad_steps)

    def advance(self) -> NotFinite | None:
        """Count a step; what was first not finite on any rank, if something was."""
        self.step += 1
        done = self.limits.progress(self.step, self.seconds) >= 1
        if self.step < self.next_agreement and not done and not self.saves(self.step):
            return None
        return self.agree()

    def agree(self) -> NotFinite | None:
        """One small reduction: who was told to stop, what rank 0's clock says, a bad loss."""
        accelerator = self.accelerator
        clock = time.monotonic() - self.began if accelerator.is_main_process else 0.0
        mine = torch.cat([self.bad_steps.new_tensor([self.asked_to_stop, clock]), self.bad_steps])
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
