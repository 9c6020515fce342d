"""Objects in predicted masks of two classes: counts and areas per image, and their outlines."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.inference.outlines import trace_objects
from shards.sample import Uint8
from unet import DataSpec
from unet.objects import label_objects, measure_areas

OBJECTS_CSV = "objects.csv"
OBJECTS_FOLDER = "objects"
"""Folder of the outlines, GeoJSON."""
COLUMNS = (
    "key",
    "source",
    "width",
    "height",
    "objects",
    "area",
    "mean_area",
    "smallest",
    "largest",
)


@dataclass(frozen=True, slots=True)
class MaskObjects:
    """The objects of an image."""

    row: tuple[object, ...]
    """Cells of objects.csv after the key."""
    outlines: bytes
    """GeoJSON: a feature per object."""


def describe_objects(source: str, mask: Uint8, spec: DataSpec) -> MaskObjects:
    """Count, measure and trace the objects of a mask.

    Args:
        source: path of the image.
        mask: class indices uint8 [H, W].
        spec: data spec of the model, of two classes.
    """
    labels, number = label_objects(mask)
    areas = measure_areas(labels, number).tolist()
    height, width = mask.shape
    sizes = (sum(areas) / number, min(areas), max(areas)) if number else (None, None, None)
    features = [
        {
            "type": "Feature",
            "id": place,
            "geometry": make_geometry(polygons),
            "properties": {"class": spec.classes[1], "area": area},
        }
        for place, (polygons, area) in enumerate(
            zip(trace_objects(labels, number), areas, strict=True), start=1
        )
    ]
    collection = {"type": "FeatureCollection", "features": features}
    row = (source, width, height, number, sum(areas), *sizes)
    return MaskObjects(row, (json.dumps(collection, separators=(",", ":")) + "\n").encode())


def make_geometry(polygons: Sequence[Any]) -> dict[str, Any]:
    """Return the geometry of an object: several polygons if it is connected by corners only."""
    if len(polygons) == 1:
        return {"type": "Polygon", "coordinates": polygons[0]}
    return {"type": "MultiPolygon", "coordinates": polygons}


def format_rows(rows: Sequence[Sequence[object]]) -> bytes:
    """Format lines of objects.csv, without the header."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")
