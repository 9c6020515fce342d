"""Converts PIL images, arrays and tensors to the uint8 tensors that a model was trained on."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from unet.spec import DataSpec

AnyImage = Tensor | NDArray[np.uint8] | NDArray[np.uint16] | Image.Image


def to_pixels(image: AnyImage, spec: DataSpec) -> Tensor:
    """Convert an image to the channels and the range of a data set, as `unet predict` does.

    Args:
        image: a PIL image; an array [H, W], [H, W, 1] or [H, W, 3]; or a tensor [H, W], [1, H, W]
            or [3, H, W]. uint8, or uint16 for a data set of 16-bit images. An EXIF orientation is
            not applied: the mask has the orientation of the pixels.
        spec: data spec of the model.

    Returns:
        uint8 [C, H, W] on the device of a tensor, else on the CPU; C is 1 or 3.

    Raises:
        ValueError: for other shapes and dtypes, for transparent pixels where the data set had
            none, and for 16-bit values where the data set had no `image_range`.
    """
    device = image.device if isinstance(image, Tensor) else torch.device("cpu")
    if isinstance(image, Image.Image):
        pixels = from_pil(image, spec)
    elif isinstance(image, Tensor):
        channels_first = image.cpu().numpy()
        pixels = np.moveaxis(channels_first, 0, -1) if image.ndim == 3 else channels_first
    else:
        pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        raise ValueError(
            f"image has shape {tuple(image.shape if isinstance(image, Tensor) else pixels.shape)}; "
            "expected an array [H, W], [H, W, 1] or [H, W, 3], or a tensor [H, W], [1, H, W] or "
            "[3, H, W]"
        )
    pixels = to_channels(to_8_bits(pixels, spec), spec)
    return torch.from_numpy(np.array(np.moveaxis(pixels, -1, 0), order="C")).to(device)


def from_pil(image: Image.Image, spec: DataSpec) -> NDArray[np.generic]:
    """Convert a PIL image to an array [H, W] or [H, W, 3] of uint8 or uint16.

    Raises ValueError for transparent pixels that the data set refuses.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"image has values from {values.min()} to {values.max()}; expected 0 to 65535"
            )
        return values.astype(np.uint16)
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
        raise ValueError(f"image has mode {image.mode}, which is not supported; convert it to RGB")
    if image.has_transparency_data and spec.alpha == "refuse":
        lowest, _ = image.convert("RGBA").getchannel("A").getextrema()
        if lowest != 255:
            raise ValueError(
                "image has transparent pixels, and the training images had none; "
                "remove the transparency first: image.convert('RGB')"
            )
    # Pillow turns CMYK into grey only by way of RGB.
    if image.mode in ("CMYK", "YCbCr"):
        image = image.convert("RGB")
    return np.asarray(image.convert(spec.channels))


def to_8_bits(pixels: NDArray[np.generic], spec: DataSpec) -> NDArray[np.uint8]:
    """Scale 16-bit values by the range of the data set. Raises ValueError for other dtypes."""
    if pixels.dtype == np.uint8:
        return pixels.astype(np.uint8, copy=False)
    if pixels.dtype != np.uint16:
        raise ValueError(f"image has dtype {pixels.dtype}; expected uint8 or uint16")
    if spec.image_range is None:
        raise ValueError(
            "image has 16-bit values, and the model was trained on 8-bit images; "
            "scale it to uint8 first"
        )
    if pixels.shape[2] != 1:
        raise ValueError("image has 16-bit colours; 16-bit images must have one channel")
    low, high = spec.image_range
    levels = (pixels.astype(np.float64) - low) * (255 / max(1, high - low))
    return levels.clip(0, 255).round().astype(np.uint8)


def to_channels(pixels: NDArray[np.uint8], spec: DataSpec) -> NDArray[np.uint8]:
    """Convert uint8 [H, W, 1 or 3] to the channels of the data set, [H, W, 1] or [H, W, 3]."""
    if spec.channels == "RGB":
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3))
    if pixels.shape[2] == 1:
        return pixels
    return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
