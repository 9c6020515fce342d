"""What the levels at full resolution above a backbone of stride 4 do for borders, and cost.

    python tests/benchmarks/learning.py --set isbi2012 --folder isbi2012 --work DIR --seeds 0
    python tests/benchmarks/encoder_borders.py --arrays DIR/isbi2012.npz --minutes 3 --seeds 3

Trains a U-Net on a ResNet-18 with random weights twice, alternating: with these levels, and without
them, where the logits of the first feature map are interpolated (`encoders.WithoutDetail`). Both
take batches and augmentation of learning_loops.py's `careful`, for equal CPU minutes of one thread,
which other work on the machine affects little. Scores of the second class on val: Dice, and the
share of boundary pixels within 1 pixel (surface Dice; `unet.surface`). The first command packs the
data.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from encoders import WithoutDetail
from learning_loops import Arrays, draw, load, make_loss, pad
from torch import nn

from pipelines.runtime.devices import native_precision
from unet import UNet, UNetConfig, find_stages
from unet.metrics import SegmentationScores
from unet.surface import SurfaceScores

RESNET_18 = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 64,
    "hidden_sizes": [64, 128, 256, 512],
    "depths": [2, 2, 2, 2],
}
CLASSES = ("background", "object")
TOLERANCE = 1.0
"""Pixels."""


def build(detail: bool, channels: int, seed: int) -> nn.Module:
    """Build the network; both have equal weights in the parts that they share."""
    torch.manual_seed(seed)
    encoder = find_stages(RESNET_18, channels)
    model = UNet(
        UNetConfig(in_channels=channels, base_channels=16, depth=encoder.depth, encoder=encoder)
    )
    return model if detail else WithoutDetail(model)


def train(model: nn.Module, data: Arrays, minutes: float, crop: int, seed: int) -> int:
    """Train for CPU minutes of this process; returns the number of steps."""
    rng, criterion = np.random.default_rng(seed), make_loss("careful")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    start, steps = time.process_time(), 0
    model.train()
    while (done := (time.process_time() - start) / (60 * minutes)) < 1:
        optimizer.param_groups[0]["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * done))
        x, y = draw(data, crop, False, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=native_precision() == "bf16"):
            logits = model(x)
        loss = criterion(logits.float(), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
    return steps


@torch.inference_mode()
def score(model: nn.Module, data: Arrays) -> tuple[float, float]:
    """Compute Dice and surface Dice of the second class."""
    regions = SegmentationScores(CLASSES, (1,))
    borders = SurfaceScores(CLASSES, (1,), TOLERANCE)
    model.eval()
    for x, y in zip(data.images, data.masks, strict=True):
        logits = model(pad(x[None], 32))[..., : y.shape[0], : y.shape[1]]
        prediction, mask = logits.argmax(dim=1).to(torch.uint8), y[None].to(torch.uint8)
        regions.update(prediction, mask)
        borders.update(prediction, mask)
    dice, surface = regions.scores().macro.dice, borders.scores().surface_dice
    assert dice is not None
    assert surface is not None
    return dice, surface


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arrays", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--crop", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    data, held_out = load(args.arrays, "train", device), load(args.arrays, "val", device)
    found: dict[bool, list[tuple[float, float, int]]] = {True: [], False: []}
    for seed in range(args.seeds):
        for detail, rows in found.items():
            model = build(detail, len(data.images[0]), seed)
            steps = train(model, data, args.minutes, args.crop, seed)
            rows.append((*score(model, held_out), steps))
            print(f"seed {seed}, {'with' if detail else 'without'}: {rows[-1]}", flush=True)
    print("\n| full resolution | steps | Dice | range | surface Dice | range |")
    print("| --- | --- | --- | --- | --- | --- |")
    for detail, rows in found.items():
        dice, surface, steps = zip(*rows, strict=True)
        cells = [
            f"{statistics.mean(values):.4f} | {min(values):.4f}-{max(values):.4f}"
            for values in (dice, surface)
        ]
        name = "with" if detail else "without"
        print(f"| {name} | {statistics.mean(steps):,.0f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
