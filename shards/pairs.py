"""Which picture belongs to which mask, which split a pair is in, how a mixed folder is parted."""

import csv
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from shards.sample import IMAGE_EXTENSIONS, DataError, encode_key

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

MOST_SHOWN = 20
"""Names listed in one message; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A picture on disk and, where there is one, its mask."""

    key: str
    image: Path
    mask: Path | None
    source: str
    """Path of the picture relative to its folder, with extension, `/` between parts."""


def find_pairs(
    images: Path,
    masks: Path | None,
    *,
    image_suffix: str = "",
    mask_suffix: str = "",
    skip_unpaired: bool = False,
) -> list[Pair]:
    """Pairs with the same relative path but for extension and suffix, sorted by key.

    Raises DataError listing pictures without mask, masks without picture and names that two files
    share; `skip_unpaired` leaves the first two out instead.
    """
    pictures = by_stem(list_images(images), image_suffix, images)
    if masks is None:
        return [pair(images, None, name) for _, name in sorted(pictures.items())]
    if masks.resolve() == images.resolve() and image_suffix == mask_suffix:
        raise DataError(f"pictures and masks share the folder {images}; part them: unet separate")
    drawn = by_stem(list_images(masks), mask_suffix, masks)
    problems = [
        *(
            f"{pictures[stem]} has no mask in {masks}"
            for stem in sorted(pictures.keys() - drawn.keys())
        ),
        *(
            f"{drawn[stem]} has no picture in {images}"
            for stem in sorted(drawn.keys() - pictures.keys())
        ),
    ]
    if problems and not skip_unpaired:
        raise DataError(listing(problems, "--skip-unpaired leaves them out"))
    both = sorted(pictures.keys() & drawn.keys())
    if not both:
        raise DataError(f"no picture in {images} has a mask of the same name in {masks}")
    return [pair(images, masks / drawn[stem], pictures[stem]) for stem in both]


def pair(images: Path, mask: Path | None, name: str) -> Pair:
    """The pair of a picture that lies at `name` below `images`."""
    return Pair(encode_key(PurePosixPath(name)), images / name, mask, name)


def list_images(folder: Path) -> list[str]:
    """Relative paths of all pictures below a folder, hidden ones left out, sorted.

    Raises DataError where there is none.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder")
    found = sorted(
        str(PurePosixPath(Path(parent, name).relative_to(folder)))
        for parent, name in walk(folder)
        if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS
    )
    if not found:
        raise DataError(f"{folder} holds no picture ({' '.join(sorted(IMAGE_EXTENSIONS))})")
    return found


def walk(folder: Path) -> Iterator[tuple[str, str]]:
    """(folder, name) of every file below `folder` that is not hidden."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from ((parent, name) for name in names if not name.startswith("."))


def by_stem(names: Iterable[str], suffix: str, folder: Path) -> dict[str, str]:
    """{relative path without extension and suffix: relative path}, of those with the suffix.

    Raises DataError where two files share a stem.
    """
    stems: dict[str, str] = {}
    problems = []
    for name in names:
        stem = os.path.splitext(name)[0]
        if not stem.endswith(suffix):
            continue
        stem = stem.removesuffix(suffix)
        if stem in stems:
            problems.append(f"{folder / stems[stem]} and {name} have one name")
        stems[stem] = name
    if problems:
        raise DataError(listing(problems, "keep one of each"))
    return stems


def listing(problems: Sequence[str], remedy: str) -> str:
    """One line for one problem, else the first twenty, a line each, and what to do."""
    if len(problems) == 1:
        return f"{problems[0]}; {remedy}"
    more = [f"and {len(problems) - MOST_SHOWN} more"] if len(problems) > MOST_SHOWN else []
    return "\n  ".join([f"{len(problems)} problems ({remedy}):", *problems[:MOST_SHOWN], *more])


def assign_splits(
    pairs: Sequence[Pair], *, val_fraction: float, test_fraction: float, group_by: str | None
) -> tuple[list[Split], list[str | None]]:
    """The split and the group of each pair, by a hash: adding data never moves a sample.

    The first 8 bytes of sha256 of the key, or of what the regular expression `group_by` finds in
    the path (its first group, or the whole match), as a fraction of 2^64: below `val_fraction` is
    val, below val + test is test, the rest is train. Raises DataError where the expression
    finds nothing.
    """
    groups = [find_group(p.source, group_by) for p in pairs]
    splits: list[Split] = []
    for p, group in zip(pairs, groups, strict=True):
        fraction = hash_fraction(p.key if group is None else group)
        if fraction < val_fraction:
            splits.append("val")
        else:
            splits.append("test" if fraction < val_fraction + test_fraction else "train")
    return splits, groups


def find_group(source: str, expression: str | None) -> str | None:
    """What `expression` finds in a path; None without an expression."""
    if expression is None:
        return None
    match = re.search(expression, source)
    if match is None:
        raise DataError(f"{source} does not match --group-by {expression!r}")
    return match.group(1) if match.re.groups else match.group(0)


def hash_fraction(name: str) -> float:
    """sha256 of a name, its first 8 bytes as a fraction of 2^64."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def read_split_file(path: Path, pairs: Sequence[Pair]) -> list[Split]:
    """The split of each pair from a CSV with the columns `path,split`.

    `path` is the picture's relative path, with extension. Raises DataError for pictures that are
    not in the file, lines without a picture, doubles and unknown splits.
    """
    listed: dict[str, Split] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = csv.DictReader(lines, strict=True)
        if not {"path", "split"} <= set(rows.fieldnames or ()):
            raise DataError(f"{path} must begin with the line path,split")
        for row in rows:
            split: Split | None = next((s for s in SPLITS if s == row["split"]), None)
            if split is None:
                raise DataError(
                    f"{path}, line {rows.line_num}: {row['split']!r} is none of {', '.join(SPLITS)}"
                )
            if row["path"] in listed:
                raise DataError(f"{path}, line {rows.line_num}: {row['path']} stands there twice")
            listed[row["path"]] = split
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no CSV in UTF-8: {error}") from error
    sources = {p.source for p in pairs}
    problems = [
        *(f"{name} is not in {path}" for name in sorted(sources - listed.keys())),
        *(f"{path} lists {name}, which is not there" for name in sorted(listed.keys() - sources)),
    ]
    if problems:
        raise DataError(listing(problems, "the file must name every picture once"))
    return [listed[p.source] for p in pairs]


@dataclass(frozen=True, slots=True)
class Separation:
    """One file of a mixed folder and where it goes."""

    source: Path
    target: Path
    is_mask: bool


def separate(
    folder: Path,
    out: Path,
    *,
    mask_suffix: str | None = None,
    image_ext: str | None = None,
    mask_ext: str | None = None,
) -> list[Separation]:
    """Where each file of a folder that mixes pictures and masks belongs; moves nothing.

    A mask is what has the suffix before its extension (which it loses), or the extension
    `mask_ext`. Raises DataError for files that are neither or both, and for unpaired ones.
    """
    plan: list[Separation] = []
    problems: list[str] = []
    sides: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for name in list_images(folder):
        stem, ext = os.path.splitext(name)
        if mask_suffix is not None:
            is_mask = stem.endswith(mask_suffix)
            stem = stem.removesuffix(mask_suffix) if is_mask else stem
        elif ext.lower() not in (image_ext, mask_ext):
            problems.append(f"{name} ends neither in {image_ext} nor in {mask_ext}")
            continue
        else:
            is_mask = ext.lower() == mask_ext
        side = sides[is_mask]
        if stem in side:
            problems.append(f"{side[stem]} and {name} have one name")
        side[stem] = name
        target = out / ("masks" if is_mask else "images") / (stem + ext)
        plan.append(Separation(folder / name, target, is_mask))
    pictures, drawn = sides
    problems += [f"{pictures[stem]} has no mask" for stem in sorted(pictures.keys() - drawn.keys())]
    problems += [f"{drawn[stem]} has no picture" for stem in sorted(drawn.keys() - pictures.keys())]
    if problems:
        raise DataError(listing(problems, f"correct the rule or the folder {folder}"))
    return plan
