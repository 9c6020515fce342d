"""Results of `unet predict`: shards with their errors and reports, the manifest, and job.json.

Files are written in a fixed order, on disk and at URLs: errors and report of a shard, then the
shard, atomically; the manifest last.
"""

import json
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.inference.decoding import DecodedInput
from pipelines.inference.encode import EncodedPrediction
from pipelines.inference.input_readers import Inputs
from pipelines.inference.input_rules import JOB
from pipelines.inference.objects import COLUMNS, OBJECTS_CSV, format_rows
from pipelines.inference.options import (
    WORK_DIR,
    PredictConfig,
    ResultOptions,
    check_settings,
    name_fields,
)
from pipelines.model.load import LoadedModel
from pipelines.model.trained_fold import TrainedFold
from pipelines.runtime.errors import UsageError, refuse_changed_settings
from shards.documents import Count, Name, Sha256, convert, decode, parse_json, parse_names
from shards.images.files import ImageFormat
from shards.manifest import (
    MANIFEST,
    Manifest,
    ShardInfo,
    SizeCount,
    SplitInfo,
    find_contradictions,
    merge_size_counts,
    write_manifest,
)
from shards.sample import IGNORE, DataError
from shards.store import ByteRange, Store
from shards.writer import ShardWriter
from unet import DataSpec

STATE = "state.json"
ERRORS = "errors.jsonl"
REMEDY = "predict into another --out"


@dataclass(frozen=True, slots=True)
class ShardReport:
    """Contents of a finished shard of results."""

    shard: ShardInfo
    sizes: tuple[SizeCount, ...]
    errors: Count
    """Inputs that could not be read."""


@dataclass(frozen=True, slots=True)
class InputError:
    """A line of errors.jsonl."""

    input: str
    error: str


@dataclass(frozen=True, slots=True)
class JobState:
    """Contents of state.json."""

    finished: bool
    images: Count
    errors: Count


@dataclass(frozen=True, slots=True)
class InputSet:
    """The inputs of a job, in job.json."""

    count: Count
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class JobOrigin:
    """What a job started from: the fields of job.json besides its settings."""

    checkpoint: Name | tuple[Name, ...]
    """sha256 of the weights; of each member of an ensemble."""
    precision: Name
    inputs: InputSet
    reading: dict[str, Any]
    folds: tuple[TrainedFold | None, ...] = ()
    """Of each model, if one was trained on a fold."""
    temperature: float = 1.0
    """Of the probabilities, with --calibrated."""


class ShardExistsError(Exception):
    """Another rank has made the shard that this rank was making."""


def write_shard(
    results: ResultOptions, store: Store, number: int, spec: DataSpec, within: str = ""
) -> Generator[None, EncodedPrediction | DecodedInput | None, None]:
    """Write the results that are sent to shard `number`, in order, until None is sent.

    Errors and report are written before the shard. If the generator is closed early, no shard is
    written. `within`: subfolder in which it is written first, if another rank may be writing it.

    Raises ShardExistsError, and writes nothing, if another rank has made the shard meanwhile.
    """
    name, pixels = results.shard_name(number), np.zeros(len(spec.classes) + 1, dtype=np.int64)
    sizes: Counter[tuple[int, int]] = Counter()
    errors: list[str] = []
    rows: list[tuple[object, ...]] = []
    with store.staging(within) as folder:
        with detect_finished_elsewhere(store, name), ShardWriter(folder / name) as writer:
            while (result := (yield)) is not None:
                if isinstance(result, DecodedInput):
                    line = InputError(result.source, result.error or "")
                    errors.append(json.dumps(asdict(line)) + "\n")
                    continue
                writer.add(result.key, result.members, result.probabilities)
                pixels += result.pixels
                rows += [] if result.objects is None else [(result.key, *result.objects.row)]
                sizes[result.width, result.height] += 1
            if store.exists(name):
                # The job may be complete and its reports removed, after this rank was stopped.
                raise ShardExistsError(name)
            file = writer.seal()
            if errors:
                store.write(errors_name(name), "".join(errors).encode(), WORK_DIR)
            info = ShardInfo(**asdict(file), pixels=tuple(pixels.tolist()))
            counts = [SizeCount(w, h, spec.channels, n) for (w, h), n in sorted(sizes.items())]
            report = ShardReport(info, tuple(counts), len(errors))
            if results.objects:
                store.write(objects_name(name), format_rows(rows))
            store.write(report_name(name), to_json(asdict(report)))
        for part in (str(Path(name).with_suffix(".idx")), name):
            store.upload(folder / part, part)


@contextmanager
def detect_finished_elsewhere(store: Store, name: str) -> Iterator[None]:
    """Raise ShardExistsError if another rank made the shard and removed our temporary files."""
    try:
        yield
    except FileNotFoundError as error:
        if store.exists(name):
            raise ShardExistsError(name) from error
        raise


def errors_name(shard: str) -> str:
    """Return the path of the errors of a shard, relative to the output folder."""
    return f"{shard.removesuffix('.tar')}.{ERRORS}"


def objects_name(shard: str) -> str:
    """Return the path of the lines of objects.csv of a shard, relative to the output folder."""
    return f"{WORK_DIR}/{shard}.csv"


def report_name(shard: str) -> str:
    """Return the path of the report of a shard, relative to the output folder."""
    return f"{WORK_DIR}/{shard}.json"


def describe_errors(store: Store, files: Sequence[str]) -> str:
    """Describe in one line the inputs that could not be read, by the error files of shards."""
    lines = [line for data in read_files(store, files) for line in data.splitlines()]
    try:
        first = convert(parse_names(lines[0] if lines else b""), InputError)
    except ValueError as error:
        raise DataError(f"{store.path(files[0])} is damaged ({error}); {REMEDY}") from error
    named = first.error if first.input in first.error else f"{first.input} ({first.error})"
    return f"{len(lines)} inputs could not be read, the first: {named}"


def to_json(plain: Any) -> bytes:
    """Serialise as indented JSON; equal bytes for equal content."""
    return (json.dumps(plain, indent=1) + "\n").encode()


def finish_job(results: ResultOptions, store: Store, spec: DataSpec, num_shards: int) -> bool:
    """Write errors.jsonl, state.json and then the manifest if all shards exist.

    Every rank that finds all shards does this, with equal bytes. Returns whether all existed.

    Raises:
        DataError: a shard has no report, or a report cannot be read.
    """
    names = [results.shard_name(number) for number in range(num_shards)]
    present = {*store.names()}
    if not present.issuperset(names):
        return False
    try:
        files = [*map(report_name, names)]
        reports = [
            decode(data, ShardReport, store.path(file), f"remove {store.path(name)} and rerun")
            for name, file, data in zip(names, files, read_files(store, files), strict=True)
        ]
        if wrong := [f for n, f, r in zip(names, files, reports, strict=True) if r.shard.name != n]:
            raise DataError(f"{store.path(wrong[0])} is about another shard; {REMEDY}")
        parts = [part for part in map(errors_name, names) if part in present]
        errors = b"".join(read_files(store, parts))
        if errors:
            store.write(ERRORS, errors, WORK_DIR)
        if results.objects:
            lines = [format_rows([COLUMNS]), *read_files(store, [*map(objects_name, names)])]
            store.write(OBJECTS_CSV, b"".join(lines), WORK_DIR)
        samples = sum(report.shard.samples for report in reports)
        state = JobState(True, samples, sum(report.errors for report in reports))
        manifest = predicted_manifest(results.out_split, spec, reports)
        for problem in find_contradictions(manifest, {}):
            raise DataError(f"{store.path(WORK_DIR)} has a damaged report ({problem}); {REMEDY}")
        store.write(STATE, to_json(asdict(state)), WORK_DIR)
        write_manifest(store, manifest, within=WORK_DIR)
    except (FileNotFoundError, DataError) as error:
        if store.exists(MANIFEST):
            # Another rank was faster and has removed the reports, but not those written since.
            store.remove(WORK_DIR)
            return False
        if isinstance(error, FileNotFoundError):
            raise DataError(
                f"{store} has shards without reports (was {MANIFEST} removed?); predict into "
                "another --out"
            ) from error
        raise
    store.remove(WORK_DIR)
    return True


def read_files(store: Store, names: Sequence[str]) -> list[bytes]:
    """Read small files; remote ones concurrently."""
    if store.local is not None:
        return [store.read(name) for name in names]
    return store.read_ranges([ByteRange(name) for name in names]) if names else []


def predicted_manifest(split: str, spec: DataSpec, reports: Sequence[ShardReport]) -> Manifest:
    """Build the manifest of the results, which are a data set like any other."""
    num_classes = len(spec.classes)
    shards = tuple(report.shard for report in reports)
    sizes = merge_size_counts([size for report in reports for size in report.sizes])
    return Manifest(
        classes=spec.classes,
        palette=spec.palette,
        # Images are stored at their own size, not at that of the model's input.
        image_format=ImageFormat(
            spec.channels,
            spec.alpha,
            spec.image_range,
            spec.max_pixels,
            exif=spec.exif,
            frame=spec.frame,
        ),
        mask_format={
            "kind": "index",
            "num_classes": num_classes,
            "ignore_value": IGNORE,
            "source_values": [*range(num_classes)],
        },
        mean=spec.mean,
        std=spec.std,
        splits={split: SplitInfo(shards, sizes)},
    )


def read_job(store: Store) -> dict[str, Any] | None:
    """Read the settings and inputs of the job in a folder; None if it has no job.json.

    Raises DataError if job.json is damaged.
    """
    if not store.exists(JOB):
        return None
    try:
        job = parse_json(store.read(JOB))
        # A field that this version does not know is reported as a changed setting.
        known = {name: job[name] for name in JobOrigin.__slots__ if name in job}
        convert({"reading": {}, **known}, JobOrigin)
        check_settings(job)
    except ValueError as error:
        raise DataError(f"{store.path(JOB)} is damaged ({error}); {REMEDY}") from error
    return job


def parse_folds(job: Mapping[str, Any]) -> tuple[TrainedFold | None, ...]:
    """Return the folds of the models of a job that `read_job` has read; none if not recorded."""
    return convert(job.get("folds", []), tuple[TrainedFold | None, ...])


def read_state(store: Store) -> JobState:
    """Read the state.json of a finished job. Raises DataError if it is damaged."""
    return decode(store.read(STATE), JobState, store.path(STATE), REMEDY)


def start_job(
    config: PredictConfig,
    store: Store,
    started: Mapping[str, Any] | None,
    inputs: Inputs,
    loaded: LoadedModel,
    precision: str,
) -> None:
    """Write job.json, or compare it with `started`, the job.json that exists.

    Raises UsageError naming a setting that differs.
    """
    job = {
        "checkpoint": loaded.digest,
        "precision": precision,
        "inputs": {"count": len(inputs), "sha256": inputs.digest()},
        **config.settings(),
    }
    if loaded.reading_changes:
        # In the types that JSON restores.
        job["reading"] = json.loads(json.dumps(loaded.reading_changes))
    if loaded.temperature != 1:
        job["temperature"] = loaded.temperature
    folds = [None if fold is None else asdict(fold) for fold in loaded.folds]
    if any(folds):
        job["folds"] = folds
    if started is not None:
        before = started.get("temperature", 1.0)
        if started.get("calibrated") and loaded.temperature not in (1.0, before):
            raise UsageError(
                f"--calibrated: the temperature is {loaded.temperature:g}, that of {store} "
                f"{before:g}; {REMEDY}"
            )
        # Absent if the images are read as the training images were, and in jobs of earlier
        # versions. The weights decide the folds.
        absent = {"reading": {}, "calibrated": False, "objects": False, "temperature": before}
        refuse_changed_settings(
            str(store),
            {**absent, **name_fields(started), "folds": folds},
            {**absent, **name_fields(job), "folds": folds, "temperature": before},
            elsewhere=REMEDY,
        )
        return
    if any(name.endswith(".tar") for name in store.names()):
        raise UsageError(f"{store} holds other shards; predict into another --out")
    if store.local is not None:
        (store.local / WORK_DIR).mkdir(exist_ok=True)
    store.write(JOB, to_json(job), WORK_DIR)
