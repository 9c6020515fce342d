"""Images that are to be predicted, decoded in worker processes in the order of their numbers."""

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
from shards.images.files import ImageFormat, ImageRule, open_image, read_image
from shards.images.pixels import decode_image, probe_upright_jpeg
from shards.sample import DataError, is_safe_path


@dataclass(frozen=True, slots=True)
class Chunk:
    """Inputs first..last-1 of one output shard, decoded together."""

    shard: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """One input on its way to the model: an image, or why there is none."""

    key: str
    source: str
    image: Tensor | None
    """uint8 [C, H, W], channels last in memory; None where there is none, or it is needed no
    more."""
    error: str | None = None
    file: bytes = b""
    """The image as it is stored beside its mask; empty where it is not."""
    extension: str = ""
    """Of `file`, in lower case."""


@dataclass(frozen=True, slots=True)
class Cutting:
    """How the inputs are cut into output shards, and these into chunks."""

    num_inputs: int
    samples_per_shard: int
    batch_size: int

    @property
    def num_shards(self) -> int:
        """Output shards."""
        return -(-self.num_inputs // self.samples_per_shard)

    def size(self, shard: int) -> int:
        """Inputs of one output shard."""
        begin = shard * self.samples_per_shard
        return min(begin + self.samples_per_shard, self.num_inputs) - begin

    def chunks(self, shards: Sequence[int]) -> Iterator[Chunk]:
        """The chunks of some shards in turn; none crosses a border."""
        for shard in shards:
            begin = shard * self.samples_per_shard
            end = begin + self.size(shard)
            for first in range(begin, end, self.batch_size):
                yield Chunk(shard, first, min(first + self.batch_size, end))


@dataclass(frozen=True, slots=True)
class Decoder:
    """What turns an input into an image for the model. Picklable."""

    inputs: Inputs
    form: ImageFormat
    include_image: bool
    """The image's bytes go along, as a shard for training stores them."""
    longest_key: int
    """Bytes of a key for whose members a tar has room."""

    def __call__(self, number: int) -> Decoded:
        """One input; what cannot be read becomes an error record."""
        name = self.inputs.name(number)
        try:
            picture = self.inputs.read(number)
            if not is_safe_path(picture.source):
                raise DataError(
                    f"{name} names {picture.source!r} as its source, a path that leaves the folder"
                )
            if len(picture.key) > self.longest_key:
                raise DataError(
                    f"{name} has a key of {len(picture.key)} bytes; with --probabilities a tar has "
                    f"room for {self.longest_key}: shorten its name"
                )
            file, extension = b"", ""
            if self.include_image:
                file, extension = stored(picture, self.form, name)
            # Of what is stored, so that the mask is that of the image that training will see.
            image = decode_image(file or picture.data, self.form, name)
        except DataError as error:
            return Decoded("", name, None, str(error))
        except OSError as error:
            reason = describe_read_error(error, name)
            return Decoded("", name, None, reason)
        # Decoders may give bytes, which PyTorch takes for memory that it may write to.
        pixels = torch.from_numpy(image if image.flags.writeable else image.copy())
        # On a CPU it takes a sixth of the decoding to move the channels. The device does it beside
        # its conversion to float32.
        pixels = pixels.permute(2, 0, 1)
        return Decoded(picture.key, picture.source, pixels, None, file, extension)


def stored(picture: EncodedImage, form: ImageFormat, where: str) -> tuple[bytes, str]:
    """Bytes and extension of an image in a shard for training, as `unet pack` stores it.

    They are its own, unless an EXIF orientation turns it. Raises DataError where it is damaged, or
    of a kind that is not packed.
    """
    rule = ImageRule(
        alpha=form.alpha, allow_16_bit=form.range is not None, max_pixels=form.max_pixels
    )
    if probe_upright_jpeg(picture.data) is None:
        found = read_image(picture.data, rule, where, pixels=False)
        if found.extension is not None:
            return found.data, found.extension
    extension = PurePosixPath(picture.source).suffix.lower()
    kind = open_image(picture.data, where, rule).format or ""
    # A camera's MPO is a JPEG with previews.
    kind = "JPEG" if kind == "MPO" else kind
    # The source of an image that was packed upright names the file that it was before.
    if Image.registered_extensions().get(extension) != kind:
        extension = {"JPEG": ".jpg", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")
    return picture.data, extension[1:]


@dataclass(frozen=True, slots=True)
class Lent:
    """What a worker sends of a chunk whose images lie in shared memory."""

    place: int
    items: list[Decoded]
    """Without their pictures."""
    shapes: list[tuple[int, ...] | None]
    """[C, H, W] of the images, which follow each other; None where there is none."""


class DecodeSource(IterableDataset[list[Decoded] | Lent]):
    """Decodes the chunks of some shards in a DataLoader's workers, every n-th in each."""

    def __init__(
        self,
        decode: Decoder,
        cutting: Cutting,
        shards: Sequence[int],
        buffers: Buffers | None = None,
    ) -> None:
        """`buffers`: where workers put the images of a chunk, if it is not too large."""
        self.decode, self.cutting, self.shards = decode, cutting, shards
        self.buffers = buffers

    def __iter__(self) -> Iterator[list[Decoded] | Lent]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        if info is not None:
            keep_freed_memory()
        for chunk in islice(self.cutting.chunks(self.shards), worker, None, num_workers):
            items = [self.decode(number) for number in range(chunk.first, chunk.last)]
            yield items if self.buffers is None else lend(items, self.buffers, worker)


def lend(items: list[Decoded], buffers: Buffers, worker: int) -> list[Decoded] | Lent:
    """Put the images into shared memory that is used again; as they are where it has no room."""
    images = [item.image for item in items if item.image is not None]
    if not images or sum(image.numel() for image in images) > buffers.num_bytes:
        return items
    if (place := buffers.take(worker)) is None:
        return items
    pixels = torch.from_numpy(buffers.array(place))
    flat = [image.permute(1, 2, 0).flatten() for image in images]
    torch.cat(flat, out=pixels[: sum(map(torch.numel, images))])
    shapes = [None if item.image is None else tuple(item.image.shape) for item in items]
    return Lent(place, [replace(item, image=None) for item in items], shapes)


def receive(sent: Iterator[list[Decoded] | Lent], buffers: Buffers) -> Iterator[list[Decoded]]:
    """The chunks that workers sent, with the images that lie in shared memory."""
    for chunk in sent:
        yield chunk if isinstance(chunk, list) else restore(chunk, buffers)


def restore(chunk: Lent, buffers: Buffers) -> list[Decoded]:
    """A chunk with its images; when they are gone, their place is free again."""
    sizes = [0 if shape is None else math.prod(shape) for shape in chunk.shapes]
    parts = buffers.lend(chunk.place)[: sum(sizes)].split(sizes)
    return [
        item if shape is None else replace(item, image=channels_last(part, shape))
        for item, shape, part in zip(chunk.items, chunk.shapes, parts, strict=True)
    ]


def channels_last(pixels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Pixels in a row, the channels of each side by side, as an image of a shape [C, H, W]."""
    channels, height, width = shape
    return pixels.view(height, width, channels).permute(2, 0, 1)
