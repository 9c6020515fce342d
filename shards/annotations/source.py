"""Annotations and images -> pairs, classes and the rule that draws the masks."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from shards.annotations.coco import scan_coco
from shards.annotations.cvat import scan_cvat
from shards.annotations.label_studio import UPLOAD, scan_label_studio
from shards.annotations.labelme import scan_labelme
from shards.annotations.regions import AnnotationFormat, OverlapPolicy, PaintRule, UnknownPolicy
from shards.annotations.rule import AnnotationRule
from shards.annotations.scan import Record, Scan
from shards.annotations.yolo import NAMES_FILE, scan_yolo
from shards.folders.pairs import (
    Pair,
    Pairing,
    common_folder,
    drop_key_collisions,
    join_below,
)
from shards.folders.split_names import Split
from shards.folders.walk import list_images, read_lines
from shards.sample import IGNORE, DataError

UnannotatedPolicy = Literal["background", "skip", "error"]
PER_IMAGE = ("labelme", "yolo")
"""Formats with a file for each image, of the same name."""
BACKGROUND = ("background", "_background_")
IGNORED = ("ignore", "__ignore__")
"""Labels that are class 0, and labels whose pixels are ignored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotationSource:
    """Where annotations are and how they are read."""

    path: Path
    kind: AnnotationFormat
    images: Path
    classes: tuple[str, ...] = ()
    """Class names in order; () takes them from the annotations."""
    unannotated: UnannotatedPolicy | None = None
    """Images without regions; None: the default of the format."""
    unknown: UnknownPolicy = "error"
    overlap: OverlapPolicy = "order"
    line_width: int | None = None
    annotator: str = "error"

    @property
    def folder(self) -> Path:
        """Folder that the files of records are relative to."""
        return self.path if self.kind in PER_IMAGE else self.path.parent

    def find(self) -> "Annotated":
        """Read the annotations once and pair them with their images, except unlisted ones.

        Raises DataError for annotations of another format, unknown classes and damaged files.
        """
        scan = self.scan()
        classes, rule = self.choose_classes(scan)
        refused: list[str] = []
        names = list_images(self.images, refused, flag="--images")
        matched, unpaired, unlisted = self.match(scan, names, refused)
        refused += [
            problem if "; " in problem else f"{problem}; correct it" for problem in scan.problems
        ]
        pairs, notes = self.apply_unannotated(matched, refused)
        if not pairs and not refused:
            raise DataError(
                f"no image of {self.path} is in {self.images} (for example: "
                f"{first_name(record.image for record in scan.records)} and {first_name(names)}); "
                "choose --images so that the paths agree"
            )
        notes += [f"{count} {what}" for what, count in sorted(scan.notes.items())]
        pairs = drop_key_collisions(pairs, self.images, refused)
        pairing = Pairing(self.images, self.folder, pairs, unpaired, refused)
        return Annotated(pairing, classes, rule, notes, unlisted)

    def scan(self) -> Scan:
        """Read the annotations once."""
        match self.kind:
            case "coco":
                return scan_coco(self.path)
            case "labelme":
                return scan_labelme(self.path)
            case "cvat":
                return scan_cvat(self.path)
            case "label-studio":
                return scan_label_studio(self.path, self.annotator)
            case "yolo":
                return scan_yolo(self.path, self.classes or read_yolo_names(self.path))

    def choose_classes(self, scan: Scan) -> tuple[tuple[str, ...], AnnotationRule]:
        """Return the classes, `background` first, and the rule that draws them.

        Raises DataError for labels without a class, unless they are accepted.
        """
        labels = scan.labels.keys() if scan.declared is None else scan.declared
        names = [scan.names.get(label, label) for label in labels]
        if scan.declared is None:
            names.sort()
        listed = self.classes or tuple(names)
        special = {*BACKGROUND, *IGNORED}
        classes = ("background", *(n for n in listed if n.lower() not in special))
        index = {name: number for number, name in enumerate(classes)}
        index |= {name: 0 for name in listed if name.lower() in BACKGROUND}
        if not self.classes or self.kind == "labelme":
            index |= dict.fromkeys(BACKGROUND, 0)
        every = dict.fromkeys((*(scan.declared or ()), *sorted(scan.labels)))
        indices: dict[str, int] = {}
        for label in every:
            name = scan.names.get(label, label)
            if name.lower() in IGNORED:
                indices[label] = IGNORE
            elif name in index:
                indices[label] = index[name]
        self.refuse_unknown(scan, indices)
        paint = PaintRule(
            indices=tuple(indices.items()),
            names=tuple(scan.names.items()),
            overlap=self.overlap,
            unknown=self.unknown,
        )
        return classes, AnnotationRule(
            kind=self.kind, paint=paint, line_width=self.line_width, annotator=self.annotator
        )

    def refuse_unknown(self, scan: Scan, indices: dict[str, int]) -> None:
        """Raise DataError for labels without a class index, with their counts."""
        unknown = Counter(
            {scan.names.get(k, k): n for k, n in scan.labels.items() if k not in indices}
        )
        if unknown and self.unknown == "error":
            listed = ", ".join(f"{name!r}: {n:,}" for name, n in unknown.most_common(10))
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            raise DataError(
                f"{self.path} has {unknown.total():,} annotations of unknown class ({listed}"
                f"{more}); add it to --classes, or use --unknown ignore or background"
            )
        for name, count in sorted(unknown.items()):
            scan.notes[f"annotations of {name!r} become {self.unknown}"] += count

    def match(
        self, scan: Scan, names: list[str], refused: list[str]
    ) -> tuple[dict[str, Record | None], list[str], list[str]]:
        """Return the record of each image, messages on missing images, and unlisted images."""
        finder = ImageFinder(self.kind, names)
        matched: dict[str, Record | None] = {}
        unpaired = []
        for record in scan.records:
            found = finder.find(record.image)
            where = f"{self.folder / record.file}" if self.kind in PER_IMAGE else f"{self.path}"
            if not found:
                what = (
                    "has no image" if self.kind in PER_IMAGE else f"lists {record.image}, missing"
                )
                unpaired.append(f"{where} {what} in {self.images}")
            elif len(found) > 1:
                refused.append(f"{where}: {record.image} may be {' or '.join(found[:3])}; "
                               "rename one")  # fmt: skip
            elif found[0] in matched:
                refused.append(f"{where}: the image {found[0]} is listed twice; remove one")
            else:
                matched[found[0]] = record
        unlisted = [name for name in names if name not in matched]
        if self.kind in PER_IMAGE:
            matched |= dict.fromkeys(unlisted)
            unlisted = []
        return matched, unpaired, unlisted

    def apply_unannotated(
        self, matched: dict[str, Record | None], refused: list[str]
    ) -> tuple[list[Pair], list[str]]:
        """Build the pairs; images without regions are kept, skipped or refused."""
        partial = self.kind in ("coco", "yolo")
        if any(record is not None and record.segments for record in matched.values()):
            partial = False  # panoptic annotations are complete
        policy = self.unannotated or ("background" if partial else "error")
        pairs, notes, bare = [], [], 0
        for name, record in matched.items():
            if record is None or not record.num_regions:
                bare += 1
                if policy == "error":
                    refused.append(
                        f"{self.images / name} has no annotations; annotate it, or add "
                        "--unannotated background or skip"
                    )
                if policy != "background":
                    continue
            if record is None:
                pairs.append(Pair(name, None))
            else:
                spans, segments = record.spans, record.segments
                pairs.append(Pair(name, record.file, spans=spans, segments=segments))
        if bare and policy != "error":
            what = "are all background" if policy == "background" else "are skipped"
            notes.append(f"{bare} images without annotations {what}")
        return pairs, notes


@dataclass(frozen=True, slots=True)
class Annotated:
    """Images paired with their annotations."""

    pairing: Pairing
    classes: tuple[str, ...]
    """Class names by index; class 0 is `background`."""
    rule: AnnotationRule
    notes: list[str]
    """What is unusual, for the report."""
    unlisted: list[str]
    """Paths of images that the annotations do not list, relative to the folder of images."""


def find_annotated(
    sources: Sequence[AnnotationSource], splits: Sequence[Split | None]
) -> Annotated:
    """Read one or several annotations, such as a COCO file for each split, as one data set.

    Classes that only some of them have are classes of all. Paths become relative to the deepest
    common folder. `splits`: split of the images of each source, None where none is declared.

    Raises DataError as `AnnotationSource.find`, and for labels that mean different classes.
    """
    found = [source.find() for source in sources]
    notes = [note for one in found for note in one.notes]
    classes = tuple(dict.fromkeys(name for one in found for name in one.classes))
    if any(one.classes != classes for one in found):
        for source, one in zip(sources, found, strict=True):
            if missing := [name for name in classes if name not in one.classes]:
                notes.append(f"{source.path} does not have the classes {', '.join(missing)}")
        found = [replace(source, classes=classes).find() for source in sources]
    rule = merge_rules([one.rule for one in found], sources)
    refused = [problem for one in found for problem in one.pairing.refused]
    unpaired = [problem for one in found for problem in one.pairing.unpaired]
    unpaired += describe_unlisted(sources, found)
    if len(sources) == 1:
        pairing = replace(found[0].pairing, unpaired=unpaired)
        return Annotated(pairing, classes, rule, notes, [])
    images = common_folder([source.images for source in sources])
    files = common_folder([source.folder for source in sources])
    pairs: dict[str, Pair] = {}
    for source, one, split in zip(sources, found, splits, strict=True):
        for pair in one.pairing.pairs:
            name = join_below(images, source.images, pair.source)
            if name in pairs:
                refused.append(f"{images / name} is listed in two of the annotations; remove one")
                continue
            inside = [
                path and join_below(files, source.folder, path)
                for path in (pair.mask, pair.segments)
            ]
            pairs[name] = Pair(name, inside[0], split, pair.spans, inside[1])
    kept = drop_key_collisions(pairs.values(), images, refused)
    return Annotated(Pairing(images, files, kept, unpaired, refused), classes, rule, notes, [])


def merge_rules(
    rules: Sequence[AnnotationRule], sources: Sequence[AnnotationSource]
) -> AnnotationRule:
    """Return the rule that draws the annotations of all sources.

    Raises DataError if a label (an id of COCO) is one class here and another there.
    """
    merged, names = dict(rules[0].paint.indices), dict(rules[0].paint.names)
    for rule, source in zip(rules[1:], sources[1:], strict=True):
        other = dict(rule.paint.names)
        for label, index in rule.paint.indices:
            if merged.setdefault(label, index) != index:
                raise DataError(
                    f"{source.path}: category {label} is {other.get(label, label)!r}, in "
                    f"{sources[0].path} it is {names.get(label, label)!r}; export both with the "
                    "same categories"
                )
        names = other | names
    paint = replace(rules[0].paint, indices=tuple(merged.items()), names=tuple(names.items()))
    return replace(rules[0], paint=paint)


def describe_unlisted(sources: Sequence[AnnotationSource], found: Sequence[Annotated]) -> list[str]:
    """Return a message on each image that is listed in none of the annotations of its folder."""
    unlisted: dict[Path, list[str]] = {}
    listing: dict[Path, list[str]] = defaultdict(list)
    for source, one in zip(sources, found, strict=True):
        others = {*one.unlisted}
        known = unlisted.get(source.images, one.unlisted)
        unlisted[source.images] = [name for name in known if name in others]
        listing[source.images].append(str(source.path))
    return [
        f"{folder / name} is not listed in {' or '.join(listing[folder])}"
        for folder, names in unlisted.items()
        for name in names
    ]


class ImageFinder:
    """Finds the images that a record may mean."""

    def __init__(self, kind: AnnotationFormat, names: list[str]) -> None:
        self.by_key: dict[str, list[str]] = defaultdict(list)
        for name in names:
            self.by_key[os.path.splitext(name)[0] if kind in PER_IMAGE else name].append(name)
        self.by_base: dict[str, list[str]] = defaultdict(list)
        if kind == "label-studio":
            for name in names:
                self.by_base[name.rpartition("/")[2]].append(name)

    def find(self, image: str) -> list[str]:
        """Return the images that `image` may mean: URLs of Label Studio have other folders."""
        base = image.rpartition("/")[2]
        return (
            self.by_key.get(image)
            or self.by_base.get(base)
            or self.by_base.get(UPLOAD.sub("", base, count=1))
            or []
        )


def first_name(names: Iterable[str]) -> str:
    """Return the first of some names, as an example in a message."""
    return min(names, default="nothing")


def read_yolo_names(folder: Path) -> tuple[str, ...]:
    """Read the names in `classes.txt`. Raises DataError if there is no such file."""
    for file in (folder / NAMES_FILE, folder.parent / NAMES_FILE):
        if file.is_file():
            return tuple(line.strip() for line in read_lines(file) if line.strip())
    raise DataError(
        f"{folder} does not name its classes; add --classes, the names of class 0, 1, 2, ... of "
        "the labels, or a data.yaml"
    )
