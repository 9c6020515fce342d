"""Arithmetic of a training step, and what a GPU could do at most: for TFLOP/s and MFU."""

import re

import torch
from torch.utils.flop_counter import FlopCounterMode

from unet import UNet, UNetConfig

HALF = ("fp16", "bf16")
PEAKS: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    (r"NVIDIA GH200.*", 989, HALF),
    (r"NVIDIA H200", 989, HALF),
    (r"NVIDIA H200 NVL", 835, HALF),
    (r"NVIDIA H100 NVL", 835, HALF),
    (r"NVIDIA H100 80GB HBM3", 989, HALF),
    (r"NVIDIA H100 PCIe", 756, HALF),
    (r"NVIDIA A100.*", 312, HALF),
    (r"NVIDIA L40S", 362, HALF),
    (r"NVIDIA L40", 181, HALF),
    (r"NVIDIA L4", 121, HALF),
    (r"NVIDIA A10", 125, HALF),
    (r"NVIDIA A10G", 70, HALF),
    (r"Tesla V100-SXM.*", 125, ("fp16",)),
    (r"Tesla V100-PCIE.*", 112, ("fp16",)),
    (r"Tesla T4", 65, ("fp16",)),
    (r"NVIDIA GeForce RTX 4090", 165, HALF),
    (r"NVIDIA GeForce RTX 3090", 71, HALF),
)
"""Pattern of the name that CUDA reports, dense TFLOP/s of the matrix units with float32 sums, and
the precisions that have them. From NVIDIA's data sheets (where those count structured sparsity,
half of what they print); for GeForce from appendix A of the Ada and Ampere GA102 white papers."""


def count_flops(config: UNetConfig, batch_size: int, crop_size: int) -> int:
    """Count the FLOPs of one forward and backward pass over a batch of square crops.

    They are those of convolutions and matrix products; a multiply-add is two. A copy of the network
    on the meta device goes through both passes under torch.utils.flop_counter: nothing is computed,
    and no weight and no random state changes. What gradient checkpointing computes a second time is
    left out: MFU is about the work that the model needs, however it is done (Chowdhery et al.,
    "PaLM", 2022, appendix B).
    """
    with torch.device("meta"):
        model = UNet(config).train()
        image = torch.empty(batch_size, config.in_channels, crop_size, crop_size)
    with FlopCounterMode(display=False) as counter:
        model(image).sum().backward()
    return counter.get_total_flops()


def peak_tflops(name: str, precision: str) -> float | None:
    """Look up the dense TFLOP/s of a GPU by its CUDA name; None where they are not known.

    `precision`: fp16 or bf16, as the run computes; others do not use these matrix units. A part of
    a card (MIG) has another name, and so no peak here.
    """
    for pattern, tflops, precisions in PEAKS:
        # The whole name: an L4 is no L40S, and a laptop's 4090 has half the rate.
        if re.fullmatch(pattern, name) and "MIG" not in name and precision in precisions:
            return float(tflops)
    return None
