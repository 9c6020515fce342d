"""The packing plan: which pair goes into which shard, fixed and saved before work starts."""

import fcntl
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from pipelines.packing.duplicates import DuplicatePolicy, describe_moves, unite_duplicates
from pipelines.runtime.errors import changed_settings
from pipelines.runtime.progress import progress
from shards.folders.pairs import Pair, Pairing
from shards.folders.splits import SPLITS, SplitRule
from shards.local_files import open_file
from shards.sample import AggregateDataError, DataError, encode_key
from shards.store import Store
from shards.writer import open_lock_file

WORK_DIR = ".pack"
HEADER = f"{WORK_DIR}/plan.json"
LINES = f"{WORK_DIR}/plan.jsonl"
LOCK = f"{WORK_DIR}/lock"
"""Locked by every process that packs into the folder; released when the process ends."""
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
        for note in notes:
            print(note)
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


def encode_plan(plan: Sequence[PlannedShard]) -> Iterator[bytes]:
    """Serialise the plan as JSON lines, one per sample."""
    for shard in plan:
        for s in shard.samples:
            line = [shard.name, s.source, s.image, s.mask, s.mask_stat, s.group, *s.spans]
            yield json.dumps([*line, *(s.segments or ())]).encode() + b"\n"


def encode_header(rule: dict[str, Any], plan: Sequence[PlannedShard]) -> bytes:
    """Serialise the settings and the digest of a plan; equal for equal input files."""
    digest = hashlib.sha256()
    for line in encode_plan(plan):
        digest.update(line)
    return json.dumps({"rule": rule, "lines": digest.hexdigest()}, indent=1).encode()


def clear_work(store: Store, keep: Sequence[str] = (HEADER,)) -> None:
    """Remove the files of WORK_DIR, except those to keep."""
    for name in store.names(WORK_DIR):
        if (path := f"{WORK_DIR}/{name}") not in keep:
            store.remove(path)


def fix_plan(
    store: Store, rule: dict[str, Any], plan: Sequence[PlannedShard], held: ExitStack
) -> str:
    """Save the plan, or check that it equals the saved one.

    A saved plan of which no shard exists yet is replaced, except in a local folder where another
    process is using it: every process keeps a shared lock until it ends or closes `held`.

    Args:
        store: the output folder.
        rule: settings that decide the bytes of the shards.
        plan: the plan.
        held: keeps the lock open.

    Returns:
        The sha256 of the plan and its settings.

    Raises:
        DataError: the folder holds another data set, or input or settings have changed.
    """
    header = encode_header(rule, plan)
    if not store.exists(HEADER) and (packed := list_shards(store)):
        raise DataError(
            f"{store} holds shards of another data set ({packed[0]}); choose another --out"
        )
    lock, is_alone = lock_plan(store, held)
    saved = store.read(HEADER) if store.exists(HEADER) else header
    if is_alone and saved != header and not list_shards(store):
        clear_work(store, keep=(LOCK, HEADER))
        # Last, so that a kill in between leaves the plan to be replaced.
        store.remove(HEADER)
    if not store.exists(HEADER):
        store.write_if_absent(LINES, encode_plan(plan))
        # If several parts start at once, the first plan is kept.
        store.write_if_absent(HEADER, [header])
    if lock is not None:
        fcntl.flock(lock, fcntl.LOCK_SH)
    saved = store.read(HEADER)
    if saved != header:
        remedy = "undo that change, or remove the folder and rerun"
        if not list_shards(store):
            remedy = "another process is using that plan: use the same flags, or stop it first"
        change = describe_change(store, saved, rule, plan)
        raise DataError(f"{store} was started with another plan: {change}; {remedy}")
    return hashlib.sha256(header).hexdigest()


def lock_plan(store: Store, held: ExitStack) -> tuple[TextIO | None, bool]:
    """Lock the plan of a local folder until `held` is closed.

    Returns:
        The lock, exclusive if no other process has it and else shared, None for a remote store;
        and whether this process may replace the plan.
    """
    if store.local is None:
        return None, True
    (store.local / WORK_DIR).mkdir(exist_ok=True)
    lock = held.enter_context(os.fdopen(open_lock_file(store.local / LOCK), "w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # Wait until the first process has saved its plan.
        fcntl.flock(lock, fcntl.LOCK_SH)
        return lock, False
    return lock, True


def list_shards(store: Store) -> list[str]:
    """List the names of existing shards."""
    return [name for name in store.names() if name.endswith(".tar")]


def describe_change(
    store: Store, saved: bytes, rule: dict[str, Any], plan: Sequence[PlannedShard]
) -> str:
    """Describe the first difference between the saved plan and this one."""
    was = json.loads(saved)["rule"]
    now = json.loads(json.dumps(rule))
    if was != now:
        return f"other settings ({', '.join(changed_settings(was, now))})"
    old, new = (
        {line[1]: line[2:] for line in map(json.loads, lines)}
        for lines in (store.read(LINES).splitlines(), encode_plan(plan))
    )
    if gone := sorted(old.keys() - new.keys()):
        return f"{len(gone)} images were removed, the first: {gone[0]}"
    if added := sorted(new.keys() - old.keys()):
        return f"{len(added)} images were added, the first: {added[0]}"
    if changed := sorted(source for source in old if old[source] != new[source]):
        return f"{len(changed)} images or masks have changed, the first: {changed[0]}"
    return "other splits, shard sizes or seed"


def list_sources(plan: Iterable[PlannedShard]) -> Iterator[str]:
    """Yield `split:source` of every sample, in the order of the plan."""
    return (f"{shard.split}:{sample.source}" for shard in plan for sample in shard.samples)
