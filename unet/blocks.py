"""The three parts of a U-Net: the double convolution, the step down, the step up.

Ronneberger, Fischer, Brox: "U-Net: Convolutional Networks for Biomedical Image Segmentation"
(2015), figure 1. Shapes: B batch, C channels, H height, W width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Padding = Literal["same", "valid"]
Norm = Literal["group", "batch", "instance", "none"]
Activation = Literal["relu", "leaky_relu", "silu"]
Upsampling = Literal["transpose", "bilinear"]

GROUP_CHANNELS = 8
"""Channels that group norm averages together, or the next number that divides the layer."""


class InstanceNorm(nn.InstanceNorm2d):
    """torch's, on CPUs computed as the group norm of groups of one channel: a quarter of the time.

    On GPUs autocast would do a group norm in float32, at twice the memory; in channels_last torch's
    kernel subtracts squares of means, and loses digits.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        if input.device.type != "cpu" or not input.is_contiguous():
            return super().forward(input)
        return F.group_norm(input, self.num_features, self.weight, self.bias, self.eps)


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """Normalisation of a map [B, channels, H, W].

    Instance and group norm depend on neither the batch nor the rank: the same sample gives the same
    gradient on one GPU and on sixty-four.
    """
    match norm:
        case "group":
            most = max(1, channels // GROUP_CHANNELS)
            num_groups = next(n for n in range(most, 0, -1) if channels % n == 0)
            return nn.GroupNorm(num_groups, channels)
        case "batch":
            return nn.BatchNorm2d(channels)
        case "instance":
            return InstanceNorm(channels, affine=True)
        case "none":
            return nn.Identity()


def make_activation(activation: Activation) -> nn.Module:
    """The nonlinearity, computed in place."""
    match activation:
        case "relu":
            return nn.ReLU(inplace=True)
        case "leaky_relu":
            return nn.LeakyReLU(0.01, inplace=True)
        case "silu":
            return nn.SiLU(inplace=True)


def make_upsampling(up: Upsampling, in_channels: int, out_channels: int) -> nn.Module:
    """[B, in_channels, H, W] -> [B, out_channels, 2H, 2W]."""
    match up:
        case "transpose":
            return nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        case "bilinear":
            # A 1x1 convolution and an interpolation commute; in this order it costs a quarter.
            return nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1),
                nn.Upsample(scale_factor=2, mode="bilinear"),
            )


@dataclass(frozen=True, slots=True)
class ConvConfig:
    """What all convolutions of a network have in common."""

    padding: Padding
    """Whether maps keep their size or lose a pixel on each side."""
    norm: Norm
    """After each convolution."""
    activation: Activation
    """After each norm."""


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions, each followed by its norm and activation; dropout at the end.

    [B, in_channels, H, W] -> [B, out_channels, H, W], or H-4, W-4 with `valid` padding.
    """

    def __init__(
        self, in_channels: int, out_channels: int, config: ConvConfig, *, dropout: float = 0.0
    ) -> None:
        pad = 1 if config.padding == "same" else 0
        # A convolution's bias is removed again by the mean that a norm subtracts.
        bias = config.norm == "none"
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, padding=pad, bias=bias),
            make_norm(config.norm, out_channels),
            make_activation(config.activation),
            nn.Conv2d(out_channels, out_channels, 3, padding=pad, bias=bias),
            make_norm(config.norm, out_channels),
            make_activation(config.activation),
            *([nn.Dropout(dropout)] if dropout else []),
        )


class Down(nn.Module):
    """One step of the contracting path: the double convolution, then its map at half the size."""

    def __init__(
        self, in_channels: int, out_channels: int, config: ConvConfig, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.conv = DoubleConv(in_channels, out_channels, config, dropout=dropout)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, in, H, W] -> the skip [B, out, H, W] and the pooled map [B, out, H/2, W/2]."""
        skip = self.conv(x)
        return skip, self.pool(skip)


class Up(nn.Module):
    """One step of the expanding path: up-convolution, the skip beside it, double convolution."""

    def __init__(
        self, in_channels: int, out_channels: int, config: ConvConfig, *, up: Upsampling
    ) -> None:
        super().__init__()
        self.up = make_upsampling(up, in_channels, out_channels)
        self.conv = DoubleConv(2 * out_channels, out_channels, config)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """[B, in, H, W], skip [B, out, 2H, 2W] or larger -> [B, out, 2H, 2W] (`valid`: 4 less)."""
        x = self.up(x)
        return self.conv(torch.cat([centre_crop(skip, x.shape[-2:]), x], dim=1))


def centre_crop(x: Tensor, size: torch.Size) -> Tensor:
    """The middle [..., *size] of x [..., H, W]; x itself where the size already fits."""
    if x.shape[-2:] == size:
        return x
    top, left = ((x.shape[i] - size[i]) // 2 for i in (-2, -1))
    return x[..., top : top + size[0], left : left + size[1]]
