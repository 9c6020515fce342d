"""`images.files`, `images.pixels`, `images.encoding`, `images.tiff`.

Image files: which are accepted, what they decode to, and which are refused.
"""

import io
import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shards.images.encoding import compute_scaled_size
from shards.images.files import (
    IMAGE_EXTENSIONS,
    NOTES,
    UNSUPPORTED_EXTENSIONS,
    ImageFormat,
    ImageRule,
    encode_png,
    load_pixels,
    open_image,
    read_image,
    read_orientation,
)
from shards.images.pixels import build_scale_table, decode_image
from shards.sample import DataError

# Pillow warns about the damaged directory of a TIFF before it raises.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

GREY, COLOUR = ImageFormat("L"), ImageFormat("RGB")
STRICT = ImageRule()
EVERYTHING = ImageRule(alpha="drop", allow_16_bit=True, frame=0)


def read(data, *, pixels=True, **rule):
    return read_image(data, ImageRule(**rule), "a.png", pixels=pixels)


def decode(data, image_format=COLOUR):
    return decode_image(data, image_format, "x")


def with_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def grey():
    return np.arange(35, dtype=np.uint8).reshape(5, 7) * 7


def grey16(high=65535):
    return np.linspace(0, high, 48).round().astype(np.uint16).reshape(6, 8)


def with_palette(indices, colours):
    image = Image.fromarray(np.array(indices, dtype=np.uint8)).copy()
    image.putpalette([part for colour in colours for part in colour])
    return image


# --------------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "BMP", "WEBP"])
def test_rgb_decodes_to_its_pixels(to_bytes, noise, file_format):
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = to_bytes(Image.fromarray(noise()), file_format, **options)
    assert read(data).channels == "RGB"
    assert np.array_equal(decode(data), noise())


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "BMP", "GIF"])
def test_grey_decodes_to_its_pixels_in_one_channel_or_three(to_bytes, file_format):
    data = to_bytes(Image.fromarray(grey()), file_format)
    assert read(data).channels == "L"
    assert np.array_equal(decode(data, GREY), grey()[..., None])
    assert np.array_equal(decode(data), np.stack([grey()] * 3, -1))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "BMP"])
def test_bilevel_decodes_to_0_and_255(to_bytes, file_format):
    bits = grey() % 2 > 0
    data = to_bytes(Image.fromarray(bits), file_format)
    assert read(data).channels == "L"
    assert np.array_equal(decode(data, GREY)[..., 0], bits * np.uint8(255))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "GIF", "BMP"])
def test_a_palette_image_decodes_to_its_colours_and_is_grey_if_they_are(to_bytes, file_format):
    indices = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8)
    greys = [(5, 5, 5), (90, 90, 90), (200, 200, 200)]
    data = to_bytes(with_palette(indices, greys), file_format)
    assert read(data).channels == "L"
    assert decode(data, GREY)[..., 0].tolist() == [[5, 90, 200], [200, 90, 5]]
    colours = [(5, 5, 5), (90, 0, 90), (200, 200, 200)]
    data = to_bytes(with_palette(indices, colours), file_format)
    assert read(data).channels == "RGB"
    assert np.array_equal(decode(data), np.array(colours, np.uint8)[indices])


@pytest.mark.parametrize(("file_format", "mode"), [("PNG", "LA"), ("TIFF", "LA"), ("TIFF", "PA")])
def test_an_opaque_alpha_channel_of_a_grey_image_is_dropped(to_bytes, file_format, mode):
    data = to_bytes(Image.fromarray(grey()).convert(mode), file_format)
    assert Image.open(io.BytesIO(data)).mode == mode
    assert (read(data).channels, read(data).notes) == ("L", ())
    assert np.array_equal(decode(data, GREY)[..., 0], grey())


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP"])
def test_an_opaque_alpha_channel_of_an_rgb_image_is_dropped(to_bytes, noise, file_format):
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = to_bytes(Image.fromarray(noise()).convert("RGBA"), file_format, **options)
    assert read(data).notes == ()
    assert np.array_equal(decode(data), noise())


def test_a_transparent_colour_that_does_not_occur_is_ignored(to_bytes):
    image = with_palette([[0, 1]], [(1, 2, 3), (4, 5, 6), (7, 8, 9)])
    assert decode(to_bytes(image, transparency=2)).tolist() == [[[1, 2, 3], [4, 5, 6]]]


@pytest.mark.parametrize(
    ("bits", "byte", "levels"), [(2, 0x1B, [0, 85, 170, 255]), (4, 0x1F, [17])]
)
def test_grey_of_2_and_4_bits_is_scaled_from_black_to_white(raw_png, bits, byte, levels):
    data = raw_png([bytes([byte])], 8 // bits, bits, 0)
    assert decode(data, GREY)[..., 0].tolist()[0][: len(levels)] == levels


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_cmyk_and_ycbcr_are_converted_to_rgb_and_through_it_to_grey(to_bytes, noise, mode):
    image = Image.fromarray(noise()).convert(mode)
    data = to_bytes(image, "TIFF")
    stored = read(data)
    assert (stored.channels, stored.notes) == ("RGB", ("colour",))
    assert stored.data is data
    assert np.array_equal(decode(data), np.asarray(image.convert("RGB")))
    assert np.array_equal(decode(data, GREY)[..., 0], np.asarray(image.convert("RGB").convert("L")))


def test_a_cmyk_jpeg_keeps_its_colours(to_bytes):
    image = Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK")
    pixels = decode(to_bytes(image, "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - (200, 40, 90)).max() < 6


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_decodes_as_with_pillow(to_bytes, noise, mode):
    data = to_bytes(Image.fromarray(noise()).convert(mode), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert read(data).channels == mode
    assert np.array_equal(decode(data), expected)


def test_the_previews_in_a_cameras_mpo_are_not_further_frames(to_bytes, noise):
    frames = [Image.fromarray(noise((16, 16, 3))), Image.new("RGB", (4, 4))]
    data = to_bytes(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    stored = read(data)
    assert (stored.data, stored.notes, stored.full_size) == (data, (), (16, 16))
    assert decode(data).shape == (16, 16, 3)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "GIF", "BMP", "JPEG", "WEBP"])
@pytest.mark.parametrize("pixels", [True, False])
def test_an_unchanged_image_keeps_its_original_bytes(to_bytes, noise, file_format, pixels):
    data = to_bytes(Image.fromarray(noise()), file_format)
    stored = read(data, pixels=pixels)
    assert stored.data is data
    assert (stored.extension, stored.full_size, stored.notes) == (None, (8, 6), ())


def test_only_ordinary_headers_are_trusted(to_bytes, noise):
    plain = to_bytes(Image.fromarray(noise()))
    assert read(plain, pixels=False).image is None
    assert read(plain).image is not None
    rotated = to_bytes(Image.fromarray(noise()), "JPEG", exif=with_orientation(6))
    deep = to_bytes(Image.fromarray(grey16()))
    indexed = to_bytes(with_palette([[0, 1]], [(1, 2, 3), (4, 5, 6)]))
    for data in (rotated, deep, indexed):
        assert read(data, allow_16_bit=True, pixels=False).image is not None
    assert read(plain, resize=4, pixels=False).image is not None


def test_a_header_agrees_with_the_decoded_image(to_bytes, noise):
    for mode in ("L", "RGB"):
        data = to_bytes(Image.fromarray(noise()).convert(mode))
        decoded, trusted = read(data), read(data, pixels=False)
        assert (decoded.channels, decoded.full_size) == (trusted.channels, trusted.full_size)
        assert (decoded.mode, decoded.size) == (trusted.mode, trusted.size)


def test_every_note_occurs(to_bytes, raw_png, noise):
    notes = set()
    several = [Image.fromarray(noise(seed=i)) for i in range(2)]
    for data, rule in (
        (to_bytes(several[0], exif=with_orientation(3)), {}),
        (to_bytes(several[0], exif=with_orientation(3)), {"exif": "ignore"}),
        (to_bytes(several[0], "TIFF", save_all=True, append_images=several[1:]), {"frame": 1}),
        (to_bytes(several[0]), {"resize": 4}),
        (to_bytes(Image.new("RGBA", (2, 2))), {"alpha": "drop"}),
        (to_bytes(several[0].convert("CMYK"), "TIFF"), {}),
        (to_bytes(Image.fromarray(grey16())), {"allow_16_bit": True}),
        (raw_png([b"\7" * 24] * 2, 4, 16, 2), {}),
    ):
        notes |= set(read(data, **rule).notes)
    # Notes on masks and annotations are added when they are read with their image.
    assert notes | {"mask", "white_is_zero", "clipped", "degenerate"} == set(NOTES)


# ------------------------------------------------------------------------------------ 16 bits


def by_formula(pixels, low, high):
    """As documented: low becomes 0, high 255, linear in between, rounded half to even."""
    share = np.clip((pixels.astype(np.float64) - low) * (255 / (high - low)), 0, 255)
    return np.round(share).astype(np.uint8)


@pytest.mark.parametrize(
    "bounds", [(0, 65535), (0, 4095), (100, 101), (1000, 30000), (65534, 65535)]
)
def test_16_bits_are_scaled_to_8_by_exactly_the_declared_range(to_bytes, bounds):
    pixels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    data = to_bytes(Image.fromarray(pixels))
    expected = by_formula(pixels, *bounds)
    assert np.array_equal(decode(data, ImageFormat("L", range=bounds))[..., 0], expected)
    decoded = decode(data, ImageFormat("RGB", range=bounds))
    assert np.array_equal(decoded, np.stack([expected] * 3, -1))


@given(st.integers(0, 65534), st.integers(1, 65535))
def test_a_scale_table_is_monotonic_from_black_to_white(low, width):
    high = min(65535, low + width)
    table = build_scale_table((low, high))
    assert (table[low], table[high]) == (0, 255)
    assert (np.diff(table.astype(int)) >= 0).all()


def sixteen_bit_files(to_bytes, raw_tiff):
    pixels = grey16()
    return {
        "PNG": to_bytes(Image.fromarray(pixels)),
        "TIFF": to_bytes(Image.fromarray(pixels), "TIFF"),
        "TIFF compressed": to_bytes(Image.fromarray(pixels), "TIFF", compression="tiff_lzw"),
        "little": raw_tiff(pixels.astype("<u2").tobytes(), (8, 6), 16, 1, order="<"),
        "big": raw_tiff(pixels.astype(">u2").tobytes(), (8, 6), 16, 1, order=">"),
        "mode I": to_bytes(Image.fromarray(pixels.astype(np.int32)), "TIFF"),
    }


@pytest.mark.parametrize("name", ["PNG", "TIFF", "TIFF compressed", "little", "big", "mode I"])
def test_16_bit_grey_of_every_file_format_and_byte_order(to_bytes, raw_tiff, name):
    data = sixteen_bit_files(to_bytes, raw_tiff)[name]
    stored = read(data, allow_16_bit=True)
    assert (stored.data, stored.channels, stored.notes) == (data, "L", ("deep",))
    decoded = decode(data, ImageFormat("L", range=(1000, 60000)))
    assert np.array_equal(decoded[..., 0], by_formula(grey16(), 1000, 60000))


def test_an_image_of_8_bits_is_not_scaled_by_a_range(to_bytes, noise):
    data = to_bytes(Image.fromarray(noise()))
    assert np.array_equal(decode(data, ImageFormat("RGB", range=(0, 4095))), noise())


# --------------------------------------------------------------------------------- orientation

UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("file_format", LOSSLESS)
def test_images_are_stored_and_decoded_upright(to_bytes, noise, orientation, file_format):
    exif = with_orientation(orientation)
    data = to_bytes(Image.fromarray(noise()), file_format, exif=exif, **LOSSLESS[file_format])
    expected = UPRIGHT[orientation](noise())
    stored = read(data)
    # Pillow rotates a TIFF while decoding it.
    assert stored.notes == (() if orientation == 1 else ("turned",))
    assert stored.extension == (None if orientation == 1 else "png")
    assert stored.full_size == stored.image.size == expected.shape[1::-1]
    assert np.array_equal(decode(stored.data), expected)
    assert np.array_equal(decode(data), expected)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("file_format", LOSSLESS)
def test_an_ignored_orientation_leaves_the_pixels_unrotated(
    to_bytes, noise, orientation, file_format
):
    exif = with_orientation(orientation)
    data = to_bytes(Image.fromarray(noise()), file_format, exif=exif, **LOSSLESS[file_format])
    stored = read(data, exif="ignore")
    assert stored.notes == (() if orientation == 1 else ("unturned",))
    assert stored.full_size == (8, 6)
    assert np.array_equal(decode(stored.data), noise())


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_an_oriented_jpeg_is_stored_losslessly(to_bytes, noise, orientation):
    data = to_bytes(Image.fromarray(noise()), "JPEG", exif=with_orientation(orientation))
    unrotated = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode(read(data).data), UPRIGHT[orientation](unrotated))
    assert np.array_equal(decode(read(data, exif="ignore").data), unrotated)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"]
)
def test_every_mode_can_be_rotated(to_bytes, noise, mode):
    image = Image.fromarray(noise())
    image = Image.fromarray(grey16()) if mode == "I;16" else image.convert("L").convert(mode)
    unrotated = to_bytes(image, "TIFF")
    data = to_bytes(image, "TIFF", exif=with_orientation(6))
    stored = read_image(data, EVERYTHING, "x")
    assert "turned" in stored.notes
    image_format = ImageFormat("RGB", "drop", (0, 65535))
    assert np.array_equal(
        decode(stored.data, image_format), np.rot90(decode(unrotated, image_format), -1)
    )


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_invalid_orientation_is_ignored(to_bytes, noise, orientation):
    data = to_bytes(Image.fromarray(noise()), exif=with_orientation(orientation))
    assert read(data).data is data


def test_a_rotated_image_written_as_png_is_not_rotated_again(to_bytes, noise):
    data = to_bytes(Image.fromarray(noise()), exif=with_orientation(6))
    upright, was_rotated = load_pixels(open_image(data, "x", STRICT), "x")
    written = encode_png(upright)
    assert was_rotated
    assert read_orientation(Image.open(io.BytesIO(written))) == 1
    assert np.array_equal(decode(written), np.rot90(noise(), -1))


def test_a_rewritten_image_has_no_metadata(to_bytes, noise):
    text = PngInfo()
    text.add_text("Patient", "a name")
    exif = with_orientation(6)
    data = to_bytes(Image.fromarray(noise()), exif=exif, pnginfo=text, dpi=(72, 72))
    written = Image.open(io.BytesIO(read(data).data))
    written.load()
    assert (written.info, dict(written.getexif())) == ({}, {})
    clear = to_bytes(with_palette([[0, 1]], [(1, 2, 3), (4, 5, 6)]), transparency=1, exif=exif)
    assert decode(read(clear, alpha="drop").data).tolist() == [[[1, 2, 3]], [[4, 5, 6]]]


# ------------------------------------------------------------------------- frames, alpha, sizes


@pytest.mark.parametrize("file_format", ["TIFF", "WEBP", "PNG"])
@pytest.mark.parametrize("frame", [0, 1, 2])
def test_the_declared_frame_is_stored_as_png(to_bytes, noise, file_format, frame):
    frames = [Image.fromarray(noise(seed=i)) for i in range(3)]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = to_bytes(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    stored = read(data, frame=frame)
    assert (stored.notes, stored.extension) == (("frame",), "png")
    assert np.array_equal(decode(stored.data), noise(seed=frame))


def test_the_declared_frame_of_a_gif_keeps_its_colours(to_bytes):
    frames = [Image.new("RGB", (4, 4), (0, 80 * i, 9)) for i in range(3)]
    data = to_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode(read(data, frame=2).data)[0, 0].tolist() == [0, 160, 9]


def test_files_of_one_frame_are_unchanged_if_a_frame_is_declared(to_bytes, noise):
    data = to_bytes(Image.fromarray(noise()))
    assert read(data, frame=5).data is data


def test_the_declared_frame_is_checked_too(to_bytes, noise):
    frames = [Image.new("L", (4, 4)), Image.new("L", (40, 40)), Image.new("F", (4, 4))]
    data = to_bytes(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    assert read(data, frame=0, max_pixels=100).full_size == (4, 4)
    with pytest.raises(DataError, match="declares 40 x 40 pixels, more than the limit of 100"):
        read(data, frame=1, max_pixels=100)
    with pytest.raises(DataError, match="has mode F"):
        read(data, frame=2)


@pytest.mark.parametrize("file_format", ["TIFF", "WEBP", "PNG", "GIF"])
def test_truncated_files_of_several_frames_raise_nothing_but_data_errors(
    to_bytes, noise, file_format
):
    frames = [Image.fromarray(noise((5, 5, 3), seed=i)) for i in range(3)]
    data = to_bytes(frames[0], file_format, save_all=True, append_images=frames[1:])
    for length in range(0, len(data) - 1, 5):
        with suppress(DataError):
            read(data[:length], frame=2)


def test_transparent_pixels_keep_their_colours_on_request(to_bytes, noise):
    clear = np.concatenate([noise(), noise((6, 8, 1), seed=1)], -1)
    data = to_bytes(Image.fromarray(clear))
    stored = read(data, alpha="drop")
    assert (stored.data, stored.notes, stored.channels) == (data, ("alpha",), "RGB")
    assert np.array_equal(decode(data, ImageFormat("RGB", alpha="drop")), noise())
    palette = to_bytes(with_palette([[0, 1]], [(1, 2, 3), (4, 5, 6)]), transparency=1)
    assert decode(palette, ImageFormat("RGB", alpha="drop")).tolist() == [[[1, 2, 3], [4, 5, 6]]]


def test_what_is_refused_when_packing_is_refused_when_decoding(to_bytes):
    clear = to_bytes(Image.new("RGBA", (2, 2)))
    with pytest.raises(DataError, match="has transparent pixels"):
        decode(clear)
    with pytest.raises(DataError, match="has more than 8 bits per pixel"):
        decode(to_bytes(Image.fromarray(grey16())))


def test_the_longer_side_is_scaled_down_by_area_averaging(to_bytes, noise):
    pixels = noise((20, 40, 3))
    stored = read(to_bytes(Image.fromarray(pixels)), resize=10)
    assert (stored.full_size, stored.image.size) == ((40, 20), (10, 5))
    assert (stored.notes, stored.extension) == (("resized",), "png")
    means = pixels.reshape(5, 4, 10, 4, 3).mean(axis=(1, 3))
    assert np.abs(decode(stored.data) - means).max() <= 1
    tall = read(to_bytes(Image.fromarray(pixels.swapaxes(0, 1))), resize=10)
    assert tall.image.size == (5, 10)


def test_16_bit_images_are_scaled_down_without_losing_their_range(to_bytes):
    pixels = np.array([[0, 65535], [65535, 65535]], dtype=np.uint16).repeat(4, 0).repeat(4, 1)
    stored = read(to_bytes(Image.fromarray(pixels)), allow_16_bit=True, resize=2)
    assert stored.notes == ("deep", "resized")
    image = Image.open(io.BytesIO(stored.data))
    assert image.mode == "I;16"
    assert np.asarray(image).tolist() == [[0, 65535], [65535, 65535]]
    uneven = read(to_bytes(Image.fromarray(pixels)), allow_16_bit=True, resize=1)
    assert np.asarray(Image.open(io.BytesIO(uneven.data))).tolist() == [[round(65535 * 0.75)]]


def test_images_are_never_enlarged(to_bytes, noise):
    data = to_bytes(Image.fromarray(noise()))
    for longest in (8, 9, 1000):
        assert read(data, resize=longest).data is data


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 6000))
def test_a_scaled_size_keeps_the_aspect_ratio_within_the_limit(width, height, longest):
    w, h = compute_scaled_size((width, height), longest)
    assert max(w, h) == min(longest, max(width, height))
    assert min(w, h) >= 1
    if longest >= max(width, height):
        assert (w, h) == (width, height)
    assert abs(w * height - h * width) <= max(width, height)


# --------------------------------------------------------------------------- what is refused

REPAIR = "repair or remove it"
NOT_AN_IMAGE = f"is not a readable image; {REPAIR}"
UNREAD = "is {}, a format that is not read; convert it to PNG, TIFF or 8-bit JPEG"


def twelve_bits(data: bytes) -> bytes:
    """A JPEG whose frame header declares 12 bits."""
    place = data.index(b"\xff\xc0") + 4
    return data[:place] + b"\x0c" + data[place + 1 :]


BANDS = (
    "has {} bands; images have 1 (grey) or 3 (RGB), and optionally an alpha channel: export the "
    "bands that you need to a file of their own"
)
COLOUR_16 = (
    "has 16 bits per colour channel, of which 8 would be lost silently; convert it to 8 bits per "
    "channel, or to 16-bit grey"
)
GREY_16 = (
    "has more than 8 bits per pixel (mode {}, values from {} to {}); choose which values become "
    "black and white, such as --image-range 0 65535"
)
ALPHA = (
    "has transparent pixels; flatten it onto a background, or add --alpha drop to keep them in "
    "their colour"
)
GEO = "has a georeference (GeoTIFF), which would be lost; export it as plain TIFF or PNG"
VOLUME = "is a medical volume (DICOM, NIfTI); export its slices as 8-bit or 16-bit PNG"
UNDECODED = "is a {}-bit TIFF that cannot be decoded; convert it to 8 bits or PNG"
FRAMES = "has 3 frames; add --frame 0 to use the first frame of each file"
MODE = "has mode {}, which is not supported; convert it to RGB"


class Files:
    """Creates the files of the table below."""

    def __init__(self, to_bytes, noise, raw_png, raw_tiff):
        self.pil, self.noise, self.png, self.tiff = to_bytes, noise, raw_png, raw_tiff

    def clear(self, file_format="PNG"):
        alpha = np.full((6, 8, 1), 255, dtype=np.uint8)
        alpha[0, 0] = 254
        return self.pil(Image.fromarray(np.concatenate([self.noise(), alpha], -1)), file_format)

    def frames(self, file_format):
        frames = [Image.fromarray(self.noise(seed=i)) for i in range(3)]
        return self.pil(frames[0], file_format, save_all=True, append_images=frames[1:])

    def bands(self, count, bits=8, **options):
        # High and low bytes differ, so that 16 bits do not only repeat 8.
        data = (b"\0\1" if count > 1 else b"\0\0") * (48 * count * bits // 16)
        return self.tiff(data, (8, 6), bits, count, **options)

    def truncated(self, file_format):
        data = self.pil(Image.fromarray(self.noise((40, 40, 3))), file_format)
        return data[: len(data) // 2]


@pytest.fixture
def files(to_bytes, noise, raw_png, raw_tiff):
    return Files(to_bytes, noise, raw_png, raw_tiff)


SCALE = (33550, "d", [1.0, 1.0, 0.0])
TIEPOINT = (33922, "d", [0.0] * 6)
KEYS = (34735, "H", [1, 1, 0, 0])
NO_ALPHA = (338, "H", [0])

BAD = {
    "an empty file": (lambda f: b"", f"is empty; {REPAIR}"),
    "a text": (lambda f: b"path,split\na.png,train\n", NOT_AN_IMAGE),
    "a web page": (lambda f: b"<!DOCTYPE html><html><body>404</body></html>", NOT_AN_IMAGE),
    "zeros": (lambda f: bytes(1000), NOT_AN_IMAGE),
    "a git-lfs pointer": (lambda f: b"version https://git-lfs.github.com/spec/v1\n", NOT_AN_IMAGE),
    "a format that is not listed": (
        lambda f: f.pil(Image.new("L", (2, 2)), "PPM"),
        UNREAD.format("PNM"),
    ),
    "JPEG 2000": (
        lambda f: f.pil(Image.new("L", (32, 32)), "JPEG2000"),
        UNREAD.format("JPEG 2000"),
    ),
    "AVIF": (lambda f: b"\0\0\0 ftypavif" + bytes(99), UNREAD.format("AVIF")),
    "12-bit JPEG": (
        lambda f: twelve_bits(f.pil(Image.new("L", (9, 9)), "JPEG")),
        UNREAD.format("a JPEG of 12 bits"),
    ),
    "DICOM": (lambda f: bytes(128) + b"DICM" + bytes(99), VOLUME),
    "NIfTI": (lambda f: bytes(344) + b"n+1\0" + bytes(99), VOLUME),
    "NIfTI with a second file": (lambda f: bytes(344) + b"ni1\0", VOLUME),
    "a PNG signature": (lambda f: b"\x89PNG\r\n\x1a\n", NOT_AN_IMAGE),
    "a TIFF signature": (lambda f: b"II*\0\x08\0\0\0", NOT_AN_IMAGE),
    "a PNG without palette": (
        lambda f: f.png([bytes(8)] * 6, 8, 8, 3),
        f"has lost its palette; {REPAIR}",
    ),
    "16-bit grey PNG": (
        lambda f: f.pil(Image.fromarray(grey16())),
        GREY_16.format("I;16", 0, 65535),
    ),
    "16-bit grey TIFF": (
        lambda f: f.pil(Image.fromarray(grey16()), "TIFF"),
        GREY_16.format("I;16", 0, 65535),
    ),
    "16-bit grey TIFF, big": (lambda f: f.bands(1, 16, order=">"), GREY_16.format("I;16B", 0, 0)),
    "32-bit TIFF": (
        lambda f: f.pil(Image.fromarray(np.ones((2, 2), np.int32)), "TIFF"),
        GREY_16.format("I", 1, 1),
    ),
    "float TIFF": (
        lambda f: f.pil(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"),
        MODE.format("F").replace("RGB", "8- or 16-bit grey"),
    ),
    "double TIFF": (lambda f: f.bands(1, 64, sample=3), UNDECODED.format(64)),
    "CIELAB": (lambda f: f.pil(Image.new("LAB", (3, 3)), "TIFF"), MODE.format("LAB")),
    "16-bit RGB PNG": (lambda f: f.png([b"\0\1" * 24] * 6, 8, 16, 2), COLOUR_16),
    "16-bit RGBA PNG": (lambda f: f.png([b"\0\1" * 32] * 6, 8, 16, 6), COLOUR_16),
    "16-bit grey and alpha PNG": (lambda f: f.png([bytes(32)] * 6, 8, 16, 4), COLOUR_16),
    "16-bit RGB TIFF": (lambda f: f.bands(3, 16, photometric=2), COLOUR_16),
    "16-bit RGB TIFF, big": (lambda f: f.bands(3, 16, photometric=2, order=">"), COLOUR_16),
    "16-bit RGB TIFF in planes": (lambda f: f.bands(3, 16, photometric=2, planar=2), COLOUR_16),
    "16-bit CMYK TIFF": (lambda f: f.bands(4, 16, photometric=5), COLOUR_16),
    "5 bands of 8 bits": (lambda f: f.bands(5, photometric=2), BANDS.format(5)),
    "5 bands of 16 bits": (lambda f: f.bands(5, 16, photometric=2), BANDS.format(5)),
    "13 bands of 16 bits": (lambda f: f.bands(13, 16), BANDS.format(13)),
    "2 bands of 8 bits": (lambda f: f.bands(2), BANDS.format(2)),
    "2 bands of 16 bits": (lambda f: f.bands(2, 16), BANDS.format(2)),
    "a fourth band that is not alpha": (
        lambda f: f.bands(4, photometric=2, tags=[NO_ALPHA]),
        BANDS.format(4),
    ),
    "RGBX": (
        lambda f: f.pil(Image.new("RGBX", (3, 3)), "TIFF"),
        BANDS.format(4),
    ),
    "GeoTIFF": (lambda f: f.bands(3, photometric=2, tags=[SCALE, TIEPOINT, KEYS]), GEO),
    "GeoTIFF of one tag": (lambda f: f.bands(1, tags=[KEYS]), GEO),
    "transparent pixels": (lambda f: f.clear(), ALPHA),
    "transparent pixels of a TIFF": (lambda f: f.clear("TIFF"), ALPHA),
    "transparent pixels of a WebP": (lambda f: f.clear("WEBP"), ALPHA),
    "a transparent palette": (
        lambda f: f.pil(with_palette([[0, 1]], [(1, 2, 3), (4, 5, 6)]), transparency=1),
        ALPHA,
    ),
    "GIF of 3 frames": (lambda f: f.frames("GIF"), FRAMES),
    "TIFF of 3 frames": (lambda f: f.frames("TIFF"), FRAMES),
    "WebP of 3 frames": (lambda f: f.frames("WEBP"), FRAMES),
    "PNG of 3 frames": (lambda f: f.frames("PNG"), FRAMES),
}


@pytest.mark.parametrize("pixels", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_files_that_would_lose_something_are_refused_in_one_line(files, name, pixels):
    make, message = BAD[name]
    with pytest.raises(DataError) as caught:
        read_image(make(files), STRICT, "images/a.png", pixels=pixels)
    assert str(caught.value) == f"images/a.png {message}"


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP"])
def test_a_truncated_file_is_refused_in_one_line(files, file_format):
    with pytest.raises(DataError) as caught:
        read(files.truncated(file_format))
    text = str(caught.value)
    assert text.startswith("a.png is ")
    assert text.endswith(REPAIR)
    assert "\n" not in text


@pytest.mark.parametrize(
    ("value", "listed"), [(-1, "from -1 to 0"), (65536, "from 0 to 65536"), (2**31 - 1, "to 2147")]
)
def test_integers_beyond_16_bits_are_refused(to_bytes, value, listed):
    data = to_bytes(Image.fromarray(np.array([[0, value]], dtype=np.int32)), "TIFF")
    with pytest.raises(DataError, match=rf"has values .*{listed}.*; convert it to 16-bit grey"):
        read(data, allow_16_bit=True)


def test_a_frame_beyond_the_last_is_refused(files):
    with pytest.raises(DataError) as caught:
        read(files.frames("TIFF"), frame=3)
    assert str(caught.value) == "a.png has 3 frames, but --frame is 3 (counted from 0); lower it"


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(to_bytes):
    data = to_bytes(Image.new("1", (500, 400)))
    assert open_image(data, "a.png", ImageRule(max_pixels=200_000)).size == (500, 400)
    with pytest.raises(DataError) as caught:
        open_image(data, "a.png", ImageRule(max_pixels=199_999))
    assert str(caught.value) == (
        "a.png declares 500 x 400 pixels, more than the limit of 199,999; split it into smaller "
        "images, or raise --max-pixels"
    )


def test_a_small_file_that_declares_a_huge_size_is_refused(raw_png):
    data = raw_png([b"\0"] * 3, 2**30, 8, 0)
    with pytest.raises(DataError, match=r"declares 1073741824 x 3 pixels, more than the limit"):
        open_image(data, "a.png", STRICT)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "GIF", "WEBP"])
def test_a_truncated_file_is_refused_or_decodes_completely(to_bytes, noise, file_format):
    data = to_bytes(Image.fromarray(noise((9, 9, 3))), file_format)
    expected = decode(data)
    for length in range(0, len(data), 3):
        try:
            pixels = decode(data[:length])
        except DataError:
            continue
        # Only a trailer without pixels may be missing.
        assert np.array_equal(pixels, expected), length


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP"])
@pytest.mark.parametrize("flip", [0x11, 0xFF])
def test_damaged_bytes_raise_nothing_but_data_errors(to_bytes, noise, file_format, flip):
    options = {} if file_format in ("BMP", "GIF") else {"exif": with_orientation(6)}
    data = to_bytes(Image.fromarray(noise((4, 4, 3))), file_format, **options)
    rule = ImageRule(max_pixels=10_000, allow_16_bit=True, alpha="drop")
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= flip
        for pixels in (True, False):
            with suppress(DataError):
                read_image(bytes(damaged), rule, "x", pixels=pixels)


@pytest.mark.parametrize(("place", "value"), [(8, 6), (72, 2), (72, 5), (72, 7), (72, 11)])
def test_missing_or_mistyped_tags_are_refused(to_bytes, place, value):
    data = bytearray(to_bytes(Image.new("L", (4, 4)), "TIFF"))
    data[place] = value
    with pytest.raises(DataError, match=REPAIR):
        decode(bytes(data))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frame": -1}, "--frame must be >= 0, got -1"),
        ({"resize": 0}, "--resize must be >= 1 pixel, got 0"),
        ({"max_pixels": 0}, "--max-pixels must be >= 1, got 0"),
    ],
)
def test_invalid_rules_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ImageRule(**fields)


def test_extensions_are_lower_case_and_either_supported_or_not():
    assert not IMAGE_EXTENSIONS & UNSUPPORTED_EXTENSIONS.keys()
    assert all(e == e.lower() and e[0] == "." for e in (*IMAGE_EXTENSIONS, *UNSUPPORTED_EXTENSIONS))


def test_16_bit_images_with_white_as_zero_are_refused(to_bytes):
    deep = Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4))
    data = to_bytes(deep, "TIFF", tiffinfo={262: 0})
    with pytest.raises(DataError, match=r"a\.tif is 16-bit with white as 0; save it with"):
        read_image(data, ImageRule(allow_16_bit=True), "a.tif")
    with pytest.raises(DataError, match="white as 0"):
        decode_image(data, ImageFormat("L", range=(0, 65535)), "a.tif")


def test_a_transparent_grey_value_of_16_bits_needs_a_rule(to_bytes):
    deep = Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4))
    data = to_bytes(deep, "PNG", transparency=5)
    with pytest.raises(DataError, match=r"a\.png has a transparent grey value; add --alpha drop"):
        read_image(data, ImageRule(allow_16_bit=True), "a.png")
    assert read_image(data, ImageRule(allow_16_bit=True, alpha="drop"), "a.png").notes == ("deep",)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_with_too_many_frames_is_refused_without_opening_it(order):
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    frames = [struct.pack(f"{order}HI", 0, 8 + 6 * (n + 1)) for n in range(60_000)]
    with pytest.raises(DataError) as caught:
        read(start + b"".join(frames), frame=0)
    assert str(caught.value) == (
        "a.png has more than 10,000 frames; export those that you need to files of their own"
    )
    cycle = start + struct.pack(f"{order}HI", 0, 8)
    with pytest.raises(DataError, match="is not a readable image"):
        read(cycle, frame=0)
