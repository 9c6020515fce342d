"""The plan of a packing: which pair goes into which shard, fixed and written down before work."""

import fcntl
import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.progress import progress
from shards.pairs import SPLITS, AggregateDataError, Pair, Pairing, SplitRule
from shards.sample import DataError, encode_key
from shards.store import Store

WORK_DIR = ".pack"
HEADER = f"{WORK_DIR}/plan.json"
LINES = f"{WORK_DIR}/plan.jsonl"
LOCK = f"{WORK_DIR}/lock"
"""Shared by the processes that pack here; it dies with them."""

TAR_HEADER = 512
SHARD_BYTES = 256 * 2**20
"""Most bytes of a shard's input files."""
LEAST_SHARD_BYTES = 8 * 2**20
"""A shard of a small data set is not made smaller than this to have more of them."""
WANTED_SHARDS = 16
"""Shards of a split that are aimed at, so that several processes have work."""

PROBE = 4096
"""Bytes in the middle of a file by which files of one size are told apart at first."""

Leak = list[tuple[str, str]]
"""(split, source) of equal pictures in different splits."""

FileStat = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds."""


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """One sample of a plan; size and time of its files tell whether they have changed since."""

    source: str
    image: FileStat
    mask: str | None
    mask_stat: FileStat | None
    group: str | None
    unique: bool = False
    """No other picture has the same size in bytes, so none is equal."""

    @property
    def key(self) -> str:
        """Its key in the shard."""
        return encode_key(self.source)

    @property
    def bytes(self) -> int:
        """What its files take in a tar."""
        files = [self.image[0], *([self.mask_stat[0]] if self.mask_stat else [])]
        return sum(TAR_HEADER + -(-size // TAR_HEADER) * TAR_HEADER for size in files)


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One unit of work."""

    name: str
    split: str
    samples: tuple[PlannedSample, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Where shards end."""

    samples: int
    """Most samples in a shard."""
    bytes: int | None
    """Most bytes of input files; None: 256 MiB, or less where that makes too few shards."""
    seed: int
    """Seed of the order in the shards."""


def make_plan(
    pairing: Pairing, splits: SplitRule, cut: Cut, *, keep_going: bool
) -> tuple[list[PlannedShard], list[str]]:
    """Which sample goes into which shard, in which order; and what is left out, a line each.

    Raises DataError where a picture stands in two splits, byte for byte; `keep_going` keeps it in
    the first of them, of train, val and test.
    """
    pairs = pairing.pairs
    if pairing.masks is None:
        names: Sequence[str] = ["unlabelled"] * len(pairs)
        groups: Sequence[str | None] = [None] * len(pairs)
    else:
        names, groups = splits.assign_splits(pairs)
    by_split: dict[str, list[PlannedSample]] = defaultdict(list)
    folders = str(pairing.images), str(pairing.masks)
    with progress(total=len(pairs), desc="plan", unit="pair", delay=2) as bar:
        for pair, name, group in zip(pairs, names, groups, strict=True):
            by_split[name].append(plan_sample(folders, pair, group))
            bar.update()
    sizes = Counter(sample.image[0] for samples in by_split.values() for sample in samples)
    for name, samples in by_split.items():
        by_split[name] = [replace(s, unique=True) if sizes[s.image[0]] == 1 else s for s in samples]
    leaks = find_leaks(by_split, pairing.images)
    problems = sorted(map(leak, leaks))
    if problems and not keep_going:
        remedy = (
            "remove one, put both into one split (--split-file), or pack the rest: --keep-going"
        )
        raise AggregateDataError(problems, f"one picture in two splits: {remedy}")
    leave_out(by_split, leaks)
    plan: list[PlannedShard] = []
    for name in (*SPLITS, "unlabelled"):
        # A seeded shuffle that does not depend on what else is packed.
        shuffled = sorted(
            by_split.pop(name, []),
            key=lambda s: hashlib.sha256(f"{cut.seed} {s.key}".encode()).digest(),
        )
        runs = cut_samples(shuffled, cut)
        plan += [PlannedShard(f"{name}-{n:06d}.tar", name, run) for n, run in enumerate(runs)]
    return plan, problems


def leave_out(by_split: dict[str, list[PlannedSample]], leaks: Sequence[Leak]) -> None:
    """Keep equal pictures in one split only."""
    for group in leaks:
        kept = min((split for split, _ in group), key=SPLITS.index)
        gone = {source for split, source in group if split != kept}
        for split in {split for split, _ in group} - {kept}:
            by_split[split] = [s for s in by_split[split] if s.source not in gone]


def plan_sample(folders: tuple[str, str], pair: Pair, group: str | None) -> PlannedSample:
    """A pair with the sizes and times of its files; `folders`: of pictures and masks."""
    image = stat_file(f"{folders[0]}/{pair.source}")
    mask = None if pair.mask is None else stat_file(f"{folders[1]}/{pair.mask}")
    return PlannedSample(pair.source, image, pair.mask, mask, group)


def stat_file(path: str) -> FileStat:
    """Size and time of a file; zeros where it is not there, which is told when it is read."""
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def cut_samples(samples: Sequence[PlannedSample], cut: Cut) -> Iterator[tuple[PlannedSample, ...]]:
    """Samples in runs that reach the most bytes or samples."""
    most = cut.bytes
    if most is None:
        total = sum(sample.bytes for sample in samples)
        most = min(SHARD_BYTES, max(LEAST_SHARD_BYTES, total // WANTED_SHARDS))
    run: list[PlannedSample] = []
    size = 0
    for sample in samples:
        run.append(sample)
        size += sample.bytes
        if len(run) == cut.samples or size >= most:
            yield tuple(run)
            run, size = [], 0
    if run:
        yield tuple(run)


def find_leaks(by_split: dict[str, list[PlannedSample]], images: Path) -> list[Leak]:
    """Pictures that are equal byte for byte and in different splits.

    Only files of one size are opened, and only those that agree in the middle are read whole.
    """
    if len(by_split) < 2:
        return []
    by_size: dict[int, Leak] = defaultdict(list)
    for split, samples in by_split.items():
        for sample in samples:
            by_size[sample.image[0]].append((split, sample.source))
    # Empty and missing files are told as such when they are read.
    by_size.pop(0, None)
    suspects = [
        (size, group) for size, group in by_size.items() if len({split for split, _ in group}) > 1
    ]
    del by_size
    leaks: list[Leak] = []
    folder = str(images)
    total = sum(len(group) for _, group in suspects)
    with progress(total=total, desc="compare splits", unit="picture", delay=2) as bar:
        for size, group in suspects:
            for alike in equal_groups(group, folder, size, probe=True):
                leaks += equal_groups(alike, folder, size, probe=False)
            bar.update(len(group))
    return leaks


def equal_groups(files: Leak, images: str, size: int, *, probe: bool) -> list[Leak]:
    """Those of some files that agree, in the middle or as a whole, over two splits.

    All files are `size` bytes long.
    """
    groups: dict[bytes, Leak] = defaultdict(list)
    for split, source in files:
        # What cannot be read is told as such when it is packed.
        with suppress(OSError), open(f"{images}/{source}", "rb", buffering=0) as file:
            if probe:
                file.seek(max(0, (size - PROBE) // 2))
            data = file.read(PROBE) if probe else file.read()
            groups[hashlib.sha256(data).digest()].append((split, source))
    return [group for group in groups.values() if len({split for split, _ in group}) > 1]


def leak(files: Leak) -> str:
    """What is wrong about equal pictures in different splits."""
    named = " = ".join(f"{source} ({split})" for split, source in sorted(files)[:5])
    return f"{named} are the same picture"


def plan_lines(plan: Sequence[PlannedShard]) -> Iterator[bytes]:
    """The plan as lines of JSON, one for each sample."""
    for shard in plan:
        for s in shard.samples:
            line = [shard.name, s.source, s.image, s.mask, s.mask_stat, s.group]
            yield json.dumps(line).encode() + b"\n"


def fix_plan(
    store: Store, rule: dict[str, Any], plan: Sequence[PlannedShard], held: ExitStack
) -> str:
    """Write the plan down, or check that it is the one that was begun; returns its sha256.

    A plan without a shard is replaced, but in a local folder not as long as another process works
    by it: until it leaves `held`, or dies. Raises DataError if the folder holds another data set or
    the input has changed.
    """
    digest = hashlib.sha256()
    for line in plan_lines(plan):
        digest.update(line)
    header = json.dumps({"rule": rule, "lines": digest.hexdigest()}, indent=1).encode()
    if not store.exists(HEADER) and (packed := shards_in(store)):
        raise DataError(
            f"{store} holds shards of something else ({packed[0]}); choose another --out"
        )
    lock, alone = None, True
    if store.local is not None:
        (store.local / WORK_DIR).mkdir(exist_ok=True)
        lock = held.enter_context((store.local / LOCK).open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
            # Until the process that decides has written its plan.
            fcntl.flock(lock, fcntl.LOCK_SH)
    begun = store.read(HEADER) if store.exists(HEADER) else header
    if alone and begun != header and not shards_in(store):
        for name in store.names(WORK_DIR):
            if (path := f"{WORK_DIR}/{name}") not in (LOCK, HEADER):
                store.remove(path)
        # Last, so that after a kill in between what is left goes too.
        store.remove(HEADER)
    if not store.exists(HEADER):
        store.write_if_absent(LINES, plan_lines(plan))
        # Of several parts that begin at once, the first to come here decides.
        store.write_if_absent(HEADER, [header])
    if lock is not None:
        fcntl.flock(lock, fcntl.LOCK_SH)
    begun = store.read(HEADER)
    if begun != header:
        remedy = "restore that, or remove the folder and pack anew"
        if not shards_in(store):
            remedy = "another process packs by it: give the same flags, or stop it first"
        raise DataError(
            f"{store} was begun with another plan: {difference(store, begun, rule, plan)}; {remedy}"
        )
    return hashlib.sha256(header).hexdigest()


def shards_in(store: Store) -> list[str]:
    """Names of the shards that are there."""
    return [name for name in store.names() if name.endswith(".tar")]


def difference(
    store: Store, begun: bytes, rule: dict[str, Any], plan: Sequence[PlannedShard]
) -> str:
    """What first differs between the plan that was begun and this one, in words."""
    was = json.loads(begun)["rule"]
    now = json.loads(json.dumps(rule))
    if was != now:
        changed = [name for name in now if was.get(name) != now[name]]
        return f"other settings ({', '.join(changed)})"
    old, new = (
        {line[1]: line[2:] for line in map(json.loads, lines)}
        for lines in (store.read(LINES).splitlines(), plan_lines(plan))
    )
    if gone := sorted(old.keys() - new.keys()):
        return f"{len(gone)} pictures are gone, {gone[0]} first"
    if added := sorted(new.keys() - old.keys()):
        return f"{len(added)} pictures are new, {added[0]} first"
    if changed := sorted(source for source in old if old[source] != new[source]):
        return f"{len(changed)} pictures or masks have changed, {changed[0]} first"
    return "other splits, shard sizes or seed"


def read_planned(path: str, planned: FileStat) -> bytes:
    """A file's bytes. Raises DataError if it has changed since the plan was made."""
    with open(path, "rb") as file:
        found = os.fstat(file.fileno())
        if (found.st_size, found.st_mtime_ns) != tuple(planned):
            raise DataError(f"{path} has changed while it was packed; start again")
        return file.read()


def sources_of(plan: Iterable[PlannedShard]) -> Iterator[str]:
    """`split:source` of every sample, in the order of the plan."""
    return (f"{shard.split}:{sample.source}" for shard in plan for sample in shard.samples)
