"""Groups of images, such as patients, which were recorded when a data set was packed."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from pipelines.evaluation.intervals import Integers
from pipelines.loading.dataset import DataSet
from shards.documents import parse_json
from shards.offsets import refuse_other_header
from shards.reader import ByteSpan, ShardReader
from shards.sample import DataError

GROUP = "group"
"""Name of the groups of a data set, which `pack --group-by` records."""
AT_ONCE = 4096
"""Samples whose group is read in one round of requests."""


def number_groups(groups: Sequence[str | None]) -> Integers | None:
    """Number the groups of images from 0, int64 [N]; an image without one is a group of its own.

    Returns None if no image has a group.
    """
    number: dict[str | int, int] = {}
    for position, group in enumerate(groups):
        number.setdefault(position if group is None else group, len(number))
    if all(group is None for group in groups):
        return None
    keys = (position if group is None else group for position, group in enumerate(groups))
    return np.array([number[key] for key in keys], dtype=np.int64)


def read_groups(data: DataSet, split: str, positions: Sequence[int]) -> list[str | None]:
    """Read the groups of images of a split, from `KEY.json`.

    A shard is packed with a group for all samples or for none, which its first sample decides.
    Raises DataError if a shard cannot be read or a group is not a string.
    """
    reader = data.reader(split)
    starts = [*accumulate((shard.samples for shard in reader.shards), initial=0)]
    places = [
        (shard := bisect_right(starts, position) - 1, position - starts[shard])
        for position in positions
    ]
    grouped = {*find_grouped_shards(reader, sorted({shard for shard, _ in places}))}
    read: dict[tuple[int, int], str | None] = {}
    needed = [place for place in places if place[0] in grouped]
    for start in range(0, len(needed), AT_ONCE):
        some = needed[start : start + AT_ONCE]
        read.update(zip(some, read_group_members(reader, some), strict=True))
    return [read.get(place) for place in places]


def find_grouped_shards(reader: ShardReader, shards: Sequence[int]) -> list[int]:
    """Return the shards among `shards` whose first sample has a group."""
    places = [(shard, 0) for shard in shards if reader.shards[shard].samples]
    groups = [
        group
        for start in range(0, len(places), AT_ONCE)
        for group in read_group_members(reader, places[start : start + AT_ONCE])
    ]
    return [shard for (shard, _), group in zip(places, groups, strict=True) if group is not None]


def read_group_members(reader: ShardReader, places: Sequence[tuple[int, int]]) -> list[str | None]:
    """Read the `group` of samples at (shard, row), without their images."""
    offsets = reader.open_offsets({shard for shard, _ in places})
    entries = [offsets[shard][row] for shard, row in places]
    spans: list[ByteSpan | None] = []
    for (shard, _), entry in zip(places, entries, strict=True):
        reader.refuse_offsets_past_end(shard, entry)
        before, info = reader.num_header_bytes(shard), entry.info
        spans.append(
            None if info is None else ByteSpan(shard, info.offset - before, info.offset + info.size)
        )
    read = reader.read_spans([span for span in spans if span is not None])
    groups = []
    for span, entry in zip(spans, entries, strict=True):
        if span is None or entry.info is None:
            groups.append(None)
            continue
        where = f"{reader.shard_path(span.shard)}: {entry.key}"
        before = reader.num_header_bytes(span.shard)
        if before:
            refuse_other_header(read[span][:before], entry.info, where)
        groups.append(parse_group(read[span][before:], f"{where}.json"))
    return groups


def parse_group(info: bytes, where: str) -> str | None:
    """Return the `group` of a `KEY.json`; None if it has none. Raises DataError if damaged."""
    try:
        group = parse_json(info).get(GROUP)
    except ValueError as error:
        raise DataError(f"{where} is damaged ({error}); pack it again") from error
    if group is not None and not isinstance(group, str):
        raise DataError(f"{where}: group must be a string, got {group!r}; pack it again")
    return group
