"""The comparison of scorings as one HTML page: no scripts, no network, light and dark."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.evaluation.comparison import (
    Comparison,
    Difference,
    ScoreDifferences,
    describe_method,
)
from pipelines.reporting.charts import Scatter
from pipelines.reporting.page import Row, Table, render_template

TEMPLATE = "comparison.html.j2"
MAX_DOTS = 2000
"""Images in the scatter plot."""
SIGNIFICANT = 0.05
METHOD = (
    "Scores are those of all pixels of the split. Intervals come from a paired bootstrap: both are "
    "scored on the same resamples of images (of groups, where the data set has them). p is the "
    "share of sign flips, which swap the two results of an image, that give a difference at least "
    "as large; it is not corrected for the number of classes. A verdict is given where the "
    "interval does not hold 0 and p is at most 0.05. It is about these two models, not about the "
    "settings that they were trained with: two seeds of the same settings may differ as clearly."
)


@dataclass(frozen=True, slots=True)
class PairSection:
    """The comparison of two scorings on the page."""

    title: str
    verdict: str
    tables: tuple[Table, ...]
    scatter: Scatter | None
    scatter_note: str
    changes: Table


@dataclass(frozen=True, slots=True)
class ComparisonPage:
    """Contents of the page."""

    title: str
    subtitle: str
    pairs: tuple[PairSection, ...]
    method: str = METHOD


def render_comparisons(comparisons: Sequence[Comparison]) -> str:
    """Render the page; equal comparisons give equal bytes."""
    first = comparisons[0]
    page = ComparisonPage(
        title="Comparison",
        subtitle=f"{first.num_images:,} images of {first.split}, against {first.first}",
        pairs=tuple(compose_pair(comparison) for comparison in comparisons),
    )
    return render_template(TEMPLATE, page=page)


def compose_pair(comparison: Comparison) -> PairSection:
    """Compose the section of two scorings."""
    names = (comparison.first, comparison.second)
    images = comparison.images
    step = -(-len(images) // MAX_DOTS)
    shown = images[:: step or 1]
    undefined = comparison.num_images - len(images)
    note = "Dots above the diagonal are images that the second scores higher."
    if len(shown) < len(images):
        note += f" {len(shown):,} of {len(images):,} images are shown, evenly spread."
    if undefined:
        note += f" {undefined:,} images without a score in either are not shown."
    dots = tuple((image.key, image.first, image.second) for image in shown)
    return PairSection(
        title=f"{comparison.first} \u2192 {comparison.second}",
        verdict=write_verdict(comparison),
        tables=(make_table(comparison, "Dice"), make_table(comparison, "IoU")),
        scatter=Scatter("Dice of each image", *names, dots) if dots else None,
        scatter_note=note,
        changes=make_changes_table(comparison),
    )


def write_verdict(comparison: Comparison) -> str:
    """Describe the change of the macro Dice in two sentences."""
    found = comparison.macro.dice
    if found.difference is None:
        return "The macro Dice is undefined in one of them."
    bounds = bounds_cell(found)
    interval = f", 95 % interval {bounds}" if bounds else ""
    p_value = "" if found.p_value is None else f", p = {found.p_value:.4f}"
    change = f"The macro Dice changes by {found.difference:+.4f}{interval}{p_value}."
    if found.interval is None:
        return f"{change} One {comparison.unit} shows nothing about others."
    low, high = found.interval
    if low <= 0 <= high or found.p_value is None or found.p_value > SIGNIFICANT:
        return f"{change} These images do not show which is better."
    return f"{change} The second is {'better' if low > 0 else 'worse'}."


def make_table(comparison: Comparison, score: str) -> Table:
    """Make the table of Dice or IoU: a line per class, then the macro mean."""

    def row(name: str, own: ScoreDifferences, *, is_mean: bool = False) -> Row:
        found = own.dice if score == "Dice" else own.iou
        change = "n/a" if found.difference is None else f"{found.difference:+.4f}"
        p_value = "" if found.p_value is None else f"{found.p_value:.4f}"
        note = f"undefined in {own.undefined:,} resamples" if own.undefined else ""
        scores = (show(found.first), show(found.second))
        return Row(name, (*scores, change, bounds_cell(found), p_value), note=note, is_mean=is_mean)

    rows = [row(name, own) for name, own in comparison.classes.items()]
    rows.append(row("macro", comparison.macro, is_mean=True))
    how = describe_method(comparison)
    columns = ("First", "Second", "Change", "95 % interval", "p")
    return Table(f"{how[0].upper()}{how[1:]}.", columns, tuple(rows), title=score)


def make_changes_table(comparison: Comparison) -> Table:
    """Make the table of the images whose Dice changed most."""
    rows = tuple(
        Row(image.key, (show(image.first), show(image.second), f"{image.difference:+.4f}"))
        for image in comparison.most_changed()
    )
    counts = comparison.to_plain()["images"]
    caption = (
        f"Dice is higher in {counts['better']:,} images, lower in {counts['worse']:,} and equal in "
        f"{counts['equal']:,}."
    )
    return Table(caption, ("First", "Second", "Change"), rows, "Image")


def bounds_cell(found: Difference) -> str:
    """Format the interval of a difference; empty if there is none."""
    return "" if found.interval is None else f"{found.interval[0]:+.4f} to {found.interval[1]:+.4f}"


def show(score: float | None) -> str:
    """Format a score; n/a if undefined."""
    return "n/a" if score is None else f"{score:.4f}"
