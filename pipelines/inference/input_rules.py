"""Which of the files that `--input` finds are images: not masks, and not the results of a job."""

import os
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipelines.runtime.errors import UsageError
from shards.foreign import Role
from shards.images.files import IMAGE_EXTENSIONS
from shards.sample import (
    BORDER_EXTENSION,
    INFO_EXTENSION,
    MASK_EXTENSION,
    PROBABILITY_MEMBER,
    DataError,
)
from shards.store import Store, is_url

WORK_DIR = ".predict"
"""Folder in OUT for unfinished work."""
JOB = "job.json"
"""Records what determines the bytes of the results of a job."""
RESULT_FOLDERS = ("png", "overlay", WORK_DIR)
"""Folders in OUT for files beside the shards."""
MASK_WORD = "(masks?|labels?|annot|annotations?|ground_?truth|gt|segmentations?)"
MASK_SUFFIX = re.compile(rf"[_.-]{MASK_WORD}$", re.IGNORECASE)
MASK_FOLDER = re.compile(rf"{MASK_WORD}$", re.IGNORECASE)
MASK_NAME = re.compile(rf"{MASK_WORD}/|[_.-]{MASK_WORD}\.[^./]*$", re.IGNORECASE)
"""Names of masks beside their image (`x_mask.png`) and of files in a folder of masks."""


@dataclass(frozen=True, slots=True)
class InputRule:
    """What the user declared about `--input`."""

    image_ext: tuple[str, ...] = ()
    """Extensions of images, after the key; empty: every image format that is read."""
    split: str | None = None
    """Split of a data set; None: all."""
    out: str | None = None
    """Folder or URL of the results, which are not inputs."""

    def extensions(self) -> list[str]:
        """List the extensions of images, in lower case without the first dot, longest first."""
        found = {ext.lower().lstrip(".") for ext in self.image_ext or IMAGE_EXTENSIONS}
        return sorted(found, key=lambda ext: (-len(ext), ext))

    def roles(self) -> dict[str, Role]:
        """Return the role of members and files by extension, longest first, as `unet index`."""
        roles: dict[str, Role] = dict.fromkeys(self.extensions(), "image")
        reserved: dict[str, Role] = {
            MASK_EXTENSION: "mask",
            BORDER_EXTENSION: "border",
            INFO_EXTENSION: "json",
        }
        merged: dict[str, Role] = {**reserved, **roles} if self.image_ext else {**roles, **reserved}
        longest_first = sorted(merged, key=lambda ext: (-len(ext), ext))
        return {ext: merged[ext] for ext in longest_first}

    def is_image(self, name: str) -> bool:
        """Return whether a file has the extension of an image."""
        lower, roles = posixpath.basename(name).lower(), self.roles()
        found = next((ext for ext in roles if lower.endswith(f".{ext}")), None)
        return found is not None and roles[found] == "image" and not is_probability_map(name)


EVERY_IMAGE = InputRule()
"""Nothing was declared."""


def is_probability_map(name: str) -> bool:
    """Return whether a file is a probability map that `unet predict` writes."""
    return PROBABILITY_MEMBER.fullmatch(name) is not None


def relative_to(path: str, folder: str) -> str | None:
    """Return a path or URL relative to a folder: "" if they are equal, None if it is outside."""
    if is_url(path) != is_url(folder):
        return None
    if not is_url(path):
        path, folder = os.path.realpath(path), os.path.realpath(folder or ".")
    path, folder = path.rstrip("/"), folder.rstrip("/")
    if path == folder:
        return ""
    return path[len(folder) + 1 :] if path.startswith(f"{folder}/") else None


def refuse_results_folder(given: str, root: str, out: str | None) -> None:
    """Raise UsageError if results would be written into the folder of the inputs.

    A data set written into a folder of images hides them from every later prediction.
    """
    if out is None:
        return
    if relative_to(out, root) == "":
        raise UsageError(
            f"--out {out}: is the folder of --input {given}; choose another folder for the results"
        )
    inside = relative_to(root or ".", out)
    if inside is not None and inside.split("/")[0] in RESULT_FOLDERS:
        raise UsageError(
            f"--out {out}: results would overwrite --input {given}; choose another folder"
        )


def exclude_results(
    given: str, root: str, names: Sequence[str], out: str | None
) -> tuple[list[str], tuple[str, ...]]:
    """Remove the results of this job from the files that were found in `root`.

    Returns the other names and notes to print. Raises UsageError if `--out` holds files that no
    job has written.
    """
    refuse_results_folder(given, root, out)
    below = None if out is None else relative_to(out, root)
    if out is None or not below:
        return list(names), ()
    rest = [name for name in names if not name.startswith(f"{below}/")]
    if (num_own := len(names) - len(rest)) == 0:
        return rest, ()
    if not Store(out).exists(JOB):
        raise UsageError(
            f"--out {out}: contains {num_own} of the files of --input {given}; choose another "
            "folder for the results"
        )
    return rest, (f"--input {given}: skipping {num_own} files in --out {out}, results of this job",)


def refuse_masks(given: str, root: str, names: Sequence[str]) -> None:
    """Raise DataError if some files are masks: results of a job, or masks of other files."""
    masks = [*find_results(root, names), *find_masks(names)]
    if not masks:
        return
    raise DataError(
        f"--input {given}: {len(masks)} of {len(names)} files are masks or other results, not "
        f"images, such as {root}{masks[0]}; select the images: a subfolder, a pattern such as "
        f"'{root}**/*.jpg', a list (.txt), or --image-ext"
    )


def find_results(root: str, names: Iterable[str]) -> list[str]:
    """Find files that `unet predict` wrote beside its shards."""
    by_folder: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_folder[posixpath.dirname(root + name)].append(name)
    jobs: dict[str, bool] = {}
    found = []
    for folder, files in by_folder.items():
        parts = (folder if is_url(folder) else os.path.abspath(folder)).split("/")
        outs = ["/".join(parts[:i]) for i in range(1, len(parts)) if parts[i] in RESULT_FOLDERS]
        for out in outs:
            if out not in jobs:
                jobs[out] = Store(out).exists(JOB)
        if any(jobs[out] for out in outs):
            found += files
    return found


def find_masks(names: Sequence[str]) -> list[str]:
    """Find files named as the mask of another: `x_mask.png` of `x.jpg`, `masks/x` of `images/x`."""
    candidates = [name for name in names if MASK_NAME.search(name)]
    if not candidates:
        return []
    stems = {posixpath.splitext(name)[0] for name in names}
    # Each stem without one of its folders: equal for a mask and its image in sibling folders.
    without = Counter(key for stem in stems for _, key in remove_folders(stem))
    found = []
    for name in candidates:
        stem = posixpath.splitext(name)[0]
        image = MASK_SUFFIX.sub("", stem)
        keys = zip(remove_folders(stem), remove_folders(image), strict=True)
        if (image != stem and image in stems) or any(
            MASK_FOLDER.search(folder) and without[other] > (own == other)
            for (folder, own), (_, other) in keys
        ):
            found.append(name)
    return found


def remove_folders(stem: str) -> list[tuple[str, tuple[str, int, str]]]:
    """Return each folder in a path, with the parts of the path around it."""
    parts = stem.split("/")
    return [
        (folder, ("/".join(parts[:i]), i, "/".join(parts[i + 1 :])))
        for i, folder in enumerate(parts[:-1])
    ]


def describe_ignored(ignored: Counter[str]) -> tuple[str, ...]:
    """Describe members of tars that are not images, by kind; nothing if there are none."""
    if not ignored:
        return ()
    kinds = ", ".join(f"{kind} ({count})" for kind, count in ignored.most_common())
    return (f"{ignored.total()} other members are ignored: {kinds}",)
