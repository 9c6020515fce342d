"""Predictions that are there already: the mask shards of `unet predict`, beside a data set."""

import json
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

from pipelines.batches import Batch, require_mask
from pipelines.dataset import DataSet
from pipelines.gallery import Predicted
from pipelines.per_image import split_keys
from pipelines.results import JOB
from shards.index import Manifest, read_manifest
from shards.masks import decode_mask
from shards.order import Address, EvalPlan
from shards.pairs import ProblemsError
from shards.reader import ShardReader
from shards.sample import IGNORE, DataError, Uint8, encode_key
from shards.store import Store

AHEAD = 4
"""Batches whose predictions are read before they are asked for."""
INDEXES = 64
"""Indexes that are asked for together."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """A predicted mask for each picture of a split."""

    manifest: Manifest
    reader: ShardReader
    data: DataSet
    split: str
    places: NDArray[np.int64]
    """[N, 2]: shard and row of the prediction of each picture of the split."""
    others: int
    """Predictions of other pictures."""
    job: dict[str, Any]
    """What is known of how they were made; empty where others made them."""

    def beside(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Batches with their predictions, uint8 [B, H, W], read by a thread meanwhile.

        Raises DataError for one that is damaged or of another size than its picture.
        """
        waiting: deque[tuple[Batch, Future[Uint8]]] = deque()
        with ThreadPoolExecutor(1) as thread:
            for batch in batches:
                size = (batch.mask.shape[1], batch.mask.shape[2])
                read = thread.submit(self.read, batch.position.tolist(), size)
                waiting.append((batch, read))
                if len(waiting) > AHEAD:
                    yield self.arrived(*waiting.popleft())
            while waiting:
                yield self.arrived(*waiting.popleft())

    def arrived(self, batch: Batch, read: Future[Uint8]) -> tuple[Batch, Tensor]:
        """A batch with its predictions on the same device."""
        return batch, torch.from_numpy(read.result()).to(batch.mask.device)

    def read(self, positions: Sequence[int], size: tuple[int, int]) -> Uint8:
        """The masks [B, H, W] that were predicted for pictures of one size (H, W)."""
        places = self.places[[*positions]].tolist()
        addresses = [
            Address(position, shard, row)
            for position, (shard, row) in zip(positions, places, strict=True)
        ]
        masks = []
        for raw in self.reader.read_all(addresses):
            where = f"{raw.where}.mask.png"
            if raw.mask is None:
                raise DataError(f"{raw.where} has no mask; give predictions, not pictures")
            mask = decode_mask(raw.mask, len(self.manifest.classes), where)
            if mask.shape != size:
                (height, width), (rows, columns) = size, mask.shape
                raise DataError(
                    f"{where} is {columns} x {rows}, its picture {width} x {height}; "
                    "predict it again"
                )
            if (mask == IGNORE).any():
                raise DataError(
                    f"{where} has pixels without a class ({IGNORE}), as --min-confidence leaves "
                    "them; predict without it"
                )
            masks.append(mask)
        return np.stack(masks)

    def some(self, positions: Sequence[int]) -> Iterator[Predicted]:
        """The pictures at some places of the split, with truth and prediction."""
        reader, form = self.data.reader(self.split), self.data.manifest.image_format
        sizes = tuple(shard.samples for shard in reader.shards)
        for position in positions:
            # Of as many ranks as there are samples, the one that has this sample.
            ((address,),) = EvalPlan(sizes, 1, position, sum(sizes)).batches(0, 1)
            raw = reader.read(address)
            sample = raw.decode(form, len(self.manifest.classes))
            mask = require_mask(sample.mask, raw)
            (prediction,) = self.read([position], (mask.shape[0], mask.shape[1]))
            yield Predicted(sample.key, sample.image, mask, prediction)


def open_predictions(place: str, data: DataSet, split: str) -> Predictions:
    """The predictions for a split, found by the keys of its pictures.

    Raises DataError where there are none, where they know other classes, and naming pictures of
    the split that have none or two.
    """
    store = Store(place)
    manifest = read_manifest(store)
    if manifest.classes != data.manifest.classes:
        raise DataError(
            f"{place} knows the classes {', '.join(manifest.classes) or 'none'}, {data.store} has "
            f"{', '.join(data.manifest.classes) or 'none'}; they must be the same"
        )
    shards = [shard for info in manifest.splits.values() for shard in info.shards]
    reader = ShardReader(store, shards, borders=False)
    keys = {predicted_key(key): n for n, key in enumerate(split_keys(data, split))}
    num_images = data.manifest.split(split, data.store).samples
    if len(keys) < num_images:
        raise DataError(
            f"{data.store}: {num_images - len(keys)} pictures of {split} share their key with "
            "another, and predictions are found by it; pack them under names of their own"
        )
    places = np.full((num_images, 2), -1, dtype=np.int64)
    others: list[str] = []
    twice: list[str] = []
    num_others = 0
    for shard, row, key in all_keys(reader):
        position = keys.get(key)
        if position is None:
            num_others += 1
            others += [key] * (not others)
        elif places[position, 0] >= 0:
            twice.append(f"{place} has two predictions of {key}")
        else:
            places[position] = shard, row
    if twice:
        raise ProblemsError(twice, "remove one of each")
    missing = [key for key, position in keys.items() if places[position, 0] < 0]
    if missing and len(missing) == num_images and others:
        raise DataError(
            f"{place} has no prediction of any picture of {split}: it has {others[0]} and "
            f"{num_others - 1} others, not {missing[0]}; predict {data.store}, or the folder that "
            "was packed"
        )
    if missing:
        lines = [f"{place} has no prediction of {key}" for key in missing]
        raise ProblemsError(lines, f"predict all of {split}, see errors.jsonl there")
    return Predictions(manifest, reader, data, split, places, num_others, read_job(store))


def predicted_key(key: str) -> str:
    """The key of a picture's prediction: its own, unless others packed it under a bare name."""
    return key if re.fullmatch(r"[A-Za-z0-9_%/-]+", key) else encode_key(f"{key}.png")


def all_keys(reader: ShardReader) -> Iterator[tuple[int, int, str]]:
    """Shard, row and key of every sample."""
    for first in range(0, len(reader.shards), INDEXES):
        some = range(first, min(first + INDEXES, len(reader.shards)))
        indexes = reader.open_indexes(some)
        for shard in some:
            for row in range(len(indexes[shard])):
                yield shard, row, indexes[shard][row].key


def read_job(store: Store) -> dict[str, Any]:
    """What `unet predict` wrote down, nothing where others made the predictions."""
    try:
        job = json.loads(store.read(JOB))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"{store.path(JOB)} is damaged; predict again") from error
    return job if isinstance(job, dict) else {}
