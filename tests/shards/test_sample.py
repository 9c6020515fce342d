"""Holds the contract of a sample: keys, which bytes decode to what, and what is refused."""

import io
import os
import re
import string
from pathlib import PurePosixPath

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from webdataset.tariterators import base_plus_ext

from shards.sample import (
    DataError,
    channels_of,
    decode_image,
    decode_key,
    decode_mask,
    default_palette,
    encode_key,
    encode_mask,
    encode_png,
    is_safe_path,
    load,
    open_image,
    palette_bytes,
)

SAFE = set(string.ascii_letters + string.digits + "_-/%")

ODD = "azAZ09_-.~%+ !#&'()[]{}*?\\\n\t\x7f\xa0é\u0301ßд中\u202e🙂"

# What a file system can hand out: any bytes but / and NUL, undecodable ones as surrogates.
names = st.one_of(
    st.text(st.sampled_from(ODD), min_size=1, max_size=40),
    st.binary(min_size=1).map(lambda b: os.fsdecode(b.replace(b"/", b"_").replace(b"\0", b"_"))),
    st.text(st.sampled_from("ab.%~ 2E"), min_size=1, max_size=40),
).filter(lambda name: name not in (".", ".."))
stems = st.lists(names, min_size=1, max_size=3).map("/".join)


def key_of(stem):
    return encode_key(PurePosixPath(stem + ".png"))


# ---------------------------------------------------------------------------------------- keys


@given(stems)
@example("img_0.5um")
@example("a%2Eb")
@example("ä" * 40)
@example("x" * 91)
def test_a_key_has_only_safe_characters_and_fits_a_tar_name(stem):
    key = key_of(stem)
    assert len(key.encode("ascii")) <= 90
    assert set(key) <= SAFE
    assert len(f"{key}.mask.png") <= 100


@given(stems)
@example("a.b")
@example("a%2Eb")
@example("%sha256-0")
@example("~.%/. ")
def test_a_key_is_reversible_unless_it_is_a_hash(stem):
    key = key_of(stem)
    if key.startswith("%sha256-"):
        assert decode_key(key) is None
    else:
        assert decode_key(key) == stem


@given(stems, stems)
@example("a.b", "a%2Eb")
@example("img_0.5um", "img_0.7um")
@example("x" * 91, "x" * 92)
def test_two_paths_never_share_a_key(one, other):
    assert (key_of(one) == key_of(other)) == (one == other)


@given(stems, st.sampled_from(["mask.png", "json", "jpg"]))
def test_a_key_survives_webdatasets_split_at_the_first_dot(stem, extension):
    key = key_of(stem)
    assert base_plus_ext(f"{key}.{extension}") == (key, extension)


def test_keys_are_pinned():
    assert encode_key(PurePosixPath("a/b c.d.JPG")) == "a/b%20c%2Ed"
    assert encode_key(PurePosixPath("x~1.png")) == "x%7E1"
    assert encode_key(PurePosixPath("é.png")) == "%C3%A9"
    assert encode_key(PurePosixPath("x" * 90 + ".png")) == "x" * 90
    assert encode_key(PurePosixPath("x" * 91 + ".png")) == (
        "%sha256-87b88e4e14bba7c4429183a1b7e80dbd146a5ca0278c3b7da0403e941f60373b"
    )


# ------------------------------------------------------------------------------------- decoding


def opened(data):
    """The decoded picture, and whether it was turned."""
    return load(open_image(data, "x"), "x")


def grey(shape=(5, 7)):
    return np.arange(35, dtype=np.uint8).reshape(shape) * 7


def with_palette(indices, colours):
    image = Image.fromarray(indices).copy()
    image.putpalette([part for colour in colours for part in colour])
    return image


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP"])
def test_rgb_decodes_to_its_pixels(to_bytes, noise, form):
    pixels = noise()
    data = to_bytes(Image.fromarray(pixels), form)
    assert channels_of(opened(data)[0], "x") == "RGB"
    assert np.array_equal(decode_image(data, "RGB", "x"), pixels)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "GIF"])
def test_grey_decodes_to_its_pixels_in_one_channel_or_three(to_bytes, form):
    data = to_bytes(Image.fromarray(grey()), form)
    assert channels_of(opened(data)[0], "x") == "L"
    assert np.array_equal(decode_image(data, "L", "x"), grey()[..., None])
    assert np.array_equal(decode_image(data, "RGB", "x"), np.stack([grey()] * 3, -1))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP"])
def test_bilevel_decodes_to_0_and_255(to_bytes, form):
    bits = grey() % 2 > 0
    data = to_bytes(Image.fromarray(bits), form)
    assert channels_of(opened(data)[0], "x") == "L"
    assert np.array_equal(decode_image(data, "L", "x")[..., 0], bits * np.uint8(255))


def test_a_palette_decodes_to_its_colours_and_is_grey_if_they_are(to_bytes):
    indices = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8)
    shades = [(5, 5, 5), (90, 90, 90), (200, 200, 200)]
    data = to_bytes(with_palette(indices, shades))
    assert channels_of(opened(data)[0], "x") == "L"
    assert decode_image(data, "L", "x")[..., 0].tolist() == [[5, 90, 200], [200, 90, 5]]
    colours = [(5, 5, 5), (90, 0, 90), (200, 200, 200)]
    data = to_bytes(with_palette(indices, colours))
    assert channels_of(opened(data)[0], "x") == "RGB"
    assert np.array_equal(decode_image(data, "RGB", "x"), np.array(colours, np.uint8)[indices])


def test_an_opaque_alpha_channel_is_dropped(to_bytes, noise):
    opaque = np.full((6, 8, 1), 255, dtype=np.uint8)
    rgba = to_bytes(Image.fromarray(np.concatenate([noise(), opaque], -1)))
    assert np.array_equal(decode_image(rgba, "RGB", "x"), noise())
    la = to_bytes(Image.fromarray(np.concatenate([noise()[..., :1], opaque], -1), "LA"))
    assert channels_of(opened(la)[0], "x") == "L"
    assert np.array_equal(decode_image(la, "L", "x"), noise()[..., :1])


def test_a_transparent_colour_that_no_pixel_has_is_no_transparency(to_bytes):
    image = with_palette(np.array([[0, 1]], np.uint8), [(1, 2, 3), (4, 5, 6), (7, 8, 9)])
    assert decode_image(to_bytes(image, transparency=2), "RGB", "x").tolist() == [
        [[1, 2, 3], [4, 5, 6]]
    ]


def refused(data, message):
    with pytest.raises(DataError, match=message) as caught:
        decode_image(data, "RGB", "pics/a.png")
    text = str(caught.value)
    assert text.startswith("pics/a.png ")
    assert "\n" not in text


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_refused(to_bytes, form):
    wide = Image.fromarray(np.array([[0, 1000]], dtype=np.uint16))
    refused(to_bytes(wide, form), r"more than 8 bits a pixel \(mode I;16\).*; scale it to 8 bits")


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_integers_and_floats_of_32_bits_are_refused(to_bytes, dtype):
    refused(to_bytes(Image.fromarray(np.ones((2, 2), dtype)), "TIFF"), "more than 8 bits a pixel")


def test_transparent_pixels_are_refused(to_bytes, noise):
    alpha = np.full((6, 8, 1), 255, dtype=np.uint8)
    alpha[0, 0] = 254
    message = "has transparent pixels; flatten it onto a background"
    refused(to_bytes(Image.fromarray(np.concatenate([noise(), alpha], -1))), message)
    palette = with_palette(np.array([[0, 1]], np.uint8), [(1, 2, 3), (4, 5, 6)])
    refused(to_bytes(palette, transparency=1), message)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_other_colour_spaces_are_refused(to_bytes, mode):
    image = Image.new("RGB", (3, 3)).convert(mode) if mode != "LAB" else Image.new("LAB", (3, 3))
    form = "TIFF"
    refused(to_bytes(image, form), f"has mode {mode}, which is not supported; convert it to RGB")


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP", "PNG"])
def test_several_frames_are_refused(to_bytes, noise, form):
    frames = [Image.fromarray(noise(seed=i)) for i in range(3)]
    data = to_bytes(frames[0], form, save_all=True, append_images=frames[1:])
    refused(data, "holds 3 frames; write the one that is meant to a file of its own")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP"])
def test_a_cut_file_is_refused(to_bytes, noise, form):
    data = to_bytes(Image.fromarray(noise((40, 40, 3))), form)
    refused(data[: len(data) // 2], "repair or remove it")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF", "WEBP"])
def test_no_cut_ends_in_anything_but_a_refusal_or_the_whole_picture(to_bytes, noise, form):
    image = Image.fromarray(noise((9, 9, 3)))
    data = to_bytes(image, form)
    expected = decode_image(data, "RGB", "x")
    for length in range(0, len(data), 3):
        try:
            pixels = decode_image(data[:length], "RGB", "x")
        except DataError:
            continue
        # What may be cut is only a trailer without pixels.
        assert np.array_equal(pixels, expected), length


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("place", "value"), [(8, 6), (72, 2), (72, 5), (72, 7), (72, 11)])
def test_whatever_damaged_bytes_provoke_in_pillow_is_a_refusal(to_bytes, place, value):
    # Tags that are gone or of another type make it raise TypeError.
    data = bytearray(to_bytes(Image.new("L", (4, 4)), "TIFF"))
    data[place] = value
    refused(bytes(data), "repair or remove it")


def test_an_empty_file_and_a_text_file_are_refused():
    refused(b"", "is empty; repair or remove it")
    refused(b"path,split\na.png,train\n", "is no picture that can be read; repair or remove it")


def test_formats_that_are_not_listed_are_never_opened(to_bytes):
    assert Image.open(io.BytesIO(to_bytes(Image.new("RGB", (2, 2)), "PPM"))).format == "PPM"
    refused(to_bytes(Image.new("RGB", (2, 2)), "PPM"), "is no picture that can be read")


def test_a_bomb_is_refused_before_it_is_decoded(to_bytes):
    data = to_bytes(Image.new("1", (500, 400)))
    assert open_image(data, "a.png", max_pixels=200_000).size == (500, 400)
    with pytest.raises(DataError, match=r"a\.png claims 500 x 400 pixels, more than 199,999; cut"):
        open_image(data, "a.png", max_pixels=199_999)


# ---------------------------------------------------------------------------------- orientation

UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_pictures_decode_upright_whatever_their_exif_orientation(
    to_bytes, noise, orientation, form
):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    data = to_bytes(Image.fromarray(noise()), form, exif=exif, **options)
    # Pillow turns a TIFF while it decodes it.
    assert opened(data)[1] == (orientation != 1)
    assert np.array_equal(decode_image(data, "RGB", "x"), UPRIGHT[orientation](noise()))


def test_a_turned_picture_written_as_png_is_not_turned_again(to_bytes, noise):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright, was_turned = opened(to_bytes(Image.fromarray(noise()), exif=exif))
    data = encode_png(upright)
    assert (was_turned, opened(data)[1]) == (True, False)
    assert np.array_equal(decode_image(data, "RGB", "x"), np.rot90(noise(), -1))


# ---------------------------------------------------------------------------------------- masks


def test_a_mask_survives_encoding_with_every_value_and_255(noise):
    mask = np.arange(256, dtype=np.uint8).reshape(16, 16)
    data = encode_mask(mask, default_palette(tuple(map(str, range(255)))))
    assert Image.open(io.BytesIO(data)).mode == "P"
    assert np.array_equal(decode_mask(data, "x"), mask)


@pytest.mark.parametrize("num_classes", [2, 3, 16, 40])
def test_masks_are_read_back_as_indices_never_as_luminance(num_classes):
    mask = (np.arange(35, dtype=np.uint8) % num_classes).reshape(5, 7)
    data = encode_mask(mask, default_palette(tuple(map(str, range(num_classes)))))
    assert np.array_equal(decode_mask(data, "x"), mask)
    assert not np.array_equal(np.asarray(Image.open(io.BytesIO(data)).convert("L")), mask)


def test_encoding_a_mask_leaves_the_array_alone_and_gives_the_same_bytes():
    mask = np.array([[0, 1], [255, 1]], dtype=np.uint8)
    before = mask.copy()
    assert encode_mask(mask, ((0, 0, 0),)) == encode_mask(mask, ((0, 0, 0),))
    assert np.array_equal(mask, before)


def test_a_mask_of_another_mode_is_not_canonical(to_bytes):
    with pytest.raises(DataError, match="x is no canonical mask: mode RGB, not P; pack it again"):
        decode_mask(to_bytes(Image.new("RGB", (2, 2))), "x")


def test_ignored_pixels_are_white_in_the_palette():
    table = np.frombuffer(palette_bytes(((1, 2, 3), (4, 5, 6))), np.uint8).reshape(256, 3)
    assert table[[0, 1, 2, 255]].tolist() == [[1, 2, 3], [4, 5, 6], [128] * 3, [255] * 3]


@pytest.mark.parametrize("num_classes", [2, 3, 10, 64, 255])
@pytest.mark.parametrize("first", ["background", "sky"])
def test_default_colours_are_distinct_from_each_other_and_from_ignore(num_classes, first):
    palette = default_palette((first, *map(str, range(num_classes - 1))))
    assert len(palette) == len(set(palette)) == num_classes
    assert (255, 255, 255) not in palette
    assert all(0 <= part <= 255 for colour in palette for part in colour)


def test_background_and_the_first_of_two_classes_are_black():
    assert default_palette(("Background", "a", "b"))[0] == (0, 0, 0)
    assert default_palette(("sky", "road"))[0] == (0, 0, 0)
    assert default_palette(("sky", "road", "car"))[0] != (0, 0, 0)


# ---------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("path", ["a.png", "a/b c/d.png", "a/..b/c", "a/b..", "./a"])
def test_paths_inside_the_folder_are_safe(path):
    assert is_safe_path(path)


@pytest.mark.parametrize(
    "path", ["", ".", "/", "/etc/passwd", "..", "../a", "a/../../b", "a/..", "a\0b", "a\\..\\b"]
)
def test_paths_that_could_leave_the_folder_are_not_safe(path):
    assert not is_safe_path(path)


@given(st.text(st.sampled_from("ab. /\\\0~%"), max_size=12))
def test_a_safe_path_joined_to_a_folder_stays_inside(path):
    if is_safe_path(path):
        joined = os.path.normpath(os.path.join("/data/out", path))
        assert re.match(r"/data/out/.", joined)
