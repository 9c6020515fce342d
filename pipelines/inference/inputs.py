"""Resolve `--input` of `unet predict`: an image, folder, pattern, list, data set or tars."""

import glob
import io
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TextIO
from urllib.parse import unquote

import numpy as np

from pipelines.inference.input_readers import (
    FileInputs,
    Inputs,
    Names,
    ShardInputs,
    TarInputs,
    member_key,
)
from pipelines.inference.input_rules import (
    EVERY_IMAGE,
    InputRule,
    exclude_results,
    refuse_masks,
    refuse_results_folder,
)
from pipelines.inference.input_tars import tar_inputs
from pipelines.runtime.errors import UsageError
from shards.folders.walk import walk_files
from shards.foreign import COMPRESSED, DECOMPRESS_REMEDY
from shards.local_files import open_file
from shards.manifest import MANIFEST
from shards.sample import AggregateDataError, DataError
from shards.store import Store, is_url

LIST_EXTENSIONS = (".txt", ".lst", ".list")
TAR = ".tar"
WILDCARD = re.compile(r"[*?[]|\{.*(?:\.\.|,).*\}")


def find_inputs(given: str, rule: InputRule = EVERY_IMAGE) -> Inputs:
    """Resolve `--input` to an ordered list of images.

    Raises UsageError if it matches nothing or a rule does not apply to it, DataError if it is
    unreachable, if files are masks, or if two images would write the same output.
    """
    search = Search(given, rule)
    if is_url(given):
        return find_remote(search)
    path = Path(given)
    if (path / MANIFEST).is_file():
        return shard_inputs(search, path)
    if path.is_dir():
        return inputs_below(search, prefix(path), walk_files(str(path)))
    if path.suffix.lower() in LIST_EXTENSIONS and path.is_file():
        with io.TextIOWrapper(open_file(path), encoding="utf-8-sig") as lines:
            return listed_inputs(search, prefix(path.parent.resolve()), lines)
    if path.is_file():
        return inputs_of(search, prefix(path.parent), [path.name])
    # Without a leading `./`, which would become part of every name.
    pattern = str(path)
    if (root := literal_prefix(pattern)) is not None:
        names = [name for one in expand(pattern) for name in match(one)]
        if any(map(os.path.exists, names)):
            return searched_inputs(search, root, [name[len(root) :] for name in names])
    raise no_match(given)


@dataclass(frozen=True, slots=True)
class Search:
    """What is searched, and what counts as an image."""

    given: str
    """`--input`."""
    rule: InputRule


def find_remote(search: Search) -> Inputs:
    """Resolve a URL as `find_inputs` does.

    Raises UsageError or DataError as `find_inputs` does.
    """
    url = search.given
    root = literal_prefix(url)
    if root is not None and root.endswith("://"):
        # A bucket name cannot contain wildcards.
        raise no_match(url)
    store = Store(url)
    kind = store.kind()
    if kind == "folder":
        if store.exists(MANIFEST):
            return shard_inputs(search, store)
        return inputs_below(search, f"{store}/", store.find())
    if kind == "file":
        folder, _, name = str(store).rpartition("/")
        if posixpath.splitext(name)[1].lower() in LIST_EXTENSIONS:
            data = io.BytesIO(Store(folder).read(name))
            with io.TextIOWrapper(data, encoding="utf-8-sig") as lines:
                return listed_inputs(search, f"{folder}/", lines)
        return inputs_of(search, f"{folder}/", [name])
    if root is not None:
        below, patterns = Store(root), expand(url[len(root) :])
        found = [below.find(one) if glob.has_magic(one) else [one] for one in patterns]
        names = [name for name in chain.from_iterable(found) if not is_hidden(name)]
        if names:
            return searched_inputs(search, root, names)
    raise no_match(url)


def no_match(given: str) -> UsageError:
    """Make the error for an `--input` that matches nothing."""
    if glob.has_magic(given) or "{" in given:
        return UsageError(f"--input {given}: matches no file; check the pattern")
    kinds = "an image, a folder, a list (.txt), a pattern or a data set"
    return UsageError(f"--input {given}: does not exist; use {kinds}")


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


def listed_inputs(search: Search, base: str, lines: TextIO) -> Inputs:
    """Read a list with one path or URL per line, relative to the folder of the list, `base`."""
    given = search.given
    try:
        stripped = map(str.strip, lines)
        names = [absolute(line, base) for line in stripped if line and line[0] != "#"]
    except UnicodeDecodeError as error:
        raise DataError(
            f"--input {given} is not a list of paths: it is not UTF-8 text; save it as UTF-8, with "
            "one path per line"
        ) from error
    if not names:
        raise DataError(f"--input {given} lists no images; write one path or URL per line")
    names.sort()
    # Sorted: a common prefix of the first and the last is common to all.
    common = os.path.commonprefix([names[0], names[-1]])  # noqa: RUF071 (cut at a slash below)
    root = common[: common.rfind("/") + 1]
    if not root:
        raise DataError(
            f"--input {given} mixes locations, such as {names[0]} and {names[-1]}; "
            "write one list for each"
        )
    return inputs_of(search, root, [name[len(root) :] for name in names])


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


def inputs_below(search: Search, root: str, names: Iterable[str]) -> Inputs:
    """Select the images, or the shards, among the files of a folder.

    Raises DataError if there are none.
    """
    visible = [name for name in names if not is_hidden(name)]
    found = [n for n in visible if search.rule.is_image(n) or is_tar(n)]
    if not found:
        known = " ".join(f".{ext}" for ext in sorted(search.rule.extensions()))
        raise DataError(
            f"{root.rstrip('/') or '.'} contains no images ({known}) and no shards (*{TAR})"
        )
    return searched_inputs(search, root, found)


def searched_inputs(search: Search, root: str, names: list[str]) -> Inputs:
    """Make inputs of files that a search found: without the results of this job, and no masks.

    Raises UsageError if `--out` holds other files of `--input`, DataError for masks and as
    `inputs_of`.
    """
    names, notes = exclude_results(search.given, root, names, search.rule.out)
    if search.rule.image_ext:
        names = [name for name in names if is_tar(name) or search.rule.is_image(name)]
    if not names:
        raise no_match(search.given)
    inputs = inputs_of(search, root, names)
    return replace(inputs, notes=(*notes, *inputs.notes))


def is_tar(name: str) -> bool:
    """Return whether a file is named as a tar, compressed or not."""
    return name.lower().endswith((TAR, *COMPRESSED))


def inputs_of(search: Search, root: str, names: list[str]) -> FileInputs | TarInputs:
    """Make inputs of image files or of tars; `names` is sorted in place.

    Raises UsageError if `--out` is the folder of the inputs, DataError if both kinds are present,
    if a tar is compressed or damaged, if files are masks, and naming the inputs that would write
    the same output.
    """
    refuse_results_folder(search.given, root, search.rule.out)
    refuse_split(search)
    names.sort()
    tars = [name for name in names if is_tar(name)]
    if not tars:
        refuse_masks(search.given, root, names)
        return file_inputs(root, names)
    if len(tars) < len(names):
        raise DataError(
            f"{root.rstrip('/') or '.'} contains images ({len(names) - len(tars)}) and shards "
            f"({len(tars)}, such as {tars[0]}); select one: --input '{root}**/*.{{jpg,png}}' or "
            f"'{root}**/*{TAR}'"
        )
    compressed = [f"{root}{tar} is compressed" for tar in tars if not tar.lower().endswith(TAR)]
    if compressed:
        raise AggregateDataError(compressed, DECOMPRESS_REMEDY)
    inputs = tar_inputs([*dict.fromkeys(root + tar for tar in tars)], search.rule)
    refuse_equal_outputs(
        inputs.members,
        lambda name: unquote_key(member_key(name)[0]),
        lambda one, other: f"{inputs.name(one)} and {inputs.name(other)}",
    )
    return inputs


def refuse_split(search: Search) -> None:
    """Raise UsageError if a split is selected from inputs that have none."""
    if search.rule.split is not None:
        raise UsageError(
            f"--split {search.rule.split}: --input {search.given} is not a data set (it has no "
            f"{MANIFEST}); --out-split names the split of the results"
        )


def shard_inputs(search: Search, place: Store | Path) -> ShardInputs:
    """Make inputs of a data set, or of one of its splits.

    Raises UsageError for `--image-ext`, which a data set declares itself, and for `--out` in the
    same folder; DataError if samples have no image or if two would write the same output.
    """
    if search.rule.image_ext:
        raise UsageError(
            f"--image-ext: has no effect on --input {search.given}, whose {MANIFEST} declares the "
            "images; remove it"
        )
    refuse_results_folder(search.given, str(place), search.rule.out)
    inputs = ShardInputs(place, search.rule.split)
    keys = Names(unquote_key(key) for key in inputs.list_keys())
    refuse_equal_outputs(
        keys, str, lambda one, other: f"{inputs.name(one)} and {inputs.name(other)} ({keys[one]})"
    )
    return inputs


def unquote_key(key: str) -> str:
    """Decode a key of ours, a percent-encoded path, which the json of a sample may name."""
    return unquote(key, errors="surrogateescape")


def file_inputs(root: str, ordered: Sequence[str]) -> FileInputs:
    """Make inputs of image files. Raises DataError for two with the same key."""
    inputs = FileInputs(root, Names(ordered))
    refuse_equal_outputs(
        ordered,
        stem_of,
        lambda one, other: f"{inputs.name(one)} and {inputs.sources[other]}",
    )
    return inputs


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
