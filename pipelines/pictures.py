"""Pictures of a training for people: the first batch as the network sees it, and validation."""

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from pipelines.dataset import DataSet
from pipelines.gallery import draw_panels, predict_examples, side_by_side
from pipelines.overlay import draw_overlay
from unet import DataSpec, TileConfig, UNet

MOST = 512
"""Longest side of a picture, in pixels."""


def draw_batch(spec: DataSpec, image: Tensor, mask: Tensor, most: int) -> list[Image.Image]:
    """The first pictures of a batch after augmentation, their masks drawn over them.

    Args:
        spec: how pictures were normalised.
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
    """Some pictures of the validation split, the same each time: picture, truth, prediction, wrong.

    In this process alone. The model is left in the mode that it was in.
    """
    number = data.manifest.splits["val"].samples
    positions = sorted({i * number // most for i in range(most)})
    was_training = model.training
    found = predict_examples(model, accelerator, data, "val", positions, tiles)
    drawn = [side_by_side(draw_panels(shown, data.manifest.palette, MOST)) for shown in found]
    model.train(was_training)
    return drawn
