"""Decode, predict, encode and write shards, all at once."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pipelines.inference.decoding import Chunk, Cutting, Decoded, Decoder, DecodeSource, receive
from pipelines.inference.encode import Found
from pipelines.runtime.loader_workers import start_forkserver, start_worker
from pipelines.runtime.shared_memory import Buffers
from unet import PredictedMasks

CHUNK_BYTES = 2**26
"""Bytes of the images of a batch that workers hand over in memory which is used again: 16 of
1024 x 1024 in RGB, and room to spare. What is not used takes no memory."""
OVERHEAD = 2**16
"""Bytes that a result counts for besides its pixels."""
Predict = Callable[[Sequence[Tensor]], PredictedMasks]
"""Images uint8 [C, H, W] of one size -> what is predicted for them."""
T = TypeVar("T")


def load(
    decode: Decoder, cutting: Cutting, shards: Sequence[int], workers: int, *, remote: bool
) -> Iterator[list[Decoded]]:
    """The decoded chunks of some shards, in order.

    Args:
        decode: what decodes an input.
        cutting: how the inputs are cut into shards and chunks.
        shards: those to be made.
        workers: decoding processes; 0: this one decodes.
        remote: inputs or results are at a URL; the threads and connections of remote clients do
            not survive a fork.
    """
    method = buffers = None
    if workers and remote:
        method = "forkserver"
        start_forkserver()
    elif workers and sys.platform == "linux":
        method, buffers = "fork", Buffers(workers, CHUNK_BYTES)
    loader = DataLoader(
        DecodeSource(decode, cutting, shards, buffers),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        multiprocessing_context=method,
        worker_init_fn=start_worker,
    )
    sent = iter(loader)
    return sent if buffers is None else receive(sent, buffers)


@dataclass(frozen=True, slots=True)
class Launched:
    """Inputs of one size that the device is at, or some that could not be read."""

    shard: int
    items: Sequence[Decoded]
    masks: PredictedMasks | None
    """On the CPU, or on their way there."""
    arrived: torch.cuda.Event | None

    def results(self) -> Iterator[tuple[Decoded, Found | None]]:
        """Each input with what was found in it, when it is there."""
        if self.masks is None:
            yield from ((item, None) for item in self.items)
            return
        if self.arrived is not None:
            self.arrived.synchronize()
        masks = self.masks
        confidence = masks.confidence.tolist()
        counts = None if masks.counts is None else masks.counts.tolist()
        for i, item in enumerate(self.items):
            unsure = None if masks.unsure is None else masks.unsure[i].numpy()
            kept = None if masks.probabilities is None else masks.probabilities[i].numpy()
            pixels = None if counts is None else counts[i]
            yield item, Found(masks.classes[i].numpy(), confidence[i], unsure, kept, pixels)


def launch(
    chunks: Iterable[Chunk], decoded: Iterable[list[Decoded]], predict: Predict
) -> Iterator[Launched]:
    """Predict chunk by chunk; the images of one size that follow each other go together."""
    for chunk, items in zip(chunks, decoded, strict=True):
        for shape, group in groupby(
            items, key=lambda d: None if d.image is None else d.image.shape
        ):
            same = list(group)
            if shape is None:
                yield Launched(chunk.shard, same, None, None)
                continue
            images = [item.image for item in same if item.image is not None]
            yield Launched(chunk.shard, same, *send_back(predict(images)))


def send_back(masks: PredictedMasks) -> tuple[PredictedMasks, torch.cuda.Event | None]:
    """Masks on the CPU; from a GPU they are there only when the event has happened."""
    on_gpu = masks.classes.is_cuda

    def send(pixels: Tensor) -> Tensor:
        # Into page-locked memory, beside what the GPU does next.
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
    arrived = torch.cuda.Event()
    arrived.record()
    return here, arrived


def one_behind(items: Iterator[T]) -> Iterator[T]:
    """The same, each when the next one has been made: the device need not wait for us."""
    held = [item for _, item in zip(range(1), items, strict=False)]
    for item in items:
        yield held.pop()
        held.append(item)
    yield from held


@contextmanager
def threads_for(
    forward: Callable[[Tensor], Tensor], device: torch.device
) -> Iterator[Callable[[Tensor], Tensor]]:
    """On a CPU, leave the threads of PyTorch to the network and all else to one of them.

    Choosing classes is bound by memory and hardly faster on several threads, each of which would
    wait for a core on which a decoder is at work, and the others for it.
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


def held_by(item: Decoded, found: Found | None) -> int:
    """Bytes that wait with a result."""
    pixels = 0 if item.image is None else item.image.numel()
    return len(item.file) + pixels + (0 if found is None else found.num_bytes)


def pass_on(encoded: Future[T], receive: Callable[[T], object]) -> None:
    """Give a result on when it is there."""
    receive(encoded.result())


@contextmanager
def threads(number: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that are not given what waits for them when something has failed."""
    pool = ThreadPoolExecutor(number)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class Waiting:
    """Work under way, in order and of bounded size; what fails in it is raised here."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self.work: deque[tuple[Future[Any], int]] = deque()

    def add(self, work: Future[Any], size: int = 0) -> None:
        """Take up some, and wait for the oldest where it is too much; one is never too much."""
        self.work.append((work, size + OVERHEAD))
        self.held += size + OVERHEAD
        while self.work and (
            self.work[0][0].done() or (self.held > self.most and len(self.work) > 1)
        ):
            self.end_oldest()

    def end_oldest(self) -> None:
        """Wait for it."""
        work, size = self.work.popleft()
        work.result()
        self.held -= size

    def finish(self) -> None:
        """Wait for all."""
        while self.work:
            self.end_oldest()
