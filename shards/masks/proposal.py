"""From the survey of undeclared masks to the flags that describe them."""

import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from math import dist

from shards.masks.formats import MAX_CLASS_COLOURS
from shards.masks.survey import MAX_ROWS, MaskSurvey, PixelValue, format_value, rank_by_count
from shards.sample import IGNORE

MAX_VALUES = 32
"""More values than these are not proposed as a list of classes."""
MAX_OBVIOUS_CLASS = 40
"""Numbers from 0 up to at most this are taken for classes, even if every fourth is missing."""
EXTREME_MARGIN = 16
"""Grey levels this close to 0 or 255 count as black or white."""
GREY_TOLERANCE, COLOUR_TOLERANCE = 10, 30
"""Maximum difference, per channel, of a pixel from its class in lossy or smoothed masks."""
MIN_PROMINENCE, RARITY = 8, 1000
"""A class has at least 8 times the pixels of an average rarer value, and 1 in 1,000 pixels."""
COLOURS_FILE = "colours.yaml"
RGB_FLAGS = ("--mask-format", "rgb", "--colours", COLOURS_FILE)
VALUES_ADVICE = (
    "are these photographs, probabilities or instance labels? Check the folder of the masks; "
    "--mask-format binary with --mask-threshold 128 thresholds probabilities, with 1 it makes all "
    "instances one class; --mask-format index reads each value as a class"
)
COLOURS_ADVICE = (
    "are these photographs, or instances in different colours? Check the folder of the masks, or "
    "list the colours of the classes with --mask-format rgb --colours"
)
MIXED_ADVICE = (
    "some are in colour, others are 16-bit or lack palette colours; save all in one format"
)
RENAME_NOTE = "the class names are placeholders: rename them; `background` is excluded from means"
CORNERS = ("black", "blue", "green", "cyan", "red", "magenta", "yellow", "white")
COLOUR_NAMES: dict[str, PixelValue] = dict(zip(CORNERS, product((0, 255), repeat=3), strict=True))

COLOUR_NAMES |= {"grey": (128, 128, 128), "orange": (255, 128, 0), "brown": (130, 75, 30)}


@dataclass(frozen=True, slots=True)
class Proposal:
    """Flags that read every surveyed mask, for the user to confirm."""

    flags: tuple[str, ...]
    """Empty if no format fits."""
    why: str
    """The reason in one line; without flags, also the remedy."""
    table: str = ""
    """YAML `name: [r, g, b]`: the content of the file for --colours."""
    notes: tuple[str, ...] = ()
    """Questions that only the user can answer."""
    survey: str = ""
    """Description of the masks."""

    def text(self, command: str) -> str:
        """Return the text to print: survey, reason, command line with flags, table and notes."""
        parts = [self.survey, self.why]
        if self.flags:
            parts.append(f"{command} {shlex.join(self.flags)}")
        if self.table:
            parts.append(f"Save as {COLOURS_FILE}:\n\n{self.table.rstrip()}")
        parts += [f"note: {note}" for note in self.notes]
        return "\n\n".join(part for part in parts if part)


def propose_flags(survey: MaskSurvey) -> Proposal:
    """Propose the flags that read all masks of a survey, or explain why there are none."""
    if survey.num_files == 0:
        return Proposal((), "there are no masks; check the folder of the masks")
    by_value = (propose_binary, propose_threshold, propose_index, propose_values)
    rules = (
        *(by_value if not survey.needs_colours else ()),
        propose_colours,
        propose_tolerance,
        explain_no_fit,
    )
    proposal = next(proposal for rule in rules if (proposal := rule(survey)))
    return replace(proposal, survey=survey.describe())


def propose_binary(survey: MaskSurvey) -> Proposal | None:
    """Propose `binary` for 0 and one other value, which may differ between modes."""
    others = [mode for mode, value in survey.values if value]
    if survey.lossy or len(others) > len(set(others)):
        return None
    why = "every mask has 0 and at most one other value, which is the same within a mode"
    if survey.palette_is_inverted:
        note = (
            "index 0 is white and becomes the foreground; if black is the foreground, drop --invert"
        )
        return Proposal(("--mask-format", "binary", "--invert"), why, notes=(note,))
    rarer = 2 * survey.count_pixels(0, 0) < survey.num_pixels
    note = "0 is the rarer value: if it marks the foreground, add --invert"
    return Proposal(("--mask-format", "binary"), why, notes=(note,) * rarer)


def propose_threshold(survey: MaskSurvey) -> Proposal | None:
    """Propose a threshold for grey levels that are nearly all black or white (soft or lossy)."""
    # Class indices with 255 as ignore value leave a gap below 255.
    levels_below_white = survey.count_pixels(255 - EXTREME_MARGIN, 254)
    soft = len(survey.value_counts) > MAX_VALUES and levels_below_white > 0
    if survey.has_colours or survey.colourless or not (soft or survey.lossy):
        return None
    white = survey.count_pixels(255 - EXTREME_MARGIN, 255)
    between = survey.count_pixels(EXTREME_MARGIN + 1, 254 - EXTREME_MARGIN)
    if white == 0 or between > min(white, survey.num_pixels // 10):
        return None
    why = f"the masks have {survey.summary}, nearly all near 0 and 255"
    note = f"{survey.format_share(between)} are near neither; values >= 128 become foreground"
    return Proposal(("--mask-format", "binary", "--mask-threshold", "128"), why, notes=(note,))


def propose_index(survey: MaskSurvey) -> Proposal | None:
    """Propose `index` or `palette` if values or palette indices are classes, 255 perhaps ignore."""
    values = {value for _, value in survey.values} - {IGNORE}
    if survey.lossy or not are_class_indices(survey, values):
        return None
    max_index = max(values)
    is_palette = survey.modes.keys() == {"P"} and max_index < survey.min_palette_size
    kind = "palette" if is_palette else "index"
    flags = ("--mask-format", kind, "--classes", *(f"class_{i}" for i in range(max_index + 1)))
    notes = [RENAME_NOTE]
    if ignored := survey.count_pixels(IGNORE, IGNORE):
        flags += ("--ignore-value", str(IGNORE))
        note = "is ignored; if it is a class, or the foreground of some files: --mask-format values"
        notes.append(f"255 ({survey.format_share(ignored)}) {note}")
    if max_index > MAX_ROWS:
        notes.append("if these are instance labels: --mask-format binary --mask-threshold 1")
    why = f"the masks have values from 0 to {max_index}" + " and 255" * (ignored > 0)
    return Proposal(flags, why, notes=tuple(notes))


def are_class_indices(survey: MaskSurvey, values: set[int]) -> bool:
    """Return whether values look like class indices, not like grey levels or instance labels."""
    max_value = max(values, default=0)
    if 0 not in values or not 0 < max_value < IGNORE:
        return False
    if max_value <= MAX_OBVIOUS_CLASS:
        return 4 * len(values) >= 3 * (max_value + 1)
    # A photograph has most grey levels; a mask has few of many classes.
    few = 2 * survey.num_values <= survey.num_files * (max_value + 1)
    return len(values) == max_value + 1 and few


def propose_values(survey: MaskSurvey) -> Proposal | None:
    """Propose `values` for a few arbitrary values."""
    values = {value for (value,) in survey.value_counts}
    if survey.lossy or len(values) > MAX_VALUES:
        return None
    counts = survey.value_counts
    stray = {value for value in values if counts[value,] * RARITY < survey.num_pixels}
    notes = [RENAME_NOTE]
    if IGNORE in values - stray:
        notes.append(
            "if 255 marks pixels to ignore, remove it from both lists and add --ignore-value 255"
        )
    flags = value_flags(values - stray)
    if stray:
        flags += ("--unknown", "ignore")
        share = survey.format_share(sum(counts[value,] for value in stray))
        notes.append(
            f"rare values are ignored, {share}: {' '.join(map(str, sorted(stray)))}; if one is a "
            "class, add it to both lists"
        )
    return Proposal(flags, f"the masks have {survey.summary}", notes=tuple(notes))


def propose_colours(survey: MaskSurvey) -> Proposal | None:
    """Propose `rgb` for a few colours, each of which is a class."""
    counts = survey.colour_counts
    exact = not survey.lossy and counts.total() == survey.num_pixels
    if not survey.has_colours or not exact or not 2 <= len(counts) <= MAX_CLASS_COLOURS:
        return None
    rare = [pixels for pixels in counts.values() if pixels * RARITY < survey.num_pixels]
    note = (
        f"{len(rare)} of the colours are rare, {survey.format_share(sum(rare))} together: if they "
        "are edges, not classes, remove them from the table and add --unknown ignore"
    )
    notes = (RENAME_NOTE, *(note,) * bool(rare))
    table = format_colour_table(colour for colour, _ in rank_by_count(counts))
    return Proposal(RGB_FLAGS, f"the masks have {len(counts)} colours", table, notes)


def propose_tolerance(survey: MaskSurvey) -> Proposal | None:
    """Propose a tolerance for a few values or colours with soft edges or in lossy files."""
    grey = not survey.has_colours
    counts, tolerance = (
        (survey.value_counts, GREY_TOLERANCE) if grey else (survey.colour_counts, COLOUR_TOLERANCE)
    )
    entries, num_kept = find_classes(counts, tolerance)
    num_ignored = survey.num_pixels - num_kept
    if survey.colourless or len(entries) < 2 or 10 * num_ignored > survey.num_pixels:
        return None
    flags = ("--tolerance", str(tolerance), *("--unknown", "ignore") * (num_ignored > 0))
    why = f"the masks have {survey.summary}, nearly all pixels near {len(entries)} of them"
    note = (
        f"{survey.format_share(num_ignored)} are ignored: soft edges, noise, perhaps a rare class"
    )
    format_flags = value_flags(value for (value,) in entries) if grey else RGB_FLAGS
    table = "" if grey else format_colour_table(entries)
    return Proposal(format_flags + flags, why, table, (RENAME_NOTE, note))


def find_classes(counts: Counter[PixelValue], tolerance: int) -> tuple[list[PixelValue], int]:
    """Return the most common values more than 2 x tolerance apart, and the pixels near them.

    Edges and noise are many rare values: the search stops at the first that is not prominent.
    """
    classes: list[PixelValue] = []
    num_rarer, pixels_rarer = len(counts), counts.total()
    min_pixels = pixels_rarer / RARITY
    for value, pixels in rank_by_count(counts):
        num_rarer, pixels_rarer = num_rarer - 1, pixels_rarer - pixels
        prominent = pixels * num_rarer >= MIN_PROMINENCE * pixels_rarer
        if len(classes) == MAX_VALUES or pixels < min_pixels or not prominent:
            break
        if not is_near(value, classes, 2 * tolerance):
            classes.append(value)
    return classes, sum(n for value, n in counts.items() if is_near(value, classes, tolerance))


def is_near(value: PixelValue, others: Iterable[PixelValue], tolerance: int) -> bool:
    """Return whether a value is within the tolerance of one of the others, in each channel."""
    return any(
        all(abs(a - b) <= tolerance for a, b in zip(value, other, strict=True)) for other in others
    )


def explain_no_fit(survey: MaskSurvey) -> Proposal:
    """Return a proposal without flags that suggests what the files may be."""
    by_colour = MIXED_ADVICE if survey.colourless else COLOURS_ADVICE
    advice = by_colour if survey.needs_colours else VALUES_ADVICE
    return Proposal((), f"the masks have {survey.summary}: {advice}")


def value_flags(values: Iterable[int]) -> tuple[str, ...]:
    """Return the flags of the format `values`."""
    words = [str(value) for value in sorted(values)]
    names = [f"class_{word}" for word in words]
    return ("--mask-format", "values", "--mask-values", *words, "--classes", *names)


def format_colour_table(colours: Iterable[PixelValue]) -> str:
    """Format as YAML with a name for each colour: black first, as background, then in order."""
    times_used = Counter[str]()
    lines = []
    for colour in sorted(colours, key=lambda colour: name_colour(colour) != "black"):
        name = name_colour(colour)
        times_used[name] += 1
        name += f"_{times_used[name]}" * (times_used[name] > 1)
        lines.append(f"{name}: [{format_value(colour)}]\n")
    return "".join(lines).replace("black:", "background:")


def name_colour(colour: PixelValue) -> str:
    """Return the English name of the nearest named colour, or `transparent`."""
    if colour[3:] == (0,):
        return "transparent"
    return min(COLOUR_NAMES, key=lambda name: dist(colour[:3], COLOUR_NAMES[name]))
