"""Directory layouts of public data sets: pairs, splits, classes and mask values by name."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from shards.annotations.ade20k import ADE20K
from shards.annotations.class_tables import (
    CAMVID,
    CITYSCAPES,
    CITYSCAPES_ALL,
    CITYSCAPES_IDS,
    VOC,
)
from shards.folders.pairs import Pair, Pairing, drop_key_collisions
from shards.folders.split_names import SPLIT_NAMES, Split
from shards.folders.walk import read_lines, walk_files
from shards.local_files import read_file
from shards.masks.formats import MaskFormat
from shards.masks.palettes import default_palette
from shards.sample import IGNORE, DataError, Palette

LayoutName = Literal["voc", "cityscapes", "ade20k", "camvid", "nnunet"]
CityscapesIds = Literal["train", "all"]
VOLUMES = (".nii.gz", ".nii", ".nrrd", ".mha")
MAX_NAMED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownLayout:
    """What a layout declares about the data in a folder."""

    pairing: Pairing
    classes: tuple[str, ...]
    masks: MaskFormat
    palette: Palette
    group_by: str | None = None
    """Regular expression of what stays in one split."""
    notes: tuple[str, ...] = ()
    """Files that the layout omits, with their number."""


def read_layout(name: LayoutName, root: Path, cityscapes_ids: CityscapesIds) -> KnownLayout:
    """Find the images and masks of a layout.

    Raises DataError naming what is missing if the folder does not have this layout.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a directory; correct --layout {name} FOLDER")
    match name:
        case "voc":
            return read_voc(root)
        case "cityscapes":
            return read_cityscapes(root, cityscapes_ids)
        case "ade20k":
            return read_ade20k(root)
        case "camvid":
            return read_camvid(root)
        case "nnunet":
            return read_nnunet(root)


def require(root: Path, name: LayoutName, *folders: str) -> None:
    """Raise DataError if a folder or file of the layout is missing."""
    missing = [folder for folder in folders if not (root / folder).exists()]
    if missing:
        found = recognise_layout(root)
        raise DataError(
            f"--layout {name}: {root} has no {missing[0]}; "
            + (f"it looks like --layout {found}" if found else "give the folder that contains it")
        )


def recognise_layout(root: Path) -> LayoutName | None:
    """Return the layout that a folder has, None if it has none."""
    marks: dict[LayoutName, tuple[str, ...]] = {
        "voc": ("JPEGImages", "SegmentationClass"),
        "cityscapes": ("leftImg8bit", "gtFine"),
        "ade20k": ("images/training", "annotations/training"),
        "camvid": ("train", "trainannot"),
        "nnunet": ("imagesTr", "labelsTr"),
    }
    return next(
        (name for name, parts in marks.items() if all((root / part).is_dir() for part in parts)),
        None,
    )


def pair_files(
    images: Path, masks: Path, name_mask: Callable[[str], str | None], split: Callable[[str], Any]
) -> tuple[list[Pair], list[str], list[str]]:
    """Pair the images below a folder with the mask whose path `name_mask` returns.

    Args:
        images: folder of the images.
        masks: folder of the masks.
        name_mask: returns the path of an image's mask, None if the file is not an image.
        split: returns the split of an image.

    Returns:
        Pairs, messages on images without a mask, and masks without an image.
    """
    found = set(walk_files(str(masks)))
    pairs, unpaired = [], []
    for source in sorted(walk_files(str(images))):
        mask = name_mask(source)
        if mask is None:
            continue
        if mask in found:
            found.discard(mask)
            pairs.append(Pair(source, mask, split(source)))
        else:
            unpaired.append(f"{images / source} has no mask {masks / mask}")
    return pairs, unpaired, sorted(found)


def make_pairing(images: Path, masks: Path, pairs: list[Pair], unpaired: list[str]) -> Pairing:
    """Build the pairing of a layout; images that share a key are refused."""
    refused: list[str] = []
    return Pairing(images, masks, drop_key_collisions(pairs, images, refused), unpaired, refused)


def read_voc(root: Path) -> KnownLayout:
    """Pascal VOC: palette masks of 21 classes, 255 void, lists of the segmentation splits."""
    lists = root / "ImageSets" / "Segmentation"
    require(root, "voc", "JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
    images, masks = root / "JPEGImages", root / "SegmentationClass"
    splits = {name: lists / f"{name}.txt" for name in ("train", "val", "test")}
    if not splits["train"].is_file():
        raise DataError(f"--layout voc: {lists} has no train.txt; restore the list of the split")
    pairs, problems, unlabelled = [], [], 0
    for split, file in splits.items():
        if not file.is_file():
            continue
        for stem in (line.strip() for line in read_lines(file)):
            if not stem:
                continue
            if not (masks / f"{stem}.png").is_file():
                if split == "test":
                    unlabelled += 1
                else:
                    problems.append(f"{file} lists {stem}, which has no {masks / stem}.png")
            elif not (images / f"{stem}.jpg").is_file():
                problems.append(f"{file} lists {stem}, which has no {images / stem}.jpg")
            else:
                pairs.append(Pair(f"{stem}.jpg", f"{stem}.png", SPLIT_NAMES[split]))
    listed = {pair.source for pair in pairs}
    others = sum(name not in listed for name in walk_files(str(images)))
    notes = [f"{others} images without a segmentation are not packed"] if others else []
    if unlabelled:
        notes.append(f"{unlabelled} images of test.txt have no mask and are not packed")
    return KnownLayout(
        pairing=make_pairing(images, masks, pairs, problems),
        classes=VOC.names,
        masks=MaskFormat(kind="index", num_classes=len(VOC.names), ignore_value=IGNORE),
        palette=VOC.colours,
        notes=tuple(notes),
    )


def first_folder_split(source: str) -> Split:
    """Return the split that the first folder of a path names."""
    split = SPLIT_NAMES.get(source.partition("/")[0].lower())
    if split is None:
        raise DataError(f"{source} is not in a folder named train, val or test; move it")
    return split


def read_cityscapes(root: Path, ids: CityscapesIds) -> KnownLayout:
    """Cityscapes: `labelIds` as 19 training classes, the rest ignored, or as all 34 labels."""
    require(root, "cityscapes", "leftImg8bit", "gtFine")
    images, masks = root / "leftImg8bit", root / "gtFine"
    end = "_leftImg8bit.png"

    def name_mask(source: str) -> str | None:
        if not source.endswith(end):
            return None
        return f"{source.removesuffix(end)}_gtFine_labelIds.png"

    pairs, unpaired, others = pair_files(images, masks, name_mask, first_folder_split)
    if ids == "train":
        table, values = CITYSCAPES, CITYSCAPES_IDS
        form = MaskFormat(kind="values", num_classes=19, values=values, unknown="ignore")
    else:
        table = CITYSCAPES_ALL
        form = MaskFormat(kind="index", num_classes=34, ignore_value=IGNORE)
    others = [name for name in others if name.endswith("_labelIds.png")]
    unpaired += [f"{masks / name} has no image in {images}" for name in others]
    return KnownLayout(
        pairing=make_pairing(images, masks, pairs, unpaired),
        classes=table.names,
        masks=form,
        palette=table.colours,
        group_by="^[^/]+/([^/]+)/",
    )


def read_ade20k(root: Path) -> KnownLayout:
    """ADE20K scene parsing: values 1 to 150 are the classes, 0 is ignored."""
    require(root, "ade20k", "images/training", "annotations/training")
    images, masks = root / "images", root / "annotations"
    pairs, unpaired, others = pair_files(
        images, masks, lambda source: f"{os.path.splitext(source)[0]}.png", first_folder_split
    )
    unpaired += [f"{masks / name} has no image in {images}" for name in others]
    form = MaskFormat(kind="values", num_classes=150, values=tuple(range(1, 151)), ignore_value=0)
    return KnownLayout(
        pairing=make_pairing(images, masks, pairs, unpaired),
        classes=ADE20K.names,
        masks=form,
        palette=ADE20K.colours,
    )


def read_camvid(root: Path) -> KnownLayout:
    """CamVid as SegNet distributes it: 11 classes, 11 is void; lists with absolute paths."""
    require(root, "camvid", "train", "trainannot")
    pairs: list[Pair] = []
    problems: list[str] = []
    for split in ("train", "val", "test"):
        for image, mask, where in list_camvid(root, split):
            missing = [name for name in (image, mask) if not (root / name).is_file()]
            if missing:
                problems.append(f"{where} names {missing[0]}, missing in {root}")
            else:
                pairs.append(Pair(image, mask, SPLIT_NAMES[split]))
    return KnownLayout(
        pairing=make_pairing(root, root, pairs, problems),
        classes=CAMVID.names,
        masks=MaskFormat(kind="index", num_classes=len(CAMVID.names), ignore_value=11),
        palette=CAMVID.colours,
    )


def list_camvid(root: Path, split: str) -> Iterator[tuple[str, str, str]]:
    """Yield image, mask and where they are named; of listed paths, only the last two parts count.

    Raises DataError for a line that is not a pair.
    """
    file = root / f"{split}.txt"
    if not file.is_file():
        folder = root / split
        for name in sorted(walk_files(str(folder))) if folder.is_dir() else []:
            yield f"{split}/{name}", f"{split}annot/{name}", f"{folder / name}"
        return
    for number, line in enumerate(read_lines(file), 1):
        words = line.split()
        if len(words) not in (0, 2):
            raise DataError(f"{file}, line {number} is not `image mask`; correct it")
        if words:
            image, mask = ("/".join(Path(word).parts[-2:]) for word in words)
            if ".." in (*Path(image).parts, *Path(mask).parts):
                raise DataError(f"{file}, line {number}: {line!r} leaves the folder; correct it")
            yield image, mask, f"{file}, line {number}"


def read_nnunet(root: Path) -> KnownLayout:
    """nnU-Net raw data of 2-D images: one file of channel 0000 for each case, `dataset.json`."""
    require(root, "nnunet", "imagesTr", "labelsTr", "dataset.json")
    file = root / "dataset.json"
    try:
        plain = json.loads(read_file(file))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not valid JSON; copy it again") from error
    end = plain.get("file_ending", ".png") if isinstance(plain, dict) else ".png"
    images, masks = root / "imagesTr", root / "labelsTr"
    volume = next((n for n in walk_files(str(images)) if n.lower().endswith(VOLUMES)), None)
    if volume is not None:
        raise DataError(
            f"{images / volume} is a volume, and volumes are out of scope: export its slices as PNG"
        )
    several = sorted(n for n in walk_files(str(images)) if n.endswith(f"_0001{end}"))
    if several:
        raise DataError(
            f"{images / several[0]} is a second channel; merge the channels of a case into one "
            f"file of grey or RGB, *_0000{end}"
        )

    def name_mask(source: str) -> str | None:
        suffix = f"_0000{end}"
        return f"{source.removesuffix(suffix)}{end}" if source.endswith(suffix) else None

    pairs, unpaired, others = pair_files(images, masks, name_mask, lambda _: None)
    unpaired += [f"{masks / name} has no image *_0000{end} in {images}" for name in others]
    classes, form = read_nnunet_labels(file, plain)
    extra = root / "imagesTs"
    count = sum(1 for _ in walk_files(str(extra))) if extra.is_dir() else 0
    return KnownLayout(
        pairing=make_pairing(images, masks, pairs, unpaired),
        classes=classes,
        masks=form,
        palette=default_palette(classes),
        notes=(f"{count} files of imagesTs are not packed",) if count else (),
    )


def read_nnunet_labels(file: Path, plain: Any) -> tuple[tuple[str, ...], MaskFormat]:
    """Read the classes and the `ignore` label of a `dataset.json`. Raises DataError."""
    labels = plain.get("labels") if isinstance(plain, dict) else None
    if isinstance(labels, dict) and any(isinstance(value, list) for value in labels.values()):
        raise DataError(f"{file}: labels are regions (lists of values); give each class one value")
    if isinstance(labels, dict) and all(str(key).isdigit() for key in labels):
        # nnU-Net 1 maps values to names.
        labels = {name: int(value) for value, name in labels.items()}
    if (
        not isinstance(labels, dict)
        or len(labels) < 2
        or not all(type(v) is int and 0 <= v <= IGNORE for v in labels.values())
        or len(set(labels.values())) != len(labels)
    ):
        raise DataError(f"{file}: labels must give each class a value of its own, 0 to 255")
    ignored = labels.pop("ignore", None)
    names = sorted(labels, key=lambda name: labels[name])
    values = tuple(labels[name] for name in names)
    form = MaskFormat(kind="values", num_classes=len(names), values=values, ignore_value=ignored)
    if values == tuple(range(len(values))):
        form = replace(form, kind="index", values=())
    return tuple(names), form
