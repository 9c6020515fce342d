"""Decode the images to predict in worker processes, in the order of their numbers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import PurePosixPath

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pipelines.inference.input_readers import EncodedImage, Inputs
from pipelines.runtime.errors import describe_read_error
from pipelines.runtime.shared_memory import Buffers, keep_freed_memory
from shards.images.files import ImageFormat, open_image, read_image
from shards.images.pixels import decode_file, probe_upright_jpeg
from shards.sample import DataError, is_safe_path


@dataclass(frozen=True, slots=True)
class Chunk:
    """Inputs first..last-1 of one output shard, decoded together."""

    shard: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class DecodedInput:
    """One decoded input: an image, or the error."""

    key: str
    source: str
    image: Tensor | None
    """uint8 [C, H, W], channels last in memory; None if there is none or it is no longer needed."""
    error: str | None = None
    file: bytes = b""
    """The image as it is stored beside its mask; empty if it is not stored."""
    extension: str = ""
    """Of `file`, in lower case."""
    full_size: tuple[int, int] | None = None
    """(width, height) of the file if the image was scaled down."""


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Which inputs are in which output shard, and in which of its chunks."""

    num_inputs: int
    samples_per_shard: int
    batch_size: int

    @property
    def num_shards(self) -> int:
        """Number of output shards."""
        return -(-self.num_inputs // self.samples_per_shard)

    def size(self, shard: int) -> int:
        """Return the number of inputs of an output shard."""
        start = shard * self.samples_per_shard
        return min(start + self.samples_per_shard, self.num_inputs) - start

    def chunks(self, shards: Sequence[int]) -> Iterator[Chunk]:
        """Yield the chunks of some shards in turn; none crosses the end of a shard."""
        for shard in shards:
            start = shard * self.samples_per_shard
            end = start + self.size(shard)
            for first in range(start, end, self.batch_size):
                yield Chunk(shard, first, min(first + self.batch_size, end))


@dataclass(frozen=True, slots=True)
class Decoder:
    """Decodes inputs to images for the model. Picklable."""

    inputs: Inputs
    image_format: ImageFormat
    include_image: bool
    """Whether to return the image's bytes too, as a shard for training stores them."""
    longest_key: int
    """Bytes of a key for whose members a tar has room."""

    def __call__(self, number: int) -> DecodedInput:
        """Decode one input; one that cannot be read becomes an error record."""
        name = self.inputs.name(number)
        try:
            encoded = self.inputs.read(number)
            if not is_safe_path(encoded.source):
                raise DataError(
                    f"{name} names {encoded.source!r} as its source, a path that leaves the folder"
                )
            if len(encoded.key) > self.longest_key:
                raise DataError(
                    f"{name} has a key of {len(encoded.key)} bytes; with --probabilities a tar has "
                    f"room for {self.longest_key}: shorten its name"
                )
            file, extension = b"", ""
            if self.include_image:
                file, extension = store_image(encoded, self.image_format, name)
            # Decode the stored bytes, so that the mask matches the image that training will see.
            image, size = decode_file(file or encoded.data, self.image_format, name)
        except DataError as error:
            return DecodedInput("", name, None, str(error))
        except OSError as error:
            reason = describe_read_error(error, name)
            return DecodedInput("", name, None, reason)
        # Decoders may return read-only bytes, which PyTorch would consider writable.
        pixels = torch.from_numpy(image if image.flags.writeable else image.copy())
        # On a CPU, moving the channels takes a sixth of the decoding time. The device does it
        # during its conversion to float32.
        pixels = pixels.permute(2, 0, 1)
        full_size = None if size == (pixels.shape[2], pixels.shape[1]) else size
        return DecodedInput(encoded.key, encoded.source, pixels, None, file, extension, full_size)


def store_image(encoded: EncodedImage, image_format: ImageFormat, where: str) -> tuple[bytes, str]:
    """Return bytes and extension of an image in a shard for training, as `unet pack` stores it.

    The bytes are the file's own, unless it has an EXIF orientation or several frames. It keeps its
    size. Raises DataError if it is damaged or not accepted by `image_format`.
    """
    rule = replace(image_format.file_rule(), resize=None)
    if probe_upright_jpeg(encoded.data) is None:
        found = read_image(encoded.data, rule, where, pixels=False)
        if found.extension is not None:
            return found.data, found.extension
    extension = PurePosixPath(encoded.source).suffix.lower()
    kind = open_image(encoded.data, where, rule).format or ""
    # The MPO of a camera is a JPEG with previews.
    kind = "JPEG" if kind == "MPO" else kind
    # The source of an image that was rotated on packing has the extension of the original file.
    if Image.registered_extensions().get(extension) != kind:
        extension = {"JPEG": ".jpg", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")
    return encoded.data, extension[1:]


@dataclass(frozen=True, slots=True)
class SharedChunk:
    """A chunk from a worker whose images are in shared memory."""

    place: int
    items: list[DecodedInput]
    """Without their images."""
    shapes: list[tuple[int, ...] | None]
    """[C, H, W] of the images, which are adjacent; None for an error."""


class DecodeSource(IterableDataset[list[DecodedInput] | SharedChunk]):
    """Decodes the chunks of some shards in a DataLoader's workers, every n-th in each."""

    def __init__(
        self,
        decode: Decoder,
        layout: ShardLayout,
        shards: Sequence[int],
        buffers: Buffers | None = None,
    ) -> None:
        """`buffers`: shared memory for the images of chunks that fit into it."""
        self.decode, self.layout, self.shards = decode, layout, shards
        self.buffers = buffers

    def __iter__(self) -> Iterator[list[DecodedInput] | SharedChunk]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        if info is not None:
            keep_freed_memory()
        for chunk in islice(self.layout.chunks(self.shards), worker, None, num_workers):
            items = [self.decode(number) for number in range(chunk.first, chunk.last)]
            yield items if self.buffers is None else share_images(items, self.buffers, worker)


def share_images(
    items: list[DecodedInput], buffers: Buffers, worker: int
) -> list[DecodedInput] | SharedChunk:
    """Copy the images into reused shared memory; returns the items if it has no room."""
    images = [item.image for item in items if item.image is not None]
    if not images or sum(image.numel() for image in images) > buffers.num_bytes:
        return items
    if (place := buffers.take(worker)) is None:
        return items
    pixels = torch.from_numpy(buffers.array(place))
    flat = [image.permute(1, 2, 0).flatten() for image in images]
    torch.cat(flat, out=pixels[: sum(map(torch.numel, images))])
    shapes = [None if item.image is None else tuple(item.image.shape) for item in items]
    return SharedChunk(place, [replace(item, image=None) for item in items], shapes)


def restore_chunks(
    sent: Iterator[list[DecodedInput] | SharedChunk], buffers: Buffers
) -> Iterator[list[DecodedInput]]:
    """Yield the chunks of the workers; images in shared memory become tensors."""
    for chunk in sent:
        yield chunk if isinstance(chunk, list) else restore_images(chunk, buffers)


def restore_images(chunk: SharedChunk, buffers: Buffers) -> list[DecodedInput]:
    """Return a chunk with its images as views of shared memory, reused once they are freed."""
    sizes = [0 if shape is None else math.prod(shape) for shape in chunk.shapes]
    parts = buffers.lend(chunk.place)[: sum(sizes)].split(sizes)
    return [
        item if shape is None else replace(item, image=channels_last(part, shape))
        for item, shape, part in zip(chunk.items, chunk.shapes, parts, strict=True)
    ]


def channels_last(pixels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View flat pixels, channels last in memory, as an image of a shape [C, H, W]."""
    channels, height, width = shape
    return pixels.view(height, width, channels).permute(2, 0, 1)
