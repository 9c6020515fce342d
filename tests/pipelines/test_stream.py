"""`loading.dataset`, `loading.batches`: the pixels that training sees, for any ranks and workers.

Every sample has its own colour, which identifies it in a batch.
"""

import io
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import shards.order
from pipelines.loading.augment import AugmentConfig
from pipelines.loading.batches import eval_batches, train_batches
from pipelines.loading.dataset import DataSet
from pipelines.loading.stages import Batch
from shards.images.files import ImageFormat
from shards.manifest import Manifest, ShardInfo, SizeCount, SplitInfo
from shards.masks.palettes import default_palette
from shards.masks.png import encode_mask
from shards.order import Order, TrainPlan
from shards.sample import DataError
from shards.store import Store
from shards.writer import ShardWriter

CLASSES = ("background", "a", "b")
GLOBAL = 24
WORLDS = (1, 2, 3, 4, 8)
WORKERS = (0, 1, 2, 5)
SIZES = {
    "one shard": (10,),
    "uneven shards": (5, 1, 12, 0, 7, 3),
    "fewer than ranks, workers and a batch": (1, 0, 1),
    "a single sample": (1,),
}
Make = Callable[..., DataSet]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make((5, 3)) -> a data set with such shards; `bad`: numbers of samples that do not decode."""

    def packed(sizes: tuple[int, ...], bad: tuple[int, ...] = (), split: str = "train") -> DataSet:
        folder = tmp_path_factory.mktemp("stream")
        palette, infos, number = default_palette(CLASSES), [], 0
        for shard, samples in enumerate(sizes):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "fsync", lambda handle: None)
                with ShardWriter(folder / f"{split}-{shard:06}.tar") as writer:
                    for _ in range(samples):
                        out = io.BytesIO()
                        colour = (number % 256, number // 256, 9)
                        Image.new("RGB", (12, 10), colour).save(out, "PNG")
                        image = out.getvalue() if number not in bad else b"\0" * 99
                        mask = np.full((10, 12), number % 3, np.uint8)
                        mask[:, ::5] = 255
                        members = {"png": image, "mask.png": encode_mask(mask, palette)}
                        writer.add(f"k{number}", {**members, "json": b"{}"})
                        number += 1
                    file = writer.seal()
            infos.append(ShardInfo(file.name, file.samples, file.bytes, file.sha256, ()))
        info = SplitInfo(tuple(infos), (SizeCount(12, 10, "RGB", number),))
        form = ImageFormat("RGB")
        manifest = Manifest(CLASSES, palette, form, {}, (0.5,) * 3, (0.2,) * 3, {split: info})
        return DataSet(Store(folder), manifest, None, 0)

    return packed


def order_of(data: DataSet, seed: int = 0) -> Order:
    return Order(tuple(shard.samples for shard in data.manifest.splits["train"].shards), seed)


def draw(
    data: DataSet, world: int = 1, workers: int = 0, steps: int = 3, *, start=0, skip=False, seed=0
) -> list[list[Batch]]:
    """The first batches of every rank, one rank after the other."""
    order, data = order_of(data, seed), replace(data, workers=workers)
    options = {"crop_size": 8, "augment": AugmentConfig(), "seed": 0, "skip": skip}
    plans = (TrainPlan(order, GLOBAL // world, rank, world, start) for rank in range(world))
    try:
        return [list(islice(train_batches(data, plan, **options), steps)) for plan in plans]
    except DataError as error:
        # A loader that a traceback holds on to ends its workers late and slowly.
        raise error.with_traceback(None) from None


def numbers(batch: Batch) -> list[int]:
    """Identify samples by their colour."""
    return [int(image[0, 0, 0]) + 256 * int(image[1, 0, 0]) for image in batch.image]


def by_step(ranks: list[list[Batch]]) -> list[dict[int, tuple[int, bytes, bytes]]]:
    """{position: (sample, image, mask)} of each global batch."""
    steps = []
    for parts in zip(*ranks, strict=True):
        found: dict[int, tuple[int, bytes, bytes]] = {}
        for b in parts:
            pixels = zip(b.image.numpy(), b.mask.numpy(), strict=True)
            samples = zip(b.position.tolist(), numbers(b), pixels, strict=True)
            for position, number, (image, mask) in samples:
                assert position not in found
                found[position] = (number, image.tobytes(), mask.tobytes())
        steps.append(dict(sorted(found.items())))
    return steps


# ---- the order, for all ranks and workers


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("world", WORLDS)
def test_any_ranks_and_workers_draw_the_same_global_batches(
    world: int, sizes: tuple[int, ...], windowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if windowed:
        monkeypatch.setattr(shards.order, "MAX_FULL_SHUFFLE", 0)
    order = Order(sizes, 5, lanes=12, window=2)
    n, steps = order.num_samples, 10
    expected = [[order.locate(s * GLOBAL + i) for i in range(GLOBAL)] for s in range(steps)]
    flat = [address[1:] for address in chain.from_iterable(expected)]
    for first in range(0, len(flat) - n + 1, n):
        # every sample exactly once an epoch
        assert len(set(flat[first : first + n])) == n
    for workers in WORKERS:
        ranks = []
        for rank in range(world):
            plan = TrainPlan(order, GLOBAL // world, rank, world, 0)
            streams = [plan.batches(w, max(1, workers)) for w in range(max(1, workers))]
            ranks.append(list(islice(chain.from_iterable(zip(*streams, strict=True)), steps)))
        # every rank has its part of every step
        assert all(len(part) == GLOBAL // world for part in chain.from_iterable(ranks))
        assert [
            sorted(chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)
        ] == expected


# ---- the pixels, through train_batches


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_any_ranks_and_workers_see_the_same_pixels(make: Make, sizes: tuple[int, ...]) -> None:
    data, order = make(sizes), order_of(make(sizes))
    expected = by_step(draw(data))
    starts = np.cumsum((0, *sizes))
    for step, found in enumerate(expected):
        addresses = [order.locate(step * GLOBAL + i) for i in range(GLOBAL)]
        assert list(found) == [address.position for address in addresses]
        assert [number for number, _, _ in found.values()] == [
            starts[address.shard] + address.row for address in addresses
        ]
    for world, workers in ((1, 1), (1, 5), (2, 2), (3, 1), (4, 0), (8, 1)):
        assert by_step(draw(data, world, workers)) == expected, (world, workers)


def test_ten_samples_in_one_shard_are_shuffled_as_a_whole_anew_every_epoch(make: Make) -> None:
    data = make((10,))
    epochs = []
    for seed in (0, 1):
        (batches,) = draw(data, workers=2, steps=5, seed=seed)
        seen = list(chain.from_iterable(numbers(batch) for batch in batches))
        epochs += [tuple(seen[first : first + 10]) for first in range(0, 120, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({*epochs, tuple(range(10))}) == len(epochs) + 1
    # each place has seen most of the samples
    assert min(len({epoch[place] for epoch in epochs}) for place in range(10)) >= 7


# ---- resume


@pytest.fixture
def read_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple]]:
    """All that was read since, in this process and its workers: (name, begin, end)."""
    log, pread = tmp_path / "reads", os.pread
    log.touch()

    def noting(handle: int, size: int, begin: int) -> bytes:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))
        with log.open("a") as file:
            file.write(f"{name} {begin} {begin + size}\n")
        return pread(handle, size, begin)

    monkeypatch.setattr(os, "pread", noting)

    def since() -> list[tuple]:
        lines = [line.split() for line in log.read_text().splitlines()]
        log.write_text("")
        return [(name, int(begin), int(end)) for name, begin, end in lines]

    return since


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (3, 1), (4, 2), (8, 0)])
def test_a_resume_resumes_with_the_next_sample_and_reads_none_before_it(
    world: int, workers: int, make: Make, read_places: Callable[[], list[tuple]]
) -> None:
    data = make((50, 7, 150, 100, 200))
    order, reader = order_of(data), data.reader("train")
    expected = by_step(draw(data, steps=4))
    for step in (1, 2):
        start = step * GLOBAL
        places = []
        read_places()
        for position in range(order.num_samples):
            reader.read(order.locate(position))
            places += read_places()
        assert len(set(places)) == len(places) == order.num_samples
        assert by_step(draw(data, world, workers, 4 - step, start=start)) == expected[step:]
        found = read_places()
        assert len(found) == len(set(found))
        assert not set(found) & set(places[:start])
        assert set(found) >= set(places[start : 4 * GLOBAL])
        if not workers:
            read = sum(end - begin for _, begin, end in found)
            assert read == sum(end - begin for _, begin, end in places[start : 4 * GLOBAL])


# ---- samples that do not decode

BAD = (2, 11, 12, 20)


def where(number: int, sizes: tuple[int, ...] = (9, 9, 6)) -> str:
    """How a message names a sample."""
    shard = int(np.searchsorted(np.cumsum(sizes), number, side="right"))
    return f"train-{shard:06}.tar: k{number} "


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_does_not_decode_is_named_by_shard_and_key(make: Make, workers: int) -> None:
    data = make((9, 9, 6), bad=(11,))
    with pytest.raises(DataError, match=where(11)) as caught:
        draw(data, workers=workers)
    assert str(data.store) in str(caught.value)


def test_the_same_samples_stand_in_for_bad_ones_for_any_ranks_and_workers(make: Make) -> None:
    data = make((9, 9, 6), bad=BAD)
    order, good, skipped = order_of(data), {}, []
    for position in range(3 * GLOBAL):
        address, attempt = order.locate(position), 0
        while (number := 9 * address.shard + address.row) in BAD:
            skipped.append(where(number).split())
            attempt += 1
            address = order.draw_substitute(position, attempt)
        good[position] = number
    # several were bad twice in a row
    assert len(skipped) > 3 * len(BAD) + 1
    expected = by_step(draw(data, skip=True))
    found = {p: number for step in expected for p, (number, _, _) in step.items()}
    assert found == good
    for world, workers in ((1, 0), (1, 5), (2, 2), (3, 1), (8, 0)):
        ranks = draw(data, world, workers, skip=True)
        assert by_step(ranks) == expected, (world, workers)
        lines = [line for batch in chain.from_iterable(ranks) for line in batch.skipped]
        assert sorted(line.split("/")[-1].split()[:2] for line in lines) == sorted(skipped)


@pytest.mark.parametrize("workers", [0, 1])
def test_where_nothing_decodes_skipping_ends(make: Make, workers: int) -> None:
    data = make((2, 3), bad=tuple(range(5)))
    with pytest.raises(DataError, match="nor can 15 substitutes be decoded"):
        draw(data, workers=workers, skip=True)


def test_evaluation_never_skips(make: Make) -> None:
    data = make((2, 3), bad=(3,), split="val")
    with pytest.raises(DataError, match=r"val-000001\.tar: k3 "):
        list(eval_batches(data, "val", batch_size=2, rank=0, world=1))
