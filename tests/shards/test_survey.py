"""Holds what is proposed for masks of an undeclared format: it reads them all, or says why not."""

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

from shards.images import ImageRule
from shards.masks import MaskFormat, default_palette, palette_of, read_mask
from shards.sample import IGNORE, DataError
from shards.survey import COLOURS_OF_ALL, MaskSurvey, Proposal, look, propose

RULE = ImageRule()
RED, GREEN, BLUE, BLACK, WHITE = (
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (0, 0, 0),
    (255, 255, 255),
)
INDICES = np.array([[0, 1, 2, 0], [2, 1, 0, 0]], dtype=np.uint8)


def encode(image, form="PNG", **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def grey(values):
    """A PNG of mode L."""
    return encode(Image.fromarray(np.atleast_2d(np.array(values, dtype=np.uint8))))


def deep(values):
    """A PNG of mode I;16."""
    return encode(Image.fromarray(np.atleast_2d(np.array(values, dtype=np.uint16))))


def bits(values):
    """A PNG of mode 1."""
    return encode(Image.fromarray(np.atleast_2d(np.array(values, dtype=bool))))


def painted(indices, *colours):
    """A PNG of mode P."""
    image = Image.fromarray(np.atleast_2d(np.array(indices, dtype=np.uint8))).copy()
    image.putpalette([part for colour in colours for part in colour])
    return encode(image)


def coloured(indices, *colours):
    """A PNG of mode RGB, or RGBA where the colours have four parts."""
    table = np.array(colours, dtype=np.uint8)
    return encode(Image.fromarray(table[np.atleast_2d(np.array(indices))]))


def discs(values, size=96, seed=0):
    """Three overlapping discs of different values on the first value."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    drawn = np.full((size, size), values[0], dtype=np.uint8)
    for value in [*values[1:], *values[1:]]:
        y, x = rng.integers(size // 4, 3 * size // 4, 2)
        drawn[(rows - y) ** 2 + (columns - x) ** 2 < (size // 6) ** 2] = value
    return drawn


def smooth(image, how, factor=3):
    """The same, scaled down with smoothed edges."""
    size = (image.width // factor, image.height // factor)
    return image.resize(size, how)


def survey_of(*masks):
    survey = MaskSurvey()
    for number, data in enumerate(masks):
        survey.merge(look(data, f"masks/{number}.png", RULE))
    return survey


def form_of(proposal, masks):
    """The MaskFormat that `unet pack` makes of the flags, and the names of the classes."""
    given, name = {}, ""
    for word in proposal.flags:
        if word.startswith("--"):
            name = word
            given[name] = []
        else:
            given[name].append(word)
    (kind,) = given.pop("--mask-format")
    names = given.pop("--classes", ["background", "foreground"])
    options = {}
    if kind == "palette":
        first = palette_of(Image.open(io.BytesIO(masks[0])))[: len(names)]
        options["colours"] = (*first, *[(128, 128, 128)] * (len(names) - len(first)))
    if "--colours" in given:
        assert given.pop("--colours") == ["colours.yaml"]
        table = yaml.safe_load(proposal.table)
        names = list(table)
        options["colours"] = tuple(tuple(colour) for colour in table.values())
    for flag, option in (
        ("--mask-values", "values"),
        ("--mask-threshold", "threshold"),
        ("--ignore-value", "ignore_value"),
        ("--tolerance", "tolerance"),
    ):
        if flag in given:
            numbers = tuple(int(word) for word in given.pop(flag))
            options[option] = numbers if option == "values" else numbers[0]
    if "--invert" in given:
        assert given.pop("--invert") == []
        options["invert"] = True
    if "--unknown" in given:
        (options["unknown"],) = given.pop("--unknown")
    assert not given
    assert len(set(names)) == len(names)
    return MaskFormat(kind=kind, num_classes=len(names), **options), names


def read_all(proposal, masks):
    """Class indices of each mask, read by the proposed flags, and the names of the classes."""
    form, names = form_of(proposal, masks)
    palette = default_palette(tuple(names))
    read = [read_mask(data, form, palette, f"masks/{n}.png") for n, data in enumerate(masks)]
    return [mask.classes.index for mask in read], names


def check(masks, *flags):
    """The proposal for masks: these flags, which read them all. Gives it and the indices."""
    proposal = propose(survey_of(*masks))
    assert shlex.join(proposal.flags) == shlex.join(flags)
    indices, _ = read_all(proposal, masks)
    return proposal, indices


def refused(masks):
    """Why nothing is proposed."""
    proposal = propose(survey_of(*masks))
    assert proposal.flags == ()
    assert proposal.table == ""
    assert "\n" not in proposal.why
    return proposal.why


def noted(proposal, text):
    return any(text in note for note in proposal.notes)


BINARY = ("--mask-format", "binary")


@pytest.mark.parametrize("foreground", [1, 7, 255])
def test_zero_and_one_other_value_are_binary(foreground):
    masks = [grey([0, 0, foreground]), grey([0, 0, 0])]
    proposal, indices = check(masks, *BINARY)
    assert proposal.notes == ()
    assert indices[0].tolist() == [[0, 0, 1]]


def test_the_other_value_may_differ_between_modes():
    rgb = coloured([0, 1, 0], BLACK, WHITE)
    masks = [bits([0, 1, 0]), grey([0, 255, 0]), deep([0, 65535, 0]), rgb]
    _, indices = check(masks, *BINARY)
    assert all(index.tolist() == [[0, 1, 0]] for index in indices)


def test_the_rarer_zero_may_be_the_foreground():
    proposal, _ = check([grey([255, 255, 0])], *BINARY)
    assert noted(proposal, "add --invert")


def test_a_palette_with_white_as_its_index_0_is_inverted():
    masks = [painted([0, 1, 1], WHITE, BLACK), painted([1, 1, 1], WHITE, BLACK)]
    proposal, indices = check(masks, *BINARY, "--invert")
    assert noted(proposal, "index 0 is shown in white")
    assert indices[0].tolist() == [[1, 0, 0]]


def test_inverted_palettes_among_plain_masks_go_by_colour():
    masks = [painted([0, 1, 1], WHITE, BLACK), grey([255, 0, 0])]
    proposal, indices = check(masks, *RGB)
    assert yaml.safe_load(proposal.table) == {"background": [0, 0, 0], "white": [255, 255, 255]}
    assert indices[0].tolist() == indices[1].tolist() == [[1, 0, 0]]


def test_gifs_number_their_colours_by_themselves():
    """Pillow stores an all-white mask with white as index 0."""
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
    masks = [painted(INDICES, *colours), painted([0, 3, 3], *colours)]
    proposal, indices = check(masks, *index_flags(3, "palette"))
    assert np.array_equal(indices[0], INDICES)
    assert noted(proposal, "placeholders")


def test_palette_masks_with_a_void_border():
    colours = [BLACK, RED, GREEN] + [(i, i, i) for i in range(3, 256)]
    _, indices = check(
        [painted([0, 1, 2, 255], *colours)],
        *(*index_flags(2, "palette"), "--ignore-value", "255"),
    )
    assert indices[0].tolist() == [[0, 1, 2, IGNORE]]


def shorten(data):
    """The same PNG with the first two colours of its palette only."""
    start = data.index(b"PLTE")
    (size,) = struct.unpack(">I", data[start - 4 : start])
    body = data[start : start + 4 + 6]
    chunk = struct.pack(">I", 6) + body + struct.pack(">I", zlib.crc32(body))
    return data[: start - 4] + chunk + data[start + 8 + size :]


def test_an_index_without_colour_goes_by_number():
    data = shorten(painted([0, 1, 2, 3], BLACK, RED, GREEN, BLUE))
    check([data], *index_flags(3))


def test_palettes_that_differ_go_by_colour():
    masks = [painted([0, 1, 1], BLACK, RED), painted([0, 1, 2], BLACK, GREEN, RED)]
    proposal, indices = check(masks, *RGB)
    assert yaml.safe_load(proposal.table) == {
        "background": [0, 0, 0],
        "red": [255, 0, 0],
        "green": [0, 255, 0],
    }
    assert indices[1].tolist() == [[0, 2, 1]]


def test_palettes_that_differ_beyond_what_is_in_use_are_one():
    masks = [
        painted([0, 1, 2], BLACK, RED, GREEN, RED),
        painted([0, 1, 1], BLACK, RED, GREEN, BLUE),
    ]
    check(masks, *index_flags(2, "palette"))


def test_a_palette_shorter_than_the_indices_in_use_goes_by_index():
    """`palette` holds all files against the palette of the first."""
    masks = [painted([0, 1, 1], BLACK, RED), painted([0, 1, 2], BLACK, RED, GREEN)]
    check(masks, *index_flags(2))
    check(masks[::-1], *index_flags(2))


def test_an_index_without_colour_never_goes_by_colour():
    masks = [shorten(painted([0, 1, 2], BLACK, RED, BLUE)), coloured([0, 1], BLACK, RED)]
    assert "without a colour for an index; save them alike" in refused(masks)


@pytest.mark.parametrize("make", [grey, deep])
@pytest.mark.parametrize("top", [2, 5, 40])
def test_numbers_from_zero_are_indices(make, top):
    proposal, indices = check([make(range(top + 1)), make([0, top])], *index_flags(top))
    assert indices[0].tolist() == [list(range(top + 1))]
    assert noted(proposal, "placeholders")


def test_255_beside_indices_is_taken_for_ignore_and_noted():
    masks = [grey([0, 1, 255]), grey([0, 1, 1])]
    proposal, indices = check(masks, *index_flags(1), "--ignore-value", "255")
    assert noted(proposal, "255 (1 px (16.7 %)) is ignored; if it is a class")
    assert indices[0].tolist() == [[0, 1, IGNORE]]


@pytest.mark.parametrize("top", [150, 254])
def test_many_classes_of_which_a_file_holds_few(top):
    masks = [grey([0, 7 * n % top, 11 * n % top, top, 255]) for n in range(top)]
    proposal, _ = check(masks, *index_flags(top), "--ignore-value", "255")
    assert noted(proposal, "single objects: --mask-format binary --mask-threshold 1")


def test_a_small_gap_between_indices_is_a_class_that_never_occurs():
    check([grey([0, 1, 2, 4, 5, 6, 7])], *index_flags(7))


@pytest.mark.parametrize("values", [(0, 128, 255), (5, 7), (1, 2, 3), (0, 10, 20, 30)])
def test_a_few_values(values):
    proposal, indices = check([grey(values), grey(values[:2])], *value_flags(*values))
    assert indices[0].tolist() == [list(range(len(values)))]
    assert noted(proposal, "255 may be pixels to ignore") == (255 in values)


def test_a_few_values_of_16_bits():
    check([deep([0, 1000, 65535])], *value_flags(0, 1000, 65535))


@pytest.mark.parametrize("how", [Image.Resampling.BILINEAR, Image.Resampling.LANCZOS])
def test_smoothed_edges_need_a_threshold(how):
    images = [Image.fromarray(discs((0, 255), 480, seed)) for seed in range(4)]
    masks = [encode(smooth(image, how)) for image in images]
    proposal, indices = check(masks, *BINARY, "--mask-threshold", "128")
    assert noted(proposal, "are near neither; 128 and more is foreground")
    assert all(0 < index.mean() < 1 for index in indices)


def test_every_level_at_the_edges_needs_a_threshold():
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
    proposal = propose(survey_of(*masks))
    near = ("--tolerance", "10", "--unknown", "ignore")
    assert proposal.flags == (*value_flags(0, 128, 255), *near)
    indices, _ = read_all(proposal, masks)
    truth = np.asarray(drawn[0]) // 127
    assert np.mean(indices[0] == truth) > 0.9
    assert noted(proposal, "are ignored: soft edges, noise, perhaps a rare class")


def test_coloured_masks():
    masks = [coloured(INDICES, BLACK, RED, GREEN), coloured([3, 3, 3], *[BLUE] * 4)]
    proposal, indices = check(masks, *RGB)
    assert proposal.table == (
        "background: [0, 0, 0]\nblue: [0, 0, 255]\ngreen: [0, 255, 0]\nred: [255, 0, 0]\n"
    )
    assert indices[0].tolist() == [[0, 3, 2, 0], [2, 3, 0, 0]]
    assert noted(proposal, "rename them")


def test_rare_colours_may_be_edges():
    proposal, _ = check([coloured([0] * 2000 + [1, 2], BLACK, RED, GREEN)], *RGB)
    assert noted(proposal, "2 of the colours are rare, 2 px (0.0999 %) together")
    assert noted(proposal, "add --unknown ignore")


def test_palette_indices_that_are_no_classes_go_by_colour():
    table = [BLACK] * 256
    table[7::7] = [(0, 0, value) for value in range(0, 2 * len(table[7::7]), 2)]
    proposal, _ = check([painted(range(0, 256, 7), *table)], *RGB)
    assert len(yaml.safe_load(proposal.table)) == 36


def test_blank_masks_among_coloured_ones():
    masks = [coloured(INDICES, BLACK, RED, GREEN), coloured([0, 0], BLACK), grey([0, 0])]
    _, indices = check(masks, *RGB)
    assert not indices[1].any()
    assert not indices[2].any()


def test_colours_of_one_word_get_names_of_their_own():
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


def test_an_alpha_that_says_nothing_is_left_out():
    masks = [coloured([0, 1], (*BLACK, 255), (*RED, 255)), coloured([0, 1], (*BLACK, 9), (*RED, 9))]
    proposal, _ = check(masks, *RGB)
    assert yaml.safe_load(proposal.table) == {"background": [0, 0, 0], "red": [255, 0, 0]}


def test_modes_that_agree_in_numbers_go_by_number():
    masks = [painted([0, 1, 2], BLACK, RED, GREEN), grey([0, 1, 2])]
    check(masks, *index_flags(2))


@pytest.mark.parametrize("how", [Image.Resampling.BOX, Image.Resampling.LANCZOS])
def test_smoothed_colours_drop_the_edges(how):
    table = np.array([BLACK, RED, GREEN, BLUE], dtype=np.uint8)
    images = [Image.fromarray(table[discs((0, 1, 2, 3), 480, seed)]) for seed in range(4)]
    masks = [encode(smooth(image, how)) for image in images]
    proposal, indices = check(masks, *RGB, "--tolerance", "30", "--unknown", "ignore")
    assert {tuple(c) for c in yaml.safe_load(proposal.table).values()} == {BLACK, RED, GREEN, BLUE}
    assert noted(proposal, "are ignored: soft edges, noise, perhaps a rare class")
    assert 0 < np.mean([index == IGNORE for index in indices]) < 0.1


def test_coloured_jpegs_need_a_tolerance():
    table = np.array([BLACK, RED, GREEN, BLUE], dtype=np.uint8)
    images = [Image.fromarray(table[discs((0, 1, 2, 3), 480, seed)]) for seed in range(3)]
    masks = [encode(image, "JPEG", quality=85, subsampling=0) for image in images]
    proposal = propose(survey_of(*masks))
    assert {"--tolerance", "--unknown"} < set(proposal.flags)
    indices, names = read_all(proposal, masks)
    assert names[0] == "background"
    assert set(names[1:]) == {"red", "green", "blue"}
    assert np.mean(indices[0] == IGNORE) < 0.1


def photograph(seed, shape=(64, 64, 3)):
    noise = np.random.default_rng(seed).normal(0, 12, shape)
    ramp = np.linspace(0, 200, shape[0])[(slice(None),) + (None,) * (len(shape) - 1)]
    return (ramp + noise + 30).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_photographs_are_no_masks(form):
    for shape in ((64, 64, 3), (64, 64)):
        masks = [encode(Image.fromarray(photograph(seed, shape)), form) for seed in range(3)]
        assert refused(masks)


def test_photographs_with_a_palette_are_no_masks():
    image = Image.fromarray(photograph(0)).quantize(256)
    assert "photographs" in refused([encode(image)])


def test_labels_of_single_objects_are_no_classes():
    rng = np.random.default_rng(0)
    masks = [deep(np.minimum(np.arange(int(n)), 900)) for n in rng.integers(200, 900, 5)]
    assert "labels of single objects" in refused(masks)


def test_rare_labels_of_single_objects_are_no_soft_edges():
    rng = np.random.default_rng(0)
    masks = [
        grey(np.repeat([0, *rng.choice(256, 30)], [2000, *rng.integers(5, 9, 30)]))
        for _ in range(20)
    ]
    assert refused(masks)


def test_soft_probabilities_are_no_masks():
    levels = (255 * np.random.default_rng(0).beta(0.6, 0.9, (3, 64, 64))).astype(np.uint8)
    assert "probabilities" in refused([grey(level) for level in levels])


def test_colours_beside_16_bits_are_for_people_to_settle():
    assert "others 16-bit" in refused([coloured([0, 1], BLACK, RED), deep([0, 900])])


def test_nothing_to_look_at():
    assert propose(MaskSurvey()).flags == ()


@pytest.mark.parametrize("data", [b"", b"no picture", encode(Image.new("F", (2, 2)), "TIFF")])
def test_what_no_format_can_read_is_refused(data):
    with pytest.raises(DataError, match="masks/x"):
        look(data, "masks/x", RULE)


def test_a_survey_does_not_depend_on_who_looked_at_what():
    masks = [
        *(painted([0, 1, n], (0, 0, n), (n, 0, 0), *[RED] * n) for n in range(1, 5)),
        grey([0, 9]),
        coloured(INDICES, BLACK, RED, GREEN),
    ]
    looks = [look(data, f"masks/{number}.png", RULE) for number, data in enumerate(masks)]
    whole, parted = MaskSurvey(), MaskSurvey()
    for one in looks:
        whole.merge(one)
    for some in (looks[4:], looks[1:4], looks[:1]):
        part = MaskSurvey()
        for one in some:
            part.merge(one)
        parted.merge(pickle.loads(pickle.dumps(part)))
    assert parted == whole
    assert propose(parted) == propose(whole)


def test_memory_is_bounded():
    survey = MaskSurvey()
    for seed in range(30):
        noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        survey.merge(look(encode(Image.fromarray(noise)), f"{seed}.png", RULE))
    assert len(survey.colours) <= 2 * COLOURS_OF_ALL
    assert propose(survey).flags == ()
    assert "at least" in propose(survey).why
    assert len(pickle.dumps(survey)) < 2**20


def test_the_text_is_for_people():
    masks = [coloured(INDICES, BLACK, RED, GREEN), grey([0, 0])]
    text = propose(survey_of(*masks)).text("unet pack --images 'my pictures'")
    lines = text.splitlines()
    assert lines[0] == "2 masks: 1 of mode L, 1 of mode RGB"
    assert lines[1] == "3 colours:"
    assert lines[2].split() == ["0,", "0,", "0", "6", "px", "(60", "%)"]
    assert "unet pack --images 'my pictures' --mask-format rgb --colours colours.yaml" in lines
    assert "Save as colours.yaml:\n\nbackground: [0, 0, 0]\ngreen: [0, 255, 0]\n" in text
    assert "note: the class names are placeholders" in text


def test_the_text_shows_twelve_rows_and_no_command_where_nothing_fits():
    text = propose(survey_of(deep(range(1000)))).text("unet pack")
    assert "1,000 values, the commonest 12:" in text
    assert text.count(" px ") == 12
    assert "unet pack" not in text


def test_flags_are_quoted_for_the_shell():
    assert "unet pack --classes 'a b'" in Proposal(("--classes", "a b"), "why").text("unet pack")


ENCODERS = {
    "L": grey,
    "I;16": deep,
    "RGB": lambda values: coloured(values, *[(v, v, v) for v in range(256)]),
    "P": lambda values: painted(values, *[(255 - v, v, 90) for v in range(256)]),
}


@st.composite
def index_masks(draw):
    """Files of class indices, perhaps with 255, of 2 to 30 classes."""
    top = draw(st.integers(1, 30))
    values = st.integers(0, top)
    if draw(st.booleans()):
        values |= st.just(IGNORE)
    rows = st.lists(values, min_size=1, max_size=20)
    return draw(st.lists(rows, min_size=1, max_size=6))


@given(index_masks(), st.sampled_from(sorted(ENCODERS)))
def test_every_set_of_index_masks_is_read_without_losing_a_class(files, mode):
    masks = [ENCODERS[mode](values) for values in files]
    proposal = propose(survey_of(*masks))
    assert proposal.flags
    indices, _ = read_all(proposal, masks)
    classes = {}
    for values, index in zip(files, indices, strict=True):
        for value, number in zip(values, index.ravel().tolist(), strict=True):
            assert classes.setdefault(value, number) == number
    assert len(set(classes.values())) == len(classes)


@given(st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=50), min_size=1, max_size=4))
def test_whatever_the_values_a_proposal_reads_them_all(files):
    masks = [deep(values) for values in files]
    proposal = propose(survey_of(*masks))
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
def test_whatever_the_files_a_proposal_reads_them_all(files, levels):
    masks = []
    for mode, seed in files:
        rng = np.random.default_rng(seed)
        values = rng.choice(rng.choice(256, min(levels, 255)), (8, 8)).astype(np.uint8)
        palette = rng.integers(0, 256, (256, 3), dtype=np.uint8)
        match mode:
            case "P":
                masks.append(painted(values, *palette.tolist()))
            case "RGB":
                masks.append(coloured(values, *palette.tolist()))
            case "JPEG":
                masks.append(encode(Image.fromarray(values), "JPEG"))
            case _:
                masks.append(grey(values))
    proposal = propose(survey_of(*masks))
    if proposal.flags:
        read_all(proposal, masks)
