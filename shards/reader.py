"""Samples by byte offset: the source stage of a webdataset pipeline."""

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, cast

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.pipeline import DataPipeline

from shards.images import ImageFormat, decode_image
from shards.index import MemberRange, ShardIndex, ShardInfo
from shards.masks import decode_mask
from shards.order import Address
from shards.sample import DataError, Sample

MAX_OPEN = 64
"""Shards that one process keeps open."""

MOST_BETWEEN = 2**16
"""Bytes between members of a sample that are read along rather than skipped."""


@dataclass(frozen=True, slots=True)
class RawSample:
    """A sample as it lies in its shard."""

    key: str
    position: int
    """Where it stands in the stream or split that it was read for."""
    image: bytes
    extension: str
    """Of the picture, in lower case: `jpg`, `png`, ..."""
    is_mask: bool
    """There is no picture, as in predictions without them: the mask stands in for it."""
    mask: bytes | None
    info: bytes | None
    """The member `json`; None in shards that others wrote."""
    where: str
    """Shard and member, for messages."""

    def decode(self, form: ImageFormat, num_classes: int) -> Sample:
        """Decode picture and mask. Raises DataError naming shard and key."""
        image = decode_image(self.image, form, self.where)
        if self.mask is None:
            return Sample(self.key, image, None)
        mask = decode_mask(self.mask, num_classes, self.where)
        if mask.shape != image.shape[:2]:
            raise DataError(
                f"{self.where}: the mask is {mask.shape[1]} x {mask.shape[0]}, the picture "
                f"{image.shape[1]} x {image.shape[0]}; pack the data set again"
            )
        return Sample(self.key, image, mask)

    def describe(self) -> dict[str, Any]:
        """The content of `KEY.json`, or its place in a foreign shard as `source`.

        Raises DataError where the member is no JSON object.
        """
        if self.info is None:
            return {"source": f"{self.key}.{self.extension}"}
        try:
            info = json.loads(self.info)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.where}: its json is damaged; pack it again") from error
        if not isinstance(info, dict):
            raise DataError(f"{self.where}: its json is no object; pack it again")
        return info


Stage = Callable[[Iterator[Any]], Iterator[Any]]
"""A later stage of a pipeline."""


class Plan(Protocol):
    """Says which samples a worker reads, batch by batch."""

    def batches(self, worker: int, num_workers: int) -> Iterator[list[Address]]:
        """Addresses of the batches of worker `worker` of `num_workers`."""
        ...


class ShardReader:
    """Reads samples of one split by shard and row. Picklable; files are opened when first read."""

    def __init__(self, folder: Path, shards: Sequence[ShardInfo]) -> None:
        self.folder, self.shards = folder, tuple(shards)
        self.opened: OrderedDict[int, tuple[FileIO, ShardIndex]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": OrderedDict()}

    def read(self, address: Address) -> RawSample:
        """One sample, in one read. Raises DataError if the shard is missing, cut or changed."""
        file, index = self.open(address.shard)
        entry = index[address.row]
        where = f"{self.folder / self.shards[address.shard].name}: {entry.key}"
        members = [m for m in (entry.image, entry.mask, entry.info) if m is not None]
        parts = read_members(file.fileno(), members)
        if any(len(parts[member]) != member.size for member in members):
            raise DataError(f"{where} ends too early; the shard is cut, copy or pack it again")
        return RawSample(
            key=entry.key,
            position=address.position,
            image=parts[entry.image],
            extension=entry.image.extension.rpartition(".")[2].lower(),
            is_mask=entry.image is entry.mask,
            mask=None if entry.mask is None else parts[entry.mask],
            info=None if entry.info is None else parts[entry.info],
            where=where,
        )

    def open(self, shard: int) -> tuple[FileIO, ShardIndex]:
        """The file and the offsets of a shard, the least recently used one closed."""
        if shard in self.opened:
            self.opened.move_to_end(shard)
            return self.opened[shard]
        info = self.shards[shard]
        path = self.folder / info.name
        index = ShardIndex(path)
        if len(index) != info.samples:
            raise DataError(
                f"{index.path} lists {len(index)} samples, the manifest says {info.samples}; "
                "copy or pack it again"
            )
        try:
            # Unbuffered; closes itself when nobody holds it any more.
            file = FileIO(path)
        except OSError as error:
            raise DataError(f"{path} cannot be opened: {error.strerror}") from error
        size = os.fstat(file.fileno()).st_size
        if size != info.bytes:
            file.close()
            raise DataError(
                f"{path} has {size:,} bytes, the manifest says {info.bytes:,}; "
                "copy or pack it again"
            )
        self.opened[shard] = (file, index)
        if len(self.opened) > MAX_OPEN:
            _, (oldest, _) = self.opened.popitem(last=False)
            oldest.close()
        return self.opened[shard]


def read_members(handle: int, members: Sequence[MemberRange]) -> dict[MemberRange, bytes]:
    """The bytes of a sample's members: in one read where they lie together, as ours do."""
    begin = min(member.offset for member in members)
    end = max(member.offset + member.size for member in members)
    if end - begin > 2 * sum(member.size for member in members) + MOST_BETWEEN:
        return {member: os.pread(handle, member.size, member.offset) for member in members}
    data = os.pread(handle, end - begin, begin)
    return {m: data[m.offset - begin : m.offset - begin + m.size] for m in members}


class SampleSource(IterableDataset[list[RawSample]]):
    """The source stage of a webdataset pipeline, whose later stages map iterators to iterators.

    Yields the raw samples of one planned batch at a time, those of this DataLoader worker.
    """

    def __init__(self, reader: ShardReader, plan: Plan) -> None:
        self.reader, self.plan = reader, plan

    def __iter__(self) -> Iterator[list[RawSample]]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        for addresses in self.plan.batches(worker, num_workers):
            yield [self.reader.read(address) for address in addresses]


def read_samples(reader: ShardReader, plan: Plan, *stages: Stage) -> IterableDataset[Any]:
    """A webdataset pipeline over the planned samples: the source, then the stages in turn."""
    # webdataset's hand-kept type stubs do not say that a DataPipeline is an IterableDataset.
    return cast(IterableDataset[Any], DataPipeline(SampleSource(reader, plan), *stages))
