"""Packing: the same bytes for any workers and kills, a true manifest, and refusals that say why."""

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from shards.index import ShardIndex, read_manifest
from shards.pairs import hash_fraction

Folder = Path


def flags(folder: Path, out: Path, *more: object, mask_format: str = "binary") -> list[object]:
    return [
        *("--images", folder / "images", "--masks", folder / "masks", "--out", out),
        *("--mask-format", mask_format, "--workers", 1, *more),
    ]


def picture(colour: int = 9, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour if mode != "RGB" else (colour,) * 3)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A folder with one good pair, `a.png`, 20 x 16."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    picture().save(tmp_path / "images" / "a.png")
    mask = np.zeros((16, 20), np.uint8)
    mask[4:8, 4:8] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    return tmp_path


# ---- what a data set holds


def test_the_manifest_says_what_is_in_the_shards(shards: Path, cells: Path, call) -> None:
    manifest = read_manifest(shards)
    assert manifest.classes == ("background", "foreground")
    assert manifest.channels == "RGB"
    assert {name: split.samples for name, split in manifest.splits.items()} == {
        "train": 8,
        "val": 4,
    }
    assert [s.name for s in manifest.splits["train"].shards] == [
        f"train-{i:06d}.tar" for i in range(3)
    ]
    train, foreground, ignored = [], 0, 0
    for name, split in manifest.splits.items():
        ((size),) = split.sizes
        assert (size.width, size.height, size.mode, size.images) == (48, 48, "RGB", split.samples)
        for shard in split.shards:
            data = (shards / shard.name).read_bytes()
            assert len(data) == shard.bytes
            assert hashlib.sha256(data).hexdigest() == shard.sha256
            pixels = np.zeros(256, np.int64)
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    if member.name.endswith(".mask.png"):
                        mask = np.asarray(Image.open(io.BytesIO(file.read())))
                        pixels += np.bincount(mask.ravel(), minlength=256)
                    elif member.name.endswith(".png") and name == "train":
                        train.append(np.asarray(Image.open(io.BytesIO(file.read()))) / 255)
            assert shard.pixels == (pixels[0], pixels[1], pixels[255])
            foreground, ignored = foreground + pixels[1], ignored + pixels[255]
    in_files = [np.asarray(Image.open(path)) for path in (cells / "masks").iterdir()]
    assert foreground == sum((mask == 255).sum() for mask in in_files)
    assert ignored == 0
    pixels = np.concatenate([image.reshape(-1, 3) for image in train])
    np.testing.assert_allclose(manifest.mean, pixels.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(manifest.std, pixels.std(axis=0), atol=1e-6)


def test_a_sample_is_its_pictures_own_bytes_with_a_canonical_mask(
    shards: Path, cells: Path
) -> None:
    seen = set()
    for shard in sorted(shards.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
            content = {m.name: tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]
            assert {(m.mtime, m.uid, m.gid, m.mode) for m in members} == {(0, 0, 0, 0o644)}
        for triple in zip(*[iter(content)] * 3, strict=True):
            key = triple[0].split(".")[0]
            assert triple == (f"{key}.json", f"{key}.mask.png", f"{key}.png")
            assert content[f"{key}.png"] == (cells / "images" / f"{key}.png").read_bytes()
            assert json.loads(content[f"{key}.json"]) == {
                "source": f"{key}.png",
                "width": 48,
                "height": 48,
                "group": None,
            }
            mask = Image.open(io.BytesIO(content[f"{key}.mask.png"]))
            drawn = np.asarray(Image.open(cells / "masks" / f"{key}.png"))
            assert mask.mode == "P"
            np.testing.assert_array_equal(np.asarray(mask), drawn // 255)
            seen.add(key)
    assert len(seen) == 12


def test_the_index_files_point_at_the_members(shards: Path) -> None:
    for shard in sorted(shards.glob("*.tar")):
        data, index = shard.read_bytes(), ShardIndex(shard)
        with tarfile.open(shard) as tar:
            expected = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        found = {
            member.name: data[member.offset : member.offset + member.size]
            for row in range(len(index))
            for member in (index[row].image, index[row].mask, index[row].info)
            if member is not None
        }
        assert found == expected


def test_stock_webdataset_reads_the_shards(shards: Path) -> None:
    files = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = list(webdataset.WebDataset(files, shardshuffle=False))
    assert len({sample["__key__"] for sample in samples}) == 12
    assert all({"png", "mask.png", "json"} <= set(sample) for sample in samples)


def test_pictures_without_masks_become_unlabelled_shards(cells: Path, call, tmp_path: Path) -> None:
    ended = call("pack", "--images", cells / "images", "--out", tmp_path / "out", "--workers", 1)
    assert ended.code == 0
    manifest = read_manifest(tmp_path / "out")
    assert {name: split.samples for name, split in manifest.splits.items()} == {"unlabelled": 12}
    assert manifest.classes == ()
    with tarfile.open(tmp_path / "out" / "unlabelled-000000.tar") as tar:
        assert not [name for name in tar.getnames() if "mask" in name]


def test_a_split_is_decided_by_the_hash_of_the_key(draw, call, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 40, size=(16, 16))
    ended = call("pack", *flags(folder, tmp_path / "out"), "--val-fraction", 0.3)
    assert ended.code == 0
    manifest = read_manifest(tmp_path / "out")
    keys = [f"p{i:03d}" for i in range(40)]
    assert manifest.splits["val"].samples == sum(hash_fraction(key) < 0.3 for key in keys)


def test_a_group_never_spans_two_splits(draw, call, tmp_path: Path) -> None:
    for patient in range(8):
        draw(tmp_path / "in", 3, size=(16, 16), name=f"patient{patient}/{{}}", seed=patient)
    more = ("--group-by", r"patient(\d+)", "--val-fraction", 0.5)
    assert call("pack", *flags(tmp_path / "in", tmp_path / "out", *more)).code == 0
    splits: dict[str, set[str]] = {}
    for shard in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(shard) as tar:
            for name in tar.getnames():
                if name.endswith(".json"):
                    info = json.loads(tar.extractfile(name).read())  # type: ignore[union-attr]
                    assert info["group"] == info["source"][7]
                    splits.setdefault(info["group"], set()).add(shard.name.split("-")[0])
    assert len(splits) == 8
    assert all(len(names) == 1 for names in splits.values())
    assert {"train", "val"} == {name for names in splits.values() for name in names}


def test_an_empty_validation_split_is_said(pair: Path, call) -> None:
    ended = call("pack", *flags(pair, pair / "out", "--val-fraction", 0))
    assert ended.code == 0
    assert "no sample fell into val" in ended.out


def test_a_class_that_occurs_nowhere_is_said(pair: Path, call) -> None:
    more = ("--mask-values", 0, 255, 7, "--classes", "ground", "cell", "ghost")
    ended = call("pack", *flags(pair, pair / "out", *more, mask_format="values"))
    assert ended.code == 0
    assert "no pixel of the class 'ghost'" in ended.out


def test_equal_pictures_are_named(pair: Path, call) -> None:
    for part in ("images", "masks"):
        shutil.copy(pair / part / "a.png", pair / part / "b.png")
    ended = call("pack", *flags(pair, pair / "out", "--val-fraction", 0))
    assert read_manifest(pair / "out").duplicates == (("train:a.png", "train:b.png"),)
    assert "train:a.png = train:b.png" in ended.out


def test_a_picture_with_an_orientation_is_stored_upright(pair: Path, call) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 16, 3)).astype(np.uint8)
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(pair / "images" / "a.png", exif=exif)
    ended = call("pack", *flags(pair, pair / "out", "--val-fraction", 0))
    assert ended.code == 0
    assert "1 pictures with an EXIF orientation are stored upright" in ended.out
    with tarfile.open(pair / "out" / "train-000000.tar") as tar:
        stored = Image.open(io.BytesIO(tar.extractfile("a.png").read()))  # type: ignore[union-attr]
        info = json.loads(tar.extractfile("a.json").read())  # type: ignore[union-attr]
    np.testing.assert_array_equal(np.asarray(stored), np.rot90(pixels, -1))
    assert 0x0112 not in stored.getexif()
    assert (info["width"], info["height"]) == (20, 16)


def test_grey_pictures_make_a_grey_data_set_and_one_in_colour_makes_it_rgb(
    draw, call, tmp_path: Path
) -> None:
    folder = draw(tmp_path / "in", 4, mode="L")
    assert call("pack", *flags(folder, tmp_path / "grey")).code == 0
    assert read_manifest(tmp_path / "grey").channels == "L"
    assert len(read_manifest(tmp_path / "grey").mean) == 1
    draw(folder, 1, name="c{}")
    assert call("pack", *flags(folder, tmp_path / "both")).code == 0
    assert read_manifest(tmp_path / "both").channels == "RGB"


def test_a_shard_is_closed_at_its_size(draw, call, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 6)
    more = ("--val-fraction", 0, "--shard-bytes", 15_000)
    assert call("pack", *flags(folder, tmp_path / "out", *more)).code == 0
    shards = read_manifest(tmp_path / "out").splits["train"].shards
    assert len(shards) > 1
    assert sum(shard.samples for shard in shards) == 6


def test_what_has_no_partner_is_left_out_on_request(pair: Path, call) -> None:
    picture().save(pair / "images" / "b.png")
    ended = call("pack", *flags(pair, pair / "out", "--skip-unpaired"))
    assert ended.code == 0
    assert sum(split.samples for split in read_manifest(pair / "out").splits.values()) == 1


def test_suffixes_tell_pictures_from_masks_in_one_folder(pair: Path, call) -> None:
    (pair / "masks" / "a.png").rename(pair / "images" / "a_mask.png")
    picture().save(pair / "images" / "a_photo.png")
    folders = ("--images", pair / "images", "--masks", pair / "images", "--mask-format", "binary")
    suffixes = ("--image-suffix", "_photo", "--mask-suffix", "_mask", "--workers", 1)
    assert call("pack", *folders, *suffixes, "--out", pair / "out").code == 0
    assert [s.samples for s in read_manifest(pair / "out").splits.values()] == [1]


# ---- the same bytes, whatever happens


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, draw) -> Path:
    return draw(tmp_path_factory.mktemp("many"), 60, size=(160, 160))


@pytest.fixture(scope="module")
def undisturbed(many: Path, tmp_path_factory: pytest.TempPathFactory, call, content):
    """The bytes of a data set of 60 samples in shards of 2, packed by one process in one go."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert call("pack", *flags(many, out, "--samples-per-shard", 2)).code == 0
    files = content(out)
    assert len([name for name in files if name.endswith(".tar")]) > 25
    assert {Path(name).suffix for name in files} == {".tar", ".idx", ".json"}
    return files


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    workers: int, many: Path, undisturbed: dict[str, bytes], tmp_path: Path, call, content
) -> None:
    more = ("--samples-per-shard", 2, "--workers", workers)
    assert call("pack", *flags(many, tmp_path / "out", *more)).code == 0
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("workers", [1, 2])
def test_after_any_number_of_kills_the_bytes_are_the_same_and_nothing_is_done_twice(
    workers: int, many: Path, undisturbed, tmp_path: Path, spawn, wait_for, kill, content
) -> None:
    out = tmp_path / "out"
    command = ("pack", *flags(many, out, "--samples-per-shard", 2, "--workers", workers))
    finished: dict[Path, tuple[int, int]] = {}
    num_kills = 0
    for target in (1, 5, 12, 20):
        process = spawn(*command)
        wait_for(lambda t=target: len([*out.glob("*.tar")]) >= t, f"shard {target}")
        kill(process)
        if (out / "index.json").exists():
            break
        num_kills += 1
        for path in out.glob("*.tar"):
            stat = (path.stat().st_ino, path.stat().st_mtime_ns)
            assert finished.setdefault(path, stat) == stat
    assert num_kills >= 2
    process = spawn(*command)
    said, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint
    assert "shards are there already" in said
    for path, stat in finished.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == stat
    assert {n: data for n, data in content(out).items() if not n.startswith(".")} == undisturbed


def killed_at(rename: int, before: bool, arguments: list[str]) -> None:
    """Packs, and dies by SIGKILL just before or after the rename of that number."""
    from pipelines import pack

    replace, count = os.replace, 0

    def counting(source: object, target: object) -> None:
        nonlocal count
        count += 1
        if count == rename and before:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)  # type: ignore[arg-type]
        if count == rename:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counting  # type: ignore[assignment]
    os._exit(pack.main(arguments))


# Two shards: the plan, then index, report and shard of each, then the manifest.
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("rename", range(1, 9))
def test_a_kill_at_any_rename_leaves_nothing_behind(
    rename: int, before: bool, draw, call, content, tmp_path: Path
) -> None:
    folder = draw(tmp_path / "in", 4, size=(16, 16))
    more = ("--samples-per-shard", 2, "--val-fraction", 0)
    assert call("pack", *flags(folder, tmp_path / "whole", *more)).code == 0
    out = tmp_path / "out"
    arguments = [str(flag) for flag in flags(folder, out, *more)]
    process = multiprocessing.get_context("fork").Process(
        target=killed_at, args=(rename, before, arguments)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    was_finished = (out / "index.json").exists()
    assert was_finished == (rename == 8 and not before)
    ended = call("pack", *arguments)
    assert ended.code == (1 if was_finished else 0), ended.err
    assert content(out) == content(tmp_path / "whole")


# ---- going on with something else


@pytest.fixture
def begun(draw, call, tmp_path: Path) -> tuple[Path, Path]:
    """Four pictures, and a folder whose packing stopped before the manifest was written."""
    folder = draw(tmp_path / "in", 4, size=(16, 16))
    (folder / "masks" / "p002.png").write_bytes(b"")
    ended = call("pack", *flags(folder, tmp_path / "out", "--samples-per-shard", 1))
    assert ended.code == 1
    assert len([*(tmp_path / "out").glob("*.tar")]) == 3
    return folder, tmp_path / "out"


def test_a_picture_that_has_changed_since_the_plan_is_named(begun, call) -> None:
    folder, out = begun
    picture(size=(16, 16)).save(folder / "images" / "p001.png")
    ended = call("pack", *flags(folder, out, "--samples-per-shard", 1))
    assert ended.code == 1
    assert "begun with another plan: 1 pictures or masks have changed, p001.png" in ended.err


def test_a_picture_that_is_new_or_gone_is_named(begun, draw, call) -> None:
    folder, out = begun
    draw(folder, 1, size=(16, 16), name="new{}")
    ended = call("pack", *flags(folder, out, "--samples-per-shard", 1))
    assert (ended.code, "1 pictures are new, new0.png" in ended.err) == (1, True)
    for part in ("images", "masks"):
        (folder / part / "new0.png").unlink()
        (folder / part / "p000.png").unlink()
    ended = call("pack", *flags(folder, out, "--samples-per-shard", 1))
    assert (ended.code, "1 pictures are gone, p000.png" in ended.err) == (1, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--invert",), "other classes or another mask format"),
        (("--classes", "soil", "plant"), "other classes or another mask format"),
        (("--seed", 5), "other splits, shard sizes or seed"),
        (("--samples-per-shard", 2), "other splits, shard sizes or seed"),
    ],
)
def test_settings_that_differ_from_the_plan_are_refused(begun, change, said, call) -> None:
    folder, out = begun
    ended = call("pack", *flags(folder, out, "--samples-per-shard", 1, *change))
    assert ended.code == 1
    assert said in ended.err


def test_a_finished_data_set_is_left_alone(shards: Path, cells: Path, call, content) -> None:
    before = content(shards)
    ended = call("pack", *flags(cells, shards))
    assert ended.code == 1
    assert "is a finished data set" in ended.err
    assert content(shards) == before


def test_shards_of_something_else_are_left_alone(pair: Path, call) -> None:
    (pair / "out").mkdir()
    (pair / "out" / "other.tar").write_bytes(b"")
    ended = call("pack", *flags(pair, pair / "out"))
    assert ended.code == 1
    assert "holds shards of something else (other.tar)" in ended.err


# ---- bad input: each with the message that it gets


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def cut_picture(folder: Path) -> None:
    path = folder / "images" / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 20, 3)).astype(np.uint8)).save(
        path
    )
    path.write_bytes(path.read_bytes()[:-200])


def frames(folder: Path) -> None:
    (folder / "images" / "a.png").unlink()
    picture(mode="L").save(
        folder / "images" / "a.gif", save_all=True, append_images=[picture(99, mode="L")]
    )


def save_mask(pixels: np.ndarray) -> Callable[[Folder], None]:
    return lambda folder: Image.fromarray(pixels).save(folder / "masks" / "a.png")


def save_image(image: Image.Image, name: str = "a.png") -> Callable[[Folder], None]:
    def save(folder: Path) -> None:
        (folder / "images" / "a.png").unlink()
        image.save(folder / "images" / name)

    return save


def write(part: str, name: str, data: bytes) -> Callable[[Folder], object]:
    return lambda folder: (folder / part / name).write_bytes(data)


def levels(*values: int) -> np.ndarray:
    pixels = np.zeros((16, 20), np.uint8)
    pixels[0, : len(values)] = values
    return pixels


BAD_FILES: dict[str, tuple[Callable[[Folder], object], str]] = {
    "no folder": (lambda f: shutil.rmtree(f / "images"), "images is no folder"),
    "no picture": (lambda f: (f / "images" / "a.png").unlink(), "holds no picture (.bmp"),
    "no mask": (save_image(picture(), "b.png"), "b.png has no mask in"),
    "no partner": (lambda f: picture().save(f / "masks" / "c.png"), "c.png has no picture in"),
    "two of a name": (lambda f: picture().save(f / "images" / "a.bmp"), "have one name; keep one"),
    "empty": (write("images", "a.png", b""), "a.png is empty; repair or remove it"),
    "text": (write("images", "a.png", b"hello, I am text"), "a.png is no picture that can be read"),
    "cut": (cut_picture, "a.png is damaged ("),
    "bomb": (write("images", "a.png", png_that_claims(60_000, 60_000)), "claims 60000 x 60000"),
    "frames": (frames, "a.gif holds 2 frames; write the one"),
    "16 bit": (
        save_image(Image.fromarray(np.zeros((16, 20), np.uint16))),
        "a.png has more than 8 bits a pixel (mode I;16)",
    ),
    "float": (
        save_image(Image.fromarray(np.zeros((16, 20), np.float32)), "a.tif"),
        "a.tif has more than 8 bits a pixel (mode F)",
    ),
    "transparent": (save_image(picture(mode="RGBA")), "a.png has transparent pixels; flatten"),
    "CMYK": (save_image(picture(mode="CMYK"), "a.jpg"), "a.jpg has mode CMYK"),
    "sizes": (
        save_mask(np.zeros((16, 21), np.uint8)),
        "a.png is 21 x 16, its picture",
    ),
    "not binary": (
        save_mask(levels(7, 7, 255)),
        "a.png is not binary, it holds 0: 317 px, 7: 2 px, 255: 1 px; use --mask-threshold 128",
    ),
    "colour mask": (
        lambda f: Image.new("RGB", (20, 16), (1, 2, 3)).save(f / "masks" / "a.png"),
        "a.png is a colour picture (mode RGB)",
    ),
    "wide mask": (
        save_mask(np.full((16, 20), 300, np.uint16)),
        "a.png holds values up to 300; at most 255 classes",
    ),
    "cut mask": (write("masks", "a.png", b"\x89PNG"), "masks/a.png is no picture that can be read"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_by_name_with_a_remedy(case: str, pair: Path, call) -> None:
    spoil, said = BAD_FILES[case]
    spoil(pair)
    ended = call("pack", *flags(pair, pair / "out"))
    assert ended.code == 1
    assert said in ended.err
    assert "Traceback" not in ended.err
    assert not (pair / "out" / "index.json").exists()


def test_a_refusal_is_one_line(pair: Path, spawn) -> None:
    for part in ("images", "masks"):
        shutil.copy(pair / part / "a.png", pair / part / "b.png")
    (pair / "images" / "b.png").write_bytes(b"")
    process = spawn("pack", *flags(pair, pair / "out", "--val-fraction", 0))
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 1
    ((line),) = complaint.splitlines()
    assert line.startswith("unet pack: ")
    assert "b.png is empty" in line


def test_all_bad_files_are_named_at_once(draw, call, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 5, size=(16, 16))
    for number in (1, 3):
        (folder / "images" / f"p{number:03d}.png").write_bytes(b"")
    ended = call("pack", *flags(folder, tmp_path / "out"))
    assert ended.code == 1
    assert "2 problems" in ended.err
    assert "p001.png is empty" in ended.err
    assert "p003.png is empty" in ended.err


@pytest.mark.parametrize(
    ("pixels", "more", "said"),
    [
        (levels(1, 2, 2), ("--classes", "a", "b"), "without a class: 2: 2 px; if these pixels do"),
        (levels(1, 5, 6), ("--classes", "a", "b"), "5: 1 px, 6: 1 px; 2 classes allow 0 to 1"),
        (levels(1, 2), ("--classes", "a", "b"), "add --ignore-value 2"),
    ],
)
def test_a_value_without_a_class_is_named_with_its_pixel_count(
    pixels: np.ndarray, more: tuple[str, ...], said: str, pair: Path, call
) -> None:
    save_mask(pixels)(pair)
    ended = call("pack", *flags(pair, pair / "out", *more, mask_format="index"))
    assert ended.code == 1
    assert said in ended.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--val-fraction", 1.5), "are shares, 0 to 1"),
        (("--val-fraction", 0.6, "--test-fraction", 0.4), "leave nothing to train on"),
        (("--samples-per-shard", 0), "must be above 0"),
        (("--workers", -1), "--workers not below"),
        (("--mask-format", "index"), "--mask-format index needs --classes"),
        (("--classes", "a", "b", "c"), "binary masks have 2 classes, got 3 names"),
        (("--classes", "a", "a"), "two classes have one name: a a"),
        (("--mask-values", 0, 1), "mask values belong to the format `values`"),
        (("--ignore-value", 256), "mask values are 0 to 255, got 256"),
        (
            ("--mask-format", "values", "--mask-values", 0, 1, "--classes", "a", "b", "c"),
            "2 mask values for 3 classes",
        ),
        (
            ("--mask-format", "values", "--mask-values", 4, 4, "--classes", "a", "b"),
            "a mask value stands for two classes",
        ),
        (
            ("--mask-format", "index", "--classes", "a", "b", "--invert"),
            "--invert and --mask-threshold belong to `binary`",
        ),
        (("--mask-format", "index", "--classes", "one"), "there must be 2 to 255 classes, got 1"),
        (("--mask-format", "palette"), "palette"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_read(
    change: tuple[object, ...], said: str, call, tmp_path: Path
) -> None:
    ended = call("pack", *flags(tmp_path / "in", tmp_path / "out"), *change)
    assert ended.code == 2
    assert said in ended.said
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--masks", "m"), "--masks needs --mask-format"),
        (("--mask-format", "binary"), "--mask-format needs --masks"),
        (("--split-file", "s.csv"), "--split-file needs --masks"),
    ],
)
def test_masks_and_their_format_go_together(given, said: str, call, tmp_path: Path) -> None:
    ended = call("pack", "--images", tmp_path, "--out", tmp_path / "out", *given)
    assert ended.code == 2
    assert said in ended.said


def test_classes_of_unlabelled_pictures_do_no_harm(pair: Path, call) -> None:
    given = ("--images", pair / "images", "--out", pair / "out", "--classes", "ground", "cell")
    ended = call("pack", *given, "--workers", 1)
    assert ended.code in (0, 2)
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (b"name,split\na.png,val\n", "must begin with the line path,split"),
        (b"path,split\na.png,holdout\n", "line 2: 'holdout' is none of train, val, test"),
        (b"path,split\na.png,val\na.png,train\n", "line 3: a.png stands there twice"),
        (b"path,split\n", "a.png is not in"),
        (b"path,split\na.png,val\nb.png,val\n", "lists b.png, which is not there"),
        (None, "No such file or directory"),
        (b"path,split\n\xff\xfe.png,val\n", "split.csv"),
    ],
)
def test_a_split_file_names_every_picture_once(
    lines: bytes | None, said: str, pair: Path, call
) -> None:
    path = pair / "split.csv"
    if lines is not None:
        path.write_bytes(lines)
    ended = call("pack", *flags(pair, pair / "out", "--split-file", path))
    assert ended.code == 1
    assert said in ended.err


@pytest.mark.parametrize(
    ("expression", "code", "said"),
    [("nobody", 1, "a.png does not match --group-by 'nobody'"), ("(", 2, "--group-by")],
)
def test_a_group_expression_must_be_one_and_match(
    expression: str, code: int, said: str, pair: Path, call
) -> None:
    ended = call("pack", *flags(pair, pair / "out", "--group-by", expression))
    assert ended.code == code
    assert said in ended.said


def test_pictures_and_masks_in_one_folder_need_to_be_parted(pair: Path, call) -> None:
    folders = ("--images", pair / "images", "--masks", pair / "images", "--out", pair / "out")
    ended = call("pack", *folders, "--mask-format", "binary")
    assert ended.code == 1
    assert "part them: unet separate" in ended.err


def test_a_file_cannot_be_the_folder_for_the_shards(pair: Path, call) -> None:
    (pair / "out").write_text("")
    ended = call("pack", *flags(pair, pair / "out"))
    assert ended.code == 2
    assert "is a file, not a folder" in ended.err


def test_a_name_that_is_not_text_is_packed_and_said(pair: Path, call) -> None:
    strange = os.fsdecode(b"\xff\xfe.png")
    for part in ("images", "masks"):
        shutil.copy(pair / part / "a.png", pair / part / strange)
    ended = call("pack", *flags(pair, pair / "out", "--val-fraction", 0))
    assert ended.code == 0
    with tarfile.open(pair / "out" / "train-000000.tar") as tar:
        assert "%FF%FE.png" in tar.getnames()
