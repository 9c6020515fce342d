"""Batches: from shards through worker processes to the device, as three tensors of bytes."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from pipelines.augment import Purpose, crop, uniform
from shards.images import ImageFormat
from shards.index import Manifest, SplitInfo
from shards.order import EvalPlan, TrainPlan
from shards.reader import RawSample, ShardReader, Stage, read_samples
from shards.sample import DataError, Sample

MOST_WORKERS = 8
"""Decoding processes of a rank unless said otherwise; a GPU's training step needs no more."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples that go through the model together."""

    image: Tensor
    """uint8 [B, C, H, W]."""
    mask: Tensor
    """uint8 [B, H, W]."""
    position: Tensor
    """int64 [B], on the CPU: the place of each sample in its stream or split."""

    def to(self, device: torch.device) -> "Batch":
        """The same on a device; the copy overlaps with what the device is doing."""
        return Batch(
            self.image.to(device, non_blocking=True),
            self.mask.to(device, non_blocking=True),
            self.position,
        )

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory, for DataLoader."""
        return Batch(self.image.pin_memory(), self.mask.pin_memory(), self.position)


@dataclass(frozen=True, slots=True)
class CropStage:
    """Raw samples -> one batch of crops, filled in place."""

    form: ImageFormat
    num_classes: int
    size: int
    fill: tuple[int, ...]
    seed: int

    def __call__(self, source: Iterator[list[RawSample]]) -> Iterator[Batch]:
        """One batch for each list of raw samples."""
        fill = np.array(self.fill, dtype=np.uint8)
        for raws in source:
            # Pixels lie as Pillow decodes them (channels last); the permuted view costs no copy.
            image = torch.empty(len(raws), self.size, self.size, len(fill), dtype=torch.uint8)
            mask = torch.empty(len(raws), self.size, self.size, dtype=torch.uint8)
            for i, raw in enumerate(raws):
                sample = raw.decode(self.form, self.num_classes)
                draws = uniform(self.seed, raw.position, Purpose.CROP, 2)
                image_crop, mask_crop = crop(
                    sample.image, require_mask(sample, raw), self.size, fill, draws
                )
                image.numpy()[i], mask.numpy()[i] = image_crop, mask_crop
            yield Batch(image.permute(0, 3, 1, 2), mask, positions(raws))


@dataclass(frozen=True, slots=True)
class WholeStage:
    """Raw samples -> batches of whole pictures, those of one size that follow each other."""

    form: ImageFormat
    num_classes: int

    def __call__(self, source: Iterator[list[RawSample]]) -> Iterator[Batch]:
        """One or more batches for each list of raw samples."""
        for raws in source:
            decoded = [(raw, raw.decode(self.form, self.num_classes)) for raw in raws]
            for _, group in groupby(decoded, key=lambda item: item[1].image.shape):
                same = list(group)
                image = torch.from_numpy(np.stack([sample.image for _, sample in same]))
                mask = np.stack([require_mask(sample, raw) for raw, sample in same])
                yield Batch(
                    image.permute(0, 3, 1, 2),
                    torch.from_numpy(mask),
                    positions([raw for raw, _ in same]),
                )


def positions(raws: list[RawSample]) -> Tensor:
    """int64 [B]."""
    return torch.tensor([raw.position for raw in raws])


def require_mask(sample: Sample, raw: RawSample) -> np.ndarray:
    """The mask. Raises DataError where there is none."""
    if sample.mask is None:
        raise DataError(f"{raw.where} has no mask; pack the pictures with --masks")
    return sample.mask


def train_batches(
    folder: Path,
    manifest: Manifest,
    plan: TrainPlan,
    *,
    crop_size: int,
    seed: int,
    workers: int,
    pin: bool,
) -> Iterator[Batch]:
    """The endless training batches of one rank, beginning where the plan does."""
    fill = tuple(round(m * 255) for m in manifest.mean)
    stage = CropStage(manifest.image_format, len(manifest.classes), crop_size, fill, seed)
    reader = ShardReader(folder, manifest.split("train", folder).shards)
    return iter(load(reader, plan, stage, workers, pin))


def eval_batches(
    folder: Path,
    manifest: Manifest,
    split: SplitInfo,
    *,
    batch_size: int,
    rank: int,
    world: int,
    workers: int,
    pin: bool,
) -> Iterator[Batch]:
    """Every sample of a split on exactly one rank, unpadded, whole."""
    plan = EvalPlan(tuple(s.samples for s in split.shards), batch_size, rank, world)
    stage = WholeStage(manifest.image_format, len(manifest.classes))
    return iter(load(ShardReader(folder, split.shards), plan, stage, workers, pin))


def load(
    reader: ShardReader, plan: TrainPlan | EvalPlan, stage: Stage, workers: int, pin: bool
) -> DataLoader[Batch]:
    """A DataLoader whose workers read, decode and stack."""
    return DataLoader(
        read_samples(reader, plan, stage),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )


def default_workers(accelerator: Accelerator) -> int:
    """Decoding processes for one rank: its share of the CPUs, one where the CPU also computes."""
    if accelerator.device.type == "cpu":
        return 1
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // local_ranks))


def default_crop_size(split: SplitInfo, most: int) -> int:
    """The largest multiple of 32 that most pictures hold in both directions, at most `most`."""
    total = sum(size.images for size in split.sizes)
    held = 0
    for size in sorted(split.sizes, key=lambda s: -min(s.width, s.height)):
        held += size.images
        if 2 * held >= total:
            return max(32, min(most, min(size.width, size.height) // 32 * 32))
    raise AssertionError("a split with samples has sizes")
