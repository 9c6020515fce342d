"""Foreign WebDataset shards: inspected and indexed where they lie."""

import hashlib
import json
import os
import posixpath
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from pipelines.runtime.errors import describe_read_error
from shards.foreign import (
    IMAGE_EXT_REMEDY,
    MAX_UNUSABLE,
    Role,
    SampleMembers,
    group_members,
    read_member,
)
from shards.images.files import ImageRule, open_image, read_image
from shards.local_files import open_file, read_file
from shards.masks.canonical import CanonicalMask
from shards.masks.counts import count_pixel_values, format_counts
from shards.masks.formats import ClassMap
from shards.masks.png import CANONICAL_RULE
from shards.masks.readings import list_palette_readings
from shards.masks.stored import load_mask
from shards.offsets import MemberRange
from shards.sample import IGNORE, INFO_EXTENSION, DataError, encode_key, is_safe_path
from shards.statistics import SampleStatistics, StoredSample
from shards.tar_headers import COPY_REMEDY

REPACK = "extract the tar and pack its files (unet pack, see --mask-suffix)"
"""Remedy where a shard would have to be rewritten."""


@dataclass(frozen=True, slots=True)
class IndexRule:
    """What a worker needs to know besides its shard."""

    folder: Path
    num_classes: int
    """0 without masks."""
    images: ImageRule
    roles: dict[str, Role]
    declared: bool
    """The extensions of images were named."""


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


def offsets_name(shard: str) -> str:
    """Path of the .idx file of a shard."""
    return str(PurePosixPath(shard).with_suffix(".idx"))


def inspect_shard(name: str, rule: IndexRule) -> ShardContents:
    """Read and check one shard; its problems are listed, not raised."""
    contents = ShardContents(name)
    path = rule.folder / name
    try:
        with open_file(path) as file:
            contents.size = os.fstat(file.fileno()).st_size
            members = group_members(file, path, rule.roles, declared=rule.declared)
            # Before samples are read, so that those reads hit the page cache.
            file.seek(0)
            contents.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            contents.ignored, contents.problems = members.ignored, members.problems
            contents.problems += [f"{one}; {IMAGE_EXT_REMEDY}" for one in members.ambiguous]
            for key, group in members.samples.items():
                try:
                    add_sample(file, key, group, rule, contents)
                except DataError as error:
                    contents.problems.append(str(error))
                if len(contents.problems) > MAX_UNUSABLE:
                    contents.problems.append(f"{path}: the samples after {key} were not checked")
                    break
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
    if read_file(path) != contents.encode_offsets():
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
        return StoredSample(decoded, None, digest, where)
    mask_where = f"{path}: {mask.name}"
    canonical = read_canonical_mask(read_member(file, mask), rule.num_classes, mask_where)
    if canonical.orientation and canonical.orientation != decoded.orientation:
        raise DataError(
            f"{mask_where} has EXIF orientation {canonical.orientation}, its image {image.name} "
            f"{decoded.orientation or 'none'}; {REPACK}"
        )
    if canonical.size != decoded.full_size:
        rotated = " after its EXIF rotation" if "turned" in decoded.notes else ""
        raise DataError(
            f"{mask_where} is {format_size(canonical.size)}, its image {image.name} "
            f"{format_size(decoded.full_size)}{rotated}; {REPACK}"
        )
    return StoredSample(decoded, canonical, digest, where, mask_where)


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
    stored = load_mask(opened, where)
    index = stored.read_values(where).astype(np.uint8, copy=False)
    counts = count_pixel_values(index)
    unknown = np.flatnonzero(counts[num_classes:IGNORE]) + num_classes
    if len(unknown):
        raise DataError(
            f"{where} contains values without a class: {format_counts(counts, unknown)}; "
            f"name all classes with --classes, or {REPACK}"
        )
    values = tuple(np.flatnonzero(counts).tolist())
    classes = ClassMap(index, counts, values, values)
    readings = list_palette_readings(stored, classes) if opened.mode == "P" else ()
    return CanonicalMask(
        stored.image.size, opened.mode, data, classes, stored.orientation, readings=readings
    )


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
