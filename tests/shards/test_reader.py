"""`reader`, `raw`.

Reading samples by offset: exact bytes, named errors, agreement with stock webdataset.
"""

import gc
import hashlib
import io
import json
import os
import pickle
import tarfile
import tracemalloc
from dataclasses import replace
from itertools import chain, islice, takewhile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from webdataset.compat import WebDataset
from webdataset.filters import map as map_samples
from webdataset.pipeline import DataPipeline

import shards.reader
from shards.images.files import ImageFormat
from shards.images.pixels import decode_image
from shards.manifest import ShardInfo
from shards.masks.palettes import default_palette
from shards.masks.png import decode_mask, encode_mask
from shards.offsets import MemberRange
from shards.order import MAX_FULL_SHUFFLE, Address, EvalPlan, Order, TrainPlan
from shards.reader import (
    MAX_GAP_BYTES,
    SampleSource,
    ShardReader,
    build_pipeline,
    plan_reads,
)
from shards.sample import DataError
from shards.writer import ShardWriter

RGB = ImageFormat("RGB")


@pytest.fixture
def opened(request):
    """opened(folder, infos) -> a reader that is closed after the test."""
    readers = []

    def make(folder, infos):
        readers.append(ShardReader(folder, infos))
        return readers[-1]

    yield make
    for reader in readers:
        reader.close()


def infos_of(manifest):
    return manifest.splits["train"].shards


def addresses(infos):
    return [
        Address(0, shard, row) for shard, info in enumerate(infos) for row in range(info.samples)
    ]


def num_open(folder):
    """Count the descriptors of this process for shards in a folder."""
    inside = {(s.st_dev, s.st_ino) for s in (os.stat(p) for p in folder.glob("*.tar"))}
    count = 0
    for name in os.listdir("/dev/fd"):
        try:
            status = os.fstat(int(name))
        except OSError:
            continue
        count += (status.st_dev, status.st_ino) in inside
    return count


def test_samples_are_read_as_they_were_written(make_shards, opened):
    folder, manifest, content = make_shards([3, 1, 2])
    infos = infos_of(manifest)
    reader = opened(folder, infos)
    for position, address in enumerate(reversed(addresses(infos))):
        raw = reader.read(address._replace(position=position))
        assert raw.key == f"folder/pic_{address.shard}-{address.row}%2Ex"
        assert (raw.image, raw.mask) == content[raw.key]
        assert (raw.extension, raw.position) == ("png", position)
        assert raw.parse_info() == {"source": f"folder/pic_{address.shard}-{address.row}.x.png"}
        assert raw.where == f"{folder / infos[address.shard].name}: {raw.key}"


def test_a_sample_takes_one_read(make_shards, opened, monkeypatch):
    folder, manifest, _ = make_shards([4])
    reader = opened(folder, infos_of(manifest))
    reader.read(Address(0, 0, 0))
    pread, reads = os.pread, []
    monkeypatch.setattr(os, "pread", lambda *a: reads.append(a) or pread(*a))
    reader.read(Address(0, 0, 3))
    assert len(reads) == 1


def test_raw_samples_decode_to_image_and_mask(make_shards, opened, noise):
    folder, manifest, _ = make_shards([1])
    sample = opened(folder, infos_of(manifest)).read(Address(0, 0, 0)).decode(RGB, 2)
    assert np.array_equal(sample.image, noise(seed=0))
    assert np.array_equal(sample.mask, noise((6, 8), seed=1) % 2)


def test_a_border_map_is_read_with_its_sample_and_decoded_on_request(tmp_path, to_bytes, opened):
    border = np.arange(48, dtype=np.uint8).reshape(6, 8)
    image = to_bytes(Image.new("RGB", (8, 6)))
    stored = to_bytes(Image.fromarray(border))
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        for key, data in (("a", stored), ("b", stored[:45]), ("c", None)):
            members = {"png": image, "json": b"{}"}
            writer.add(key, members if data is None else {**members, "border.png": data})
        file = writer.seal()
    infos = (ShardInfo(file.name, file.samples, file.bytes, file.sha256, ()),)
    reader = opened(tmp_path, infos)
    intact, truncated, without = reader.read_all([Address(0, 0, row) for row in range(3)])
    assert (intact.image, intact.border) == (image, stored)
    assert np.array_equal(intact.decode_border((8, 6)), border)
    with pytest.raises(DataError, match=r"000000\.tar: a\.border\.png is 8 x 6, but its image"):
        intact.decode_border((6, 8))
    # Border maps are not decoded unless requested.
    assert truncated.decode(RGB, 2).image.shape == (6, 8, 3)
    with pytest.raises(DataError, match=r"train-000000\.tar: b\.border\.png is damaged"):
        truncated.decode_border((8, 6))
    assert (without.border, without.decode_border((8, 6))) == (None, None)


def test_unlabelled_samples_have_no_mask(make_shards, opened):
    folder, manifest, _ = make_shards([1], masks=False)
    raw = opened(folder, infos_of(manifest)).read(Address(0, 0, 0))
    assert raw.mask is None
    assert raw.decode(RGB, 2).mask is None


def test_stock_webdataset_yields_the_same_keys_and_bytes(make_shards):
    folder, manifest, content = make_shards([3, 2])
    urls = [str(folder / info.name) for info in infos_of(manifest)]
    found = list(WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in found] == list(content)
    for sample in found:
        image, mask = content[sample["__key__"]]
        assert (sample["png"], sample["mask.png"]) == (image, mask)
        assert decode_mask(sample["mask.png"], 2, "x").max() == 1
        assert decode_image(sample["png"], RGB, "x").shape == (6, 8, 3)
        assert json.loads(sample["json"])["source"].startswith("folder/pic_")


@pytest.fixture
def foreign(tmp_path, opened):
    """foreign([(name, bytes)], rows) -> a reader of a foreign tar whose .idx has these rows."""

    def make(members, rows):
        path = tmp_path / "foreign.tar"
        ranges = {}
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                ranges[name] = (tar.offset + tarfile.BLOCKSIZE, len(data))
                tar.addfile(member, io.BytesIO(data))
        lines = [
            " ".join(f"{n.partition('.')[2]} {ranges[n][0]} {ranges[n][1]} {n}" for n in names)
            for names in rows
        ]
        index = "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"
        path.with_suffix(".idx").write_text(index)
        digest = hashlib.sha256(index.encode()).hexdigest()
        info = ShardInfo(path.name, len(lines), path.stat().st_size, "", (), digest)
        return opened(tmp_path, [info])

    return make


def test_distant_members_are_read_separately(foreign, monkeypatch):
    far = os.urandom(300_000)
    members = [("a.jpg", b"image"), ("far.bin", far), ("a.mask.png", b"mask"), ("a.json", b"{}")]
    reader = foreign(members, [("a.jpg", "a.mask.png", "a.json")])
    pread, sizes = os.pread, []
    monkeypatch.setattr(os, "pread", lambda *a: sizes.append(a[1]) or pread(*a))
    raw = reader.read(Address(0, 0, 0))
    assert (raw.image, raw.mask, raw.info) == (b"image", b"mask", b"{}")
    assert sum(sizes) == len(b"image" + b"mask" + b"{}")


def test_close_members_are_read_together(foreign, monkeypatch):
    members = [("a.mask.png", b"mask"), ("other.bin", bytes(9000)), ("a.jpg", b"image")]
    reader = foreign(members, [("a.jpg", "a.mask.png")])
    pread, sizes = os.pread, []
    monkeypatch.setattr(os, "pread", lambda *a: sizes.append(a[1]) or pread(*a))
    raw = reader.read(Address(0, 0, 0))
    assert (raw.image, raw.mask) == (b"image", b"mask")
    assert len(sizes) == 1


@given(
    st.lists(st.tuples(st.integers(0, 200_000), st.integers(0, 5000)), min_size=1, max_size=3),
)
def test_planned_reads_cover_all_members_and_little_else(gaps):
    members, offset = [], 0
    for number, (gap, size) in enumerate(gaps):
        offset += gap
        members.append(MemberRange("bin", offset, size, f"{number}.bin"))
        offset += size
    pieces = plan_reads(members[::-1])
    for member in members:
        start, end = member.offset, member.offset + member.size
        assert any(low <= start and end <= high for low, high in pieces)
    read, needed = sum(high - low for low, high in pieces), sum(m.size for m in members)
    assert read <= 2 * needed + MAX_GAP_BYTES
    assert len(pieces) == 1 or read == needed


def test_the_source_of_a_foreign_sample_is_the_name_of_its_image(foreign, to_bytes, noise):
    image = to_bytes(Image.fromarray(noise()))
    reader = foreign([("x/a.png", image)], [("x/a.png",)])
    raw = reader.read(Address(0, 0, 0))
    assert (raw.info, raw.mask, raw.extension) == (None, None, "png")
    assert raw.parse_info() == {"source": "x/a.png"}
    assert np.array_equal(raw.decode(RGB, 2).image, noise())


def test_images_are_decoded_by_the_format_of_the_manifest(opened, tmp_path, to_bytes):
    grey16 = Image.fromarray(np.array([[0, 500, 1000, 65535]], dtype=np.uint16))
    with ShardWriter(tmp_path / "s.tar") as writer:
        writer.add("k", {"png": to_bytes(grey16), "json": b"{}"})
        file = writer.seal()
    info = ShardInfo(file.name, file.samples, file.bytes, "", ())
    raw = opened(tmp_path, [info]).read(Address(0, 0, 0))
    image = raw.decode(ImageFormat("L", range=(0, 1000)), 2).image
    assert image[..., 0].tolist() == [[0, 128, 255, 255]]
    with pytest.raises(DataError, match=r"s\.tar: k has more than 8 bits per pixel"):
        raw.decode(RGB, 2)


# ---------------------------------------------------------------------------------- damaged data


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (b"{", ".json is not valid JSON; pack it again"),
        (b"[1]", ".json is not a JSON object; pack it again"),
    ],
)
def test_an_invalid_json_is_named(foreign, info, message):
    raw = foreign([("a.png", b""), ("a.json", info)], [("a.png", "a.json")]).read(Address(0, 0, 0))
    with pytest.raises(DataError) as caught:
        raw.parse_info()
    assert str(caught.value) == f"{raw.where}{message}"


def test_an_index_beyond_the_classes_is_named_by_shard_and_key(make_shards, opened):
    folder, manifest, _ = make_shards([1], classes=("background", "cell", "wall"))
    raw = opened(folder, infos_of(manifest)).read(Address(0, 0, 0))
    mask = encode_mask(np.full((6, 8), 2, np.uint8), default_palette(manifest.classes))
    assert replace(raw, mask=mask).decode(RGB, 3).mask.max() == 2
    with pytest.raises(DataError, match=r"000000\.tar: folder/pic_0-0%2Ex has values without"):
        replace(raw, mask=mask).decode(RGB, 2)


def refusal(reader, address=None):
    with pytest.raises(DataError) as caught:
        reader.read(address or Address(0, 0, 0))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_shard_is_named(make_shards, opened):
    folder, manifest, _ = make_shards([1])
    (folder / "train-000000.tar").unlink()
    assert refusal(opened(folder, infos_of(manifest))) == (
        f"{folder / 'train-000000.tar'} cannot be opened: No such file or directory; "
        "copy or pack the data set again"
    )


@pytest.mark.parametrize("change", [-512, 512])
def test_a_shard_of_another_size_is_named_before_it_is_read(make_shards, opened, change):
    folder, manifest, _ = make_shards([2])
    path = folder / "train-000000.tar"
    size = path.stat().st_size
    os.truncate(path, size + change)
    reader = opened(folder, infos_of(manifest))
    assert refusal(reader) == (
        f"{path} has {size + change:,} bytes, but the manifest lists {size:,}; "
        "copy or pack it again"
    )
    assert num_open(folder) == 0


def test_a_missing_or_truncated_idx_is_named(make_shards, opened):
    folder, manifest, _ = make_shards([2])
    path = folder / "train-000000.idx"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    assert refusal(opened(folder, infos_of(manifest))) == (
        f"{path} is truncated or not a v1.2 .idx; pack the data set again"
    )
    path.unlink()
    assert f"{path} cannot be read (" in refusal(opened(folder, infos_of(manifest)))


def test_offsets_past_the_end_of_the_shard_are_named(make_shards, opened):
    folder, manifest, _ = make_shards([1])
    path = folder / "train-000000.idx"
    *words, _, name = path.read_text().split(" ")
    path.write_text(" ".join([*words, "1000000", name]))
    message = "train-000000.tar: folder/pic_0-0%2Ex extends past the end of the shard; the shard"
    older = [replace(info, idx_sha256=None) for info in infos_of(manifest)]
    assert message in refusal(opened(folder, older))


def test_a_mask_of_another_size_than_its_image_is_named(tmp_path, opened, to_bytes, noise):
    with ShardWriter(tmp_path / "s.tar") as writer:
        mask = encode_mask(np.zeros((8, 6), np.uint8), ((0, 0, 0),))
        image = to_bytes(Image.fromarray(noise()))
        writer.add("k", {"png": image, "mask.png": mask, "json": b"{}"})
        file = writer.seal()
    info = ShardInfo(file.name, file.samples, file.bytes, "", ())
    raw = opened(tmp_path, [info]).read(Address(0, 0, 0))
    with pytest.raises(DataError, match=r"s\.tar: k: the mask is 6 x 8, but the image is 8 x 6"):
        raw.decode(RGB, 2)


def test_a_damaged_image_is_named_by_shard_and_key(make_shards, opened):
    folder, manifest, _ = make_shards([2])
    raw = opened(folder, infos_of(manifest)).read(Address(0, 0, 1))
    truncated = replace(raw, image=raw.image[:60])
    with pytest.raises(
        DataError, match=r"train-000000\.tar: folder/pic_0-1%2Ex .*; copy or pack the"
    ):
        truncated.decode(RGB, 2)


# ------------------------------------------------------------------------- descriptors, processes


def test_the_least_recently_used_shard_is_closed_beyond_the_limit(make_shards, opened, monkeypatch):
    monkeypatch.setattr(shards.reader, "MAX_OPEN_SHARDS", 3)
    folder, manifest, content = make_shards([1] * 6)
    reader = opened(folder, infos_of(manifest))
    for shard in (0, 1, 2, 0, 3, 4, 0, 5, 1, 2, 0):
        raw = reader.read(Address(0, shard, 0))
        assert raw.image == content[raw.key][0]
        assert num_open(folder) == len(reader.files) <= 3
    assert set(reader.files) == {1, 2, 0}


def test_the_limit_of_open_shards_is_modest():
    assert 1 < shards.reader.MAX_OPEN_SHARDS <= 128


def test_a_pickled_reader_opens_its_own_files(make_shards, opened):
    folder, manifest, _ = make_shards([2])
    reader = opened(folder, infos_of(manifest))
    expected = reader.read(Address(0, 0, 1))
    copy = pickle.loads(pickle.dumps(reader))
    assert (len(copy.files), len(reader.files)) == (0, 1)
    assert (len(copy.offsets), len(reader.offsets)) == (0, 1)
    assert copy.read(Address(0, 0, 1)) == expected


def test_a_closed_reader_has_no_open_files_and_can_be_used_again(make_shards, opened):
    folder, manifest, _ = make_shards([2, 1])
    reader = opened(folder, infos_of(manifest))
    expected = reader.read_all(addresses(infos_of(manifest)))
    assert num_open(folder) == 2
    reader.close()
    assert num_open(folder) == 0
    assert reader.read_all(addresses(infos_of(manifest))) == expected


# ------------------------------------------------------------------------ many samples, no images


@pytest.fixture
def sparse_shards(tmp_path):
    """sparse_shards([3, 2]) -> a folder and its shards: complete .idx files, but empty tars."""

    def make(sizes):
        rng, infos = np.random.default_rng(0), []
        for number, samples in enumerate(sizes):
            lines, offset = [f"v1.2 {samples}"], 0
            for row in range(samples):
                words = []
                for extension, size in zip(
                    ("jpg", "mask.png", "json"), rng.integers(1, 900, 3), strict=True
                ):
                    words.append(f"{extension} {offset + 512} {size} k{number}-{row}.{extension}")
                    offset += 512 + -(-int(size) // 512) * 512
                lines.append(" ".join(words))
            path = tmp_path / f"train-{number:06}.tar"
            index = "\n".join(lines) + "\n"
            path.with_suffix(".idx").write_text(index)
            digest = hashlib.sha256(index.encode()).hexdigest()
            path.touch()
            os.truncate(path, offset + 1024)
            infos.append(ShardInfo(path.name, samples, offset + 1024, "", (), digest))
        return tmp_path, tuple(infos)

    return make


def sizes_of(infos):
    return tuple(info.samples for info in infos)


@pytest.mark.parametrize("world", [1, 3, 8])
def test_over_all_ranks_an_epoch_reads_every_byte_once_and_ranks_their_own_shards(
    sparse_shards, opened, monkeypatch, world
):
    folder, infos = sparse_shards([85] * 201)
    order = Order(sizes_of(infos), 2)
    assert order.num_samples > MAX_FULL_SHUFFLE
    read, pread = [], os.pread

    def logged_pread(handle, size, start):
        read.append((os.fstat(handle).st_ino, start, size))
        return pread(handle, size, start)

    monkeypatch.setattr(os, "pread", logged_pread)
    pairs = 0
    for rank in range(world):
        reader, before = opened(folder, infos), len(read)
        stream = chain.from_iterable(TrainPlan(order, 5, rank, world, 0).batches(0, 1))
        for address in takewhile(lambda a: a.position < order.num_samples, stream):
            reader.read(address)
        pairs += len({shard for shard, _, _ in read[before:]})
    # A sample is one read of its members and the tar headers between them.
    reader, num_bytes = opened(folder, infos), 0
    for offsets in reader.open_offsets(range(201)).values():
        for row in range(85):
            entry = offsets[row]
            assert entry.info is not None
            num_bytes += entry.info.offset + entry.info.size - entry.image.offset
    assert len(set(read)) == len(read) == order.num_samples
    assert sum(size for _, _, size in read) == num_bytes
    assert pairs <= (len(infos) if world == 1 else len(infos) + order.lanes)


def test_memory_and_descriptors_do_not_grow_over_epochs(sparse_shards, opened, monkeypatch):
    monkeypatch.setattr(shards.reader, "MAX_OPEN_SHARDS", 8)
    monkeypatch.setattr(shards.reader, "MAX_OFFSETS_BYTES", 1000)
    folder, infos = sparse_shards([9] * 60)
    reader, before = opened(folder, infos), len(os.listdir("/dev/fd"))
    plan = TrainPlan(Order(sizes_of(infos), 0), 6, 0, 1, 0)
    batches, held = iter(SampleSource(reader, plan)), []
    tracemalloc.start()
    for _ in range(6):
        for raws in islice(batches, 90):
            assert len(raws) == 6
            assert len(reader.files) <= 8
            assert sum(offsets.num_bytes for offsets in reader.offsets.values()) <= 1000
        assert num_open(folder) == 8
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert len(os.listdir("/dev/fd")) - before <= 8
    assert len(reader.offsets) > 8
    assert max(held[2:]) - held[1] < 500_000


def test_offsets_larger_than_the_limit_can_be_read(sparse_shards, opened, monkeypatch):
    monkeypatch.setattr(shards.reader, "MAX_OFFSETS_BYTES", 30)
    folder, infos = sparse_shards([5, 5])
    reader = opened(folder, infos)
    raws = reader.read_all(addresses(infos))
    assert [raw.key for raw in raws] == [f"k{shard}-{row}" for shard in (0, 1) for row in range(5)]
    assert len(reader.offsets) == 1


class KeepKeys:
    """A later stage as users of webdataset write it; a class, since lambdas cannot be pickled."""

    def __call__(self, source):
        for batch in source:
            # A list, since DataLoader would convert a tuple to one.
            yield [[raw.key, raw.position] for raw in batch]


def test_the_reader_is_the_first_stage_of_a_webdataset_pipeline(make_shards, opened):
    folder, manifest, _ = make_shards([3, 2])
    infos = infos_of(manifest)
    plan = EvalPlan((3, 2), 2, 0, 1)
    source = SampleSource(opened(folder, infos), plan)
    pipeline = DataPipeline(source, map_samples(len))
    assert list(pipeline) == [2, 2, 1]
    ours = build_pipeline(opened(folder, infos), plan, KeepKeys())
    assert isinstance(ours, DataPipeline)
    assert [position for batch in ours for _, position in batch] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_number_of_loader_workers_reads_the_same_order(make_shards, opened, workers):
    folder, manifest, _ = make_shards([3, 2, 4])
    infos = infos_of(manifest)
    order = Order((3, 2, 4), 1)
    plan = TrainPlan(order, 2, 1, 2, 0)
    expected = [
        [[f"folder/pic_{a.shard}-{a.row}%2Ex", a.position] for a in some]
        for some in islice(plan.batches(0, 1), 7)
    ]
    pipeline = build_pipeline(opened(folder, infos), plan, KeepKeys())
    loader = DataLoader(pipeline, batch_size=None, num_workers=workers)
    assert list(islice(loader, 7)) == expected


def test_an_error_in_a_worker_is_raised_unchanged(make_shards, opened):
    folder, manifest, _ = make_shards([1])
    (folder / "train-000000.idx").unlink()
    plan = EvalPlan((1,), 1, 0, 1)
    pipeline = build_pipeline(opened(folder, infos_of(manifest)), plan, KeepKeys())
    with pytest.raises(DataError, match=r"train-000000\.idx cannot be read"):
        list(DataLoader(pipeline, batch_size=None, num_workers=1))


def test_a_damaged_mask_or_border_map_has_the_remedy_of_a_shard(make_shards, opened):
    folder, manifest, _ = make_shards([2])
    raw = opened(folder, infos_of(manifest)).read(Address(0, 0, 1))
    with pytest.raises(DataError, match=r"folder/pic_0-1%2Ex.*; copy or pack the data set again$"):
        replace(raw, mask=b"\x89PNG").decode(RGB, 2)
    with pytest.raises(DataError, match=r"\.border\.png.*; copy or pack the data set again$"):
        replace(raw, border=b"\x89PNG").decode_border((8, 6))
