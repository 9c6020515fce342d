"""`unet pack`: folders of pictures and masks -> WebDataset shards and a manifest.

The plan (which pair goes into which shard) is fixed first and written down; every shard is then an
independent unit of work, so that any number of workers, and any number of kills, ends with the
same bytes. While it works, OUT/.pack holds the plan and a small file of counts for each finished
shard; when the manifest is written, it goes.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from tqdm import tqdm

from pipelines.config import UsageError, run_command
from shards.index import (
    MANIFEST,
    Manifest,
    ShardInfo,
    SizeCount,
    SplitInfo,
    merge_sizes,
    write_manifest,
)
from shards.masks import MaskFormat, MaskKind, read_mask
from shards.pairs import (
    SPLITS,
    Pair,
    assign_splits,
    find_pairs,
    listing,
    read_split_file,
)
from shards.sample import (
    IGNORE,
    INFO_EXTENSION,
    MASK_EXTENSION,
    Channels,
    DataError,
    Palette,
    channels_of,
    default_palette,
    encode_png,
    load,
    open_image,
)
from shards.writer import ShardFile, ShardWriter, write_json

TAR_HEADER = 512
SHARD_BYTES = 256 * 2**20
MOST_DUPLICATES = 1000
WORK_DIR = ".pack"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """Pack pictures and masks into WebDataset shards with a manifest.

    Every picture and mask is decoded and checked first; nothing that cannot be trained on goes in.
    Given again after a kill, it goes on; finished shards are not done again.
    """

    images: Path
    """Folder of the pictures, searched recursively."""
    out: Path
    """Folder for the shards; made if it does not exist."""
    masks: Path | None = None
    """Folder of the masks: same paths but for the extension. Left out: unlabelled shards."""
    mask_format: MaskKind | None = None
    """How masks are to be read. binary: 0 and one other value. index: the value is the class.
    values: --mask-values lists them."""
    mask_values: tuple[int, ...] = ()
    """Pixel value of class 0, 1, 2, ... (format `values`)."""
    mask_threshold: int | None = None
    """Values from here up are foreground (format `binary`, for masks with soft edges)."""
    invert: bool = False
    """In binary masks, 0 is class 1 and the other value class 0."""
    ignore_value: int | None = None
    """Pixel value that counts nowhere, neither in training nor in scores."""
    classes: tuple[str, ...] = ()
    """Class names from class 0 on. One called `background` enters no mean score."""
    image_suffix: str = ""
    """What a picture's name ends with, before the extension, that its mask's does not."""
    mask_suffix: str = ""
    """What a mask's name ends with, before the extension, that its picture's does not."""
    skip_unpaired: bool = False
    """Leave out pictures without mask and masks without picture instead of refusing."""
    val_fraction: float = 0.1
    """Share of the samples for the split val."""
    test_fraction: float = 0.0
    """Share of the samples for the split test."""
    group_by: str | None = None
    """Regular expression; pictures in whose path it finds the same text stay in one split."""
    split_file: Path | None = None
    """CSV with the columns path,split that names the split of every picture."""
    samples_per_shard: int = 10_000
    """Most samples in a shard."""
    shard_bytes: int = SHARD_BYTES
    """A shard is closed when its input files reach this size."""
    workers: int = 0
    """Processes; 0 means one for each CPU."""
    seed: int = 0
    """Seed of the order in the shards."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction <= 1 or not 0 <= self.test_fraction <= 1:
            raise ValueError("--val-fraction and --test-fraction are shares, 0 to 1")
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("--val-fraction and --test-fraction leave nothing to train on")
        if self.samples_per_shard < 1 or self.shard_bytes < 1 or self.workers < 0:
            raise ValueError(
                "--samples-per-shard and --shard-bytes must be above 0, --workers not below"
            )
        if self.masks is None and self.classes:
            raise ValueError("--classes needs --masks: unlabelled pictures have none")
        if self.group_by is not None:
            try:
                re.compile(self.group_by)
            except re.error as error:
                raise ValueError(f"--group-by {self.group_by!r} is no pattern: {error}") from error
        if self.masks is None and self.mask_format is not None:
            raise ValueError("--mask-format needs --masks")
        if self.masks is not None and self.mask_format is None:
            raise ValueError("--masks needs --mask-format binary, index or values")
        if self.masks is None and self.split_file is not None:
            raise ValueError("--split-file needs --masks: unlabelled pictures have one split")
        for value in (*self.mask_values, self.mask_threshold, self.ignore_value):
            if value is not None and not 0 <= value <= 255:
                raise ValueError(f"mask values are 0 to 255, got {value}")
        self.rule()

    def class_names(self) -> tuple[str, ...]:
        """The names given, or those that the format implies."""
        if self.classes or self.mask_format is None:
            return self.classes
        match self.mask_format:
            case "binary":
                return ("background", "foreground")
            case "values":
                return tuple(f"class {value}" for value in self.mask_values)
            case "index":
                raise ValueError("--mask-format index needs --classes, the names from class 0 on")

    def rule(self) -> MaskFormat | None:
        """The declared mask format, None for unlabelled pictures."""
        if self.mask_format is None:
            return None
        names = self.class_names()
        if len(set(names)) != len(names):
            raise ValueError(f"two classes have one name: {' '.join(names)}")
        return MaskFormat(
            kind=self.mask_format,
            num_classes=len(names),
            values=self.mask_values,
            invert=self.invert,
            threshold=self.mask_threshold,
            ignore_value=self.ignore_value,
        )


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """One sample as the plan holds it; size and time tell whether the files have changed since."""

    key: str
    source: str
    image: str
    image_stat: tuple[int, int]
    mask: str | None
    mask_stat: tuple[int, int] | None
    group: str | None


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One unit of work."""

    name: str
    split: str
    samples: tuple[PlannedSample, ...]


@dataclass(frozen=True, slots=True)
class PackRule:
    """What a worker needs besides its shard."""

    out: Path
    mask_format: MaskFormat | None
    palette: Palette


@dataclass(frozen=True, slots=True)
class ChannelSums:
    """Integer sums over pixels 0-255 of each channel, exact in any order."""

    pixels: int
    sums: tuple[int, ...]
    squares: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShardReport:
    """What a worker found while it wrote a shard."""

    split: str
    shard: ShardInfo
    sizes: tuple[SizeCount, ...]
    sums: dict[Channels, ChannelSums]
    digests: tuple[str, ...]
    """sha256 of each picture's bytes."""
    turned: int
    """Pictures stored upright that had an EXIF orientation."""
    foreground_values: tuple[int, ...]
    """Values other than 0 that the masks held."""


def run(config: PackConfig) -> int:
    """Plan, write the shards that are missing, and last the manifest."""
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UsageError(f"--out {config.out} is a file, not a folder") from error
    pairs = find_pairs(
        config.images,
        config.masks,
        image_suffix=config.image_suffix,
        mask_suffix=config.mask_suffix,
        skip_unpaired=config.skip_unpaired,
    )
    plan = make_plan(config, pairs)
    work_dir = config.out / WORK_DIR
    fix_plan(config, plan, work_dir)
    names = config.class_names()
    rule = PackRule(config.out, config.rule(), default_palette(names))
    todo = [shard for shard in plan if not (config.out / shard.name).exists()]
    if len(todo) < len(plan):
        print(f"{len(plan) - len(todo)} of {len(plan)} shards are there already")
    write_shards(todo, rule, config.workers or len(os.sched_getaffinity(0)))
    reports = [read_report(work_dir, shard) for shard in plan]
    manifest = make_manifest(config, plan, reports, rule)
    write_manifest(config.out, manifest, within=work_dir)
    shutil.rmtree(work_dir)
    print(summary(config, manifest, reports))
    return 0


def make_plan(config: PackConfig, pairs: Sequence[Pair]) -> list[PlannedShard]:
    """Which sample goes into which shard, in which order: fixed before any work starts."""
    if config.masks is None:
        splits: Sequence[str] = ["unlabelled"] * len(pairs)
        groups: Sequence[str | None] = [None] * len(pairs)
    elif config.split_file is not None:
        splits, groups = read_split_file(config.split_file, pairs), [None] * len(pairs)
    else:
        splits, groups = assign_splits(
            pairs,
            val_fraction=config.val_fraction,
            test_fraction=config.test_fraction,
            group_by=config.group_by,
        )
    by_split: dict[str, list[PlannedSample]] = defaultdict(list)
    for pair, split, group in zip(pairs, splits, groups, strict=True):
        by_split[split].append(plan_sample(pair, group))
    plan: list[PlannedShard] = []
    for split in (*SPLITS, "unlabelled"):
        shuffled = sorted(by_split[split], key=lambda sample: shuffle_key(sample, config.seed))
        for number, samples in enumerate(cut(shuffled, config)):
            plan.append(PlannedShard(f"{split}-{number:06d}.tar", split, tuple(samples)))
    return plan


def plan_sample(pair: Pair, group: str | None) -> PlannedSample:
    """A pair with the sizes and times of its files."""

    def stat(path: Path) -> tuple[int, int]:
        found = path.stat()
        return found.st_size, found.st_mtime_ns

    return PlannedSample(
        pair.key,
        pair.source,
        str(pair.image),
        stat(pair.image),
        None if pair.mask is None else str(pair.mask),
        None if pair.mask is None else stat(pair.mask),
        group,
    )


def shuffle_key(sample: PlannedSample, seed: int) -> bytes:
    """A seeded shuffle that does not depend on what else is packed."""
    return hashlib.sha256(f"{seed} {sample.key}".encode()).digest()


def cut(samples: Iterable[PlannedSample], config: PackConfig) -> Iterator[list[PlannedSample]]:
    """Samples in runs that reach `shard_bytes` or `samples_per_shard`."""
    run: list[PlannedSample] = []
    size = 0
    for sample in samples:
        files = [sample.image_stat[0], *([sample.mask_stat[0]] if sample.mask_stat else [])]
        run.append(sample)
        size += sum(TAR_HEADER + -(-file // TAR_HEADER) * TAR_HEADER for file in files)
        if len(run) == config.samples_per_shard or size >= config.shard_bytes:
            yield run
            run, size = [], 0
    if run:
        yield run


def fix_plan(config: PackConfig, plan: Sequence[PlannedShard], work_dir: Path) -> None:
    """Write the plan down, or check that it is the one that was begun.

    Raises DataError if the folder is finished, holds another data set, or the input has changed.
    """
    if (config.out / MANIFEST).exists():
        # Left by a kill between the manifest and the end.
        shutil.rmtree(work_dir, ignore_errors=True)
        raise DataError(f"{config.out} is a finished data set; choose another --out or remove it")
    planned = json.loads(json.dumps({"rule": rule_of(config), "shards": [asdict(s) for s in plan]}))
    path = work_dir / "plan.json"
    packed = sorted(shard.name for shard in config.out.glob("*.tar"))
    if path.exists() and packed:
        begun = json.loads(path.read_text())
        if begun != planned:
            raise DataError(
                f"{config.out} was begun with another plan: {difference(begun, planned)}; "
                f"restore that, or remove {config.out} and pack anew"
            )
        return
    if packed:
        raise DataError(
            f"{config.out} holds shards of something else ({packed[0]}); choose another --out"
        )
    work_dir.mkdir(exist_ok=True)
    write_json(path, planned)


def rule_of(config: PackConfig) -> dict[str, Any]:
    """The settings that decide the bytes of a shard."""
    rule = config.rule()
    return {"classes": list(config.class_names()), "mask_format": asdict(rule) if rule else None}


def difference(begun: dict[str, Any], planned: dict[str, Any]) -> str:
    """What first differs between two plans, in words."""
    if begun["rule"] != planned["rule"]:
        return "other classes or another mask format"
    old, new = (
        {s["source"]: s for shard in plan["shards"] for s in shard["samples"]}
        for plan in (begun, planned)
    )
    if gone := sorted(old.keys() - new.keys()):
        return f"{len(gone)} pictures are gone, {gone[0]} first"
    if added := sorted(new.keys() - old.keys()):
        return f"{len(added)} pictures are new, {added[0]} first"
    if changed := sorted(source for source in old if old[source] != new[source]):
        return f"{len(changed)} pictures or masks have changed, {changed[0]} first"
    return "other splits, shard sizes or seed"


def write_shards(shards: Sequence[PlannedShard], rule: PackRule, workers: int) -> None:
    """Write the shards, in processes where that helps. Raises DataError listing all bad files."""
    total = sum(len(shard.samples) for shard in shards)
    problems: list[str] = []
    with tqdm(total=total, desc="pack", unit="sample", disable=not sys.stderr.isatty()) as bar:
        if len(shards) == 1 or workers == 1:
            for shard in shards:
                problems += write_shard(shard, rule, bar.update)
        else:
            with ProcessPoolExecutor(min(workers, len(shards))) as executor:
                for shard, found in as_done(executor, shards, rule):
                    problems += found
                    bar.update(len(shard.samples))
    if problems:
        raise DataError(listing(sorted(problems), "their shards were not written"))


def as_done(
    executor: Executor, shards: Sequence[PlannedShard], rule: PackRule
) -> Iterator[tuple[PlannedShard, list[str]]]:
    """Shards as they are finished, with their problems."""
    futures: dict[Future[list[str]], PlannedShard] = {
        executor.submit(write_shard, shard, rule): shard for shard in shards
    }
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a packing process was killed (out of memory?); the same command goes on"
        ) from error


def write_shard(
    planned: PlannedShard, rule: PackRule, advance: Callable[[int], object] = lambda _: None
) -> list[str]:
    """Write one shard and its report; returns the problems that kept it from being written."""
    problems: list[str] = []
    tally = Tally(planned.split, rule.mask_format)
    writer = ShardWriter(rule.out / planned.name)
    try:
        with writer:
            for sample in planned.samples:
                try:
                    writer.add(sample.key, tally.members(sample, rule))
                except DataError as error:
                    problems.append(str(error))
                except OSError as error:
                    problems.append(f"{sample.image} cannot be read: {error.strerror or error}")
                advance(1)
            if problems:
                raise DataError("refused")
            # Before the rename that ends this block: a shard that is there has its report.
            report = tally.report(writer.seal())
            write_json(rule.out / WORK_DIR / f"{planned.name}.json", asdict(report))
    except DataError as error:
        return problems or [str(error)]
    return []


class Tally:
    """Adds up what the samples of one shard hold."""

    def __init__(self, split: str, mask_format: MaskFormat | None) -> None:
        self.split = split
        self.mask_format = mask_format
        self.pixels = np.zeros(256, dtype=np.int64)
        self.sizes: Counter[tuple[int, int, str]] = Counter()
        self.sums: dict[Channels, list[np.ndarray]] = {
            "L": [np.zeros(1, np.int64)] * 3,
            "RGB": [np.zeros(3, np.int64)] * 3,
        }
        self.digests: list[str] = []
        self.turned = 0
        self.values: set[int] = set()

    def members(self, sample: PlannedSample, rule: PackRule) -> dict[str, bytes]:
        """{extension: bytes} of a sample. Raises DataError if anything about it is wrong."""
        data = read_planned(sample.image, sample.image_stat)
        image, turned = load(open_image(data, sample.image), sample.image)
        channels = channels_of(image, sample.image)
        extension = PurePosixPath(sample.source).suffix[1:].lower()
        info = {
            "source": sample.source,
            "width": image.width,
            "height": image.height,
            "group": sample.group,
        }
        members = {
            **({"png": encode_png(image)} if turned else {extension: data}),
            INFO_EXTENSION: json.dumps(info).encode(),
        }
        if (
            sample.mask is not None
            and rule.mask_format is not None
            and sample.mask_stat is not None
        ):
            mask = read_mask(
                read_planned(sample.mask, sample.mask_stat),
                rule.mask_format,
                rule.palette,
                sample.mask,
            )
            if mask.index.shape != (image.height, image.width):
                raise DataError(
                    f"{sample.mask} is {mask.index.shape[1]} x {mask.index.shape[0]}, its picture "
                    f"{sample.image} {image.width} x {image.height}; give both one size"
                )
            members[MASK_EXTENSION] = mask.data
            self.pixels += np.bincount(mask.index.ravel(), minlength=256)
            self.values.update(mask.values)
        pixels = np.asarray(image.convert(channels)).reshape(-1, len(channels))
        self.sums[channels] = [
            total + part
            for total, part in zip(self.sums[channels], channel_sums(pixels), strict=True)
        ]
        self.sizes[image.width, image.height, image.mode] += 1
        self.digests.append(hashlib.sha256(data).hexdigest())
        self.turned += turned
        return members

    def report(self, file: ShardFile) -> ShardReport:
        """The sums over all samples so far."""
        pixels: tuple[int, ...] = ()
        if self.mask_format is not None:
            pixels = (
                *self.pixels[: self.mask_format.num_classes].tolist(),
                int(self.pixels[IGNORE]),
            )
        return ShardReport(
            split=self.split,
            shard=ShardInfo(file.name, file.samples, file.bytes, file.sha256, pixels),
            sizes=merge_sizes([SizeCount(*kind, images) for kind, images in self.sizes.items()]),
            sums={
                channels: ChannelSums(int(count[0]), tuple(sums.tolist()), tuple(squares.tolist()))
                for channels, (count, sums, squares) in self.sums.items()
            },
            digests=tuple(self.digests),
            turned=self.turned,
            foreground_values=tuple(sorted(self.values - {0})),
        )


def channel_sums(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count, sum and sum of squares of uint8 [N, C], each int64 [C]."""
    levels = np.arange(256, dtype=np.int64)
    histograms = [np.bincount(channel, minlength=256) for channel in pixels.T]
    count, total, squares = (
        np.array([(histogram * weight).sum() for histogram in histograms], dtype=np.int64)
        for weight in (np.ones_like(levels), levels, levels**2)
    )
    return count, total, squares


def read_planned(path: str, planned: tuple[int, int]) -> bytes:
    """A file's bytes. Raises DataError if it has changed since the plan was made."""
    with open(path, "rb") as file:
        found = os.fstat(file.fileno())
        if (found.st_size, found.st_mtime_ns) != tuple(planned):
            raise DataError(f"{path} has changed while it was packed; start again")
        return file.read()


def read_report(work_dir: Path, planned: PlannedShard) -> ShardReport:
    """What was found in a finished shard."""
    plain = json.loads((work_dir / f"{planned.name}.json").read_text())
    shard = {**plain["shard"], "pixels": tuple(plain["shard"]["pixels"])}
    return ShardReport(
        **{
            **plain,
            "shard": ShardInfo(**shard),
            "sizes": tuple(SizeCount(**size) for size in plain["sizes"]),
            "sums": {
                name: ChannelSums(s["pixels"], tuple(s["sums"]), tuple(s["squares"]))
                for name, s in plain["sums"].items()
            },
            "digests": tuple(plain["digests"]),
            "foreground_values": tuple(plain["foreground_values"]),
        }
    )


def make_manifest(
    config: PackConfig, plan: Sequence[PlannedShard], reports: Sequence[ShardReport], rule: PackRule
) -> Manifest:
    """Everything that was found, in one page."""
    splits = {
        split: SplitInfo(
            tuple(r.shard for r in reports if r.split == split),
            merge_sizes([size for r in reports if r.split == split for size in r.sizes]),
        )
        for split in (*SPLITS, "unlabelled")
        if any(r.split == split for r in reports)
    }
    channels: Channels = "RGB" if any(r.sums["RGB"].pixels for r in reports) else "L"
    measured = [r for r in reports if r.split == "train"] or reports
    mean, std = statistics(measured, channels)
    mask_format: dict[str, Any] = {}
    if rule.mask_format is not None:
        found = {value for r in reports for value in r.foreground_values} - {config.ignore_value}
        foreground = found.pop() if len(found) == 1 else None
        source_values = rule.mask_format.source_values(foreground)
        mask_format = {**asdict(rule.mask_format), "source_values": source_values}
    return Manifest(
        classes=config.class_names(),
        palette=rule.palette,
        channels=channels,
        mask_format=mask_format,
        mean=mean,
        std=std,
        splits=splits,
        duplicates=find_duplicates(plan, reports),
    )


def statistics(
    reports: Sequence[ShardReport], channels: Channels
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, pixels in 0-1; grey counts for each of RGB."""
    count, sums, squares = 0, [0] * len(channels), [0] * len(channels)
    for part in (part for report in reports for part in report.sums.values()):
        count += part.pixels
        for i in range(len(channels)):
            sums[i] += part.sums[i % len(part.sums)]
            squares[i] += part.squares[i % len(part.squares)]
    mean = [total / count for total in sums]
    variance = [square / count - m**2 for square, m in zip(squares, mean, strict=True)]
    return (
        tuple(round(m / 255, 6) for m in mean),
        tuple(round(max(0.0, v) ** 0.5 / 255, 6) for v in variance),
    )


def find_duplicates(
    plan: Sequence[PlannedShard], reports: Sequence[ShardReport]
) -> tuple[tuple[str, ...], ...]:
    """Sources of pictures whose bytes are equal, at most a thousand groups."""
    groups: dict[str, list[str]] = defaultdict(list)
    for shard, report in zip(plan, reports, strict=True):
        for sample, digest in zip(shard.samples, report.digests, strict=True):
            groups[digest].append(f"{shard.split}:{sample.source}")
    doubles = sorted(tuple(sorted(names)) for names in groups.values() if len(names) > 1)
    return tuple(doubles[:MOST_DUPLICATES])


def summary(config: PackConfig, manifest: Manifest, reports: Sequence[ShardReport]) -> str:
    """What was packed, for people."""
    lines = [f"{config.out}: {'grey' if manifest.channels == 'L' else 'RGB'} pictures"]
    for name, split in manifest.splits.items():
        sizes = ", ".join(f"{s.width} x {s.height} ({s.images})" for s in split.sizes[:3])
        more = f" and {len(split.sizes) - 3} more sizes" if len(split.sizes) > 3 else ""
        lines.append(
            f"  {name:<10}{split.samples:>8} samples, {len(split.shards)} shards; {sizes}{more}"
        )
    pixels = np.sum([r.shard.pixels for r in reports], axis=0)
    if manifest.classes:
        names = (*manifest.classes, "ignored")
        shares = pixels / pixels.sum()
        lines += [
            f"  {name:<20}{share:>8.2%} of pixels"
            for name, share in zip(names, shares, strict=True)
            if share
        ]
        for name, number in zip(manifest.classes, pixels, strict=False):
            if not number:
                lines.append(f"  warning: no pixel of the class {name!r} anywhere")
    if turned := sum(r.turned for r in reports):
        lines.append(f"  {turned} pictures with an EXIF orientation are stored upright, as PNG")
    if manifest.duplicates:
        lines.append(
            f"  warning: {len(manifest.duplicates)} groups of equal pictures, "
            f"the first: {' = '.join(manifest.duplicates[0])}"
        )
    if config.masks is not None and "train" in manifest.splits:
        if "val" not in manifest.splits:
            lines.append(
                "  warning: no sample fell into val; raise --val-fraction or use --split-file"
            )
        lines.append(f"next: unet train --data {config.out} --run-dir RUN")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_command(PackConfig, run, argv, "pack")


if __name__ == "__main__":
    sys.exit(main())
