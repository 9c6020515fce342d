"""A few predictions beside their masks, as images."""

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from pipelines.drawing.overlay import draw_overlay
from pipelines.drawing.panels import Example, draw_panels, side_by_side
from pipelines.loading.dataset import DataSet
from pipelines.loading.stages import require_mask
from pipelines.model.forward import make_forward
from shards.order import EvalPlan
from unet import DataSpec, TileConfig, UNet, predict_mask


@torch.inference_mode()
def predict_examples(
    model: UNet,
    accelerator: Accelerator,
    data: DataSet,
    split: str,
    positions: Sequence[int],
    tiles: TileConfig,
) -> Iterator[Example]:
    """Predict the images at some positions of a split, one by one, without meeting other ranks.

    Raises DataError if a sample cannot be read or has no mask.
    """
    reader, manifest = data.reader(split), data.manifest
    sizes = tuple(shard.samples for shard in reader.shards)
    forward, network = make_forward(model, accelerator), model.config
    model.eval()
    for position in positions:
        # With as many ranks as samples, the rank that has this sample.
        ((address,),) = EvalPlan(sizes, 1, position, sum(sizes)).batches(0, 1)
        raw = reader.read(address)
        sample = raw.decode(manifest.image_format, len(manifest.classes))
        image = torch.tensor(sample.image).permute(2, 0, 1)[None].to(accelerator.device)
        prediction, _ = predict_mask(forward, image, tiles, network)
        mask = require_mask(sample.mask, raw)
        yield Example(sample.key, sample.image, mask, prediction[0].cpu().numpy())


MOST = 512
"""Longest side of an image, in pixels."""


def draw_batch(spec: DataSpec, image: Tensor, mask: Tensor, most: int) -> list[Image.Image]:
    """The first images of a batch after augmentation, their masks drawn over them.

    Args:
        spec: how images were normalised.
        image: normalised float32 [B, C, H, W].
        mask: uint8 [B, H, W].
        most: so many at most.
    """
    mean, std = (torch.tensor(values).view(-1, 1, 1) * 255 for values in (spec.mean, spec.std))
    plain = image[:most].detach().float().cpu() * std + mean
    pixels = plain.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [
        draw_overlay(picture, truth, spec.palette)
        for picture, truth in zip(pixels, mask[:most].cpu().numpy(), strict=True)
    ]


def draw_validation(
    model: UNet, accelerator: Accelerator, data: DataSet, tiles: TileConfig, most: int
) -> list[Image.Image]:
    """Some images of the validation split, the same each time: image, truth, prediction, wrong.

    In this process alone. The model is left in the mode that it was in.
    """
    number = data.manifest.splits["val"].samples
    positions = sorted({i * number // most for i in range(most)})
    was_training = model.training
    found = predict_examples(model, accelerator, data, "val", positions, tiles)
    drawn = [side_by_side(draw_panels(shown, data.manifest.palette, MOST)) for shown in found]
    model.train(was_training)
    return drawn
