"""Raw samples -> batches of crops or of whole images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from pipelines.loading.crop import Cropper
from pipelines.runtime.shared_memory import Buffers, keep_freed_memory
from shards.images.files import ImageFormat
from shards.order import Order
from shards.raw import RawSample
from shards.reader import ShardReader
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
        """What a batch takes: images, then masks, then border maps."""
        return batch_size * self.cropper.size**2 * (len(self.form.channels) + 1 + self.border)

    def views(self, pixels: Any) -> Any:
        """In the bytes of a batch: images [B, size, size, C] and maps [1 or 2, B, size, size]."""
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
        """Image, mask and perhaps border map of a sample, or of the one that stands in for it.

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
    """Raw samples -> batches of whole images, those of one size that follow each other."""

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
        raise DataError(f"{raw.where} has no mask; pack the images with --masks")
    return mask


def require_border(raw: RawSample, size: tuple[int, int]) -> Uint8:
    """The border map. Raises DataError where there is none."""
    border = raw.decode_border(size)
    if border is None:
        raise DataError(f"{raw.where} has no border map; pack the images with --border-sigma")
    return border
