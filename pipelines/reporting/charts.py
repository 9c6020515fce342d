"""SVG charts of the report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from statistics import median

from markupsafe import Markup

WIDTH, HEIGHT = 420, 240
"""Size of a chart in SVG units; text is 11 units high."""
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 8, 36
SIDE = 400
"""Width and height of a scatter plot."""
SPARK_WIDTH, SPARK_HEIGHT = 96, 20
MAX_DOTS = 60
"""Curves of up to this many points show each of them as a dot with a tooltip."""


@dataclass(frozen=True, slots=True)
class Series:
    """A named curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over the optimizer steps of a run."""

    title: str
    series: tuple[Series, ...]
    """At least one, each with at least one point; the first is highlighted."""
    last: float
    """Last step of the x axis, which starts at 0."""
    best: tuple[float, float] | None = None
    """Point (step, value) of the first curve to mark."""
    from_zero: bool = True
    """Whether the y axis includes 0."""


@dataclass(frozen=True, slots=True)
class Scatter:
    """A dot per image: its score in one scoring (across) and in another (up), each from 0 to 1."""

    title: str
    across: str
    up: str
    dots: tuple[tuple[str, float, float], ...]
    """Name, score across, score up."""


@dataclass(frozen=True, slots=True)
class Plot:
    """Curves in a square from 0 to 1, such as a reliability diagram."""

    title: str
    across: str
    up: str
    series: tuple[Series, ...]
    """The first one is highlighted."""
    diagonal: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps values to positions on an axis."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """Return the position of a value: 0 at the low end, 1 at the high end, clamped."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = log10(low), log10(high), log10(max(value, low))
        return min(1.0, max(0.0, (value - low) / (high - low)))


def choose_tick_step(span: float, num_ticks: int) -> float:
    """Choose a step of 1, 2 or 5 times a power of ten that gives about `num_ticks` ticks."""
    rough = span / num_ticks
    power = 10.0 ** floor(log10(rough))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough * 0.999)


def value_axis(values: Sequence[float], *, from_zero: bool = False) -> Axis:
    """Make an axis for all values; logarithmic if the largest exceeds 30 times the median."""
    low, high = min(values), max(values)
    if low > 0 and high > 30 * median(values):
        first, last = floor(log10(low)), ceil(log10(high))
        return Axis(10.0**first, 10.0**last, tuple(10.0**p for p in range(first, last + 1)), True)
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if low == high:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    step = choose_tick_step(high - low, 5)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    ticks = tuple(n * step for n in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def step_axis(last: float) -> Axis:
    """Make an axis from 0 to the last step, which need not be a tick."""
    last = max(1.0, last)
    step = max(1.0, choose_tick_step(last, 5))
    return Axis(0.0, last, tuple(n * step for n in range(floor(last / step) + 1)))


def label(value: float, *, whole: bool = False) -> str:
    """Format a tick label; `whole`: an integer, abbreviated with k, M or G."""
    if value == 0:
        return "0"
    if whole:
        for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
            if abs(value) >= size:
                return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
        return f"{value:,.0f}"
    return f"{value:.6g}"


def draw_axes(
    across: Axis, up: Axis, left: Callable[[float], float], top: Callable[[float], float]
) -> list[Markup]:
    """Draw grid lines, ticks and labels; `left` and `top` place a value on the page."""
    parts = [
        Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
            LEFT, WIDTH - RIGHT, top(y), top(y)
        )
        + Markup('<text class="up" x="{}" y="{:.1f}">{}</text>').format(
            LEFT - 6, top(y) + 3.5, label(y)
        )
        for y in up.ticks
    ]
    for x in across.ticks:
        text = label(x, whole=True)
        parts.append(
            Markup('<line class="tick" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>').format(
                left(x), left(x), HEIGHT - BOTTOM, HEIGHT - BOTTOM + 4
            )
            + Markup('<text class="across" x="{:.1f}" y="{}">{}</text>').format(
                min(left(x), WIDTH - 3.4 * len(text)), HEIGHT - BOTTOM + 15, text
            )
        )
    step = Markup('<text class="up" x="{}" y="{}">step</text>')
    return [*parts, step.format(WIDTH - RIGHT, HEIGHT - 4)]


def draw_chart(chart: Chart) -> Markup:
    """Draw a chart with axes, ticks and labels; the template adds title and legend."""
    across = step_axis(chart.last)
    values = [y for series in chart.series for y in series.y]
    up = value_axis(values, from_zero=chart.from_zero)

    def left(x: float) -> float:
        return LEFT + across.share(x) * (WIDTH - LEFT - RIGHT)

    def top(y: float) -> float:
        return HEIGHT - BOTTOM - up.share(y) * (HEIGHT - TOP - BOTTOM)

    parts = draw_axes(across, up, left, top)
    # In reverse, so that the first curve is on top.
    for number, series in reversed([*enumerate(chart.series)]):
        points = [(left(x), top(y)) for x, y in zip(series.x, series.y, strict=True)]
        parts.append(Markup('<path class="s{}" d="{}"/>').format(number, path(points)))
        if len(points) <= MAX_DOTS:
            parts += [
                Markup(
                    '<circle class="s{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>'
                    "{}, step {:,.0f}: {:.6g}</title></circle>"
                ).format(number, *point, 1.8, series.name, x, y)
                for point, x, y in zip(points, series.x, series.y, strict=True)
            ]
    if chart.best is not None:
        x, y = chart.best
        parts.append(
            Markup(
                '<circle class="best" cx="{:.1f}" cy="{:.1f}" r="4.5"><title>best, step '
                "{:,.0f}: {:.6g}</title></circle>"
            ).format(left(x), top(y), x, y)
        )
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        WIDTH, HEIGHT, chart.title
    )
    return head + Markup("").join(parts) + Markup("</svg>")


def draw_scatter(scatter: Scatter) -> Markup:
    """Draw a square plot of dots, with a diagonal of equal scores."""
    values = [score for _, *scores in scatter.dots for score in scores]
    axis = value_axis(values)
    ticks = [tick for tick in axis.ticks if -1e-9 <= tick <= 1 + 1e-9]
    axis = Axis(min(ticks[0], min(values)), max(ticks[-1], max(values)), tuple(ticks))
    side, bottom = SIDE - LEFT - RIGHT, SIDE - BOTTOM

    def left(score: float) -> float:
        return LEFT + axis.share(score) * side

    def top(score: float) -> float:
        return bottom - axis.share(score) * (bottom - TOP)

    parts = draw_grid(ticks, left, top, bottom)
    low, high = axis.low, axis.high
    parts += [
        Markup('<line class="same" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
            left(low), top(low), left(high), top(high)
        ),
        Markup('<text class="up" x="{}" y="{}">{} \u2192</text>').format(
            SIDE - RIGHT, SIDE - 4, shorten(scatter.across)
        ),
        Markup('<text class="side" x="{}" y="{}">\u2191 {}</text>').format(
            LEFT + 6, TOP + 10, shorten(scatter.up)
        ),
        Markup('<g class="dots">'),
    ]
    parts += [
        Markup('<circle cx="{:.1f}" cy="{:.1f}" r="3"><title>{}: {:.4f}, {:.4f}</title></circle>')
        .format(left(one), top(other), name, one, other)
        for name, one, other in scatter.dots
    ]  # fmt: skip
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        SIDE, SIDE, scatter.title
    )
    return head + Markup("").join(parts) + Markup("</g></svg>")


def draw_grid(
    ticks: Sequence[float],
    left: Callable[[float], float],
    top: Callable[[float], float],
    bottom: float,
) -> list[Markup]:
    """Draw horizontal lines and the labels of both axes of a square chart with equal axes."""
    parts = []
    for tick in ticks:
        parts += [
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                LEFT, SIDE - RIGHT, top(tick), top(tick)
            ),
            Markup('<text class="up" x="{}" y="{:.1f}">{}</text>').format(
                LEFT - 6, top(tick) + 3.5, label(tick)
            ),
            Markup('<text class="across" x="{:.1f}" y="{}">{}</text>').format(
                left(tick), bottom + 15, label(tick)
            ),
        ]
    return parts


def draw_plot(plot: Plot) -> Markup:
    """Draw the curves of a plot, with a tooltip at every point; the template adds title, legend."""

    def left(x: float) -> float:
        return LEFT + x * (SIDE - LEFT - RIGHT)

    def top(y: float) -> float:
        return SIDE - BOTTOM - y * (SIDE - BOTTOM - TOP)

    parts = draw_grid((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), left, top, SIDE - BOTTOM)
    if plot.diagonal:
        parts.append(
            Markup('<line class="same" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
                left(0), top(0), left(1), top(1)
            )
        )
    for number, series in reversed([*enumerate(plot.series)]):
        points = [(left(x), top(y)) for x, y in zip(series.x, series.y, strict=True)]
        parts.append(Markup('<path class="s{}" d="{}"/>').format(number, path(points)))
        parts += [
            Markup(
                '<circle class="s{}" cx="{:.1f}" cy="{:.1f}" r="1.8"><title>'
                "{}: {:.4f}, {:.4f}</title></circle>"
            ).format(number, *point, series.name, x, y)
            for point, x, y in zip(points, series.x, series.y, strict=True)
        ]
    parts += [
        Markup('<text class="up" x="{}" y="{}">{} \u2192</text>').format(
            SIDE - RIGHT, SIDE - 4, plot.across
        ),
        Markup(
            '<text class="across" transform="translate(11 {:.1f}) rotate(-90)">{} \u2192</text>'
        ).format(top(0.5), plot.up),
    ]
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        SIDE, SIDE, plot.title
    )
    return head + Markup("").join(parts) + Markup("</svg>")


def shorten(name: str) -> str:
    """Return the end of a name, at most 48 characters."""
    return name if len(name) <= 48 else f"\u2026{name[-47:]}"


def path(points: Sequence[tuple[float, float]]) -> str:
    """Format a polyline as SVG path data."""
    return "M" + " ".join(f"{x:.1f} {y:.1f}" for x, y in points)


def draw_spark(series: Series) -> Markup:
    """Draw a sparkline of a score, from 0 to 1."""
    first, last = series.x[0], series.x[-1]
    width, height = SPARK_WIDTH - 4, SPARK_HEIGHT - 4
    points = [
        (2 + (x - first) / ((last - first) or 1) * width, 2 + (1 - min(1.0, max(0.0, y))) * height)
        for x, y in zip(series.x, series.y, strict=True)
    ]
    end = points[-1]
    return Markup(
        '<svg class="spark" viewBox="0 0 {} {}" role="img" aria-label="{}">'
        '<path d="{}"/><circle cx="{:.1f}" cy="{:.1f}" r="1.8"/></svg>'
    ).format(SPARK_WIDTH, SPARK_HEIGHT, series.name, path(points), *end)


def draw_confusion(classes: Sequence[str], confusion: Sequence[Sequence[int]]) -> Markup:
    """Draw the confusion matrix: the share of the pixels of each true class by predicted class."""
    head = Markup("").join(
        Markup('<th scope="col"><span>{}</span></th>').format(name) for name in classes
    )
    body = []
    for name, row in zip(classes, confusion, strict=True):
        total = sum(row)
        cells = [Markup('<th scope="row">{}</th>').format(name)]
        for other, pixels in zip(classes, row, strict=True):
            share = pixels / total if total else 0.0
            shown = f"{100 * share:.0f}" if share >= 0.005 else "·" if pixels else ""
            cells.append(
                Markup('<td class="{}" style="--share:{:.3f}" title="{}">{}</td>').format(
                    "strong" if share > 0.5 else "",
                    share,
                    f"true {name}, predicted {other}: {pixels:,} pixels ({share:.2%})",
                    shown,
                )
            )
        body.append(Markup("<tr>{}</tr>").format(Markup("").join(cells)))
    dense = " dense" if len(classes) > 20 else ""
    return Markup(
        '<table class="confusion{}"><thead><tr><td></td>{}</tr></thead><tbody>{}</tbody></table>'
    ).format(dense, head, Markup("").join(body))
