"""Ends of names and numbers by which images and masks can be paired."""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

BOUNDARY = re.compile(r"[_\-. ]|(?<=[0-9])(?=[A-Za-z])")
"""Where the end of a name may begin: `_mask` in `cell_mask`, `mask` in `7mask`."""
MAX_SUFFIXES = 8
FIRST_NUMBER = r"(\d+)[^/]*$"
"""The first number of a file name."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Settings that pair images and masks, and the number of pairs."""

    pairs: int
    image_suffix: str = ""
    mask_suffix: str = ""
    regex: str | None = None
    image_ext: str | None = None
    mask_ext: str | None = None

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags that set these, none for equal names."""
        settings = {
            "--image-suffix": self.image_suffix,
            "--mask-suffix": self.mask_suffix,
            "--pair-regex": self.regex,
            "--image-ext": self.image_ext,
            "--mask-ext": self.mask_ext,
        }
        return tuple(word for flag, value in settings.items() if value for word in (flag, value))


def find_fit(images: Collection[str], masks: Collection[str], *, shared: bool = False) -> Fit:
    """Find the settings that pair the most names: equal names, ends, extensions, numbers.

    Of equally many pairs, the simplest wins. `shared`: both lists are those of one folder.
    """
    image_stems = {os.path.splitext(name)[0] for name in images}
    mask_stems = {os.path.splitext(name)[0] for name in masks}
    fits = [] if shared else [Fit(len(image_stems & mask_stems))]
    cut_images, cut_masks = cut_suffixes(image_stems), cut_suffixes(mask_stems)
    for image_suffix, left in cut_images.items():
        for mask_suffix, right in cut_masks.items():
            if image_suffix != mask_suffix:
                fits.append(Fit(len(left & right), image_suffix, mask_suffix))
    if shared:
        fits += fit_extensions(images)
    else:
        left, right = find_numbers(images), find_numbers(masks)
        if len(left) == len(images) and len(right) == len(masks):
            fits.append(Fit(len(left & right), regex=FIRST_NUMBER))
    return max(
        fits,
        key=lambda fit: (fit.pairs, fit.regex is None, -len("".join(fit.flags))),
        default=Fit(0),
    )


def cut_suffixes(stems: set[str]) -> dict[str, set[str]]:
    """Return {end: names without it} of the most frequent ends of names, and of the empty end."""
    counts = Counter[str]()
    for stem in stems:
        name = stem.rpartition("/")[2]
        ends = {name[match.start() :] for match in BOUNDARY.finditer(name)}
        counts.update(ends | ({name} if "/" in stem else set()))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_SUFFIXES]
    common = [end for end, count in ranked if count > 1]
    cut = {end: {s[: -len(end)] for s in stems if s.endswith(end)} for end in common}
    return {"": stems, **cut}


def fit_extensions(names: Iterable[str]) -> list[Fit]:
    """Fit images and masks of one folder that differ in their extension."""
    stems: dict[str, set[str]] = {}
    for name in names:
        stem, ext = os.path.splitext(name)
        stems.setdefault(ext.lower(), set()).add(stem)
    return [
        Fit(len(stems[one] & stems[other]), image_ext=one, mask_ext=other)
        for one in sorted(stems)
        for other in sorted(stems)
        if one != other
    ]


def find_numbers(names: Iterable[str]) -> set[str]:
    """Return the first number of each file name that has one."""
    return {match[1] for name in names if (match := re.search(FIRST_NUMBER, name))}


def describe_fit(images: Collection[str], masks: Collection[str]) -> str:
    """Describe which flags pair two lists of names that have no name in common."""
    fit = find_fit(images, masks)
    if fit.pairs:
        words = " ".join(f"'{word}'" if "(" in word else word for word in fit.flags)
        return f"{words} pairs {fit.pairs} of them"
    return "see --image-suffix, --mask-suffix, --pair-regex and --pairs"
