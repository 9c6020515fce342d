"""Build the manifest of packed or indexed shards, and summarise it for people."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from shards.folders.splits import SPLITS
from shards.images.files import NOTES, ImageFormat
from shards.manifest import Manifest, ShardInfo, SplitInfo
from shards.sample import Palette
from shards.statistics import SampleStatistics, compute_mean_std, merge_statistics

MAX_DUPLICATE_GROUPS = 1000
"""Groups of identical images that a manifest lists."""
MAX_GROUP_NAMES = 20
"""Names listed in each group."""


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
    """Build a manifest.

    Args:
        classes: class names by index.
        palette: RGB colour of each class.
        image_format: how images are decoded.
        mask_format: the declared mask format as JSON data.
        shards: shards by split.
        tallies: tally by split.
        duplicates: groups of byte-identical images, named `split:source`.
        verified: whether every pixel was decoded or only headers were read.
        border_sigma: sigma of the border maps in pixels; None: without border maps.
        border_classes: names of the classes that are objects in the border maps.
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
        duplicates=tuple(tuple(names[:MAX_GROUP_NAMES]) for names in groups[:MAX_DUPLICATE_GROUPS]),
        verified=verified,
        border_sigma=border_sigma,
        border_classes=border_classes,
    )


def summarise(
    place: object, manifest: Manifest, total: SampleStatistics, notes: Mapping[str, str] = NOTES
) -> Iterator[str]:
    """Summarise a data set in lines; `total`: tally of all its shards."""
    form = manifest.image_format
    yield f"{place}: {'grey' if form.channels == 'L' else 'RGB'} images"
    for name, split in manifest.splits.items():
        sizes = ", ".join(f"{s.width} x {s.height} {s.mode} ({s.images})" for s in split.sizes[:3])
        more = f" and {len(split.sizes) - 3} more sizes" if len(split.sizes) > 3 else ""
        yield f"  {name:<10}{split.samples:>8} samples, {len(split.shards)} shards; {sizes}{more}"
    if manifest.verified == "full":
        yield from summarise_classes(manifest.classes, total)
    if manifest.border_sigma is not None:
        objects = ", ".join(manifest.border_classes)
        yield f"  border maps: sigma {manifest.border_sigma:g} pixels, objects: {objects}"
    yield from (f"  {count} images {notes[note]}" for note, count in sorted(total.notes.items()))
    for outlier in total.find_outliers(manifest.classes):
        yield f"  outlier: {outlier.name} {outlier.reason}"
    if form.range is not None:
        yield f"  16-bit values {form.range[0]} to {form.range[1]} become 0 to 255"
    if manifest.duplicates:
        yield (
            f"  warning: {len(manifest.duplicates)} groups of identical images, "
            f"the first: {' = '.join(manifest.duplicates[0])}"
        )


def summarise_classes(classes: Sequence[str], total: SampleStatistics) -> Iterator[str]:
    """List the pixel share of each class, and warn of classes that do not occur."""
    if not classes:
        return
    pixels = total.class_pixels(len(classes))
    for name, count in zip((*classes, "ignored"), pixels, strict=True):
        if count:
            yield f"  {name:<20}{count / max(1, sum(pixels)):>8.2%} of pixels"
    for name, count in zip(classes, pixels, strict=False):
        if not count:
            yield f"  warning: class {name!r} has no pixels"
