"""Pretrained first convolutions for images with other channels than RGB."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

ChannelRule = Literal["mean", "repeat", "random"]


def describe_rule(rule: ChannelRule, own_channels: int, in_channels: int) -> str:
    """Describe what `map_channels` does to a first convolution."""
    if rule == "random":
        return (
            f"its first convolution is random for {in_channels} channels, which are normalised "
            "with the mean and deviation of the data set"
        )
    if rule == "repeat":
        return (
            f"channel i of {in_channels} gets channel i modulo {own_channels} of its first "
            f"convolution, times {own_channels}/{in_channels}"
        )
    if in_channels == 1:
        return f"its first convolution is summed over its {own_channels} channels for grey images"
    return (
        f"each of {in_channels} channels gets the mean of its first convolution's {own_channels}, "
        f"times {own_channels}/{in_channels}"
    )


def map_channels(weight: Tensor, in_channels: int, rule: ChannelRule) -> Tensor:
    """Map a convolution [C, own, h, w] to [C, in_channels, h, w] by `mean` or `repeat`.

    The factor own / in_channels keeps the size of the response. With `mean`, channels that are all
    equal give that of a grey RGB image; of one channel, the factor makes the mean a sum.
    """
    own_channels = weight.shape[1]
    if rule == "repeat":
        mapped = weight[:, [channel % own_channels for channel in range(in_channels)]]
    else:
        mapped = weight.mean(1, keepdim=True).repeat(1, in_channels, 1, 1)
    return mapped * (own_channels / in_channels)


def map_values(values: Sequence[float], in_channels: int, rule: ChannelRule) -> tuple[float, ...]:
    """Map the means or deviations of the channels like `map_channels`, without the factor."""
    if len(values) == in_channels:
        return tuple(values)
    if rule == "repeat":
        return tuple(values[channel % len(values)] for channel in range(in_channels))
    return (sum(values) / len(values),) * in_channels
