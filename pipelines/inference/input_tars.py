"""Find the images in tars without a manifest, reading headers only."""

import io
from array import array
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from pipelines.inference.input_readers import Names, TarInputs
from pipelines.inference.input_rules import InputRule, describe_ignored
from shards.foreign import IMAGE_EXT_REMEDY, group_members
from shards.local_files import open_file
from shards.sample import AggregateDataError, DataError
from shards.store import RemoteFile, Store, is_url

MAX_CONNECTIONS = 8
"""Remote tars whose headers are read concurrently."""
READ_AHEAD = 2**18
"""Bytes per request for tar headers: small members are read through, large ones skipped."""


@dataclass(frozen=True, slots=True)
class TarContents:
    """The images of one tar."""

    names: Names
    places: NDArray[np.int64]
    """int64 [n, 4]: offset and size of each image, and of the json of its sample."""
    ignored: Counter[str]
    """Members of no sample, by kind."""
    problems: list[str]
    ambiguous: list[str]
    """Samples with several members that could be the image."""


def tar_inputs(tars: Sequence[str], rule: InputRule) -> TarInputs:
    """Make inputs of the images in tars.

    Raises DataError if there are none, or if a sample has several images.
    """
    remote = is_url(tars[0])
    with ThreadPoolExecutor(MAX_CONNECTIONS if remote else 1) as threads:
        found = [*threads.map(lambda tar: read_headers(tar, rule), tars)]
    if ambiguous := [problem for tar in found for problem in tar.ambiguous]:
        raise AggregateDataError(ambiguous, IMAGE_EXT_REMEDY)
    counts = [len(tar.names) for tar in found]
    numbers = np.repeat(np.arange(len(tars), dtype=np.int64), counts)
    inputs = TarInputs(
        tars=tuple(tars),
        members=Names(chain.from_iterable(tar.names for tar in found)),
        places=np.column_stack([numbers, np.concatenate([tar.places for tar in found])]),
        problems=tuple(
            (tar, problem)
            for tar, headers in zip(tars, found, strict=True)
            for problem in headers.problems
        ),
        notes=describe_ignored(sum((tar.ignored for tar in found), Counter[str]())),
    )
    if not len(inputs):
        which = f"{tars[0]}{' and the others' * (len(tars) > 1)}"
        raise DataError(f"{which}: contains no images; name their extension with --image-ext")
    return inputs


def read_headers(tar: str, rule: InputRule) -> TarContents:
    """List the images of a tar. Raises DataError or OSError if it is damaged or unreachable."""
    with open_tar(tar) as file:
        found = group_members(file, tar, rule.roles(), declared=bool(rule.image_ext))
    names: list[str] = []
    places = array("q")
    for group in found.samples.values():
        image, info = group.get("image"), group.get("json")
        if image is not None:
            names.append(image.name)
            places.extend((image.offset, image.size))
            places.extend((0, 0) if info is None else (info.offset, info.size))
    return TarContents(
        Names(names),
        np.array(places, np.int64).reshape(-1, 4),
        found.ignored,
        found.problems,
        found.ambiguous,
    )


def open_tar(tar: str) -> BinaryIO:
    """Open a tar, local or at a URL."""
    if not is_url(tar):
        return open_file(tar)
    folder, _, name = tar.rpartition("/")
    remote = io.BufferedReader(RemoteFile(Store(folder), name), READ_AHEAD)
    return cast(BinaryIO, remote)
