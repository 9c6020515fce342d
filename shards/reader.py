"""Samples by byte offset: the source stage of a webdataset pipeline."""

import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from itertools import chain, islice, repeat
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol, cast

from torch.utils.data import IterableDataset, get_worker_info
from webdataset.pipeline import DataPipeline

from shards.cache import ShardCache, ShardPrefetcher, mark_read
from shards.manifest import ShardInfo, ShardPart
from shards.offsets import (
    MemberRange,
    SampleRange,
    ShardOffsets,
    check_offsets,
    read_offsets,
    refuse_other_header,
)
from shards.order import Address
from shards.raw import RawSample
from shards.sample import DataError
from shards.store import ByteRange, Store
from shards.tar_headers import BLOCK

MAX_OPEN_SHARDS = 128
"""Shards that one process keeps open: more than a stream has lanes."""
BATCHES_PER_REQUEST = 4
"""Batches of remote samples that are requested at once."""
SHARDS_PER_REQUEST = 64
"""Shards whose `.idx` are requested at once."""
MAX_OFFSETS_BYTES = 128 * 2**20
"""Memory for offsets per process: a million remote samples, or 32 million local ones."""
MAX_GAP_BYTES = 2**16
"""Bytes between the members of a sample that are read as well rather than skipped."""
Stage = Callable[[Iterator[Any]], Iterator[Any]]
"""A later stage of a pipeline."""


class Plan(Protocol):
    """Which samples a worker reads, batch by batch."""

    def batches(self, worker: int, num_workers: int) -> Iterator[list[Address]]:
        """Yield the addresses of the batches of worker `worker` of `num_workers`."""
        ...

    def upcoming_shards(self, position: int) -> list[int]:
        """List the shards that are read from a position of the stream on, as far as it is known."""
        ...


class ByteSpan(NamedTuple):
    """The bytes [start, end) of a shard."""

    shard: int
    start: int
    end: int


class ShardReader:
    """Reads samples of one split by shard and row, from local files or by range requests.

    Picklable; files are opened when they are first read. With a cache, remote shards are read from
    it if they are cached, and those passed to `prefetch` are fetched into it in the background.
    """

    def __init__(
        self,
        place: Store | Path | str,
        shards: Sequence[ShardInfo],
        cache: ShardCache | None = None,
        *,
        borders: bool = True,
    ) -> None:
        """`borders`: whether border maps, if there are any, are read with their samples."""
        self.store, self.shards, self.cache = Store(place), tuple(shards), cache
        self.borders = borders
        self.close()

    def close(self) -> None:
        """Close all files. The reader can be used again and reopens them."""
        self.files: OrderedDict[int, FileIO] = OrderedDict()
        self.offsets: OrderedDict[int, ShardOffsets] = OrderedDict()
        self.prefetcher: ShardPrefetcher | None = None
        self.prefetched: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        names = ("store", "shards", "cache", "borders")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.close()

    def shard_path(self, shard: int) -> str:
        """Return the path or URL of a shard, for error messages."""
        return self.store.path(self.shards[shard].name)

    def read(self, address: Address) -> RawSample:
        """Read one sample. Raises DataError as `read_all`."""
        return self.read_all([address])[0]

    def read_all(self, addresses: Sequence[Address]) -> list[RawSample]:
        """Read samples: one read each from local files, all remote ones in one round of requests.

        Raises DataError if a shard is missing, truncated, changed, or unreachable after retries.
        """
        if self.prefetcher is not None:
            self.prefetcher.raise_failure()
        offsets = self.open_offsets({address.shard for address in addresses})
        entries = [offsets[address.shard][address.row] for address in addresses]
        if not self.borders:
            entries = [entry._replace(border=None) for entry in entries]
        for address, entry in zip(addresses, entries, strict=True):
            self.refuse_offsets_past_end(address.shard, entry)
        spans = [
            [
                ByteSpan(address.shard, *piece)
                for piece in plan_reads(
                    list_sample_members(entry), self.num_header_bytes(address.shard)
                )
            ]
            for address, entry in zip(addresses, entries, strict=True)
        ]
        read = self.read_spans(list(chain.from_iterable(spans)))
        raws = zip(addresses, entries, spans, strict=True)
        return [self.build_sample(address, entry, own, read) for address, entry, own in raws]

    def num_header_bytes(self, shard: int) -> int:
        """Return the bytes before each member that are compared with the `.idx`.

        0 if the manifest has the sha256 of the `.idx`, which was compared when it was opened.
        """
        return BLOCK if self.shards[shard].idx_sha256 is None else 0

    def refuse_offsets_past_end(self, shard: int, entry: SampleRange) -> None:
        """Raise DataError if a member of a sample extends past the end of its shard."""
        for member in list_sample_members(entry):
            if not BLOCK <= member.offset <= self.shards[shard].bytes - member.size:
                raise DataError(
                    f"{self.shard_path(shard)}: {entry.key} extends past the end of the shard; the "
                    "shard is truncated or its .idx damaged, copy or pack it again"
                )

    def build_sample(
        self,
        address: Address,
        entry: SampleRange,
        spans: list[ByteSpan],
        read: dict[ByteSpan, bytes],
    ) -> RawSample:
        """Assemble one sample from the bytes read.

        Raises DataError if its shard is truncated, or if the tar has other members where the `.idx`
        lists them.
        """
        where = f"{self.shard_path(address.shard)}: {entry.key}"
        if any(len(read[span]) != span.end - span.start for span in spans):
            raise DataError(
                f"{where} extends past the end of the shard; the shard is truncated, copy or pack "
                "it again"
            )
        parts: dict[MemberRange, bytes] = {}
        before = self.num_header_bytes(address.shard)
        for member in list_sample_members(entry):
            end = member.offset + member.size
            span = next(s for s in spans if s.start <= member.offset - before and end <= s.end)
            begin = member.offset - span.start
            parts[member] = read[span][begin : end - span.start]
            if before:
                refuse_other_header(read[span][begin - before : begin], member, where)
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

    def read_spans(self, spans: Sequence[ByteSpan]) -> dict[ByteSpan, bytes]:
        """Read spans of shards; the result is shorter than the span if the shard ends before."""
        read, remote = {}, []
        for span in spans:
            file = self.open_file(span.shard)
            if file is None:
                remote.append(span)
            else:
                read[span] = os.pread(file.fileno(), span.end - span.start, span.start)
        if remote:
            ranges = [ByteRange(self.shards[s].name, start, end) for s, start, end in remote]
            read.update(zip(remote, self.store.read_ranges(ranges), strict=True))
        return read

    def open_file(self, shard: int) -> FileIO | None:
        """Return the open file of a shard; None if it is remote and not cached."""
        if (file := self.files.get(shard)) is not None:
            self.files.move_to_end(shard)
            if self.store.local is not None:
                return file
            if os.fstat(file.fileno()).st_nlink:
                mark_read(file)
                return file
            # It was evicted; its bytes are freed when the last handle is closed.
            self.files.pop(shard).close()
        if self.store.local is not None:
            file = open_shard(self.store.local / self.shards[shard].name, self.shards[shard])
        else:
            file = None if self.cache is None else self.cache.open(self.shards[shard])
        if file is not None:
            self.files[shard] = file
            if len(self.files) > MAX_OPEN_SHARDS:
                self.files.popitem(last=False)[1].close()
        return file

    def open_offsets(self, shards: Collection[int]) -> dict[int, ShardOffsets]:
        """Return the offsets of shards, keeping the most recently used ones in memory.

        The size of remote shards is checked as well. Raises DataError as `read_all`.
        """
        missing = [shard for shard in shards if shard not in self.offsets]
        opened = {shard: self.offsets[shard] for shard in shards if shard in self.offsets}
        if missing and self.store.local is not None:
            local = self.store.local
            infos = {shard: self.shards[shard] for shard in missing}
            opened |= {
                shard: read_offsets(local / info.name, info.idx_sha256)
                for shard, info in infos.items()
            }
        elif missing:
            opened |= self.read_remote_offsets(missing)
        for shard in missing:
            num_listed, info = len(opened[shard]), self.shards[shard]
            num_stored = info.stored if isinstance(info, ShardPart) else info.samples
            if num_listed != num_stored:
                raise DataError(
                    f"{opened[shard].path} lists {num_listed} samples, but the manifest lists "
                    f"{num_stored}; copy or pack it again"
                )
            if isinstance(info, ShardPart):
                opened[shard] = opened[shard].select(info.rows)
        for shard in shards:
            self.offsets[shard] = opened[shard]
            self.offsets.move_to_end(shard)
        used = sum(offsets.num_bytes for offsets in self.offsets.values()) if missing else 0
        while used > MAX_OFFSETS_BYTES and len(self.offsets) > 1:
            used -= self.offsets.popitem(last=False)[1].num_bytes
        return opened

    def read_remote_offsets(self, shards: Sequence[int]) -> dict[int, ShardOffsets]:
        """Read the offsets of remote shards and check their sizes, in one round of requests."""
        infos = [self.shards[shard] for shard in shards]
        names = [str(PurePosixPath(info.name).with_suffix(".idx")) for info in infos]
        # A shard of the right size has one byte in this range, a longer one has two.
        ends = [ByteRange(info.name, info.bytes - 1, info.bytes + 1) for info in infos]
        try:
            read = self.store.read_ranges([*(ByteRange(name) for name in names), *ends])
        except DataError as error:
            # Some stores refuse a request that starts past the end of a file.
            if not isinstance(error.__cause__, FileNotFoundError):
                self.refuse_changed_sizes(infos)
            raise
        if any(len(end) != 1 for end in read[len(names) :]):
            self.refuse_changed_sizes(infos)
        return {
            shard: check_offsets(
                ShardOffsets(data, self.store.path(name)), data, self.shards[shard].idx_sha256
            )
            for shard, name, data in zip(shards, names, read, strict=False)
        }

    def refuse_changed_sizes(self, infos: Sequence[ShardInfo]) -> None:
        """Raise DataError naming the first remote shard whose size differs from the manifest."""
        for info in infos:
            refuse_shard_size(self.store.path(info.name), self.store.size(info.name), info)

    def prefetch(self, shards: list[int]) -> None:
        """Fetch shards into the cache, if there is one, in the background."""
        if self.cache is None or shards == self.prefetched:
            return
        self.prefetched = shards
        # An evicted file keeps its space on disk as long as it is open.
        for shard in self.files.keys() - {*shards}:
            self.files.pop(shard).close()
        if self.prefetcher is None:
            self.prefetcher = ShardPrefetcher(self.cache, self.store)
            # Its thread holds a reference to it.
            weakref.finalize(self, self.prefetcher.close)
        self.prefetcher.schedule([self.shards[shard] for shard in shards])


def iter_keys(reader: ShardReader) -> Iterator[tuple[Address, str]]:
    """Yield the address (position: its number) and the key of every sample, from the `.idx`."""
    position = 0
    for first in range(0, len(reader.shards), SHARDS_PER_REQUEST):
        some = range(first, min(first + SHARDS_PER_REQUEST, len(reader.shards)))
        offsets = reader.open_offsets(some)
        for shard in some:
            for row in range(len(offsets[shard])):
                yield Address(position, shard, row), offsets[shard][row].key
                position += 1


def open_shard(path: Path, info: ShardInfo) -> FileIO:
    """Open a local shard. Raises DataError if it is missing or of another size."""
    try:
        # Unbuffered; closed when it is garbage-collected.
        file = FileIO(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be opened: {error.strerror}; copy or pack the data set again"
        ) from error
    try:
        refuse_shard_size(str(path), os.fstat(file.fileno()).st_size, info)
    except DataError:
        file.close()
        raise
    return file


def refuse_shard_size(where: str, size: int, info: ShardInfo) -> None:
    """Raise DataError if the size of a shard differs from the manifest."""
    if size != info.bytes:
        raise DataError(
            f"{where} has {size:,} bytes, but the manifest lists {info.bytes:,}; copy or pack it "
            "again"
        )


def list_sample_members(entry: SampleRange) -> list[MemberRange]:
    """List the members that a sample has."""
    members = (entry.image, entry.mask, entry.info, entry.border)
    return [member for member in members if member is not None]


def plan_reads(members: Sequence[MemberRange], before: int = 0) -> list[tuple[int, int]]:
    """Return the (start, end) of the reads of a sample: one if its members are close together.

    `before`: bytes that are read before each member.
    """
    separate = [(member.offset - before, member.offset + member.size) for member in members]
    start, end = min(separate)[0], max(end for _, end in separate)
    if end - start > 2 * sum(member.size for member in members) + MAX_GAP_BYTES:
        return separate
    return [(start, end)]


class SampleSource(IterableDataset[list[RawSample]]):
    """The source stage of a webdataset pipeline; later stages map iterators to iterators.

    Yields the raw samples of the planned batches of this DataLoader worker, one batch at a time.
    Remote batches are read by a thread, several at once, while earlier ones are decoded.
    """

    def __init__(self, reader: ShardReader, plan: Plan) -> None:
        self.reader, self.plan = reader, plan

    def __iter__(self) -> Iterator[list[RawSample]]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        batches = self.plan.batches(worker, num_workers)
        if self.reader.store.local is not None:
            return map(self.reader.read_all, batches)
        return self.prefetch_batches(batches)

    def prefetch_batches(self, batches: Iterator[list[Address]]) -> Iterator[list[RawSample]]:
        """Yield the raw samples of remote batches, reading ahead; the first batch is read alone."""
        thread = ThreadPoolExecutor(1)
        try:
            groups = ([*islice(batches, n)] for n in chain([1], repeat(BATCHES_PER_REQUEST)))
            pending = [thread.submit(self.read_batches, next(groups)) for _ in range(2)]
            while group := pending.pop(0).result():
                yield from group
                pending.append(thread.submit(self.read_batches, next(groups)))
        finally:
            # An error is raised without waiting for requests that have not started.
            thread.shutdown(cancel_futures=True)

    def read_batches(self, batches: list[list[Address]]) -> list[list[RawSample]]:
        """Read the raw samples of several batches in one round of requests."""
        if not batches:
            return []
        self.reader.prefetch(self.plan.upcoming_shards(batches[0][0].position))
        raws = iter(self.reader.read_all([*chain.from_iterable(batches)]))
        return [[*islice(raws, len(batch))] for batch in batches]


def build_pipeline(reader: ShardReader, plan: Plan, *stages: Stage) -> IterableDataset[Any]:
    """Build a webdataset pipeline that reads the planned samples and applies stages in turn."""
    # webdataset's type stubs do not declare that a DataPipeline is an IterableDataset.
    return cast(IterableDataset[Any], DataPipeline(SampleSource(reader, plan), *stages))
