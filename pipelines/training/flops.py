"""FLOPs of a training step and peak rates of GPUs, for TFLOP/s and MFU."""

import re

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from unet import UNet, UNetConfig

HALF = ("fp16", "bf16")
PEAKS: tuple[tuple[str, float, tuple[str, ...]], ...] = (
    (r"NVIDIA H200", 989, HALF),
    (r"NVIDIA H100 80GB HBM3", 989, HALF),
    (r"NVIDIA H100 PCIe", 756, HALF),
    (r"NVIDIA A100.*", 312, HALF),
    (r"NVIDIA L40S", 362, HALF),
    (r"NVIDIA L4", 121, HALF),
    (r"NVIDIA A10", 125, HALF),
    (r"Tesla V100-SXM.*", 125, ("fp16",)),
    (r"Tesla V100-PCIE.*", 112, ("fp16",)),
    (r"Tesla T4", 65, ("fp16",)),
    (r"NVIDIA GeForce RTX 4090", 165, HALF),
    (r"NVIDIA GeForce RTX 3090", 71, HALF),
)
"""Pattern of the name that CUDA reports, dense TFLOP/s of the matrix units with float32 sums, and
the precisions that have them. From NVIDIA's data sheets (where those count structured sparsity,
half of what they print); for GeForce from appendix A of the Ada and Ampere GA102 white papers."""


def count_flops(
    config: UNetConfig, batch_size: int, crop_size: int, *, frozen_encoder: bool = False
) -> int:
    """Count the FLOPs of one forward and backward pass over a batch of square crops.

    Counts convolutions and matrix products; a multiply-add is two. A copy of the network on the
    meta device runs both passes under torch.utils.flop_counter: nothing is computed, and neither
    weights nor random states change. Recomputation by gradient checkpointing is not counted: MFU is
    defined by the FLOPs that the model requires (Chowdhery et al., "PaLM", 2022, appendix B).
    `frozen_encoder`: the backward pass ends at the decoder, as with `--model.freeze-encoder`.
    """
    with torch.device("meta"):
        model = UNet(config).train()
        if model.encoder is not None:
            model.encoder.requires_grad_(not frozen_encoder)
        image = torch.empty(batch_size, config.in_channels, crop_size, crop_size)
    with FlopCounterMode(display=False) as counter:
        logits = model(image)
        parts = [logits] if isinstance(logits, Tensor) else logits
        torch.stack([part.sum() for part in parts]).sum().backward()
    return counter.get_total_flops()


def peak_tflops(name: str, precision: str) -> float | None:
    """Look up the peak dense TFLOP/s of a GPU by its CUDA name; None if unknown.

    `precision`: fp16 or bf16; other precisions do not use these matrix units. A partition of a
    card (MIG) has another name, and so no known peak.
    """
    for pattern, tflops, precisions in PEAKS:
        # Match the full name: an L40S is not an L4, and a laptop 4090 has half the rate.
        if re.fullmatch(pattern, name) and "MIG" not in name and precision in precisions:
            return float(tflops)
    return None
