"""uint8 images -> logits, halving the batch where memory runs out."""

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
    """One tile alone does not fit into the memory of a GPU."""

    def __init__(self, height: int, width: int, reason: str) -> None:
        """`reason`: the message of torch, which may mean something else."""
        super().__init__(
            f"a tile of {height} x {width} pixels alone does not fit into the memory of this GPU "
            f"({reason}); lower --tile, to {max(height, width) // 2} perhaps"
        )
        self.height, self.width, self.reason = height, width, reason


def make_forward(model: UNet, accelerator: Accelerator) -> Callable[[Tensor], Tensor]:
    """uint8 images [B, C, H, W] -> logits, in the precision of the accelerator.

    A batch that does not fit into a GPU's memory is halved until it does, and so are those after
    it; that is said once. Raises TileTooLargeError where half of it would be no picture.
    """
    spec, device = require_spec(model), accelerator.device
    most, said, reason = sys.maxsize, False, ""

    def attempt(image: Tensor) -> Tensor | None:
        nonlocal reason
        try:
            parts = [compute(part) for part in image.split(min(most, len(image)))]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            # Only the text is kept: the traceback, which holds what was allocated, ends here.
            reason = summary(error)
            return None

    def compute(image: Tensor) -> Tensor:
        if device.type == "cuda" and image.device.type == "cpu":
            # Else the copy would wait for all that the GPU has to do.
            image = image.pin_memory()
        with accelerator.autocast():
            # Elsewhere, on MPS for one, memory may be used again before an overlapped copy is done.
            overlap = device.type == "cuda"
            return model(spec.normalise(image.to(device, non_blocking=overlap)))

    def forward(image: Tensor) -> Tensor:
        nonlocal most, said
        before = most
        while (logits := attempt(image)) is None:
            size = min(most, len(image))
            if size == 1:
                height, width = image.shape[-2:]
                raise TileTooLargeError(height, width, reason)
            most = size // 2
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if most < before and not said:
            said = True
            tqdm.write(
                f"{len(image)} tiles at a time do not fit into the memory of this GPU ({device}): "
                f"going on with {most}, as --batch-size {most} would have from the start",
                file=sys.stderr,
            )
        return logits

    return forward
