"""The report as HTML: numbers in, markup out. No script, no network, light and dark.

Everything that is text is escaped: names of classes, keys and paths may be anything.
"""

from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from pipelines.reporting.charts import Chart, Series, draw_chart, draw_confusion, draw_spark
from shards.sample import Colour

TEMPLATE = "report.html.j2"
MOST_CLASSES = 32
"""Classes that a confusion matrix is drawn for."""


@dataclass(frozen=True, slots=True)
class Row:
    """A class, or a mean over classes, in the table of scores."""

    name: str
    cells: tuple[str, ...]
    """One for each column, or for the first few."""
    history: Series | None = None
    colour: Colour | None = None
    note: str = ""
    is_mean: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """The scores of classes, then their means."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Strip:
    """One image: itself, truth, prediction, difference."""

    key: str
    dice: float
    sources: tuple[str, ...]
    """data: URIs."""
    small: bool
    """So few pixels that each should be seen when it is drawn larger."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Images under a heading."""

    title: str
    strips: tuple[Strip, ...]


@dataclass(frozen=True, slots=True)
class Swatch:
    """What a colour means."""

    name: str
    colour: Colour


@dataclass(frozen=True, slots=True)
class Report:
    """All that the page shows. What is empty has no section."""

    title: str
    subtitle: str
    verdict: str
    notes: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    table: Table | None = None
    classes: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    """Pixels, [true class][predicted class]."""
    galleries: tuple[Gallery, ...] = ()
    gallery_note: str = ""
    legends: tuple[tuple[Swatch, ...], ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    config: tuple[str, ...] = ()
    """Its parts."""
    commands: tuple[tuple[str, str], ...] = ()
    """What it does, and the command."""


def render(report: Report) -> str:
    """The page, the same for the same report."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {
        "draw_chart": draw_chart,
        "draw_spark": draw_spark,
        "draw_confusion": draw_confusion,
        "colour": css_colour,
    }
    source = files("pipelines.reporting").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(report=report) + "\n"


def css_colour(colour: Colour) -> str:
    """As CSS writes it."""
    return f"rgb({colour[0]} {colour[1]} {colour[2]})"
