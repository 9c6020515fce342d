"""Batches: from shards through worker processes to the device, as three tensors of bytes."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from multiprocessing import get_context
from multiprocessing.forkserver import ensure_running
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from pipelines.augment import AugmentConfig, Cropper
from pipelines.buffers import WAITING, Buffers, keep_freed_memory
from pipelines.dataset import DataSet
from pipelines.parallel import follow_parent
from shards.images import ImageFormat
from shards.index import Manifest, SplitInfo
from shards.order import EvalPlan, Order, TrainPlan
from shards.reader import RawSample, ShardReader, Stage, build_pipeline
from shards.sample import DataError, Uint8

MOST_ATTEMPTS = 16
"""Samples that are tried for one place in a batch before a data set is called broken."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples that go through the model together."""

    image: Tensor
    """uint8 [B, C, H, W]."""
    mask: Tensor
    """uint8 [B, H, W]."""
    position: Tensor
    """int64 [B], on the CPU: the place of each sample in its stream or split."""
    border: Tensor | None = None
    """uint8 [B, H, W], 255 where two cells touch; where it was asked for."""
    skipped: tuple[str, ...] = ()
    """Samples that could not be decoded and were replaced, a line each."""

    def to(self, device: torch.device) -> "Batch":
        """The same on a device.

        Of pinned memory to a GPU the copy waits in line behind what the GPU has to do, and this
        process goes on meanwhile; it does not run beside kernels, which would take another stream.
        """
        # Elsewhere memory may be used again before an overlapped copy is done.
        overlap = device.type == "cuda"
        return self.each(lambda pixels: pixels.to(device, non_blocking=overlap))

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory, for DataLoader."""
        return self.each(Tensor.pin_memory)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same with other tensors of pixels."""
        border = None if self.border is None else change(self.border)
        return replace(self, image=change(self.image), mask=change(self.mask), border=border)


@dataclass(frozen=True, slots=True)
class Filled:
    """What a worker sends of a batch that lies in shared memory."""

    place: int
    position: list[int]
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Substitutes:
    """Other samples in place of those that cannot be decoded: by position, the same on any rank."""

    reader: ShardReader
    order: Order

    def read(self, position: int, attempt: int) -> RawSample:
        """The sample that is tried next; attempts count from 1."""
        return self.reader.read(self.order.draw_substitute(position, attempt))


@dataclass(frozen=True, slots=True)
class CropStage:
    """Raw samples -> one batch of crops, filled in place."""

    form: ImageFormat
    num_classes: int
    cropper: Cropper
    substitutes: Substitutes | None = None
    """None: a sample that cannot be decoded is an error."""
    border: bool = False
    """Whether the border maps are cut too."""
    buffers: Buffers | None = None
    """Where worker processes put their batches; None: into memory of their own."""

    def __call__(self, source: Iterator[list[RawSample]]) -> Iterator[Batch | Filled]:
        """One batch for each list of raw samples."""
        keep_freed_memory()
        worker = get_worker_info()
        for raws in source:
            place = self.buffers.take(worker.id) if self.buffers and worker else None
            if self.buffers is None or place is None:
                pixels = np.empty(self.num_bytes(len(raws)), dtype=np.uint8)
            else:
                pixels = self.buffers.array(place)
            lines: list[str] = []
            image, maps = self.views(pixels)
            for i, raw in enumerate(raws):
                image[i], *parts = self.crop(raw, lines)
                for plane, part in zip(maps, parts, strict=True):
                    plane[i] = part
            position, skipped = [raw.position for raw in raws], tuple(lines)
            if place is None:
                yield self.batch(torch.from_numpy(pixels), position, skipped)
            else:
                yield Filled(place, position, skipped)

    def num_bytes(self, batch_size: int) -> int:
        """What a batch takes: pictures, then masks, then border maps."""
        return batch_size * self.cropper.size**2 * (len(self.form.channels) + 1 + self.border)

    def views(self, pixels: Any) -> Any:
        """In the bytes of a batch: pictures [B, size, size, C] and maps [1 or 2, B, size, size]."""
        size, channels, maps = self.cropper.size, len(self.form.channels), 1 + self.border
        end = len(pixels) // (channels + maps) * channels
        # Pixels lie as Pillow decodes them, channels last.
        image = pixels[:end].reshape(-1, size, size, channels)
        return image, pixels[end:].reshape(maps, -1, size, size)

    def batch(self, pixels: Tensor, position: list[int], skipped: tuple[str, ...]) -> Batch:
        """The batch in some bytes."""
        image, maps = self.views(pixels)
        border = maps[1] if self.border else None
        # The permuted view costs no copy.
        return Batch(image.permute(0, 3, 1, 2), maps[0], torch.tensor(position), border, skipped)

    def crop(self, raw: RawSample, skipped: list[str]) -> list[Uint8]:
        """Picture, mask and perhaps border map of a sample, or of the one that stands in for it.

        `skipped` grows by the samples that are replaced.

        Raises DataError where it cannot be decoded and nothing may stand in.
        """
        for attempt in range(1, MOST_ATTEMPTS + 1):
            try:
                image, found = raw.decode_unconverted(self.form, self.num_classes)
                mask = require_mask(found, raw)
                box = self.cropper.place(mask, raw.position)
                parts = [self.cropper.cut_image(image, box), self.cropper.cut_mask(mask, box)]
                if self.border:
                    parts.append(self.cropper.cut_border(require_border(raw, image.size), box))
                return parts
            except DataError as error:
                if self.substitutes is None:
                    raise
                skipped.append(str(error))
                raw = self.substitutes.read(raw.position, attempt)
        raise DataError(
            f"{skipped[0]} (and so are the {MOST_ATTEMPTS - 1} that were tried instead)"
        )


@dataclass(frozen=True, slots=True)
class WholeStage:
    """Raw samples -> batches of whole pictures, those of one size that follow each other."""

    form: ImageFormat
    num_classes: int

    def __call__(self, source: Iterator[list[RawSample]]) -> Iterator[Batch]:
        """One or more batches for each list of raw samples."""
        keep_freed_memory()
        for raws in source:
            decoded = [(raw, raw.decode(self.form, self.num_classes)) for raw in raws]
            for _, group in groupby(decoded, key=lambda item: item[1].image.shape):
                same = list(group)
                image = torch.from_numpy(np.stack([sample.image for _, sample in same]))
                mask = np.stack([require_mask(sample.mask, raw) for raw, sample in same])
                yield Batch(
                    image.permute(0, 3, 1, 2),
                    torch.from_numpy(mask),
                    positions([raw for raw, _ in same]),
                )


def positions(raws: list[RawSample]) -> Tensor:
    """int64 [B]."""
    return torch.tensor([raw.position for raw in raws])


def require_mask(mask: Uint8 | None, raw: RawSample) -> Uint8:
    """The mask. Raises DataError where there is none."""
    if mask is None:
        raise DataError(f"{raw.where} has no mask; pack the pictures with --masks")
    return mask


def require_border(raw: RawSample, size: tuple[int, int]) -> Uint8:
    """The border map. Raises DataError where there is none."""
    border = raw.decode_border(size)
    if border is None:
        raise DataError(f"{raw.where} has no border map; pack the pictures with --border-sigma")
    return border


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


STOPPING = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to save and end; they may be sent to all its processes."""


def start_worker(number: int) -> None:
    """Leave it to the trainer to end worker `number`, and end with it if it is killed."""
    del number
    # In a group of its own, so that what is sent to the run's group does not reach it.
    os.setpgid(0, 0)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    follow_parent()


def start_forkserver() -> None:
    """Start the process that remote workers are forked from, deaf to the same signals."""
    get_context("forkserver").set_forkserver_preload(["pipelines.batches"])
    before = {name: signal.signal(name, signal.SIG_IGN) for name in STOPPING}
    try:
        ensure_running()
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def start_method(reader: ShardReader) -> str | None:
    """How workers are started; None: as the platform does."""
    if reader.store.local is None:
        # The threads and connections of remote clients do not survive a fork.
        return "forkserver"
    return "fork" if sys.platform == "linux" else None


def rare_classes(manifest: Manifest) -> tuple[int, ...]:
    """The classes that occur in training, less the commonest; all but the first if not counted."""
    counted = [shard.pixels for shard in manifest.splits["train"].shards if shard.pixels]
    if not counted:
        return tuple(range(1, len(manifest.classes)))
    pixels = np.sum(counted, axis=0)[: len(manifest.classes)]
    return tuple(int(c) for c in np.flatnonzero(pixels) if c != pixels.argmax())


def common_side(split: SplitInfo) -> int:
    """The longest side of a square that half of the pictures hold."""
    total = sum(size.images for size in split.sizes)
    held = 0
    for size in sorted(split.sizes, key=lambda s: -min(s.width, s.height)):
        held += size.images
        if 2 * held >= total:
            return min(size.width, size.height)
    raise AssertionError("a split with samples has sizes")
