"""Pictures that are to be predicted, decoded in worker processes in the order of their numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pipelines.readers import Inputs, Picture
from shards.images import (
    ImageFormat,
    ImageRule,
    decode_image,
    open_image,
    read_image,
    upright_jpeg,
)
from shards.sample import DataError, is_safe_path


@dataclass(frozen=True, slots=True)
class Chunk:
    """Inputs first..last-1 of one output shard, decoded together."""

    shard: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """One input on its way to the model: a picture, or why there is none."""

    key: str
    source: str
    image: Tensor | None
    """uint8 [C, H, W]; None where there is none, or it is needed no more."""
    error: str | None = None
    file: bytes = b""
    """The picture as it is stored beside its mask; empty where it is not."""
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
    """What turns an input into a picture for the model. Picklable."""

    inputs: Inputs
    form: ImageFormat
    include_image: bool
    """The picture's bytes go along, as a shard for training stores them."""
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
            # Of what is stored, so that the mask is that of the picture that training will see.
            image = decode_image(file or picture.data, self.form, name)
        except DataError as error:
            return Decoded("", name, None, str(error))
        except OSError as error:
            reason = f"{name} cannot be read: {error.strerror or error}"
            return Decoded("", name, None, reason)
        # Here, where several processes do it, rather than in the one that predicts.
        pixels = np.array(np.moveaxis(image, -1, 0), order="C")
        return Decoded(picture.key, picture.source, torch.from_numpy(pixels), None, file, extension)


def stored(picture: Picture, form: ImageFormat, where: str) -> tuple[bytes, str]:
    """Bytes and extension of a picture in a shard for training, as `unet pack` stores it.

    They are its own, unless an EXIF orientation turns it. Raises DataError where it is damaged, or
    of a kind that is not packed.
    """
    rule = ImageRule(alpha=form.alpha, deep=form.range is not None, max_pixels=form.max_pixels)
    if upright_jpeg(picture.data) is None:
        found = read_image(picture.data, rule, where, pixels=False)
        if found.extension is not None:
            return found.data, found.extension
    extension = PurePosixPath(picture.source).suffix.lower()
    kind = open_image(picture.data, where, rule).format or ""
    # A camera's MPO is a JPEG with previews.
    kind = "JPEG" if kind == "MPO" else kind
    # The source of a picture that was packed upright names the file that it was before.
    if Image.registered_extensions().get(extension) != kind:
        extension = {"JPEG": ".jpg", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")
    return picture.data, extension[1:]


class DecodeSource(IterableDataset[list[Decoded]]):
    """Decodes the chunks of some shards in a DataLoader's workers, every n-th in each."""

    def __init__(self, decode: Decoder, cutting: Cutting, shards: Sequence[int]) -> None:
        self.decode, self.cutting, self.shards = decode, cutting, shards

    def __iter__(self) -> Iterator[list[Decoded]]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        for chunk in islice(self.cutting.chunks(self.shards), worker, None, num_workers):
            yield [self.decode(number) for number in range(chunk.first, chunk.last)]
