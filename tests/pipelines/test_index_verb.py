"""`index`, `packing.foreign`, `shards.foreign`.

Foreign shards: indexed for training without rewriting them, or refused with a reason.
"""

import gzip
import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from shards.manifest import Manifest, read_manifest
from shards.offsets import read_offsets
from shards.order import EvalPlan
from shards.reader import SampleSource, ShardReader
from shards.sample import Sample

Members = Mapping[str, bytes]
CLASSES = ("--classes", "background", "cell", "nucleus")


def encoded(pixels: np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form, **options)
    return out.getvalue()


def encode_image(number: int, size: tuple[int, int] = (12, 16), form: str = "PNG") -> bytes:
    rng = np.random.default_rng([7, number])
    return encoded(rng.integers(0, 256, (*size, 3)).astype(np.uint8), form)


def encode_mask(number: int, size: tuple[int, int] = (12, 16)) -> bytes:
    rng = np.random.default_rng([8, number])
    return encoded(np.array([0, 1, 2, 255], np.uint8)[rng.integers(0, 4, size)])


def tar(path: Path, members: Members, kind: int = tarfile.PAX_FORMAT) -> Path:
    """Write a tar of these members, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def pairs(*keys: str, image: str = "png", drawn: str = "mask.png", first: int = 0) -> Members:
    form = "JPEG" if image.endswith("jpg") else "PNG"
    found: dict[str, bytes] = {}
    for number, key in enumerate(keys, first):
        found[f"{key}.{image}"] = encode_image(number, form=form)
        found[f"{key}.{drawn}"] = encode_mask(number)
    return found


@pytest.fixture
def index(call) -> Callable[..., Any]:
    """Runs `unet index FOLDER` in this process."""

    def run(folder: Path, *more: object, workers: int = 1) -> Any:
        return call("index", folder, "--workers", workers, *more)

    return run


@pytest.fixture
def indexed(index) -> Callable[..., Manifest]:
    """Runs `unet index FOLDER` and reads the manifest."""

    def run(folder: Path, *more: object, workers: int = 1) -> Manifest:
        ended = index(folder, *(more or CLASSES), workers=workers)
        assert (ended.code, ended.err) == (0, "")
        return read_manifest(folder)

    return run


@pytest.fixture
def refused(index, content) -> Callable[..., str]:
    """Runs `unet index FOLDER`, expects an error and no changes, and returns the message."""

    def run(folder: Path, *more: object) -> str:
        before = content(folder)
        ended = index(folder, *(more or CLASSES))
        assert (ended.code, ended.out) == (1, "")
        assert content(folder) == before
        assert ended.err.startswith("unet index: ")
        return ended.err.removeprefix("unet index: ").replace(f"{folder}/", "").rstrip("\n")

    return run


def samples(folder: Path, manifest: Manifest, split: str) -> Iterator[Sample]:
    """Read all samples of a split, decoded as for training."""
    shards = manifest.splits[split].shards
    plan = EvalPlan(tuple(s.samples for s in shards), chunk=1, rank=0, world=1)
    for (raw,) in SampleSource(ShardReader(folder, shards), plan):
        yield raw.decode(manifest.image_format, len(manifest.classes))


def decoded(data: bytes, mode: str | None = None) -> np.ndarray:
    image = Image.open(io.BytesIO(data))
    return np.asarray(image if mode is None else image.convert(mode))


def assert_holds(
    folder: Path, manifest: Manifest, split: str, members: Members, drawn: str
) -> None:
    """Assert that a split contains exactly these images and masks."""
    found = {sample.key: sample for sample in samples(folder, manifest, split)}
    masks = {n.removesuffix(f".{drawn}"): d for n, d in members.items() if n.endswith(drawn)}
    assert found.keys() == masks.keys()
    for key, sample in found.items():
        (own,) = (
            data
            for name, data in members.items()
            if name.startswith(f"{key}.") and not name.endswith(drawn)
        )
        np.testing.assert_array_equal(sample.image, decoded(own, "RGB"))
        np.testing.assert_array_equal(sample.mask, decoded(masks[key]))


# ---- shards from other tools


@pytest.mark.parametrize(
    ("image", "drawn", "flags"),
    [
        ("jpg", "mask.png", ()),
        ("png", "mask.png", ()),
        ("jpg", "png", ("--mask-ext", "png")),
        ("jpg", "seg.png", ("--mask-ext", "seg.png")),
        ("img.jpg", "seg.png", ("--image-ext", "img.jpg", "--mask-ext", ".seg.png")),
        ("image.png", "label.png", ("--image-ext", "image.png", "--mask-ext", "label.png")),
    ],
)
def test_shards_of_stock_webdataset_become_a_data_set(
    image: str, drawn: str, flags: tuple[str, ...], indexed, call, content, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    written: dict[str, dict[str, bytes]] = {"train": {}, "val": {}}
    for split, first, count in (("train", 0, 5), ("val", 5, 2)):
        (folder / split).mkdir(parents=True)
        pattern = str(folder / split / "%06d.tar")
        with webdataset.ShardWriter(pattern, maxcount=2, verbose=0) as writer:
            for number in range(first, first + count):
                members = pairs(f"s{number:03d}", image=image, drawn=drawn, first=number)
                written[split] |= members
                cut = {name.partition(".")[2]: data for name, data in members.items()}
                writer.write({"__key__": f"s{number:03d}", **cut})
    manifest = indexed(folder, *CLASSES, *flags)
    assert [s.name for s in manifest.splits["train"].shards] == [
        f"train/00000{i}.tar" for i in range(3)
    ]
    assert {name: split.samples for name, split in manifest.splits.items()} == {
        "train": 5,
        "val": 2,
    }
    for split, members in written.items():
        assert_holds(folder, manifest, split, members, drawn)
    values = np.concatenate(
        [decoded(d).ravel() for n, d in written["train"].items() if n.endswith(drawn)]
    )
    pixels = np.sum([s.pixels for s in manifest.splits["train"].shards], axis=0)
    assert pixels.tolist() == [int((values == value).sum()) for value in (0, 1, 2, 255)]
    levels = np.concatenate(
        [
            decoded(d, "RGB").reshape(-1, 3)
            for n, d in written["train"].items()
            if not n.endswith(drawn)
        ]
    )
    np.testing.assert_allclose(manifest.mean, levels.mean(0) / 255, atol=1e-6)
    np.testing.assert_allclose(manifest.std, levels.std(0) / 255, atol=1e-6)
    assert manifest.mask_format == {
        "kind": "index",
        "num_classes": 3,
        "ignore_value": 255,
        "source_values": [0, 1, 2],
    }

    out = tmp_path / "out"
    assert call("unpack", "--data", folder, "--out", out).code == 0
    everything = {**written["train"], **written["val"]}
    extension = image.rpartition(".")[2]
    assert content(out / "images") == {
        f"{name.partition('.')[0]}.{extension}": data
        for name, data in everything.items()
        if not name.endswith(f".{drawn}")
    }
    assert content(out / "masks") == {
        f"{name.partition('.')[0]}.png": data
        for name, data in everything.items()
        if name.endswith(f".{drawn}")
    }


def test_an_indexed_folder_can_be_trained_on_and_evaluated(
    indexed, call, tiny, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    keys = tuple(f"p{i}" for i in range(6))
    tar(folder / "train-0.tar", pairs(*keys, image="jpg"))
    tar(folder / "validation-0.tar", pairs("v1", "v2", first=9))
    assert list(indexed(folder).splits) == ["train", "val"]
    run = ("--data", folder, "--run-dir", tmp_path / "run", *tiny, "--workers", 0, "--steps", 2)
    assert (ended := call("train", *run)).code == 0, ended.err
    ended = call("evaluate", "--checkpoint", tmp_path / "run", "--data", folder, "--split", "val")
    assert ended.code == 0, ended.err


def test_a_dot_in_a_name_belongs_to_the_key(indexed, tmp_path: Path) -> None:
    members = pairs("img_0.5um", "img_0.25um", "d.1/x.y.z", drawn="seg.png")
    tar(tmp_path / "a.tar", members)
    manifest = indexed(tmp_path, *CLASSES, "--mask-ext", "seg.png")
    assert_holds(tmp_path, manifest, "train", members, "seg.png")
    assert read_offsets(tmp_path / "a.tar")[0].key == "img_0.5um"


def test_members_of_a_sample_need_not_be_adjacent(indexed, tmp_path: Path) -> None:
    together = pairs("a", "b", "c")
    drawn = {name: data for name, data in together.items() if name.endswith("mask.png")}
    apart = {n: d for n, d in together.items() if n not in drawn} | dict(reversed(drawn.items()))
    tar(tmp_path / "a.tar", apart)
    manifest = indexed(tmp_path)
    assert manifest.splits["train"].samples == 3
    assert_holds(tmp_path, manifest, "train", together, "mask.png")


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_and_long_names_are_indexed(kind: int, indexed, tmp_path: Path) -> None:
    members = pairs(f"{'folder' * 12}/{'name' * 15}", "./here", f"{'f' * 60}/{'n' * 60}")
    tar(tmp_path / "a.tar", members, kind)
    manifest = indexed(tmp_path)
    assert_holds(tmp_path, manifest, "train", members, "mask.png")


def test_extensions_are_case_insensitive(indexed, tmp_path: Path) -> None:
    members = pairs("a", image="PNG", drawn="Mask.PNG")
    tar(tmp_path / "a.tar", members)
    assert_holds(tmp_path, indexed(tmp_path), "train", members, "Mask.PNG")


def test_palette_masks_are_read_as_indices(indexed, tmp_path: Path) -> None:
    image = Image.fromarray(np.full((12, 16), 2, np.uint8))
    image.putpalette([9, 9, 9, 8, 8, 8, 255, 0, 0])
    out = io.BytesIO()
    image.save(out, "PNG")
    members = {"a.png": encode_image(0), "a.mask.png": out.getvalue()}
    tar(tmp_path / "a.tar", members)
    manifest = indexed(tmp_path, *CLASSES, "--allow-absent-classes")
    assert_holds(tmp_path, manifest, "train", members, "mask.png")
    assert manifest.splits["train"].shards[0].pixels == (0, 0, 192, 0)


def make_palette_mask(values, *colours) -> bytes:
    image = Image.fromarray(np.array(values, np.uint8).repeat(96).reshape(12, 16)).copy()
    image.putpalette([number for colour in colours for number in colour])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_palettes_that_swap_classes_are_refused(refused, tmp_path: Path) -> None:
    black, red = (0, 0, 0), (255, 0, 0)
    one, other = make_palette_mask([0, 1], black, red), make_palette_mask([0, 1], red, black)
    members = {
        **{"a.png": encode_image(0), "a.mask.png": one},
        **{"b.png": encode_image(1), "b.mask.png": other},
    }
    tar(tmp_path / "a.tar", members)
    text = refused(tmp_path, "--classes", "background", "cell")
    assert "palettes differ: by its index, (0, 0, 0) is background in 1 masks" in text


def test_masks_whose_foreground_is_255_are_refused(refused, tmp_path: Path) -> None:
    members = {
        "a.png": encode_image(0),
        "a.mask.png": make_palette_mask([0, 255], *[(9, 9, 9)] * 256),
    }
    tar(tmp_path / "a.tar", members)
    text = refused(tmp_path, "--classes", "background", "cell")
    assert "class 'cell' has no pixel in 1 masks; 50 % of the pixels are ignored" in text
    assert "if 255 is a class, extract the tar and pack its files" in text


def test_images_without_masks_are_unlabelled(
    indexed, tmp_path: Path, call, make_checkpoint
) -> None:
    tar(
        tmp_path / "data" / "train.tar",
        {"a.jpg": encode_image(0, form="JPEG"), "b.png": encode_image(1)},
    )
    manifest = indexed(tmp_path / "data", "--alpha", "drop")
    (split,) = manifest.splits.items()
    assert (split[0], split[1].samples, split[1].shards[0].pixels) == ("unlabelled", 2, ())
    assert (manifest.classes, manifest.mask_format) == ((), {})
    found = list(samples(tmp_path / "data", manifest, "unlabelled"))
    assert [(sample.key, sample.mask) for sample in found] == [("a", None), ("b", None)]
    predict = (
        *("--checkpoint", make_checkpoint(), "--input", tmp_path / "data"),
        *("--out", tmp_path / "out"),
    )
    assert (ended := call("predict", *predict, "--workers", 0)).code == 0, ended.err


def test_one_of_two_images_of_a_sample_is_declared(index, indexed, tmp_path: Path) -> None:
    names = ("a.jpg", "a.depth.png", "b.jpg", "b.depth.png")
    tar(tmp_path / "a.tar", {name: encode_image(n) for n, name in enumerate(names)})
    ended = index(tmp_path)
    assert ended.code == 1
    assert "a.jpg and a.depth.png may be images of one sample (and 1 more: b.jpg" in ended.err
    manifest = indexed(tmp_path, "--image-ext", "jpg")
    assert manifest.splits["unlabelled"].samples == 2
    assert read_offsets(tmp_path / "a.tar")[0].image.name == "a.jpg"


def test_equal_keys_of_two_shards_are_refused_by_predict_with_or_without_a_manifest(
    indexed, call, make_checkpoint, tmp_path: Path
) -> None:
    for number in range(2):
        tar(tmp_path / "data" / f"{number}.tar", pairs("a", f"b{number}", first=5 * number))
    flags = ("--checkpoint", make_checkpoint(), "--input", tmp_path / "data", "--workers", 0)
    raw = call("predict", *flags, "--out", tmp_path / "raw")
    indexed(tmp_path / "data", *CLASSES)
    with_manifest = call("predict", *flags, "--out", tmp_path / "indexed")
    for ended in (raw, with_manifest):
        assert ended.code == 1
        assert "would write the same output; rename one of each" in ended.err
        assert "1.tar" in ended.err


def test_16_bit_images_need_a_range(indexed, refused, tmp_path: Path) -> None:
    deep = np.arange(12 * 16, dtype=np.uint16).reshape(12, 16) * 100
    tar(tmp_path / "a.tar", {"a.png": encoded(deep), "a.mask.png": encode_mask(0)})
    message = refused(tmp_path)
    assert (
        "a.png has more than 8 bits per pixel (mode I;16, values from 0 to 19100); choose"
        in message
    )
    manifest = indexed(tmp_path, *CLASSES, "--image-percentiles", 0, 100)
    assert manifest.image_format.range == (0, 19100)
    (sample,) = samples(tmp_path, manifest, "train")
    assert (sample.image.shape, sample.image.min(), sample.image.max()) == ((12, 16, 1), 0, 255)


def test_an_image_with_an_orientation_is_rotated_when_decoded(
    indexed, refused, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = decoded(encode_image(0))
    rotated = encoded(pixels, exif=exif)
    tar(tmp_path / "a.tar", {"a.png": rotated, "a.mask.png": encode_mask(0)})
    assert refused(tmp_path).startswith(
        "a.tar: a.mask.png is 16 x 12, its image a.png 12 x 16 after its EXIF "
        "rotation; extract the tar and pack its files"
    )
    tar(tmp_path / "a.tar", {"a.png": rotated, "a.mask.png": encode_mask(0, (16, 12))})
    (sample,) = samples(tmp_path, indexed(tmp_path), "train")
    np.testing.assert_array_equal(sample.image, np.rot90(pixels, -1))


# ---- json and other members


def test_other_members_are_ignored_and_counted(index, tmp_path: Path) -> None:
    members = pairs("a", "b")
    extra = {"a.txt": b"x", "b.txt": b"y", "a.cls": b"1", "._a.png": b"mac", "README": b"r"}
    tar(tmp_path / "train-0.tar", {**members, **extra, "lone.json": b"{}"})
    ended = index(tmp_path, *CLASSES)
    assert (ended.code, ended.err) == (0, "")
    assert (
        "  6 other members are ignored: .txt (2), .cls (1), hidden (1), without extension (1), "
        ".json (1)\n"
    ) in ended.out
    assert (tmp_path / "train-0.idx").read_text().splitlines()[0] == "v1.2 2"


@pytest.mark.parametrize(
    ("info", "taken"),
    [
        (b'{"group": "g"}', True),
        (b'{"source": "d/a.tif"}', True),
        (b'{"source": "COCO"}', False),
        (b'{"source": "../d/a.tif"}', False),
        (b'{"source": 7}', False),
        (b"[1]", False),
        (b"{", False),
        (b"\xff", False),
        (b"[" * 100_000, False),
    ],
)
def test_a_json_is_indexed_if_its_source_fits_the_key(
    info: bytes, taken: bool, index, call, content, tmp_path: Path
) -> None:
    tar(tmp_path / "data" / "a.tar", {"d/a.json": info, **pairs("d/a")})
    ended = index(tmp_path / "data", *CLASSES)
    assert ended.code == 0
    assert ("1 other members are ignored: .json (1)" in ended.out) == (not taken)
    assert (read_offsets(tmp_path / "data" / "a.tar")[0].info is not None) == taken
    assert call("unpack", "--data", tmp_path / "data", "--out", tmp_path / "out").code == 0
    assert set(content(tmp_path / "out")) == {"images/d/a.png", "masks/d/a.png", "unpack.json"}


# ---- splits


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train/0.tar", "train"),
        ("valid/0.tar", "val"),
        ("data/Validation/0.tar", "val"),
        ("testing-0.tar", "test"),
        ("train2017_0.tar", "train"),
        ("cells-val-000.tar", "val"),
        ("000.tar", "train"),
        ("trainval-0.tar", "train"),
        ("latest-0.tar", "train"),
    ],
)
def test_folders_and_names_decide_the_split(
    name: str, split: str, index, indexed, tmp_path: Path
) -> None:
    tar(tmp_path / name, pairs("a"))
    assert list(indexed(tmp_path).splits) == [split]
    (tmp_path / "index.json").unlink()
    assert list(indexed(tmp_path, *CLASSES, "--split", "test").splits) == ["test"]


def test_a_path_that_names_two_splits_is_refused(refused, tmp_path: Path) -> None:
    tar(tmp_path / "train" / "val-0.tar", pairs("a"))
    assert refused(tmp_path) == (
        "train/val-0.tar names the splits train and val; rename it, or use --split; "
        "nothing was written"
    )


# ---- repeatable


def test_the_result_does_not_depend_on_the_number_of_workers(
    indexed, content, tmp_path: Path
) -> None:
    for number in range(5):
        keys = (f"{number}a", f"{number}b")
        tar(tmp_path / "1" / f"s{number}.tar", pairs(*keys, first=number * 2))
        tar(tmp_path / "3" / f"s{number}.tar", pairs(*keys, first=number * 2))
    indexed(tmp_path / "1")
    indexed(tmp_path / "3", workers=3)
    assert content(tmp_path / "1") == content(tmp_path / "3")


def test_indexing_packed_shards_restores_the_manifest(
    indexed, draw, call, content, tmp_path
) -> None:
    folder = draw(tmp_path / "in", 12, values=(0, 1, 2, 255), name="sub.d/p {}")
    data = tmp_path / "data"
    ended = call(
        "pack",
        *("--images", folder / "images", "--masks", folder / "masks", "--out", data),
        *("--mask-format", "index", *CLASSES, "--ignore-value", 255, "--val-fraction", 0.3),
        *("--samples-per-shard", 3, "--workers", 1, "--allow-absent-classes"),
    )
    assert ended.code == 0, ended.err
    before, files = read_manifest(data), content(data)
    (data / "index.json").unlink()
    after = indexed(data, *CLASSES, "--allow-absent-classes")
    for name in ("classes", "palette", "image_format", "mean", "std", "splits", "duplicates"):
        assert getattr(after, name) == getattr(before, name), name
    files.pop("index.json")
    again = content(data)
    again.pop("index.json")
    assert again == files


def test_a_valid_idx_is_kept_and_a_missing_one_rewritten(indexed, content, tmp_path: Path) -> None:
    for name in "ab":
        tar(tmp_path / f"{name}.tar", pairs(name, first=ord(name)))
    indexed(tmp_path)
    before = content(tmp_path)
    (tmp_path / "index.json").unlink()
    (tmp_path / "a.idx").unlink()
    indexed(tmp_path)
    assert content(tmp_path) == before


def test_identical_images_are_warned_about(index, tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", {"a.png": encode_image(0), "a.mask.png": encode_mask(0)})
    tar(tmp_path / "1.tar", {"b.png": encode_image(0), "b.mask.png": encode_mask(0)})
    ended = index(tmp_path, *CLASSES)
    assert "1 groups of identical images, the first: train:a.png = train:b.png" in ended.out
    assert read_manifest(tmp_path).duplicates == (("train:a.png", "train:b.png"),)


def test_unintended_contents_are_warned_about(index, tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", pairs("000"))
    tar(tmp_path / "1.tar", pairs("000", first=1))
    tar(tmp_path / "2.tar", {"notes.txt": b"nothing"})
    ended = index(tmp_path, *CLASSES)
    assert (ended.code, ended.err) == (0, "")
    message = ended.out.splitlines()
    assert message[0] == f"{tmp_path}: RGB images"
    assert message[1] == "  train            2 samples, 2 shards; 16 x 12 RGB (2)"
    assert "  warning: 1 shards without samples are ignored, the first: 2.tar" in message
    assert (
        "  warning: 1 names occur in several shards, the first: 000.png; "
        "training uses all samples, but unpack and predict write one result per name"
    ) in message
    assert "  warning: split val is empty; put `val` into the path of some shards" in message
    assert message[-1] == f"next: unet train --data {tmp_path} --run-dir RUN"
    assert not (tmp_path / "2.idx").exists()


# ---- errors


def end_of_members(path: Path, members: Members) -> int:
    """Write a tar and return the offset at which its members end."""
    with tarfile.open(tar(path, members)) as archive:
        last = archive.getmembers()[-1]
    return last.offset_data + -(-last.size // 512) * 512


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda end: end, "is truncated: no end marker after 4 members"),
        (lambda end: end + 100, "is truncated: no end marker after 4 members"),
        (lambda end: end - 1, "is truncated or not a tar (unexpected end of data)"),
        (lambda end: end - 450, "is truncated or not a tar (unexpected end of data)"),
        (lambda end: 300, "is truncated or not a tar (truncated header)"),
        (lambda end: 0, "is truncated or not a tar (empty file)"),
    ],
)
def test_a_truncated_tar_is_refused(cut, message: str, refused, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    end = end_of_members(path, pairs("a", "b"))
    path.write_bytes(path.read_bytes()[: cut(end)])
    assert refused(tmp_path) == f"a.tar {message}; copy or write it again; nothing was written"


def test_a_tar_truncated_in_a_later_header_is_refused(refused, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    end = end_of_members(path, pairs("a"))
    tar(path, pairs("a", "b"))
    path.write_bytes(path.read_bytes()[: end + 300])
    assert refused(tmp_path).startswith("a.tar is truncated: no end marker after 2 members; copy")


def test_a_damaged_header_is_refused(refused, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    end = end_of_members(path, pairs("a"))
    data = bytearray(tar(path, pairs("a", "b")).read_bytes())
    data[end] ^= 1
    path.write_bytes(data)
    assert refused(tmp_path).startswith(
        f"a.tar is damaged: no tar header at byte {end:,}; copy or write it again"
    )


def test_concatenated_tars_are_refused(refused, tmp_path: Path) -> None:
    end = end_of_members(tmp_path / "a.tar", pairs("a"))
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data + data)
    assert refused(tmp_path).startswith(
        f"a.tar has data after its end marker at byte {end:,}, as concatenated tars do; split it"
    )


def grey(value: int, **options: Any) -> bytes:
    return encoded(np.full((12, 16), value, np.uint8), **options)


REPACK = "extract the tar and pack its files (unet pack, see --mask-suffix)"
SPACE = (
    "has whitespace in its name or is not UTF-8, but the fields of an .idx are separated by spaces"
)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"b.png": encode_image(1)}, "b.png has no mask; see --image-ext and --mask-ext"),
        ({"b.mask.png": encode_mask(1)}, "b.mask.png has no image; see --image-ext and --mask-ext"),
        (
            {"./a.png": encode_image(1)},
            "./a.png occurs twice; keep one of them",
        ),
        (
            {"a.jpg": encode_image(1)},
            "a.jpg and a.png are two images of the same key; name the extension of the images",
        ),
        (
            {"a.MASK.png": encode_mask(1)},
            "a.MASK.png and a.mask.png are two masks of the same key; keep one",
        ),
        (
            {"../b.png": encode_image(1)},
            "'../b.png' would be extracted outside the target folder; write the tar",
        ),
        (
            {"/b.png": encode_image(1)},
            "'/b.png' would be extracted outside the target folder; write the tar",
        ),
        (pairs("b c"), f"'b c.png' {SPACE}"),
        (pairs("b\nc"), f"'b\\nc.png' {SPACE}"),
        (pairs("b\u2028c"), f"'b\\u2028c.png' {SPACE}"),
        (pairs("b\udcffc"), f"'b\\udcffc.png' {SPACE}"),
        (
            {"b.png": b"nothing", "b.mask.png": encode_mask(1)},
            "b.png is not a readable image; repair or remove it",
        ),
        (
            {"b.png": encode_image(1)[:200], "b.mask.png": encode_mask(1)},
            "b.png is damaged",
        ),
        (
            {"b.png": encode_image(1), "b.mask.png": encode_mask(1)[:60]},
            "b.mask.png is damaged",
        ),
        (
            {"b.png": encode_image(1), "b.mask.png": encode_mask(1, (12, 15))},
            f"b.mask.png is 15 x 12, its image b.png 16 x 12; {REPACK}",
        ),
        (
            {"b.png": encode_image(1), "b.mask.png": grey(7)},
            "b.mask.png contains values without a class: 7: 192 px; name all classes with "
            f"--classes, or {REPACK}",
        ),
        (
            {"b.png": encode_image(1), "b.mask.png": grey(0, form="JPEG")},
            "b.mask.png is JPEG of mode L; masks in shards must be PNG of mode P or L whose pixel "
            f"value is the class index: {REPACK}",
        ),
        (
            {"b.png": encode_image(1), "b.mask.png": encode_image(1)},
            "b.mask.png is PNG of mode RGB; masks in shards must be PNG of mode P or L",
        ),
        (
            {"b.png": encode_image(1), "b.mask.png": encoded(np.ones((12, 16), bool))},
            "b.mask.png is PNG of mode 1; masks in shards must be PNG of mode P or L",
        ),
        (
            {"b.png": encode_image(1), "b.mask.png": encoded(np.ones((12, 16), np.uint16))},
            "b.mask.png is PNG of mode I;16; masks in shards must be PNG of mode P or L",
        ),
        (
            {
                "b.tif": encoded(
                    np.zeros((12, 16), np.uint8),
                    "TIFF",
                    save_all=True,
                    append_images=[Image.new("L", (16, 12))],
                ),
                "b.mask.png": encode_mask(1),
            },
            f"b.tif contains several frames; {REPACK}",
        ),
        (
            {
                "b.png": encoded(np.zeros((12, 16, 4), np.uint8)),
                "b.mask.png": encode_mask(1),
            },
            "b.png has transparent pixels; flatten it onto a background, or add --alpha drop to "
            "keep them in their colour",
        ),
    ],
)
def test_invalid_samples_are_refused(
    members: Members, message: str, refused, tmp_path: Path
) -> None:
    tar(tmp_path / "sub" / "t.tar", {**pairs("a"), **members})
    tar(tmp_path / "good.tar", pairs("g", first=50))
    # If two members share a key, the member without a pair is a second problem.
    assert f"sub/t.tar: {message}" in refused(tmp_path)


def test_a_duplicate_name_is_refused(refused, tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", pairs("a"))
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("a.png")
        archive.addfile(info)
    assert refused(tmp_path) == ("a.tar: a.png occurs twice; keep one of them; nothing was written")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(kind: bytes, refused, tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", pairs("a"))
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("b.png")
        info.type, info.linkname = kind, "a.png"
        archive.addfile(info)
    assert refused(tmp_path) == (
        "a.tar: 'b.png' is a link, device or sparse file; write the tar without it; "
        "nothing was written"
    )


def test_folders_in_a_tar_are_ignored(indexed, tmp_path: Path) -> None:
    for part in ("d/a.png", "d/a.mask.png"):
        (tmp_path / "in" / part).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / part).write_bytes(encode_mask(0) if "mask" in part else encode_image(0))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "in", "./")
    assert indexed(tmp_path).splits["train"].samples == 1


def test_an_empty_tar_is_refused(refused, tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {})
    assert refused(tmp_path).endswith("1 shards without an image; see --image-ext")


def test_masks_without_classes_are_refused(refused, tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", pairs("a"))
    assert refused(tmp_path, "--alpha", "drop") == (
        "a.tar: a.mask.png is a mask; name the classes with --classes; nothing was written"
    )


def test_one_image_in_two_splits_is_refused(refused, tmp_path: Path) -> None:
    tar(tmp_path / "train.tar", pairs("a"))
    tar(tmp_path / "val.tar", pairs("b"))
    assert refused(tmp_path) == (
        "train.tar: a.png (train) = val.tar: b.png (val) are the same image in two splits; "
        "remove it from one; nothing was written"
    )


def test_an_idx_of_another_tool_is_kept(refused, tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", pairs("a"))
    (tmp_path / "a.idx").write_text("v1.1 1\n")
    assert refused(tmp_path).startswith("a.idx exists with other content;")


def test_problems_of_all_shards_are_reported_at_once(refused, tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {**pairs("a"), "b.png": encode_image(3), "c.png": encode_image(4)})
    (tmp_path / "b.tar").write_bytes(b"no tar")
    tar(tmp_path / "train" / "val.tar", pairs("v", first=9))
    message = refused(tmp_path).splitlines()
    assert message[0] == "4 problems (nothing was written):"
    assert message[1] == (
        "  a.tar: b.png has no mask (and 1 more: c.png); see --image-ext and --mask-ext"
    )
    assert [line.split()[0] for line in message[2:]] == ["b.tar", "train/val.tar"]


def test_a_rerun_with_the_same_settings_reports_that(
    index, indexed, content, tmp_path: Path
) -> None:
    tar(tmp_path / "a.tar", pairs("a", "b"))
    indexed(tmp_path, *CLASSES)
    before = content(tmp_path)
    ended = index(tmp_path, *CLASSES)
    assert (ended.code, ended.err) == (0, "")
    assert "is already indexed with these settings; nothing was written" in ended.out
    assert content(tmp_path) == before
    message = "is already a data set, with other contents or settings; remove its index.json"
    assert message in index(tmp_path, *CLASSES, "--split", "val").err
    tar(tmp_path / "b.tar", pairs("c", first=7))
    assert message in index(tmp_path, *CLASSES).err


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_compressed_shards_are_refused(name: str, refused, tmp_path: Path) -> None:
    path = tar(tmp_path / "a", pairs("a"))
    (tmp_path / name).write_bytes(gzip.compress(path.read_bytes()))
    assert f"{name} is compressed; decompress it: samples are read by byte offset" in refused(
        tmp_path
    )


def test_a_folder_without_shards_is_refused(index, refused, tmp_path: Path) -> None:
    assert refused(tmp_path).endswith("contains no shards (*.tar); pack images with unet pack")
    ended = index(tmp_path / "nowhere", *CLASSES)
    assert (ended.code, ended.err) == (
        1,
        f"unet index: FOLDER {tmp_path / 'nowhere'}: does not exist; check the path\n",
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--classes", "one"), "--classes: there must be 2 to 255 classes, got 1"),
        (("--classes", "a", "a"), "--classes: duplicate name in a a"),
        (("--split", "val"), "--split needs --classes"),
        ((*CLASSES, "--split", "vall"), "vall"),
        (
            (*CLASSES, "--image-ext", "json"),
            "--image-ext json: not an extension of images in shards; json, mask.png",
        ),
        ((*CLASSES, "--mask-ext", "json"), "--mask-ext json: not an extension of masks in shards"),
        (
            (*CLASSES, "--image-ext", "png", "--mask-ext", "png"),
            "--mask-ext png is also the only --image-ext",
        ),
        ((*CLASSES, "--image-range", 9, 3), "--image-range 9 3: must be LOW HIGH within 0 65535"),
        (
            (*CLASSES, "--image-range", 0, 9, "--image-percentiles", 0, 9),
            "--image-range and --image-percentiles exclude each other",
        ),
        ((*CLASSES, "--workers", -1), "--workers must be >= 0, got -1"),
    ],
)
def test_wrong_flags_are_refused(
    flags: tuple[object, ...], message: str, call, tmp_path: Path
) -> None:
    ended = call("index", tmp_path, *flags)
    assert ended.code == 2
    assert message in ended.message
