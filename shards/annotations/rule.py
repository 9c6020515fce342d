"""How the annotations of a data set become masks: what every packing worker needs to know."""

from dataclasses import dataclass

from shards.annotations.coco import read_coco
from shards.annotations.cvat import read_cvat
from shards.annotations.label_studio import read_label_studio
from shards.annotations.labelme import read_labelme
from shards.annotations.regions import AnnotationFormat, ImageRegions, PaintRule, make_mask
from shards.annotations.runs import Size
from shards.annotations.yolo import read_yolo
from shards.masks.canonical import CanonicalMask
from shards.sample import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotationRule:
    """How records are parsed and drawn."""

    kind: AnnotationFormat
    paint: PaintRule
    line_width: int | None = None
    """Width in pixels in which lines are drawn; None: they are refused."""
    annotator: str = "error"
    """`label-studio`: whose annotation is used."""

    def parse(self, data: bytes, size: Size) -> ImageRegions:
        """Parse the record of an image of (width, height). Raises DataError."""
        match self.kind:
            case "coco":
                return read_coco(data)
            case "labelme":
                return read_labelme(data, self.line_width)
            case "cvat":
                return read_cvat(data, self.line_width)
            case "label-studio":
                return read_label_studio(data, self.annotator)
            case "yolo":
                return read_yolo(data, size)

    def read_mask(self, data: bytes | None, size: Size, where: str) -> CanonicalMask:
        """Draw the mask of an image.

        Args:
            data: its record; None: it has no annotations, and is all background.
            size: (width, height) of the image.
            where: name of the record in messages.

        Raises DataError for annotations that cannot be drawn.
        """
        try:
            record = ImageRegions(None, ()) if data is None else self.parse(data, size)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        return make_mask(record, self.paint, size, where, self.kind)
