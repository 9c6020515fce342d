"""Examples for people: images, masks and predictions, drawn side by side."""

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from pipelines.drawing.overlay import draw_overlay
from pipelines.drawing.panels import Example
from pipelines.loading.dataset import DataSet
from pipelines.model.forward import make_forward
from unet import DataSpec, Ensemble, TileConfig, UNet, predict_mask


@torch.inference_mode()
def predict_examples(
    model: UNet | Ensemble,
    accelerator: Accelerator,
    data: DataSet,
    split: str,
    positions: Sequence[int],
    tiles: TileConfig,
) -> Iterator[Example]:
    """Predict the images at some positions of a split one by one, in this process alone.

    Raises DataError if a sample cannot be read or has no mask.
    """
    forward = make_forward(model, accelerator)
    model.eval()
    for sample, mask in data.samples(split, positions):
        image = torch.tensor(sample.image).permute(2, 0, 1)[None].to(accelerator.device)
        prediction, _ = predict_mask(forward, image, tiles, model)
        yield Example(sample.key, sample.image, mask, prediction[0].cpu().numpy())


def draw_batch(spec: DataSpec, image: Tensor, mask: Tensor, max_images: int) -> list[Image.Image]:
    """Draw the first images of an augmented batch with their masks.

    Args:
        spec: how images were normalised.
        image: normalised float32 [B, C, H, W].
        mask: uint8 [B, H, W].
        max_images: maximum number of images to draw.
    """
    mean, std = (torch.tensor(values).view(-1, 1, 1) * 255 for values in (spec.mean, spec.std))
    restored = image[:max_images].detach().float().cpu() * std + mean
    pixels = restored.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [
        draw_overlay(one, classes, spec.palette)
        for one, classes in zip(pixels, mask[:max_images].cpu().numpy(), strict=True)
    ]
