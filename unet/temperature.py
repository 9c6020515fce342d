"""Temperature scaling of predicted probabilities.

A temperature T replaces the probabilities p of a pixel by p^(1 / T), normalised (Guo et al., "On
calibration of modern neural networks", ICML 2017). For one forward pass that is the softmax of the
logits divided by T; averages over tiles, mirrored images and members of an ensemble are replaced
after averaging. It changes no argmax.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from unet.tiling import Block

TEMPERATURES = tuple(2 ** (n / 8) for n in range(-16, 33))
"""Temperatures whose likelihood is computed: 1/4 to 16, 9 % apart."""


def temper_blocks(
    blocks: Iterator[Block], temperature: float, observe: Callable[[Block], None] | None
) -> Iterator[Block]:
    """Yield blocks at a temperature, each after `observe` has seen it."""
    for block in blocks:
        if temperature != 1:
            probability = apply_temperature(block.probability, temperature)
            block = replace(block, probability=probability)
        if observe is not None:
            observe(block)
        yield block
        # Frees its batch of probabilities before the next forward pass.
        del block


def apply_temperature(probability: Tensor, temperature: float) -> Tensor:
    """Replace probabilities p by p^(1 / temperature), normalised.

    Takes and returns `Block.probability`, float32 [N, K, h, w], or [N, 1, h, w] with two classes.
    """
    if probability.shape[1] == 1:
        # Rounding can push sums of weighted tiles above 1.
        return (torch.logit(probability.clamp(max=1)) / temperature).sigmoid_()
    return (probability.log() / temperature).softmax(dim=1)
