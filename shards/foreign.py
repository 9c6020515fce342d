"""Tars written by other programs: checked for completeness, their members grouped into samples."""

import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from shards.offsets import MemberRange
from shards.sample import (
    BORDER_EXTENSION,
    INFO_EXTENSION,
    MASK_EXTENSION,
    PROBABILITY_MEMBER,
    DataError,
    is_safe_path,
)

Role = Literal["image", "mask", "json", "border"]

COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""First bytes of gzip, bzip2, xz and zstd files."""

DECOMPRESS_REMEDY = "decompress it: samples are read by byte offset"
IMAGE_EXT_REMEDY = "name the extension of the images, such as --image-ext jpg"
"""Remedy where a sample has several members that could be its image."""
COPY_REMEDY = "copy or write it again"

SampleMembers = dict[Role, MemberRange]
"""The members of one sample."""


@dataclass(slots=True)
class TarContents:
    """The samples of a tar, and what could not be assigned to one."""

    samples: dict[str, SampleMembers] = field(default_factory=dict)
    """The members of each key, in the order of the tar; they need not be adjacent."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Number of members that belong to no sample, by kind."""
    problems: list[str] = field(default_factory=list)
    """Error messages of members that were refused."""
    ambiguous: list[str] = field(default_factory=list)
    """Samples with several members that could be the image, without the remedy."""


def group_members(
    file: BinaryIO, path: Path | str, roles: Mapping[str, Role], *, declared: bool
) -> TarContents:
    """Group the members of a tar into samples, by the extensions of their names.

    Args:
        file: the open tar.
        path: its path or URL, for error messages.
        roles: {extension in lower case: role of the member}, the longest extension first.
        declared: the user named the extensions of images, so that a key is everything before one;
            otherwise members that WebDataset would give one key may be one sample.

    Raises DataError if the tar is truncated, damaged or not a tar.
    """
    contents = TarContents()
    for member in list_members(file, path):
        if member.isdir():
            continue
        try:
            parts = split_member_name(member.name, roles)
            refuse_unusable_member(member, parts is not None, path)
            if parts is None:
                contents.ignored[classify_ignored_member(member.name)] += 1
            else:
                add_member(contents.samples, member, *parts, roles, path)
        except AmbiguousImageError as error:
            contents.ambiguous.append(str(error))
        except DataError as error:
            contents.problems.append(str(error))
    if not declared:
        contents.ambiguous += find_ambiguous_images(contents.samples, path)
    return contents


class AmbiguousImageError(DataError):
    """A sample has two members that could be its image."""


def find_ambiguous_images(samples: Mapping[str, SampleMembers], path: Path | str) -> list[str]:
    """Describe images without a mask of their own that WebDataset would give to one sample.

    A dot may be part of a key (`img_0.5um.png`) or begin an extension (`000.depth.png`). Where
    every such image has a mask, each is a sample.
    """
    groups: dict[str, list[SampleMembers]] = {}
    for key, members in samples.items():
        if "image" in members:
            folder, _, name = key.rpartition("/")
            groups.setdefault(f"{folder}/{name.partition('.')[0]}", []).append(members)
    return [
        f"{path}: {' and '.join(members['image'].name for members in group[:3])}"
        f"{f' and {len(group) - 3} more' * (len(group) > 3)} may be images of one sample"
        for group in groups.values()
        if len(group) > 1 and not all("mask" in members for members in group)
    ]


def split_member_name(name: str, roles: Mapping[str, Role]) -> tuple[str, str] | None:
    """Split a member name into (key, extension); None if no sample has such a member.

    The longest declared extension wins, so keys may contain dots.
    """
    if PurePosixPath(name).name.startswith(".") or PROBABILITY_MEMBER.fullmatch(name):
        return None
    for extension in roles:
        cut = len(name) - len(extension)
        if name[cut - 1 : cut] == "." and name[cut:].lower() == extension:
            return name[: cut - 1], name[cut:]
    return None


def list_members(file: BinaryIO, path: Path | str) -> list[tarfile.TarInfo]:
    """List the members of a tar. Raises DataError if it is truncated, damaged or not a tar."""
    file.seek(0)
    if file.read(6).startswith(COMPRESSED_MAGIC):
        raise DataError(f"{path} is compressed; {DECOMPRESS_REMEDY}")
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            members = tar.getmembers()
            end = tar.offset
    except OSError:
        raise
    except Exception as error:  # hostile headers raise more than TarError
        raise DataError(f"{path} is truncated or not a tar ({error}); {COPY_REMEDY}") from error
    # tarfile accepts the end of the file, and any block that is not a header, as the end marker.
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise DataError(
            f"{path} is truncated: no end marker after {len(members)} members; {COPY_REMEDY}"
        )
    if block.strip(b"\0"):
        raise DataError(f"{path} is damaged: no tar header at byte {end:,}; {COPY_REMEDY}")
    while block := file.read(2**20):
        if block.strip(b"\0"):
            raise DataError(
                f"{path} has data after its end marker at byte {end:,}, as concatenated tars do; "
                "split it, or write it again"
            )
    return members


def classify_ignored_member(name: str) -> str:
    """Return the kind of a member that belongs to no sample: `hidden` or its extension."""
    pure = PurePosixPath(name)
    return "hidden" if pure.name.startswith(".") else pure.suffix or "without extension"


def refuse_unusable_member(member: tarfile.TarInfo, in_sample: bool, path: Path | str) -> None:
    """Raise DataError for a member that has no byte range, leaves the folder or breaks an .idx."""
    where = f"{path}: {member.name!r}"
    if not member.isreg() or member.issparse():
        raise DataError(f"{where} is a link, device or sparse file; write the tar without it")
    if not is_safe_path(member.name):
        raise DataError(
            f"{where} would be extracted outside the target folder; write the tar without it"
        )
    if in_sample and re.search(r"[\s\ud800-\udfff]", member.name):
        raise DataError(
            f"{where} has whitespace in its name or is not UTF-8, but the fields of an .idx are "
            "separated by spaces; rename it"
        )


def add_member(
    samples: dict[str, SampleMembers],
    member: tarfile.TarInfo,
    key: str,
    extension: str,
    roles: Mapping[str, Role],
    path: Path | str,
) -> None:
    """Add a member to its sample. Raises DataError if the sample already has one of its role."""
    role = roles[extension.lower()]
    # `./a.jpg` and `a.jpg` are extracted to the same file.
    sample = samples.setdefault(posixpath.normpath(key), {})
    if role in sample:
        other = sample[role].name
        if posixpath.normpath(member.name) == posixpath.normpath(other):
            raise DataError(f"{path}: {member.name} occurs twice; keep one of them")
        what = f"{path}: {member.name} and {other} are two {role}s of the same key"
        if role == "image":
            raise AmbiguousImageError(what)
        raise DataError(f"{what}; keep one of them")
    # The extensions by which readers of an .idx recognise these members.
    words = {"mask": MASK_EXTENSION, "json": INFO_EXTENSION, "border": BORDER_EXTENSION}
    word = words.get(role, extension)
    sample[role] = MemberRange(word, member.offset_data, member.size, member.name)


def read_member(file: BinaryIO, member: MemberRange) -> bytes:
    """Read the bytes of a member."""
    file.seek(member.offset)
    return file.read(member.size)
