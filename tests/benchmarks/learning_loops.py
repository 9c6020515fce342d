"""Plain PyTorch loops, for comparison with `unet train` in equal minutes; run by `learning.py`.

    python tests/benchmarks/learning_loops.py --arrays FILE.npz --recipe careful --minutes 8

Loops without workers, shards or weight averaging, on arrays that are in memory from the start.
Needs torch and numpy only, so that it runs in the environment of a peer. Recipes:

    common    a padded U-Net with batch norm, with the settings of milesial/Pytorch-UNet except its
              plateau scheduler: RMSprop 1e-5 with momentum 0.999, batch 1, images at half size,
              cross-entropy + Dice, no augmentation; 16 base channels instead of 64
    careful   the same network and a quarter of an hour of tuning: AdamW 2e-3 with cosine decay over
              the minutes, batch 4, random crops at full size, flips, quarter turns, brightness
    smp       segmentation_models_pytorch's Unet (resnet18, random weights) and its DiceLoss, with
              cross-entropy, in the loop of `careful`
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = 255
MULTIPLE = 32
"""Sides of images are padded to a multiple of this, at the bottom and on the right."""


def double_conv(c_in: int, c_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for c in (c_in, c_out):
        layers += [nn.Conv2d(c, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers)


class PlainUNet(nn.Module):
    def __init__(self, c_in: int, classes: int, width: int) -> None:
        super().__init__()
        channels = [width * 2**i for i in range(5)]
        self.down = nn.ModuleList(
            double_conv(a, b) for a, b in zip([c_in, *channels], channels, strict=False)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(channels[i + 1], channels[i], 2, 2) for i in range(4)
        )
        self.fuse = nn.ModuleList(double_conv(2 * channels[i], channels[i]) for i in range(4))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, conv in enumerate(self.down):
            x = conv(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for i in reversed(range(4)):
            x = self.fuse[i](torch.cat([skips[i], self.up[i](x)], dim=1))
        return self.head(x)


def dice_loss(logits: Tensor, mask: Tensor) -> Tensor:
    """1 - soft Dice, the mean over samples and classes; pixels of 255 are left out."""
    classes, valid = logits.shape[1], (mask != IGNORE)[:, None]
    p = logits.softmax(dim=1) * valid
    g = F.one_hot(mask.clamp(max=classes - 1), classes).permute(0, 3, 1, 2).float() * valid
    overlap, total = (p * g).sum(dim=(2, 3)), (p + g).sum(dim=(2, 3))
    return 1 - ((2 * overlap + 1e-6) / (total + 1e-6)).mean()


@dataclass(frozen=True)
class Arrays:
    """The images of a split on the device: float32 [C, H, W] in 0-1, and masks int64 [H, W]."""

    images: list[Tensor]
    masks: list[Tensor]


def load(file: Path, split: str, device: torch.device) -> Arrays:
    arrays = np.load(file)
    count = sum(name.startswith(f"{split}-image-") for name in arrays.files)
    images = [torch.tensor(arrays[f"{split}-image-{i}"], device=device) for i in range(count)]
    masks = [torch.tensor(arrays[f"{split}-mask-{i}"], device=device) for i in range(count)]
    return Arrays([x.permute(2, 0, 1) / 255 for x in images], [y.long() for y in masks])


def halve(arrays: Arrays) -> Arrays:
    """Resize to half the size, as public loops do, padded to a multiple of 16."""
    images = [F.interpolate(x[None], scale_factor=0.5, mode="bicubic")[0] for x in arrays.images]
    masks = [
        F.interpolate(y[None, None].float(), size=x.shape[1:], mode="nearest")[0, 0].long()
        for x, y in zip(images, arrays.masks, strict=True)
    ]
    padded = [pad(x[None], 16)[0] for x in images]
    return Arrays(padded, [pad(y[None, None], 16, IGNORE)[0, 0] for y in masks])


def pad(x: Tensor, multiple: int, value: int | None = None) -> Tensor:
    """Pad [1, C, H, W] to multiples, by a value or by repeating the last row and column."""
    bottom, right = (-side % multiple for side in x.shape[-2:])
    if value is None:
        return F.pad(x, (0, right, 0, bottom), mode="replicate")
    return F.pad(x, (0, right, 0, bottom), value=value)


def draw(data: Arrays, side: int, upright: bool, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw a batch for `careful`: four crops, flipped, rotated and brightened."""
    xs, ys = [], []
    for _ in range(4):
        i = rng.integers(len(data.images))
        x, y = data.images[i], data.masks[i]
        bottom, right = (max(0, side - length) for length in y.shape)
        x = F.pad(x[None], (0, right, 0, bottom), mode="replicate")[0]
        y = F.pad(y, (0, right, 0, bottom), value=IGNORE)
        top, left = (int(rng.integers(0, length - side + 1)) for length in y.shape)
        x, y = x[:, top : top + side, left : left + side], y[top : top + side, left : left + side]
        if rng.random() < 0.5:
            x, y = x.flip(-1), y.flip(-1)
        turns = 0 if upright else int(rng.integers(4))
        xs.append(torch.rot90(x, turns, (1, 2)) + rng.uniform(-0.1, 0.1))
        ys.append(torch.rot90(y, turns, (0, 1)))
    return torch.stack(xs), torch.stack(ys)


def make_network(recipe: str, c_in: int, classes: int, width: int) -> nn.Module:
    if recipe != "smp":
        return PlainUNet(c_in, classes, width)
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet18", encoder_weights=None, in_channels=c_in, classes=classes)


def make_loss(recipe: str) -> Callable[[Tensor, Tensor], Tensor]:
    dice: Callable[[Tensor, Tensor], Tensor] = dice_loss
    if recipe == "smp":
        import segmentation_models_pytorch as smp

        dice = smp.losses.DiceLoss("multiclass", ignore_index=IGNORE)

    def loss(logits: Tensor, mask: Tensor) -> Tensor:
        return F.cross_entropy(logits, mask, ignore_index=IGNORE) + dice(logits, mask)

    return loss


def score(model: nn.Module, data: Arrays, classes: int, *, half: bool) -> np.ndarray:
    """Sum the confusion matrix [classes, classes] over a split at full size; rows: masks."""
    sums = torch.zeros(classes * classes, dtype=torch.int64)
    model.eval()
    with torch.inference_mode():
        for x, y in zip(data.images, data.masks, strict=True):
            small = F.interpolate(x[None], scale_factor=0.5, mode="bicubic") if half else x[None]
            logits = model(pad(small, MULTIPLE))[..., : small.shape[-2], : small.shape[-1]]
            p = F.interpolate(logits.float(), size=y.shape, mode="bilinear").argmax(dim=1)[0]
            valid = y != IGNORE
            sums += torch.bincount((y * classes + p)[valid].cpu(), minlength=classes * classes)
    return sums.view(classes, classes).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arrays", type=Path, required=True)
    parser.add_argument("--recipe", choices=("common", "careful", "smp"), required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--split", default="val", help="split to score")
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--upright", action="store_true", help="no quarter turns")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cuda: with autocast and GradScaler")
    arguments = parser.parse_args()
    device, cuda = torch.device(arguments.device), arguments.device == "cuda"
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    common, classes = arguments.recipe == "common", arguments.classes
    data = load(arguments.arrays, "train", device)
    data = halve(data) if common else data
    model = make_network(arguments.recipe, len(data.images[0]), classes, arguments.width)
    model = model.to(device).train()
    criterion = make_loss(arguments.recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=cuda)
    optimizer = (
        torch.optim.RMSprop(model.parameters(), lr=1e-5, weight_decay=1e-8, momentum=0.999)
        if common
        else torch.optim.AdamW(model.parameters(), lr=2e-3)
    )
    start, steps = time.monotonic(), 0
    while (done := (time.monotonic() - start) / (60 * arguments.minutes)) < 1:
        if common:
            if steps % len(data.images) == 0:
                order = rng.permutation(len(data.images))
            at = order[steps % len(data.images)]
            x, y = data.images[at][None], data.masks[at][None]
        else:
            optimizer.param_groups[0]["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * done))
            x, y = draw(data, arguments.crop, arguments.upright, rng)
        with torch.autocast(device.type, enabled=cuda):
            logits = model(x)
            loss = criterion(logits, y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        steps += 1
    counts = score(model, load(arguments.arrays, arguments.split, device), classes, half=common)
    print(json.dumps({"steps": steps, "confusion": counts.tolist()}))


if __name__ == "__main__":
    main()
