"""One pair of image and mask, inspected."""

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from pipelines.runtime.errors import describe_read_error
from shards.annotations.scan import read_spans
from shards.folders.pairs import Pair
from shards.images.tiff import GREY16_MODES
from shards.local_files import open_file
from shards.masks.shift import Ratios, compare_positions, find_middle
from shards.sample import DataError
from shards.statistics import (
    SampleRule,
    SampleStatistics,
    StoredSample,
    find_duplicates,
    read_sample,
)


@dataclass(slots=True)
class PairReport:
    """Contents and problems of some pairs."""

    tally: SampleStatistics
    sources: list[str]
    """Sources of the pairs, in the order of the tally's digests."""
    problems: list[str]
    empty: list[str]
    """Sources of images whose mask contains only class 0 and ignored pixels."""
    bad: set[str]
    """Sources of pairs with a problem."""
    ratios: dict[str, Ratios] = field(default_factory=dict)
    """By source, of the pairs whose mask is compared with its image at other positions."""


def inspect_pairs(
    pairs: Sequence[Pair], images: str, masks: str, rule: SampleRule, compared: Container[str] = ()
) -> PairReport:
    """Read some pairs; problems are listed, not raised.

    Masks of the sources in `compared` are compared with their images at other positions.
    """
    report = PairReport(SampleStatistics(), [pair.source for pair in pairs], [], [], set())
    for pair in pairs:
        try:
            sample = read_pair(pair, images, masks, rule)
        except (DataError, OSError) as error:
            text = str(error)
            if isinstance(error, OSError):
                text = f"{describe_read_error(error)}; repair it"
            report.problems.append(text)
            report.bad.add(pair.source)
            report.tally.add_omitted()
            continue
        report.tally.add(sample)
        classes = sample.mask.class_map if sample.mask is not None else None
        if classes is not None and not classes.pixels[1:255].any():
            report.empty.append(pair.source)
        if classes is not None and pair.source in compared:
            assert sample.image.image is not None
            ratios = compare_positions(to_middle(sample.image.image), classes.index)
            if ratios is not None:
                report.ratios[pair.source] = ratios
    return report


def to_middle(image: Image.Image) -> np.ndarray:
    """Convert the middle of an image, as far as it is compared with its mask, to grey [H, W]."""
    # Before the conversion, which would copy a large image.
    middle = image.crop(find_middle(*image.size))
    return np.asarray(middle if middle.mode in GREY16_MODES else middle.convert("L"))


def read_pair(pair: Pair, images: str, masks: str, rule: SampleRule) -> StoredSample:
    """Read and check an image and its mask. Raises DataError or OSError."""
    image_path, mask_path = f"{images}/{pair.source}", f"{masks}/{pair.mask}"
    with open_file(image_path) as file:
        image = file.read()
    mask = None
    if pair.mask is not None:
        with open_file(mask_path) as file:
            mask = read_spans(file, pair.spans)
        if pair.segments is not None:
            with open(f"{masks}/{pair.segments}", "rb") as file:
                mask += file.read()
        if pair.spans:
            mask_path = f"{mask_path} ({pair.source})"
    return read_sample(image, mask, rule, image_path, mask_path)


def list_leaks(report: PairReport, splits: dict[str, str]) -> list[str]:
    """Describe identical images in different splits, one line each."""
    problems = []
    for names in find_duplicates(report.tally.digests, report.sources).values():
        if len({splits.get(name) for name in names}) > 1:
            named = " = ".join(f"{name} ({splits[name]})" for name in sorted(names)[:5])
            problems.append(
                f"{named} are the same image in two splits; remove one, put both into one split "
                "with --split-file, or add --duplicates same-split"
            )
    return problems
