"""`--accumulate auto`: finds the fewest passes per step that fit into GPU memory, by trial."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import Tensor
from torch.optim import AdamW, Optimizer

from pipelines.loading.augment import Augment
from pipelines.model.load import require_spec
from pipelines.runtime.errors import RunError
from pipelines.runtime.failures import is_out_of_memory, summarise_error
from pipelines.training.optim import Learner
from unet import SegmentationLoss

MARGIN = 0.05
"""Share of a GPU's memory to leave free, for communication and fragmentation."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Runs training passes on synthetic samples, before the model is prepared."""

    accelerator: Accelerator
    learner: Learner
    """With compilation, memory format and gradient checkpointing as in training."""
    criterion: SegmentationLoss
    augment: Augment
    crop_size: int
    border: bool
    """Whether samples have border maps."""
    benchmark: bool
    """Let cuDNN benchmark its algorithms as in training: their workspaces take memory too."""

    def choose_passes(self, samples: int) -> int:
        """Find the smallest number of passes that each fit into memory, equal on all ranks.

        Weights, gradients, batch statistics, random generators and compiled code are restored.
        Every rank must call this. Raises RunError, on all ranks, if a single sample does not fit
        on one of them.

        Args:
            samples: samples of an optimizer step on this rank; the number of passes divides it.
        """
        device = self.accelerator.device
        if not has_memory_limit(device):
            return 1
        candidates = [passes for passes in range(1, samples + 1) if samples % passes == 0]
        failure = None
        with restoring_state(self.learner, device):
            for passes in candidates:
                if self.accelerator.is_main_process:
                    # With --compile, each of them takes a minute.
                    tried = f"{passes} x {samples // passes} samples"
                    print(f"--accumulate auto: trying {tried}", file=sys.stderr)
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
        """Try a batch size and free its memory. Returns why it does not fit, None if it does."""
        failure = self.attempt(batch_size, accumulated=accumulated)
        self.learner.model.zero_grad(set_to_none=True)
        if self.learner.model._compiled_call_impl is not None:
            # A second batch size would make torch.compile use dynamic shapes, which is slower.
            torch.compiler.reset()
        if self.accelerator.device.type == "cuda":
            # Reference cycles of a failed pass keep its tensors alive.
            gc.collect()
            torch.cuda.empty_cache()
        return failure

    def attempt(self, batch_size: int, *, accumulated: bool) -> str | None:
        """Run the passes of a step. Returns the error in one line if memory runs out."""
        torch.backends.cudnn.benchmark = self.benchmark and self.accelerator.device.type == "cuda"
        try:
            reserve = reserve_memory(self.learner, self.accelerator)
            for _ in range(1 + accumulated):
                # The second pass runs while the gradients of the first are kept.
                self.make_pass(batch_size)
            del reserve
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Only the text is kept: the traceback would keep the tensors alive.
            return summarise_error(error)
        finally:
            torch.backends.cudnn.benchmark = False
        return None

    def make_pass(self, batch_size: int) -> None:
        """Run forward, loss and backward on black images of class 0."""
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
        # As Accelerate does before the loss.
        loss, _ = self.criterion(convert_to_fp32(logits), mask, border)
        loss.backward()


def describe_passes(device: torch.device, passes: int, samples: int) -> str:
    """Describe a choice in one line; `samples`: of an optimizer step on this rank."""
    size = samples // passes
    chosen = f"--accumulate auto: {passes} x {size} samples a step on each rank"
    if not has_memory_limit(device):
        return f"{chosen}; other numbers of passes are tried on CUDA devices only"
    return f"{chosen}, the fewest passes that fit into the memory of the GPU"


def has_memory_limit(device: torch.device) -> bool:
    """Whether a device raises an error when its memory is full. CPUs swap or kill the process."""
    return device.type == "cuda"


def reserve_memory(learner: Learner, accelerator: Accelerator) -> list[Tensor]:
    """Allocate what training will need in addition to a pass.

    That is the optimizer's moments, DDP's gradient buckets with several ranks, and a margin.
    """
    optimizer = learner.optimizer
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
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
    """Return the number of tensors of a parameter's size that the optimizer keeps for it."""
    if isinstance(optimizer, AdamW):
        return 2
    return int(any(group["momentum"] for group in optimizer.param_groups))


@contextmanager
def restoring_state(learner: Learner, device: torch.device) -> Iterator[None]:
    """Restore random generators, training mode and peak memory statistics after the block.

    Batch norms run in evaluation mode, which takes as much memory: they neither update statistics
    nor synchronise ranks.
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
