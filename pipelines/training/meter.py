"""Means, rates and progress of the training loop."""

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from pipelines.runtime.errors import RunError
from pipelines.training.budget import Budget
from pipelines.training.flops import peak_tflops

MOST_OVERFLOWS = 30
"""Steps in a row that a loss scaler may leave out; it halves its scale of 65,536 each time."""


class Meter:
    """Means of the losses and rates since they were last read; nothing leaves the device before."""

    def __init__(self, names: Sequence[str], accelerator: Accelerator, flops: int) -> None:
        """`names`: of the parts of the loss; `flops`: of one pass of this rank, with backward."""
        self.names = ["train/loss", *(f"train/loss_{name}" for name in names)]
        self.accelerator, self.flops = accelerator, flops
        self.peak = None
        if accelerator.device.type == "cuda":
            name = torch.cuda.get_device_name(accelerator.device)
            self.peak = peak_tflops(name, accelerator.mixed_precision)
        self.memory = PeakMemory(accelerator.device)
        self.skipped = self.overflows = self.in_a_row = 0
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.sums = torch.zeros(len(self.names), device=self.accelerator.device)
        self.passes, self.waited, self.began = 0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in the block as spent waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def add(self, losses: Tensor, skipped: Sequence[str]) -> None:
        """Count the loss and its parts in one forward pass, and tell what was skipped for it."""
        self.sums += losses
        self.passes += 1
        self.skipped += len(skipped)
        for line in skipped:
            # Of every rank: nobody else knows.
            tqdm.write(f"skipped: {line}", file=sys.stderr)

    def count_overflow(self, skipped: bool) -> None:
        """Count a step that the loss scaler left out, for gradients too large for float16.

        Raises RunError, on all ranks, where that happens step after step.
        """
        self.overflows += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if self.in_a_row >= MOST_OVERFLOWS:
            raise RunError(
                f"the gradients of {MOST_OVERFLOWS} steps in a row were too large for float16; "
                "lower --optim.lr, or train in bf16 (accelerate launch --mixed_precision bf16)"
            )

    def read(self, global_batch_size: int) -> dict[str, float]:
        """The means over passes and ranks, samples per second, and the share of time waited.

        `train/tflops`: 10^12 floating-point operations per second of this device, those of the
        network's forward and backward passes (`pipelines.training.flops`); `train/mfu`: their share
        of its peak, where that is known; `train/skipped`: samples of all ranks that were replaced
        since the run was started; `train/overflows`: steps that the loss scaler left out, in
        float16.
        """
        skipped = torch.tensor([self.skipped], device=self.sums.device)
        mine = torch.cat([self.sums / max(1, self.passes), skipped])
        mean = self.accelerator.reduce(mine, "mean")
        assert isinstance(mean, Tensor)
        *means, mean_skipped = mean.tolist()
        seconds = max(1e-9, time.perf_counter() - self.began)
        steps = self.passes / self.accelerator.gradient_accumulation_steps
        tflops = self.passes * self.flops / seconds / 1e12
        values = {
            **dict(zip(self.names, means, strict=True)),
            "train/samples_per_second": steps * global_batch_size / seconds,
            "train/data_wait": self.waited / seconds,
            "train/tflops": tflops,
            **({} if self.peak is None else {"train/mfu": tflops / self.peak}),
            **self.memory.read(),
            "train/skipped": round(mean_skipped * self.accelerator.num_processes),
        }
        if self.accelerator.scaler is not None:
            values["train/overflows"] = self.overflows
        self.reset()
        return values


class PeakMemory:
    """The most memory in use: on the GPU, or, without one, by this process."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.most = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> dict[str, float]:
        """`train/memory_gib`: so far; on a GPU `train/gpu_memory_gib`: since it was last read."""
        if self.device.type != "cuda":
            # Linux counts in KiB, macOS in bytes.
            unit = 1 if sys.platform == "darwin" else 1024
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            return {"train/memory_gib": used / 2**30}
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.most = max(self.most, peak)
        return {"train/memory_gib": self.most / 2**30, "train/gpu_memory_gib": peak / 2**30}


class Progress:
    """What a person sees while a run goes on: a bar on a terminal, else a line now and then."""

    def __init__(self, accelerator: Accelerator, budget: Budget) -> None:
        self.speaks, self.budget = accelerator.is_main_process, budget
        self.terminal = sys.stderr.isatty()
        self.dice: float | None = None
        """Of the last validation."""
        self.bar = tqdm(
            total=1000,
            initial=round(1000 * budget.progress),
            desc="train",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            disable=not (self.speaks and self.terminal),
        )

    def show(self, values: dict[str, float]) -> None:
        """The latest numbers."""
        text = (
            f"step {self.budget.step}, loss {values['train/loss']:.4f}, "
            f"{values['train/samples_per_second']:.1f} samples/s, "
            f"waited {values['train/data_wait']:.0%}"
        )
        if self.dice is not None:
            text += f", dice {self.dice:.4f}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(round(1000 * self.budget.progress) - self.bar.n)
        if not self.terminal:
            left = self.budget.seconds * (1 / max(self.budget.progress, 1e-9) - 1)
            self.say(f"{self.budget.progress:4.0%}  {text}, {timedelta(seconds=round(left))} left")

    def say(self, line: str) -> None:
        """A line that stays."""
        if self.speaks:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.bar.close()
