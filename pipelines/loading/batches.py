"""Batches of one rank, read from shards by worker processes; all pixels uint8."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from pipelines.loading.augment import AugmentConfig
from pipelines.loading.crop import Cropper
from pipelines.loading.dataset import DataSet
from pipelines.loading.stages import Batch, CropStage, SharedBatch, Substitutes, WholeStage
from pipelines.runtime.loader_workers import (
    start_forkserver,
    start_method,
    start_worker,
    start_workers,
    watch_workers,
)
from pipelines.runtime.shared_memory import WAITING, Buffers, usable_workers
from shards.images.memory import share_memory
from shards.manifest import rare_classes
from shards.order import EvalPlan, TrainPlan
from shards.reader import ShardReader, Stage, build_pipeline


def train_batches(
    data: DataSet,
    plan: TrainPlan,
    *,
    crop_size: int,
    augment: AugmentConfig,
    seed: int,
    margin: int = 0,
    border: bool = False,
    skip: bool = False,
    pin: bool = False,
) -> Iterator[Batch]:
    """Yield the training batches of one rank, endlessly.

    Args:
        data: the opened data set.
        plan: which samples, from which position of the stream.
        crop_size: side of the crops in pixels.
        augment: how crops are chosen and scaled.
        seed: seed of the crops.
        margin: pixels that the network loses on each side.
        border: whether batches contain border maps.
        skip: replace samples that cannot be decoded and list them in `Batch.skipped`.
        pin: copy batches to page-locked memory, in a thread.

    Raises:
        DataError: a sample cannot be read, or without `skip`, decoded.
    """
    manifest, reader = data.manifest, data.reader("train", borders=border)
    fill = tuple(round(m * 255) for m in manifest.mean)
    cropper = Cropper(augment, crop_size, fill, rare_classes(manifest), seed, margin)
    # A separate reader, since the first one may be in use by a thread.
    substitute_reader = data.reader("train", borders=border)
    substitutes = Substitutes(substitute_reader, plan.order) if skip else None
    form, num_classes = manifest.image_format, len(manifest.classes)
    stage = CropStage(form, num_classes, cropper, substitutes, border)
    num_bytes, forked = stage.num_bytes(plan.batch_size), start_method(reader) == "fork"
    # Forked workers write to memory of this process, the others send batches through /dev/shm.
    workers = usable_workers(data.workers, 0 if forked else data.workers * WAITING * num_bytes)
    if workers and forked:
        buffers = Buffers(workers, num_bytes)
        stage = replace(stage, buffers=buffers)
    # Started here, so that workers are children of this thread, not of the one that pins.
    loader = start_workers(make_loader(reader, plan, stage, workers))
    batches = receive_batches(loader, stage)
    return watch_workers(prefetch(batch.pin_memory() for batch in batches) if pin else batches)


def receive_batches(sent: Iterator[Batch | SharedBatch], stage: CropStage) -> Iterator[Batch]:
    """Yield the batches that workers sent, as tensors in shared memory if they are there."""
    for batch in sent:
        if isinstance(batch, Batch):
            yield batch
        else:
            assert stage.buffers is not None
            pixels = stage.buffers.lend(batch.place)
            yield stage.batch(pixels, batch.position, batch.skipped)


def prefetch(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Yield the batches, each made in a thread while the previous one is in use."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    with ThreadPoolExecutor(1, initializer=set_device, initargs=(device,)) as thread:
        pending = thread.submit(next, batches, None)
        while (batch := pending.result()) is not None:
            pending = thread.submit(next, batches, None)
            yield batch


def set_device(device: int) -> None:
    """Make the current thread use the GPU of its rank."""
    if torch.cuda.is_available():
        torch.cuda.set_device(device)


def eval_batches(
    data: DataSet,
    split: str,
    *,
    batch_size: int,
    rank: int,
    world: int,
    num_images: int | None = None,
    pin: bool = False,
) -> Iterator[Batch]:
    """Yield the whole images of one rank, unpadded; each sample is on exactly one rank.

    Args:
        data: the data set.
        split: name of the split.
        batch_size: images per batch, at most; a batch holds images of one size.
        rank: rank of this process.
        world: number of ranks.
        num_images: number of images of all ranks, evenly spread over the split; None: all.
        pin: whether to copy batches to pinned memory.

    Raises DataError naming an image or mask that cannot be decoded.
    """
    reader = data.reader(split)
    plan = EvalPlan(tuple(s.samples for s in reader.shards), batch_size, rank, world, num_images)
    stage = WholeStage(data.manifest.image_format, len(data.manifest.classes))
    workers = usable_workers(data.workers)
    return watch_workers(start_workers(make_loader(reader, plan, stage, workers, pin)))


def make_loader(
    reader: ShardReader, plan: TrainPlan | EvalPlan, stage: Stage, workers: int, pin: bool = False
) -> DataLoader[Any]:
    """Make a DataLoader whose workers read, decode and stack batches."""
    share_memory(workers)
    method = start_method(reader) if workers else None
    if method == "forkserver":
        start_forkserver()
    return DataLoader(
        build_pipeline(reader, plan, stage),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        multiprocessing_context=method,
        prefetch_factor=WAITING if workers else None,
        worker_init_fn=start_worker,
    )
