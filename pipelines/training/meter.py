"""Metrics and progress display of the training loop."""

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

MAX_OVERFLOWS = 30
"""Steps in a row that a loss scaler may skip; it halves its scale of 65,536 each time."""


class Meter:
    """Mean losses and rates since the last read. Losses stay on the device until then."""

    def __init__(self, names: Sequence[str], accelerator: Accelerator, flops: int) -> None:
        """Start counting.

        Args:
            names: names of the parts of the loss.
            accelerator: provides ranks and device.
            flops: FLOPs of one forward and backward pass of this rank.
        """
        self.names = ["train/loss", *(f"train/loss_{name}" for name in names)]
        self.accelerator, self.flops = accelerator, flops
        self.peak = None
        if accelerator.device.type == "cuda":
            name = torch.cuda.get_device_name(accelerator.device)
            self.peak = peak_tflops(name, accelerator.mixed_precision)
        self.memory = PeakMemory(accelerator.device)
        self.skipped = self.overflows = self.consecutive_overflows = 0
        self.reset()

    def reset(self) -> None:
        """Restart means and rates."""
        self.sums = torch.zeros(len(self.names), device=self.accelerator.device)
        self.passes, self.waited, self.start = 0, 0.0, time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in the block as spent waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def add(self, losses: Tensor, skipped: Sequence[str]) -> None:
        """Add the losses of one pass [1 + parts]; print the samples that were replaced in it."""
        self.sums += losses
        self.passes += 1
        self.skipped += len(skipped)
        for line in skipped:
            # On every rank: each knows only its own.
            tqdm.write(f"skipped: {line}", file=sys.stderr)

    def count_overflow(self, skipped: bool) -> None:
        """Count a step that the loss scaler skipped because gradients overflowed float16.

        Raises RunError, on all ranks, after too many in a row.
        """
        self.overflows += skipped
        self.consecutive_overflows = self.consecutive_overflows + 1 if skipped else 0
        if self.consecutive_overflows >= MAX_OVERFLOWS:
            raise RunError(
                f"the gradients of {MAX_OVERFLOWS} steps in a row were too large for float16; "
                "lower --optim.lr, or train in bf16 (accelerate launch --mixed_precision bf16)"
            )

    def read(self, global_batch_size: int) -> dict[str, float]:
        """Return the metrics since the last read, and restart them. Every rank must call this.

        `train/loss…`: means over passes and ranks; `train/data_wait`: share of the time spent
        waiting for data; `train/tflops`: 10^12 FLOPs per second of this device in forward and
        backward passes (`pipelines.training.flops`); `train/mfu`: their share of its peak, if that
        is known; `train/skipped`: samples that were replaced on all ranks since the start of this
        process; `train/overflows`: steps that the loss scaler skipped, in float16.
        """
        skipped = torch.tensor([self.skipped], device=self.sums.device)
        mine = torch.cat([self.sums / max(1, self.passes), skipped])
        mean = self.accelerator.reduce(mine, "mean")
        assert isinstance(mean, Tensor)
        *means, mean_skipped = mean.tolist()
        seconds = max(1e-9, time.perf_counter() - self.start)
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
    """Peak memory: of the GPU, or without one, of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.max_bytes = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def read(self) -> dict[str, float]:
        """Return `train/memory_gib`; on a GPU also `train/gpu_memory_gib`, since the last read."""
        if self.device.type != "cuda":
            # Linux reports KiB, macOS bytes.
            unit = 1 if sys.platform == "darwin" else 1024
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
            return {"train/memory_gib": used / 2**30}
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.max_bytes = max(self.max_bytes, peak)
        return {"train/memory_gib": self.max_bytes / 2**30, "train/gpu_memory_gib": peak / 2**30}


class Progress:
    """Progress of a run: a bar on a terminal, else a line per log. Prints on the main process."""

    def __init__(self, accelerator: Accelerator, budget: Budget) -> None:
        self.prints, self.budget = accelerator.is_main_process, budget
        self.terminal = sys.stderr.isatty()
        self.dice: float | None = None
        """Macro Dice of the last validation."""
        self.bar = tqdm(
            total=1000,
            initial=round(1000 * budget.progress),
            desc="train",
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            disable=not (self.prints and self.terminal),
        )

    def show(self, values: dict[str, float]) -> None:
        """Display the metrics of the last log."""
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
            self.print_line(
                f"{self.budget.progress:4.0%}  {text}, {timedelta(seconds=round(left))} left"
            )

    def print_line(self, line: str) -> None:
        """Print a line above the bar."""
        if self.prints:
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        self.bar.close()
