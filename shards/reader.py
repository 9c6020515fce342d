"""Samples by byte offset: the source stage of a webdataset pipeline."""

import json
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from itertools import chain, islice, repeat
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol, cast

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.pipeline import DataPipeline

from shards.border import decode_border
from shards.cache import Fetcher, ShardCache, mark_read
from shards.images import DecodedImage, ImageFormat, open_pixels
from shards.index import MemberRange, SampleRange, ShardIndex, ShardInfo, read_index
from shards.masks import decode_mask
from shards.order import Address
from shards.sample import BORDER_EXTENSION, DataError, Sample, Uint8
from shards.store import ByteRange, Store

MAX_OPEN = 128
"""Shards that one process keeps open: more than a stream has lanes."""

TOGETHER = 4
"""Batches of remote samples that are asked for at once."""

INDEX_BYTES = 128 * 2**20
"""Bytes of indexes that one process keeps: of a million remote samples, or of 32 million here."""

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
    border: bytes | None = None
    """The member `border.png`; None where no border maps were packed."""

    def decode(self, form: ImageFormat, num_classes: int) -> Sample:
        """Decode picture and mask. Raises DataError naming shard and key."""
        image, mask = self.decode_pixels(form, num_classes)
        return Sample(self.key, image.region(0, 0, *image.size), mask)

    def decode_pixels(
        self, form: ImageFormat, num_classes: int
    ) -> tuple[DecodedImage, Uint8 | None]:
        """The same, with the picture as its file had it: what is cut away need not be converted."""
        image = open_pixels(self.image, form, self.where)
        if self.mask is None:
            return image, None
        mask = decode_mask(self.mask, num_classes, self.where)
        (width, height), (rows, columns) = image.size, mask.shape
        if (rows, columns) != (height, width):
            raise DataError(
                f"{self.where}: the mask is {columns} x {rows}, the picture {width} x {height}; "
                "pack the data set again"
            )
        return image, mask

    def decode_border(self, size: tuple[int, int]) -> Uint8 | None:
        """The border map uint8 [H, W] of a picture of (width, height); None where there is none.

        Raises DataError where it is damaged or of another size.
        """
        if self.border is None:
            return None
        return decode_border(self.border, size, f"{self.where}.{BORDER_EXTENSION}")

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

    def upcoming(self, position: int) -> list[int]:
        """The shards that are of use at a position of the stream and soon after."""
        ...


class Span(NamedTuple):
    """Bytes `begin` to `end`, without the last, of a shard."""

    shard: int
    begin: int
    end: int


class ShardReader:
    """Reads samples of one split by shard and row, out of local files or by range requests.

    Picklable; files are opened when first read. With a cache, remote shards that are in it are
    read from there, and those that `expect` names are brought there in the background.
    """

    def __init__(
        self,
        place: Store | Path | str,
        shards: Sequence[ShardInfo],
        cache: ShardCache | None = None,
        *,
        borders: bool = True,
    ) -> None:
        """`borders`: border maps, where there are any, are read with their samples."""
        self.store, self.shards, self.cache = Store(place), tuple(shards), cache
        self.borders = borders
        self.forget()

    def forget(self) -> None:
        """Close everything."""
        self.files: OrderedDict[int, FileIO] = OrderedDict()
        self.indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self.fetcher: Fetcher | None = None
        self.expected: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        names = ("store", "shards", "cache", "borders")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    def where(self, shard: int) -> str:
        """Where a shard lies, for messages."""
        return self.store.path(self.shards[shard].name)

    def read(self, address: Address) -> RawSample:
        """One sample, as `read_all`."""
        return self.read_all([address])[0]

    def read_all(self, addresses: Sequence[Address]) -> list[RawSample]:
        """Some samples: one read each from local files, from remote ones all at once.

        Raises DataError if a shard is missing, cut or changed, or stays out of reach.
        """
        if self.fetcher is not None:
            self.fetcher.check()
        indexes = self.open_indexes({address.shard for address in addresses})
        entries = [indexes[address.shard][address.row] for address in addresses]
        if not self.borders:
            entries = [entry._replace(border=None) for entry in entries]
        for address, entry in zip(addresses, entries, strict=True):
            self.refuse_outside(address.shard, entry)
        spans = [
            [Span(address.shard, *piece) for piece in pieces_of(members_of(entry))]
            for address, entry in zip(addresses, entries, strict=True)
        ]
        read = self.read_spans(list(chain.from_iterable(spans)))
        raws = zip(addresses, entries, spans, strict=True)
        return [self.raw_sample(address, entry, own, read) for address, entry, own in raws]

    def refuse_outside(self, shard: int, entry: SampleRange) -> None:
        """Raise DataError where an index points behind the end of its shard."""
        for member in members_of(entry):
            if not 0 <= member.offset <= member.offset + member.size <= self.shards[shard].bytes:
                raise DataError(
                    f"{self.where(shard)}: {entry.key} ends too early; the shard is cut or its "
                    "index damaged, copy or pack it again"
                )

    def raw_sample(
        self, address: Address, entry: SampleRange, spans: list[Span], read: dict[Span, bytes]
    ) -> RawSample:
        """One sample out of what was read. Raises DataError if its shard ends too early."""
        where = f"{self.where(address.shard)}: {entry.key}"
        if any(len(read[span]) != span.end - span.begin for span in spans):
            raise DataError(f"{where} ends too early; the shard is cut, copy or pack it again")
        parts: dict[MemberRange, bytes] = {}
        for member in members_of(entry):
            end = member.offset + member.size
            span = next(s for s in spans if s.begin <= member.offset and end <= s.end)
            parts[member] = read[span][member.offset - span.begin : end - span.begin]
        return RawSample(
            key=entry.key,
            position=address.position,
            image=parts[entry.image],
            extension=entry.image.extension.rpartition(".")[2].lower(),
            is_mask=entry.image is entry.mask,
            mask=None if entry.mask is None else parts[entry.mask],
            info=None if entry.info is None else parts[entry.info],
            where=where,
            border=None if entry.border is None else parts[entry.border],
        )

    def read_spans(self, spans: Sequence[Span]) -> dict[Span, bytes]:
        """Bytes of shards, short where a shard ends before."""
        read, remote = {}, []
        for span in spans:
            file = self.open_file(span.shard)
            if file is None:
                remote.append(span)
            else:
                read[span] = os.pread(file.fileno(), span.end - span.begin, span.begin)
        if remote:
            ranges = [ByteRange(self.shards[s].name, begin, end) for s, begin, end in remote]
            read.update(zip(remote, self.store.read_ranges(ranges), strict=True))
        return read

    def open_file(self, shard: int) -> FileIO | None:
        """The file of a shard, None where it is remote and not in the cache."""
        if (file := self.files.get(shard)) is not None:
            self.files.move_to_end(shard)
            if self.store.local is not None:
                return file
            if os.fstat(file.fileno()).st_nlink:
                mark_read(file)
                return file
            # It had to make room; its bytes are freed when nobody holds it any more.
            self.files.pop(shard).close()
        if self.store.local is not None:
            file = open_shard(self.store.local / self.shards[shard].name, self.shards[shard])
        else:
            file = None if self.cache is None else self.cache.open(self.shards[shard])
        if file is not None:
            self.files[shard] = file
            if len(self.files) > MAX_OPEN:
                self.files.popitem(last=False)[1].close()
        return file

    def open_indexes(self, shards: Collection[int]) -> dict[int, ShardIndex]:
        """The indexes of some shards, those least recently used let go beyond a bound.

        Remote shards are also checked for their size. Raises DataError as `read_all`.
        """
        missing = [shard for shard in shards if shard not in self.indexes]
        found = {shard: self.indexes[shard] for shard in shards if shard in self.indexes}
        if missing and self.store.local is not None:
            local = self.store.local
            found |= {shard: read_index(local / self.shards[shard].name) for shard in missing}
        elif missing:
            found |= self.remote_indexes(missing)
        for shard in missing:
            listed, info = len(found[shard]), self.shards[shard]
            if listed != info.samples:
                raise DataError(
                    f"{found[shard].path} lists {listed} samples, the manifest says "
                    f"{info.samples}; copy or pack it again"
                )
        for shard in shards:
            self.indexes[shard] = found[shard]
            self.indexes.move_to_end(shard)
        held = sum(index.num_bytes for index in self.indexes.values()) if missing else 0
        while held > INDEX_BYTES and len(self.indexes) > 1:
            held -= self.indexes.popitem(last=False)[1].num_bytes
        return found

    def remote_indexes(self, shards: Sequence[int]) -> dict[int, ShardIndex]:
        """Indexes of remote shards, and a look at the end of each shard, in one request each."""
        infos = [self.shards[shard] for shard in shards]
        names = [str(PurePosixPath(info.name).with_suffix(".idx")) for info in infos]
        # A shard of the right size has one byte there; a longer one has two.
        ends = [ByteRange(info.name, info.bytes - 1, info.bytes + 1) for info in infos]
        try:
            read = self.store.read_ranges([*(ByteRange(name) for name in names), *ends])
        except DataError as error:
            # Some stores answer no request that begins behind the end of a file.
            if not isinstance(error.__cause__, FileNotFoundError):
                self.refuse_sizes(infos)
            raise
        if any(len(end) != 1 for end in read[len(names) :]):
            self.refuse_sizes(infos)
        indexes = zip(shards, names, read, strict=False)
        return {shard: ShardIndex(data, self.store.path(name)) for shard, name, data in indexes}

    def refuse_sizes(self, infos: Sequence[ShardInfo]) -> None:
        """Raise DataError naming a remote shard that has not the size that the manifest says."""
        for info in infos:
            refuse_size(self.store.path(info.name), self.store.size(info.name), info)

    def expect(self, shards: list[int]) -> None:
        """Bring these shards into the cache, where there is one, while others are read."""
        if self.cache is None or shards == self.expected:
            return
        self.expected = shards
        # A file that made room keeps its bytes on the disk as long as it is open.
        for shard in self.files.keys() - {*shards}:
            self.files.pop(shard).close()
        if self.fetcher is None:
            self.fetcher = Fetcher(self.cache, self.store)
            # Its thread would keep it alive.
            weakref.finalize(self, self.fetcher.close)
        self.fetcher.want([self.shards[shard] for shard in shards])


def open_shard(path: Path, info: ShardInfo) -> FileIO:
    """A local shard. Raises DataError where it is missing or has another size."""
    try:
        # Unbuffered; closes itself when nobody holds it any more.
        file = FileIO(path)
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        refuse_size(str(path), os.fstat(file.fileno()).st_size, info)
    except DataError:
        file.close()
        raise
    return file


def refuse_size(where: str, size: int, info: ShardInfo) -> None:
    """Raise DataError where a shard has not the size that the manifest says."""
    if size != info.bytes:
        raise DataError(
            f"{where} has {size:,} bytes, the manifest says {info.bytes:,}; copy or pack it again"
        )


def members_of(entry: SampleRange) -> list[MemberRange]:
    """The members that a sample has."""
    members = (entry.image, entry.mask, entry.info, entry.border)
    return [member for member in members if member is not None]


def pieces_of(members: Sequence[MemberRange]) -> list[tuple[int, int]]:
    """Begin and end of what is to be read: in one piece where members lie together, as ours do."""
    each = [(member.offset, member.offset + member.size) for member in members]
    begin, end = min(each)[0], max(end for _, end in each)
    if end - begin > 2 * sum(member.size for member in members) + MOST_BETWEEN:
        return each
    return [(begin, end)]


class SampleSource(IterableDataset[list[RawSample]]):
    """The source stage of a webdataset pipeline, whose later stages map iterators to iterators.

    Yields the raw samples of one planned batch at a time, those of this DataLoader worker. Remote
    ones are read by a thread, some batches at once, while earlier ones are decoded.
    """

    def __init__(self, reader: ShardReader, plan: Plan) -> None:
        self.reader, self.plan = reader, plan

    def __iter__(self) -> Iterator[list[RawSample]]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        batches = self.plan.batches(worker, num_workers)
        if self.reader.store.local is not None:
            return map(self.reader.read_all, batches)
        return self.read_ahead(batches)

    def read_ahead(self, batches: Iterator[list[Address]]) -> Iterator[list[RawSample]]:
        """The raw samples of remote batches; the first batch waits for no other."""
        thread = ThreadPoolExecutor(1)
        try:
            groups = ([*islice(batches, size)] for size in chain([1], repeat(TOGETHER)))
            waiting = [thread.submit(self.read_group, next(groups)) for _ in range(2)]
            while group := waiting.pop(0).result():
                yield from group
                waiting.append(thread.submit(self.read_group, next(groups)))
        finally:
            # What failed is told before what was to come is asked for.
            thread.shutdown(cancel_futures=True)

    def read_group(self, batches: list[list[Address]]) -> list[list[RawSample]]:
        """The raw samples of some batches, in one round of requests."""
        if not batches:
            return []
        self.reader.expect(self.plan.upcoming(batches[0][0].position))
        raws = iter(self.reader.read_all([*chain.from_iterable(batches)]))
        return [[*islice(raws, len(batch))] for batch in batches]


def read_samples(reader: ShardReader, plan: Plan, *stages: Stage) -> IterableDataset[Any]:
    """A webdataset pipeline over the planned samples: the source, then the stages in turn."""
    # webdataset's hand-kept type stubs do not say that a DataPipeline is an IterableDataset.
    return cast(IterableDataset[Any], DataPipeline(SampleSource(reader, plan), *stages))
