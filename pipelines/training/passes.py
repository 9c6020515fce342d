"""Training passes: their context on a device, and how a step divides into them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from pipelines.runtime.errors import RunError, UsageError
from pipelines.runtime.failures import is_out_of_memory, summarise_error


@dataclass(frozen=True, slots=True)
class TrainingPass:
    """Context of each pass: cuDNN benchmarking, and an error with remedies if memory runs out."""

    device: torch.device
    batch_size: int
    """Samples of a pass on this rank."""
    crop_size: int
    """Side of the square crops, in pixels."""
    gradient_checkpointing: bool
    """Whether gradient checkpointing is already enabled."""
    benchmark: bool
    """Let cuDNN benchmark its algorithms for each new shape and use the fastest. Off outside of
    passes: crops have one shape, validation images have many."""

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        """Run a pass of optimizer step `step`, counted from 1.

        Raises RunError naming the flags that help if the device runs out of memory.
        """
        torch.backends.cudnn.benchmark = self.benchmark and self.device.type == "cuda"
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(self.describe(step, summarise_error(error))) from error
        finally:
            torch.backends.cudnn.benchmark = False

    def describe(self, step: int, reason: str) -> str:
        """Return the error text: what does not fit, the peak memory, and the flags that help."""
        peak = ""
        if self.device.type == "cuda":
            used = torch.cuda.max_memory_allocated(self.device) / 2**30
            peak = f", at a peak of {used:.1f} GiB"
        remedies = ["lower --crop-size"]
        if not self.gradient_checkpointing:
            remedies.insert(0, "add --gradient-checkpointing")
        if self.batch_size > 1:
            remedies.insert(0, "raise --accumulate (--accumulate auto finds what fits)")
        return (
            f"step {step}: a pass over {self.batch_size} crops of {self.crop_size} x "
            f"{self.crop_size} pixels does not fit into the memory of the GPU{peak} ({reason}); "
            f"{', '.join(remedies[:-1])}{' or ' if remedies[1:] else ''}{remedies[-1]}"
        )


def uncompiled(compiled: bool) -> AbstractContextManager[None]:
    """Run a compiled network eagerly: each size of image would be compiled separately."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def refuse_uneven_batch(samples: int, world: int, passes: int) -> None:
    """Raise UsageError if a step does not divide evenly among ranks and passes."""
    parts = world * passes
    if samples % parts:
        below = samples // parts * parts
        fitting = [str(number) for number in (below, below + parts) if number]
        raise UsageError(
            f"--global-batch-size {samples} does not divide among {world} ranks x {passes} "
            f"accumulated passes; {' or '.join(fitting)} would"
        )
