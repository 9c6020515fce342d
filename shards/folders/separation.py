"""Split a folder that mixes images and masks."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from shards.folders.walk import list_images, relative_path, walk_files
from shards.images.files import IMAGE_EXTENSIONS
from shards.sample import AggregateDataError


@dataclass(frozen=True, slots=True)
class FileMove:
    """One file of a mixed folder and its destination."""

    source: Path
    target: Path
    is_mask: bool


def plan_separation(
    folder: Path,
    out: Path,
    *,
    mask_suffix: str | None = None,
    mask_pattern: str | None = None,
    image_ext: str | None = None,
    mask_ext: str | None = None,
) -> list[FileMove]:
    """Plan where each file of a folder that mixes images and masks is moved; moves nothing.

    A mask is a file with `mask_suffix` before its extension (removed from its name), a path that
    `mask_pattern` matches (replaced by the groups of the pattern, or stripped of the match), or a
    file with the extension `mask_ext`. Files already moved to `out` by an interrupted run count as
    partners. Raises DataError for files that match neither or both, and for unpaired files.
    """
    plan: list[FileMove] = []
    problems: list[str] = []
    sides: tuple[dict[str, str], dict[str, str]] = ({}, {})
    below = relative_path(str(out.resolve()), folder.resolve())
    outputs = ("images/", "masks/") if below == "." else (f"{below}/",)
    for name in list_images(folder, flag="FOLDER"):
        stem, ext = os.path.splitext(name)
        if name.startswith(outputs):
            continue
        if mask_suffix is not None:
            is_mask = stem.endswith(mask_suffix)
            stem = stem.removesuffix(mask_suffix) if is_mask else stem
        elif mask_pattern is not None:
            is_mask, stem = match_mask_stem(mask_pattern, stem)
        elif ext.lower() not in (image_ext, mask_ext):
            problems.append(f"{name} ends neither in {image_ext} nor in {mask_ext}")
            continue
        else:
            is_mask = ext.lower() == mask_ext
        side = sides[is_mask]
        if stem in side:
            problems.append(f"{side[stem]} and {name} have the same name")
        side[stem] = name
        target = out / ("masks" if is_mask else "images") / (stem + ext)
        plan.append(FileMove(folder / name, target, is_mask))
    images, masks = sides
    moved_images, moved_masks = list_stems(out / "images"), list_stems(out / "masks")
    without_mask = sorted(images.keys() - masks.keys() - moved_masks)
    without_image = sorted(masks.keys() - images.keys() - moved_images)
    problems += [f"{images[stem]} has no mask" for stem in without_mask]
    problems += [f"{masks[stem]} has no image" for stem in without_image]
    if problems:
        raise AggregateDataError(problems, f"check --mask-suffix and the files in {folder}")
    return plan


def count_moved_pairs(folder: Path, out: Path) -> int:
    """Count the pairs in `out` if all files of a folder were moved there; 0 if files are left."""
    place = out.resolve()
    left = (
        name
        for name in walk_files(str(folder))
        if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS
    )
    if any(not (folder / name).resolve().is_relative_to(place) for name in left):
        return 0
    images, masks = list_stems(out / "images"), list_stems(out / "masks")
    return len(images) if images == masks else 0


def list_others(plan: list[FileMove], out: Path) -> list[Path]:
    """List the files in `out/images` and `out/masks` that are not targets of a plan, sorted."""
    targets = {file.target for file in plan}
    folders = [folder for folder in (out / "images", out / "masks") if folder.is_dir()]
    found = (folder / name for folder in folders for name in walk_files(str(folder)))
    return sorted(path for path in found if path not in targets)


def match_mask_stem(pattern: str, stem: str) -> tuple[bool, str]:
    """Return whether a pattern matches a path without extension, and the path that remains."""
    match = re.search(pattern, stem)
    if match is None:
        return False, stem
    if match.re.groups:
        return True, "".join(match.groups(""))
    return True, stem[: match.start()] + stem[match.end() :]


def list_stems(folder: Path) -> set[str]:
    """Return the relative paths, without extension, of the files in a folder that may not exist."""
    if not folder.is_dir():
        return set()
    return {os.path.splitext(name)[0] for name in walk_files(str(folder))}
