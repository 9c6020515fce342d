"""Batches: from shards through worker processes to the device, as three tensors of bytes."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from pipelines.loading.augment import AugmentConfig
from pipelines.loading.crop import Cropper
from pipelines.loading.dataset import DataSet
from pipelines.loading.stages import Batch, CropStage, Filled, Substitutes, WholeStage
from pipelines.runtime.loader_workers import start_forkserver, start_method, start_worker
from pipelines.runtime.shared_memory import WAITING, Buffers
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
    """The endless training batches of one rank, beginning where the plan does.

    `margin`: of the network. `border`: with border maps. `skip`: another sample stands in for one
    that cannot be decoded, which is told with the batch.
    """
    manifest, reader = data.manifest, data.reader("train", borders=border)
    fill = tuple(round(m * 255) for m in manifest.mean)
    cropper = Cropper(augment, crop_size, fill, rare_classes(manifest), seed, margin)
    # With a reader of its own: the other may be at work in a thread.
    others = data.reader("train", borders=border)
    substitutes = Substitutes(others, plan.order) if skip else None
    form, num_classes = manifest.image_format, len(manifest.classes)
    stage = CropStage(form, num_classes, cropper, substitutes, border)
    if data.workers and start_method(reader) == "fork":
        buffers = Buffers(data.workers, stage.num_bytes(plan.batch_size))
        stage = replace(stage, buffers=buffers)
    # Here, so that the workers are children of this thread and not of the one that pins.
    loader = iter(load(reader, plan, stage, data.workers))
    batches = receive(loader, stage)
    return ahead(batch.pin_memory() for batch in batches) if pin else batches


def receive(sent: Iterator[Batch | Filled], stage: CropStage) -> Iterator[Batch]:
    """The batches that workers sent, those in shared memory among them."""
    for batch in sent:
        if isinstance(batch, Batch):
            yield batch
        else:
            assert stage.buffers is not None
            pixels = stage.buffers.lend(batch.place)
            yield stage.batch(pixels, batch.position, batch.skipped)


def ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each made in a thread while the one before is in use."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    with ThreadPoolExecutor(1, initializer=set_device, initargs=(device,)) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch


def set_device(device: int) -> None:
    """Make a thread use the GPU of its rank."""
    if torch.cuda.is_available():
        torch.cuda.set_device(device)


def eval_batches(
    data: DataSet, split: str, *, batch_size: int, rank: int, world: int, pin: bool = False
) -> Iterator[Batch]:
    """Every sample of a split on exactly one rank, unpadded, whole."""
    reader = data.reader(split)
    plan = EvalPlan(tuple(s.samples for s in reader.shards), batch_size, rank, world)
    stage = WholeStage(data.manifest.image_format, len(data.manifest.classes))
    return iter(load(reader, plan, stage, data.workers, pin))


def load(
    reader: ShardReader, plan: TrainPlan | EvalPlan, stage: Stage, workers: int, pin: bool = False
) -> DataLoader[Any]:
    """A DataLoader whose workers read, decode and stack."""
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
