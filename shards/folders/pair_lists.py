"""Lists with an image and its mask on each line, and the folders that their paths start at."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath

from shards.folders.pairs import Pair, Pairing, drop_key_collisions
from shards.folders.split_names import Split
from shards.folders.walk import find_common_root, read_lines, relative_path, split_columns
from shards.images.files import IMAGE_EXTENSIONS
from shards.sample import DataError


def read_pair_lists(
    files: Sequence[Path],
    images: Path | None,
    masks: Path | None,
    splits: Sequence[Split | None] = (),
) -> Pairing:
    """Read pairs from files with an image and its mask on each line.

    `.csv` and `.tsv` are split at commas and tabs, all others at white space. Empty lines, lines
    that start with # and a first line `image,mask` are skipped. Paths are relative to `images` and
    `masks`, or to the folder of the list if these are None. Every pair of a list gets its split.
    Raises DataError for a line that is not a pair, and if no listed image exists.
    """
    notes: list[str] = []
    lines: list[tuple[Path, tuple[str, str], Split | None]] = [
        (file, words, split)
        for file, split in zip(files, splits or [None] * len(files), strict=True)
        for words in read_pair_columns(file)
    ]
    if not lines:
        raise DataError(f"{files[0]} lists no pairs; write an image and its mask on each line")
    image_paths, mask_paths = (
        resolve_listed([(file, words[column]) for file, words, _ in lines], root, notes)
        for column, root in ((0, images), (1, masks))
    )
    if not any(map(os.path.isfile, image_paths)):
        base = (images or files[0].parent).resolve()
        raise DataError(
            f"{files[0]}: none of the {len(image_paths)} listed images exists, the first is read "
            f"as {image_paths[0]}; listed paths are relative to {base}: "
            + suggest_root([words[0] for _, words, _ in lines], base)
        )
    image_root, mask_root = (
        find_common_root(image_paths, images or files[0].parent),
        find_common_root(mask_paths, masks or files[0].parent),
    )
    refused: list[str] = []
    partner: dict[str, str] = {}
    pairs = []
    for (file, _, split), image, mask in zip(lines, image_paths, mask_paths, strict=True):
        wrong = [
            explain_unusable_path(path, file, root)
            for path, root in ((image, images), (mask, masks))
            if not os.path.isfile(path) or not has_image_extension(path)
        ]
        if image in partner:
            wrong.append(f"{image} is listed twice")
        elif mask in partner:
            wrong.append(f"{mask} is listed for {partner[mask]} and for {image}")
        refused += wrong
        if not wrong:
            partner |= {image: mask, mask: image}
            source, target = relative_path(image, image_root), relative_path(mask, mask_root)
            pairs.append(Pair(source, target, split))
    pairs = drop_key_collisions(pairs, image_root, refused)
    return Pairing(image_root, mask_root, pairs, [], refused, notes)


def resolve_listed(
    listed: Sequence[tuple[Path, str]], root: Path | None, notes: list[str]
) -> list[str]:
    """Return the absolute paths of listed files; relative ones start at `root`, or at their list.

    If none of them exists, and one does in `root` without its first folders (lists that name the
    folders of another machine), these are removed from all, which is reported in `notes`.
    """
    bases = [(root or file.parent).resolve() for file, _ in listed]
    paths = [os.path.normpath(base / name) for base, (_, name) in zip(bases, listed, strict=True)]
    prefix = None
    if root is not None and not any(map(os.path.isfile, paths)):
        prefix = find_dead_prefix([name for _, name in listed], root)
    if prefix is None or root is None:
        return paths
    count = sum(name.startswith(prefix) for _, name in listed)
    note = f"{listed[0][0]}: {prefix} does not exist here and is read as {root}, in {count} paths"
    if note not in notes:
        notes.append(note)
    return [
        os.path.normpath(root.resolve() / name.removeprefix(prefix).lstrip("/"))
        if name.startswith(prefix)
        else path
        for path, (_, name) in zip(paths, listed, strict=True)
    ]


def find_dead_prefix(names: Iterable[str], root: Path) -> str | None:
    """Return the first folders of listed paths without which one of the first 100 is in `root`."""
    for name in list(names)[:100]:
        parts = PurePath(name).parts
        for start in range(1, len(parts)):
            if (root / Path(*parts[start:])).is_file():
                return str(PurePath(*parts[:start]))
    return None


def suggest_root(names: Sequence[str], base: Path) -> str:
    """Return a remedy for listed paths of which none exists: the folder in which they do."""
    for root in (base, base.parent):
        if (prefix := find_dead_prefix(names, root)) is not None:
            return f"without {prefix} they exist in {root}; add --images {root} --masks {root}"
    return "set --images and --masks to the folders that they are relative to, or correct the list"


def has_image_extension(path: str) -> bool:
    """Return whether files of this name may be images or masks."""
    return os.path.splitext(path)[1].lower() in IMAGE_EXTENSIONS


def explain_unusable_path(path: str, file: Path, root: Path | None) -> str:
    """Return what is wrong with a path in a list of pairs."""
    if not os.path.isfile(path):
        base = (root or file.parent).resolve()
        return f"{path} is listed but does not exist (paths in {file} are relative to {base})"
    return f"{path} does not have an image extension ({' '.join(sorted(IMAGE_EXTENSIONS))})"


def read_pair_columns(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the two columns of a list of pairs. Raises DataError for a line without exactly two."""
    delimiter = {".csv": ",", ".tsv": "\t"}.get(file.suffix.lower())
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip() or line.startswith("#"):
            continue
        words = [word.strip() for word in split_columns(line, delimiter)]
        if number == 1 and [word.lower() for word in words] == ["image", "mask"]:
            continue
        if len(words) != 2 or not all(words):
            raise DataError(
                f"{file}, line {number}: expected 2 names, an image and its mask, got "
                f"{len(words)}; "
                + (
                    "names with spaces need a .csv or .tsv"
                    if delimiter is None
                    else f"separate them with {'a comma' if delimiter == ',' else 'a tab'}"
                )
            )
        yield words[0], words[1]
