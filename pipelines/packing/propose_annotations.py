"""Find annotations in a folder, and propose the flags that pack them."""

import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipelines.packing.annotation_options import read_yolo_yaml
from shards.annotations.label_studio import UPLOAD
from shards.annotations.regions import AnnotationFormat
from shards.annotations.scan import Scan
from shards.annotations.signatures import recognise_file
from shards.annotations.source import PER_IMAGE, AnnotationSource, read_yolo_names
from shards.annotations.yolo import scan_yolo
from shards.folders.split_names import find_named_split
from shards.folders.walk import relative_path, walk_files
from shards.images.files import IMAGE_EXTENSIONS
from shards.masks.proposal import RENAME_NOTE
from shards.sample import DataError

EXTENSIONS = (".json", ".xml", ".txt")
MAX_LOOKED_AT = 5
"""Files of a folder whose content is examined."""
MAX_COMPARED = 1000
"""Records whose image is searched for."""


@dataclass(frozen=True, slots=True)
class AnnotationProposal:
    """Annotations in a folder."""

    words: tuple[str, ...]
    """The flags that read them."""
    notes: tuple[str, ...]
    """What is unsure, one line each."""
    panoptic: bool
    """Whether PNGs belong to them, which must not be taken for masks."""


def propose_annotations(
    root: Path, names: Sequence[str], images: Sequence[str]
) -> AnnotationProposal | None:
    """Propose the flags for the annotations of a folder; None if there are none.

    Args:
        root: the folder.
        names: relative paths of its files that are not images.
        images: relative paths of its images.
    """
    kinds = recognise_files(root, names)
    if not kinds or not images:
        return None
    kind = Counter(kinds.values()).most_common(1)[0][0]
    chosen = sorted(name for name, other in kinds.items() if other == kind)
    places = list(dict.fromkeys(map(os.path.dirname, chosen))) if kind in PER_IMAGE else chosen
    common = os.path.commonpath(places) if kind in PER_IMAGE else places[0]
    if kind not in PER_IMAGE and (both := propose_splits(root, kind, chosen, images)):
        return both
    place, scan = common, scan_place(root / common, kind, root)
    folder = find_image_folder(kind, place, scan, images)
    if folder is None and common != places[0]:
        # Where images and labels are side by side in each split, one split can be read at a time.
        place, scan = places[0], scan_place(root / places[0], kind, root)
        folder = find_image_folder(kind, place, scan, images)
    if folder is None:
        folder = os.path.commonpath([os.path.dirname(name) for name in images])
    return AnnotationProposal(
        *describe_flags(root, kind, folder, place, places, scan),
        any(record.segments for record in scan.records),
    )


def propose_splits(
    root: Path, kind: AnnotationFormat, files: Sequence[str], images: Sequence[str]
) -> AnnotationProposal | None:
    """Propose the flags for one file per split, such as COCO's; None if there are no such files.

    Of several files of one split (COCO also has captions and keypoints), `instances` is read.
    """
    named = [name for name in files if os.path.basename(name).startswith("instances")]
    splits = [find_named_split(Path(name).stem) for name in named or files]
    if len(splits) < 2 or None in splits or len({*splits}) < len(splits):
        return None
    files = named or files
    scans = [scan_place(root / name, kind, root) for name in files]
    folders = [
        find_image_folder(kind, os.path.dirname(name), scan, images)
        for name, scan in zip(files, scans, strict=True)
    ]
    found = [str(root / folder) for folder in folders if folder is not None]
    if len(found) < len(files) or len({*found}) not in (1, len(found)):
        return None
    words = ["--images", *dict.fromkeys(found), "--annotations", *(str(root / n) for n in files)]
    words += ["--annotation-format", kind]
    segments = any(record.segments for scan in scans for record in scan.records)
    return AnnotationProposal(tuple(words), (), segments)


def describe_flags(
    root: Path,
    kind: AnnotationFormat,
    folder: str,
    place: str,
    places: Sequence[str],
    scan: Scan,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the flags that read annotations, and notes on what they leave out.

    Args:
        root: folder of all paths.
        kind: the format.
        folder: folder of the images.
        place: file or folder of the annotations.
        places: all files or folders of annotations.
        scan: their records.
    """
    others = len(places) - 1 if place == places[0] else 0
    words = ["--images", str(root / folder), "--annotations", str(root / place)]
    words += ["--annotation-format", kind]
    notes = []
    if others:
        notes.append(f"{others} more {kind} annotations, such as {root / places[1]}: pack each "
                     "into a folder of its own")  # fmt: skip
    if kind == "yolo" and not name_classes(root / place):
        words += ["--classes", *(f"class_{number}" for number in range(count_classes(scan)))]
        notes.append(RENAME_NOTE)
    return tuple(words), tuple(notes)


def propose_between(images: Sequence[Path], masks: Sequence[Path]) -> AnnotationProposal | None:
    """Propose flags for annotations in folders that were taken for folders of masks."""
    paths = [
        f"{folder.absolute()}/{name}"
        for folder in dict.fromkeys((*images, *masks))
        if folder.is_dir()
        for name in walk_files(str(folder))
    ]
    if not paths:
        return None
    root = Path(os.path.commonpath([os.path.dirname(path) for path in paths]))
    names = [relative_path(path, root) for path in paths]
    shown = [name for name in names if os.path.splitext(name.lower())[1] in IMAGE_EXTENSIONS]
    return propose_annotations(root, names, shown)


def recognise_files(root: Path, names: Sequence[str]) -> dict[str, AnnotationFormat]:
    """Return the format of the first files of annotations in each folder."""
    kinds: dict[str, AnnotationFormat] = {}
    looked: Counter[str] = Counter()
    for name in sorted(names):
        if os.path.splitext(name.lower())[1] not in EXTENSIONS:
            continue
        folder = os.path.dirname(name)
        looked[folder] += 1
        if looked[folder] <= MAX_LOOKED_AT:
            kind = recognise_file(root / name)
            if kind is not None:
                kinds[name] = kind
    return kinds


def scan_place(path: Path, kind: AnnotationFormat, images: Path) -> Scan:
    """Read annotations to learn which images they name; an empty scan if they are damaged."""
    try:
        if kind == "yolo":
            return scan_yolo(path, ())
        return AnnotationSource(path=path, kind=kind, images=images, annotator="first").scan()
    except DataError:
        # Reported when the proposed command is run.
        return Scan()


def find_image_folder(
    kind: AnnotationFormat, place: str, scan: Scan, images: Sequence[str]
) -> str | None:
    """Return the folder from which most of the images of some records are found; None if none is.

    Args:
        kind: the format.
        place: folder or file of the annotations: its own images are preferred.
        scan: the records.
        images: relative paths of the images.
    """
    by_base: dict[str, list[str]] = defaultdict(list)
    for name in images:
        path = os.path.splitext(name)[0] if kind in PER_IMAGE else name
        by_base[path.rpartition("/")[2]].append(path)
    votes: Counter[str] = Counter()
    for record in islice(scan.records, MAX_COMPARED):
        base = record.image.rpartition("/")[2]
        for path in by_base.get(base) or by_base.get(UPLOAD.sub("", base, count=1), ()):
            if kind == "label-studio":
                votes[os.path.dirname(path)] += 1
            elif f"/{path}".endswith(f"/{record.image}"):
                votes[path[: -len(record.image)].rstrip("/")] += 1
    if not votes:
        return None
    if kind == "label-studio":
        return os.path.commonpath(list(votes))
    most = max(votes.values())
    return place if votes[place] == most else min(f for f, count in votes.items() if count == most)


def name_classes(folder: Path) -> bool:
    """Return whether a file beside YOLO labels names their classes."""
    try:
        return bool(read_yolo_yaml(folder) or read_yolo_names(folder))
    except DataError:
        return False


def count_classes(scan: Scan) -> int:
    """Return the number of classes that the labels of YOLO need."""
    return 1 + max((int(label) for label in scan.labels), default=0)


def join_command(verb: str, words: list[str] | tuple[str, ...]) -> str:
    """Return the command line of `pack` or `check`; only packing needs --out."""
    return shlex.join(["unet", verb, *words, *(("--out", "SHARDS") if verb == "pack" else ())])
