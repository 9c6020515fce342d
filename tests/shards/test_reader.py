"""Holds the reader's contract: the right bytes by offset, named errors, stock webdataset agrees."""

import gc
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
from shards.images import ImageFormat, decode_image
from shards.index import MemberRange, ShardInfo
from shards.masks import decode_mask, default_palette, encode_mask
from shards.order import WHOLE, Address, EvalPlan, Order, TrainPlan
from shards.reader import (
    MOST_BETWEEN,
    SampleSource,
    ShardReader,
    pieces_of,
    read_samples,
)
from shards.sample import DataError
from shards.writer import ShardWriter

RGB = ImageFormat("RGB")


@pytest.fixture
def opened(request):
    """opened(folder, infos) -> a reader whose descriptors are closed after the test."""
    readers = []

    def make(folder, infos):
        readers.append(ShardReader(folder, infos))
        return readers[-1]

    yield make
    for reader in readers:
        reader.forget()


def infos_of(manifest):
    return manifest.splits["train"].shards


def addresses(infos):
    return [
        Address(0, shard, row) for shard, info in enumerate(infos) for row in range(info.samples)
    ]


def num_open(folder):
    """Descriptors of this process that point into a folder."""
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
        assert raw.describe() == {"source": f"folder/pic_{address.shard}-{address.row}.x.png"}
        assert raw.where == f"{folder / infos[address.shard].name}: {raw.key}"


def test_a_sample_is_one_read(make_shards, opened, monkeypatch):
    folder, manifest, _ = make_shards([4])
    reader = opened(folder, infos_of(manifest))
    reader.read(Address(0, 0, 0))
    pread, reads = os.pread, []
    monkeypatch.setattr(os, "pread", lambda *a: reads.append(a) or pread(*a))
    reader.read(Address(0, 0, 3))
    assert len(reads) == 1


def test_raw_samples_decode_to_picture_and_mask(make_shards, opened, noise):
    folder, manifest, _ = make_shards([1])
    sample = opened(folder, infos_of(manifest)).read(Address(0, 0, 0)).decode(RGB, 2)
    assert np.array_equal(sample.image, noise(seed=0))
    assert np.array_equal(sample.mask, noise((6, 8), seed=1) % 2)


def test_a_border_map_is_read_with_its_sample_and_decoded_on_request(tmp_path, to_bytes, opened):
    border = np.arange(48, dtype=np.uint8).reshape(6, 8)
    picture = to_bytes(Image.new("RGB", (8, 6)))
    stored = to_bytes(Image.fromarray(border))
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        for key, data in (("a", stored), ("b", stored[:45]), ("c", None)):
            members = {"png": picture, "json": b"{}"}
            writer.add(key, members if data is None else {**members, "border.png": data})
        file = writer.seal()
    infos = (ShardInfo(file.name, file.samples, file.bytes, file.sha256, ()),)
    good, cut, without = opened(tmp_path, infos).read_all([Address(0, 0, row) for row in range(3)])
    assert (good.image, good.border) == (picture, stored)
    assert np.array_equal(good.decode_border((8, 6)), border)
    with pytest.raises(DataError, match=r"train-000000\.tar: a\.border\.png is 8 x 6, its picture"):
        good.decode_border((6, 8))
    # What is not asked for is not looked at.
    assert cut.decode(RGB, 2).image.shape == (6, 8, 3)
    with pytest.raises(DataError, match=r"train-000000\.tar: b\.border\.png is damaged"):
        cut.decode_border((8, 6))
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
        picture, mask = content[sample["__key__"]]
        assert (sample["png"], sample["mask.png"]) == (picture, mask)
        assert decode_mask(sample["mask.png"], 2, "x").max() == 1
        assert decode_image(sample["png"], RGB, "x").shape == (6, 8, 3)
        assert json.loads(sample["json"])["source"].startswith("folder/pic_")


@pytest.fixture
def foreign(tmp_path, opened):
    """foreign([(name, bytes)], rows) -> a reader of a tar that others wrote, indexed by rows."""

    def make(members, rows):
        path = tmp_path / "foreign.tar"
        places = {}
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                places[name] = (tar.offset + tarfile.BLOCKSIZE, len(data))
                tar.addfile(member, io.BytesIO(data))
        lines = [
            " ".join(f"{n.partition('.')[2]} {places[n][0]} {places[n][1]} {n}" for n in names)
            for names in rows
        ]
        path.with_suffix(".idx").write_text("\n".join([f"v1.2 {len(lines)}", *lines]) + "\n")
        info = ShardInfo(path.name, len(lines), path.stat().st_size, "", ())
        return opened(tmp_path, [info])

    return make


def test_members_that_lie_apart_are_read_exactly_and_nothing_between(foreign, monkeypatch):
    far = os.urandom(300_000)
    members = [("a.jpg", b"picture"), ("far.bin", far), ("a.mask.png", b"mask"), ("a.json", b"{}")]
    reader = foreign(members, [("a.jpg", "a.mask.png", "a.json")])
    pread, sizes = os.pread, []
    monkeypatch.setattr(os, "pread", lambda *a: sizes.append(a[1]) or pread(*a))
    raw = reader.read(Address(0, 0, 0))
    assert (raw.image, raw.mask, raw.info) == (b"picture", b"mask", b"{}")
    assert sum(sizes) == len(b"picture" + b"mask" + b"{}")


def test_members_with_little_between_them_are_one_read(foreign, monkeypatch):
    members = [("a.mask.png", b"mask"), ("other.bin", bytes(9000)), ("a.jpg", b"picture")]
    reader = foreign(members, [("a.jpg", "a.mask.png")])
    pread, sizes = os.pread, []
    monkeypatch.setattr(os, "pread", lambda *a: sizes.append(a[1]) or pread(*a))
    raw = reader.read(Address(0, 0, 0))
    assert (raw.image, raw.mask) == (b"picture", b"mask")
    assert len(sizes) == 1


@given(
    st.lists(st.tuples(st.integers(0, 200_000), st.integers(0, 5000)), min_size=1, max_size=3),
)
def test_whatever_lies_between_members_they_are_read_and_not_much_more(gaps):
    members, offset = [], 0
    for number, (gap, size) in enumerate(gaps):
        offset += gap
        members.append(MemberRange("bin", offset, size, f"{number}.bin"))
        offset += size
    pieces = pieces_of(members[::-1])
    for member in members:
        begin, end = member.offset, member.offset + member.size
        assert any(low <= begin and end <= high for low, high in pieces)
    read, needed = sum(high - low for low, high in pieces), sum(m.size for m in members)
    assert read <= 2 * needed + MOST_BETWEEN
    assert len(pieces) == 1 or read == needed


def test_a_sample_of_a_foreign_shard_is_described_by_its_place(foreign, to_bytes, noise):
    picture = to_bytes(Image.fromarray(noise()))
    reader = foreign([("x/a.png", picture)], [("x/a.png",)])
    raw = reader.read(Address(0, 0, 0))
    assert (raw.info, raw.mask, raw.extension) == (None, None, "png")
    assert raw.describe() == {"source": "x/a.png"}
    assert np.array_equal(raw.decode(RGB, 2).image, noise())


def test_pictures_decode_by_the_manifests_format(opened, tmp_path, to_bytes):
    wide = Image.fromarray(np.array([[0, 500, 1000, 65535]], dtype=np.uint16))
    with ShardWriter(tmp_path / "s.tar") as writer:
        writer.add("k", {"png": to_bytes(wide), "json": b"{}"})
        file = writer.seal()
    info = ShardInfo(file.name, file.samples, file.bytes, "", ())
    raw = opened(tmp_path, [info]).read(Address(0, 0, 0))
    image = raw.decode(ImageFormat("L", range=(0, 1000)), 2).image
    assert image[..., 0].tolist() == [[0, 128, 255, 255]]
    with pytest.raises(DataError, match=r"s\.tar: k has more than 8 bits a pixel"):
        raw.decode(RGB, 2)


# ---------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (b"{", "its json is damaged; pack it again"),
        (b"[1]", "its json is no object; pack it again"),
    ],
)
def test_a_json_that_is_none_is_named(foreign, info, message):
    raw = foreign([("a.png", b""), ("a.json", info)], [("a.png", "a.json")]).read(Address(0, 0, 0))
    with pytest.raises(DataError) as caught:
        raw.describe()
    assert str(caught.value) == f"{raw.where}: {message}"


def test_an_index_beyond_the_classes_is_named_by_shard_and_key(make_shards, opened):
    folder, manifest, _ = make_shards([1], classes=("background", "cell", "wall"))
    raw = opened(folder, infos_of(manifest)).read(Address(0, 0, 0))
    mask = encode_mask(np.full((6, 8), 2, np.uint8), default_palette(manifest.classes))
    assert replace(raw, mask=mask).decode(RGB, 3).mask.max() == 2
    with pytest.raises(DataError, match=r"train-000000\.tar: folder/pic_0-0%2Ex holds values with"):
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
        f"{folder / 'train-000000.tar'} cannot be opened: No such file or directory"
    )


@pytest.mark.parametrize("change", [-512, 512])
def test_a_shard_of_another_size_is_named_before_it_is_read(make_shards, opened, change):
    folder, manifest, _ = make_shards([2])
    path = folder / "train-000000.tar"
    size = path.stat().st_size
    os.truncate(path, size + change)
    reader = opened(folder, infos_of(manifest))
    assert refusal(reader) == (
        f"{path} has {size + change:,} bytes, the manifest says {size:,}; copy or pack it again"
    )
    assert num_open(folder) == 0


def test_a_missing_or_cut_index_is_named(make_shards, opened):
    folder, manifest, _ = make_shards([2])
    path = folder / "train-000000.idx"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    assert refusal(opened(folder, infos_of(manifest))) == (
        f"{path} is cut or no index of version v1.2; pack the data set again"
    )
    path.unlink()
    assert f"{path} cannot be read (" in refusal(opened(folder, infos_of(manifest)))


def test_an_index_that_points_behind_the_end_is_named(make_shards, opened):
    folder, manifest, _ = make_shards([1])
    path = folder / "train-000000.idx"
    *words, _, name = path.read_text().split(" ")
    path.write_text(" ".join([*words, "1000000", name]))
    assert "train-000000.tar: folder/pic_0-0%2Ex ends too early; the shard is cut" in refusal(
        opened(folder, infos_of(manifest))
    )


def test_a_mask_of_another_size_than_its_picture_is_named(tmp_path, opened, to_bytes, noise):
    with ShardWriter(tmp_path / "s.tar") as writer:
        mask = encode_mask(np.zeros((8, 6), np.uint8), ((0, 0, 0),))
        picture = to_bytes(Image.fromarray(noise()))
        writer.add("k", {"png": picture, "mask.png": mask, "json": b"{}"})
        file = writer.seal()
    info = ShardInfo(file.name, file.samples, file.bytes, "", ())
    raw = opened(tmp_path, [info]).read(Address(0, 0, 0))
    with pytest.raises(DataError, match=r"s\.tar: k: the mask is 6 x 8, the picture 8 x 6; pack"):
        raw.decode(RGB, 2)


def test_a_damaged_picture_is_named_by_shard_and_key(make_shards, opened):
    folder, manifest, _ = make_shards([2])
    raw = opened(folder, infos_of(manifest)).read(Address(0, 0, 1))
    cut = replace(raw, image=raw.image[:60])
    with pytest.raises(DataError, match=r"train-000000\.tar: folder/pic_0-1%2Ex .*; repair"):
        cut.decode(RGB, 2)


# ------------------------------------------------------------------------- descriptors, processes


def test_at_most_so_many_shards_are_open_the_least_recently_used_closed(
    make_shards, opened, monkeypatch
):
    monkeypatch.setattr(shards.reader, "MAX_OPEN", 3)
    folder, manifest, content = make_shards([1] * 6)
    reader = opened(folder, infos_of(manifest))
    for shard in (0, 1, 2, 0, 3, 4, 0, 5, 1, 2, 0):
        raw = reader.read(Address(0, shard, 0))
        assert raw.image == content[raw.key][0]
        assert num_open(folder) == len(reader.files) <= 3
    assert set(reader.files) == {1, 2, 0}


def test_the_promised_number_of_descriptors_is_modest():
    assert 1 < shards.reader.MAX_OPEN <= 128


def test_a_reader_is_picklable_and_opens_its_own_files(make_shards, opened):
    folder, manifest, _ = make_shards([2])
    reader = opened(folder, infos_of(manifest))
    expected = reader.read(Address(0, 0, 1))
    copy = pickle.loads(pickle.dumps(reader))
    assert (len(copy.files), len(reader.files)) == (0, 1)
    assert (len(copy.indexes), len(reader.indexes)) == (0, 1)
    assert copy.read(Address(0, 0, 1)) == expected


def test_a_reader_that_forgets_has_closed_everything_and_can_go_on(make_shards, opened):
    folder, manifest, _ = make_shards([2, 1])
    reader = opened(folder, infos_of(manifest))
    expected = reader.read_all(addresses(infos_of(manifest)))
    assert num_open(folder) == 2
    reader.forget()
    assert num_open(folder) == 0
    assert reader.read_all(addresses(infos_of(manifest))) == expected


# ---------------------------------------------------------------------- many samples, no pictures


@pytest.fixture
def imagined(tmp_path):
    """imagined([3, 2]) -> a folder and its shards: whole indexes, but tars of nothing but holes."""

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
            path.with_suffix(".idx").write_text("\n".join(lines) + "\n")
            path.touch()
            os.truncate(path, offset + 1024)
            infos.append(ShardInfo(path.name, samples, offset + 1024, "", ()))
        return tmp_path, tuple(infos)

    return make


def sizes_of(infos):
    return tuple(info.samples for info in infos)


@pytest.mark.parametrize("world", [1, 3, 8])
def test_over_all_ranks_an_epoch_reads_every_byte_once_and_ranks_their_own_shards(
    imagined, opened, monkeypatch, world
):
    folder, infos = imagined([85] * 201)
    order = Order(sizes_of(infos), 2)
    assert order.num_samples > WHOLE
    read, pread = [], os.pread

    def noting(handle, size, begin):
        read.append((os.fstat(handle).st_ino, begin, size))
        return pread(handle, size, begin)

    monkeypatch.setattr(os, "pread", noting)
    pairs = 0
    for rank in range(world):
        reader, before = opened(folder, infos), len(read)
        stream = chain.from_iterable(TrainPlan(order, 5, rank, world, 0).batches(0, 1))
        for address in takewhile(lambda a: a.position < order.num_samples, stream):
            reader.read(address)
        pairs += len({shard for shard, _, _ in read[before:]})
    # A sample is one read, its members and the tar headers between them.
    reader, whole = opened(folder, infos), 0
    for index in reader.open_indexes(range(201)).values():
        for row in range(85):
            entry = index[row]
            assert entry.info is not None
            whole += entry.info.offset + entry.info.size - entry.image.offset
    assert len(set(read)) == len(read) == order.num_samples
    assert sum(size for _, _, size in read) == whole
    assert pairs <= (len(infos) if world == 1 else len(infos) + order.lanes)


def test_epochs_leave_no_more_behind_than_the_first(imagined, opened, monkeypatch):
    monkeypatch.setattr(shards.reader, "MAX_OPEN", 8)
    monkeypatch.setattr(shards.reader, "INDEX_BYTES", 1000)
    folder, infos = imagined([9] * 60)
    reader, before = opened(folder, infos), len(os.listdir("/dev/fd"))
    plan = TrainPlan(Order(sizes_of(infos), 0), 6, 0, 1, 0)
    batches, held = iter(SampleSource(reader, plan)), []
    tracemalloc.start()
    for _ in range(6):
        for raws in islice(batches, 90):
            assert len(raws) == 6
            assert len(reader.files) <= 8
            assert sum(index.num_bytes for index in reader.indexes.values()) <= 1000
        assert num_open(folder) == 8
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert len(os.listdir("/dev/fd")) - before <= 8
    assert len(reader.indexes) > 8
    assert max(held[2:]) - held[1] < 500_000


def test_a_single_index_may_be_larger_than_what_is_kept(imagined, opened, monkeypatch):
    monkeypatch.setattr(shards.reader, "INDEX_BYTES", 30)
    folder, infos = imagined([5, 5])
    reader = opened(folder, infos)
    raws = reader.read_all(addresses(infos))
    assert [raw.key for raw in raws] == [f"k{shard}-{row}" for shard in (0, 1) for row in range(5)]
    assert len(reader.indexes) == 1


class KeepKeys:
    """A later stage, as users of webdataset write them; a class, since lambdas do not pickle."""

    def __call__(self, source):
        for batch in source:
            # a list, since DataLoader would make one of a tuple
            yield [[raw.key, raw.position] for raw in batch]


def test_the_reader_is_the_first_stage_of_a_webdataset_pipeline(make_shards, opened):
    folder, manifest, _ = make_shards([3, 2])
    infos = infos_of(manifest)
    plan = EvalPlan((3, 2), 2, 0, 1)
    source = SampleSource(opened(folder, infos), plan)
    pipeline = DataPipeline(source, map_samples(len))
    assert list(pipeline) == [2, 2, 1]
    ours = read_samples(opened(folder, infos), plan, KeepKeys())
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
    pipeline = read_samples(opened(folder, infos), plan, KeepKeys())
    loader = DataLoader(pipeline, batch_size=None, num_workers=workers)
    assert list(islice(loader, 7)) == expected


def test_an_error_in_a_worker_arrives_as_it_was_raised(make_shards, opened):
    folder, manifest, _ = make_shards([1])
    (folder / "train-000000.idx").unlink()
    plan = EvalPlan((1,), 1, 0, 1)
    pipeline = read_samples(opened(folder, infos_of(manifest)), plan, KeepKeys())
    with pytest.raises(DataError, match=r"train-000000\.idx cannot be read"):
        list(DataLoader(pipeline, batch_size=None, num_workers=1))
