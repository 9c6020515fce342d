"""The timed trial of a plan: how long a training step of each width takes, and in what memory."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

import msgspec
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipelines.loading.augment import Augment, AugmentConfig
from pipelines.model.build import ModelConfig, build_loss, build_model
from pipelines.runtime.errors import RunError
from pipelines.training.memory_probe import Probe, has_memory_limit
from pipelines.training.optim import OptimConfig, build_learner
from shards.documents import Positive, Sha256
from shards.manifest import Manifest
from unet import LossConfig

TRIAL_VERSION = 1
WIDTHS = (8, 12, 16, 24, 32, 48, 64)
"""Channels of the first level that are tried, up to those of the preset `modern`."""
TIMED_STEPS = 5
"""Steps that are timed, of which the median counts, after one that is not."""
MAX_SECONDS = 10.0
"""After this time a width is not timed further: the steps so far count."""
MAX_DEPTH, BOTTOM_SIDE = 4, 4
"""Depth of the presets; smaller crops get less, so that their coarsest map has a side of 4."""
COPIES = 5
"""Weights, gradients, two moments of AdamW and the average of the weights, in float32."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Training steps of one network on one device."""

    base_channels: Positive
    crop_size: Positive
    """Side of the crops in pixels."""
    global_batch_size: Positive
    """Samples of a step."""
    accumulate: Positive
    """Passes of a step, the fewest that fit into the memory."""
    seconds: Annotated[float, msgspec.Meta(gt=0)]
    """Median time of a step."""
    memory: Positive
    """Bytes of a step: on a GPU its peak, on a CPU an estimate."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The timings of a plan, and what was timed."""

    version: int
    manifest: Sha256
    """Digest of the manifest of the data set."""
    device: str
    precision: str
    timings: tuple[Timing, ...]
    """By increasing width."""


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Times training steps of networks of increasing width."""

    accelerator: Accelerator
    manifest: Manifest
    crop_size: int
    global_batch_size: int
    memory: int
    """Bytes that a step may take."""

    def time_widths(self, slowest: float) -> Iterator[Timing]:
        """Time each width until a step takes more than `slowest` seconds or memory runs out.

        Prints each timing. Raises RunError if one sample does not fit into the memory even in the
        narrowest network.
        """
        for width in WIDTHS:
            try:
                timing = self.time_width(width)
            except RunError:
                if width == WIDTHS[0]:
                    raise
                return
            print(f"{width} channels: {timing.seconds:.3g} s a step", file=sys.stderr)
            yield timing
            if timing.seconds > slowest:
                return

    def time_width(self, width: int) -> Timing:
        """Time one width. Raises RunError if a single sample does not fit into the memory."""
        device = self.accelerator.device
        network = ModelConfig(base_channels=width, depth=choose_depth(self.crop_size))
        model = build_model(network, self.manifest, self.crop_size)
        learner = build_learner(model.to(device), OptimConfig())
        learner.model.train()
        probe = Probe(
            accelerator=self.accelerator,
            learner=learner,
            criterion=build_loss(LossConfig(), self.manifest).to(device),
            augment=Augment(AugmentConfig(), seed=0),
            crop_size=self.crop_size,
            border=False,
            benchmark=True,
        )
        if has_memory_limit(device):
            passes = probe.choose_passes(self.global_batch_size)
            seconds = time_steps(probe, passes, self.global_batch_size // passes)
            memory = torch.cuda.max_memory_allocated(device)
        else:
            passes, memory = self.fit_passes(probe)
            seconds = time_steps(probe, passes, self.global_batch_size // passes)
        return Timing(width, self.crop_size, self.global_batch_size, passes, seconds, memory)

    def fit_passes(self, probe: Probe) -> tuple[int, int]:
        """Return the fewest passes of a step that fit into memory on a CPU, and their bytes.

        The bytes are estimated from what one sample keeps for its gradient. Raises RunError if a
        single sample does not fit.
        """
        model = probe.learner.model
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        maps = count_saved_bytes(model, lambda: probe.make_pass(1))
        model.zero_grad(set_to_none=True)
        for passes in range(1, self.global_batch_size + 1):
            samples, rest = divmod(self.global_batch_size, passes)
            memory = COPIES * weights + samples * maps
            if not rest and memory <= self.memory:
                return passes, memory
        raise RunError(
            f"--memory: one sample of {self.crop_size} x {self.crop_size} pixels does not fit; "
            "raise it"
        )


def choose_depth(crop_size: int) -> int:
    """Return how often crops of this side are downsampled by 2."""
    return max(1, min(MAX_DEPTH, (crop_size // BOTTOM_SIDE).bit_length() - 1))


def time_steps(probe: Probe, passes: int, batch_size: int) -> float:
    """Return the median time of a step in seconds, of a few after the first."""
    learner, device = probe.learner, probe.accelerator.device
    times: list[float] = []
    while len(times) < 2 or (len(times) <= TIMED_STEPS and sum(times) < MAX_SECONDS):
        start = time.perf_counter()
        for _ in range(passes):
            probe.make_pass(batch_size)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        learner.update_average(1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return round(statistics.median(times[1:]), 6)


def count_saved_bytes(model: nn.Module, run: Callable[[], None]) -> int:
    """Count the bytes that autograd keeps for the backward pass in `run`, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(saved.values())
