"""The work of one packing worker: read pairs, write one shard."""

import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pipelines.packing.plan import WORK_DIR, FileStat, PlannedSample, PlannedShard
from pipelines.runtime.errors import RunError, describe_read_error, suggest_write_remedy
from shards.annotations.scan import Spans, read_spans
from shards.documents import Name, Sha256, convert, parse_names
from shards.local_files import open_file
from shards.manifest import ShardInfo
from shards.masks.borders import has_scipy, needs_scipy
from shards.sample import BORDER_EXTENSION, INFO_EXTENSION, MASK_EXTENSION, DataError
from shards.statistics import SampleRule, SampleStatistics, StoredSample, read_sample
from shards.store import Store
from shards.writer import ShardFile, ShardWriter

REPORT_SUFFIX, EMPTY_SUFFIX = ".json", ".none.json"
"""File name suffixes of reports: of a shard, and of a shard without a valid sample."""


@dataclass(frozen=True, slots=True)
class PackRule:
    """What a worker needs besides its shard."""

    store: Store
    images: Path
    masks: Path | None
    sample: SampleRule
    decode_every: int
    """Every n-th sample of a shard is decoded completely; the others by `--verify`."""
    keep_going: bool
    plan: str
    """sha256 of the plan that the shard belongs to."""


@dataclass(frozen=True, slots=True)
class ShardReport:
    """Contents and problems of one written shard."""

    split: str
    plan: str
    """sha256 of the plan."""
    file: ShardFile | None
    """None if no sample was valid."""
    tally: SampleStatistics
    problems: list[str]
    """Why samples were skipped, with --keep-going."""

    def info(self, num_classes: int) -> ShardInfo:
        """Return the entry of the shard in the manifest; `num_classes` 0: without pixel counts."""
        assert self.file is not None
        pixels = self.tally.class_pixels(num_classes) if num_classes else ()
        return ShardInfo(**asdict(self.file), pixels=pixels)

    def to_json(self) -> bytes:
        """Serialise the report."""
        plain = {
            "split": self.split,
            "plan": self.plan,
            "file": None if self.file is None else asdict(self.file),
            "tally": self.tally.to_plain(),
            "problems": self.problems,
        }
        return json.dumps(plain).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Parse what `to_json` returned. Raises ValueError, naming the field, if it is damaged."""
        stored = convert(parse_names(data), StoredReport)
        tally = SampleStatistics.from_plain(stored.tally)
        return cls(stored.split, stored.plan, stored.file, tally, stored.problems)


@dataclass(frozen=True, slots=True)
class StoredReport:
    """`ShardReport` as JSON."""

    split: Name
    plan: Sha256
    file: ShardFile | None
    tally: dict[str, Any]
    problems: list[str]


class ShardRefusedError(Exception):
    """A shard has bad samples and must not be written."""


def pack_shard(
    planned: PlannedShard, rule: PackRule, advance: Callable[[int], object] | None = None
) -> list[str]:
    """Write one shard and its report.

    Args:
        planned: the shard.
        rule: how samples are read and stored.
        advance: called with 1 after each sample.

    Returns:
        The problems of bad samples, one line each. Without `rule.keep_going`, a shard with a bad
        sample is not written.

    Raises:
        RunError: the shard cannot be written.
        DataError: another process is writing the shard, or the store refuses it.
    """
    if rule.sample.border is not None and not has_scipy():
        raise RunError(
            f"a worker of the cluster cannot make border maps: {needs_scipy('--border-sigma')}"
        )
    problems: list[str] = []
    tally = SampleStatistics()
    try:
        with rule.store.staging() as folder:
            with ShardWriter(folder / planned.name) as writer:
                problems = add_samples(planned, rule, writer, tally, advance)
                if len(problems) == len(planned.samples) or (problems and not rule.keep_going):
                    raise ShardRefusedError
                # Before the rename at the end of this block: a shard that exists has its report.
                report = ShardReport(planned.split, rule.plan, writer.seal(), tally, problems)
                rule.store.write(f"{WORK_DIR}/{planned.name}{REPORT_SUFFIX}", report.to_json())
            for name in (Path(planned.name).with_suffix(".idx").name, planned.name):
                rule.store.upload(folder / name, name)
    except ShardRefusedError:
        if rule.keep_going:
            report = ShardReport(planned.split, rule.plan, None, tally, problems)
            rule.store.write(f"{WORK_DIR}/{planned.name}{EMPTY_SUFFIX}", report.to_json())
    except OSError as error:
        raise RunError(
            f"{rule.store.path(planned.name)} cannot be written: {error.strerror or error}; "
            f"{suggest_write_remedy(error)}"
        ) from error
    return problems


def add_samples(
    planned: PlannedShard,
    rule: PackRule,
    writer: ShardWriter,
    tally: SampleStatistics,
    advance: Callable[[int], object] | None,
) -> list[str]:
    """Read all samples of a shard and add them; returns the problems of bad ones."""
    problems: list[str] = []
    for row, sample in enumerate(planned.samples):
        try:
            read = read_planned_pair(sample, rule, pixels=row % rule.decode_every == 0)
            members = encode_members(sample, read, rule)
        except (DataError, OSError) as error:
            problems.append(describe_problem(error))
            tally.add_omitted()
        else:
            writer.add(sample.key, members)
            tally.add(read)
        if advance is not None:
            advance(1)
    return problems


def describe_problem(error: DataError | OSError) -> str:
    """Describe a problem with a file in one line."""
    return describe_read_error(error) if isinstance(error, OSError) else str(error)


def read_planned_pair(sample: PlannedSample, rule: PackRule, *, pixels: bool) -> StoredSample:
    """Read and check a planned pair; `pixels`: decode it regardless of `--verify`.

    Raises DataError if the pair cannot be trained on, OSError if a file cannot be read.
    """
    image_path = f"{rule.images}/{sample.source}"
    image = read_planned_file(image_path, sample.image)
    mask_path, mask = "", None
    if sample.mask is not None and sample.mask_stat is not None:
        mask_path = f"{rule.masks}/{sample.mask}"
        mask = read_planned_file(mask_path, sample.mask_stat, sample.spans)
        if sample.segments is not None:
            mask += read_planned_file(f"{rule.masks}/{sample.segments[0]}", sample.segments[1])
        if sample.spans:
            mask_path = f"{mask_path} ({sample.source})"
    return read_sample(
        image, mask, rule.sample, image_path, mask_path, pixels=pixels, unique=sample.unique
    )


def read_planned_file(path: str, planned: FileStat, spans: Spans = ()) -> bytes:
    """Read a file, or parts of it. Raises DataError if it has changed since the plan was made."""
    with open_file(path) as file:
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != tuple(planned):
            raise DataError(f"{path} has changed during packing; rerun the same command")
        return read_spans(file, spans) if spans else file.read()


def encode_members(sample: PlannedSample, read: StoredSample, rule: PackRule) -> dict[str, bytes]:
    """Encode a sample as {extension: bytes}. Raises DataError if its key is too long."""
    width, height = read.image.size
    info: dict[str, Any] = {
        "source": sample.source,
        "width": width,
        "height": height,
        "group": sample.group,
    }
    extension = read.image.extension or sample.source.rpartition(".")[2].lower()
    members = {extension: read.image.data, INFO_EXTENSION: json.dumps(info).encode()}
    if read.mask is not None:
        members[MASK_EXTENSION] = read.mask.encode(rule.sample.palette)
        if rule.sample.border is not None:
            refuse_long_key(sample, rule)
            assert read.mask.class_map is not None
            members[BORDER_EXTENSION] = rule.sample.border.encode(read.mask.class_map.index)
    return members


def refuse_long_key(sample: PlannedSample, rule: PackRule) -> None:
    """Raise DataError if the name of a border map would exceed the limit of tar headers."""
    max_length = tarfile.LENGTH_NAME - len(f".{BORDER_EXTENSION}")
    if len(sample.key) > max_length:
        raise DataError(
            f"{rule.images}/{sample.source} has a key of {len(sample.key)} bytes; the limit with "
            f"border maps is {max_length}: shorten its name"
        )


def read_shard_report(store: Store, planned: PlannedShard, plan: str) -> ShardReport:
    """Read the report on a finished shard.

    Raises DataError if it is missing or belongs to another plan than `plan`, a sha256.
    """
    exists = store.exists(planned.name)
    name = f"{WORK_DIR}/{planned.name}{REPORT_SUFFIX if exists else EMPTY_SUFFIX}"
    path = store.path(name)
    remedy = f"remove {store.path(planned.name) if exists else path} and rerun"
    try:
        data = store.read(name)
    except FileNotFoundError as error:
        raise DataError(
            f"{store.path(planned.name)} has no report in {WORK_DIR} (packed by another command?); "
            "remove the shard and rerun"
        ) from error
    damage = f"{path} is damaged"
    try:
        report = ShardReport.from_json(data)
    except ValueError as error:
        raise DataError(f"{damage} ({error}); {remedy}") from error
    about = (report.split, None if report.file is None else report.file.name)
    if about != (planned.split, planned.name if exists else None):
        raise DataError(f"{damage} (it is about another shard); {remedy}")
    if len(report.tally.digests) != len(planned.samples):
        raise DataError(f"{damage} (it is about other samples); {remedy}")
    if report.plan != plan:
        raise DataError(
            f"{store.path(planned.name)} belongs to another plan that started at the same time; "
            "remove it and rerun its part"
        )
    return report
