"""Headers are trusted only for ordinary files, and then agree with Pillow."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shards.images.headers import ImageHeader, read_image_header
from shards.masks.palettes import default_palette, palette_bytes
from shards.masks.png import encode_mask


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("PNG", {}),
        ("PNG", {"dpi": (300, 300)}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"comment": b"taken on a Monday", "dpi": (72, 72)}),
        ("JPEG", {"icc_profile": b"x" * 70_000}),
    ],
)
def test_ordinary_files_give_size_and_mode(mode, file_format, options, to_bytes, noise) -> None:
    image = Image.fromarray(noise((5, 7, 3))).convert(mode)
    assert read_image_header(to_bytes(image, file_format, **options)) == ImageHeader((7, 5), mode)


@pytest.mark.parametrize("num_classes", [2, 3, 9, 100])
def test_canonical_masks_give_their_palette(num_classes, noise) -> None:
    palette = default_palette(tuple(map(str, range(num_classes))))
    header = read_image_header(encode_mask(noise((5, 7)) % num_classes, palette))
    assert header is not None
    assert (header.size, header.mode) == ((7, 5), "P")
    assert palette_bytes(palette).startswith(header.palette)
    assert len(header.palette) >= 3 * num_classes


def oriented() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def text(name: str) -> PngInfo:
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", name)
    return info


GREY = Image.new("L", (7, 5), 9)
COLOUR = Image.new("RGB", (7, 5), (9, 99, 200))


@pytest.mark.parametrize(
    ("image", "file_format", "options"),
    [
        (COLOUR, "JPEG", {"exif": oriented()}),
        (COLOUR, "PNG", {"exif": oriented()}),
        (COLOUR, "PNG", {"transparency": (9, 99, 200)}),
        (COLOUR, "PNG", {"pnginfo": text("orientation")}),
        (COLOUR, "JPEG", {"xmp": b"orientation"}),
        (COLOUR, "MPO", {"save_all": True, "append_images": [COLOUR]}),
        (COLOUR, "PNG", {"save_all": True, "append_images": [GREY.convert("RGB")]}),
        (COLOUR.convert("CMYK"), "JPEG", {}),
        (COLOUR.convert("RGBA"), "PNG", {}),
        (GREY.convert("1"), "PNG", {}),
        (Image.new("I;16", (7, 5)), "PNG", {}),
        (COLOUR, "BMP", {}),
        (COLOUR, "TIFF", {}),
        (COLOUR, "WEBP", {}),
    ],
)
def test_unusual_files_have_to_be_decoded(image, file_format, options, to_bytes) -> None:
    assert read_image_header(to_bytes(image, file_format, **options)) is None


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_a_truncated_file_is_not_trusted(file_format, to_bytes) -> None:
    data = to_bytes(COLOUR, file_format)
    for length in range(len(data)):
        assert read_image_header(data[:length]) is None


@given(st.data())
def test_damaged_headers_never_raise(data) -> None:
    out = io.BytesIO()
    file_format = data.draw(st.sampled_from(["PNG", "JPEG"]))
    Image.fromarray(np.zeros((3, 4), np.uint8)).save(out, file_format)
    good = bytearray(out.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    header = read_image_header(bytes(good))
    assert header is None or isinstance(header, ImageHeader)
