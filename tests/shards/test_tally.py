"""Holds the tally's contract: what is added up is what the decoded pixels say, in any order."""

import hashlib
import io
import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.images import ImageFormat, ImageRule, decode_image
from shards.index import SizeCount
from shards.masks import MaskFormat, decode_mask, default_palette, encode_mask
from shards.sample import DataError
from shards.tally import (
    SampleRule,
    Tally,
    find_duplicates,
    merge_tallies,
    percentile_range,
    read_sample,
    statistics,
)

CLASSES = ("background", "cell", "wall")
PALETTE = default_palette(CLASSES)
INDEX = MaskFormat(kind="index", num_classes=3, ignore_value=255)
SHAPE = (6, 8)


def rule_of(masks=INDEX, *, resize_mask=False, **images):
    return SampleRule(
        images=ImageRule(**images), masks=masks, palette=PALETTE, resize_mask=resize_mask
    )


RULE = rule_of(deep=True, alpha="drop")


@pytest.fixture
def picture(to_bytes, noise):
    """picture(mode, seed) -> the bytes of a PNG (CMYK: TIFF) of noise."""

    def make(mode, seed=0, shape=SHAPE):
        if mode == "I;16":
            wide = np.random.default_rng(seed).integers(0, 5000, shape, dtype=np.uint16)
            return to_bytes(Image.fromarray(wide))
        image = Image.fromarray(noise((*shape, 3), seed=seed))
        image = (
            image.convert("L").convert(mode) if mode in ("L", "LA", "1") else image.convert(mode)
        )
        return to_bytes(image, "TIFF" if mode == "CMYK" else "PNG")

    return make


@pytest.fixture
def drawn(noise):
    """drawn(seed) -> a canonical mask."""

    def make(seed=0, shape=SHAPE, values=(0, 1, 2, 255)):
        return encode_mask(
            np.array(values, np.uint8)[noise(shape, seed=seed) % len(values)], PALETTE
        )

    return make


MODES = ["L", "RGB", "I;16", "LA", "P", "1", "CMYK", "RGBA", "L", "RGB", "I;16"]


@pytest.fixture
def many(picture, drawn):
    """Pictures of every mode with their masks."""
    return [(picture(mode, seed), drawn(seed)) for seed, mode in enumerate(MODES)]


def read(pair, rule=RULE, *, pixels=True):
    return read_sample(*pair, rule, "images/a.png", "masks/a.png", pixels=pixels)


def tally_of(samples):
    tally = Tally()
    for sample in samples:
        tally.add(sample)
    return tally


# -------------------------------------------------------------------------------- one sample


def test_a_sample_is_its_picture_its_mask_and_a_digest(picture, drawn):
    image, mask = picture("RGB"), drawn()
    sample = read((image, mask))
    assert sample.image.data is image
    assert sample.mask.encode(PALETTE) is mask
    assert sample.digest == hashlib.sha256(image).hexdigest()


@pytest.mark.parametrize("rule", [RULE, rule_of(None)])
def test_unlabelled_samples_have_no_mask(picture, drawn, rule):
    mask = drawn() if rule.masks is None else None
    assert read((picture("RGB"), mask), rule).mask is None


def test_headers_alone_are_believed_unless_something_is_scaled(picture, drawn):
    pair = picture("RGB"), drawn()
    sample = read(pair, pixels=False)
    assert (sample.image.image, sample.mask.classes) == (None, None)
    for rule in (rule_of(resize=4), rule_of(resize_mask=True)):
        assert read(pair, rule, pixels=False).mask.classes is not None


def test_a_mask_of_another_size_is_refused_with_both_sizes(picture, drawn):
    with pytest.raises(DataError) as caught:
        read((picture("RGB"), drawn(shape=(12, 16))))
    assert str(caught.value) == (
        "masks/a.png is 16 x 12, its picture images/a.png 8 x 6; "
        "give both one size, or add --resize-mask"
    )


def test_a_mask_is_brought_to_its_picture_on_request_and_counted(picture, drawn, to_bytes):
    large = np.array([[0, 1], [2, 0]], dtype=np.uint8).repeat(6, 0).repeat(8, 1)
    pair = picture("RGB"), to_bytes(Image.fromarray(large))
    sample = read(pair, rule_of(resize_mask=True))
    index = decode_mask(sample.mask.encode(PALETTE), 3, "x")
    assert np.array_equal(index, large[::2, ::2])
    assert sample.mask.classes.pixels.sum() == index.size
    assert tally_of([sample, read((picture("RGB"), drawn()), rule_of(resize_mask=True))]).notes == {
        "mask": 1
    }


@pytest.mark.parametrize(
    ("shape", "scaled"),
    [
        *(((8, 6), False), ((6, 6), False), ((12, 17), True), ((12, 20), False)),
        *(((1, 1), True), ((2, 3), True), ((2, 5), False), ((30, 41), True), ((30, 50), False)),
    ],
)
def test_a_mask_is_stretched_alike_in_both_directions_but_for_a_rounded_pixel(
    shape, scaled, picture, drawn
):
    pair = picture("RGB"), drawn(shape=shape)
    if scaled:
        assert read(pair, rule_of(resize_mask=True)).mask.size == SHAPE[::-1]
        return
    for rule in (RULE, rule_of(resize_mask=True)):
        with pytest.raises(DataError) as caught:
            read(pair, rule)
        assert str(caught.value) == (
            f"masks/a.png is {shape[1]} x {shape[0]}, its picture images/a.png 8 x 6; "
            "neither is the other scaled: crop or pad one, or find the right mask"
        )


def test_a_picture_that_was_turned_away_from_its_mask_is_told(to_bytes, noise, drawn):
    exif = Image.Exif()
    exif[0x0112] = 6
    pair = to_bytes(Image.fromarray(noise()), exif=exif), drawn()
    with pytest.raises(DataError) as caught:
        read(pair)
    assert str(caught.value) == (
        "masks/a.png is 8 x 6, its picture images/a.png 6 x 8; "
        "the picture was turned as its EXIF orientation says: --exif ignore leaves it"
    )
    sample = read(pair, rule_of(exif="ignore"))
    assert sample.image.image.size == sample.mask.size == (8, 6)


def test_a_mask_is_scaled_with_its_picture(picture, drawn):
    sample = read((picture("RGB"), drawn()), rule_of(resize=4))
    assert sample.image.image.size == sample.mask.size == (4, 3)
    assert decode_mask(sample.mask.encode(PALETTE), 3, "x").shape == (3, 4)


@pytest.mark.parametrize("bad", [0, 1])
def test_picture_and_mask_are_named_each_by_its_own_file(picture, drawn, bad):
    pair = [picture("RGB"), drawn()]
    pair[bad] = b"no picture"
    where = ("images/a.png", "masks/a.png")[bad]
    with pytest.raises(DataError, match=f"^{where} is no picture that can be read"):
        read(pair)


# ------------------------------------------------------------------------------------- sums


def test_the_sums_of_masks_are_those_of_their_pixels(many):
    tally = tally_of(map(read, many))
    masks = [decode_mask(mask, 3, "x") for _, mask in many]
    together = np.concatenate([mask.ravel() for mask in masks])
    assert tally.pixels.tolist() == np.bincount(together, minlength=256).tolist()
    assert tally.images.tolist() == [sum((m == i).any() for m in masks) for i in range(256)]
    assert tally.values == set(together.tolist()) == {0, 1, 2, 255}
    assert tally.mask_modes == Counter({"P": len(many)})
    assert tally.class_pixels(3) == tuple((together == i).sum() for i in (0, 1, 2, 255))


def test_pixels_of_each_class_then_of_ignore(drawn, picture):
    mask = encode_mask(np.array([[0, 0, 0, 1], [2, 2, 255, 255]], np.uint8), PALETTE)
    tally = tally_of([read((picture("L", shape=(2, 4)), mask))])
    assert tally.class_pixels(3) == (3, 1, 2, 2)


def test_the_levels_of_pictures_are_those_of_their_pixels(many):
    tally = tally_of(map(read, many))
    kinds = {"L": [], "RGB": [], "I;16": []}
    for (image, _), mode in zip(many, MODES, strict=True):
        kind = {"LA": "L", "1": "L", "P": "RGB", "CMYK": "RGB", "RGBA": "RGB"}.get(mode, mode)
        if kind == "I;16":
            kinds[kind].append(np.asarray(read((image, None)).image.image).ravel())
        else:
            decoded = decode_image(image, ImageFormat(kind, "drop"), "x")
            kinds[kind].append(decoded.reshape(-1, decoded.shape[-1]))
    grey = np.concatenate(kinds["L"])[:, 0]
    assert tally.levels["L"].tolist() == np.bincount(grey, minlength=256).tolist()
    bands = np.concatenate(kinds["RGB"]).T
    expected = np.concatenate([np.bincount(band, minlength=256) for band in bands])
    assert tally.levels["RGB"].tolist() == expected.tolist()
    deep = np.concatenate(kinds["I;16"])
    assert tally.levels["I;16"].tolist() == np.bincount(deep, minlength=65536).tolist()
    assert tally.channels == {"L", "RGB"}


@pytest.mark.parametrize("order", ["<", ">"])
def test_levels_of_16_bits_do_not_depend_on_the_byte_order(raw_tiff, order):
    pixels = np.array([[0, 1, 258, 65535]])
    data = raw_tiff(pixels.astype(f"{order}u2").tobytes(), (4, 1), 16, 1, order=order)
    tally = tally_of([read((data, None))])
    assert np.flatnonzero(tally.levels["I;16"]).tolist() == [0, 1, 258, 65535]


def test_sizes_notes_and_digests_are_kept(many, picture):
    samples = [*map(read, many), read((picture("RGB", 99, (3, 5)), None))]
    tally = tally_of(samples)
    tally.leave_out()
    assert tally.digests == [*(s.digest for s in samples), ""]
    assert tally.notes["deep"] == 2
    assert tally.notes["colour"] == 1
    sizes = tally.size_counts()
    assert SizeCount(5, 3, "RGB", 1) in sizes
    assert sum(size.images for size in sizes) == len(samples)


def test_headers_count_sizes_and_no_pixels(picture, drawn):
    tally = tally_of([read((picture("RGB"), drawn()), pixels=False)])
    assert (tally.levels, tally.pixels.sum()) == ({}, 0)
    assert tally.size_counts() == (SizeCount(8, 6, "RGB", 1),)


def plain(tally):
    return json.loads(json.dumps(tally.to_plain()))


def test_a_tally_comes_back_from_json_as_it_was(many):
    tally = tally_of(map(read, many))
    tally.leave_out()
    again = Tally.from_plain(plain(tally))
    assert again.to_plain() == tally.to_plain()
    assert again.size_counts() == tally.size_counts()
    again.merge(tally)
    assert again.pixels.tolist() == (2 * tally.pixels).tolist()
    assert plain(Tally.from_plain(plain(Tally()))) == plain(Tally())


SAMPLES = st.lists(st.integers(0, len(MODES) - 1), max_size=12)


@given(SAMPLES, st.data())
def test_sums_do_not_depend_on_how_and_in_which_order_they_are_merged(chosen, data):
    ready = prepared()
    samples = [ready[i] for i in chosen]
    whole = plain(tally_of(samples))
    places = data.draw(st.permutations(range(len(samples))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(samples)), max_size=3)))
    bounds = [0, *cuts, len(samples)]
    parts = [tally_of(samples[p] for p in places[a:b]) for a, b in pairwise(bounds)]
    merged = plain(merge_tallies(parts))
    assert sorted(merged.pop("digests")) == sorted(whole.pop("digests"))
    assert merged == whole
    # Merging changes nothing about what was merged.
    assert plain(merge_tallies(parts))["pixels"] == whole["pixels"]


READY = []


def prepared():
    """One sample of every mode, made once."""
    if not READY:
        rng = np.random.default_rng(0)
        for mode in MODES:
            high, dtype = (5000, np.uint16) if mode == "I;16" else (256, np.uint8)
            shape = SHAPE if mode in ("I;16", "L") else (*SHAPE, 3)
            image = Image.fromarray(rng.integers(0, high, shape, dtype=dtype))
            mask = rng.integers(0, 3, SHAPE, dtype=np.uint8)
            encoded = [bytes_of(image), encode_mask(mask, PALETTE)]
            READY.append(read(encoded))
    return READY


def bytes_of(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


# -------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("modes", "form"),
    [
        (["L", "L"], ImageFormat("L")),
        (["RGB", "RGB"], ImageFormat("RGB")),
        (["L", "RGB"], ImageFormat("RGB")),
        (["I;16", "I;16"], ImageFormat("L", range=(100, 4000))),
        (["I;16", "L"], ImageFormat("L", range=(0, 65535))),
        (["I;16", "L", "RGB", "P", "CMYK", "1"], ImageFormat("RGB", range=(200, 4999))),
    ],
)
def test_statistics_are_those_of_the_decoded_pixels(picture, modes, form):
    images = [picture(mode, seed) for seed, mode in enumerate(modes)]
    tally = tally_of(read((image, None)) for image in images)
    means, deviations = statistics(tally.levels, form)
    pixels = np.concatenate(
        [decode_image(i, form, "x").reshape(-1, len(form.channels)) for i in images]
    )
    assert len(means) == len(deviations) == len(form.channels)
    assert means == pytest.approx((pixels / 255).mean(axis=0), abs=1e-6)
    assert deviations == pytest.approx((pixels / 255).std(axis=0), abs=1e-6)


def test_statistics_of_nothing_and_of_one_level_are_numbers():
    assert statistics({}, ImageFormat("RGB")) == ((0, 0, 0), (0, 0, 0))
    levels = np.zeros(256, dtype=np.int64)
    levels[51] = 10**12
    assert statistics({"L": levels}, ImageFormat("L")) == ((0.2,), (0,))


def test_statistics_leave_the_levels_as_they_are():
    levels = {"L": np.ones(256, dtype=np.int64), "I;16": np.ones(65536, dtype=np.int64)}
    statistics(levels, ImageFormat("L", range=(0, 65535)))
    assert levels["L"].tolist() == [1] * 256


@given(
    st.lists(st.integers(0, 65535), min_size=1, max_size=300),
    st.floats(0, 100),
    st.floats(0, 100),
)
def test_percentiles_are_values_that_occur_with_their_share_at_or_below(values, one, other):
    low, high = sorted((one, other))
    levels = np.bincount(values, minlength=65536)
    bounds = percentile_range(levels, (low, high))
    assert 0 <= bounds[0] < bounds[1] <= 65535
    # Where all pixels are white, the range is widened below.
    if bounds[0] in values:
        for share, bound in zip((low, high), bounds, strict=True):
            assert sum(value <= bound for value in values) >= len(values) * share / 100
    if bounds[1] > bounds[0] + 1:
        assert set(bounds) <= set(values)
        assert all(
            sum(value < bound for value in values) <= len(values) * share / 100
            for share, bound in zip((low, high), bounds, strict=True)
        )


@pytest.mark.parametrize(
    ("values", "percentiles", "bounds"),
    [
        (range(1000, 1100), (0, 100), (1000, 1099)),
        (range(1000, 1100), (1, 99), (1000, 1098)),
        (range(1000, 1100), (50, 75), (1049, 1074)),
        ([7] * 9, (0, 100), (7, 8)),
        ([0] * 9, (0, 100), (0, 1)),
        ([65535] * 9, (0, 100), (65534, 65535)),
        ([0, 65535], (0, 100), (0, 65535)),
        ([0] * 999 + [60000], (0.5, 99.5), (0, 1)),
    ],
)
def test_percentiles_are_pinned(values, percentiles, bounds):
    assert percentile_range(np.bincount(values, minlength=65536), percentiles) == bounds


# -------------------------------------------------------------------------------- duplicates


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


def test_pictures_that_are_equal_byte_for_byte_are_grouped():
    digests = [digest(text) for text in "abacbda"]
    groups = find_duplicates(digests, "1234567")
    assert groups == {digest("a"): ["1", "3", "7"], digest("b"): ["2", "5"]}


def test_samples_that_were_left_out_are_no_duplicates():
    assert find_duplicates(["", digest("a"), "", ""], "1234") == {}


def test_a_sample_without_digest_does_not_shift_the_names():
    digests = [digest("a"), "", digest("a")]
    assert find_duplicates(iter(digests), iter("123")) == {digest("a"): ["1", "3"]}
