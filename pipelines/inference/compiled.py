"""`--compile` of prediction: one shape is compiled, which depends on the job alone.

Logits of a compiled network differ in the last bits from those of the uncompiled network and of
other graphs. By default PyTorch compiles a graph for the first shape that it sees, then a dynamic
one, and stops after eight; the bytes of masks would depend on the first image of a rank and on
interruptions. Therefore one graph is compiled, for full batches of tiles of the size of the first
image of the job. Other batches, such as the last one of a shard, run uncompiled; so does everything
after a batch that did not fit into the memory of the GPU, which is printed, since the bytes then
depend on the free memory.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from pipelines.inference.decoding import Decoder
from pipelines.runtime.errors import RunError
from unet import Ensemble, TileConfig, UNet
from unet.tiling import lay_out_tiles

LARGE_SHARE = 0.1
"""A larger share of uncompiled tiles is reported."""


def first_tile(
    decode: Decoder, tiles: TileConfig, model: UNet | Ensemble
) -> tuple[int, int] | None:
    """Return height and width of the tiles of the first readable input; None if none is."""
    for number in range(len(decode.inputs)):
        if (image := decode(number).image) is not None:
            height, width = image.shape[-2:]
            rows, columns = lay_out_tiles(height, width, tiles, model)
            return rows.side, columns.side
    return None


class CompiledForward:
    """Forward pass of a network, compiled for one shape.

    Args:
        forward: float32 images [B, C, H, W] -> logits.
        shape: (B, H, W) to compile, on first use.
    """

    def __init__(self, forward: Callable[[Tensor], Any], shape: tuple[int, int, int]) -> None:
        self.forward, self.shape = forward, shape
        self.compiled = torch.compile(forward, dynamic=False)
        self.total = self.uncompiled = 0

    def __call__(self, image: Tensor) -> Tensor:
        """Return the logits. Raises RunError if the network cannot be compiled on this machine."""
        self.total += len(image)
        if (len(image), *image.shape[-2:]) != self.shape:
            self.uncompiled += len(image)
            return self.forward(image)
        # The import takes seconds; compiling has done it already.
        from torch._dynamo.exc import TorchDynamoException

        try:
            return self.compiled(image)
        except TorchDynamoException as error:
            reason = " ".join(str(error).split())[:200]
            raise RunError(
                f"--compile: the network cannot be compiled on this machine ({reason}); install a "
                "C++ compiler and the headers of Python, or predict without --compile into another "
                "--out"
            ) from error

    def report(self) -> None:
        """Print a line if a large share of the tiles ran uncompiled."""
        if self.uncompiled <= LARGE_SHARE * self.total:
            return
        batch, height, width = self.shape
        tqdm.write(
            f"--compile: {self.uncompiled:,} of {self.total:,} tiles ran uncompiled: only full "
            f"batches of {batch} tiles of {height} x {width}, the size of the first image, are "
            "compiled; lower --tile or --batch-size and predict into another --out",
            file=sys.stderr,
        )
