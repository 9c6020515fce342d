"""Checked samples, and statistics that match the decoded pixels in any order of merging."""

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

from shards.images.files import ImageFormat, ImageRule
from shards.images.pixels import decode_image
from shards.manifest import SizeCount
from shards.masks.formats import MaskFormat
from shards.masks.palettes import default_palette
from shards.masks.png import decode_mask, encode_mask
from shards.sample import DataError
from shards.statistics import (
    SampleRule,
    SampleStatistics,
    compute_mean_std,
    find_duplicates,
    merge_statistics,
    percentile_range,
    read_sample,
)

CLASSES = ("background", "cell", "wall")
PALETTE = default_palette(CLASSES)
INDEX = MaskFormat(kind="index", num_classes=3, ignore_value=255)
SHAPE = (6, 8)


def rule_of(masks=INDEX, *, resize_mask=False, **images):
    return SampleRule(
        images=ImageRule(**images), masks=masks, palette=PALETTE, resize_mask=resize_mask
    )


RULE = rule_of(allow_16_bit=True, alpha="drop")


@pytest.fixture
def image_file(to_bytes, noise):
    """image_file(mode, seed) -> bytes of a PNG (CMYK: TIFF) of random pixels."""

    def make(mode, seed=0, shape=SHAPE):
        if mode == "I;16":
            grey16 = np.random.default_rng(seed).integers(0, 5000, shape, dtype=np.uint16)
            return to_bytes(Image.fromarray(grey16))
        image = Image.fromarray(noise((*shape, 3), seed=seed))
        image = (
            image.convert("L").convert(mode) if mode in ("L", "LA", "1") else image.convert(mode)
        )
        return to_bytes(image, "TIFF" if mode == "CMYK" else "PNG")

    return make


@pytest.fixture
def mask_file(noise):
    """mask_file(seed) -> bytes of a canonical mask."""

    def make(seed=0, shape=SHAPE, values=(0, 1, 2, 255)):
        return encode_mask(
            np.array(values, np.uint8)[noise(shape, seed=seed) % len(values)], PALETTE
        )

    return make


MODES = ["L", "RGB", "I;16", "LA", "P", "1", "CMYK", "RGBA", "L", "RGB", "I;16"]


@pytest.fixture
def many(image_file, mask_file):
    """Image files of every mode with their mask files."""
    return [(image_file(mode, seed), mask_file(seed)) for seed, mode in enumerate(MODES)]


def read(pair, rule=RULE, *, pixels=True):
    return read_sample(*pair, rule, "images/a.png", "masks/a.png", pixels=pixels)


def statistics_of(samples):
    statistics = SampleStatistics()
    for sample in samples:
        statistics.add(sample)
    return statistics


# -------------------------------------------------------------------------------- one sample


def test_a_sample_has_its_image_its_mask_and_a_digest(image_file, mask_file):
    image, mask = image_file("RGB"), mask_file()
    sample = read((image, mask))
    assert sample.image.data is image
    assert sample.mask.encode(PALETTE) is mask
    assert sample.digest == hashlib.sha256(image).hexdigest()


@pytest.mark.parametrize("rule", [RULE, rule_of(None)])
def test_unlabelled_samples_have_no_mask(image_file, mask_file, rule):
    mask = mask_file() if rule.masks is None else None
    assert read((image_file("RGB"), mask), rule).mask is None


def test_headers_are_trusted_unless_something_is_resized(image_file, mask_file):
    pair = image_file("RGB"), mask_file()
    sample = read(pair, pixels=False)
    assert (sample.image.image, sample.mask.class_map) == (None, None)
    for rule in (rule_of(resize=4), rule_of(resize_mask=True)):
        assert read(pair, rule, pixels=False).mask.class_map is not None


def test_a_mask_of_another_size_is_refused_with_both_sizes(image_file, mask_file):
    with pytest.raises(DataError) as caught:
        read((image_file("RGB"), mask_file(shape=(12, 16))))
    assert str(caught.value) == (
        "masks/a.png is 16 x 12, but its image images/a.png is 8 x 6; "
        "give both the same size, or add --resize-mask"
    )


def test_a_mask_is_resized_to_its_image_on_request_and_counted(image_file, mask_file, to_bytes):
    large = np.array([[0, 1], [2, 0]], dtype=np.uint8).repeat(6, 0).repeat(8, 1)
    pair = image_file("RGB"), to_bytes(Image.fromarray(large))
    sample = read(pair, rule_of(resize_mask=True))
    index = decode_mask(sample.mask.encode(PALETTE), 3, "x")
    assert np.array_equal(index, large[::2, ::2])
    assert sample.mask.class_map.pixels.sum() == index.size
    other = read((image_file("RGB"), mask_file()), rule_of(resize_mask=True))
    assert statistics_of([sample, other]).notes == {"mask": 1}


@pytest.mark.parametrize(
    ("shape", "scaled"),
    [
        *(((8, 6), False), ((6, 6), False), ((12, 17), True), ((12, 20), False)),
        *(((1, 1), True), ((2, 3), True), ((2, 5), False), ((30, 41), True), ((30, 50), False)),
    ],
)
def test_only_masks_of_the_same_aspect_ratio_are_resized(shape, scaled, image_file, mask_file):
    pair = image_file("RGB"), mask_file(shape=shape)
    if scaled:
        assert read(pair, rule_of(resize_mask=True)).mask.size == SHAPE[::-1]
        return
    for rule in (RULE, rule_of(resize_mask=True)):
        with pytest.raises(DataError) as caught:
            read(pair, rule)
        assert str(caught.value) == (
            f"masks/a.png is {shape[1]} x {shape[0]}, but its image images/a.png is 8 x 6; "
            "their aspect ratios differ: crop or pad one, or find the right mask"
        )


def test_an_image_that_exif_rotates_away_from_its_mask_is_named(to_bytes, noise, mask_file):
    exif = Image.Exif()
    exif[0x0112] = 6
    pair = to_bytes(Image.fromarray(noise()), exif=exif), mask_file()
    with pytest.raises(DataError) as caught:
        read(pair)
    assert str(caught.value) == (
        "masks/a.png is 8 x 6, but its image images/a.png is 6 x 8; "
        "the image was rotated by its EXIF orientation: add --exif ignore to keep it unrotated"
    )
    sample = read(pair, rule_of(exif="ignore"))
    assert sample.image.image.size == sample.mask.size == (8, 6)


def test_a_mask_is_scaled_down_with_its_image(image_file, mask_file):
    sample = read((image_file("RGB"), mask_file()), rule_of(resize=4))
    assert sample.image.image.size == sample.mask.size == (4, 3)
    assert decode_mask(sample.mask.encode(PALETTE), 3, "x").shape == (3, 4)


@pytest.mark.parametrize("bad", [0, 1])
def test_image_and_mask_are_named_by_their_own_files(image_file, mask_file, bad):
    pair = [image_file("RGB"), mask_file()]
    pair[bad] = b"not an image"
    where = ("images/a.png", "masks/a.png")[bad]
    with pytest.raises(DataError, match=f"^{where} is not a readable image"):
        read(pair)


# ------------------------------------------------------------------------------- statistics


def test_mask_statistics_match_the_decoded_masks(many):
    statistics = statistics_of(map(read, many))
    masks = [decode_mask(mask, 3, "x") for _, mask in many]
    together = np.concatenate([mask.ravel() for mask in masks])
    assert statistics.pixels.tolist() == np.bincount(together, minlength=256).tolist()
    assert statistics.images.tolist() == [sum((m == i).any() for m in masks) for i in range(256)]
    assert statistics.values == set(together.tolist()) == {0, 1, 2, 255}
    assert statistics.mask_modes == Counter({"P": len(many)})
    assert statistics.class_pixels(3) == tuple((together == i).sum() for i in (0, 1, 2, 255))


def test_class_pixels_end_with_ignore(mask_file, image_file):
    mask = encode_mask(np.array([[0, 0, 0, 1], [2, 2, 255, 255]], np.uint8), PALETTE)
    statistics = statistics_of([read((image_file("L", shape=(2, 4)), mask))])
    assert statistics.class_pixels(3) == (3, 1, 2, 2)


def test_levels_match_the_decoded_images(many):
    statistics = statistics_of(map(read, many))
    kinds = {"L": [], "RGB": [], "I;16": []}
    for (image, _), mode in zip(many, MODES, strict=True):
        kind = {"LA": "L", "1": "L", "P": "RGB", "CMYK": "RGB", "RGBA": "RGB"}.get(mode, mode)
        if kind == "I;16":
            kinds[kind].append(np.asarray(read((image, None)).image.image).ravel())
        else:
            decoded = decode_image(image, ImageFormat(kind, "drop"), "x")
            kinds[kind].append(decoded.reshape(-1, decoded.shape[-1]))
    grey = np.concatenate(kinds["L"])[:, 0]
    assert statistics.levels["L"].tolist() == np.bincount(grey, minlength=256).tolist()
    bands = np.concatenate(kinds["RGB"]).T
    expected = np.concatenate([np.bincount(band, minlength=256) for band in bands])
    assert statistics.levels["RGB"].tolist() == expected.tolist()
    grey16 = np.concatenate(kinds["I;16"])
    assert statistics.levels["I;16"].tolist() == np.bincount(grey16, minlength=65536).tolist()
    assert statistics.channels == {"L", "RGB"}


@pytest.mark.parametrize("order", ["<", ">"])
def test_levels_of_16_bits_do_not_depend_on_the_byte_order(raw_tiff, order):
    pixels = np.array([[0, 1, 258, 65535]])
    data = raw_tiff(pixels.astype(f"{order}u2").tobytes(), (4, 1), 16, 1, order=order)
    statistics = statistics_of([read((data, None))])
    assert np.flatnonzero(statistics.levels["I;16"]).tolist() == [0, 1, 258, 65535]


def test_sizes_notes_and_digests_are_kept(many, image_file):
    samples = [*map(read, many), read((image_file("RGB", 99, (3, 5)), None))]
    statistics = statistics_of(samples)
    statistics.add_omitted()
    assert statistics.digests == [*(s.digest for s in samples), ""]
    assert statistics.notes["deep"] == 2
    assert statistics.notes["colour"] == 1
    sizes = statistics.size_counts()
    assert SizeCount(5, 3, "RGB", 1) in sizes
    assert sum(size.images for size in sizes) == len(samples)


def test_headers_give_sizes_but_no_pixels(image_file, mask_file):
    statistics = statistics_of([read((image_file("RGB"), mask_file()), pixels=False)])
    assert (statistics.levels, statistics.pixels.sum()) == ({}, 0)
    assert statistics.size_counts() == (SizeCount(8, 6, "RGB", 1),)


def to_json(statistics):
    return json.loads(json.dumps(statistics.to_plain()))


def test_statistics_are_restored_from_json(many):
    statistics = statistics_of(map(read, many))
    statistics.add_omitted()
    restored = SampleStatistics.from_plain(to_json(statistics))
    assert restored.to_plain() == statistics.to_plain()
    assert restored.size_counts() == statistics.size_counts()
    restored.merge(statistics)
    assert restored.pixels.tolist() == (2 * statistics.pixels).tolist()
    empty = to_json(SampleStatistics())
    assert to_json(SampleStatistics.from_plain(empty)) == empty


SAMPLES = st.lists(st.integers(0, len(MODES) - 1), max_size=12)


@given(SAMPLES, st.data())
def test_statistics_do_not_depend_on_the_order_of_merging(chosen, data):
    ready = prepared()
    samples = [ready[i] for i in chosen]
    expected = to_json(statistics_of(samples))
    places = data.draw(st.permutations(range(len(samples))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(samples)), max_size=3)))
    bounds = [0, *cuts, len(samples)]
    parts = [statistics_of(samples[p] for p in places[a:b]) for a, b in pairwise(bounds)]
    merged = to_json(merge_statistics(parts))
    assert sorted(merged.pop("digests")) == sorted(expected.pop("digests"))
    assert merged == expected
    # Merging does not change its arguments.
    assert to_json(merge_statistics(parts))["pixels"] == expected["pixels"]


READY = []


def prepared():
    """Return one sample of every mode, created once."""
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


# ----------------------------------------------------------------- mean, deviation, percentiles


@pytest.mark.parametrize(
    ("modes", "image_format"),
    [
        (["L", "L"], ImageFormat("L")),
        (["RGB", "RGB"], ImageFormat("RGB")),
        (["L", "RGB"], ImageFormat("RGB")),
        (["I;16", "I;16"], ImageFormat("L", range=(100, 4000))),
        (["I;16", "L"], ImageFormat("L", range=(0, 65535))),
        (["I;16", "L", "RGB", "P", "CMYK", "1"], ImageFormat("RGB", range=(200, 4999))),
    ],
)
def test_mean_and_std_match_the_decoded_pixels(image_file, modes, image_format):
    images = [image_file(mode, seed) for seed, mode in enumerate(modes)]
    statistics = statistics_of(read((image, None)) for image in images)
    means, deviations = compute_mean_std(statistics.levels, image_format)
    pixels = np.concatenate(
        [decode_image(i, image_format, "x").reshape(-1, len(image_format.channels)) for i in images]
    )
    assert len(means) == len(deviations) == len(image_format.channels)
    assert means == pytest.approx((pixels / 255).mean(axis=0), abs=1e-6)
    assert deviations == pytest.approx((pixels / 255).std(axis=0), abs=1e-6)


def test_mean_and_std_of_no_images_and_of_one_level():
    assert compute_mean_std({}, ImageFormat("RGB")) == ((0, 0, 0), (1e-6,) * 3)
    levels = np.zeros(256, dtype=np.int64)
    levels[51] = 10**12
    assert compute_mean_std({"L": levels}, ImageFormat("L")) == ((0.2,), (1e-6,))


def test_computing_mean_and_std_does_not_change_the_levels():
    levels = {"L": np.ones(256, dtype=np.int64), "I;16": np.ones(65536, dtype=np.int64)}
    compute_mean_std(levels, ImageFormat("L", range=(0, 65535)))
    assert levels["L"].tolist() == [1] * 256


@given(
    st.lists(st.integers(0, 65535), min_size=1, max_size=300),
    st.floats(0, 100),
    st.floats(0, 100),
)
def test_percentiles_are_values_that_occur(values, one, other):
    low, high = sorted((one, other))
    levels = np.bincount(values, minlength=65536)
    bounds = percentile_range(levels, (low, high))
    assert 0 <= bounds[0] < bounds[1] <= 65535
    # If all pixels are white, the range is extended downwards.
    if bounds[0] in values:
        for percentile, bound in zip((low, high), bounds, strict=True):
            assert sum(value <= bound for value in values) >= len(values) * percentile / 100
    if bounds[1] > bounds[0] + 1:
        assert set(bounds) <= set(values)
        assert all(
            sum(value < bound for value in values) <= len(values) * percentile / 100
            for percentile, bound in zip((low, high), bounds, strict=True)
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


def test_images_that_are_equal_byte_for_byte_are_grouped():
    digests = [digest(text) for text in "abacbda"]
    groups = find_duplicates(digests, "1234567")
    assert groups == {digest("a"): ["1", "3", "7"], digest("b"): ["2", "5"]}


def test_omitted_samples_are_not_duplicates():
    assert find_duplicates(["", digest("a"), "", ""], "1234") == {}


def test_a_sample_without_digest_does_not_shift_the_sources():
    digests = [digest("a"), "", digest("a")]
    assert find_duplicates(iter(digests), iter("123")) == {digest("a"): ["1", "3"]}
