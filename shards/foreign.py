"""Tars that others wrote: whether they are whole, and which members make one sample."""

import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

from shards.index import MemberRange
from shards.sample import (
    BORDER_EXTENSION,
    INFO_EXTENSION,
    MASK_EXTENSION,
    PROBABILITY_NAME,
    DataError,
    is_safe_path,
)

Role = Literal["picture", "mask", "json", "border"]

COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
"""How gzip, bzip2, xz and zstd files begin."""

DECOMPRESS = "decompress it: samples are read by their place in the tar"
COPY = "copy or write it again"

Group = dict[Role, MemberRange]
"""The members of one sample."""


@dataclass(slots=True)
class Members:
    """What a tar holds."""

    groups: dict[str, Group] = field(default_factory=dict)
    """The members of each key, in the order of the tar, however far apart they lie."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Members that no sample has, by kind."""
    problems: list[str] = field(default_factory=list)


def find_members(file: BinaryIO, path: Path | str, roles: Mapping[str, Role]) -> Members:
    """The samples of a tar, by the ends of their members' names.

    Args:
        file: the tar, open.
        path: its path or URL, for messages.
        roles: {extension in lower case: what such a member is}, the longest first.

    Raises DataError where the tar is cut, damaged or none.
    """
    found = Members()
    for member in list_members(file, path):
        if member.isdir():
            continue
        try:
            parts = split_name(member.name, roles)
            refuse_member(member, parts is not None, path)
            if parts is None:
                found.ignored[kind_of(member.name)] += 1
            else:
                add_member(found.groups, member, *parts, roles, path)
        except DataError as error:
            found.problems.append(str(error))
    return found


def split_name(name: str, roles: Mapping[str, Role]) -> tuple[str, str] | None:
    """(key, extension) of a member, told by its end; None where it is none of ours.

    The longest extension that was declared counts, so a key may hold dots.
    """
    if PurePosixPath(name).name.startswith(".") or PROBABILITY_NAME.fullmatch(name):
        return None
    for extension in roles:
        cut = len(name) - len(extension)
        if name[cut - 1 : cut] == "." and name[cut:].lower() == extension:
            return name[: cut - 1], name[cut:]
    return None


def list_members(file: BinaryIO, path: Path | str) -> list[tarfile.TarInfo]:
    """The members of a tar. Raises DataError where it is cut, damaged or none."""
    file.seek(0)
    if file.read(6).startswith(COMPRESSED_MAGIC):
        raise DataError(f"{path} is compressed; {DECOMPRESS}")
    file.seek(0)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as tar:
            members = tar.getmembers()
            end = tar.offset
    except OSError:
        raise
    except Exception as error:  # hostile headers provoke more than TarError
        raise DataError(f"{path} is cut or no tar ({error}); {COPY}") from error
    # tarfile takes the end of the file, and any block that is no header, for the end of the tar.
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise DataError(f"{path} is cut: it ends after {len(members)} members, unclosed; {COPY}")
    if block.strip(b"\0"):
        raise DataError(f"{path} is damaged at byte {end:,}, where a header should be; {COPY}")
    while block := file.read(2**20):
        if block.strip(b"\0"):
            raise DataError(
                f"{path} goes on after its end at byte {end:,}, as joined tars do; "
                "part it, or write it again"
            )
    return members


def kind_of(name: str) -> str:
    """What a member is called that no sample has: by its ending."""
    pure = PurePosixPath(name)
    return "hidden" if pure.name.startswith(".") else pure.suffix or "without extension"


def refuse_member(member: tarfile.TarInfo, is_ours: bool, path: Path | str) -> None:
    """Raise DataError for a member that cannot be read by its place or would leave a folder."""
    where = f"{path}: {member.name!r}"
    if not member.isreg() or member.issparse():
        raise DataError(f"{where} is a link, device or sparse file; write the tar without it")
    if not is_safe_path(member.name):
        raise DataError(f"{where} is a path that leaves the folder; write the tar without it")
    if is_ours and re.search(r"[\s\ud800-\udfff]", member.name):
        raise DataError(
            f"{where} has white space in its name, or is not UTF-8, and the words of an .idx are "
            "parted by spaces; rename it"
        )


def add_member(
    groups: dict[str, Group],
    member: tarfile.TarInfo,
    key: str,
    extension: str,
    roles: Mapping[str, Role],
    path: Path | str,
) -> None:
    """Put a member to its sample. Raises DataError where its place is taken."""
    role = roles[extension.lower()]
    # `./a.jpg` and `a.jpg` are one file when they are extracted.
    group = groups.setdefault(posixpath.normpath(key), {})
    if role in group:
        other = group[role].name
        what = "occurs twice" if member.name == other else f"and {other} are two {role}s of one key"
        raise DataError(f"{path}: {member.name} {what}; keep one of them")
    # The names by which the index of a shard is read.
    words = {"mask": MASK_EXTENSION, "json": INFO_EXTENSION, "border": BORDER_EXTENSION}
    word = words.get(role, extension)
    group[role] = MemberRange(word, member.offset_data, member.size, member.name)


def read_member(file: BinaryIO, member: MemberRange) -> bytes:
    """A member's bytes."""
    file.seek(member.offset)
    return file.read(member.size)
