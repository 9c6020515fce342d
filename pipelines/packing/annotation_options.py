"""Options of `check` and `pack` for annotations that are not mask images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from pipelines.runtime.errors import UsageError
from pipelines.runtime.strict_yaml import load_yaml, read_text
from pipelines.runtime.yaml_flags import refuse_unused
from shards.annotations.layouts import CityscapesIds, KnownLayout, LayoutName, read_layout
from shards.annotations.regions import AnnotationFormat, OverlapPolicy
from shards.annotations.source import (
    PER_IMAGE,
    Annotated,
    AnnotationSource,
    UnannotatedPolicy,
    find_annotated,
)
from shards.folders.split_names import Split, find_declared_splits
from shards.sample import DataError

YOLO_FILES = ("data.yaml", "data.yml", "dataset.yaml")
"""Files beside or above the labels that name the classes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotationOptions:
    """Annotations instead of masks: their outlines are drawn while packing."""

    annotations: tuple[Path, ...] = ()
    """File of annotations (coco, cvat, label-studio), or folder with one for each image (labelme,
    yolo). Class 0 is `background`; the other classes are those of the file, or --classes. Several:
    in the order of the folders of images, or (files) all for one folder; names that contain train,
    val or test set the split."""
    annotation_format: AnnotationFormat | None = None
    """coco: instances or panoptic JSON. labelme: JSON files. cvat: `CVAT for images 1.1`.
    label-studio: JSON export. yolo: segmentation labels, with --classes, a data.yaml or a
    classes.txt."""
    unannotated: UnannotatedPolicy | None = None
    """Images without annotations: all background, skipped, or an error; default: background for
    yolo and instances of coco, else error."""
    overlap: OverlapPolicy = "order"
    """order: a smaller region is on top of a larger one (coco), a later one on top of earlier ones
    (other formats; cvat: the higher z_order). error: regions of two classes may not overlap."""
    line_width: int | None = None
    """Width in pixels in which lines are drawn (labelme, cvat); default: lines are refused."""
    annotator: str = "error"
    """Whose annotation of a task is used if there are several (label-studio): `first`, or the id or
    email of the annotator; error: they are refused."""

    def __post_init__(self) -> None:
        if not self.annotations:
            refuse_unused(self, "needs --annotations")
            return
        if self.annotation_format is None:
            raise ValueError(
                "--annotations needs --annotation-format coco, labelme, cvat, label-studio or yolo"
            )
        if self.line_width is not None:
            if self.line_width < 1:
                raise ValueError(f"--line-width must be >= 1, got {self.line_width}")
            if self.annotation_format not in ("labelme", "cvat"):
                raise ValueError("--line-width applies to labelme and cvat only")
        if self.annotator != "error" and self.annotation_format != "label-studio":
            raise ValueError("--annotator applies to label-studio only")

    def refuse_folders(self, images: Sequence[Path]) -> None:
        """Raise ValueError unless there are annotations for each folder of images."""
        count = len(self.annotations)
        if len(images) == 1 and (count == 1 or self.annotation_format not in PER_IMAGE):
            return
        if len(images) != count:
            raise ValueError(
                f"--images has {len(images)} folders and --annotations {count}; list the "
                "annotations of every folder of images, in the same order"
            )

    def declared_splits(self, images: Sequence[Path]) -> list[Split | None]:
        """Return the split that the name of each folder of images, or of each file, declares."""
        if len(images) > 1:
            return find_declared_splits("--images", images)
        return find_declared_splits("--annotations", self.annotations)

    def make_sources(
        self, images: Sequence[Path], classes: tuple[str, ...], unknown: Any
    ) -> tuple[AnnotationSource, ...]:
        """Describe where annotations are; `unknown`: what labels without a class become."""
        assert self.annotation_format is not None
        folders = [*images] * (len(self.annotations) if len(images) == 1 else 1)
        return tuple(
            AnnotationSource(
                path=path,
                kind=self.annotation_format,
                images=folder,
                classes=classes,
                unannotated=self.unannotated,
                unknown=unknown,
                overlap=self.overlap,
                line_width=self.line_width,
                annotator=self.annotator,
            )
            for folder, path in zip(folders, self.annotations, strict=True)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LayoutOptions:
    """The directory layout of a public data set."""

    layout: tuple[LayoutName | Literal["auto"], Path] | None = None
    """NAME FOLDER: voc (VOCdevkit/VOC2012), cityscapes (with leftImg8bit and gtFine), ade20k
    (ADEChallengeData2016), camvid (SegNet's), nnunet (Dataset001_NAME, 2-D). Gives images, masks,
    classes, colours and splits; --classes renames them. auto: print the command for what lies in
    FOLDER, and stop."""
    cityscapes_ids: CityscapesIds = "train"
    """Classes of Cityscapes: the 19 training classes, others ignored, or all 34 labels."""

    def __post_init__(self) -> None:
        if self.cityscapes_ids != "train" and (self.layout or ("",))[0] != "cityscapes":
            raise ValueError("--cityscapes-ids applies to --layout cityscapes only")

    def find(self, classes: tuple[str, ...]) -> KnownLayout | None:
        """Read the layout, once in a run; None without one. `classes` replace its names.

        Raises:
            UsageError: another number of names.
            DataError: the folder does not have the layout.
        """
        if self.layout is None or self.layout[0] == "auto":
            return None
        known = find_layout(self.layout[0], self.layout[1], self.cityscapes_ids)
        if not classes:
            return known
        if len(classes) != len(known.classes):
            raise UsageError(
                f"--classes: {len(classes)} names for the {len(known.classes)} classes of --layout "
                f"{self.layout[0]}; give one per class"
            )
        return replace(known, classes=classes)


find_layout = lru_cache(maxsize=1)(read_layout)


@lru_cache(maxsize=1)
def read_annotated(
    sources: tuple[AnnotationSource, ...], splits: tuple[Split | None, ...]
) -> Annotated:
    """Read annotations once in a run. Raises DataError as `find_annotated` does."""
    return find_annotated(
        [
            replace(source, classes=read_yolo_yaml(source.path))
            if source.kind == "yolo" and not source.classes
            else source
            for source in sources
        ],
        splits,
    )


def read_yolo_yaml(folder: Path) -> tuple[str, ...]:
    """Read `names` from a YAML file beside or above the labels; () if there is none.

    Raises DataError for a file without a list of names.
    """
    places = (folder, *folder.absolute().parents[:2])
    file = next((p / name for p in places for name in YOLO_FILES if (p / name).is_file()), None)
    if file is None:
        return ()
    try:
        plain = load_yaml(read_text(file))
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"{file}: {' '.join(str(error).split())}; add --classes instead") from error
    names = plain.get("names") if isinstance(plain, dict) else None
    if isinstance(names, dict):
        keys = [str(key) for key in names]
        if keys != [str(number) for number in range(len(names))]:
            raise DataError(
                f"{file}: the keys of names are not 0, 1, 2, ...; add --classes instead"
            )
        names = list(names.values())
    if not isinstance(names, list) or not names:
        raise DataError(f"{file} has no list of names; add --classes instead")
    if other := [name for name in names if not isinstance(name, str)]:
        raise DataError(f"{file}: names: {other[0]} is not a name; quote it, or add --classes")
    return tuple(names)
