"""Encoders: parameters and forward time of each family at a published size.

    python tests/benchmarks/encoders.py

Random weights, evaluation mode, no gradients, one RGB image of 512 x 512, one thread; the decoder
of the preset modern (32 to 512 channels). `without`: no convolutions at full resolution; the
decoder ends at the first feature map, and its logits are interpolated. Contenders alternate; the
median of the rounds is printed. The model of timm is left out where timm is not installed.
"""

import argparse
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet import UNet, UNetConfig, find_stages

TINY = {"hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3]}
FAMILIES: dict[str, dict[str, Any]] = {
    "resnet-50": {
        "model_type": "resnet",
        "hidden_sizes": [256, 512, 1024, 2048],
        "depths": [3, 4, 6, 3],
    },
    "convnext-tiny": {"model_type": "convnext", **TINY},
    "convnextv2-tiny": {"model_type": "convnextv2", **TINY},
    "swin-tiny": {"model_type": "swin"},
    "swinv2-tiny": {"model_type": "swinv2", "window_size": 8, "image_size": 256},
    "dinov3-convnext-tiny": {"model_type": "dinov3_convnext", **TINY},
    "pvt-v2-b0": {
        "model_type": "pvt_v2",
        "hidden_sizes": [32, 64, 160, 256],
        "depths": [2, 2, 2, 2],
    },
    "efficientnet-lite0": {"model_type": "timm_backbone", "backbone": "tf_efficientnet_lite0"},
}


class WithoutDetail(nn.Module):
    """A U-Net without its levels above the first feature map."""

    def __init__(self, model: UNet) -> None:
        super().__init__()
        encoder = model.config.encoder
        assert model.encoder is not None
        assert encoder is not None
        self.stride = encoder.strides[0]
        self.encoder = model.encoder
        self.ups = model.ups[: -encoder.num_detail_levels]
        channels = model.config.base_channels * self.stride
        self.head = nn.Conv2d(channels, model.config.num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Compute logits at the first stride, interpolated to the size of the image."""
        *skips, x = self.encoder(image)
        for up in self.ups:
            x = up(x, skips.pop())
        return F.interpolate(self.head(x), scale_factor=self.stride, mode="bilinear")


def count(module: nn.Module) -> float:
    """Count parameters in millions."""
    return sum(p.numel() for p in module.parameters()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    contenders: dict[str, tuple[UNet, WithoutDetail]] = {}
    for name, plain in FAMILIES.items():
        try:
            encoder = find_stages(plain, 3)
        except ImportError as error:
            print(f"{name}: {error}")
            continue
        model = UNet(UNetConfig(base_channels=32, depth=encoder.depth, encoder=encoder)).eval()
        contenders[name] = (model, WithoutDetail(model).eval())
    image = torch.randn(1, 3, args.side, args.side)
    seconds: dict[tuple[str, int], list[float]] = {}
    with torch.inference_mode():
        for turn in range(1 + args.rounds):
            for name, models in contenders.items():
                for index, model in enumerate(models):
                    start = time.perf_counter()
                    model(image)
                    if turn:
                        elapsed = time.perf_counter() - start
                        seconds.setdefault((name, index), []).append(elapsed)
    print("| encoder | strides | parameters, encoder | whole | seconds | without |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (model, _) in contenders.items():
        encoder = model.config.encoder
        assert encoder is not None
        whole, without = (statistics.median(seconds[name, index]) for index in (0, 1))
        print(
            f"| {name} | {encoder.strides[0]} to {encoder.strides[-1]} "
            f"| {count(model.encoder or model):.1f} M | {count(model):.1f} M "
            f"| {whole:.2f} | {without:.2f} |"
        )


if __name__ == "__main__":
    main()
