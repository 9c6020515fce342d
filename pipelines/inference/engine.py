"""Decode, predict, encode and write shards concurrently."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pipelines.inference.decoding import (
    Chunk,
    DecodedInput,
    Decoder,
    DecodeSource,
    ShardLayout,
    restore_chunks,
)
from pipelines.inference.encode import ModelOutput
from pipelines.runtime.loader_workers import (
    start_forkserver,
    start_worker,
    start_workers,
    watch_workers,
)
from pipelines.runtime.shared_memory import Buffers
from shards.images.memory import share_memory
from unet import PredictedMasks

CHUNK_BYTES = 2**26
"""Shared memory for the images of a batch: 16 RGB images of 1024 x 1024, and a margin. Pages that
are never touched take no memory."""
OVERHEAD = 2**16
"""Bytes per pending result besides its pixels."""
Predict = Callable[[Sequence[Tensor]], PredictedMasks]
"""Images uint8 [C, H, W] of one size -> their predicted masks."""
T = TypeVar("T")


def decode_chunks(
    decode: Decoder, layout: ShardLayout, shards: Sequence[int], workers: int, *, remote: bool
) -> Iterator[list[DecodedInput]]:
    """Yield the decoded chunks of some shards, in order.

    Args:
        decode: decodes one input.
        layout: how the inputs are cut into shards and chunks.
        shards: numbers of the shards to make.
        workers: decoding processes; 0: decode in this process.
        remote: inputs or results are at a URL: threads and connections of remote clients do not
            survive a fork.
    """
    share_memory(workers)
    method = buffers = None
    if workers and remote:
        method = "forkserver"
        start_forkserver()
    elif workers and sys.platform == "linux":
        method, buffers = "fork", Buffers(workers, CHUNK_BYTES)
    loader = DataLoader(
        DecodeSource(decode, layout, shards, buffers),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        multiprocessing_context=method,
        worker_init_fn=start_worker,
    )
    sent = start_workers(loader)
    return watch_workers(sent if buffers is None else restore_chunks(sent, buffers))


@dataclass(frozen=True, slots=True)
class InFlightBatch:
    """Images of one size that the device is predicting, or inputs that could not be read."""

    shard: int
    items: Sequence[DecodedInput]
    masks: PredictedMasks | None
    """On the CPU, perhaps still being copied; None for inputs that could not be read."""
    copied: torch.cuda.Event | None
    """Recorded when the copy is complete; None if there is nothing to wait for."""

    def results(self) -> Iterator[tuple[DecodedInput, ModelOutput | None]]:
        """Wait for the copy, then yield each input with its prediction, None if unreadable."""
        if self.masks is None:
            yield from ((item, None) for item in self.items)
            return
        if self.copied is not None:
            self.copied.synchronize()
        masks = self.masks
        confidence = masks.confidence.tolist()
        counts = None if masks.counts is None else masks.counts.tolist()
        for i, item in enumerate(self.items):
            unsure = None if masks.unsure is None else masks.unsure[i].numpy()
            kept = None if masks.probabilities is None else masks.probabilities[i].numpy()
            pixels = None if counts is None else counts[i]
            yield item, ModelOutput(masks.classes[i].numpy(), confidence[i], unsure, kept, pixels)


def predict_chunks(
    chunks: Iterable[Chunk], decoded: Iterable[list[DecodedInput]], predict: Predict
) -> Iterator[InFlightBatch]:
    """Predict chunk by chunk; consecutive images of one size form a batch."""
    for chunk, items in zip(chunks, decoded, strict=True):
        for shape, group in groupby(
            items, key=lambda d: None if d.image is None else d.image.shape
        ):
            same = list(group)
            if shape is None:
                yield InFlightBatch(chunk.shard, same, None, None)
                continue
            images = [item.image for item in same if item.image is not None]
            yield InFlightBatch(chunk.shard, same, *send_back(predict(images)))


def send_back(masks: PredictedMasks) -> tuple[PredictedMasks, torch.cuda.Event | None]:
    """Copy masks to the CPU; from a GPU the copy is complete when the event has occurred."""
    on_gpu = masks.classes.is_cuda

    def send(pixels: Tensor) -> Tensor:
        # Into page-locked memory, overlapping with the next batch.
        return pixels.to("cpu", non_blocking=on_gpu)

    here = PredictedMasks(
        classes=send(masks.classes),
        confidence=send(masks.confidence),
        unsure=None if masks.unsure is None else send(masks.unsure),
        probabilities=None if masks.probabilities is None else send(masks.probabilities),
        counts=None if masks.counts is None else send(masks.counts),
    )
    if not on_gpu:
        return here, None
    copied = torch.cuda.Event()
    copied.record()
    return here, copied


def delay_by_one(items: Iterator[T]) -> Iterator[T]:
    """Delay items by one, so that the device computes one while the previous is processed."""
    held = [*islice(items, 1)]
    for item in items:
        yield held.pop()
        held.append(item)
    yield from held


@contextmanager
def limit_threads(
    forward: Callable[[Tensor], Tensor], device: torch.device
) -> Iterator[Callable[[Tensor], Tensor]]:
    """On a CPU, use PyTorch's threads for the network only, and one thread for everything else.

    Choosing classes is bound by memory and hardly faster on several threads, each of which would
    compete with a decoder for its core and delay the others.
    """
    number = torch.get_num_threads()
    if device.type != "cpu" or number == 1:
        yield forward
        return

    def with_all(image: Tensor) -> Tensor:
        torch.set_num_threads(number)
        try:
            return forward(image)
        finally:
            torch.set_num_threads(1)

    torch.set_num_threads(1)
    try:
        yield with_all
    finally:
        torch.set_num_threads(number)


def size_in_memory(item: DecodedInput, output: ModelOutput | None) -> int:
    """Size of a pending result in bytes."""
    pixels = 0 if item.image is None else item.image.numel()
    return len(item.file) + pixels + (0 if output is None else output.num_bytes)


def forward_result(encoded: Future[T], consume: Callable[[T], object]) -> None:
    """Forward a finished result."""
    consume(encoded.result())


@contextmanager
def thread_pool(number: int) -> Iterator[ThreadPoolExecutor]:
    """Thread pool that drops queued work on error."""
    pool = ThreadPoolExecutor(number)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class BoundedQueue:
    """Pending results in order, bounded in bytes; their errors are raised here."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.work: deque[tuple[Future[Any], int]] = deque()

    def add(self, work: Future[Any], size: int = 0) -> None:
        """Add work of `size` bytes; wait for the oldest while the limit is exceeded by several."""
        self.work.append((work, size + OVERHEAD))
        self.num_bytes += size + OVERHEAD
        while self.work and (
            self.work[0][0].done() or (self.num_bytes > self.max_bytes and len(self.work) > 1)
        ):
            self.end_oldest()

    def end_oldest(self) -> None:
        """Wait for the oldest work."""
        work, size = self.work.popleft()
        work.result()
        self.num_bytes -= size

    def finish(self) -> None:
        """Wait for all work."""
        while self.work:
            self.end_oldest()
