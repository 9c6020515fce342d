"""uint8 images -> logits, halving the batch where memory runs out."""

import gc
import sys
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from pipelines.model.load import require_spec
from pipelines.runtime.errors import RunError
from pipelines.runtime.failures import out_of_memory, summary
from unet import UNet


class TileTooLargeError(RunError):
    """A single tile does not fit into the memory of a GPU."""

    def __init__(self, height: int, width: int, reason: str) -> None:
        """`reason`: the message of torch, which may mean something else."""
        super().__init__(
            f"a tile of {height} x {width} pixels alone does not fit into the memory of this GPU "
            f"({reason}); lower --tile, to {max(height, width) // 2} perhaps"
        )
        self.height, self.width, self.reason = height, width, reason


def make_forward(
    model: UNet, accelerator: Accelerator, *, compiled: bool = False
) -> Callable[[Tensor], Tensor]:
    """Return a function from images, uint8 [B, C, H, W], to logits.

    It computes in the precision of the accelerator. It halves a batch that does not fit into the
    memory of a GPU until it fits, and all later batches; it prints that once. It raises
    TileTooLargeError if a single image or tile does not fit.

    Args:
        model: with its DataSpec, on the device.
        accelerator: device and precision.
        compiled: whether only batches of the original size are compiled.
    """
    spec, device = require_spec(model), accelerator.device
    max_size, printed, reason = sys.maxsize, False, ""

    def attempt(image: Tensor) -> Tensor | None:
        nonlocal reason
        try:
            parts = [compute(part) for part in image.split(min(max_size, len(image)))]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            # Keeps only the text: the traceback refers to what was allocated.
            reason = summary(error)
            return None

    def compute(image: Tensor) -> Tensor:
        if device.type == "cuda" and image.device.type == "cpu":
            # Otherwise the copy would wait for all queued work of the GPU.
            image = image.pin_memory()
        with accelerator.autocast():
            # On MPS, for one, memory may be reused before an overlapped copy has finished.
            overlap = device.type == "cuda"
            return model(spec.normalise(image.to(device, non_blocking=overlap)))

    def forward(image: Tensor) -> Tensor:
        nonlocal max_size, printed
        before = max_size
        while (logits := attempt(image)) is None:
            size = min(max_size, len(image))
            if size == 1:
                height, width = image.shape[-2:]
                raise TileTooLargeError(height, width, reason)
            max_size = size // 2
            if device.type == "cuda":
                # Reference cycles of the failed pass keep its tensors alive.
                gc.collect()
                torch.cuda.empty_cache()
        if max_size < before and not printed:
            printed = True
            tqdm.write(
                f"{len(image)} tiles at a time do not fit into the memory of this GPU ({device}): "
                f"going on with {max_size}, {describe_halved(max_size, compiled=compiled)}",
                file=sys.stderr,
            )
        return logits

    return forward


def describe_halved(batch_size: int, *, compiled: bool) -> str:
    """Describe how results of halved batches compare with those of --batch-size."""
    if compiled:
        return (
            "uncompiled, so that from here on masks may differ in a few pixels; "
            f"--batch-size {batch_size}, into another --out, compiles all"
        )
    return f"as --batch-size {batch_size} would have from the start"
