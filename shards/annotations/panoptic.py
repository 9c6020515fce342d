"""Panoptic COCO: one PNG of segment ids for each image, and their categories in the JSON."""

from typing import Any

import numpy as np

from shards.annotations.polygons import OutlineFlaws
from shards.annotations.regions import ImageRegions, Region, Stencil
from shards.annotations.runs import Runs, Size
from shards.images.files import ImageRule, load_pixels, open_image
from shards.sample import DataError

VOID = 0
"""Id of pixels that belong to no segment."""


def list_segments(annotation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the segments of an annotation. Raises DataError if one has no id or category."""
    segments = annotation["segments_info"]
    if not isinstance(segments, list) or not all(isinstance(entry, dict) for entry in segments):
        raise DataError("its segments_info is not a list of objects")
    for entry in segments:
        if type(entry.get("id")) is not int or not VOID < entry["id"] < 2**24:
            raise DataError(f"a segment has the id {entry.get('id')!r}, not 1 to 16777215")
        if not isinstance(entry.get("category_id"), int | str):
            raise DataError(f"segment {entry['id']} has no category_id")
    ids = [entry["id"] for entry in segments]
    if repeated := {number for number in ids if ids.count(number) > 1}:
        raise DataError(f"two segments have the id {min(repeated)}")
    return segments


def read_panoptic(annotation: dict[str, Any], png: bytes, size: Size) -> ImageRegions:
    """Parse the PNG of an image, whose pixels are R + 256 G + 65536 B.

    Args:
        annotation: its entry in `annotations`.
        png: bytes of the PNG.
        size: (width, height) of the image.

    Raises DataError for a PNG that does not fit the annotation.
    """
    name = annotation["file_name"]
    image, _ = load_pixels(open_image(png, name, ImageRule(max_pixels=size[0] * size[1])), name)
    if image.mode not in ("RGB", "RGBA"):
        raise DataError(f"{name} has mode {image.mode}, but panoptic ids are RGB; export it again")
    if image.size != size:
        raise DataError(
            f"{name} is {image.width} x {image.height}, but the JSON declares {size[0]} x {size[1]}"
            "; correct its width and height, or find the right PNG"
        )
    flat = (np.asarray(image)[..., :3].astype(np.int64) @ [1, 2**8, 2**16]).T.ravel()
    starts = np.flatnonzero(np.append(True, flat[1:] != flat[:-1]))
    stops, ids = np.append(starts[1:], len(flat)), flat[starts]
    segments = {entry["id"]: entry for entry in list_segments(annotation)}
    unknown = ~np.isin(ids, [VOID, *segments])
    if unknown.any():
        raise DataError(
            f"{name} has {(stops - starts)[unknown].sum():,} pixels of ids that segments_info does "
            f"not list, the first: {ids[unknown].min()}; find the JSON that belongs to it"
        )
    void = Runs(starts[ids == VOID], stops[ids == VOID])
    # Pixels of no segment are not annotated: they are ignored, not background.
    regions = [Region(None, make_stencil(void, ()), "void")]
    for number, entry in segments.items():
        runs = Runs(starts[ids == number], stops[ids == number])
        flaws = () if runs.area else (OutlineFlaws(degenerate="no pixels"),)
        label = str(entry["category_id"])
        where = f"segment {number}"
        crowd = bool(entry.get("iscrowd"))
        regions.append(Region(label, make_stencil(runs, flaws), where, crowd))
    return ImageRegions(size, regions)


def make_stencil(runs: Runs, flaws: tuple[OutlineFlaws, ...]) -> Stencil:
    """Return the shape of pixels that are known."""
    return Stencil(lambda _: runs, flaws)
