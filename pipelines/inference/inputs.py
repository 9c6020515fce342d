"""Resolve `--input` of `unet predict`: an image, folder, pattern, list, data set or tars."""

import glob
import io
import os
import posixpath
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO, TextIO, cast
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from pipelines.inference.input_readers import (
    FileInputs,
    Inputs,
    Names,
    ShardInputs,
    TarInputs,
    member_key,
)
from pipelines.runtime.errors import UsageError
from shards.folders.walk import walk_files
from shards.foreign import DECOMPRESS_REMEDY, Role, group_members
from shards.images.files import IMAGE_EXTENSIONS
from shards.manifest import MANIFEST
from shards.sample import (
    BORDER_EXTENSION,
    INFO_EXTENSION,
    MASK_EXTENSION,
    AggregateDataError,
    DataError,
)
from shards.store import RemoteFile, Store, is_url

LIST_EXTENSIONS = (".txt", ".lst", ".list")
TAR = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
ROLES: dict[str, Role] = {
    MASK_EXTENSION: "mask",
    BORDER_EXTENSION: "border",
    INFO_EXTENSION: "json",
    **dict.fromkeys(sorted(extension[1:] for extension in IMAGE_EXTENSIONS), "image"),
}
"""Roles of tar members by extension, as in `unet index`."""
WILDCARD = re.compile(r"[*?[]|\{.*(?:\.\.|,).*\}")
MAX_CONNECTIONS = 8
"""Remote tars whose headers are read concurrently."""
READ_AHEAD = 2**18
"""Bytes per request for tar headers: small members are read through, large ones skipped."""


def find_inputs(given: str) -> Inputs:
    """Resolve `--input` to an ordered list of images.

    Raises UsageError if it matches nothing, DataError if it is unreachable or if two images would
    write the same output.
    """
    if is_url(given):
        return find_remote(given)
    path = Path(given)
    if (path / MANIFEST).is_file():
        return ShardInputs(path)
    if path.is_dir():
        return inputs_below(prefix(path), walk_files(str(path)))
    if path.suffix.lower() in LIST_EXTENSIONS and path.is_file():
        with path.open(encoding="utf-8-sig") as lines:
            return listed_inputs(given, prefix(path.parent.resolve()), lines)
    if path.is_file():
        return inputs_of(prefix(path.parent), [path.name])
    # Without a leading `./`, which would become part of every name.
    pattern = str(path)
    if (root := literal_prefix(pattern)) is not None:
        names = [name for one in expand(pattern) for name in match(one)]
        if any(map(os.path.exists, names)):
            return inputs_of(root, [name[len(root) :] for name in names])
    raise no_match(given)


def find_remote(url: str) -> Inputs:
    """Resolve a URL as `find_inputs` does.

    Raises UsageError or DataError as `find_inputs` does.
    """
    root = literal_prefix(url)
    if root is not None and root.endswith("://"):
        # A bucket name cannot contain wildcards.
        raise no_match(url)
    store = Store(url)
    kind = store.kind()
    if kind == "folder":
        if store.exists(MANIFEST):
            return ShardInputs(store)
        return inputs_below(f"{store}/", store.find())
    if kind == "file":
        folder, _, name = str(store).rpartition("/")
        if posixpath.splitext(name)[1].lower() in LIST_EXTENSIONS:
            data = io.BytesIO(Store(folder).read(name))
            with io.TextIOWrapper(data, encoding="utf-8-sig") as lines:
                return listed_inputs(url, f"{folder}/", lines)
        return inputs_of(f"{folder}/", [name])
    if root is not None:
        below, patterns = Store(root), expand(url[len(root) :])
        found = [below.find(one) if glob.has_magic(one) else [one] for one in patterns]
        names = [name for name in chain.from_iterable(found) if not is_hidden(name)]
        if names:
            return inputs_of(root, names)
    raise no_match(url)


def no_match(given: str) -> UsageError:
    """Make the error for an `--input` that matches nothing."""
    return UsageError(
        f"--input {given}: matches no image, folder, list (.txt), pattern or folder of shards"
    )


def prefix(folder: Path) -> str:
    """Return the prefix that makes names in a folder paths."""
    return "" if folder == Path() else f"{folder}/".replace("//", "/")


def is_hidden(name: str) -> bool:
    """Return whether a file or one of its parent folders is hidden."""
    return name.startswith(".") or "/." in name


def literal_prefix(pattern: str) -> str | None:
    """Return the folder above the first wildcard of a pattern; None without a wildcard."""
    first = WILDCARD.search(pattern)
    return None if first is None else pattern[: pattern.rfind("/", 0, first.start()) + 1]


def match(pattern: str) -> list[str]:
    """Return the local files that match a pattern; a path without wildcards matches itself."""
    if not glob.has_magic(pattern):
        return [pattern]
    return [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]


def expand(pattern: str) -> list[str]:
    """Expand the braces of a pattern: `{000..010}` counts, `{jpg,png}` lists."""
    for braces in re.finditer(r"\{([^{}]*)\}", pattern):
        if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", braces[1]):
            first, last = numbers.groups()
            words = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
        elif "," in braces[1]:
            words = braces[1].split(",")
        else:
            continue
        before, after = pattern[: braces.start()], pattern[braces.end() :]
        each = (expand(before + word + after) for word in words)
        return [*dict.fromkeys(chain.from_iterable(each))]
    return [pattern]


def listed_inputs(given: str, base: str, lines: TextIO) -> Inputs:
    """Read a list with one path or URL per line, relative to the folder of the list, `base`."""
    try:
        stripped = map(str.strip, lines)
        names = [absolute(line, base) for line in stripped if line and line[0] != "#"]
    except UnicodeDecodeError as error:
        raise DataError(f"--input {given} is not a list of paths: it is not UTF-8 text") from error
    if not names:
        raise DataError(f"--input {given} lists no images")
    names.sort()
    # Sorted: a common prefix of the first and the last is common to all.
    common = os.path.commonprefix([names[0], names[-1]])  # noqa: RUF071 (cut at a slash below)
    root = common[: common.rfind("/") + 1]
    if not root:
        raise DataError(
            f"--input {given} mixes locations, such as {names[0]} and {names[-1]}; "
            "write one list for each"
        )
    return inputs_of(root, [name[len(root) :] for name in names])


def absolute(line: str, base: str) -> str:
    """Resolve a line of a list to a path or URL."""
    path = line if line[0] == "/" or ("://" in line and is_url(line)) else base + line
    return path if not may_need_normalising(path) or is_url(path) else os.path.normpath(path)


def stem_of(name: str) -> str:
    """Return a path without its extension, normalised."""
    stem, _, extension = name.rpartition(".")
    if not stem or "/" in extension:
        stem = name
    return os.path.normpath(stem) if may_need_normalising(stem) else stem


def may_need_normalising(path: str) -> bool:
    """Return whether a path may have empty, `.` or `..` parts (fast: most have none)."""
    return "//" in path or "/." in path


def inputs_below(root: str, names: Iterable[str]) -> Inputs:
    """Select the images, or the shards, among the files of a folder.

    Raises DataError if there are none.
    """
    known = (*IMAGE_EXTENSIONS, TAR, *COMPRESSED)
    found = [n for n in names if n.lower().endswith(known) and not is_hidden(n)]
    if not found:
        raise DataError(
            f"{root.rstrip('/') or '.'} contains no images ({' '.join(sorted(IMAGE_EXTENSIONS))}) "
            f"and no shards (*{TAR})"
        )
    return inputs_of(root, found)


def inputs_of(root: str, names: list[str]) -> Inputs:
    """Make inputs of image files or of tars; `names` is sorted in place.

    Raises DataError if both kinds are present, if a tar is compressed or damaged, and naming the
    inputs that would write the same output.
    """
    names.sort()
    tars = [name for name in names if name.endswith((TAR, *COMPRESSED))]
    if not tars:
        return file_inputs(root, names)
    if len(tars) < len(names):
        raise DataError(
            f"{root.rstrip('/') or '.'} contains images ({len(names) - len(tars)}) and shards "
            f"({len(tars)}, such as {tars[0]}); select one: --input '{root}**/*.{{jpg,png}}' or "
            f"'{root}**/*{TAR}'"
        )
    compressed = [f"{root}{tar} is compressed" for tar in tars if not tar.endswith(TAR)]
    if compressed:
        raise AggregateDataError(compressed, DECOMPRESS_REMEDY)
    return tar_inputs([*dict.fromkeys(root + tar for tar in tars)])


def file_inputs(root: str, ordered: Sequence[str]) -> FileInputs:
    """Make inputs of image files. Raises DataError for two with the same key."""
    inputs = FileInputs(root, Names(ordered))
    refuse_equal_outputs(
        ordered,
        stem_of,
        lambda one, other: f"{inputs.name(one)} and {inputs.sources[other]}",
    )
    return inputs


def tar_inputs(tars: Sequence[str]) -> TarInputs:
    """Make inputs of the images in tars, reading headers only."""
    remote = is_url(tars[0])
    with ThreadPoolExecutor(MAX_CONNECTIONS if remote else 1) as threads:
        found = [*threads.map(read_headers, tars)]
    counts = [len(tar.names) for tar in found]
    numbers = np.repeat(np.arange(len(tars), dtype=np.int64), counts)
    inputs = TarInputs(
        tars=tuple(tars),
        members=Names(chain.from_iterable(tar.names for tar in found)),
        places=np.column_stack([numbers, np.concatenate([tar.places for tar in found])]),
        problems=tuple(
            (tar, problem)
            for tar, headers in zip(tars, found, strict=True)
            for problem in headers.problems
        ),
    )
    if not len(inputs):
        raise DataError(f"{tars[0]}{' and the others' * (len(tars) > 1)}: contains no images")
    refuse_equal_outputs(
        inputs.members,
        # Our own keys are percent-encoded paths, which the json of a sample may name.
        lambda name: unquote(member_key(name)[0], errors="surrogateescape"),
        lambda one, other: f"{inputs.name(one)} and {inputs.name(other)}",
    )
    return inputs


@dataclass(frozen=True, slots=True)
class TarContents:
    """The images of one tar."""

    names: Names
    places: NDArray[np.int64]
    """int64 [n, 4]: offset and size of each image, and of the json of its sample."""
    problems: list[str]


def read_headers(tar: str) -> TarContents:
    """List the images of a tar. Raises DataError or OSError if it is damaged or unreachable."""
    with open_tar(tar) as file:
        found = group_members(file, tar, ROLES)
    names: list[str] = []
    places = array("q")
    for group in found.samples.values():
        picture, info = group.get("image"), group.get("json")
        if picture is not None:
            names.append(picture.name)
            places.extend((picture.offset, picture.size))
            places.extend((0, 0) if info is None else (info.offset, info.size))
    return TarContents(Names(names), np.array(places, np.int64).reshape(-1, 4), found.problems)


def open_tar(tar: str) -> BinaryIO:
    """Open a tar, local or at a URL."""
    if not is_url(tar):
        return open(tar, "rb")
    folder, _, name = tar.rpartition("/")
    remote = io.BufferedReader(RemoteFile(Store(folder), name), READ_AHEAD)
    return cast(BinaryIO, remote)


def refuse_equal_outputs(
    names: Sequence[str], stem: Callable[[str], str], pair: Callable[[int, int], str]
) -> None:
    """Raise DataError naming inputs that would write the same output.

    Args:
        names: names of the inputs.
        stem: maps a name to the name of its output.
        pair: formats two inputs, given by number, for the message.
    """
    # Hashes: a set of a million strings takes ten times the memory.
    hashes = np.fromiter(map(hash, map(stem, names)), np.int64, len(names))
    order = np.argsort(hashes, kind="stable")
    equal = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    first: dict[str, int] = {}
    problems = []
    for number in map(int, np.unique(order[np.concatenate([equal, equal + 1])])):
        one = first.setdefault(stem(names[number]), number)
        if one != number:
            problems.append(f"{pair(one, number)} would write the same output")
    if problems:
        raise AggregateDataError(problems, "rename one of each, or predict them into two folders")
