"""`pack`, `packing.options`, `packing.colours`, `packing.image_options`, `packing.split_options`.

Edge cases of packing: full disks, unusual names and extensions, links, duplicates.
"""

import errno
import io
import json
import os
import struct
import subprocess
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.manifest import read_manifest
from shards.masks.palettes import default_palette, palette_bytes
from shards.masks.png import encode_mask
from shards.writer import HashingStream, ShardWriter

NAMES = ("ground", "cell", "rim")
INDEX = np.repeat(np.arange(12)[:, None] // 4, 20, axis=1).astype(np.uint8)
"""Three stripes of 20 x 4: class 0, 1, 2."""
ROTATED = 6
"""EXIF orientation of an image that must be rotated by 90 degrees clockwise."""


def flags(folder: Path, out: object, *more: object, mask_format: str = "binary") -> list[object]:
    return [
        *("--images", folder / "images", "--masks", folder / "masks", "--out", out),
        *("--mask-format", mask_format, "--workers", 1, "--val-fraction", 0, *more),
    ]


def noise(seed: int, size: tuple[int, int] = (12, 20)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*size, 3)).astype(np.uint8)


def folders(folder: Path) -> Path:
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    return folder


def one_line(ended, verb: str, code: int = 1) -> str:
    """The one line on stderr of a refused command."""
    assert ended.code == code, (ended.out, ended.err)
    assert "Traceback" not in ended.err
    (line,) = ended.err.splitlines()
    assert line.startswith(f"unet {verb}: ")
    return line


def left_out(ended) -> str:
    """The one line on stderr of a command that left out one input."""
    assert ended.code == 3, (ended.out, ended.err)
    (line,) = ended.err.splitlines()
    return line


def refused(ended) -> str:
    """The message of a refused command, in one line where data are refused."""
    assert ended.code in (1, 2), (ended.out, ended.err)
    assert "Traceback" not in ended.err
    if ended.code == 1:
        assert len(ended.err.splitlines()) == 1
    return ended.message


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    return exif


def with_late_exif(data: bytes) -> bytes:
    """Add an EXIF orientation after the pixels of a PNG."""
    content = rotated().tobytes().removeprefix(b"ExifPolicy\0\0")
    chunk = struct.pack(">I", len(content)) + b"eXIf" + content
    chunk += struct.pack(">I", zlib.crc32(chunk[4:]))
    assert data[-8:-4] == b"IEND"
    return data[:-12] + chunk + data[-12:]


def as_png(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


def our_mask(index: np.ndarray) -> Image.Image:
    """A mask with the palette that packing gives to its classes."""
    image = Image.fromarray(index, "P")
    image.putpalette(palette_bytes(default_palette(NAMES))[: 3 * 4])
    return image


# ---- a full disk


@pytest.mark.parametrize("keep_going", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_a_full_disk_is_not_blamed_on_samples(
    number: int, keep_going: bool, draw, call, content, monkeypatch, tmp_path: Path
) -> None:
    folder, out = draw(tmp_path / "in", 4, size=(16, 16)), tmp_path / "out"
    more = ("--samples-per-shard", 2, *(["--keep-going"] if keep_going else []))
    assert call("pack", *flags(folder, tmp_path / "reference", *more)).code == 0
    count, write = 0, HashingStream.write

    def failing(stream: HashingStream, data: bytes) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(stream, data)

    with monkeypatch.context() as patch:
        patch.setattr(HashingStream, "write", failing)
        ended = call("pack", *flags(folder, out, *more))
    line = one_line(ended, "pack")
    assert "No space left" in line
    assert "; free some space or choose another place, then rerun the same command" in line
    assert str(out) in line or "train-00000" in line
    assert str(folder) not in line
    assert not (out / "index.json").exists()
    if (out / "problems.txt").exists():
        listed = (out / "problems.txt").read_text()
        assert not [name for name in os.listdir(folder / "images") if name in listed]
    ended = call("pack", *flags(folder, out, *more))
    assert ended.code == 0, ended.err
    assert content(out) == content(tmp_path / "reference")


# ---- groups and folds


def test_any_group_of_the_pattern_can_match(draw, call, samples, tmp_path) -> None:
    for number, patient in enumerate(f"{letter}{n}" for letter in "PQ" for n in range(8)):
        draw(tmp_path / "in", 3, size=(8, 8), name=f"{patient}_{{}}", seed=number)
    more = ("--group-by", r"^(P\d)_|^(Q\d)_", "--val-fraction", 0.5)
    ended = call("pack", *flags(tmp_path / "in", tmp_path / "out", *more))
    assert ended.code == 0, ended.err
    found = samples(tmp_path / "out")
    assert len(found) == 48
    splits: dict[str, set[str]] = {}
    for source, sample in found.items():
        splits.setdefault(source[:2], set()).add(sample.split)
    assert len(splits) == 16
    assert {len(names) for names in splits.values()} == {1}
    for letter in "PQ":
        of_letter = [names for patient, names in splits.items() if patient[0] == letter]
        assert set.union(*of_letter) == {"train", "val"}


@pytest.mark.parametrize("flag", ["--fold", "--part"])
def test_superscript_digits_are_refused(flag, draw, call, tmp_path) -> None:
    arguments = ("--images", tmp_path, "--masks", tmp_path, "--mask-format", "binary")
    ended = call("pack", *arguments, "--out", tmp_path / "out", flag, "²/5")
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert f"{flag} must be like 2/5, got '²/5'" in ended.message
    assert "invalid literal" not in ended.message


# ---- almost canonical masks


@pytest.mark.parametrize("late", [False, True], ids=["before the pixels", "after the pixels"])
@pytest.mark.parametrize("rule", ["upright", "ignore"])
def test_a_canonical_mask_is_stored_without_its_orientation(
    rule: str, late: bool, call, samples, tmp_path: Path
) -> None:
    folder = folders(tmp_path / "in")
    pixels = noise(0)
    for part, image in (("images", Image.fromarray(pixels)), ("masks", our_mask(INDEX))):
        data = with_late_exif(as_png(image)) if late else as_png(image, exif=rotated())
        (folder / part / "a.png").write_bytes(data)
    more = ("--classes", *NAMES, "--exif", rule)
    ended = call("pack", *flags(folder, tmp_path / "out", *more, mask_format="index"))
    assert ended.code == 0, ended.err
    sample = samples(tmp_path / "out")["a.png"]
    turns = -1 if rule == "upright" else 0
    np.testing.assert_array_equal(sample.image, np.rot90(pixels, turns))
    np.testing.assert_array_equal(sample.mask, np.rot90(INDEX, turns))
    for data, expected in ((sample.raw.image, pixels), (sample.raw.mask, INDEX)):
        stored = Image.open(io.BytesIO(data))
        np.testing.assert_array_equal(np.asarray(stored), np.rot90(expected, turns))
        assert not stored.getexif()
        assert b"eXIf" not in data


def test_one_frame_of_an_animated_canonical_mask_is_stored(call, samples, tmp_path: Path) -> None:
    folder = folders(tmp_path / "in")
    Image.fromarray(noise(0)).save(folder / "images" / "a.png")
    path = folder / "masks" / "a.png"
    our_mask(INDEX).save(path, save_all=True, append_images=[our_mask(INDEX[::-1].copy())])
    with Image.open(path) as animated:
        assert (animated.n_frames, animated.mode) == (2, "P")
    arguments = flags(folder, tmp_path / "out", "--classes", *NAMES, mask_format="index")
    ended = call("pack", *arguments)
    assert ended.code == 1
    assert "masks/a.png has 2 frames" in ended.err
    ended = call("pack", *arguments, "--frame", 0)
    assert ended.code == 0, ended.err
    sample = samples(tmp_path / "out")["a.png"]
    np.testing.assert_array_equal(sample.mask, INDEX)
    assert getattr(Image.open(io.BytesIO(sample.raw.mask)), "n_frames", 1) == 1


@pytest.mark.parametrize("turned", [("images",), ("images", "masks")])
def test_verify_headers_finds_an_orientation_after_the_pixels(
    turned: tuple[str, ...], call, content, samples, tmp_path: Path
) -> None:
    folder = folders(tmp_path / "in")
    palette = default_palette(NAMES)
    # More than `--verify headers` decodes completely.
    for number in range(40):
        data = {
            "images": as_png(Image.fromarray(noise(number))),
            "masks": encode_mask(INDEX if "masks" in turned else np.rot90(INDEX, -1), palette),
        }
        for part in data:
            late = with_late_exif(data[part]) if part in turned else data[part]
            (folder / part / f"p{number}.png").write_bytes(late)
    for verify in ("full", "headers"):
        more = ("--classes", *NAMES, "--verify", verify)
        ended = call("pack", *flags(folder, tmp_path / verify, *more, mask_format="index"))
        assert ended.code == 0, ended.err
        assert "40 images with an EXIF orientation are stored upright" in ended.out
    full, headers = content(tmp_path / "full"), content(tmp_path / "headers")
    assert headers["train-000000.tar"] == full["train-000000.tar"]
    for source, sample in samples(tmp_path / "headers").items():
        expected = noise(int(source[1:-4]))
        np.testing.assert_array_equal(sample.image, np.rot90(expected, -1))
        np.testing.assert_array_equal(sample.mask, np.rot90(INDEX, -1))


# ---- lists of pairs


@pytest.mark.parametrize("name", ["a", "a.v 2"])
def test_a_listed_file_without_an_image_extension_is_refused(name: str, call, tmp_path) -> None:
    Image.fromarray(noise(0)).save(tmp_path / name, "PNG")
    our_mask(INDEX).save(tmp_path / "mask.png")
    (tmp_path / "pairs.csv").write_text(f"image,mask\n{name},mask.png\n")
    arguments = ("--pairs", tmp_path / "pairs.csv", "--mask-format", "index", "--classes", *NAMES)
    ended = call("pack", *arguments, "--workers", 1, "--out", tmp_path / "out")
    assert f"{tmp_path / name} does not have an image extension" in one_line(ended, "pack")
    assert not (tmp_path / "out" / "index.json").exists()


def test_one_mask_listed_for_two_images_is_refused_with_both(call, tmp_path: Path) -> None:
    for number, name in enumerate(("one.png", "two.png")):
        Image.fromarray(noise(number)).save(tmp_path / name)
    our_mask(INDEX).save(tmp_path / "mask.png")
    (tmp_path / "pairs.txt").write_text("one.png mask.png\ntwo.png mask.png\n")
    arguments = ("--pairs", tmp_path / "pairs.txt", "--mask-format", "index", "--classes", *NAMES)
    line = one_line(call("pack", *arguments, "--workers", 1, "--out", tmp_path / "out"), "pack")
    assert "mask.png" in line
    assert "one.png" in line
    assert "two.png" in line
    assert not (tmp_path / "out" / "index.json").exists()


# ---- extensions


def test_every_JPEG_extension_is_packed_and_unpacked(  # noqa: N802
    call, content, samples, tmp_path: Path
) -> None:
    folder = folders(tmp_path / "in")
    for number, name in enumerate(("a.jfif", "b.jpe", "c.JFIF")):
        Image.fromarray(noise(number)).save(folder / "images" / name, "JPEG")
        our_mask(INDEX).save(folder / "masks" / f"{name[0]}.png")
    more = ("--classes", *NAMES)
    ended = call("pack", *flags(folder, tmp_path / "out", *more, mask_format="index"))
    assert ended.code == 0, ended.err
    found = samples(tmp_path / "out")
    assert sorted(found) == ["a.jfif", "b.jpe", "c.JFIF"]
    for source, sample in found.items():
        own = (folder / "images" / source).read_bytes()
        assert sample.raw.image == own
        assert Image.open(io.BytesIO(sample.raw.image)).format == "JPEG"
        np.testing.assert_array_equal(sample.image, np.asarray(Image.open(io.BytesIO(own))))
    ended = call("unpack", "--data", tmp_path / "out", "--out", tmp_path / "back")
    assert ended.code == 0, ended.err
    assert content(tmp_path / "back" / "images") == content(folder / "images")


@pytest.mark.parametrize("extension", ["ppm", "tga", "psd", "PPM"])
def test_images_in_unsupported_formats_are_refused_by_name(
    extension: str, draw, call, tmp_path: Path
) -> None:
    folder = draw(tmp_path / "in", 2, size=(12, 20))
    path = folder / "images" / f"other.{extension}"
    if extension == "psd":
        path.write_bytes(b"8BPS" + bytes(40))
    else:
        Image.fromarray(noise(0)).save(path)
    for arguments in (flags(folder, tmp_path / "out"), ("--images", folder / "images")):
        ended = call("pack", *arguments, "--out", tmp_path / "out", "--workers", 1)
        assert f"images/other.{extension} is an image in an unsupported format" in one_line(
            ended, "pack"
        )
        assert not (tmp_path / "out" / "index.json").exists()


# ---- links


@pytest.fixture
def linked(draw, tmp_path: Path) -> Path:
    """`one` and `two` are links to the same folder, for images and for masks."""
    real, folder = draw(tmp_path / "real", 2, size=(8, 8)), folders(tmp_path / "in")
    for part in ("images", "masks"):
        for name in ("one", "two"):
            (folder / part / name).symlink_to(real / part)
    return folder


def test_two_links_to_one_folder_are_both_followed(linked: Path, call, samples, tmp_path) -> None:
    ended = call("pack", *flags(linked, tmp_path / "out"))
    assert ended.code == 0, ended.err
    names = ["one/p000.png", "one/p001.png", "two/p000.png", "two/p001.png"]
    assert sorted(samples(tmp_path / "out")) == names
    assert read_manifest(tmp_path / "out").duplicates == (
        ("train:one/p000.png", "train:two/p000.png"),
        ("train:one/p001.png", "train:two/p001.png"),
    )


def test_one_image_behind_two_links_is_not_split(linked: Path, call, tmp_path: Path) -> None:
    lines = [f"{name}/p00{n}.png" for name in ("one", "two") for n in range(2)]
    for name, listed in (("train", lines[:2]), ("val", lines[2:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(listed) + "\n")
    lists = ("--split-file", tmp_path / "train.txt", tmp_path / "val.txt")
    ended = call("pack", *flags(linked, tmp_path / "out", *lists))
    assert ended.code == 1
    both = "one/p000.png (train) = two/p000.png (val) are the same image"
    assert f"{both} (and 1 more: one/p001.png two/p001.png)" in ended.err


def test_a_link_to_a_parent_folder_is_not_followed_forever(
    draw, call, samples, tmp_path: Path
) -> None:
    folder = draw(tmp_path / "in", 2, size=(8, 8), name="sub/{}")
    for part in ("images", "masks"):
        (folder / part / "up").symlink_to(folder / part)
        (folder / part / "sub" / "self").symlink_to(".")
        (folder / part / "sub" / "above").symlink_to("..")
    ended = call("pack", *flags(folder, tmp_path / "out"))
    assert ended.code == 0, ended.err
    assert sorted(samples(tmp_path / "out")) == ["sub/0.png", "sub/1.png"]


# ---- duplicate keys


DUPLICATE_TABLES = {
    "yaml": "ground: [0, 0, 0]\ncell: [200, 0, 0]\ncell: [0, 0, 200]\n",
    "json": '{"ground": [0, 0, 0], "cell": [200, 0, 0], "cell": [0, 0, 200]}',
    "csv": "ground,0,0,0\ncell,200,0,0\ncell,0,0,200\n",
}


@pytest.fixture
def coloured(tmp_path: Path) -> Path:
    """One image with a mask in black and red."""
    folder = folders(tmp_path / "in")
    Image.fromarray(noise(0)).save(folder / "images" / "a.png")
    colours = np.array([(0, 0, 0), (200, 0, 0)], np.uint8)
    Image.fromarray(colours[np.minimum(INDEX, 1)]).save(folder / "masks" / "a.png")
    return folder


@pytest.mark.parametrize("kind", DUPLICATE_TABLES)
def test_a_duplicate_colour_name_is_refused(kind: str, coloured, call, tmp_path) -> None:
    table = tmp_path / f"colours.{kind}"
    table.write_text(DUPLICATE_TABLES[kind])
    arguments = flags(coloured, tmp_path / "out", "--colours", table, mask_format="rgb")
    ended = call("pack", *arguments)
    assert ended.code == 2, ended.err
    assert "Traceback" not in ended.err
    assert "cell" in ended.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("verb", "text", "key"),
    [
        ("pack", "seed: 3\nverify: full\nseed: 4\n", "seed"),
        ("train", "model:\n  depth: 2\n  depth: 3\n", "depth"),
    ],
    ids=["at the top", "below a key"],
)
def test_a_duplicate_setting_is_refused(
    verb: str, text: str, key: str, coloured: Path, call, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    ended = call(verb, "--config", tmp_path / "config.yaml", "--out", tmp_path / "out")
    line = one_line(ended, verb, 2)
    assert "config.yaml" in line
    assert key in line
    assert not (tmp_path / "out").exists()


def test_a_class_called_no_is_not_False(coloured, call, tmp_path: Path) -> None:  # noqa: N802
    bare, quoted = tmp_path / "bare.yaml", tmp_path / "quoted.yaml"
    bare.write_text("no: [0, 0, 0]\nyes: [200, 0, 0]\n")
    quoted.write_text("'no': [0, 0, 0]\n'yes': [200, 0, 0]\n")
    for table in (bare, quoted):
        out = tmp_path / table.stem
        ended = call("pack", *flags(coloured, out, "--colours", table, mask_format="rgb"))
        if table == bare and ended.code:  # YAML's false and true
            assert ended.code == 2
            assert "Traceback" not in ended.err
            assert "bare.yaml" in ended.message
        else:
            assert ended.code == 0, ended.err
            assert read_manifest(out).classes == ("no", "yes")


# ---- resuming and refusing


def test_a_pack_that_failed_at_a_bad_file_resumes_with_keep_going(
    draw, call, content, tmp_path: Path
) -> None:
    folder, out = draw(tmp_path / "in", 6, size=(16, 16)), tmp_path / "out"
    (folder / "images" / "p002.png").write_bytes(b"")
    arguments = ("--samples-per-shard", 2)
    reference = call("pack", *flags(folder, tmp_path / "reference", *arguments, "--keep-going"))
    assert reference.code == 3, reference.err
    assert call("pack", *flags(folder, out, *arguments)).code == 1
    finished = {path: path.stat().st_ino for path in out.glob("*.tar")}
    assert len(finished) == 2
    ended = call("pack", *flags(folder, out, *arguments, "--keep-going"))
    assert ended.code == 3, ended.err
    assert "2 of 3 shards exist already" in ended.out
    assert {path: path.stat().st_ino for path in finished} == finished
    assert content(out) == content(tmp_path / "reference")


@pytest.mark.parametrize("keep_going", [False, True])
def test_a_refused_pack_does_not_change_a_finished_data_set(
    keep_going: bool, draw, call, content, tmp_path: Path
) -> None:
    folder, out = draw(tmp_path / "in", 4, size=(8, 8)), tmp_path / "out"
    assert call("pack", *flags(folder, out)).code == 0
    before = content(out)
    for number in range(2):
        (folder / "masks" / f"p00{number}.png").unlink()
    more = ["--keep-going"] if keep_going else []
    assert "is already a data set" in one_line(call("pack", *flags(folder, out, *more)), "pack")
    assert content(out) == before
    assert not (out / "problems.txt").exists()


@pytest.mark.parametrize("masks", [False, True])
def test_a_check_that_writes_among_the_images_is_repeatable(
    masks: bool, draw, call, content, tmp_path: Path
) -> None:
    folder = draw(tmp_path / "in", 3, size=(16, 16))
    out = folder / "images" / "check"
    arguments = flags(folder, out) if masks else ("--images", folder / "images", "--out", out)
    before = content(folder)
    first, second = (call("check", *arguments, "--workers", 1) for _ in range(2))
    assert second == first
    if first.code:  # refused, so that no result is read as an image
        assert first.code == 2
        assert "choose another --out" in first.message
        assert content(folder) == before


# ---- names that are not valid text


@pytest.mark.parametrize("leak", [False, True])
@pytest.mark.parametrize("verb", ["check", "pack"])
def test_a_name_that_is_not_valid_text_is_printed_on_a_strict_terminal(
    verb: str, leak: bool, spawn, tmp_path: Path
) -> None:
    folder = folders(tmp_path / "in")
    invalid = os.fsdecode(b"caf\xe9.png")
    for name in ("a.png", invalid):
        Image.fromarray(noise(0)).save(folder / "images" / name)
        our_mask(INDEX).save(folder / "masks" / name)
    arguments = flags(folder, tmp_path / "out", "--classes", *NAMES, mask_format="index")
    if leak:
        for name, listed in (("train", "a.png"), ("val", invalid)):
            (tmp_path / name).mkdir()
            for part in ("images", "masks"):
                (folder / part / name).mkdir()
                (folder / part / listed).rename(folder / part / name / listed)
        arguments += ["--split-folders"]
    process: subprocess.Popen[str] = spawn(verb, *arguments, PYTHONIOENCODING="utf-8:strict")
    for stream in (process.stdout, process.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    stdout, stderr = process.communicate(timeout=200)
    assert "Traceback" not in stderr
    assert process.returncode == int(leak), stderr
    assert "identical images" in stdout or "are the same image" in stderr
    assert "caf" in (stderr if leak else stdout)


def make_data_set(folder: Path, call, key: str, members: dict[str, bytes]) -> Path:
    """Make a data set of one unlabelled sample, not written by `pack`."""
    (folder / "images").mkdir()
    Image.fromarray(noise(0)).save(folder / "images" / "a.png")
    data = folder / "data"
    ended = call("pack", "--images", folder / "images", "--out", data, "--workers", 1)
    assert ended.code == 0, ended.err
    manifest = json.loads((data / "index.json").read_text())
    with ShardWriter(data / "unlabelled-000000.tar") as writer:
        writer.add(key, {"png": as_png(Image.fromarray(noise(0))), **members})
        file = writer.seal()
    manifest["splits"]["unlabelled"]["shards"][0].update(
        bytes=file.bytes, sha256=file.sha256, idx_sha256=file.idx_sha256
    )
    (data / "index.json").write_text(json.dumps(manifest))
    return data


def test_a_source_that_is_not_a_valid_file_name_is_refused(call, tmp_path: Path) -> None:
    info = json.dumps({"source": "a\ud800.png"}).encode()
    data = make_data_set(tmp_path, call, "k", {"json": info})
    ended = call("unpack", "--data", data, "--out", tmp_path / "out")
    line = left_out(ended)
    assert line.isprintable()
    assert "unlabelled-000000.tar" in line
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


# ---- unpacking foreign shards


def foreign(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))


def test_masks_with_the_same_file_name_are_not_unpacked(call, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number, (extension, form) in enumerate((("jpg", "JPEG"), ("png", "PNG"))):
        image = io.BytesIO()
        Image.fromarray(noise(number)).save(image, form)
        mask = as_png(Image.fromarray(np.roll(INDEX, number)))
        members = {f"a.{extension}": image.getvalue(), "a.mask.png": mask}
        foreign(data / f"train-{number:06d}.tar", members)
    ended = call("index", data, "--workers", 1, "--classes", *NAMES)
    assert ended.code == 0, ended.err
    ended = call("unpack", "--data", data, "--out", tmp_path / "out")
    line = left_out(ended)
    assert "train-000001.tar" in line
    assert "another sample is named a too" in line


# ---- URLs where a folder is expected


# Only `pack` writes to a bucket: see test_pack_remote.py.
@pytest.mark.parametrize(
    ("verb", "url"),
    [
        *((verb, url) for verb in ("pack", "check", "unpack") for url in ("S3://b/x", "s3:/b/y")),
        *(("check", "s3://b/x"), ("unpack", "s3://b/x")),
    ],
)
def test_a_url_is_not_created_as_a_folder(
    verb: str, url: str, shards: Path, cells: Path, call, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", shards, "--out", url] if verb == "unpack" else flags(cells, url)
    message = refused(call(verb, *arguments))
    # As given, or as a path, in which two slashes become one.
    assert url in message or url.replace("//", "/") in message
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("keep_going", [False, True])
def test_a_rerun_of_a_finished_pack_reports_that(
    keep_going: bool, draw, call, content, tmp_path: Path
) -> None:
    folder, out = draw(tmp_path / "in", 6, size=(8, 8)), tmp_path / "out"
    if keep_going:
        (folder / "masks" / "p003.png").unlink()
    arguments = flags(folder, out, "--samples-per-shard", 2, *["--keep-going"] * keep_going)
    code = call("pack", *arguments).code
    assert code == (3 if keep_going else 0)
    before = content(out)
    rerun = call("pack", *arguments, "--workers", 2)
    assert (rerun.code, rerun.err) == (code, "")
    assert rerun.out == (
        f"{out} is already packed with these settings: {6 - keep_going} samples; nothing to do\n"
    )
    assert content(out) == before


def test_a_rerun_after_a_kill_behind_the_manifest_finishes(
    draw, call, content, monkeypatch, tmp_path: Path
) -> None:
    folder, out = draw(tmp_path / "in", 6, size=(8, 8)), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("pipelines.pack.clear_work", lambda store: None)
        assert call("pack", *flags(folder, out)).code == 0
    assert len([*(out / ".pack").iterdir()]) > 1
    rerun = call("pack", *flags(folder, out))
    assert rerun.code == 0
    assert "is already packed with these settings" in rerun.out
    assert [path.name for path in (out / ".pack").iterdir()] == ["plan.json"]


@pytest.mark.parametrize("change", ["content", "removed", "flag"])
def test_a_rerun_with_other_files_or_flags_is_refused(
    change: str, draw, call, content, tmp_path: Path
) -> None:
    folder, out = draw(tmp_path / "in", 6, size=(8, 8)), tmp_path / "out"
    assert call("pack", *flags(folder, out)).code == 0
    before = content(out)
    if change == "content":
        Image.new("L", (8, 8)).save(folder / "masks" / "p000.png")
    elif change == "removed":
        for part in ("images", "masks"):
            (folder / part / "p000.png").unlink()
    rerun = call("pack", *flags(folder, out, *["--invert"] * (change == "flag")))
    assert rerun.code == 1
    assert "is already a data set, made from other files or with other settings" in rerun.err
    assert content(out) == before
