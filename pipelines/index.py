"""`unet index`: WebDataset shards that others wrote -> a data set; no shard is rewritten.

Each shard is looked at alone: that its tar is whole, that every picture and mask can be trained on.
Only when all of them are good are the `.idx` files written, and the manifest last.
"""

import hashlib
import json
import os
import posixpath
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np
import tyro

from pipelines.config import run_command
from pipelines.manifest import describe, make_manifest
from pipelines.parallel import num_workers, run_all
from pipelines.progress import progress
from pipelines.source import PictureConfig
from shards.foreign import (
    COPY_REMEDY,
    DECOMPRESS_REMEDY,
    Role,
    SampleMembers,
    group_members,
    read_member,
)
from shards.images import NOTES, ImageRule, StoredImage, load_pixels, open_image, read_image
from shards.index import MANIFEST, Manifest, MemberRange, ShardInfo, write_manifest
from shards.masks import (
    CANONICAL_RULE,
    CanonicalMask,
    ClassMap,
    MaskFormat,
    count_pixel_values,
    default_palette,
    format_counts,
)
from shards.pairs import SPLIT_NAMES, AggregateDataError, Split, walk_files
from shards.sample import (
    BORDER_EXTENSION,
    IGNORE,
    INFO_EXTENSION,
    MASK_EXTENSION,
    DataError,
    encode_key,
    is_safe_path,
)
from shards.store import Store
from shards.tally import SampleStatistics, StoredSample, find_duplicates, merge_statistics

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

FOREIGN_NOTES = {**NOTES, "turned": "have an EXIF orientation; they are turned when decoded"}

REPACK = "extract the tar and pack its files (unet pack, see --mask-suffix)"
"""What is left where a shard would have to be rewritten."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig(PictureConfig):
    """Make a data set of WebDataset shards that other programs wrote, for training as they are.

    Every picture and mask is decoded and checked. Masks must be PNGs (grey or palette) whose value
    is the class, 255 where nothing counts. Writes an .idx beside each shard and FOLDER/index.json.
    """

    folder: tyro.conf.Positional[Path]
    """Folder of the shards (*.tar), searched recursively."""
    classes: tuple[str, ...] = ()
    """Class names from class 0 on. Left out: the shards hold pictures alone."""
    image_ext: tuple[str, ...] = ("jpg", "jpeg", "png", "tif", "tiff", "bmp", "webp", "gif")
    """What follows the key in a picture's name: jpg for KEY.jpg, image.jpg for KEY.image.jpg."""
    mask_ext: str = MASK_EXTENSION
    """What follows the key in a mask's name: seg.png for KEY.seg.png."""
    split: Split | None = None
    """The split that all shards belong to. Left out: told by the folders and names of the shards
    (train, val, valid, validation, test); train where they say none."""

    def __post_init__(self) -> None:
        PictureConfig.__post_init__(self)
        if self.classes:
            MaskFormat(kind="index", num_classes=len(self.classes), ignore_value=IGNORE)
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"two classes have one name: {' '.join(self.classes)}")
        if self.split is not None and not self.classes:
            raise ValueError("--split needs --classes: pictures alone are the split unlabelled")
        self.roles()

    def roles(self) -> dict[str, Role]:
        """{extension: what such a member is}, the longest first."""
        pictures = {extension.lower().lstrip(".") for extension in self.image_ext}
        mask = self.mask_ext.lower().lstrip(".")
        # In an .idx these words mean json, mask and border map, whoever wrote it.
        taken = {INFO_EXTENSION, MASK_EXTENSION, BORDER_EXTENSION}
        if mask in ("", INFO_EXTENSION) or pictures & {"", *taken}:
            raise ValueError(
                f"--image-ext must not hold {INFO_EXTENSION} or {MASK_EXTENSION} or "
                f"{BORDER_EXTENSION}, --mask-ext must not be {INFO_EXTENSION}; no extension may be "
                "empty"
            )
        if not pictures - {mask}:
            raise ValueError(
                f"--mask-ext {self.mask_ext} leaves no extension for pictures; see --image-ext"
            )
        roles: dict[str, Role] = dict.fromkeys(pictures, "image")
        if self.classes:
            # Made of masks. Where there are none, it can only be the name of a picture.
            roles[BORDER_EXTENSION] = "border"
        roles |= {mask: "mask", INFO_EXTENSION: "json"}
        return dict(sorted(roles.items(), key=lambda item: (-len(item[0]), item[0])))

    def image_rule(self) -> ImageRule:
        """What pictures may be."""
        # Of a file with several frames the first is looked at, so that it can be named as such.
        return ImageRule(
            alpha=self.alpha, allow_16_bit=self.is_deep, frame=0, max_pixels=self.max_pixels
        )


@dataclass(frozen=True, slots=True)
class IndexRule:
    """What a worker needs besides its shard."""

    folder: Path
    num_classes: int
    """0: there are no masks."""
    images: ImageRule
    roles: dict[str, Role]


Equal = list[tuple[str, str]]
"""Shard and source of pictures that are equal."""


@dataclass(slots=True)
class FoundShard:
    """What was found in one shard."""

    name: str
    size: int = 0
    sha256: str = ""
    lines: list[str] = field(default_factory=list)
    """Of the .idx, one for each sample."""
    sources: list[str] = field(default_factory=list)
    """What each sample is called when it is unpacked."""
    tally: SampleStatistics = field(default_factory=SampleStatistics)
    ignored: Counter[str] = field(default_factory=Counter)
    """Members that no sample has, by kind."""
    problems: list[str] = field(default_factory=list)

    def index(self) -> bytes:
        """The content of the .idx."""
        return "\n".join([f"v1.2 {len(self.lines)}", *self.lines, ""]).encode()


def run(config: IndexConfig) -> int:
    """Look at every shard, refuse what is wrong with any, and write what makes a data set."""
    store = Store(str(config.folder))
    names = find_shards(config.folder)
    found = look_at_all(config, names)
    problems = [problem for shard in found for problem in shard.problems]
    splits: dict[str, str] = {}
    for shard in found:
        try:
            splits[shard.name] = split_of(shard.name, config)
        except DataError as error:
            problems.append(str(error))
    equal = [] if problems else equal_pictures(found)
    problems += leaks(equal, splits, config.folder)
    if problems:
        raise AggregateDataError(problems, "nothing was written")
    full = [shard for shard in found if shard.lines]
    if not full:
        raise DataError(
            f"{config.folder} holds {len(found)} shards without a picture; see --image-ext"
        )
    total = merge_statistics(shard.tally for shard in full)
    manifest = describe_shards(config, full, splits, equal, total)
    for shard in full:
        name = index_name(shard.name)
        if not store.exists(name):
            store.write(name, shard.index())
    write_manifest(store, manifest)
    lines = [
        *describe(config.folder, manifest, total, FOREIGN_NOTES),
        *warnings(config.folder, found, manifest),
    ]
    print("\n".join(lines))
    return 0


def find_shards(folder: Path) -> list[str]:
    """Paths of all shards below a folder, sorted.

    Raises DataError where there is none, where one is compressed, where there is a manifest.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    if (folder / MANIFEST).exists():
        raise DataError(f"{folder} is a data set already; remove its {MANIFEST} to index it anew")
    names = sorted(walk_files(str(folder)))
    compressed = [name for name in names if name.endswith(COMPRESSED)]
    if compressed:
        raise AggregateDataError(
            [f"{folder / n} is compressed" for n in compressed], DECOMPRESS_REMEDY
        )
    shards = [name for name in names if name.endswith(".tar")]
    if not shards:
        raise DataError(f"{folder} holds no shard (*.tar); pack pictures with unet pack")
    return shards


def index_name(shard: str) -> str:
    """Where the .idx of a shard lies."""
    return str(PurePosixPath(shard).with_suffix(".idx"))


def split_of(shard: str, config: IndexConfig) -> str:
    """The split that a shard belongs to. Raises DataError where its path names two."""
    if not config.classes:
        return "unlabelled"
    if config.split is not None:
        return config.split
    words = re.findall("[a-z]+", shard.lower())
    named = sorted({SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES})
    if len(named) > 1:
        raise DataError(
            f"{config.folder / shard} names the splits {' and '.join(named)}; "
            "rename it, or say --split"
        )
    return named[0] if named else "train"


def look_at_all(config: IndexConfig, names: Sequence[str]) -> list[FoundShard]:
    """Look at every shard, side by side, in the order of their names."""
    rule = IndexRule(config.folder, len(config.classes), config.image_rule(), config.roles())
    workers = num_workers(config.workers, len(names))
    found = []
    with progress(total=len(names), desc="index", unit="shard") as bar:
        for _, shard in run_all(partial(look_at, rule=rule), names, workers):
            found.append(shard)
            bar.update()
    return sorted(found, key=lambda shard: shard.name)


def look_at(name: str, rule: IndexRule) -> FoundShard:
    """Everything about one shard; what is wrong with it is listed, not raised."""
    found = FoundShard(name)
    path = rule.folder / name
    try:
        with path.open("rb") as file:
            # Reads it once as a whole, so that what follows comes from memory.
            found.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            found.size = os.fstat(file.fileno()).st_size
            members = group_members(file, path, rule.roles)
            found.ignored, found.problems = members.ignored, members.problems
            for key, group in members.samples.items():
                try:
                    add_sample(file, key, group, rule, found)
                except DataError as error:
                    found.problems.append(str(error))
        check_index(found, rule)
    except DataError as error:
        found.problems.append(str(error))
    except OSError as error:
        found.problems.append(f"{path} cannot be read: {error.strerror or error}; {COPY_REMEDY}")
    return found


def check_index(found: FoundShard, rule: IndexRule) -> None:
    """Raise DataError where an .idx is there that says something else."""
    path = rule.folder / index_name(found.name)
    if not found.problems and found.lines and path.exists() and path.read_bytes() != found.index():
        raise DataError(
            f"{path} is there and says something else than ours would; move it away, or remove it "
            "if nothing needs it"
        )


def add_sample(
    file: BinaryIO, key: str, group: SampleMembers, rule: IndexRule, found: FoundShard
) -> None:
    """Check a sample and count it in. Raises DataError for what cannot be trained on."""
    path = rule.folder / found.name
    picture, mask, info, border = map(group.get, ("image", "mask", "json", "border"))
    if mask is not None and not rule.num_classes:
        raise DataError(f"{path}: {mask.name} is a mask; name the classes with --classes")
    if picture is None and mask is None and border is None:
        found.ignored[f".{INFO_EXTENSION}"] += 1
        return
    if picture is None or (mask is None and rule.num_classes):
        alone, lacks = picture or mask or border, "picture" if picture is None else "mask"
        assert alone is not None
        raise DataError(f"{path}: {alone.name} has no {lacks}; see --image-ext and --mask-ext")
    sample = read_members(file, picture, mask, rule, path)
    members = [member for member in (picture, mask, border) if member is not None]
    source = f"{key}.{picture.extension.rpartition('.')[2].lower()}"
    if info is not None:
        described = read_info(read_member(file, info), key)
        if described is None:
            found.ignored[f".{INFO_EXTENSION}"] += 1
        else:
            members.append(info)
            source = described or source
    members.sort(key=lambda member: member.offset)
    found.lines.append(" ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in members))
    found.sources.append(source)
    found.tally.add(sample)


def read_members(
    file: BinaryIO, picture: MemberRange, mask: MemberRange | None, rule: IndexRule, path: Path
) -> StoredSample:
    """Picture and mask of a sample, decoded. Raises DataError for what must be rewritten."""
    where = f"{path}: {picture.name}"
    data = read_member(file, picture)
    image = read_image(data, rule.images, where)
    if "frame" in image.notes:
        raise DataError(f"{where} holds several frames; {REPACK}")
    digest = hashlib.sha256(data).hexdigest()
    if mask is None:
        return StoredSample(image, None, digest)
    mask_where = f"{path}: {mask.name}"
    canonical = read_canonical(read_member(file, mask), rule.num_classes, mask_where)
    if canonical.size != image.full_size:
        raise DataError(
            f"{mask_where} is {size_text(canonical.size)}, its picture {picture.name} "
            f"{size_text(image.full_size)}{turned_text(image)}; {REPACK}"
        )
    return StoredSample(image, canonical, digest)


def size_text(size: tuple[int, int]) -> str:
    """`640 x 480`."""
    return f"{size[0]} x {size[1]}"


def turned_text(image: StoredImage) -> str:
    """Why a picture's size may not be the one in its header."""
    return " when it is turned as its EXIF orientation says" if "turned" in image.notes else ""


def read_canonical(data: bytes, num_classes: int, where: str) -> CanonicalMask:
    """A mask that can be trained on as it is. Raises DataError for any other."""
    opened = open_image(data, where, CANONICAL_RULE)
    if opened.format != "PNG" or opened.mode not in ("P", "L"):
        raise DataError(
            f"{where} is {opened.format} of mode {opened.mode}; masks in shards are PNG of mode P "
            f"or L whose value is the class: {REPACK}"
        )
    image, _ = load_pixels(opened, where)
    index = np.asarray(image)
    counts = count_pixel_values(index)
    beyond = np.flatnonzero(counts[num_classes:IGNORE]) + num_classes
    if len(beyond):
        raise DataError(
            f"{where} holds values without a class: {format_counts(counts, beyond)}; "
            f"name all classes with --classes, or {REPACK}"
        )
    classes = ClassMap(index, counts, tuple(np.flatnonzero(counts).tolist()))
    return CanonicalMask(image.size, opened.mode, data, classes)


def read_info(data: bytes, key: str) -> str | None:
    """The `source` that a sample's json names, "" where it names none; None: not to be used.

    What others call `source` may be anything; ours gives the key.
    """
    try:
        info = json.loads(data)
        if not isinstance(info, dict):
            return None
        source = info.get("source", "")
        if source == "":
            return source
        if not isinstance(source, str) or not is_safe_path(source):
            return None
        return source if key in (encode_key(source), posixpath.splitext(source)[0]) else None
    except (ValueError, RecursionError):
        return None


def equal_pictures(found: Sequence[FoundShard]) -> list[Equal]:
    """Pictures that are equal byte for byte."""
    places = [(shard.name, source) for shard in found for source in shard.sources]
    digests = (digest for shard in found for digest in shard.tally.digests)
    groups = find_duplicates(digests, map(str, range(len(places)))).values()
    return [[places[int(number)] for number in group] for group in groups]


def leaks(equal: Sequence[Equal], splits: dict[str, str], folder: Path) -> list[str]:
    """Equal pictures in different splits, a line each."""
    return [
        " = ".join(f"{folder / shard}: {source} ({splits[shard]})" for shard, source in group[:5])
        + " are the same picture in two splits; remove it from one"
        for group in equal
        if len({splits[shard] for shard, _ in group}) > 1
    ]


def describe_shards(
    config: IndexConfig,
    found: Sequence[FoundShard],
    splits: dict[str, str],
    equal: Sequence[Equal],
    total: SampleStatistics,
) -> Manifest:
    """The manifest of shards that are all good."""
    num_classes = len(config.classes)
    infos: dict[str, list[ShardInfo]] = {}
    tallies: dict[str, SampleStatistics] = {}
    for shard in found:
        pixels = shard.tally.class_pixels(num_classes) if num_classes else ()
        info = ShardInfo(shard.name, len(shard.lines), shard.size, shard.sha256, pixels)
        infos.setdefault(splits[shard.name], []).append(info)
        tallies.setdefault(splits[shard.name], SampleStatistics()).merge(shard.tally)
    mask_format = {
        "kind": "index",
        "num_classes": num_classes,
        "ignore_value": IGNORE,
        "source_values": list(range(num_classes)),
    }
    return make_manifest(
        classes=config.classes,
        palette=default_palette(config.classes),
        image_format=config.image_format(total),
        mask_format=mask_format if num_classes else {},
        shards=infos,
        tallies=tallies,
        duplicates=[[f"{splits[shard]}:{source}" for shard, source in g] for g in equal],
        verified="full",
    )


def warnings(folder: Path, found: Sequence[FoundShard], manifest: Manifest) -> Iterator[str]:
    """What may be meant otherwise, and what to do next."""
    ignored = sum((shard.ignored for shard in found), Counter[str]())
    if ignored:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in ignored.most_common())
        yield f"  {ignored.total()} other members are passed over: {kinds}"
    empty = [shard.name for shard in found if not shard.lines]
    if empty:
        yield f"  warning: {len(empty)} shards without a sample are left out, the first: {empty[0]}"
    sources = Counter(source for shard in found for source in shard.sources)
    again = [source for source, count in sources.items() if count > 1]
    if again:
        yield (
            f"  warning: {len(again)} names occur in several shards, the first: {again[0]}; "
            "training sees all, but unpack and predict give one result a name"
        )
    if "train" in manifest.splits and "val" not in manifest.splits:
        yield "  warning: no shard is for val; let a folder or name of some begin with val"
    if "train" in manifest.splits:
        yield f"next: unet train --data {folder} --run-dir RUN"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_command(IndexConfig, run, argv, "index")


if __name__ == "__main__":
    sys.exit(main())
