"""Annotated regions of one image, and how they become a mask."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shards.annotations.polygons import OutlineFlaws, Points, draw_polygon, find_flaws
from shards.annotations.runs import Runs, Size, merge_runs
from shards.masks.canonical import CanonicalMask
from shards.masks.counts import count_pixel_values
from shards.masks.formats import ClassMap
from shards.sample import IGNORE, DataError, Uint8

AnnotationFormat = Literal["coco", "labelme", "cvat", "label-studio", "yolo"]
OverlapPolicy = Literal["order", "error"]
UnknownPolicy = Literal["error", "ignore", "background"]
MAX_SCALE = 64
"""Maximum size that an annotation may declare, as a multiple of its image's pixels."""


@dataclass(frozen=True, slots=True)
class Outline:
    """Polygons, the area of each being part of the region, drawn by COCO's rule."""

    parts: tuple[Points, ...]

    def flaws(self, size: Size | None) -> list[OutlineFlaws]:
        """Return the flaws of each part."""
        return [find_flaws(points, size) for points in self.parts]

    def draw(self, size: Size) -> Runs:
        """Return the pixels in an image of (width, height)."""
        return merge_runs([draw_polygon(points, size) for points in self.parts])


@dataclass(frozen=True, slots=True)
class Stencil:
    """Pixels that are known, or drawn once the size of the image is known."""

    paint: Callable[[Size], Runs]
    found: tuple[OutlineFlaws, ...] = ()
    """Flaws of the region."""

    def flaws(self, size: Size | None) -> list[OutlineFlaws]:
        """Return the flaws of the region; `size` has no influence."""
        del size
        return list(self.found)

    def draw(self, size: Size) -> Runs:
        """Return the pixels in an image of (width, height)."""
        return self.paint(size)


@dataclass(frozen=True, slots=True)
class Region:
    """One annotated object."""

    label: str | None
    """Its class, as the annotation names it; None: pixels that are ignored whatever the classes."""
    shape: Outline | Stencil
    where: str
    """Its name in messages."""
    crowd: bool = False
    """Whether its pixels are ignored."""
    level: int = 0
    """Regions of a higher level are on top."""


@dataclass(frozen=True, slots=True)
class ImageRegions:
    """All regions of one image."""

    size: Size | None
    """(width, height) that the annotation declares."""
    regions: Sequence[Region]
    small_on_top: bool = False
    """Whether a region with fewer pixels is on top; else the later one is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PaintRule:
    """Which class index each label becomes, and what is done where regions overlap."""

    indices: tuple[tuple[str, int], ...]
    """Class index of each label; 255: its pixels are ignored."""
    names: tuple[tuple[str, str], ...] = ()
    """Names of labels in messages, where they differ."""
    overlap: OverlapPolicy = "order"
    """`error`: regions of two classes that share a pixel are refused."""
    unknown: UnknownPolicy = "error"
    """Labels without an index: refused, ignored or not drawn."""

    def name(self, label: str) -> str:
        """Return the name of a label in messages."""
        return dict(self.names).get(label, label)


def refuse_unknown_labels(record: ImageRegions, rule: PaintRule, where: str) -> None:
    """Raise DataError for labels without a class index."""
    known = dict(rule.indices)
    labels = [region.label for region in record.regions if region.label is not None]
    missing = Counter(label for label in labels if label not in known)
    if missing and rule.unknown == "error":
        listed = ", ".join(f"{rule.name(label)!r}: {n}" for label, n in sorted(missing.items()))
        raise DataError(
            f"{where} has annotations of unknown class ({listed}); add it to --classes, or use "
            "--unknown ignore or background"
        )


def paint_regions(
    record: ImageRegions, rule: PaintRule, size: Size, where: str
) -> tuple[Uint8, list[str], bool]:
    """Draw the regions of an image.

    Args:
        record: the regions.
        rule: the class index of each label.
        size: (width, height) of the mask.
        where: name of the image's annotation in messages.

    Returns:
        Class indices [H, W], 0 where there is no region; the names of regions without an area; and
        whether a region leaves the image.

    Raises:
        DataError: unknown labels, damaged regions, or an overlap that is refused.
    """
    refuse_unknown_labels(record, rule, where)
    known: dict[str | None, int] = {None: IGNORE, **dict(rule.indices)}
    unlisted = IGNORE if rule.unknown == "ignore" else None
    drawn: list[tuple[Region, int, Runs]] = []
    empty: list[str] = []
    clipped = False
    for region in record.regions:
        index = IGNORE if region.crowd else known.get(region.label, unlisted)
        try:
            flaws = region.shape.flaws(size)
            runs = region.shape.draw(size)
        except DataError as error:
            raise DataError(f"{where}, {region.where}: {error}; correct or remove it") from error
        clipped |= any(flaw.clipped for flaw in flaws)
        empty += [f"{where}, {region.where}: {f.degenerate}" for f in flaws if f.degenerate]
        if index is not None:
            drawn.append((region, index, runs))
    if record.small_on_top:
        drawn.sort(key=lambda entry: -entry[2].area)
    else:
        drawn.sort(key=lambda entry: entry[0].level)
    if rule.overlap == "error":
        refuse_overlaps(drawn, size, where)
    flat = np.zeros(size[0] * size[1], dtype=np.uint8)
    for _, index, runs in drawn:
        runs.paint(flat, index)
    return np.ascontiguousarray(flat.reshape(size).T), empty, clipped


def refuse_overlaps(drawn: Sequence[tuple[Region, int, Runs]], size: Size, where: str) -> None:
    """Raise DataError naming the first two regions of different classes that share pixels."""
    owner = np.zeros(size[0] * size[1], dtype=np.int32)
    classes = np.array([-1, *(index for _, index, _ in drawn)])
    for number, (region, index, runs) in enumerate(drawn, 1):
        below = runs.crop(owner)
        others = below[(below > 0) & (classes[below] != index)]
        if len(others):
            first = drawn[int(others.min()) - 1][0]
            pixels = int((others == others.min()).sum())
            raise DataError(
                f"{where}: {region.where} overlaps {first.where} in {pixels:,} pixels; correct "
                "one of them, or drop --overlap error"
            )
        runs.paint(owner, number)


def make_mask(
    record: ImageRegions, rule: PaintRule, image_size: Size, where: str, kind: str
) -> CanonicalMask:
    """Draw the regions of an image as a canonical mask in the size that they declare.

    Args:
        record: the regions.
        rule: the class index of each label.
        image_size: (width, height) of the image, for annotations that declare none.
        where: name of the annotation in messages.
        kind: name of the format, for the statistics.
    """
    size = record.size or image_size
    if size[0] * size[1] > MAX_SCALE * image_size[0] * image_size[1]:
        # Drawn masks are compared with the image afterwards; a wrong size must not take memory.
        raise DataError(
            f"{where} is for an image of {size[0]} x {size[1]}, but the image is {image_size[0]} x "
            f"{image_size[1]}; find the right image"
        )
    index, empty, clipped = paint_regions(record, rule, size, where)
    counts = count_pixel_values(index)
    present = tuple(np.flatnonzero(counts).tolist())
    notes = (*("clipped",) * clipped, *("degenerate",) * bool(empty))
    class_map = ClassMap(index, counts, present, present)
    return CanonicalMask(size, kind, None, class_map, notes=notes, remarks=tuple(empty))
