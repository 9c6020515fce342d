"""Plain PyTorch U-Net loops on isbi2012, for comparison with `unet train` in equal time.

    python tests/benchmarks/learning_isbi2012.py --images DIR --masks DIR --split-file CSV \
        --recipe common --minutes 8

A plain padded U-Net with batch norm and the width of the preset `small`, trained in a loop without
workers, shards or weight averaging. Recipes:

    common    the settings of public single-file U-Net repositories: RMSprop 1e-5 with momentum
              0.999, batch 1, images at half size, cross-entropy + Dice, no augmentation
    careful   a quarter of an hour of tuning: AdamW 2e-3 with cosine decay over the given time,
              batch 4, random 256 x 256 crops at full size, flips, 90-degree rotations, brightness

Scores: Dice and IoU of the membrane, pooled over the validation images at full size.
"""

import argparse
import csv
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn


def double_conv(c_in: int, c_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for c in (c_in, c_out):
        layers += [nn.Conv2d(c, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers)


class PlainUNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        channels = [width * 2**i for i in range(5)]
        self.down = nn.ModuleList(
            double_conv(a, b) for a, b in zip([1, *channels], channels, strict=False)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(channels[i + 1], channels[i], 2, 2) for i in range(4)
        )
        self.fuse = nn.ModuleList(double_conv(2 * channels[i], channels[i]) for i in range(4))
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, conv in enumerate(self.down):
            x = conv(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for i in reversed(range(4)):
            x = self.fuse[i](torch.cat([skips[i], self.up[i](x)], dim=1))
        return self.head(x)


def dice_loss(logits: Tensor, mask: Tensor) -> Tensor:
    p = logits.softmax(dim=1)
    g = F.one_hot(mask, 2).permute(0, 3, 1, 2).float()
    overlap, total = (p * g).sum(dim=(2, 3)), (p + g).sum(dim=(2, 3))
    return 1 - ((2 * overlap + 1e-6) / (total + 1e-6)).mean()


def read(folder: Path, name: str, side: int, mode: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.open(folder / name).resize((side, side), mode))


def draw(images: Tensor, masks: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a batch for `careful`: four crops, flipped, rotated and brightened."""
    xs, ys = [], []
    for _ in range(4):
        i, top, left = rng.integers(len(images)), *rng.integers(0, 512 - 256 + 1, 2)
        x = images[i, :, top : top + 256, left : left + 256]
        y = masks[i, top : top + 256, left : left + 256]
        if rng.random() < 0.5:
            x, y = x.flip(-1), y.flip(-1)
        turns = int(rng.integers(4))
        xs.append(torch.rot90(x, turns, (1, 2)) + rng.uniform(-0.1, 0.1))
        ys.append(torch.rot90(y, turns, (0, 1)))
    return torch.stack(xs), torch.stack(ys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--masks", type=Path, required=True)
    parser.add_argument("--split-file", type=Path, required=True)
    parser.add_argument("--recipe", choices=("common", "careful"), required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--device", default="cpu", help="cuda: with autocast and GradScaler")
    arguments = parser.parse_args()
    device, cuda = torch.device(arguments.device), arguments.device == "cuda"
    with arguments.split_file.open() as file:
        split = {row["path"]: row["split"] for row in csv.DictReader(file)}

    def load(part: str, side: int) -> tuple[Tensor, Tensor]:
        names = sorted(name for name, where in split.items() if where == part)
        images = [read(arguments.images, n, side, Image.Resampling.BICUBIC) for n in names]
        masks = [read(arguments.masks, n, side, Image.Resampling.NEAREST) == 0 for n in names]
        pixels = torch.tensor(np.stack(images), device=device)[:, None] / 255
        return pixels, torch.tensor(np.stack(masks), device=device).long()

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    common = arguments.recipe == "common"
    images, masks = load("train", 256 if common else 512)
    model = PlainUNet(arguments.width).to(device).train()
    scaler = torch.amp.GradScaler(device.type, enabled=cuda)
    optimizer = (
        torch.optim.RMSprop(model.parameters(), lr=1e-5, weight_decay=1e-8, momentum=0.999)
        if common
        else torch.optim.AdamW(model.parameters(), lr=2e-3)
    )
    start, steps = time.monotonic(), 0
    while (done := (time.monotonic() - start) / (60 * arguments.minutes)) < 1:
        if common:
            if steps % len(images) == 0:
                order = rng.permutation(len(images))
            at = order[steps % len(images)]
            x, y = images[at : at + 1], masks[at : at + 1]
        else:
            optimizer.param_groups[0]["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * done))
            x, y = draw(images, masks, rng)
        with torch.autocast(device.type, enabled=cuda):
            logits = model(x)
            loss = F.cross_entropy(logits, y) + dice_loss(logits, y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        steps += 1

    model.eval()
    images, masks = load("val", 512)
    tp = fp = fn = 0
    with torch.inference_mode():
        for x, y in zip(images, masks, strict=True):
            small = F.interpolate(x[None], size=(256, 256), mode="bicubic") if common else x[None]
            logits = F.interpolate(model(small), size=(512, 512), mode="bilinear")
            p = logits.argmax(dim=1)[0]
            tp += int(((p == 1) & (y == 1)).sum())
            fp += int(((p == 1) & (y == 0)).sum())
            fn += int(((p == 0) & (y == 1)).sum())
    dice, iou = 2 * tp / (2 * tp + fp + fn), tp / (tp + fp + fn)
    print(json.dumps({"recipe": arguments.recipe, "steps": steps, "dice": dice, "iou": iou}))


if __name__ == "__main__":
    main()
