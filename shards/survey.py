"""Masks of an undeclared format: a look at every file, and the flags that would read them all."""

import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import product
from math import dist

import numpy as np

from shards.images import DEEP_MODES, ImageRule, load, open_image
from shards.masks import LOSSY, MANY_COLOURS, count_colours, count_values, mask_values, palette_of
from shards.sample import IGNORE, Colour, DataError

Shade = tuple[int, ...]
"""(value,), (R, G, B), or (R, G, B, A) where some pixels are transparent."""

COLOURS_OF_A_FILE = 512
COLOURS_OF_ALL = 4096
"""Colours that are remembered, the commonest: photographs hold hundreds of thousands."""

MOST_VALUES = 32
"""More values than these are no list that a person would write down."""

CLASSES_AT_SIGHT = 40
"""Numbers from 0 up to here are believed to be classes, with every fourth unused."""

END = 16
"""So far from 0 and 255 a level of grey still is black or white."""

NEAR_GREY, NEAR_COLOUR = 10, 30
"""So far from a class, in each channel, a pixel of a lossy or smoothed mask still belongs to it."""

STANDS_OUT, RARE = 8, 1000
"""A class has 8 times the pixels of an average rarer value or colour, and one pixel in 1,000."""

MOST_ROWS = 12
COLOURS_FILE = "colours.yaml"
BY_COLOUR = ("--mask-format", "rgb", "--colours", COLOURS_FILE)
OF_VALUES = (
    "photographs, probabilities or labels of single objects? Name the folder of the masks; "
    "--mask-format binary with --mask-threshold 128 cuts probabilities, with 1 it makes all "
    "objects one class; --mask-format index takes each number as a class"
)
OF_COLOURS = (
    "photographs, or a colour for each object? Name the folder of the masks, or list the colours "
    "of the classes in --mask-format rgb --colours"
)
UNLIKE = "some are in colour, others 16-bit or without a colour for an index; save them alike"
RENAME = "the class names are placeholders: rename them; `background` enters no mean score"

CORNERS = ("black", "blue", "green", "cyan", "red", "magenta", "yellow", "white")
WORDS: dict[str, Shade] = dict(zip(CORNERS, product((0, 255), repeat=3), strict=True))
WORDS |= {"grey": (128, 128, 128), "orange": (255, 128, 0), "brown": (130, 75, 30)}


@dataclass(kw_only=True, slots=True)
class MaskSurvey:
    """What masks hold, in bounded memory; workers return theirs to be merged."""

    num_files: int = 0
    num_pixels: int = 0
    num_values: int = 0
    """Distinct values of each file, summed."""
    modes: Counter[str] = field(default_factory=Counter)
    """Files of each mode."""
    lossy: bool = False
    """Whether some file's values are near what was drawn, not equal to it."""
    transparent: bool = False
    """Whether pixels of one file differ in their alpha."""
    colourless: bool = False
    """Whether some file cannot go by colour: 16 bits, or an index that its palette lacks."""
    values: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Pixels of each mode and stored value, of files that are not in colour."""
    colours: Counter[Shade] = field(default_factory=Counter)
    """Pixels of each colour (R, G, B, A), the commonest ones."""
    palette: dict[int, Colour | None] = field(default_factory=dict)
    """The colour of each palette index, None where files differ."""
    shortest: int = 256
    """Colours of the shortest palette."""

    def merge(self, other: "MaskSurvey") -> None:
        """Count in what another survey counted."""
        self.num_files += other.num_files
        self.num_pixels += other.num_pixels
        self.num_values += other.num_values
        self.modes.update(other.modes)
        self.lossy |= other.lossy
        self.transparent |= other.transparent
        self.colourless |= other.colourless
        self.values.update(other.values)
        self.colours.update(other.colours)
        for index, colour in other.palette.items():
            same = self.palette.get(index, colour) == colour
            self.palette[index] = colour if same else None
        self.shortest = min(self.shortest, other.shortest)
        # Twice as many may gather, so that sorting them is rare.
        if len(self.colours) > 2 * COLOURS_OF_ALL:
            self.colours = Counter(dict(commonest(self.colours)[:COLOURS_OF_ALL]))

    @property
    def repainted(self) -> bool:
        """Whether a palette index in use has another colour in another file."""
        return any(m == "P" and self.palette.get(v, ()) is None for m, v in self.values)

    @property
    def inverted(self) -> bool:
        """Whether palettes show index 0 in white and the only other one in use in black."""
        used = sorted({0, *(value for mode, value in self.values if mode == "P")})
        return [self.palette.get(index) for index in used] == [(255, 255, 255), (0, 0, 0)]

    @property
    def by_colour(self) -> bool:
        """Whether the stored values do not tell classes apart, or are none in some file."""
        coloured = self.values.total() < self.num_pixels
        return coloured or self.repainted or (self.inverted and len(self.modes) > 1)

    @property
    def has_colours(self) -> bool:
        """Whether some files hold colours or their numbers rather than levels of grey."""
        return self.by_colour or bool(self.modes.keys() & {"1", "P"})

    @property
    def levels(self) -> Counter[Shade]:
        """Pixels of each stored value."""
        levels = Counter[Shade]()
        for (_, value), pixels in self.values.items():
            levels[value,] += pixels
        return levels

    @property
    def shades(self) -> Counter[Shade]:
        """Pixels of each colour, with alpha only where it says something."""
        shades = Counter[Shade]()
        for colour, pixels in self.colours.items():
            shades[colour if self.transparent else colour[:3]] += pixels
        return shades

    @property
    def found(self) -> str:
        """`5 values`, `3 colours`, `at least 512 colours`."""
        if not self.by_colour:
            return f"{len(self.levels):,} values"
        least = "at least " * (self.colours.total() < self.num_pixels)
        return f"{least}{len(self.shades):,} colours"

    def pixels_of(self, low: int, high: int) -> int:
        """Pixels of the values from low to high."""
        return sum(n for (_, value), n in self.values.items() if low <= value <= high)

    def share(self, pixels: int) -> str:
        """`1,234 px (5.6 %)`."""
        return f"{pixels:,} px ({100 * pixels / self.num_pixels:.3g} %)"

    def describe(self) -> str:
        """Files, modes, and the commonest values or colours, a line each."""
        modes = ", ".join(f"{files:,} of mode {mode}" for mode, files in sorted(self.modes.items()))
        rows = commonest(self.shades if self.by_colour else self.levels)
        top = f", the commonest {MOST_ROWS}:" if len(rows) > MOST_ROWS else ":"
        table = [f"{listed(shade):>20} {self.share(n):>28}" for shade, n in rows[:MOST_ROWS]]
        return "\n".join([f"{self.num_files:,} masks: {modes}", self.found + top, *table])


def look(data: bytes, where: str, rule: ImageRule) -> MaskSurvey:
    """The survey of one mask file. Raises DataError for what no mask format can read."""
    opened = open_image(data, where, rule)
    lossy = opened.format in LOSSY
    image, _ = load(opened, where, rule.exif)
    try:
        pixels = count_values(mask_values(image, where))
    except DataError:
        if image.mode not in ("RGB", "RGBA", "LA"):
            raise
        pixels = np.zeros(0, dtype=np.int64)
    values = np.flatnonzero(pixels).tolist()
    found = MaskSurvey(
        num_files=1,
        num_pixels=image.width * image.height,
        num_values=len(values),
        modes=Counter((image.mode,)),
        lossy=lossy,
        values=Counter({(image.mode, value): int(pixels[value]) for value in values}),
    )
    if image.mode == "P":
        found.palette = dict(enumerate(palette_of(image)))
        found.shortest = len(found.palette)
    found.colourless = image.mode in DEEP_MODES or max(values, default=0) >= found.shortest
    if not found.colourless:
        colours, counts, *_ = count_colours(image, "RGBA")
        found.transparent = bool((colours[:, 3] != colours[0, 3]).any())
        kept = np.argsort(-counts, kind="stable")[:COLOURS_OF_A_FILE]
        found.colours.update({tuple(colours[i].tolist()): int(counts[i]) for i in kept})
    return found


def listed(shade: Shade) -> str:
    """`255, 0, 0`."""
    return ", ".join(map(str, shade))


def commonest(counts: Counter[Shade]) -> list[tuple[Shade, int]]:
    """The commonest first; of equal ones the smallest, whatever the order of the work."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


@dataclass(frozen=True, slots=True)
class Proposal:
    """Flags that read every mask that was looked at; a person decides."""

    flags: tuple[str, ...]
    """None where nothing fits."""
    why: str
    """One line: what was found, and without flags what to do."""
    table: str = ""
    """YAML `name: [r, g, b]`, the file that --colours names."""
    notes: tuple[str, ...] = ()
    """What only a person can know."""
    finding: str = ""

    def text(self, command: str) -> str:
        """What people see: the finding, the command line to paste, its table, the notes."""
        parts = [self.finding, self.why]
        if self.flags:
            parts.append(f"{command} {shlex.join(self.flags)}")
        if self.table:
            parts.append(f"Save as {COLOURS_FILE}:\n\n{self.table.rstrip()}")
        parts += [f"note: {note}" for note in self.notes]
        return "\n\n".join(part for part in parts if part)


def propose(survey: MaskSurvey) -> Proposal:
    """The flags by which all masks of a survey are read, or why there are none."""
    if survey.num_files == 0:
        return Proposal((), "there are no masks to look at; name the folder that holds them")
    by_value = (propose_binary, propose_threshold, propose_index, propose_values)
    rules = (*(by_value if not survey.by_colour else ()), propose_table, propose_near, refuse)
    found = next(proposal for rule in rules if (proposal := rule(survey)))
    return replace(found, finding=survey.describe())


def propose_binary(survey: MaskSurvey) -> Proposal | None:
    """0 and one other value, which may differ from mode to mode."""
    others = [mode for mode, value in survey.values if value]
    if survey.lossy or len(others) > len(set(others)):
        return None
    why = "every mask holds 0 and at most one other value, the same one within a mode"
    if survey.inverted:
        note = "index 0 is shown in white, which becomes the foreground; if black is, drop --invert"
        return Proposal(("--mask-format", "binary", "--invert"), why, notes=(note,))
    rarer = 2 * survey.pixels_of(0, 0) < survey.num_pixels
    note = "0 is the rarer value: if it marks the foreground, add --invert"
    return Proposal(("--mask-format", "binary"), why, notes=(note,) * rarer)


def propose_threshold(survey: MaskSurvey) -> Proposal | None:
    """Many levels of grey, nearly all black or white: soft edges, or lossy files."""
    # Classes with 255 to be ignored do not run up to it.
    soft = len(survey.levels) > MOST_VALUES and survey.pixels_of(255 - END, 254) > 0
    if survey.has_colours or survey.colourless or not (soft or survey.lossy):
        return None
    white, between = survey.pixels_of(255 - END, 255), survey.pixels_of(END + 1, 254 - END)
    if white == 0 or between > min(white, survey.num_pixels // 10):
        return None
    why = f"the masks hold {survey.found}, nearly all near 0 and 255"
    note = f"{survey.share(between)} are near neither; 128 and more is foreground"
    return Proposal(("--mask-format", "binary", "--mask-threshold", "128"), why, notes=(note,))


def propose_index(survey: MaskSurvey) -> Proposal | None:
    """The value or palette index is the class, 255 perhaps to be ignored."""
    numbers = {value for _, value in survey.values} - {IGNORE}
    if survey.lossy or not are_classes(survey, numbers):
        return None
    top = max(numbers)
    kind = "palette" if survey.modes.keys() == {"P"} and top < survey.shortest else "index"
    flags = ("--mask-format", kind, "--classes", *(f"class_{i}" for i in range(top + 1)))
    notes = [RENAME]
    if ignored := survey.pixels_of(IGNORE, IGNORE):
        flags += ("--ignore-value", str(IGNORE))
        note = "is ignored; if it is a class, or the foreground of some files: --mask-format values"
        notes.append(f"255 ({survey.share(ignored)}) {note}")
    if top > MOST_ROWS:
        notes.append("if the numbers are single objects: --mask-format binary --mask-threshold 1")
    why = f"the masks hold values from 0 to {top}" + " and 255" * (ignored > 0)
    return Proposal(flags, why, notes=tuple(notes))


def are_classes(survey: MaskSurvey, numbers: set[int]) -> bool:
    """Whether numbers look like classes, not like levels of grey or single objects."""
    top = max(numbers, default=0)
    if 0 not in numbers or not 0 < top < IGNORE:
        return False
    if top <= CLASSES_AT_SIGHT:
        return 4 * len(numbers) >= 3 * (top + 1)
    # A photograph holds most levels; a mask holds few of many classes.
    few = 2 * survey.num_values <= survey.num_files * (top + 1)
    return len(numbers) == top + 1 and few


def propose_values(survey: MaskSurvey) -> Proposal | None:
    """A few values, whatever they are."""
    values = {value for (value,) in survey.levels}
    if survey.lossy or len(values) > MOST_VALUES:
        return None
    note = "255 may be pixels to ignore: then take it out of the lists, and add --ignore-value 255"
    notes = (RENAME, *(note,) * (IGNORE in values))
    return Proposal(value_flags(values), f"the masks hold {survey.found}", notes=notes)


def propose_table(survey: MaskSurvey) -> Proposal | None:
    """A few colours, each a class."""
    shades = survey.shades
    exact = not survey.lossy and shades.total() == survey.num_pixels
    if not survey.has_colours or not exact or not 2 <= len(shades) <= MANY_COLOURS:
        return None
    rare = [pixels for pixels in shades.values() if pixels * RARE < survey.num_pixels]
    note = (
        f"{len(rare)} of the colours are rare, {survey.share(sum(rare))} together: if they are "
        "edges, not classes, take them out of the table and add --unknown ignore"
    )
    notes = (RENAME, *(note,) * bool(rare))
    table = colour_table(shade for shade, _ in commonest(shades))
    return Proposal(BY_COLOUR, f"the masks hold {len(shades)} colours", table, notes)


def propose_near(survey: MaskSurvey) -> Proposal | None:
    """A few values or colours, and what lies round them: soft edges, or lossy files."""
    greys = not survey.has_colours
    counts, tolerance = (survey.levels, NEAR_GREY) if greys else (survey.shades, NEAR_COLOUR)
    entries, kept = find_classes(counts, tolerance)
    lost = survey.num_pixels - kept
    if survey.colourless or len(entries) < 2 or 10 * lost > survey.num_pixels:
        return None
    flags = ("--tolerance", str(tolerance), *("--unknown", "ignore") * (lost > 0))
    why = f"the masks hold {survey.found}, nearly all pixels near {len(entries)} of them"
    note = f"{survey.share(lost)} are ignored: soft edges, noise, perhaps a rare class"
    form = value_flags(value for (value,) in entries) if greys else BY_COLOUR
    return Proposal(form + flags, why, "" if greys else colour_table(entries), (RENAME, note))


def find_classes(counts: Counter[Shade], tolerance: int) -> tuple[list[Shade], int]:
    """The commonest that are more than twice the tolerance apart, and the pixels near them.

    Edges and noise are many rare ones: the search ends at the first that does not stand out.
    """
    found: list[Shade] = []
    rarer, left = len(counts), counts.total()
    least = left / RARE
    for shade, pixels in commonest(counts):
        rarer, left = rarer - 1, left - pixels
        if len(found) == MOST_VALUES or pixels < least or pixels * rarer < STANDS_OUT * left:
            break
        if not is_near(shade, found, 2 * tolerance):
            found.append(shade)
    return found, sum(n for shade, n in counts.items() if is_near(shade, found, tolerance))


def is_near(shade: Shade, others: Iterable[Shade], tolerance: int) -> bool:
    """Whether a shade is within the tolerance of one of the others, in each channel."""
    return any(
        all(abs(a - b) <= tolerance for a, b in zip(shade, other, strict=True)) for other in others
    )


def refuse(survey: MaskSurvey) -> Proposal:
    """No flags; what the files seem to be."""
    why = (UNLIKE if survey.colourless else OF_COLOURS) if survey.by_colour else OF_VALUES
    return Proposal((), f"the masks hold {survey.found}: {why}")


def value_flags(found: Iterable[int]) -> tuple[str, ...]:
    """The flags of the format `values`."""
    values = [str(value) for value in sorted(found)]
    names = [f"class_{value}" for value in values]
    return ("--mask-format", "values", "--mask-values", *values, "--classes", *names)


def colour_table(shades: Iterable[Shade]) -> str:
    """YAML: a name for each colour, black first as the background, the others in their order."""
    seen = Counter[str]()
    lines = []
    for shade in sorted(shades, key=lambda shade: colour_word(shade) != "black"):
        name = colour_word(shade)
        seen[name] += 1
        name += f"_{seen[name]}" * (seen[name] > 1)
        lines.append(f"{name}: [{listed(shade)}]\n")
    return "".join(lines).replace("black:", "background:")


def colour_word(shade: Shade) -> str:
    """A rough English word."""
    if shade[3:] == (0,):
        return "transparent"
    return min(WORDS, key=lambda word: dist(shade[:3], WORDS[word]))
