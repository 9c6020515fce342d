"""`unet index`: WebDataset shards from other tools -> a data set; no shard is rewritten.

Each shard is inspected on its own: its tar must be complete, and every image and mask valid for
training. Only if all shards are valid are the `.idx` files written, and the manifest last.
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

from pipelines.config import Flat, describe_read_error, run_command
from pipelines.manifest import make_manifest, summarise
from pipelines.parallel import num_workers, refuse_negative_workers, run_all
from pipelines.progress import progress
from pipelines.source import ImageOptions
from shards.foreign import (
    COPY_REMEDY,
    DECOMPRESS_REMEDY,
    Role,
    SampleMembers,
    group_members,
    read_member,
)
from shards.images import NOTES, ImageRule, load_pixels, open_image, read_image
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

FOREIGN_NOTES = {**NOTES, "turned": "have an EXIF orientation; they are rotated when decoded"}

REPACK = "extract the tar and pack its files (unet pack, see --mask-suffix)"
"""Remedy where a shard would have to be rewritten."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexConfig:
    """Turn WebDataset shards from other tools into a data set, without rewriting them.

    Every image and mask is decoded and checked. Masks must be PNGs (grayscale or palette) whose
    pixel value is the class index, 255 where ignored. Writes an .idx file next to each shard, and
    FOLDER/index.json.
    """

    folder: tyro.conf.Positional[Path]
    """Folder of the shards (*.tar), searched recursively."""
    classes: tuple[str, ...] = ()
    """Class names, from class 0 on; default: the shards contain images without masks."""
    image_ext: tuple[str, ...] = ("jpg", "jpeg", "png", "tif", "tiff", "bmp", "webp", "gif")
    """Extensions of images, after the key: jpg for KEY.jpg, image.jpg for KEY.image.jpg."""
    mask_ext: str = MASK_EXTENSION
    """Extension of masks, after the key: seg.png for KEY.seg.png."""
    split: Split | None = None
    """Split of all shards; default: the word train, val, valid, validation or test in the path of
    each shard, else train."""
    workers: int = 0
    """Processes; 0: one per CPU."""
    image: Flat[ImageOptions] = field(default_factory=ImageOptions)

    def __post_init__(self) -> None:
        refuse_negative_workers(self.workers)
        if self.classes:
            MaskFormat(kind="index", num_classes=len(self.classes), ignore_value=IGNORE)
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"--classes: duplicate name in {' '.join(self.classes)}")
        if self.split is not None and not self.classes:
            raise ValueError("--split needs --classes: without masks, the split is `unlabelled`")
        self.member_roles()

    def member_roles(self) -> dict[str, Role]:
        """Return {extension: role of such a member}, longest extension first."""
        images = {extension.lower().lstrip(".") for extension in self.image_ext}
        mask = self.mask_ext.lower().lstrip(".")
        # In an .idx file these extensions are reserved for json, mask and border map.
        reserved = {INFO_EXTENSION, MASK_EXTENSION, BORDER_EXTENSION}
        if mask in ("", INFO_EXTENSION) or images & {"", *reserved}:
            raise ValueError(
                f"--image-ext must not contain {INFO_EXTENSION}, {MASK_EXTENSION} or "
                f"{BORDER_EXTENSION}, --mask-ext must not be {INFO_EXTENSION}, and no extension "
                "may be empty"
            )
        if not images - {mask}:
            raise ValueError(
                f"--mask-ext {self.mask_ext} leaves no extension for images; see --image-ext"
            )
        roles: dict[str, Role] = dict.fromkeys(images, "image")
        if self.classes:
            # Border maps are made of masks: without masks, only an image can have this name.
            roles[BORDER_EXTENSION] = "border"
        roles |= {mask: "mask", INFO_EXTENSION: "json"}
        return dict(sorted(roles.items(), key=lambda item: (-len(item[0]), item[0])))


@dataclass(frozen=True, slots=True)
class IndexRule:
    """What a worker needs to know besides its shard."""

    folder: Path
    num_classes: int
    """0 without masks."""
    images: ImageRule
    roles: dict[str, Role]


Duplicates = list[tuple[str, str]]
"""(shard, source) of byte-identical images."""


@dataclass(slots=True)
class ShardContents:
    """Contents and problems of one shard."""

    name: str
    size: int = 0
    sha256: str = ""
    lines: list[str] = field(default_factory=list)
    """Lines of the .idx file, one per sample."""
    sources: list[str] = field(default_factory=list)
    """Path of each sample when it is unpacked."""
    tally: SampleStatistics = field(default_factory=SampleStatistics)
    ignored: Counter[str] = field(default_factory=Counter)
    """Number of members that belong to no sample, by kind."""
    problems: list[str] = field(default_factory=list)

    def encode_offsets(self) -> bytes:
        """Encode the .idx file."""
        return "\n".join([f"v1.2 {len(self.lines)}", *self.lines, ""]).encode()


def run(config: IndexConfig) -> int:
    """Inspect all shards; if all are valid, write the .idx files and the manifest."""
    store = Store(str(config.folder))
    names = find_shards(config.folder)
    shards = inspect_shards(config, names)
    problems = [problem for shard in shards for problem in shard.problems]
    splits: dict[str, str] = {}
    for shard in shards:
        try:
            splits[shard.name] = choose_split(shard.name, config)
        except DataError as error:
            problems.append(str(error))
    duplicates = [] if problems else find_duplicate_images(shards)
    problems += describe_leaks(duplicates, splits, config.folder)
    if problems:
        raise AggregateDataError(problems, "nothing was written")
    filled = [shard for shard in shards if shard.lines]
    if not filled:
        raise DataError(f"{config.folder}: {len(shards)} shards without an image; see --image-ext")
    total = merge_statistics(shard.tally for shard in filled)
    manifest = build_manifest(config, filled, splits, duplicates, total)
    for shard in filled:
        name = offsets_name(shard.name)
        if not store.exists(name):
            store.write(name, shard.encode_offsets())
    write_manifest(store, manifest)
    lines = [
        *summarise(config.folder, manifest, total, FOREIGN_NOTES),
        *list_warnings(shards, manifest),
        *suggest_training(config.folder, manifest),
    ]
    print("\n".join(lines))
    return 0


def find_shards(folder: Path) -> list[str]:
    """List all shards below a folder as sorted relative paths.

    Raises DataError if there are none, if one is compressed, or if there is a manifest.
    """
    if not folder.exists():
        raise DataError(f"{folder} does not exist")
    if not folder.is_dir():
        raise DataError(f"{folder} is not a directory")
    if (folder / MANIFEST).exists():
        raise DataError(f"{folder} is already a data set; remove its {MANIFEST} to index it again")
    names = sorted(walk_files(str(folder)))
    compressed = [name for name in names if name.endswith(COMPRESSED)]
    if compressed:
        raise AggregateDataError(
            [f"{folder / n} is compressed" for n in compressed], DECOMPRESS_REMEDY
        )
    shards = [name for name in names if name.endswith(".tar")]
    if not shards:
        raise DataError(f"{folder} contains no shards (*.tar); pack images with unet pack")
    return shards


def offsets_name(shard: str) -> str:
    """Path of the .idx file of a shard."""
    return str(PurePosixPath(shard).with_suffix(".idx"))


def choose_split(shard: str, config: IndexConfig) -> str:
    """Choose the split of a shard. Raises DataError if its path names several."""
    if not config.classes:
        return "unlabelled"
    if config.split is not None:
        return config.split
    words = re.findall("[a-z]+", shard.lower())
    named = sorted({SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES})
    if len(named) > 1:
        raise DataError(
            f"{config.folder / shard} names the splits {' and '.join(named)}; "
            "rename it, or use --split"
        )
    return named[0] if named else "train"


def inspect_shards(config: IndexConfig, names: Sequence[str]) -> list[ShardContents]:
    """Inspect all shards in parallel; returns them sorted by name."""
    # The first frame of multi-frame files is read, so that they are refused by name.
    images = config.image.make_rule(frame=0)
    rule = IndexRule(config.folder, len(config.classes), images, config.member_roles())
    workers = num_workers(config.workers, len(names))
    shards = []
    with progress(total=len(names), desc="index", unit="shard") as bar:
        for _, shard in run_all(partial(inspect_shard, rule=rule), names, workers):
            shards.append(shard)
            bar.update()
    return sorted(shards, key=lambda shard: shard.name)


def inspect_shard(name: str, rule: IndexRule) -> ShardContents:
    """Read and check one shard; its problems are listed, not raised."""
    contents = ShardContents(name)
    path = rule.folder / name
    try:
        with path.open("rb") as file:
            # The file is read completely first, so that all later reads hit the page cache.
            contents.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            contents.size = os.fstat(file.fileno()).st_size
            members = group_members(file, path, rule.roles)
            contents.ignored, contents.problems = members.ignored, members.problems
            for key, group in members.samples.items():
                try:
                    add_sample(file, key, group, rule, contents)
                except DataError as error:
                    contents.problems.append(str(error))
        refuse_other_offsets(contents, rule)
    except DataError as error:
        contents.problems.append(str(error))
    except OSError as error:
        contents.problems.append(f"{describe_read_error(error, path)}; {COPY_REMEDY}")
    return contents


def refuse_other_offsets(contents: ShardContents, rule: IndexRule) -> None:
    """Raise DataError if an .idx file with other content exists."""
    path = rule.folder / offsets_name(contents.name)
    if contents.problems or not contents.lines or not path.exists():
        return
    if path.read_bytes() != contents.encode_offsets():
        raise DataError(
            f"{path} exists with other content; move it away, or remove it if nothing needs it"
        )


def add_sample(
    file: BinaryIO, key: str, group: SampleMembers, rule: IndexRule, contents: ShardContents
) -> None:
    """Check a sample and add it. Raises DataError if it cannot be trained on."""
    path = rule.folder / contents.name
    image, mask, info, border = map(group.get, ("image", "mask", "json", "border"))
    if mask is not None and not rule.num_classes:
        raise DataError(f"{path}: {mask.name} is a mask; name the classes with --classes")
    if image is None and mask is None and border is None:
        contents.ignored[f".{INFO_EXTENSION}"] += 1
        return
    if image is None or (mask is None and rule.num_classes):
        single, missing = image or mask or border, "image" if image is None else "mask"
        assert single is not None
        raise DataError(f"{path}: {single.name} has no {missing}; see --image-ext and --mask-ext")
    sample = read_members(file, image, mask, rule, path)
    members = [member for member in (image, mask, border) if member is not None]
    source = f"{key}.{image.extension.rpartition('.')[2].lower()}"
    if info is not None:
        described = read_described_source(read_member(file, info), key)
        if described is None:
            contents.ignored[f".{INFO_EXTENSION}"] += 1
        else:
            members.append(info)
            source = described or source
    members.sort(key=lambda member: member.offset)
    contents.lines.append(" ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in members))
    contents.sources.append(source)
    contents.tally.add(sample)


def read_members(
    file: BinaryIO, image: MemberRange, mask: MemberRange | None, rule: IndexRule, path: Path
) -> StoredSample:
    """Decode the image and the mask of a sample.

    Raises DataError if it cannot be trained on without rewriting it.
    """
    where = f"{path}: {image.name}"
    data = read_member(file, image)
    decoded = read_image(data, rule.images, where)
    if "frame" in decoded.notes:
        raise DataError(f"{where} contains several frames; {REPACK}")
    digest = hashlib.sha256(data).hexdigest()
    if mask is None:
        return StoredSample(decoded, None, digest)
    mask_where = f"{path}: {mask.name}"
    canonical = read_canonical_mask(read_member(file, mask), rule.num_classes, mask_where)
    if canonical.size != decoded.full_size:
        rotated = " after its EXIF rotation" if "turned" in decoded.notes else ""
        raise DataError(
            f"{mask_where} is {format_size(canonical.size)}, its image {image.name} "
            f"{format_size(decoded.full_size)}{rotated}; {REPACK}"
        )
    return StoredSample(decoded, canonical, digest)


def format_size(size: tuple[int, int]) -> str:
    """Format a size as `640 x 480`."""
    return f"{size[0]} x {size[1]}"


def read_canonical_mask(data: bytes, num_classes: int, where: str) -> CanonicalMask:
    """Decode a mask. Raises DataError if it is not canonical."""
    opened = open_image(data, where, CANONICAL_RULE)
    if opened.format != "PNG" or opened.mode not in ("P", "L"):
        raise DataError(
            f"{where} is {opened.format} of mode {opened.mode}; masks in shards must be PNG of "
            f"mode P or L whose pixel value is the class index: {REPACK}"
        )
    image, _ = load_pixels(opened, where)
    index = np.asarray(image)
    counts = count_pixel_values(index)
    unknown = np.flatnonzero(counts[num_classes:IGNORE]) + num_classes
    if len(unknown):
        raise DataError(
            f"{where} contains values without a class: {format_counts(counts, unknown)}; "
            f"name all classes with --classes, or {REPACK}"
        )
    classes = ClassMap(index, counts, tuple(np.flatnonzero(counts).tolist()))
    return CanonicalMask(image.size, opened.mode, data, classes)


def read_described_source(data: bytes, key: str) -> str | None:
    """Read the `source` from a sample's json.

    Returns:
        The source, "" if there is none, or None if the json is not in our format: other tools may
        store anything under `source`; in ours, the key is derived from it.
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


def find_duplicate_images(shards: Sequence[ShardContents]) -> list[Duplicates]:
    """Find groups of byte-identical images."""
    places = [(shard.name, source) for shard in shards for source in shard.sources]
    digests = (digest for shard in shards for digest in shard.tally.digests)
    groups = find_duplicates(digests, map(str, range(len(places)))).values()
    return [[places[int(number)] for number in group] for group in groups]


def describe_leaks(
    duplicates: Sequence[Duplicates], splits: dict[str, str], folder: Path
) -> list[str]:
    """Describe byte-identical images in different splits, one line each."""
    return [
        " = ".join(f"{folder / shard}: {source} ({splits[shard]})" for shard, source in group[:5])
        + " are the same image in two splits; remove it from one"
        for group in duplicates
        if len({splits[shard] for shard, _ in group}) > 1
    ]


def build_manifest(
    config: IndexConfig,
    shards: Sequence[ShardContents],
    splits: dict[str, str],
    duplicates: Sequence[Duplicates],
    total: SampleStatistics,
) -> Manifest:
    """Build the manifest of valid shards.

    Args:
        config: the configuration.
        shards: shards with at least one sample.
        splits: {shard: split}.
        duplicates: groups of byte-identical images.
        total: tally of all shards.
    """
    num_classes = len(config.classes)
    infos: dict[str, list[ShardInfo]] = {}
    tallies: dict[str, SampleStatistics] = {}
    for shard in shards:
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
        image_format=config.image.make_format(total),
        mask_format=mask_format if num_classes else {},
        shards=infos,
        tallies=tallies,
        duplicates=[[f"{splits[shard]}:{source}" for shard, source in g] for g in duplicates],
        verified="full",
    )


def list_warnings(shards: Sequence[ShardContents], manifest: Manifest) -> Iterator[str]:
    """Warn of contents that are probably not intended."""
    ignored = sum((shard.ignored for shard in shards), Counter[str]())
    if ignored:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in ignored.most_common())
        yield f"  {ignored.total()} other members are ignored: {kinds}"
    empty = [shard.name for shard in shards if not shard.lines]
    if empty:
        yield f"  warning: {len(empty)} shards without samples are ignored, the first: {empty[0]}"
    sources = Counter(source for shard in shards for source in shard.sources)
    repeated = [source for source, count in sources.items() if count > 1]
    if repeated:
        yield (
            f"  warning: {len(repeated)} names occur in several shards, the first: {repeated[0]}; "
            "training uses all samples, but unpack and predict write one result per name"
        )
    if "train" in manifest.splits and "val" not in manifest.splits:
        yield "  warning: split val is empty; put `val` into the path of some shards"


def suggest_training(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Suggest the command to train on the data set, if it can be trained on."""
    if "train" in manifest.splits:
        yield f"next: unet train --data {folder} --run-dir RUN"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(IndexConfig, run, argv, "index")


if __name__ == "__main__":
    sys.exit(main())
