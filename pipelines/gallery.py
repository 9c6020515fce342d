"""Single pictures of a split to look at: picture, truth, prediction, and where these differ."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from pipelines.batches import require_mask
from pipelines.dataset import DataSet
from pipelines.scoring import make_forward
from shards.order import EvalPlan
from shards.sample import IGNORE, Colour, Palette, Uint8
from unet import TileConfig, UNet, predict_mask

WRONG: Colour = (255, 0, 110)
"""Pixels of another class than in the truth."""
IGNORED: Colour = (128, 128, 128)
"""Pixels that count nowhere."""
GAP = 8
"""Pixels between panels."""


@dataclass(frozen=True, slots=True)
class Predicted:
    """A picture with its true and its predicted mask."""

    key: str
    image: Uint8
    """[H, W, 1 or 3]."""
    mask: Uint8
    """Class indices [H, W], 255 = ignore."""
    prediction: Uint8
    """Class indices [H, W]."""


@torch.inference_mode()
def predict_some(
    model: UNet,
    accelerator: Accelerator,
    data: DataSet,
    split: str,
    positions: Sequence[int],
    tiles: TileConfig,
) -> Iterator[Predicted]:
    """Predict the pictures at some places of a split, one by one, in this process alone.

    Raises DataError for a sample that cannot be read or has no mask.
    """
    reader, manifest = data.reader(split), data.manifest
    sizes = tuple(shard.samples for shard in reader.shards)
    forward, network = make_forward(model, accelerator), model.config
    model.eval()
    for position in positions:
        # Of as many ranks as there are samples, the one that has this sample.
        ((address,),) = EvalPlan(sizes, 1, position, sum(sizes)).batches(0, 1)
        raw = reader.read(address)
        sample = raw.decode(manifest.image_format, len(manifest.classes))
        image = torch.tensor(sample.image).permute(2, 0, 1)[None].to(accelerator.device)
        prediction, _ = predict_mask(
            forward, image, tiles, margin=network.margin, multiple=2**network.depth
        )
        mask = require_mask(sample.mask, raw)
        yield Predicted(sample.key, sample.image, mask, prediction[0].cpu().numpy())


def panels(shown: Predicted, palette: Palette, most: int) -> list[Image.Image]:
    """Picture, truth, prediction and difference in RGB, no side longer than `most` pixels.

    The difference is the picture, dimmed, with what is wrong and what is ignored painted over.
    """
    image, mask, prediction = shown.image, shown.mask, shown.prediction
    height, width = mask.shape
    factor = min(1.0, most / max(width, height))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    colours = np.full((256, 3), IGNORED, dtype=np.uint8)
    colours[: len(palette)] = palette
    dimmed = (image.mean(axis=2, keepdims=True) * 0.6).astype(np.uint8)
    difference = np.repeat(dimmed, 3, axis=2)
    difference[mask == IGNORE] = IGNORED
    difference[(mask != prediction) & (mask != IGNORE)] = WRONG
    parts = (np.broadcast_to(image, (height, width, 3)), colours[mask], colours[prediction])
    return [
        Image.fromarray(np.ascontiguousarray(part)).resize(size, Image.Resampling.BOX)
        for part in (*parts, difference)
    ]


def side_by_side(parts: Sequence[Image.Image]) -> Image.Image:
    """Panels of one size in a row."""
    width, height = parts[0].size
    row = Image.new("RGB", (len(parts) * (width + GAP) - GAP, height), (255, 255, 255))
    for number, part in enumerate(parts):
        row.paste(part, (number * (width + GAP), 0))
    return row
