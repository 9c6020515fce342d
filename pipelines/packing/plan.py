"""The packing plan: which pair goes into which shard, fixed and saved before work starts."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pipelines.packing.duplicates import DuplicatePolicy, describe_moves, unite_duplicates
from pipelines.runtime.progress import progress
from pipelines.runtime.terminal import print_lines
from shards.folders.pairs import Pair, Pairing
from shards.folders.splits import SPLITS, SplitRule
from shards.local_files import open_file
from shards.sample import AggregateDataError, DataError, encode_key

WORK_DIR = ".pack"
TAR_HEADER = 512
SHARD_BYTES = 256 * 2**20
"""Default size at which a shard is closed, in bytes of its input files."""
MIN_SHARD_BYTES = 8 * 2**20
"""Lower limit of that size for small data sets."""
TARGET_SHARDS = 16
"""Shards per split to aim for, so that several processes have work."""
PROBE_BYTES = 4096
"""Bytes in the middle of a file that are compared first, among files of equal size."""
SplitLeak = list[tuple[str, str]]
"""(split, source) of identical images in different splits."""
FileStat = tuple[int, int]
"""Size in bytes and modification time in nanoseconds."""


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """One planned sample, with the size and time of its files to detect later changes."""

    source: str
    image: FileStat
    mask: str | None
    mask_stat: FileStat | None
    group: str | None
    unique: bool = False
    """No other image has the same size in bytes, so it has no duplicate."""
    spans: tuple[int, ...] = ()
    """Bytes of the mask's file that hold its annotations: start, stop, ...; () for all of it."""
    segments: tuple[str, FileStat] | None = None
    """PNG that follows these bytes (panoptic COCO)."""

    @property
    def key(self) -> str:
        """Key in the shard."""
        return encode_key(self.source)

    @property
    def bytes(self) -> int:
        """Bytes that its files take in a tar."""
        mask = sum(self.spans[1::2]) - sum(self.spans[::2])
        mask += self.segments[1][0] if self.segments else 0
        files = [self.image[0], *([mask or self.mask_stat[0]] if self.mask_stat else [])]
        return sum(TAR_HEADER + -(-size // TAR_HEADER) * TAR_HEADER for size in files)


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One shard to write: the unit of work."""

    name: str
    split: str
    samples: tuple[PlannedSample, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRule:
    """How samples are ordered and cut into shards."""

    max_samples: int
    """Maximum number of samples in a shard."""
    max_bytes: int | None
    """Size of the input files at which a shard is closed; None: 256 MiB, or less where that makes
    too few shards."""
    seed: int
    """Seed of the order of samples."""


def make_plan(
    pairing: Pairing,
    splits: SplitRule,
    rule: ShardRule,
    *,
    keep_going: bool,
    duplicates: DuplicatePolicy = "error",
) -> tuple[list[PlannedShard], list[str]]:
    """Assign every pair to a shard.

    Args:
        pairing: pairs of images and masks.
        splits: assigns pairs to splits.
        rule: cuts the samples of a split into shards.
        keep_going: keep an image that is in several splits in the first one (train, val, test).
        duplicates: `same-split` moves identical images, with their groups, into one split.

    Returns:
        The shards, and why images were left out, one line per image.

    Raises:
        DataError: byte-identical images are in different splits, without `keep_going`.
    """
    pairs = pairing.pairs
    if pairing.masks is None:
        names: Sequence[str] = ["unlabelled"] * len(pairs)
        groups: Sequence[str | None] = [None] * len(pairs)
    else:
        notes: list[str] = []
        names, groups = splits.assign_splits(pairs, notes)
        print_lines(notes)
    by_split: dict[str, list[PlannedSample]] = defaultdict(list)
    folders = str(pairing.images), str(pairing.masks)
    with progress(total=len(pairs), desc="plan", unit="pair", delay=2) as bar:
        for pair, name, group in zip(pairs, names, groups, strict=True):
            by_split[name].append(plan_sample(folders, pair, group))
            bar.update()
    sizes = Counter(sample.image[0] for samples in by_split.values() for sample in samples)
    for name, samples in by_split.items():
        by_split[name] = [replace(s, unique=True) if sizes[s.image[0]] == 1 else s for s in samples]
    leaks = find_split_leaks(by_split, pairing.images)
    if duplicates == "same-split":
        move_duplicates(by_split, leaks)
        leaks = []
    if leaks and not keep_going:
        remedy = "remove one, add --duplicates same-split, or use --keep-going"
        problems = sorted(map(describe_leak, leaks))
        raise AggregateDataError(problems, f"one image in two splits: {remedy}")
    left_out = drop_leaks(by_split, leaks, pairing.images)
    plan: list[PlannedShard] = []
    for name in (*SPLITS, "unlabelled"):
        # A seeded shuffle in which the order of two samples does not depend on the others.
        shuffled = sorted(
            by_split.pop(name, []),
            key=lambda s: hashlib.sha256(f"{rule.seed} {s.key}".encode()).digest(),
        )
        runs = cut_samples(shuffled, rule)
        plan += [PlannedShard(f"{name}-{n:06d}.tar", name, run) for n, run in enumerate(runs)]
    return plan, left_out


def move_duplicates(by_split: dict[str, list[PlannedSample]], leaks: Sequence[SplitLeak]) -> None:
    """Move identical images, with their groups, into one split, and print how many moved."""
    splits = {s.source: split for split, samples in by_split.items() for s in samples}
    groups = {s.source: s.group for samples in by_split.values() for s in samples}
    moved = unite_duplicates(splits, groups, [[source for _, source in leak] for leak in leaks])
    if not moved:
        return
    print(describe_moves(splits, moved))
    everything = [sample for samples in by_split.values() for sample in samples]
    by_split.clear()
    for sample in everything:
        target = moved.get(sample.source, splits[sample.source])
        by_split.setdefault(target, []).append(sample)


def drop_leaks(
    by_split: dict[str, list[PlannedSample]], leaks: Sequence[SplitLeak], images: Path
) -> list[str]:
    """Keep identical images in the first of their splits only; describe each one left out."""
    dropped: dict[str, str] = {}
    for group in leaks:
        kept, example = min(group, key=lambda file: (SPLITS.index(file[0]), file[1]))
        dropped |= {
            source: f"{images}/{source} ({split}) is the same image as {example} ({kept}), which "
            "is kept"
            for split, source in group
            if split != kept
        }
    for split, samples in by_split.items():
        by_split[split] = [sample for sample in samples if sample.source not in dropped]
    return [dropped[source] for source in sorted(dropped)]


def plan_sample(folders: tuple[str, str], pair: Pair, group: str | None) -> PlannedSample:
    """Add sizes and times of its files to a pair; `folders`: those of images and masks."""
    image = stat_file(f"{folders[0]}/{pair.source}")
    mask = None if pair.mask is None else stat_file(f"{folders[1]}/{pair.mask}")
    name, spans = pair.segments, pair.spans
    png = None if name is None else (name, stat_file(f"{folders[1]}/{name}"))
    return PlannedSample(pair.source, image, pair.mask, mask, group, spans=spans, segments=png)


def stat_file(path: str) -> FileStat:
    """Return size and time of a file; zeros if it is missing, which is reported when it is read."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def cut_samples(
    samples: Sequence[PlannedSample], rule: ShardRule
) -> Iterator[tuple[PlannedSample, ...]]:
    """Cut samples into runs, each closed when it reaches the maximum of bytes or samples."""
    max_bytes = rule.max_bytes
    if max_bytes is None:
        total = sum(sample.bytes for sample in samples)
        max_bytes = min(SHARD_BYTES, max(MIN_SHARD_BYTES, total // TARGET_SHARDS))
    run: list[PlannedSample] = []
    size = 0
    for sample in samples:
        run.append(sample)
        size += sample.bytes
        if len(run) == rule.max_samples or size >= max_bytes:
            yield tuple(run)
            run, size = [], 0
    if run:
        yield tuple(run)


def find_split_leaks(by_split: dict[str, list[PlannedSample]], images: Path) -> list[SplitLeak]:
    """Find byte-identical images in different splits.

    Only files of equal size are opened; only those whose middle is equal are read completely.
    """
    if len(by_split) < 2:
        return []
    by_size: dict[int, SplitLeak] = defaultdict(list)
    for split, samples in by_split.items():
        for sample in samples:
            by_size[sample.image[0]].append((split, sample.source))
    # Empty and missing files are reported when they are read.
    by_size.pop(0, None)
    suspects = [
        (size, group) for size, group in by_size.items() if len({split for split, _ in group}) > 1
    ]
    del by_size
    leaks: list[SplitLeak] = []
    folder = str(images)
    total = sum(len(group) for _, group in suspects)
    with progress(total=total, desc="compare splits", unit="image", delay=2) as bar:
        for size, group in suspects:
            for candidates in group_identical(group, folder, size, probe=True):
                leaks += group_identical(candidates, folder, size, probe=False)
            bar.update(len(group))
    return leaks


def group_identical(files: SplitLeak, images: str, size: int, *, probe: bool) -> list[SplitLeak]:
    """Group files with identical content that are in different splits.

    Args:
        files: (split, source) of files of `size` bytes.
        images: folder of the sources.
        size: bytes of each file.
        probe: compare only the middle of the files.
    """
    groups: dict[bytes, SplitLeak] = defaultdict(list)
    for split, source in files:
        # Unreadable files are reported when they are packed.
        with suppress(OSError, DataError), open_file(f"{images}/{source}", 0) as file:
            if probe:
                file.seek(max(0, (size - PROBE_BYTES) // 2))
            data = file.read(PROBE_BYTES) if probe else file.read()
            groups[hashlib.sha256(data).digest()].append((split, source))
    return [group for group in groups.values() if len({split for split, _ in group}) > 1]


def describe_leak(files: SplitLeak) -> str:
    """Name identical images and their splits in one line."""
    named = " = ".join(f"{source} ({split})" for split, source in sorted(files)[:5])
    return f"{named} are the same image"


def list_sources(plan: Iterable[PlannedShard]) -> Iterator[str]:
    """Yield `split:source` of every sample, in the order of the plan."""
    return (f"{shard.split}:{sample.source}" for shard in plan for sample in shard.samples)
