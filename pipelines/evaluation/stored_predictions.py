"""Stored predictions: the mask shards of `unet predict`, matched to a data set."""

import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.drawing.panels import Example
from pipelines.evaluation.per_image import split_keys
from pipelines.inference.job import parse_folds, read_job
from pipelines.loading.dataset import DataSet
from pipelines.loading.stages import Batch
from pipelines.model.trained_fold import TrainedFold
from shards.manifest import Manifest, read_manifest
from shards.masks.png import decode_mask
from shards.order import Address
from shards.reader import ShardReader, iter_keys
from shards.sample import IGNORE, AggregateDataError, DataError, Uint8, encode_key
from shards.store import Store

PREFETCH = 4
"""Batches whose predictions are prefetched."""


@dataclass(frozen=True, slots=True)
class StoredPredictions:
    """A predicted mask for every image of a split."""

    manifest: Manifest
    reader: ShardReader
    data: DataSet
    split: str
    places: NDArray[np.int64]
    """int64 [N, 2]: shard and row of the prediction of each image of the split."""
    num_others: int
    """Predictions of images that are not in the split."""
    job: dict[str, Any]
    """Contents of job.json; empty for predictions from other tools."""

    def attach(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Yield each batch with its predictions, uint8 [B, H, W], prefetched by a thread.

        Raises DataError if a prediction is damaged or differs from its image in size.
        """
        pending: deque[tuple[Batch, Future[Uint8]]] = deque()
        with ThreadPoolExecutor(1) as thread:
            for batch in batches:
                size = (batch.mask.shape[1], batch.mask.shape[2])
                read = thread.submit(self.read, batch.position.tolist(), size)
                pending.append((batch, read))
                if len(pending) > PREFETCH:
                    yield self.collect(*pending.popleft())
            while pending:
                yield self.collect(*pending.popleft())

    def collect(self, batch: Batch, read: Future[Uint8]) -> tuple[Batch, Tensor]:
        """Wait for the predictions of a batch and move them to its device."""
        return batch, torch.from_numpy(read.result()).to(batch.mask.device)

    def read(self, positions: Sequence[int], size: tuple[int, int]) -> Uint8:
        """Read the predictions uint8 [B, H, W] of images of one size (H, W)."""
        places = self.places[[*positions]].tolist()
        addresses = [
            Address(position, shard, row)
            for position, (shard, row) in zip(positions, places, strict=True)
        ]
        masks = []
        for raw in self.reader.read_all(addresses):
            where = f"{raw.where}.mask.png"
            if raw.mask is None:
                raise DataError(
                    f"{raw.where} has no mask; --predictions takes the output of unet predict"
                )
            mask = decode_mask(raw.mask, len(self.manifest.classes), where)
            if mask.shape != size:
                (height, width), (rows, columns) = size, mask.shape
                raise DataError(
                    f"{where} is {columns} x {rows}, its image {width} x {height}; predict it again"
                )
            if (mask == IGNORE).any():
                raise DataError(
                    f"{where} has pixels without a class ({IGNORE}), written by --min-confidence; "
                    "predict without it"
                )
            masks.append(mask)
        return np.stack(masks)

    def load_examples(self, positions: Sequence[int]) -> Iterator[Example]:
        """Load the images at some positions of the split, with mask and prediction."""
        samples = self.data.samples(self.split, positions)
        for position, (sample, mask) in zip(positions, samples, strict=True):
            (prediction,) = self.read([position], (mask.shape[0], mask.shape[1]))
            yield Example(sample.key, sample.image, mask, prediction)


def open_predictions(place: str, data: DataSet, split: str) -> StoredPredictions:
    """Match stored predictions to the images of a split, by key.

    Raises DataError if there are none, if their classes differ, or if images of the split have
    no prediction or two.
    """
    store = Store(place)
    manifest = read_manifest(store)
    if manifest.classes != data.manifest.classes:
        raise DataError(
            f"--predictions {place} has the classes {', '.join(manifest.classes) or 'none'}, "
            f"{data.store} has "
            f"{', '.join(data.manifest.classes) or 'none'}; they must be the same"
        )
    shards = [shard for info in manifest.splits.values() for shard in info.shards]
    reader = ShardReader(store, shards, borders=False)
    keys = {predicted_key(key): n for n, key in enumerate(split_keys(data, split))}
    num_images = data.manifest.split(split, data.store).samples
    if len(keys) < num_images:
        raise DataError(
            f"{data.store}: {num_images - len(keys)} images of {split} share a key with "
            "another, and predictions are matched by key; pack them under unique names"
        )
    places = np.full((num_images, 2), -1, dtype=np.int64)
    others: list[str] = []
    duplicates: list[str] = []
    num_others = 0
    for (_, shard, row), key in iter_keys(reader):
        position = keys.get(key)
        if position is None:
            num_others += 1
            others += [key] * (not others)
        elif places[position, 0] >= 0:
            duplicates.append(f"{place} has two predictions of {key}")
        else:
            places[position] = shard, row
    if duplicates:
        raise AggregateDataError(duplicates, "remove one of each")
    missing = [key for key, position in keys.items() if places[position, 0] < 0]
    if missing and len(missing) == num_images and others:
        raise DataError(
            f"--predictions {place} has no prediction of any image of {split}: it has "
            f"{others[0]} and "
            f"{num_others - 1} others, but not {missing[0]}; predict {data.store}, or the folder "
            "that was packed"
        )
    if missing:
        lines = [f"{place} has no prediction of {key}" for key in missing]
        raise AggregateDataError(
            lines, f"predict all of {split}; errors.jsonl lists inputs that could not be read"
        )
    return StoredPredictions(
        manifest, reader, data, split, places, num_others, read_job(store) or {}
    )


def read_folds(place: str) -> tuple[TrainedFold | None, ...]:
    """Read the folds that the models of stored predictions were trained on, from job.json.

    Raises DataError if it is damaged.
    """
    return parse_folds(read_job(Store(place)) or {})


def predicted_key(key: str) -> str:
    """Return the key of an image's prediction: encoded, if a foreign tool packed it unencoded."""
    return key if re.fullmatch(r"[A-Za-z0-9_%/-]+", key) else encode_key(f"{key}.png")
