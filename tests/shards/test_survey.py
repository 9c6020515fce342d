"""`masks.survey`, `masks.proposal`, `masks.counts`.

Proposals for masks of an undeclared format: flags that read them all, or a reason.
"""

import io
import pickle
import shlex
import struct
import zlib

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards.images.files import ImageRule
from shards.masks.canonical import read_mask
from shards.masks.formats import MaskFormat
from shards.masks.palettes import default_palette, read_palette
from shards.masks.proposal import Proposal, propose_flags
from shards.masks.survey import MAX_COLOURS, MaskSurvey, survey_mask
from shards.sample import IGNORE, DataError

RULE = ImageRule()
RED, GREEN, BLUE, BLACK, WHITE = (
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (0, 0, 0),
    (255, 255, 255),
)
INDICES = np.array([[0, 1, 2, 0], [2, 1, 0, 0]], dtype=np.uint8)


def encode(image, file_format="PNG", **options):
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return out.getvalue()


def grey(values):
    """Encode values as PNG of mode L."""
    return encode(Image.fromarray(np.atleast_2d(np.array(values, dtype=np.uint8))))


def grey16(values):
    """Encode values as PNG of mode I;16."""
    return encode(Image.fromarray(np.atleast_2d(np.array(values, dtype=np.uint16))))


def bits(values):
    """Encode values as PNG of mode 1."""
    return encode(Image.fromarray(np.atleast_2d(np.array(values, dtype=bool))))


def palette_png(indices, *colours):
    """Encode indices as PNG of mode P with this palette."""
    image = Image.fromarray(np.atleast_2d(np.array(indices, dtype=np.uint8))).copy()
    image.putpalette([part for colour in colours for part in colour])
    return encode(image)


def coloured(indices, *colours):
    """Encode indices in these colours as PNG of mode RGB, or RGBA for colours of four numbers."""
    table = np.array(colours, dtype=np.uint8)
    return encode(Image.fromarray(table[np.atleast_2d(np.array(indices))]))


def discs(values, size=96, seed=0):
    """Draw overlapping discs of all further values on a background of the first value."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    drawn = np.full((size, size), values[0], dtype=np.uint8)
    for value in [*values[1:], *values[1:]]:
        y, x = rng.integers(size // 4, 3 * size // 4, 2)
        drawn[(rows - y) ** 2 + (columns - x) ** 2 < (size // 6) ** 2] = value
    return drawn


def smooth(image, resampling, factor=3):
    """Scale an image down, which smooths its edges."""
    size = (image.width // factor, image.height // factor)
    return image.resize(size, resampling)


def survey_of(*masks):
    survey = MaskSurvey()
    for number, data in enumerate(masks):
        survey.merge(survey_mask(data, f"masks/{number}.png", RULE))
    return survey


def form_of(proposal, masks):
    """Return the MaskFormat that `unet pack` builds from the flags, and the class names."""
    values_of, name = {}, ""
    for word in proposal.flags:
        if word.startswith("--"):
            name = word
            values_of[name] = []
        else:
            values_of[name].append(word)
    (kind,) = values_of.pop("--mask-format")
    names = values_of.pop("--classes", ["background", "foreground"])
    options = {}
    if kind == "palette":
        first = read_palette(Image.open(io.BytesIO(masks[0])))[: len(names)]
        options["colours"] = (*first, *[(128, 128, 128)] * (len(names) - len(first)))
    if "--colours" in values_of:
        assert values_of.pop("--colours") == ["colours.yaml"]
        table = yaml.safe_load(proposal.table)
        names = list(table)
        options["colours"] = tuple(tuple(colour) for colour in table.values())
    for flag, option in (
        ("--mask-values", "values"),
        ("--mask-threshold", "threshold"),
        ("--ignore-value", "ignore_value"),
        ("--tolerance", "tolerance"),
    ):
        if flag in values_of:
            numbers = tuple(int(word) for word in values_of.pop(flag))
            options[option] = numbers if option == "values" else numbers[0]
    if "--invert" in values_of:
        assert values_of.pop("--invert") == []
        options["invert"] = True
    if "--allow-absent-classes" in values_of:
        assert values_of.pop("--allow-absent-classes") == []
    if "--unknown" in values_of:
        (options["unknown"],) = values_of.pop("--unknown")
    assert not values_of
    assert len(set(names)) == len(names)
    return MaskFormat(kind=kind, num_classes=len(names), **options), names


def read_all(proposal, masks):
    """Read all masks by the proposed flags; returns their class indices and the class names."""
    mask_format, names = form_of(proposal, masks)
    palette = default_palette(tuple(names))
    read = [read_mask(data, mask_format, palette, f"masks/{n}.png") for n, data in enumerate(masks)]
    return [mask.class_map.index for mask in read], names


def check(masks, *flags):
    """Assert that these flags are proposed and read all masks; returns proposal and indices."""
    proposal = propose_flags(survey_of(*masks))
    assert shlex.join(proposal.flags) == shlex.join(flags)
    indices, _ = read_all(proposal, masks)
    return proposal, indices


def reason_for_none(masks):
    """Assert that nothing is proposed; returns the reason."""
    proposal = propose_flags(survey_of(*masks))
    assert proposal.flags == ()
    assert proposal.table == ""
    assert "\n" not in proposal.why
    return proposal.why


def has_note(proposal, text):
    return any(text in note for note in proposal.notes)


BINARY = ("--mask-format", "binary")


@pytest.mark.parametrize("foreground", [1, 7, 255])
def test_zero_and_one_other_value_are_binary(foreground):
    masks = [grey([0, 0, foreground]), grey([0, 0, 0])]
    proposal, indices = check(masks, *BINARY)
    assert proposal.notes == ()
    assert indices[0].tolist() == [[0, 0, 1]]


def test_the_foreground_value_may_differ_between_modes():
    rgb = coloured([0, 1, 0], BLACK, WHITE)
    masks = [bits([0, 1, 0]), grey([0, 255, 0]), grey16([0, 65535, 0]), rgb]
    _, indices = check(masks, *BINARY)
    assert all(index.tolist() == [[0, 1, 0]] for index in indices)


def test_a_rare_zero_may_be_the_foreground():
    proposal, _ = check([grey([255, 255, 0])], *BINARY)
    assert has_note(proposal, "add --invert")


def test_a_palette_with_white_at_index_0_is_inverted():
    masks = [palette_png([0, 1, 1], WHITE, BLACK), palette_png([1, 1, 1], WHITE, BLACK)]
    proposal, indices = check(masks, *BINARY, "--invert")
    assert has_note(proposal, "index 0 is white")
    assert indices[0].tolist() == [[1, 0, 0]]


def test_inverted_palettes_among_grey_masks_are_read_by_colour():
    masks = [palette_png([0, 1, 1], WHITE, BLACK), grey([255, 0, 0])]
    proposal, indices = check(masks, *RGB)
    assert yaml.safe_load(proposal.table) == {"background": [0, 0, 0], "white": [255, 255, 255]}
    assert indices[0].tolist() == indices[1].tolist() == [[1, 0, 0]]


def test_gifs_with_their_own_order_of_colours_are_read_by_colour():
    """Pillow stores an all-white mask with white at index 0."""
    arrays = [[[0, 255]], [[255, 255]], [[0, 0]]]
    masks = [encode(Image.fromarray(np.array(a, dtype=np.uint8)), "GIF") for a in arrays]
    _, indices = check(masks, *RGB)
    assert [index.tolist() for index in indices] == [[[0, 1]], [[1, 1]], [[0, 0]]]


RGB = ("--mask-format", "rgb", "--colours", "colours.yaml")


def value_flags(*values):
    values = [str(value) for value in values]
    names = [f"class_{value}" for value in values]
    return ("--mask-format", "values", "--mask-values", *values, "--classes", *names)


def index_flags(top, kind="index"):
    return ("--mask-format", kind, "--classes", *(f"class_{i}" for i in range(top + 1)))


def test_palette_masks():
    colours = (BLACK, RED, GREEN, BLUE)
    masks = [palette_png(INDICES, *colours), palette_png([0, 3, 3], *colours)]
    proposal, indices = check(masks, *index_flags(3, "palette"))
    assert np.array_equal(indices[0], INDICES)
    assert has_note(proposal, "placeholders")


def test_palette_masks_with_a_void_border():
    colours = [BLACK, RED, GREEN] + [(i, i, i) for i in range(3, 256)]
    _, indices = check(
        [palette_png([0, 1, 2, 255], *colours)],
        *(*index_flags(2, "palette"), "--ignore-value", "255"),
    )
    assert indices[0].tolist() == [[0, 1, 2, IGNORE]]


def shorten(data):
    """Keep only the first two colours in the palette of a PNG."""
    start = data.index(b"PLTE")
    (size,) = struct.unpack(">I", data[start - 4 : start])
    body = data[start : start + 4 + 6]
    chunk = struct.pack(">I", 6) + body + struct.pack(">I", zlib.crc32(body))
    return data[: start - 4] + chunk + data[start + 8 + size :]


def test_masks_with_an_index_without_colour_are_read_by_index():
    data = shorten(palette_png([0, 1, 2, 3], BLACK, RED, GREEN, BLUE))
    check([data], *index_flags(3))


def test_masks_with_different_palettes_are_read_by_colour():
    masks = [palette_png([0, 1, 1], BLACK, RED), palette_png([0, 1, 2], BLACK, GREEN, RED)]
    proposal, indices = check(masks, *RGB)
    assert yaml.safe_load(proposal.table) == {
        "background": [0, 0, 0],
        "red": [255, 0, 0],
        "green": [0, 255, 0],
    }
    assert indices[1].tolist() == [[0, 2, 1]]


def test_palettes_that_differ_only_in_unused_indices_are_compatible():
    masks = [
        palette_png([0, 1, 2], BLACK, RED, GREEN, RED),
        palette_png([0, 1, 1], BLACK, RED, GREEN, BLUE),
    ]
    check(masks, *index_flags(2, "palette"))


def test_palettes_shorter_than_the_indices_in_use_are_read_by_index():
    """The format `palette` compares all files with the palette of the first."""
    masks = [palette_png([0, 1, 1], BLACK, RED), palette_png([0, 1, 2], BLACK, RED, GREEN)]
    check(masks, *index_flags(2))
    check(masks[::-1], *index_flags(2))


def test_an_index_without_colour_is_never_read_by_colour():
    masks = [shorten(palette_png([0, 1, 2], BLACK, RED, BLUE)), coloured([0, 1], BLACK, RED)]
    assert "lack palette colours; save all in one format" in reason_for_none(masks)


@pytest.mark.parametrize("make", [grey, grey16])
@pytest.mark.parametrize("top", [2, 5, 40])
def test_consecutive_values_from_zero_are_indices(make, top):
    proposal, indices = check([make(range(top + 1)), make([0, top])], *index_flags(top))
    assert indices[0].tolist() == [list(range(top + 1))]
    assert has_note(proposal, "placeholders")


def test_255_beside_indices_is_treated_as_ignore_with_a_note():
    masks = [grey([0, 1, 255]), grey([0, 1, 1])]
    proposal, indices = check(masks, *index_flags(1), "--ignore-value", "255")
    assert has_note(proposal, "255 (1 px (16.7 %)) is ignored; if it is a class")
    assert indices[0].tolist() == [[0, 1, IGNORE]]


@pytest.mark.parametrize("top", [150, 254])
def test_many_classes_of_which_each_file_has_few(top):
    masks = [grey([0, 7 * n % top, 11 * n % top, top, 255]) for n in range(top)]
    proposal, _ = check(masks, *index_flags(top), "--ignore-value", "255")
    assert has_note(proposal, "instance labels: --mask-format binary --mask-threshold 1")


def test_a_small_gap_in_the_indices_is_a_class_that_does_not_occur():
    proposal, _ = check([grey([0, 1, 2, 4, 5, 6, 7])], *index_flags(7), "--allow-absent-classes")
    assert has_note(proposal, "3: no mask has these values")


@pytest.mark.parametrize("values", [(0, 128, 255), (5, 7), (1, 2, 3), (0, 10, 20, 30)])
def test_a_few_arbitrary_values(values):
    proposal, indices = check([grey(values), grey(values[:2])], *value_flags(*values))
    assert indices[0].tolist() == [list(range(len(values)))]
    assert has_note(proposal, "if 255 marks pixels to ignore") == (255 in values)


def test_stray_values_do_not_become_classes():
    values = [0] * 4000 + [128] * 3000 + [255] * 3000 + [3, 9, 77, 130, 201]
    proposal = propose_flags(survey_mask(grey(values), "m.png", ImageRule()))
    assert proposal.flags == (*value_flags(0, 128, 255), "--unknown", "ignore")
    assert has_note(proposal, "equal neighbours: 3: 1 px (0.01 %) in 1 masks, 9: 1 px (0.01 %)")


def scatter(index, value, count, seed=0):
    """Set isolated pixels on the border of the first class."""
    drawn = index.copy()
    rows, columns = np.nonzero((drawn[:, 1:-1] != drawn[:, :-2]) & (drawn[:, 1:-1] == 0))
    chosen = np.random.default_rng(seed).choice(len(rows), count, replace=False)
    drawn[rows[chosen], columns[chosen] + 1] = value
    return drawn


def test_stray_values_among_indices_do_not_become_classes():
    clean = [discs((0, 1, 2, 3), seed=n) for n in range(8)]
    masks = [grey(scatter(index, 90 + n % 2, 2)) for n, index in enumerate(clean)]
    proposal, indices = check(masks, *index_flags(3), "--unknown", "ignore")
    assert has_note(proposal, "90: 8 px (0.0109 %) in 4 masks, 91: 8 px (0.0109 %) in 4 masks")
    for index, expected in zip(indices, clean, strict=True):
        assert (index == IGNORE).sum() == 2
        assert np.array_equal(index[index != IGNORE], expected[index != IGNORE])


def test_stray_values_in_binary_masks_are_ignored():
    masks = [grey(scatter(discs((0, 255), seed=n), (1, 254, 128)[n % 3], 2)) for n in range(8)]
    names = ("--classes", "background", "foreground")
    flags = ("--mask-format", "values", "--mask-values", "0", "255", *names)
    proposal, _ = check(masks, *flags, "--unknown", "ignore")
    assert has_note(proposal, "128: 4 px (0.00543 %) in 2 masks")


def test_stray_colours_do_not_become_classes():
    colours = (BLACK, RED, GREEN, (130, 0, 0), (0, 90, 0))
    masks = [coloured(scatter(discs((0, 1, 2), seed=n), 3 + n % 2, 2), *colours) for n in range(8)]
    proposal, _ = check(masks, *RGB, "--unknown", "ignore")
    assert {*yaml.safe_load(proposal.table)} == {"background", "red", "green"}
    assert has_note(proposal, "0, 90, 0: 8 px (0.0109 %) in 4 masks")


@pytest.mark.parametrize("kind", ["values", "index", "rgb"])
def test_a_rare_class_that_fills_an_area_is_a_class(kind):
    """32 of 73,728 pixels, all in one mask: 1 in 2,300."""
    masks = [discs((0, 1, 2), seed=n) for n in range(8)]
    masks[5][2:6, 2:10] = 3
    colours = (BLACK, RED, GREEN, BLUE)
    values = np.array([0, 70, 140, 210], np.uint8)
    encoders = {
        "values": lambda index: grey(values[index]),
        "index": grey,
        "rgb": lambda index: coloured(index, *colours),
    }
    files = [encoders[kind](index) for index in masks]
    flags = {"values": value_flags(*values), "index": index_flags(3), "rgb": RGB}[kind]
    proposal, indices = check(files, *flags)
    assert has_note(proposal, "rare but classes")
    assert has_note(proposal, "32 px (0.0434 %) in 1 masks")
    assert len(np.unique(indices[5])) == 4


def test_a_few_arbitrary_values_of_16_bits():
    check([grey16([0, 1000, 65535])], *value_flags(0, 1000, 65535))


@pytest.mark.parametrize("resampling", [Image.Resampling.BILINEAR, Image.Resampling.LANCZOS])
def test_smoothed_edges_need_a_threshold(resampling):
    images = [Image.fromarray(discs((0, 255), 480, seed)) for seed in range(4)]
    masks = [encode(smooth(image, resampling)) for image in images]
    proposal, indices = check(masks, *BINARY, "--mask-threshold", "128")
    assert has_note(proposal, "are near neither; values >= 128 become foreground")
    assert all(0 < index.mean() < 1 for index in indices)


def test_edges_of_every_grey_level_need_a_threshold():
    levels = [0] * 3000 + list(range(256)) + [255] * 1000
    check([grey(levels)], *BINARY, "--mask-threshold", "128")


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_binary_jpegs_need_a_threshold(quality):
    drawn = [Image.fromarray(discs((0, 255), seed=seed)) for seed in range(3)]
    masks = [encode(image, "JPEG", quality=quality) for image in drawn]
    _, indices = check(masks, *BINARY, "--mask-threshold", "128")
    assert np.mean(indices[0] == (np.asarray(drawn[0]) > 0)) > 0.99


def test_jpegs_of_one_value_need_a_threshold_too():
    masks = [encode(Image.new("L", (16, 16), value), "JPEG") for value in (0, 255)]
    check(masks, *BINARY, "--mask-threshold", "128")


def test_jpegs_of_several_values_need_a_tolerance():
    drawn = [Image.fromarray(discs((0, 128, 255), 192, seed)) for seed in range(3)]
    masks = [encode(image, "JPEG", quality=90) for image in drawn]
    proposal = propose_flags(survey_of(*masks))
    near = ("--tolerance", "10", "--unknown", "ignore")
    assert proposal.flags == (*value_flags(0, 128, 255), *near)
    indices, _ = read_all(proposal, masks)
    expected = np.asarray(drawn[0]) // 127
    assert np.mean(indices[0] == expected) > 0.9
    assert has_note(proposal, "are ignored: soft edges, noise, perhaps a rare class")


def test_coloured_masks():
    masks = [coloured(INDICES, BLACK, RED, GREEN), coloured([3, 3, 3], *[BLUE] * 4)]
    proposal, indices = check(masks, *RGB)
    assert proposal.table == (
        "background: [0, 0, 0]\nblue: [0, 0, 255]\ngreen: [0, 255, 0]\nred: [255, 0, 0]\n"
    )
    assert indices[0].tolist() == [[0, 3, 2, 0], [2, 3, 0, 0]]
    assert has_note(proposal, "rename them")


def test_rare_colours_may_be_edges():
    proposal, _ = check([coloured([0] * 2000 + [1, 2], BLACK, RED, GREEN)], *RGB)
    assert has_note(proposal, "255, 0, 0: 1 px (0.05 %) in 1 masks")


def test_palette_indices_that_are_not_classes_are_read_by_colour():
    table = [BLACK] * 256
    table[7::7] = [(0, 0, value) for value in range(0, 2 * len(table[7::7]), 2)]
    proposal, _ = check([palette_png(range(0, 256, 7), *table)], *RGB)
    assert len(yaml.safe_load(proposal.table)) == 36


def test_blank_masks_among_coloured_ones():
    masks = [coloured(INDICES, BLACK, RED, GREEN), coloured([0, 0], BLACK), grey([0, 0])]
    _, indices = check(masks, *RGB)
    assert not indices[1].any()
    assert not indices[2].any()


def test_colours_with_the_same_name_are_numbered():
    colours = [(250, 0, 0), (255, 5, 5), (245, 0, 9), (3, 3, 3), (0, 0, 0)]
    proposal, _ = check([coloured(range(5), *colours)], *RGB)
    assert list(yaml.safe_load(proposal.table)) == [
        "background",
        "black_2",
        "red",
        "red_2",
        "red_3",
    ]


def test_transparent_pixels_are_a_colour_of_four_numbers():
    masks = [coloured([0, 1, 1], (0, 0, 0, 0), (255, 0, 0, 255)), coloured([0, 0], BLACK)]
    proposal, indices = check(masks, *RGB)
    table = yaml.safe_load(proposal.table)
    assert table["transparent"] == [0, 0, 0, 0]
    assert indices[0].tolist() == [[2, 1, 1]] or len(np.unique(indices[0])) == 2


def test_a_constant_alpha_is_left_out():
    masks = [coloured([0, 1], (*BLACK, 255), (*RED, 255)), coloured([0, 1], (*BLACK, 9), (*RED, 9))]
    proposal, _ = check(masks, *RGB)
    assert yaml.safe_load(proposal.table) == {"background": [0, 0, 0], "red": [255, 0, 0]}


def test_modes_with_the_same_indices_are_read_by_index():
    masks = [palette_png([0, 1, 2], BLACK, RED, GREEN), grey([0, 1, 2])]
    check(masks, *index_flags(2))


@pytest.mark.parametrize("resampling", [Image.Resampling.BOX, Image.Resampling.LANCZOS])
def test_smoothed_edges_between_colours_are_ignored(resampling):
    table = np.array([BLACK, RED, GREEN, BLUE], dtype=np.uint8)
    images = [Image.fromarray(table[discs((0, 1, 2, 3), 480, seed)]) for seed in range(4)]
    masks = [encode(smooth(image, resampling)) for image in images]
    proposal, indices = check(masks, *RGB, "--tolerance", "30", "--unknown", "ignore")
    assert {tuple(c) for c in yaml.safe_load(proposal.table).values()} == {BLACK, RED, GREEN, BLUE}
    assert has_note(proposal, "are ignored: soft edges, noise, perhaps a rare class")
    assert 0 < np.mean([index == IGNORE for index in indices]) < 0.1


def test_coloured_jpegs_need_a_tolerance():
    table = np.array([BLACK, RED, GREEN, BLUE], dtype=np.uint8)
    images = [Image.fromarray(table[discs((0, 1, 2, 3), 480, seed)]) for seed in range(3)]
    masks = [encode(image, "JPEG", quality=85, subsampling=0) for image in images]
    proposal = propose_flags(survey_of(*masks))
    assert {"--tolerance", "--unknown"} < set(proposal.flags)
    indices, names = read_all(proposal, masks)
    assert names[0] == "background"
    assert set(names[1:]) == {"red", "green", "blue"}
    assert np.mean(indices[0] == IGNORE) < 0.1


def photograph(seed, shape=(64, 64, 3)):
    noise = np.random.default_rng(seed).normal(0, 12, shape)
    ramp = np.linspace(0, 200, shape[0])[(slice(None),) + (None,) * (len(shape) - 1)]
    return (ramp + noise + 30).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_photographs_are_not_masks(file_format):
    for shape in ((64, 64, 3), (64, 64)):
        masks = [encode(Image.fromarray(photograph(seed, shape)), file_format) for seed in range(3)]
        assert reason_for_none(masks)


def test_photographs_with_a_palette_are_not_masks():
    image = Image.fromarray(photograph(0)).quantize(256)
    assert "photographs" in reason_for_none([encode(image)])


def test_instance_labels_are_not_classes():
    rng = np.random.default_rng(0)
    masks = [grey16(np.minimum(np.arange(int(n)), 900)) for n in rng.integers(200, 900, 5)]
    proposal, indices = check(masks, *BINARY, "--mask-threshold", "1")
    assert has_note(proposal, "these look like instance labels: all objects become one class")
    assert indices[0].sum() == indices[0].size - 1


def test_classes_of_which_files_have_the_same_or_few_numbers_are_not_instances():
    nested = [grey(range(top + 1)) for top in (1, 2, 3, 4)]
    check(nested, *index_flags(4))
    check([grey(range(9)), grey(range(9))], *index_flags(8))


def test_rare_instance_labels_are_not_soft_edges():
    rng = np.random.default_rng(0)
    masks = [
        grey(np.repeat([0, *rng.choice(256, 30)], [2000, *rng.integers(5, 9, 30)]))
        for _ in range(20)
    ]
    assert reason_for_none(masks)


def test_probability_maps_are_not_masks():
    levels = (255 * np.random.default_rng(0).beta(0.6, 0.9, (3, 64, 64))).astype(np.uint8)
    assert "probabilities" in reason_for_none([grey(level) for level in levels])


def test_colour_and_16_bit_masks_together_have_no_proposal():
    assert "others are 16-bit" in reason_for_none([coloured([0, 1], BLACK, RED), grey16([0, 900])])


def test_no_masks_have_no_proposal():
    assert propose_flags(MaskSurvey()).flags == ()


@pytest.mark.parametrize("data", [b"", b"not an image", encode(Image.new("F", (2, 2)), "TIFF")])
def test_unreadable_files_are_refused(data):
    with pytest.raises(DataError, match="masks/x"):
        survey_mask(data, "masks/x", RULE)


def test_a_survey_does_not_depend_on_how_it_is_merged():
    masks = [
        *(palette_png([0, 1, n], (0, 0, n), (n, 0, 0), *[RED] * n) for n in range(1, 5)),
        grey([0, 9]),
        coloured(INDICES, BLACK, RED, GREEN),
    ]
    surveys = [survey_mask(data, f"masks/{number}.png", RULE) for number, data in enumerate(masks)]
    at_once, in_parts = MaskSurvey(), MaskSurvey()
    for one in surveys:
        at_once.merge(one)
    for some in (surveys[4:], surveys[1:4], surveys[:1]):
        part = MaskSurvey()
        for one in some:
            part.merge(one)
        in_parts.merge(pickle.loads(pickle.dumps(part)))
    assert in_parts == at_once
    assert propose_flags(in_parts) == propose_flags(at_once)


def test_memory_is_bounded():
    survey = MaskSurvey()
    for seed in range(30):
        noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        survey.merge(survey_mask(encode(Image.fromarray(noise)), f"{seed}.png", RULE))
    assert len(survey.colours) <= 2 * MAX_COLOURS
    assert propose_flags(survey).flags == ()
    assert "at least" in propose_flags(survey).why
    assert len(pickle.dumps(survey)) < 2**20


def test_the_text_has_the_survey_the_command_and_the_table():
    masks = [coloured(INDICES, BLACK, RED, GREEN), grey([0, 0])]
    text = propose_flags(survey_of(*masks)).text("unet pack --images 'my images'")
    lines = text.splitlines()
    assert lines[0] == "2 masks: 1 of mode L, 1 of mode RGB"
    assert lines[1] == "3 colours:"
    assert lines[2].split() == ["0,", "0,", "0", "6", "px", "(60", "%)"]
    assert "unet pack --images 'my images' --mask-format rgb --colours colours.yaml" in lines
    assert "Save as colours.yaml:\n\nbackground: [0, 0, 0]\ngreen: [0, 255, 0]\n" in text
    assert "note: the class names are placeholders" in text


def test_the_text_has_twelve_rows_and_no_command_if_nothing_fits():
    text = propose_flags(survey_of(grey16(range(1000)))).text("unet pack")
    assert "1,000 values, the 12 most common:" in text
    assert text.count(" px ") == 12
    assert "unet pack" not in text


def test_flags_are_quoted_for_the_shell():
    assert "unet pack --classes 'a b'" in Proposal(("--classes", "a b"), "why").text("unet pack")


ENCODERS = {
    "L": grey,
    "I;16": grey16,
    "RGB": lambda values: coloured(values, *[(v, v, v) for v in range(256)]),
    "P": lambda values: palette_png(values, *[(255 - v, v, 90) for v in range(256)]),
}


@st.composite
def index_masks(draw):
    """Draw files of class indices of 2 to 30 classes, possibly with 255."""
    top = draw(st.integers(1, 30))
    values = st.integers(0, top)
    if draw(st.booleans()):
        values |= st.just(IGNORE)
    rows = st.lists(values, min_size=1, max_size=20)
    return draw(st.lists(rows, min_size=1, max_size=6))


@given(index_masks(), st.sampled_from(sorted(ENCODERS)))
def test_index_masks_are_always_read_without_merging_classes(files, mode):
    masks = [ENCODERS[mode](values) for values in files]
    proposal = propose_flags(survey_of(*masks))
    assert proposal.flags
    indices, _ = read_all(proposal, masks)
    classes = {}
    for values, index in zip(files, indices, strict=True):
        for value, number in zip(values, index.ravel().tolist(), strict=True):
            assert classes.setdefault(value, number) == number
    assert len(set(classes.values())) == len(classes)


@given(st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=50), min_size=1, max_size=4))
def test_a_proposal_for_arbitrary_values_reads_all_masks(files):
    masks = [grey16(values) for values in files]
    proposal = propose_flags(survey_of(*masks))
    if proposal.flags:
        read_all(proposal, masks)


@given(
    st.lists(
        st.tuples(st.sampled_from(["L", "P", "RGB", "JPEG"]), st.integers(0, 2**32 - 1)),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 256),
)
def test_a_proposal_for_arbitrary_files_reads_all_masks(files, levels):
    masks = []
    for mode, seed in files:
        rng = np.random.default_rng(seed)
        values = rng.choice(rng.choice(256, min(levels, 255)), (8, 8)).astype(np.uint8)
        palette = rng.integers(0, 256, (256, 3), dtype=np.uint8)
        match mode:
            case "P":
                masks.append(palette_png(values, *palette.tolist()))
            case "RGB":
                masks.append(coloured(values, *palette.tolist()))
            case "JPEG":
                masks.append(encode(Image.fromarray(values), "JPEG"))
            case _:
                masks.append(grey(values))
    proposal = propose_flags(survey_of(*masks))
    if proposal.flags:
        read_all(proposal, masks)
