"""Palettes of masks: read, checked, made."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.sample import IGNORE, Colour, DataError, Palette


def format_colour(colour: tuple[int, ...] | NDArray[np.int64]) -> str:
    """Format as `(255, 0, 0)`, or as the number itself if there is only one."""
    numbers = [str(int(part)) for part in colour]
    return numbers[0] if len(numbers) == 1 else f"({', '.join(numbers)})"


def read_header_palette(image: Image.Image) -> bytes:
    """Return the palette of an image of mode P without decoding it, as `getpalette` would."""
    return bytes(image.palette.palette) if image.mode == "P" and image.palette else b""


def refuse_short_palette(image: Image.Image, where: str) -> None:
    """Raise DataError if an index has no palette colour: Pillow would read it as black."""
    max_index, size = int(np.asarray(image).max()), len(read_palette(image))
    if max_index >= size:
        raise DataError(
            f"{where} has index {max_index}, but its palette has only {size} colours; "
            "save it again, or use --mask-format index"
        )


def read_palette(image: Image.Image) -> Palette:
    """Return the colours of an image of mode P, in the order of its indices."""
    numbers = image.getpalette("RGB") or []
    return tuple(
        (numbers[i], numbers[i + 1], numbers[i + 2]) for i in range(0, len(numbers) - 2, 3)
    )


@lru_cache
def palette_bytes(palette: Palette) -> bytes:
    """Return the 768 bytes of a PNG palette: class colours, white for 255 (ignore), else grey."""
    table = np.full((256, 3), 128, dtype=np.uint8)
    table[: len(palette)] = palette
    table[IGNORE] = 255
    return table.tobytes()


def default_palette(classes: tuple[str, ...]) -> Palette:
    """Return distinct colours: black for `background` or the first of two classes, then hues."""
    plain = len(classes) == 2 or (bool(classes) and classes[0].lower() == "background")
    return ((0, 0, 0),) * plain + tuple(generate_colour(i) for i in range(len(classes) - plain))


def generate_colour(number: int) -> Colour:
    """Generate the colour of a number: hues a golden ratio apart, in three levels of brightness."""
    hue = (number * 0.618034) % 1.0 * 6
    value = (255, 190, 225)[number % 3]
    rgb = [min(1.0, max(0.0, abs((hue + shift) % 6 - 3) - 1)) for shift in (0, 4, 2)]
    red, green, blue = (round(value * (0.2 + 0.8 * part)) for part in rgb)
    return red, green, blue
