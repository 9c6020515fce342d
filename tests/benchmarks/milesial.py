"""The network of milesial/Pytorch-UNet, rebuilt from its description with its parameter names.

Padded 3x3 convolutions without bias, each with batch norm and ReLU; 64 to 1024 channels; 2x2
max pooling; 2x2 transposed convolutions that halve the channels, with output padded to the size of
the skip; skip first in the concatenation; a 1x1 convolution as the head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DoubleConv(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c in (c_in, c_out):
            layers += [nn.Conv2d(c, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out)]
            layers.append(nn.ReLU(inplace=True))
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Down(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), DoubleConv(c_in, c_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class Up(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_out, 2, stride=2)
        self.conv = DoubleConv(c_in, c_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = self.up(x)
        bottom, right = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
        x = F.pad(x, [right // 2, right - right // 2, bottom // 2, bottom - bottom // 2])
        return self.conv(torch.cat([skip, x], dim=1))


class OutConv(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Milesial(nn.Module):
    """[B, in_channels, H, W] -> logits [B, num_classes, H, W]."""

    def __init__(self, in_channels: int, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.inc = DoubleConv(in_channels, width)
        self.down1, self.down2, self.down3, self.down4 = (
            Down(width * 2**i, width * 2 ** (i + 1)) for i in range(4)
        )
        self.up1, self.up2, self.up3, self.up4 = (
            Up(width * 2 ** (i + 1), width * 2**i) for i in reversed(range(4))
        )
        self.outc = OutConv(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.inc(x)]
        for down in (self.down1, self.down2, self.down3, self.down4):
            maps.append(down(maps[-1]))
        x = maps.pop()
        for up in (self.up1, self.up2, self.up3, self.up4):
            x = up(x, maps.pop())
        return self.outc(x)
