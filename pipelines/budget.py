"""How long a run goes on: steps, epochs or minutes; and what ends it early. Ranks agree on it."""

import signal
import time
from dataclasses import dataclass
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


class Budget:
    """Counts steps and, every second or so, brings all ranks to one view of clock and signals.

    Between two agreements the clock stands still for all, so that every rank sets the same
    learning rate and makes the same number of steps.
    """

    def __init__(
        self, accelerator: Accelerator, limits: Limits, *, step: int = 0, seconds: float = 0.0
    ) -> None:
        """`step` and `seconds`: where a resumed run stands."""
        self.accelerator, self.limits = accelerator, limits
        self.step, self.seconds = step, seconds
        self.began = time.monotonic() - seconds
        self.every, self.next_agreement = 1, step + 1
        self.asked_to_stop = False
        self.interrupted = False
        # 1-based step of the first loss that was not finite, on the device; 0 while there is none.
        # float32 counts steps exactly up to 16.7 million, and every device has it.
        self.bad_step = torch.zeros((), device=accelerator.device)
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

    def watch(self, loss: torch.Tensor) -> None:
        """Remember the step of a loss that is not finite, without asking the device for it."""
        here = torch.full_like(self.bad_step, self.step + 1)
        first = (self.bad_step == 0) & ~torch.isfinite(loss.detach())
        self.bad_step = torch.where(first, here, self.bad_step)

    def advance(self) -> int | None:
        """Count a step; the step of the first loss that was not finite on any rank, if there is."""
        self.step += 1
        if self.step < self.next_agreement and self.limits.progress(self.step, self.seconds) < 1:
            return None
        return self.agree()

    def agree(self) -> int | None:
        """One small reduction: who was told to stop, what rank 0's clock says, a bad loss."""
        accelerator = self.accelerator
        clock = time.monotonic() - self.began if accelerator.is_main_process else 0.0
        mine = torch.stack(
            [
                self.bad_step.new_tensor(self.asked_to_stop),
                self.bad_step.new_tensor(clock),
                self.bad_step,
            ]
        )
        everyone = accelerator.gather(mine[None])
        assert isinstance(everyone, torch.Tensor)
        stop, seconds, _ = everyone.sum(dim=0).tolist()
        steps = self.step - (self.next_agreement - self.every)
        per_step = max(1e-6, (seconds - self.seconds) / max(1, steps))
        self.seconds = seconds
        self.interrupted = stop > 0
        self.every = max(1, min(1000, round(AGREE_SECONDS / per_step)))
        self.next_agreement = self.step + self.every
        bad = [int(step) for step in everyone[:, 2].tolist() if step > 0]
        return min(bad) if bad else None
