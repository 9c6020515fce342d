"""`images.pixels`: equal with and without simplejpeg, as a complete image or a crop."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import shards.images.pixels
from shards.images.files import ImageFormat
from shards.images.pixels import DecodedImage, decode_image, decode_unconverted, to_array
from shards.sample import DataError

simplejpeg = pytest.importorskip("simplejpeg")
RGB, GREY = ImageFormat("RGB"), ImageFormat("L")
SIZES = [(1, 1), (1, 9), (7, 5), (16, 16), (17, 33), (64, 50)]


def smooth(height, width, channels=3):
    """Return smooth colours with an edge and some noise, which a JPEG preserves well."""
    rng = np.random.default_rng(height * 100 + width)
    y, x = np.mgrid[:height, :width]
    bands = [x * 7 % 256, y * 5 % 256, (x * y) % 256][:channels]
    pixels = np.stack(bands, -1) + rng.integers(0, 30, (height, width, channels))
    return pixels.clip(0, 255).astype(np.uint8)


def jpeg(height=33, width=17, mode="RGB", **options):
    out = io.BytesIO()
    Image.fromarray(smooth(height, width)).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def pillow(data, image_format, where="s.tar: k"):
    """Decode a file with Pillow only; returns its pixels or the error message."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.images.pixels, "simplejpeg", None)
        return outcome(data, image_format, where)


def outcome(data, image_format, where="s.tar: k"):
    try:
        return decode_image(data, image_format, where)
    except DataError as error:
        return str(error)


def same(one, other):
    return one == other if isinstance(one, str) else np.array_equal(one, other)


@pytest.fixture
def decoded_by(monkeypatch):
    """decoded_by() -> number of images that simplejpeg has decoded since the last call."""
    count = 0
    decode = simplejpeg.decode_jpeg

    def counting(*arguments, **options):
        nonlocal count
        pixels = decode(*arguments, **options)
        count += 1
        return pixels

    def since():
        nonlocal count
        found, count = count, 0
        return found

    monkeypatch.setattr(simplejpeg, "decode_jpeg", counting)
    return since


# -------------------------------------------------------------------------- identical pixels


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("quality", [30, 95])
def test_colour_jpegs_have_the_same_pixels(subsampling, progressive, quality, decoded_by):
    for height, width in SIZES:
        options = {"subsampling": subsampling, "progressive": progressive, "quality": quality}
        data = jpeg(height, width, **options)
        pixels = decode_image(data, RGB, "x")
        assert decoded_by() == 1
        assert pixels.shape == (height, width, 3)
        assert np.array_equal(pixels, pillow(data, RGB))


@pytest.mark.parametrize("image_format", [RGB, GREY])
def test_grey_jpegs_have_the_same_pixels_in_grey_and_in_colour(image_format, decoded_by):
    for height, width in SIZES:
        data = jpeg(height, width, "L")
        pixels = decode_image(data, image_format, "x")
        assert decoded_by() == 1
        assert pixels.shape == (height, width, len(image_format.channels))
        assert np.array_equal(pixels, pillow(data, image_format))


@pytest.mark.parametrize("subsampling", ["440", "411"])
def test_unusual_subsamplings_have_the_same_pixels(subsampling, decoded_by):
    for height, width in SIZES[2:]:
        data = simplejpeg.encode_jpeg(smooth(height, width), colorsubsampling=subsampling)
        assert np.array_equal(decode_image(data, RGB, "x"), pillow(data, RGB))
        assert decoded_by() == 1


@pytest.mark.parametrize(
    "options", [{"restart_marker_blocks": 2}, {"optimize": True}, {"dpi": (72, 72)}]
)
def test_restart_markers_and_other_tables_have_the_same_pixels(options, decoded_by):
    data = jpeg(60, 70, **options)
    assert np.array_equal(decode_image(data, RGB, "x"), pillow(data, RGB))
    assert decoded_by() == 1


# ------------------------------------------------------------------------ what is left to Pillow


@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_a_rotated_jpeg_is_left_to_pillow(orientation, decoded_by):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(20, 12, exif=exif)
    pixels = decode_image(data, RGB, "x")
    assert decoded_by() == 0
    assert pixels.shape == ((20, 12, 3) if orientation < 5 else (12, 20, 3))
    assert np.array_equal(pixels, pillow(data, RGB))


def test_a_jpeg_with_upright_exif_is_decoded_by_simplejpeg(decoded_by):
    exif = Image.Exif()
    exif[0x0112] = 1
    data = jpeg(exif=exif)
    assert np.array_equal(decode_image(data, RGB, "x"), pillow(data, RGB))
    assert decoded_by() == 1


def test_colour_jpegs_are_converted_to_grey_by_pillow(decoded_by):
    data = jpeg()
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("L"))[..., None]
    assert np.array_equal(decode_image(data, GREY, "x"), expected)
    assert decoded_by() == 0


@pytest.mark.parametrize("image_format", [RGB, GREY])
def test_cmyk_and_other_formats_are_left_to_pillow(image_format, decoded_by):
    files = [jpeg(mode="CMYK")]
    for kind in ("PNG", "BMP", "WEBP"):
        out = io.BytesIO()
        Image.fromarray(smooth(9, 8)).save(out, kind)
        files.append(out.getvalue())
    for data in files:
        assert np.array_equal(decode_image(data, image_format, "x"), pillow(data, image_format))
    assert decoded_by() == 0


def test_without_simplejpeg_everything_is_decoded_by_pillow(monkeypatch):
    monkeypatch.setattr(shards.images.pixels, "simplejpeg", None)
    data = jpeg()
    expected = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode_image(data, RGB, "x"), expected)
    assert isinstance(decode_unconverted(data, RGB, "x").pixels, Image.Image)


# ------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("progressive", [False, True])
def test_a_truncated_jpeg_gives_the_same_result_as_pillow(progressive):
    data = jpeg(24, 24, progressive=progressive, quality=60)
    for length in range(0, len(data), 3):
        assert same(outcome(data[:length], RGB), pillow(data[:length], RGB)), length
    error = outcome(data[: len(data) // 2], RGB)
    assert isinstance(error, str)
    assert error.startswith("s.tar: k ")


@given(st.integers(0, 10**6), st.integers(1, 255), st.booleans(), st.sampled_from([RGB, GREY]))
def test_a_flipped_byte_gives_the_same_result_as_pillow(place, change, progressive, image_format):
    data = bytearray(
        jpeg(40, 24, progressive=progressive, mode="L" if image_format is GREY else "RGB")
    )
    data[place % len(data)] ^= change
    assert same(outcome(bytes(data), image_format), pillow(bytes(data), image_format))


# ------------------------------------------------------------------------------------- crops


def images_to_convert():
    """Yield images of every mode that is converted, with their image format."""
    colours = smooth(20, 30)
    grey16 = (colours[..., 0].astype(np.uint16) * 200) + colours[..., 1]
    few = Image.fromarray(colours).quantize(17)
    yield "I;16", Image.fromarray(grey16), ImageFormat("L", range=(500, 40_000))
    yield "I;16 in colour", Image.fromarray(grey16), ImageFormat("RGB", range=(500, 40_000))
    yield "P", few, RGB
    yield "P in grey", few, GREY
    yield "RGBA", Image.fromarray(colours).convert("RGBA"), RGB
    yield "LA", Image.fromarray(colours).convert("LA"), GREY
    yield "1", Image.fromarray(colours[..., 0] > 99), GREY
    yield "CMYK", Image.fromarray(colours).convert("CMYK"), GREY
    yield "RGB", Image.fromarray(colours), RGB


@pytest.mark.parametrize(
    ("image", "image_format"), [pytest.param(*rest, id=i) for i, *rest in images_to_convert()]
)
def test_a_crop_is_a_slice_of_the_image_and_nothing_else_is_converted(
    image, image_format, monkeypatch
):
    decoded = DecodedImage(image, image_format)
    assert decoded.size == (30, 20)
    full = decoded.crop(0, 0, 30, 20)
    assert full.shape == (20, 30, len(image_format.channels))
    sizes = []

    def logged_to_array(crop, image_format):
        sizes.append(crop.size)
        return to_array(crop, image_format)

    monkeypatch.setattr(shards.images.pixels, "to_array", logged_to_array)
    boxes = [(0, 0, 1, 1), (3, 4, 17, 19), (29, 0, 30, 20), (0, 0, 30, 20), (10, 10, 30, 20)]
    for left, top, right, bottom in boxes:
        crop = decoded.crop(left, top, right, bottom)
        assert np.array_equal(crop, full[top:bottom, left:right])
        assert sizes.pop() == (right - left, bottom - top)


def test_a_crop_of_an_array_is_its_slice():
    decoded = decode_unconverted(jpeg(20, 30), RGB, "x")
    assert isinstance(decoded.pixels, np.ndarray)
    assert decoded.size == (30, 20)
    assert np.array_equal(decoded.crop(3, 4, 17, 19), decoded.pixels[4:19, 3:17])
