"""The report as one HTML page: no scripts, no network, light and dark.

All text is escaped, since class names, keys and paths are arbitrary.
"""

from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined

from pipelines.reporting.charts import (
    Chart,
    Plot,
    Series,
    draw_chart,
    draw_confusion,
    draw_plot,
    draw_scatter,
    draw_spark,
)
from shards.sample import Colour
from shards.text import escape_text

TEMPLATE = "report.html.j2"
MAX_CLASSES = 32
"""Maximum number of classes for which a confusion matrix is drawn."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table of scores: a class, or a mean over classes."""

    name: str
    cells: tuple[str, ...]
    """One per column; may be fewer than there are columns."""
    history: Series | None = None
    colour: Colour | None = None
    note: str = ""
    is_mean: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Table of scores: classes, then means."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    head: str = "Class"
    """Heading of the names of the rows."""
    title: str = ""


@dataclass(frozen=True, slots=True)
class Strip:
    """Image, mask, prediction and difference of one sample."""

    key: str
    dice: float
    sources: tuple[str, ...]
    """data: URIs of the four panels."""
    small: bool
    """Whether the image is so small that pixels are shown enlarged without smoothing."""


@dataclass(frozen=True, slots=True)
class Gallery:
    """Images under a heading."""

    title: str
    strips: tuple[Strip, ...]


@dataclass(frozen=True, slots=True)
class Swatch:
    """An entry of a legend."""

    name: str
    colour: Colour


@dataclass(frozen=True, slots=True)
class Report:
    """Contents of the page; empty fields have no section."""

    title: str
    subtitle: str
    verdict: str
    notes: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    table: Table | None = None
    parts: Table | None = None
    """Scores of groups of images."""
    objects: tuple[tuple[str, str], ...] = ()
    """(name, value) of the scores of connected components."""
    plots: tuple[Plot, ...] = ()
    """Calibration and thresholds."""
    plots_note: str = ""
    classes: tuple[str, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    """Pixels, [true class][predicted class]."""
    galleries: tuple[Gallery, ...] = ()
    gallery_note: str = ""
    legends: tuple[tuple[Swatch, ...], ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    config: tuple[str, ...] = ()
    """Blocks of config.yaml."""
    commands: tuple[tuple[str, str], ...] = ()
    """(purpose, command)."""


def escape_value(value: object) -> object:
    """Escape control characters and hide credentials in text; markup is ours."""
    return escape_text(value, None) if type(value) is str else value


def render(report: Report) -> str:
    """Render the page; equal reports give equal bytes."""
    return render_template(TEMPLATE, report=report)


def render_template(name: str, **content: object) -> str:
    """Render a template of this package; equal content gives equal bytes."""
    environment = Environment(
        loader=FunctionLoader(read_template),
        autoescape=True,
        finalize=escape_value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "draw_chart": draw_chart,
        "draw_plot": draw_plot,
        "draw_spark": draw_spark,
        "draw_confusion": draw_confusion,
        "draw_scatter": draw_scatter,
        "colour": css_colour,
    }
    return environment.get_template(name).render(**content) + "\n"


def read_template(name: str) -> str:
    """Read a template of this package."""
    return files("pipelines.reporting").joinpath(name).read_text(encoding="utf-8")


def css_colour(colour: Colour) -> str:
    """Format a colour for CSS."""
    return f"rgb({colour[0]} {colour[1]} {colour[2]})"
