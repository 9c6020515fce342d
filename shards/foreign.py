"""Tars written by other programs: checked for completeness, their members grouped into samples."""

import posixpath
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
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
from shards.tar_headers import TarMember, iter_members

Role = Literal["image", "mask", "json", "border"]

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Extensions of compressed tars, which have no random access."""
COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""First bytes of gzip, bzip2, xz and zstd files."""

DECOMPRESS_REMEDY = "decompress it: samples are read by byte offset"
IMAGE_EXT_REMEDY = "name the extension of the images, such as --image-ext jpg"
"""Remedy where a sample has several members that could be its image."""

MAX_UNUSABLE = 10_000
"""Refused and empty members of a tar that are listed; with more, the tar itself is refused."""
MAX_IGNORED_KINDS = 1000
"""Kinds of ignored members that are counted apart."""

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

    def count_ignored(self, name: str) -> None:
        """Count a member that belongs to no sample, by its kind: `hidden` or its extension."""
        base = posixpath.basename(name)
        extension = posixpath.splitext(base)[1]
        kind = "hidden" if base.startswith(".") else extension.rstrip(".") or "without extension"
        if kind not in self.ignored and len(self.ignored) >= MAX_IGNORED_KINDS:
            kind = "of other kinds"
        self.ignored[kind] += 1


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

    Raises DataError if the tar is compressed, truncated, damaged or not a tar, and if more than
    `MAX_UNUSABLE` of its members are empty or refused: they would take more memory than samples.
    """
    refuse_compressed(file, path)
    contents = TarContents()
    num_empty = 0
    for member in iter_members(file, path):
        if member.kind == "folder":
            continue
        try:
            parts = split_member_name(member.name, roles)
            refuse_unusable_member(member, parts is not None, path)
            if parts is None:
                contents.count_ignored(member.name)
            else:
                add_member(contents.samples, member, *parts, roles, path)
                num_empty += not member.size
        except AmbiguousImageError as error:
            contents.ambiguous.append(str(error))
        except DataError as error:
            contents.problems.append(str(error))
        if len(contents.problems) + len(contents.ambiguous) + num_empty > MAX_UNUSABLE:
            raise DataError(
                f"{path}: more than {MAX_UNUSABLE:,} members are empty or cannot be used, such as "
                f"{member.name!r}; write the tar without them"
            )
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
    if posixpath.basename(name).startswith(".") or PROBABILITY_MEMBER.fullmatch(name):
        return None
    for extension in roles:
        cut = len(name) - len(extension)
        if name[cut - 1 : cut] == "." and name[cut:].lower() == extension:
            return name[: cut - 1], name[cut:]
    return None


def refuse_compressed(file: BinaryIO, path: Path | str) -> None:
    """Raise DataError if a file is compressed."""
    file.seek(0)
    if file.read(6).startswith(COMPRESSED_MAGIC):
        raise DataError(f"{path} is compressed; {DECOMPRESS_REMEDY}")


def refuse_unusable_member(member: TarMember, in_sample: bool, path: Path | str) -> None:
    """Raise DataError for a member that has no byte range, leaves the folder or breaks an .idx."""
    where = f"{path}: {member.name!r}"
    if member.kind != "file":
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
    member: TarMember,
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
    sample[role] = MemberRange(word, member.offset, member.size, member.name)


def read_member(file: BinaryIO, member: MemberRange) -> bytes:
    """Read the bytes of a member."""
    file.seek(member.offset)
    return file.read(member.size)
