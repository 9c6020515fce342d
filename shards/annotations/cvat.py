"""CVAT for images 1.1: one XML file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np

from shards.annotations.drawing import draw_ellipse, draw_with_pillow, read_numbers, rotate_box
from shards.annotations.polygons import OutlineFlaws, read_points
from shards.annotations.regions import ImageRegions, Outline, Region, Stencil
from shards.annotations.runs import decode_rows, find_mask_runs
from shards.annotations.scan import Scan
from shards.annotations.signatures import name_other_format, require_file
from shards.local_files import open_file
from shards.sample import DataError

Attributes = dict[str, str]
REGIONS = ("polygon", "box", "mask", "ellipse", "polyline")
WITHOUT_AREA = ("points", "cuboid", "skeleton")
MAX_BOX = 1_000_000_000
"""Maximum number of pixels in the box of a mask."""


def parse_xml(data: bytes | Path, start: Callable[..., Any], end: Callable[..., Any], *,
              text: Callable[..., Any] | None = None) -> expat.XMLParserType:  # fmt: skip
    """Parse XML without a DTD. Raises DataError for damaged XML, DTDs and other encodings."""
    parser = expat.ParserCreate()
    parser.StartElementHandler = lambda tag, attributes: start(parser, tag, attributes)
    parser.EndElementHandler = lambda tag: end(parser, tag)
    if text is not None:
        parser.CharacterDataHandler = lambda words: text(parser, words)
        parser.CommentHandler = parser.ProcessingInstructionHandler = lambda *_: text(parser, "")

    def refuse_dtd(*_: object) -> None:
        raise DataError("it declares a DTD, which could expand without limit; remove <!DOCTYPE>")

    def refuse_encoding(_: str, encoding: str | None, __: int) -> None:
        if encoding and encoding.lower() not in ("utf-8", "utf8", "us-ascii", "ascii"):
            raise DataError(f"it is encoded in {encoding}; save it as UTF-8")

    parser.StartDoctypeDeclHandler = refuse_dtd
    parser.XmlDeclHandler = refuse_encoding
    try:
        if isinstance(data, bytes):
            parser.Parse(data, True)
        else:
            with open_file(data) as file:
                parser.ParseFile(file)
    except expat.ExpatError as error:
        raise DataError(f"it is not valid XML: {error}; export it again") from error
    return parser


class CvatScanner:
    """Finds the images and labels of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scan = Scan()
        self.tags: list[str] = []
        self.declared: list[str] = []
        self.words: list[str] = []
        self.image: Attributes = {}
        self.labels: list[str] = []
        self.start = 0
        self.closing = False

    def close_image(self, at: int) -> None:
        """Add the image that has ended before byte `at`."""
        if self.closing:
            self.closing = False
            where = f"{self.path}: image {self.image.get('id', '')}"
            spans = self.start, at
            self.scan.add(self.image.get("name"), self.path.name, spans, self.labels, where)

    def open_tag(self, parser: expat.XMLParserType, tag: str, attributes: Attributes) -> None:
        """Handle the start of an element."""
        self.close_image(parser.CurrentByteIndex)
        if not self.tags and tag != "annotations":
            raise DataError(
                f"{self.path} is not a CVAT file: its first element is <{tag}>, not <annotations>"
            )
        if tag == "track":
            raise DataError(
                f"{self.path} is `CVAT for video`; export it as `CVAT for images 1.1`, with images"
            )
        self.tags.append(tag)
        self.words = []
        if tag == "image":
            self.image, self.labels, self.start = attributes, [], parser.CurrentByteIndex
        elif len(self.tags) == 3 and tag in (*REGIONS, *WITHOUT_AREA):
            self.labels.append(attributes.get("label", ""))
        elif len(self.tags) == 3 and tag == "tag":
            self.scan.notes["tags of images are not drawn"] += 1

    def close_tag(self, parser: expat.XMLParserType, tag: str) -> None:
        """Handle the end of an element."""
        self.close_image(parser.CurrentByteIndex)
        if self.tags[-3:] == ["labels", "label", "name"]:
            self.declared.append("".join(self.words).strip())
        self.tags.pop()
        self.closing = tag == "image"

    def add_text(self, parser: expat.XMLParserType, words: str) -> None:
        """Handle text."""
        self.close_image(parser.CurrentByteIndex)
        self.words.append(words)


def scan_cvat(path: Path) -> Scan:
    """Index a file. Raises DataError for another format and damaged XML."""
    require_file(path, "cvat", ".xml")
    if path.suffix.lower() == ".json":
        raise DataError(f"{path} is not XML{name_other_format(path, 'cvat')}")
    scanner = CvatScanner(path)
    try:
        parse_xml(path, scanner.open_tag, scanner.close_tag, text=scanner.add_text)
    except DataError as error:
        text = str(error)
        raise DataError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    scanner.scan.declared = tuple(dict.fromkeys(scanner.declared)) or None
    return scanner.scan


def read_cvat(data: bytes, line_width: int | None) -> ImageRegions:
    """Parse the `<image>` element of an image. Raises DataError for what cannot be drawn."""
    elements: list[tuple[str, Attributes]] = []
    depth = [0]

    def start(_: object, tag: str, attributes: Attributes) -> None:
        depth[0] += 1
        if depth[0] <= 2:
            elements.append((tag, attributes))

    def end(*_: object) -> None:
        depth[0] -= 1

    parse_xml(data, start, end)
    image, *children = elements
    width, height = (int(number) for number in read_numbers({**image[1]}, "width", "height"))
    if width < 1 or height < 1:
        raise DataError(f"its size is {width} x {height}; correct its width and height")
    regions = []
    for number, (tag, attributes) in enumerate(children):
        if tag not in (*REGIONS, *WITHOUT_AREA):
            continue
        label = attributes.get("label", "")
        where = f"{tag} {number} ({label})"
        try:
            shape = read_shape(tag, attributes, (width, height), line_width)
            level = int(read_numbers({"z_order": "0", **attributes}, "z_order")[0])
        except DataError as error:
            raise DataError(f"{where}: {error}; correct or remove it") from error
        regions.append(Region(label, shape, where, level=level))
    return ImageRegions((width, height), regions)


def read_shape(
    tag: str, attributes: Attributes, size: tuple[int, int], line_width: int | None
) -> Outline | Stencil:
    """Parse a region. Raises DataError for one without an area."""
    values: dict[str, object] = {"rotation": "0", **attributes}
    match tag:
        case "polygon":
            return Outline((read_point_text(attributes.get("points", "")),))
        case "polyline" if line_width is not None:
            points = read_point_text(attributes.get("points", ""))
            return Stencil(lambda image: draw_with_pillow("line", points, image, line_width))
        case "polyline":
            raise DataError("it is a polyline, which has no area: draw it with --line-width PIXELS")
        case "box":
            left, top, right, bottom, turn = read_numbers(
                values, "xtl", "ytl", "xbr", "ybr", "rotation"
            )
            if not turn:
                # As they are: a sum rounds otherwise, which can move an edge by a pixel.
                corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
                return Outline((corners,))
            # CVAT rotates around the centre.
            middle = np.array([(left + right) / 2, (top + bottom) / 2])
            corners = rotate_box(0, 0, right - left, bottom - top, turn)
            return Outline((corners - corners.mean(axis=0) + middle,))
        case "ellipse":
            cx, cy, rx, ry, turn = read_numbers(values, "cx", "cy", "rx", "ry", "rotation")
            if rx <= 0 or ry <= 0:
                raise DataError(f"its radii are {rx:g} and {ry:g}")
            reach = max(rx, ry) if turn % 180 else 0
            dx, dy = max(rx, reach), max(ry, reach)
            clipped = not (dx <= cx <= size[0] - dx and dy <= cy <= size[1] - dy)
            flaws = (OutlineFlaws(clipped),)
            return Stencil(lambda image: draw_ellipse(cx, cy, rx, ry, turn, image), flaws)
        case "mask":
            return read_mask(attributes)
    raise DataError(f"it is a {tag}, which cannot be drawn as a region")


def read_point_text(text: str) -> Any:
    """Parse `x,y;x,y;...` to corners [N, 2]."""
    try:
        pairs = [[float(word) for word in pair.split(",")] for pair in text.split(";") if pair]
    except ValueError as error:
        raise DataError("its points are not numbers `x,y;x,y`") from error
    if any(len(pair) != 2 for pair in pairs):
        raise DataError("its points are not pairs `x,y;x,y`")
    return read_points([number for pair in pairs for number in pair])


def read_mask(attributes: Attributes) -> Stencil:
    """Parse a mask: counts along the rows of a box, which begin with pixels outside."""
    numbers = read_numbers({**attributes}, "left", "top", "width", "height")
    left, top, width, height = map(int, numbers)
    if width < 1 or height < 1 or width * height > MAX_BOX:
        raise DataError(f"its box is {width} x {height}")
    try:
        counts = np.array([int(word) for word in attributes.get("rle", "").split(",")])
    except (ValueError, OverflowError) as error:
        raise DataError("its rle is not a list of integers") from error
    mask = decode_rows(counts.astype(np.int64), width, height)
    return Stencil(lambda size: find_mask_runs(mask, left, top, size))
