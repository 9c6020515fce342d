"""`--accumulate auto`: the fewest passes of a step that fit into a GPU, found by trying."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim import AdamW, Optimizer

from pipelines.loading.augment import Augment
from pipelines.model.load import require_spec
from pipelines.runtime.errors import RunError
from pipelines.runtime.failures import out_of_memory, summary
from pipelines.training.optim import Learner
from unet import SegmentationLoss

MARGIN = 0.05
"""Share of a GPU's memory that is left free: for communication, and for what fragments."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Makes passes of synthetic samples as training does, before the model is prepared."""

    accelerator: Accelerator
    learner: Learner
    """Compiled, in channels_last and with checkpointing, as training has it."""
    criterion: SegmentationLoss
    augment: Augment
    crop_size: int
    border: bool
    """Whether samples have border maps."""
    benchmark: bool
    """Let cuDNN time its algorithms, as training does: their workspaces take memory too."""

    def choose_passes(self, samples: int) -> int:
        """The smallest number of passes of which each fits into memory, the same on all ranks.

        Weights, gradients, batch statistics, random generators and compiled code are afterwards as
        they were. Every rank must call this. Raises RunError, on all ranks, where one sample is
        too much for one of them.

        Args:
            samples: of one optimizer step on this rank; passes divide it.
        """
        device = self.accelerator.device
        if not has_memory_limit(device):
            return 1
        candidates = [passes for passes in range(1, samples + 1) if samples % passes == 0]
        failure = None
        with left_as_it_was(self.learner, device):
            for passes in candidates:
                failure = self.find_failure(samples // passes, accumulated=passes > 1)
                if failure is None:
                    break
            else:
                passes = samples + 1
        everyone = self.accelerator.gather(torch.tensor([passes], device=device))
        assert isinstance(everyone, Tensor)
        passes = int(everyone.max())
        if passes > samples:
            raise RunError(
                f"--accumulate auto: one sample of {self.crop_size} x {self.crop_size} pixels does "
                f"not fit into the memory of the GPU ({failure or 'of another rank'}); lower "
                "--crop-size or --model.base-channels, or give --gradient-checkpointing"
            )
        return passes

    def find_failure(self, batch_size: int, *, accumulated: bool) -> str | None:
        """Make passes of a batch size and free what they took; why they do not fit, None if so."""
        failure = self.attempt(batch_size, accumulated=accumulated)
        self.learner.model.zero_grad(set_to_none=True)
        if self.learner.model._compiled_call_impl is not None:
            # A second batch size would make the compiled code one for all sizes, which is slower.
            torch.compiler.reset()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        return failure

    def attempt(self, batch_size: int, *, accumulated: bool) -> str | None:
        """Make the passes of a step; the error, in one line, where memory does not suffice."""
        torch.backends.cudnn.benchmark = self.benchmark and self.accelerator.device.type == "cuda"
        try:
            reserve = reserve_memory(self.learner, self.accelerator)
            for _ in range(1 + accumulated):
                # The second time beside the gradients of the first.
                self.make_pass(batch_size)
            del reserve
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            # The traceback, which holds what was allocated, ends here.
            return summary(error)
        finally:
            torch.backends.cudnn.benchmark = False
        return None

    def make_pass(self, batch_size: int) -> None:
        """Forward, loss and backward of samples that are black and of class 0."""
        device, spec = self.accelerator.device, require_spec(self.learner.model)
        shape = (batch_size, self.crop_size, self.crop_size)
        mask = torch.zeros(shape, dtype=torch.uint8, device=device)
        planes = mask[:, None].repeat(1, len(spec.channels), 1, 1)
        position = torch.arange(batch_size)
        image, mask, border = self.augment(
            spec.normalise(planes), mask, position, mask if self.border else None
        )
        with self.accelerator.autocast():
            logits = self.learner.model(image)
        # Accelerate makes logits float32 before the loss sees them.
        loss, _ = self.criterion(logits.float(), mask, border)
        loss.backward()


def describe_passes(device: torch.device, passes: int, samples: int) -> str:
    """The line that is printed of a choice; `samples`: of one optimizer step on this rank."""
    size = samples // passes
    chosen = f"--accumulate auto: {passes} x {size} samples a step on each rank"
    if not has_memory_limit(device):
        return f"{chosen}; other numbers of passes are tried on CUDA devices only"
    return f"{chosen}, the fewest passes that fit into the memory of the GPU"


def has_memory_limit(device: torch.device) -> bool:
    """Whether a device says when its memory is full. CPUs swap, or end the process."""
    return device.type == "cuda"


def reserve_memory(learner: Learner, accelerator: Accelerator) -> list[Tensor]:
    """Memory that training will need besides a pass and does not have yet.

    The optimizer's moments, DDP's copy of the gradients where there are several ranks, a margin.
    """
    optimizer, parameters = (
        learner.optimizer,
        [p for p in learner.model.parameters() if p.requires_grad],
    )
    fresh = [parameter for parameter in parameters if parameter not in optimizer.state]
    copies = fresh * num_moments(optimizer)
    if accelerator.num_processes > 1:
        copies += parameters
    reserve = [torch.empty_like(parameter) for parameter in copies]
    if accelerator.device.type == "cuda":
        total = torch.cuda.get_device_properties(accelerator.device).total_memory
        size = round(MARGIN * total)
        reserve.append(torch.empty(size, dtype=torch.uint8, device=accelerator.device))
    return reserve


def num_moments(optimizer: Optimizer) -> int:
    """Tensors as large as a parameter that the optimizer keeps for it."""
    if isinstance(optimizer, AdamW):
        return 2
    return int(any(group["momentum"] for group in optimizer.param_groups))


@contextmanager
def left_as_it_was(learner: Learner, device: torch.device) -> Iterator[None]:
    """Restore random generators and batch statistics after the block; its peak is not counted.

    Batch norms run in evaluation mode, which takes the same memory: they neither learn statistics
    nor, over several ranks, wait for each other.
    """
    gpu = [device] if device.type == "cuda" else []
    training = learner.model.training
    learner.model.train()
    for module in learner.model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    try:
        with torch.random.fork_rng(gpu):
            yield
    finally:
        learner.model.train(training)
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
