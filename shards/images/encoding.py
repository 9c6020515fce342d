"""Scale decoded images down and encode them as PNG."""

import io

import numpy as np
from PIL import Image

from shards.images.tiff import GREY16_MODES
from shards.sample import Channels


def downscale_image(image: Image.Image, longest: int, channels: Channels) -> Image.Image:
    """Scale an image down to `longest` pixels on its longer side, by area averaging."""
    size = compute_scaled_size(image.size, longest)
    if image.mode in GREY16_MODES:
        scaled = Image.fromarray(np.asarray(image).astype(np.float32)).resize(
            size, Image.Resampling.BOX
        )
        return Image.fromarray(np.asarray(scaled).round().astype(np.uint16))
    return image.convert(channels).resize(size, Image.Resampling.BOX)


def compute_scaled_size(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Return (width, height) scaled down so that the longer side is at most `longest`."""
    factor = min(1.0, longest / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def encode_png(image: Image.Image) -> bytes:
    """Encode an image as PNG without metadata, so that an applied orientation is not kept."""
    if image.mode in GREY16_MODES:
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    # PNG does not support a palette with an alpha channel.
    clean = image.convert("RGBA") if image.mode == "PA" else image.copy()
    clean.info.clear()
    out = io.BytesIO()
    clean.save(out, "PNG", exif=b"")
    return out.getvalue()
