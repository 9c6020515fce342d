"""Results of `unet predict`: shards with their errors and reports, the manifest, and job.json.

Files are written in a fixed order, on disk and at URLs: errors and report of a shard, then the
shard, atomically; the manifest last.
"""

import json
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.inference.decoding import DecodedInput
from pipelines.inference.encode import EncodedPrediction
from pipelines.inference.input_readers import Inputs
from pipelines.inference.input_rules import JOB
from pipelines.inference.options import WORK_DIR, PredictConfig, ResultOptions
from pipelines.model.load import LoadedModel
from pipelines.runtime.errors import UsageError, refuse_changed_settings
from shards.images.files import ImageFormat
from shards.manifest import (
    MANIFEST,
    Manifest,
    ShardInfo,
    SizeCount,
    SplitInfo,
    merge_size_counts,
    write_manifest,
)
from shards.sample import IGNORE, DataError
from shards.store import ByteRange, Store
from shards.writer import ShardWriter
from unet import DataSpec

STATE = "state.json"
ERRORS = "errors.jsonl"


def write_shard(
    store: Store, name: str, spec: DataSpec
) -> Generator[None, EncodedPrediction | DecodedInput | None, None]:
    """Write the results that are sent to one shard, in order, until None is sent.

    Errors and report are written before the shard. If the generator is closed early, no shard is
    written.
    """
    pixels = np.zeros(len(spec.classes) + 1, dtype=np.int64)
    sizes: Counter[tuple[int, int]] = Counter()
    errors: list[str] = []
    with store.staging() as folder:
        with ShardWriter(folder / name) as writer:
            while (result := (yield)) is not None:
                if isinstance(result, DecodedInput):
                    line = {"input": result.source, "error": result.error}
                    errors.append(json.dumps(line) + "\n")
                    continue
                writer.add(result.key, result.members, result.probabilities)
                pixels += result.pixels
                sizes[result.width, result.height] += 1
            file = writer.seal()
            if errors:
                store.write(errors_name(name), "".join(errors).encode(), WORK_DIR)
            info = ShardInfo(**asdict(file), pixels=tuple(pixels.tolist()))
            counts = [SizeCount(w, h, spec.channels, n) for (w, h), n in sorted(sizes.items())]
            report = {
                "shard": asdict(info),
                "sizes": [asdict(c) for c in counts],
                "errors": len(errors),
            }
            store.write(report_name(name), to_json(report))
        for part in (str(Path(name).with_suffix(".idx")), name):
            store.upload(folder / part, part)


def errors_name(shard: str) -> str:
    """Return the path of the errors of a shard, relative to the output folder."""
    return f"{shard.removesuffix('.tar')}.{ERRORS}"


def report_name(shard: str) -> str:
    """Return the path of the report of a shard, relative to the output folder."""
    return f"{WORK_DIR}/{shard}.json"


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
        reports = [json.loads(data) for data in read_files(store, [*map(report_name, names)])]
        parts = [part for part in map(errors_name, names) if part in present]
        errors = b"".join(read_files(store, parts))
        if errors:
            store.write(ERRORS, errors, WORK_DIR)
        samples = sum(report["shard"]["samples"] for report in reports)
        num_errors = sum(report["errors"] for report in reports)
        state = {"finished": True, "images": samples, "errors": num_errors}
        store.write(STATE, to_json(state), WORK_DIR)
        manifest = predicted_manifest(results.out_split, spec, reports)
        write_manifest(store, manifest, within=WORK_DIR)
    except (FileNotFoundError, DataError) as error:
        if store.exists(MANIFEST):
            return False  # another rank was faster and has removed the reports
        if isinstance(error, FileNotFoundError):
            raise DataError(
                f"{store} has shards without reports: was its {MANIFEST} removed? Predict into "
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


def predicted_manifest(split: str, spec: DataSpec, reports: Sequence[dict[str, Any]]) -> Manifest:
    """Build the manifest of the results, which are a data set like any other."""
    num_classes = len(spec.classes)
    shards = tuple(
        ShardInfo(**{**r["shard"], "pixels": tuple(r["shard"]["pixels"])}) for r in reports
    )
    sizes = merge_size_counts([SizeCount(**size) for report in reports for size in report["sizes"]])
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
        job = json.loads(store.read(JOB))
    except ValueError:
        job = None
    if not isinstance(job, dict):
        raise DataError(f"{store.path(JOB)} is damaged; predict into another --out")
    return job


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
    if started is not None:
        # Absent if the images are read as the training images were.
        refuse_changed_settings(
            str(store),
            {"reading": {}, **started},
            {"reading": {}, **job},
            elsewhere="predict into another --out",
        )
        return
    if any(name.endswith(".tar") for name in store.names()):
        raise UsageError(f"{store} holds other shards; predict into another --out")
    if store.local is not None:
        (store.local / WORK_DIR).mkdir(exist_ok=True)
    store.write(JOB, to_json(job), WORK_DIR)
