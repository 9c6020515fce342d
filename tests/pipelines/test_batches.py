"""`loading.batches`, `loading.stages`, `runtime.shared_memory`.

Holds the contract of batches: three tensors, the same for any number of workers and ranks.
"""

import gc
import io
import json
import os
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.loading.augment import AugmentConfig
from pipelines.loading.batches import eval_batches, prefetch, train_batches
from pipelines.loading.crop import Cropper
from pipelines.loading.dataset import DataSet
from pipelines.loading.stages import Batch, CropStage, WholeStage
from pipelines.runtime.shared_memory import PLACES, Buffers
from shards.images.files import ImageFormat
from shards.manifest import Manifest, ShardInfo, SizeCount, SplitInfo, common_side, rare_classes
from shards.masks.palettes import default_palette
from shards.masks.png import encode_mask
from shards.order import Order, TrainPlan
from shards.raw import RawSample
from shards.sample import DataError
from shards.store import Store
from shards.writer import ShardWriter

CLASSES = ("background", "a", "b")
RGB = ImageFormat("RGB")
AS_IT_IS = AugmentConfig(warp_share=0, foreground_share=0)
"""Crops anywhere, of their own size."""
VARIED = AugmentConfig()


def png(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def drawn(seed, height, width, channels=3):
    """Image and mask that belong together: the mask is the first channel modulo 3."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return image if channels == 3 else image[..., 0], image[..., 0] % 3


def raw(position, height=8, width=8, *, channels=3, masked=True):
    image, mask = drawn(position, height, width, channels)
    encoded = encode_mask(mask, default_palette(CLASSES)) if masked else None
    return RawSample(
        *(f"k{position}", position, png(image), "png", False, encoded, b"{}"),
        where=f"s.tar: k{position}",
    )


def crops(size, fill=(0, 0, 0), *, form=RGB, seed=0, config=AS_IT_IS) -> Any:
    return CropStage(form, 3, Cropper(config, size, fill, (1, 2), seed))


def check(batch, count, size, channels=3):
    assert (batch.image.dtype, batch.image.shape) == (torch.uint8, (count, channels, *size))
    assert (batch.mask.dtype, batch.mask.shape) == (torch.uint8, (count, *size))
    assert (batch.position.dtype, batch.position.shape) == (torch.int64, (count,))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of shards with images of two sizes, and its manifest."""
    monkeypatch.setattr("os.fsync", lambda handle: None)
    splits = {}
    for split, sizes in (("train", [4, 3]), ("val", [3, 4])):
        infos, number = [], 0
        for shard, samples in enumerate(sizes):
            with ShardWriter(tmp_path / f"{split}-{shard:06}.tar") as writer:
                for _ in range(samples):
                    image, mask = drawn(number, *((12, 10) if number < 5 else (7, 9)))
                    number += 1
                    members = {
                        "png": png(image),
                        "mask.png": encode_mask(mask, default_palette(CLASSES)),
                        "json": json.dumps({"source": f"p{number}.png"}).encode(),
                    }
                    writer.add(f"p{number}", members)
                file = writer.seal()
            infos.append(ShardInfo(file.name, file.samples, file.bytes, file.sha256, ()))
        counts = (SizeCount(10, 12, "RGB", 5), SizeCount(9, 7, "RGB", 2))
        splits[split] = SplitInfo(tuple(infos), counts)
    manifest = Manifest(
        classes=CLASSES,
        palette=default_palette(CLASSES),
        image_format=RGB,
        mask_format={},
        mean=(0.2, 0.4, 0.6),
        std=(0.1, 0.1, 0.1),
        splits=splits,
    )
    return DataSet(Store(tmp_path), manifest, None, 0)


# ---------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize(("channels", "kind"), [(1, "L"), (3, "RGB")])
def test_crops_of_any_image_stack_to_three_tensors_of_bytes(channels, kind):
    stage = crops(6, (1, 2, 3)[:channels], form=ImageFormat(kind), config=VARIED)
    raws = [raw(5, 8, 8, channels=channels), raw(9, 20, 3, channels=channels)]
    (batch,) = stage(iter([raws]))
    check(batch, 2, (6, 6), channels)
    assert batch.position.tolist() == [5, 9]


def test_a_crop_shows_image_and_mask_of_one_place():
    (batch,) = crops(6)(iter([[raw(i) for i in range(8)]]))
    assert torch.equal(batch.mask, batch.image[:, 0] % 3)


def test_a_smaller_image_is_padded_with_the_mean_and_255():
    (batch,) = crops(6, (11, 12, 13))(iter([[raw(0, 4, 4)]]))
    padding = batch.mask[0] == 255
    assert padding.sum() == 36 - 16
    assert batch.image[0][:, padding].T.unique(dim=0).tolist() == [[11, 12, 13]]


def test_a_crop_depends_on_seed_and_position_and_not_on_its_batch():
    stage = crops(4, seed=3, config=VARIED)
    together = next(stage(iter([[raw(i) for i in range(6)]])))
    alone = [next(stage(iter([[raw(i)]]))) for i in range(6)]
    assert torch.equal(together.image, torch.cat([b.image for b in alone]))
    other = next(crops(4, seed=4, config=VARIED)(iter([[raw(i) for i in range(6)]])))
    assert not torch.equal(together.image, other.image)


def test_consecutive_images_of_one_size_share_a_batch():
    sizes = [(8, 8), (8, 8), (8, 6), (8, 8), (5, 5), (5, 5)]
    raws = [raw(i, *size) for i, size in enumerate(sizes)]
    batches = list(WholeStage(RGB, 3)(iter([raws, raws[:1]])))
    assert [b.position.tolist() for b in batches] == [[0, 1], [2], [3], [4, 5], [0]]
    for batch, size in zip(batches, [(8, 8), (8, 6), (8, 8), (5, 5), (8, 8)], strict=True):
        check(batch, len(batch.position), size)
        assert torch.equal(batch.mask, batch.image[:, 0] % 3)


def test_images_are_converted_to_the_channels_of_the_data_set():
    (batch,) = WholeStage(RGB, 3)(iter([[raw(0), raw(1, channels=1)]]))
    check(batch, 2, (8, 8))
    assert torch.equal(batch.image[1, 0], batch.image[1, 2])


@pytest.mark.parametrize("stage", [crops(4), WholeStage(RGB, 3)])
def test_a_sample_without_mask_is_refused_with_the_remedy(stage):
    with pytest.raises(DataError, match=r"s\.tar: k1 has no mask; pack the images with --masks"):
        list(stage(iter([[raw(0), raw(1, masked=False)]])))


def test_a_batch_moves_as_a_whole_but_its_positions_stay_on_the_cpu():
    (batch,) = WholeStage(RGB, 3)(iter([[raw(0)]]))
    moved = batch.to(torch.device("meta"))
    assert (moved.image.device.type, moved.mask.device.type) == ("meta", "meta")
    assert moved.position is batch.position


def test_a_place_in_shared_memory_is_free_again_when_no_tensor_shares_it():
    buffers = Buffers(2, 8)
    assert [buffers.take(1) for _ in range(PLACES + 1)] == [*range(PLACES, 2 * PLACES), None]
    assert buffers.take(0) == 0
    buffers.array(PLACES + 1)[:] = range(8)
    tensor = buffers.lend(PLACES + 1)
    part = tensor.view(2, 2, 2).permute(2, 0, 1)[1]
    del tensor
    assert buffers.take(1) is None
    assert part.tolist() == [[1, 3], [5, 7]]
    del part
    assert (buffers.take(1), buffers.take(1)) == (PLACES + 1, None)


def test_batches_made_ahead_come_in_order_and_so_does_their_error():
    def batches() -> Any:
        yield from range(3)
        raise DataError("s.tar: k")

    coming: Any = prefetch(batches())
    assert [next(coming) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match=r"s\.tar: k"):
        next(coming)
    whole: Any = iter(range(3))
    assert list(prefetch(whole)) == [0, 1, 2]


def test_nothing_decoded_is_kept():
    big = raw(0, 600, 600)

    def taken(count):
        """Bytes of memory that this process has, when it has seen so many batches."""
        for _ in islice(stage, count):
            pass
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    stage = crops(32, config=VARIED)([replace(big, position=p)] * 2 for p in count())
    before = taken(20)
    # Eighty images are 86 MB.
    assert taken(40) - before < 10_000_000


# --------------------------------------------------------------------------------------- loaders


def train(data, *, rank=0, world=1, start=0, workers=0, count=6, batch_size=4, augment=VARIED):
    order = Order(tuple(s.samples for s in data.manifest.splits["train"].shards), 0)
    plan = TrainPlan(order, batch_size, rank, world, start)
    data = replace(data, workers=workers)
    return list(islice(train_batches(data, plan, crop_size=8, augment=augment, seed=0), count))


def joined(batches):
    """All samples of some batches by position."""
    rows = {}
    for b in batches:
        for image, mask, position in zip(b.image, b.mask, b.position.tolist(), strict=True):
            assert position not in rows
            rows[position] = (image.numpy().tobytes(), mask.numpy().tobytes())
    return rows


@pytest.mark.parametrize("workers", [1, 2])
def test_training_batches_are_the_same_for_any_number_of_workers(data, workers):
    # More than there are places in shared memory: none of what is kept is written again.
    assert workers * PLACES < 30
    expected, found = train(data, count=30), train(data, workers=workers, count=30)
    for one, other in zip(expected, found, strict=True):
        assert isinstance(other, Batch)
        check(other, 4, (8, 8))
        assert torch.equal(one.position, other.position)
        assert torch.equal(one.image, other.image)
        assert torch.equal(one.mask, other.mask)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_draw_the_samples_and_crops_of_one(data, world):
    ranks = [
        b for r in range(world) for b in train(data, rank=r, world=world, batch_size=4 // world)
    ]
    assert joined(ranks) == joined(train(data))


def test_training_resumes_where_the_plan_starts(data):
    whole, rest = joined(train(data)), joined(train(data, start=8, count=4))
    assert rest == {p: sample for p, sample in whole.items() if p >= 8}


def test_small_images_are_padded_with_the_mean_of_the_data_set(data):
    padded = [
        b.image[i][:, b.mask[i] == 255].T.unique(dim=0).tolist()
        for b in train(data, augment=AS_IT_IS)
        for i in range(4)
        if (b.mask[i] == 255).any()
    ]
    assert padded
    assert all(colours == [[51, 102, 153]] for colours in padded)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 9])
def test_evaluation_sees_every_complete_image_once(data, workers, world):
    data = replace(data, workers=workers)
    batches = [
        batch
        for rank in range(world)
        for batch in eval_batches(data, "val", batch_size=2, rank=rank, world=world)
    ]
    assert sorted(p for b in batches for p in b.position.tolist()) == list(range(7))
    for batch in batches:
        for image, mask, position in zip(batch.image, batch.mask, batch.position, strict=True):
            expected, expected_mask = drawn(int(position), *((12, 10) if position < 5 else (7, 9)))
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
            assert np.array_equal(mask.numpy(), expected_mask)


def test_a_manifest_without_a_train_split_is_refused(data):
    del data.manifest.splits["train"]
    plan = TrainPlan(Order((1,), 0), 1, 0, 1, 0)
    with pytest.raises(
        DataError, match="has no samples in the split 'train'; splits with samples: val"
    ):
        train_batches(data, plan, crop_size=8, augment=AS_IT_IS, seed=0)


# ----------------------------------------------------------------------------------- the manifest


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([()], (1, 2)),
        ([(), (9, 1, 1, 0)], (1, 2)),
        ([(5, 4, 0, 9), (0, 4, 0, 9)], (0,)),
        ([(0, 0, 7, 0)], ()),
        ([(3, 3, 3, 0)], (1, 2)),
    ],
)
def test_rare_are_the_classes_that_occur_less_the_commonest(data, counts, expected):
    shards = tuple(ShardInfo(f"{i}.tar", 1, 1, "", pixels) for i, pixels in enumerate(counts))
    splits = {"train": SplitInfo(shards, ())}
    assert rare_classes(replace(data.manifest, splits=splits)) == expected


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(512, 512, 1)], 512),
        ([(1000, 400, 1)], 400),
        ([(640, 480, 6), (64, 64, 4)], 480),
        ([(640, 480, 4), (64, 64, 6)], 64),
        ([(640, 480, 5), (64, 64, 5)], 480),
        ([(64, 64, 3), (300, 300, 3), (100, 100, 3)], 100),
    ],
)
def test_the_common_side_is_that_of_a_square_that_fits_most_images(sizes, expected):
    counts = tuple(SizeCount(w, h, "RGB", n) for w, h, n in sizes)
    assert common_side(SplitInfo((), counts)) == expected
