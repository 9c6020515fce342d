"""The manifest of shards that were packed or indexed, and what is said of them to people."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from shards.images import NOTES, ImageFormat
from shards.index import Manifest, ShardInfo, SplitInfo
from shards.pairs import SPLITS
from shards.sample import Palette
from shards.tally import SampleStatistics, compute_mean_std, merge_statistics

MOST_DUPLICATES = 1000
"""Groups of equal pictures that a manifest names."""
MOST_EQUAL = 20
"""Names in one such group."""


def make_manifest(
    *,
    classes: tuple[str, ...],
    palette: Palette,
    image_format: ImageFormat,
    mask_format: dict[str, Any],
    shards: Mapping[str, Sequence[ShardInfo]],
    tallies: Mapping[str, SampleStatistics],
    duplicates: Sequence[Sequence[str]],
    verified: Literal["full", "headers"],
    border_sigma: float | None = None,
    border_classes: tuple[str, ...] = (),
) -> Manifest:
    """Everything that was found, in one page.

    Args:
        classes: class names by index.
        palette: RGB colour of each class.
        image_format: how pictures are decoded.
        mask_format: the declared format as JSON holds it.
        shards: those of each split.
        tallies: what those of each split hold.
        duplicates: names, `split:source`, of pictures that are equal.
        verified: whether every pixel was looked at.
        border_sigma: pixels, of border maps; None: there are none.
        border_classes: names of the classes that are cells in them.
    """
    measured = tallies["train"] if "train" in shards else merge_statistics(tallies.values())
    mean, std = compute_mean_std(measured.levels, image_format)
    groups = sorted(sorted(names) for names in duplicates)
    return Manifest(
        classes=classes,
        palette=palette,
        image_format=image_format,
        mask_format=mask_format,
        mean=mean,
        std=std,
        splits={
            split: SplitInfo(tuple(shards[split]), tallies[split].size_counts())
            for split in (*SPLITS, "unlabelled")
            if split in shards
        },
        duplicates=tuple(tuple(names[:MOST_EQUAL]) for names in groups[:MOST_DUPLICATES]),
        verified=verified,
        border_sigma=border_sigma,
        border_classes=border_classes,
    )


def describe(
    place: object, manifest: Manifest, total: SampleStatistics, notes: Mapping[str, str] = NOTES
) -> Iterator[str]:
    """What a data set holds, line by line; `total`: the tally of all its shards."""
    form = manifest.image_format
    yield f"{place}: {'grey' if form.channels == 'L' else 'RGB'} pictures"
    for name, split in manifest.splits.items():
        sizes = ", ".join(f"{s.width} x {s.height} {s.mode} ({s.images})" for s in split.sizes[:3])
        more = f" and {len(split.sizes) - 3} more sizes" if len(split.sizes) > 3 else ""
        yield f"  {name:<10}{split.samples:>8} samples, {len(split.shards)} shards; {sizes}{more}"
    if manifest.verified == "full":
        yield from class_lines(manifest.classes, total)
    if manifest.border_sigma is not None:
        cells = ", ".join(manifest.border_classes)
        yield f"  border maps: sigma {manifest.border_sigma:g} pixels, the cells are: {cells}"
    yield from (f"  {count} pictures {notes[note]}" for note, count in sorted(total.notes.items()))
    if form.range is not None:
        yield f"  16-bit values {form.range[0]} to {form.range[1]} become 0 to 255"
    if manifest.duplicates:
        yield (
            f"  warning: {len(manifest.duplicates)} groups of equal pictures, "
            f"the first: {' = '.join(manifest.duplicates[0])}"
        )


def class_lines(classes: Sequence[str], total: SampleStatistics) -> Iterator[str]:
    """The share of each class, and those that occur nowhere."""
    if not classes:
        return
    pixels = total.class_pixels(len(classes))
    for name, count in zip((*classes, "ignored"), pixels, strict=True):
        if count:
            yield f"  {name:<20}{count / max(1, sum(pixels)):>8.2%} of pixels"
    for name, count in zip(classes, pixels, strict=False):
        if not count:
            yield f"  warning: no pixel of the class {name!r} anywhere"
