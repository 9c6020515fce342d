"""Masks are read as stored values, whatever a viewer would show."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from shards.images.files import ImageRule, open_image
from shards.masks.canonical import read_mask
from shards.masks.formats import MaskFormat
from shards.masks.palettes import default_palette
from shards.masks.png import decode_mask
from shards.masks.stored import describe_loss, load_mask
from shards.masks.survey import survey_mask
from shards.sample import DataError
from shards.statistics import SampleRule, read_sample

BINARY = np.array([[0, 1, 1, 0, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0, 0, 0]], dtype=np.uint8)
LEVELS = np.array([[0, 1, 2, 3, 0, 0, 1, 2], [3, 3, 0, 0, 1, 0, 0, 2]], dtype=np.uint8)
NAMES = ("a", "b", "c", "d")
UPSIDE_DOWN = 3


def pack_levels(values, bits):
    """Pack rows of values into bytes, high bits first."""
    spread = np.unpackbits(values[..., None], axis=2)[..., -bits:]
    return np.packbits(spread.reshape(len(values), -1), axis=1).tobytes()


def read(data, classes=("a", "b"), **rule):
    mask_format = MaskFormat(num_classes=len(classes), **rule)
    return read_mask(data, mask_format, default_palette(classes), "m/a.tif")


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_tiffs_are_read_as_stored_in_every_depth_order_and_photometric(
    raw_tiff, bits, order, photometric
):
    if (bits, order, photometric) == (16, ">", 0):
        pytest.skip("Pillow does not decode it, so that it is refused")
    values = LEVELS if bits > 1 else BINARY
    data = pack_levels(values, bits) if bits < 16 else values.astype(f"{order}u2").tobytes()
    tiff = raw_tiff(data, (8, 2), bits, 1, order=order, photometric=photometric)
    mask = read(tiff, NAMES, kind="index")
    assert mask.class_map.index.tolist() == values.tolist()
    assert mask.notes == (("white_is_zero",) if photometric == 0 else ())
    survey = survey_mask(tiff, "m/a.tif", ImageRule())
    assert {value for _, value in survey.values} == set(np.unique(values).tolist())


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "group4", "packbits"])
def test_compressed_tiffs_of_one_bit_are_read_as_stored(to_bytes, compression, photometric):
    stored = BINARY > 0
    # Pillow inverts what it saves with white as 0.
    image = Image.fromarray(stored if photometric else ~stored)
    data = to_bytes(image, "TIFF", compression=compression, tiffinfo={262: photometric})
    assert Image.open(io.BytesIO(data)).tag_v2[262] == photometric
    mask = read(data, kind="binary")
    assert mask.class_map.index.tolist() == BINARY.tolist()


def test_tiffs_with_white_as_zero_are_read_as_stored_by_colour_too(raw_tiff):
    data = (BINARY * 255).tobytes()
    table = {"kind": "rgb", "colours": ((0, 0, 0), (255, 255, 255))}
    mask = read(raw_tiff(data, (8, 2), 8, 1, photometric=0), **table)
    assert mask.class_map.index.tolist() == BINARY.tolist()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_pngs_of_few_bits_are_read_as_stored(raw_png, bits):
    values = LEVELS if bits > 1 else BINARY
    rows = [pack_levels(row[None], bits) for row in values]
    data = raw_png(rows, 8, bits, 0)
    assert read(data, NAMES, kind="index").class_map.index.tolist() == values.tolist()
    if bits > 1:
        assert decode_mask(data, 4, "x").tolist() == values.tolist()


def test_gamma_profile_and_transparency_leave_the_values(raw_png):
    chunks = [(b"gAMA", struct.pack(">I", 100000)), (b"tRNS", struct.pack(">H", 1))]
    data = raw_png([row.tobytes() for row in LEVELS], 8, 8, 0, chunks)
    assert read(data, NAMES, kind="index").class_map.index.tolist() == LEVELS.tolist()


def test_a_palette_with_transparency_is_read_by_index(to_bytes):
    image = Image.fromarray(LEVELS).copy()
    image.putpalette([9, 9, 9, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    data = to_bytes(image, transparency=bytes([0, 255, 7, 255]))
    assert read(data, NAMES, kind="index").class_map.index.tolist() == LEVELS.tolist()


def test_colours_that_only_transparency_distinguishes_are_refused(to_bytes):
    image = Image.fromarray(BINARY).copy()
    image.putpalette([255, 0, 0, 255, 0, 0])
    data = to_bytes(image, transparency=bytes([0, 255]))
    with pytest.raises(DataError, match="has transparent pixels, which may stand for a class"):
        read(data, kind="rgb", colours=((255, 0, 0), (0, 0, 0)))


def test_a_threshold_beyond_the_depth_of_a_mask_is_refused(to_bytes, raw_png):
    one_bit = to_bytes(Image.fromarray(BINARY > 0))
    with pytest.raises(DataError, match=r"has values up to 1 \(mode 1\), below --mask-threshold"):
        read(one_bit, kind="binary", threshold=128)
    rows = [pack_levels(row[None], 2) for row in LEVELS]
    with pytest.raises(DataError, match=r"has values up to 3 \(mode L\), below"):
        read(raw_png(rows, 8, 2, 0), kind="binary", threshold=128)


def test_tiffs_with_jpeg_compression_are_not_exact(to_bytes):
    data = to_bytes(Image.fromarray(BINARY * 255), "TIFF", compression="jpeg")
    with pytest.raises(DataError, match="is a TIFF with JPEG compression, whose values are not"):
        read(data, kind="binary")


@pytest.mark.parametrize("lossless", [False, True])
def test_only_a_lossless_webp_is_exact(to_bytes, lossless):
    data = to_bytes(Image.fromarray(BINARY * 255), "WEBP", lossless=lossless)
    opened = Image.open(io.BytesIO(data))
    assert describe_loss(opened, data) == (None if lossless else "a lossy WebP")
    if lossless:
        assert read(data, kind="binary").class_map.index.tolist() == BINARY.tolist()


def test_ycbcr_tiffs_are_refused(to_bytes):
    image = Image.fromarray(np.stack([BINARY * 255] * 3, -1)).convert("YCbCr")
    with pytest.raises(DataError, match="is a TIFF of YCbCr samples, which are not the values"):
        read(to_bytes(image, "TIFF"), kind="binary")


def test_colours_multiplied_by_alpha_are_refused(raw_tiff):
    pixels = np.full((2, 8, 4), 128, dtype=np.uint8)
    tags = [(338, "H", [1])]
    with pytest.raises(DataError, match="has colours multiplied by alpha"):
        read(raw_tiff(pixels.tobytes(), (8, 2), 8, 4, photometric=2, tags=tags), kind="binary")


def make_bmp(rows, width, bits, palette):
    """A BMP with a palette of grey levels that Pillow cannot write."""
    pixels = b"".join(row.ljust(-(-len(row) // 4) * 4, b"\0") for row in reversed(rows))
    table = b"".join(bytes((level, level, level, 0)) for level in palette)
    start = 54 + len(table)
    header = struct.pack("<IiiHHIIiiII", 40, width, len(rows), 1, bits, 0, 0, 0, 0, len(palette), 0)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + table + pixels


def test_bmps_are_read_by_index_also_with_white_first():
    rows = [pack_levels(row[None], 1) for row in BINARY]
    for palette, invert in (((0, 255), False), ((255, 0), True)):
        mask = read(make_bmp(rows, 8, 1, palette), kind="binary", invert=invert)
        assert mask.class_map.index.tolist() == (BINARY ^ invert).tolist()


@pytest.mark.parametrize(("bits", "palette"), [(8, (0, 255)), (4, range(16))])
def test_bmps_of_which_pillow_mistakes_the_depth_are_refused(bits, palette):
    rows = [pack_levels(row[None], bits) for row in BINARY]
    with pytest.raises(DataError, match="is a BMP whose palette has fewer colours"):
        read(make_bmp(rows, 8, bits, palette), kind="binary")


def test_later_frames_of_a_gif_have_no_indices(to_bytes):
    frames = [Image.fromarray(values) for values in (BINARY, 1 - BINARY)]
    for frame in frames:
        frame.putpalette([0, 0, 0, 255, 0, 0])
    data = to_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    mask_format = MaskFormat(kind="binary", num_classes=2)
    palette = default_palette(("a", "b"))
    first = read_mask(data, mask_format, palette, "a.gif", rule=ImageRule(frame=0))
    assert first.class_map.index.tolist() == BINARY.tolist()
    with pytest.raises(DataError, match="is a GIF whose frame 1 has no palette indices"):
        read_mask(data, mask_format, palette, "a.gif", rule=ImageRule(frame=1))


def with_orientation(to_bytes, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return to_bytes(Image.fromarray(pixels), exif=exif)


def test_a_mask_is_not_rotated_without_its_image(to_bytes):
    grey = np.arange(16, dtype=np.uint8).reshape(2, 8)
    turned_mask = with_orientation(to_bytes, BINARY, UPSIDE_DOWN)
    masks = MaskFormat(kind="binary", num_classes=2)
    palette = default_palette(("a", "b"))

    def read_pair(image, mask, exif="upright"):
        rule = SampleRule(images=ImageRule(exif=exif), masks=masks, palette=palette)
        return read_sample(image, mask, rule, "i/a.png", "m/a.png").mask.class_map.index.tolist()

    with pytest.raises(DataError, match=r"m/a\.png has EXIF orientation 3, but its image i/a\.png"):
        read_pair(to_bytes(Image.fromarray(grey)), turned_mask)
    assert read_pair(to_bytes(Image.fromarray(grey)), turned_mask, "ignore") == BINARY.tolist()
    turned_image = with_orientation(to_bytes, grey, UPSIDE_DOWN)
    assert read_pair(turned_image, turned_mask) == BINARY[::-1, ::-1].tolist()


def test_16_bit_masks_of_either_byte_order_keep_their_values(raw_tiff):
    values = np.array([[0, 300], [65535, 7]], dtype=np.uint16)
    for order in "<>":
        data = raw_tiff(values.astype(f"{order}u2").tobytes(), (2, 2), 16, 1, order=order)
        stored = load_mask(open_image(data, "x", ImageRule()), "x")
        assert stored.read_values("x").tolist() == values.tolist()
        assert stored.max_value == 65535
