"""`images.tiff`, `masks.canonical`.

16-bit colours that only repeat 8 bits are accepted without a loss; all others are refused.
"""

import struct

import numpy as np
import pytest
from PIL import Image

from shards.images.files import ImageFormat, ImageRule, read_image
from shards.images.pixels import decode_image
from shards.masks.canonical import read_mask
from shards.masks.formats import MaskFormat
from shards.masks.palettes import default_palette
from shards.sample import DataError

COLOURS = ((0, 0, 0), (255, 0, 1), (18, 52, 254))
INDEX = np.array([[0, 1, 2, 1], [2, 2, 0, 1]], dtype=np.uint8)


def widen(pixels, change=0):
    """k -> k * 257, the last value changed."""
    wide = pixels.astype(np.uint16) * 257
    wide.flat[-1] -= change
    return wide


@pytest.fixture
def encode(raw_png, raw_tiff):
    """encode(kind, wide [H, W, 3 or 4]) -> a PNG or TIFF with 16 bits per channel."""

    def run(kind, wide):
        height, width, bands = wide.shape
        if kind == "png":
            return raw_png(
                [r.astype(">u2").tobytes() for r in wide], width, 16, {3: 2, 4: 6}[bands]
            )
        order = {"tiff <": "<", "tiff >": ">"}[kind]
        tags = [(338, "H", [2])] if bands == 4 else []
        data = wide.astype(f"{order}u2").tobytes()
        return raw_tiff(data, (width, height), 16, bands, order=order, photometric=2, tags=tags)

    return run


KINDS = ["png", "tiff <", "tiff >"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bands", [3, 4])
def test_16_bit_colour_masks_that_repeat_8_bits_are_read_exactly(encode, kind, bands):
    colours = np.array(COLOURS, dtype=np.uint8)[INDEX]
    if bands == 4:
        colours = np.concatenate([colours, np.full((2, 4, 1), 255, np.uint8)], -1)
    mask_format = MaskFormat(kind="rgb", num_classes=3, colours=COLOURS)
    palette = default_palette(("a", "b", "c"))
    mask = read_mask(encode(kind, widen(colours)), mask_format, palette, "m/a.png")
    assert mask.class_map.index.tolist() == INDEX.tolist()
    with pytest.raises(DataError, match="has 16 bits per colour channel, of which 8 would be lost"):
        read_mask(encode(kind, widen(colours, 1)), mask_format, palette, "m/a.png")


@pytest.mark.parametrize("kind", KINDS)
def test_16_bit_images_that_repeat_8_bits_are_stored_with_8_bits(encode, kind, noise):
    pixels = noise((6, 8, 3))
    data = encode(kind, widen(pixels))
    stored = read_image(data, ImageRule(), "i/a.png")
    assert (stored.notes, stored.extension, stored.channels) == (("narrowed",), "png", "RGB")
    form = ImageFormat("RGB")
    assert np.array_equal(decode_image(stored.data, form, "x"), pixels)
    assert np.array_equal(decode_image(data, form, "x"), pixels)


def test_a_transparent_colour_of_16_bits_is_refused(raw_png):
    rows = [widen(np.array(COLOURS, np.uint8)[row]).astype(">u2").tobytes() for row in INDEX]
    data = raw_png(rows, 4, 16, 2, [(b"tRNS", struct.pack(">HHH", 0, 0, 0))])
    with pytest.raises(DataError, match="has 16 bits per colour channel"):
        read_image(data, ImageRule(), "i/a.png")


def test_a_damaged_file_is_refused_as_damaged(encode):
    data = encode("png", widen(np.array(COLOURS, np.uint8)[INDEX]))
    with pytest.raises(DataError, match="is damaged"):
        read_image(data[:60], ImageRule(), "i/a.png")


def test_rgb_of_8_bits_is_unchanged(to_bytes, noise):
    data = to_bytes(Image.fromarray(noise((6, 8, 3))))
    assert read_image(data, ImageRule(), "i/a.png").data == data
