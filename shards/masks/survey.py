"""A survey of masks in an undeclared format, and the flags proposed to read all of them."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from shards.images.files import ImageRule, open_image
from shards.images.tiff import GREY16_MODES
from shards.masks.counts import count_colours, count_pixel_values
from shards.masks.palettes import read_palette
from shards.masks.stored import describe_loss, load_mask
from shards.sample import Colour, DataError

PixelValue = tuple[int, ...]
"""(value,), (R, G, B), or (R, G, B, A) if some pixels are transparent."""
MAX_COLOURS_PER_FILE = 512
MAX_COLOURS = 4096
"""Colours that are kept, the most common: photographs have hundreds of thousands."""
MAX_ROWS = 12


@dataclass(kw_only=True, slots=True)
class MaskSurvey:
    """Statistics of masks, in bounded memory; those of several workers can be merged."""

    num_files: int = 0
    num_pixels: int = 0
    num_values: int = 0
    """Number of distinct values in each file, summed over files."""
    modes: Counter[str] = field(default_factory=Counter)
    """Files of each mode."""
    lossy: bool = False
    """Whether any file is in a lossy format."""
    transparent: bool = False
    """Whether alpha varies within any file."""
    colourless: bool = False
    """Whether any file cannot be read by colour: 16 bits, or an index without a palette colour."""
    values: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Pixels of each mode and stored value, in files that are not in colour."""
    colours: Counter[PixelValue] = field(default_factory=Counter)
    """Pixels of each colour (R, G, B, A), for the most common colours."""
    palette: dict[int, Colour | None] = field(default_factory=dict)
    """Colour of each palette index, None if files differ."""
    min_palette_size: int = 256
    """Number of colours in the shortest palette."""

    def merge(self, other: "MaskSurvey") -> None:
        """Add the statistics of another survey."""
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
        self.min_palette_size = min(self.min_palette_size, other.min_palette_size)
        # Twice as many may accumulate, so that they are rarely sorted.
        if len(self.colours) > 2 * MAX_COLOURS:
            self.colours = Counter(dict(rank_by_count(self.colours)[:MAX_COLOURS]))

    @property
    def palettes_conflict(self) -> bool:
        """Whether a palette index in use has different colours in different files."""
        return any(m == "P" and self.palette.get(v, ()) is None for m, v in self.values)

    @property
    def palette_is_inverted(self) -> bool:
        """Whether palettes have white at index 0 and black at the only other index in use."""
        used = sorted({0, *(value for mode, value in self.values if mode == "P")})
        return [self.palette.get(index) for index in used] == [(255, 255, 255), (0, 0, 0)]

    @property
    def needs_colours(self) -> bool:
        """Whether the stored values do not identify classes, or some file is in colour."""
        coloured = self.values.total() < self.num_pixels
        return (
            coloured or self.palettes_conflict or (self.palette_is_inverted and len(self.modes) > 1)
        )

    @property
    def has_colours(self) -> bool:
        """Whether some files have colours or palette indices rather than grey levels."""
        return self.needs_colours or bool(self.modes.keys() & {"1", "P"})

    @property
    def value_counts(self) -> Counter[PixelValue]:
        """Pixels of each stored value, over all modes."""
        counts = Counter[PixelValue]()
        for (_, value), pixels in self.values.items():
            counts[value,] += pixels
        return counts

    @property
    def colour_counts(self) -> Counter[PixelValue]:
        """Pixels of each colour, without alpha unless it varies."""
        counts = Counter[PixelValue]()
        for colour, pixels in self.colours.items():
            counts[colour if self.transparent else colour[:3]] += pixels
        return counts

    @property
    def summary(self) -> str:
        """`5 values`, `3 colours`, `at least 512 colours`."""
        if not self.needs_colours:
            return f"{len(self.value_counts):,} values"
        at_least = "at least " * (self.colours.total() < self.num_pixels)
        return f"{at_least}{len(self.colour_counts):,} colours"

    def count_pixels(self, low: int, high: int) -> int:
        """Count the pixels with values from `low` to `high`, both included."""
        return sum(n for (_, value), n in self.values.items() if low <= value <= high)

    def format_share(self, pixels: int) -> str:
        """Format as `1,234 px (5.6 %)`."""
        return f"{pixels:,} px ({100 * pixels / self.num_pixels:.3g} %)"

    def describe(self) -> str:
        """Return lines with the number of files, their modes and the most common values."""
        modes = ", ".join(f"{files:,} of mode {mode}" for mode, files in sorted(self.modes.items()))
        rows = rank_by_count(self.colour_counts if self.needs_colours else self.value_counts)
        top = f", the {MAX_ROWS} most common:" if len(rows) > MAX_ROWS else ":"
        table = [
            f"{format_value(value):>20} {self.format_share(n):>28}" for value, n in rows[:MAX_ROWS]
        ]
        return "\n".join([f"{self.num_files:,} masks: {modes}", self.summary + top, *table])


def survey_mask(data: bytes, where: str, rule: ImageRule) -> MaskSurvey:
    """Survey one mask file. Raises DataError if no mask format can read it."""
    opened = open_image(data, where, rule)
    lossy = describe_loss(opened, data) is not None
    stored = load_mask(opened, where, rule.exif)
    image = stored.image
    try:
        counts = count_pixel_values(stored.read_values(where))
    except DataError:
        if image.mode not in ("RGB", "RGBA", "LA"):
            raise
        counts = np.zeros(0, dtype=np.int64)
    values = np.flatnonzero(counts).tolist()
    survey = MaskSurvey(
        num_files=1,
        num_pixels=image.width * image.height,
        num_values=len(values),
        modes=Counter((image.mode,)),
        lossy=lossy,
        values=Counter({(image.mode, value): int(counts[value]) for value in values}),
    )
    if image.mode == "P":
        survey.palette = dict(enumerate(read_palette(image)))
        survey.min_palette_size = len(survey.palette)
    survey.colourless = (
        image.mode in GREY16_MODES or max(values, default=0) >= survey.min_palette_size
    )
    if not survey.colourless:
        colours, counts, *_ = count_colours(image, "RGBA")
        survey.transparent = bool((colours[:, 3] != colours[0, 3]).any())
        kept = np.argsort(-counts, kind="stable")[:MAX_COLOURS_PER_FILE]
        survey.colours.update({tuple(colours[i].tolist()): int(counts[i]) for i in kept})
    return survey


def format_value(value: PixelValue) -> str:
    """Format as `255, 0, 0`."""
    return ", ".join(map(str, value))


def rank_by_count(counts: Counter[PixelValue]) -> list[tuple[PixelValue, int]]:
    """Sort by count, the highest first; ties by value, so that the order is deterministic."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
