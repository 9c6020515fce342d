"""Forward passes, uint8 images -> logits, with smaller batches if memory runs out."""

import gc
import sys
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from pipelines.runtime.errors import RunError
from pipelines.runtime.failures import is_out_of_memory, summarise_error
from unet import Ensemble, UNet

Forward = Callable[[Tensor], Tensor]
"""uint8 images [B, C, H, W] -> logits."""


class TileTooLargeError(RunError):
    """A single tile exceeds the memory of a GPU."""

    def __init__(self, height: int, width: int, reason: str) -> None:
        """`reason`: the message of torch, which may have another cause."""
        super().__init__(
            f"a single tile of {height} x {width} pixels exceeds the memory of this GPU "
            f"({reason}); lower --tile, for example to {max(height, width) // 2}"
        )
        self.height, self.width, self.reason = height, width, reason


def make_forward(
    model: UNet | Ensemble, accelerator: Accelerator, *, compiled: bool = False
) -> Forward:
    """Make a function from uint8 images [B, C, H, W] to logits, in the accelerator's precision.

    If a batch exceeds the memory of a GPU, it and all later ones are halved until they fit, with
    one warning. The function raises TileTooLargeError if a single image does not fit.

    Args:
        model: with its DataSpec, on the device.
        accelerator: device and precision.
        compiled: whether only batches of the original size are compiled.
    """
    device = accelerator.device
    max_batch, warned, reason = sys.maxsize, False, ""

    def attempt(image: Tensor) -> Tensor | None:
        nonlocal reason
        try:
            parts = [compute(part) for part in image.split(min(max_batch, len(image)))]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Only the text is kept: the traceback would keep the allocated tensors alive.
            reason = summarise_error(error)
            return None

    def compute(image: Tensor) -> Tensor:
        if device.type == "cuda" and image.device.type == "cpu":
            # A copy from pageable memory would wait for all queued GPU work.
            image = image.pin_memory()
        with accelerator.autocast():
            # On other devices, such as MPS, memory may be reused before an asynchronous copy ends.
            overlap = device.type == "cuda"
            return model.logits(image.to(device, non_blocking=overlap))

    def forward(image: Tensor) -> Tensor:
        nonlocal max_batch, warned
        before = max_batch
        while (logits := attempt(image)) is None:
            size = min(max_batch, len(image))
            if size == 1:
                height, width = image.shape[-2:]
                raise TileTooLargeError(height, width, reason)
            max_batch = size // 2
            if device.type == "cuda":
                # Reference cycles of the failed pass keep its tensors alive.
                gc.collect()
                torch.cuda.empty_cache()
        if max_batch < before and not warned:
            warned = True
            tqdm.write(
                f"a batch of {len(image)} tiles exceeds the memory of this GPU ({device}); "
                f"continuing with {max_batch}, {describe_halved(max_batch, compiled=compiled)}",
                file=sys.stderr,
            )
        return logits

    return forward


def place_model(model: UNet | Ensemble, device: torch.device) -> None:
    """Move a model to the device; members that stay on the host are copied from pinned memory."""
    model.to(device)
    if isinstance(model, Ensemble) and model.on_host and device.type == "cuda":
        for member in model.members:
            for tensor in (*member.parameters(), *member.buffers()):
                tensor.data = tensor.data.pin_memory()


def describe_halved(batch_size: int, *, compiled: bool) -> str:
    """Describe how results of halved batches compare with those of --batch-size."""
    if compiled:
        return (
            "uncompiled, so that from here on masks may differ in a few pixels; "
            f"--batch-size {batch_size}, into another --out, compiles all"
        )
    return f"as --batch-size {batch_size} would have from the start"
