"""`--compile` of prediction: one shape is compiled, and which one depends on the job alone.

What a compiled network computes differs in the last bits from what it computes uncompiled, and from
what another graph of it does. Left alone, PyTorch makes one for the first shape that it sees, a
general one for the others, and gives up after eight; then bytes would depend on which image a rank
sees first, and on interruptions. So one graph is made, for full batches of tiles as large as those
of the first image of the job. Other batches, such as the last one of a shard, run uncompiled; so
does everything after a batch that did not fit into the memory of the GPU, which is printed, since
the bytes then depend on the free memory.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from pipelines.inference.decoding import Decoder
from pipelines.runtime.errors import RunError
from unet import TileConfig, UNet
from unet.tiling import lay_out_tiles

LARGE_SHARE = 0.1
"""More than this share of the tiles uncompiled is worth a line."""


def first_tile(decode: Decoder, tiles: TileConfig, model: UNet) -> tuple[int, int] | None:
    """Height and width of the tiles of the first input that can be read; None if none can."""
    for number in range(len(decode.inputs)):
        if (image := decode(number).image) is not None:
            height, width = image.shape[-2:]
            rows, columns = lay_out_tiles(height, width, tiles, model.config)
            return rows.side, columns.side
    return None


class CompiledForward:
    """The forward of a network, compiled for one shape.

    Args:
        forward: float32 images [B, C, H, W] -> logits.
        shape: (B, H, W) that is compiled, when it is first seen.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], shape: tuple[int, int, int]) -> None:
        self.forward, self.shape = forward, shape
        self.compiled = torch.compile(forward, dynamic=False)
        self.total = self.uncompiled = 0

    def __call__(self, image: Tensor) -> Tensor:
        """Raises RunError where the network cannot be compiled on this machine."""
        self.total += len(image)
        if (len(image), *image.shape[-2:]) != self.shape:
            self.uncompiled += len(image)
            return self.forward(image)
        # Importing it takes seconds, and compiling has done so.
        from torch._dynamo.exc import TorchDynamoException

        try:
            return self.compiled(image)
        except TorchDynamoException as error:
            reason = " ".join(str(error).split())[:200]
            raise RunError(
                f"--compile: the network cannot be compiled on this machine ({reason}); install a "
                "C++ compiler and the headers of Python, or leave --compile out, into another --out"
            ) from error

    def report(self) -> None:
        """Print a line where much of the work ran uncompiled."""
        if self.uncompiled <= LARGE_SHARE * self.total:
            return
        batch, height, width = self.shape
        tqdm.write(
            f"--compile: {self.uncompiled:,} of {self.total:,} tiles ran uncompiled, since only "
            f"full batches of {batch} tiles of {height} x {width}, as of the first image, are "
            "compiled; lower --tile or --batch-size, into another --out",
            file=sys.stderr,
        )
