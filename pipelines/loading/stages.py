"""Pipeline stages: raw samples -> batches of crops or of whole images."""

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

MAX_ATTEMPTS = 16
"""Samples tried for one place in a batch before training fails."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one forward pass."""

    image: Tensor
    """uint8 [B, C, H, W]."""
    mask: Tensor
    """uint8 [B, H, W]."""
    position: Tensor
    """int64 [B], on the CPU: position of each sample in its stream or split."""
    border: Tensor | None = None
    """Border maps uint8 [B, H, W], 255 where two cells touch; None if not requested."""
    skipped: tuple[str, ...] = ()
    """Errors of samples that could not be decoded and were replaced, a line each."""

    def to(self, device: torch.device) -> "Batch":
        """Copy the pixels to a device.

        From pinned memory to a GPU, the copy is queued on the current stream without blocking this
        process; it does not overlap with kernels, which would need a second stream.
        """
        # On other devices, memory may be reused before an asynchronous copy ends.
        overlap = device.type == "cuda"
        return self.map_pixels(lambda pixels: pixels.to(device, non_blocking=overlap))

    def pin_memory(self) -> "Batch":
        """Copy the pixels to page-locked memory; DataLoader calls this."""
        return self.map_pixels(Tensor.pin_memory)

    def map_pixels(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply a function to image, mask and border map."""
        border = None if self.border is None else change(self.border)
        return replace(self, image=change(self.image), mask=change(self.mask), border=border)


@dataclass(frozen=True, slots=True)
class SharedBatch:
    """A batch whose pixels a worker has written to shared memory."""

    place: int
    """Index of the buffer."""
    position: list[int]
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Substitutes:
    """Replacements of samples that cannot be decoded, chosen by position: the same on any rank."""

    reader: ShardReader
    order: Order

    def read(self, position: int, attempt: int) -> RawSample:
        """Read the substitute for a position; `attempt` starts at 1."""
        return self.reader.read(self.order.draw_substitute(position, attempt))


@dataclass(frozen=True, slots=True)
class CropStage:
    """Decodes, crops and stacks raw samples, each pixel written once."""

    form: ImageFormat
    num_classes: int
    cropper: Cropper
    substitutes: Substitutes | None = None
    """None: raise DataError for a sample that cannot be decoded."""
    border: bool = False
    """Whether batches contain border maps."""
    buffers: Buffers | None = None
    """Shared memory for the batches of worker processes; None: batches are pickled."""

    def __call__(self, source: Iterator[list[RawSample]]) -> Iterator[Batch | SharedBatch]:
        """Yield one batch per list of raw samples."""
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
                yield SharedBatch(place, position, skipped)

    def num_bytes(self, batch_size: int) -> int:
        """Return the bytes of a batch: images, then masks, then border maps."""
        return batch_size * self.cropper.size**2 * (len(self.form.channels) + 1 + self.border)

    def views(self, pixels: Any) -> Any:
        """View a batch's bytes as images [B, size, size, C] and maps [1 or 2, B, size, size]."""
        size, channels, maps = self.cropper.size, len(self.form.channels), 1 + self.border
        end = len(pixels) // (channels + maps) * channels
        # Channels last, as Pillow decodes.
        image = pixels[:end].reshape(-1, size, size, channels)
        return image, pixels[end:].reshape(maps, -1, size, size)

    def batch(self, pixels: Tensor, position: list[int], skipped: tuple[str, ...]) -> Batch:
        """View uint8 [num_bytes] as a batch."""
        image, maps = self.views(pixels)
        border = maps[1] if self.border else None
        # A view, not a copy.
        return Batch(image.permute(0, 3, 1, 2), maps[0], torch.tensor(position), border, skipped)

    def crop(self, raw: RawSample, skipped: list[str]) -> list[Uint8]:
        """Cut image, mask and, if requested, border map of a sample or its substitute.

        Appends the errors of replaced samples to `skipped`. Raises DataError if the sample cannot
        be decoded and there are no substitutes, or too many fail.
        """
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                image, stored_mask = raw.decode_unconverted(self.form, self.num_classes)
                mask = require_mask(stored_mask, raw)
                box = self.cropper.choose_box(mask, raw.position)
                parts = [self.cropper.cut_image(image, box), self.cropper.cut_mask(mask, box)]
                if self.border:
                    parts.append(self.cropper.cut_border(require_border(raw, image.size), box))
                return parts
            except DataError as error:
                if self.substitutes is None:
                    raise
                skipped.append(str(error))
                raw = self.substitutes.read(raw.position, attempt)
        raise DataError(f"{skipped[0]} (nor can {MAX_ATTEMPTS - 1} substitutes be decoded)")


@dataclass(frozen=True, slots=True)
class WholeStage:
    """Decodes and stacks whole images; consecutive images of equal size form a batch."""

    form: ImageFormat
    num_classes: int

    def __call__(self, source: Iterator[list[RawSample]]) -> Iterator[Batch]:
        """Yield one or more batches per list of raw samples."""
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
                    torch.tensor([raw.position for raw, _ in same]),
                )


def require_mask(mask: Uint8 | None, raw: RawSample) -> Uint8:
    """Return the mask. Raises DataError if the sample has none."""
    if mask is None:
        raise DataError(f"{raw.where} has no mask; pack the images with --masks")
    return mask


def require_border(raw: RawSample, size: tuple[int, int]) -> Uint8:
    """Decode the border map, uint8 [H, W]. Raises DataError if the sample has none."""
    border = raw.decode_border(size)
    if border is None:
        raise DataError(f"{raw.where} has no border map; pack the images with --border-sigma")
    return border
