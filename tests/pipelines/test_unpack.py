"""Unpacking restores images and mask values exactly, and writes nowhere else."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.writer import ShardWriter


def round_trip(folder: Path, out: Path, call, *rule: object) -> Path:
    """Pack a folder of images and masks, unpack it, and return the new folder."""
    folders = ("--images", folder / "images", "--masks", folder / "masks", "--workers", 1)
    ended = call("pack", *folders, *rule, "--val-fraction", 0.3, "--out", out / "shards")
    assert ended.code == 0, ended.err
    ended = call("unpack", "--data", out / "shards", "--out", out / "folders", "--overlay")
    assert ended.code == 0, ended.err
    return out / "folders"


RULES = {
    "binary 255": ((0, 255), ("--mask-format", "binary")),
    "binary 1": ((0, 1), ("--mask-format", "binary")),
    "binary 90": ((0, 90), ("--mask-format", "binary")),
    "inverted": ((255, 0), ("--mask-format", "binary", "--invert")),
    "index": ((0, 1, 2), ("--mask-format", "index", "--classes", "a", "b", "c")),
    "index, ignored": (
        (0, 1, 77),
        ("--mask-format", "index", "--classes", "a", "b", "--ignore-value", 77),
    ),
    "index, ignored 255": (
        (0, 1, 255),
        ("--mask-format", "index", "--classes", "a", "b", "--ignore-value", 255),
    ),
    "values": ((0, 128, 255), ("--mask-format", "values", "--mask-values", 0, 128, 255)),
    "values, ignored": (
        (200, 9, 1),
        ("--mask-format", "values", "--mask-values", 200, 9, "--ignore-value", 1),
    ),
    "binary, ignored": ((0, 255, 128), ("--mask-format", "binary", "--ignore-value", 128)),
}


@pytest.mark.parametrize("rule", RULES)
def test_images_and_mask_values_are_restored(
    rule: str, draw, call, content, tmp_path: Path
) -> None:
    values, flags = RULES[rule]
    folder = draw(tmp_path / "in", 6, values=values, name="sub.d/p {}")
    out = round_trip(folder, tmp_path, call, *flags)
    assert content(out / "images") == content(folder / "images")
    masks = sorted((folder / "masks").rglob("*.png"))
    assert len(masks) == 6
    for path in masks:
        found = np.asarray(Image.open(out / "masks" / path.relative_to(folder / "masks")))
        np.testing.assert_array_equal(found, np.asarray(Image.open(path)))
    everything = np.concatenate([np.asarray(Image.open(path)).ravel() for path in masks])
    assert set(np.unique(everything)) == set(values)


COLOURS = np.array([(0, 0, 0), (250, 0, 0), (0, 90, 200)], np.uint8)
NAMES = ("--classes", "a", "b", "c")


def paletted(index: np.ndarray) -> Image.Image:
    image = Image.fromarray(index, "P")
    image.putpalette(COLOURS.tobytes())
    return image


PAINTED = {
    "16 bits": (
        lambda index: Image.fromarray(np.array([7, 300, 60000], np.uint16)[index]),
        ("--mask-format", "values", "--mask-values", 7, 300, 60000),
        "I;16",
    ),
    "16 bits, ignored": (
        lambda index: Image.fromarray(np.array([0, 1, 60000], np.uint16)[index]),
        ("--mask-format", "index", "--classes", "a", "b", "--ignore-value", 60000),
        "I;16",
    ),
    "palette": (paletted, ("--mask-format", "palette", *NAMES), "P"),
    "index of a palette": (paletted, ("--mask-format", "index", *NAMES), "P"),
    "rgb": (
        lambda index: Image.fromarray(COLOURS[index]),
        ("a: [0, 0, 0]\nb: [250, 0, 0]\nc: [0, 90, 200]\n",),
        "RGB",
    ),
    "rgb, ignored": (
        lambda index: Image.fromarray(COLOURS[index]),
        ("a: [0, 0, 0]\nb: [250, 0, 0]\nignore: [0, 90, 200]\n",),
        "RGB",
    ),
    "rgb, with alpha": (
        lambda index: Image.fromarray(np.dstack([COLOURS[index], index * 100])),
        ("a: [0, 0, 0, 0]\nb: [250, 0, 0, 100]\nc: [0, 90, 200, 200]\n",),
        "RGBA",
    ),
}


@pytest.mark.parametrize("kind", PAINTED)
def test_masks_of_every_kind_are_restored(kind: str, draw, call, tmp_path: Path) -> None:
    paint, flags, mode = PAINTED[kind]
    if mode.startswith("RGB"):
        (tmp_path / "colours.yaml").write_text(flags[0])
        flags = ("--mask-format", "rgb", "--colours", tmp_path / "colours.yaml")
    folder = draw(tmp_path / "in", 4, values=(0, 1, 2))
    masks = sorted((folder / "masks").iterdir())
    for path in masks:
        paint(np.asarray(Image.open(path))).save(path)
    out = round_trip(folder, tmp_path, call, *flags)
    for path in masks:
        found, was = Image.open(out / "masks" / path.name), Image.open(path)
        assert found.mode == mode
        np.testing.assert_array_equal(np.asarray(found), np.asarray(was))
        if kind != "index of a palette":  # whose colours are not part of the format
            np.testing.assert_array_equal(
                np.asarray(found.convert("RGB")), np.asarray(was.convert("RGB"))
            )


def test_ignored_pixels_are_unpacked_as_no_class(draw, call, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 4, values=(0, 9, 255))
    flags = ("--mask-format", "values", "--mask-values", 0, 255, "--unknown", "ignore")
    out = round_trip(folder, tmp_path, call, *flags)
    for path in sorted((folder / "masks").iterdir()):
        was, found = (np.asarray(Image.open(p)) for p in (path, out / "masks" / path.name))
        assert (was == 9).any()
        assert not set(np.unique(found[was == 9])) & {0, 255}
        np.testing.assert_array_equal(found[was != 9], was[was != 9])


def test_images_changed_by_packing_are_unpacked_as_PNG(  # noqa: N802
    draw, call, tmp_path: Path
) -> None:
    folder = draw(tmp_path / "in", 4, size=(40, 60))
    exif = Image.Exif()
    exif[0x0112] = 3
    for path in sorted((folder / "images").iterdir()):
        Image.open(path).save(path.with_suffix(".jpg"), quality=95, exif=exif)
        path.unlink()
    out = round_trip(folder, tmp_path, call, "--mask-format", "binary", "--resize", 30)
    for name in (f"p{number:03d}" for number in range(4)):
        found = Image.open(out / "images" / f"{name}.png")
        assert (found.size, found.getexif().get(0x0112)) == ((30, 20), None)
        upright = Image.open(folder / "images" / f"{name}.jpg").transpose(
            Image.Transpose.ROTATE_180
        )
        small = np.asarray(upright.resize((30, 20), Image.Resampling.BOX))
        np.testing.assert_array_equal(np.asarray(found), small)
        assert Image.open(out / "masks" / f"{name}.png").size == (30, 20)


def test_packing_unpacked_files_writes_the_same_shards(draw, call, content, tmp_path) -> None:
    folder = draw(tmp_path / "in", 6)
    out = round_trip(folder, tmp_path / "1", call, "--mask-format", "binary")
    round_trip(out, tmp_path / "2", call, "--mask-format", "binary")
    first, second = (content(tmp_path / name / "shards") for name in ("1", "2"))
    # It records the times of the input files, by which a rerun recognises them.
    assert first.pop(".pack/plan.json") != second.pop(".pack/plan.json")
    assert first == second


def test_every_image_format_keeps_its_bytes(call, content, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    for seed, name in enumerate(("a.jpg", "b.JPEG", "c.bmp", "d.tif", "e.webp", "f.gif", "g.png")):
        pixels = np.random.default_rng(seed).integers(0, 255, (12, 14, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
        mask = Image.new("L", (14, 12), 255)
        mask.putpixel((0, 0), 0)
        mask.save(folder / "masks" / f"{name[0]}.png")
    out = round_trip(folder, tmp_path, call, "--mask-format", "binary")
    assert content(out / "images") == content(folder / "images")


def test_overlays_show_the_mask_in_its_colour(draw, call, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 6)
    out = round_trip(folder, tmp_path, call, "--mask-format", "binary")
    overlays = sorted((out / "overlay").iterdir())
    assert len(overlays) == 6
    for path in overlays:
        original = np.asarray(Image.open(folder / "images" / path.name)).astype(int)
        drawn = np.asarray(Image.open(path)).astype(int)
        mask = np.asarray(Image.open(folder / "masks" / path.name)) == 255
        assert (drawn[mask] != original[mask]).any()
        far = ~mask
        far[1:] &= ~mask[:-1]
        far[:-1] &= ~mask[1:]
        far[:, 1:] &= ~mask[:, :-1]
        far[:, :-1] &= ~mask[:, 1:]
        np.testing.assert_array_equal(drawn[far], original[far])


def test_a_single_split_can_be_unpacked(shards: Path, call, tmp_path: Path) -> None:
    ended = call("unpack", "--data", shards, "--out", tmp_path, "--split", "val")
    assert ended.code == 0
    assert f"4 samples in {tmp_path}" in ended.out
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        f"p{i:03d}.png" for i in range(4)
    ]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda data: "--split=test",
            "has no samples in the split 'test'; splits with samples: train, val",
        ),
        (lambda data: (data / "index.json").unlink(), "is not a data set (it has no index.json)"),
        (lambda data: (data / "index.json").write_text("{"), "index.json is damaged"),
        (
            lambda data: (data / "index.json").write_text('{"format": "x"}'),
            "is not a manifest written by unet pack",
        ),
        (
            lambda data: (data / "index.json").write_text('{"format": "unet-shards","version": 9}'),
            "has version 9, but this program reads version 2; update",
        ),
        (lambda data: (data / "train-000000.tar").unlink(), "cannot be opened: No such file"),
        (
            lambda data: (data / "train-000000.tar").write_bytes(b"cut"),
            "has 3 bytes, but the manifest",
        ),
        (lambda data: (data / "train-000000.idx").unlink(), "train-000000.idx cannot be read"),
        (
            lambda data: (data / "train-000000.idx").write_text("v1.2 3\n"),
            "is truncated or not a v1.2 .idx",
        ),
        (
            lambda data: (data / "train-000000.idx").write_text("v1.2 3\na b c\na b c\na b c\n"),
            "train-000000.idx",
        ),
    ],
)
def test_an_invalid_data_set_is_refused_in_one_line(
    spoil, message: str, shards: Path, call, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(shards, tmp_path / "data")
    flag = spoil(tmp_path / "data")
    more = (flag,) if isinstance(flag, str) else ()
    ended = call("unpack", "--data", tmp_path / "data", "--out", tmp_path / "out", *more)
    assert ended.code == 1
    assert message in ended.err
    assert len(ended.err.splitlines()) == 1


def hostile(tmp_path: Path, draw, call, key: str, members: dict[str, bytes]) -> Path:
    """Make a data set of one sample, not written by `pack`."""
    folder = draw(tmp_path / "in", 1, size=(16, 16))
    data = tmp_path / "data"
    packed = ("--images", folder / "images", "--out", data, "--workers", 1)
    assert call("pack", *packed).code == 0
    manifest = json.loads((data / "index.json").read_text())
    image = (folder / "images" / "p000.png").read_bytes()
    with ShardWriter(data / "unlabelled-000000.tar") as writer:
        writer.add(key, {name: value or image for name, value in members.items()})
        file = writer.seal()
    manifest["splits"]["unlabelled"]["shards"][0].update(
        bytes=file.bytes, sha256=file.sha256, idx_sha256=file.idx_sha256
    )
    (data / "index.json").write_text(json.dumps(manifest))
    return data


@pytest.mark.parametrize(
    "source",
    ["../../escaped.png", "/tmp/escaped.png", "a/../../escaped.png", "", "a\0.png", 5],
)
def test_a_source_that_leaves_the_folder_is_refused(
    source: object, draw, call, tmp_path: Path
) -> None:
    info = json.dumps({"source": source}).encode()
    data = hostile(tmp_path, draw, call, "k", {"png": b"", "json": info})
    ended = call("unpack", "--data", data, "--out", tmp_path / "deep" / "er" / "out")
    assert ended.code == 3
    assert "is not a relative path inside the folder" in ended.err
    assert not [*tmp_path.rglob("*escaped*")]
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    ("extension", "code"), [("x/../../../escaped", 1), ("../escaped", 3), ("a b", 1)]
)
def test_an_extension_that_is_a_path_is_refused(
    extension: str, code: int, draw, call, tmp_path: Path
) -> None:
    members = {extension: b"", "json": b'{"source": "a.jpg"}'}
    data = hostile(tmp_path, draw, call, "k", members)
    ended = call("unpack", "--data", data, "--out", tmp_path / "deep" / "out")
    assert ended.code == code
    assert len(ended.err.splitlines()) == 1
    assert not [*tmp_path.rglob("*escaped*")]


@pytest.mark.parametrize("info", [b"[]", b"{", b"\xff"])
def test_an_invalid_description_is_refused(info: bytes, draw, call, tmp_path: Path) -> None:
    data = hostile(tmp_path, draw, call, "k", {"png": b"", "json": info})
    ended = call("unpack", "--data", data, "--out", tmp_path / "out")
    assert ended.code == 3
    assert "unlabelled-000000.tar" in ended.err
    assert len(ended.err.splitlines()) == 1


UNUSABLE = ("x" * 300 + ".png", "p001.png/in_a_file.png", "../leaves.png")
"""Sources that cannot be files beside p001.png."""


@pytest.fixture(params=UNUSABLE)
def partly_named(request: pytest.FixtureRequest, draw, call, tmp_path: Path) -> Path:
    """A data set of four images, the third of which has a source that cannot be a file."""
    folder, data = draw(tmp_path / "in", 4, size=(16, 16)), tmp_path / "data"
    assert call("pack", "--images", folder / "images", "--out", data, "--workers", 1).code == 0
    manifest = json.loads((data / "index.json").read_text())
    with ShardWriter(data / "unlabelled-000000.tar") as writer:
        for number in range(4):
            image = (folder / "images" / f"p{number:03d}.png").read_bytes()
            source = request.param if number == 2 else f"p{number:03d}.png"
            info = json.dumps({"source": source}).encode()
            writer.add(f"k{number}", {"png": image, "json": info})
        file = writer.seal()
    manifest["splits"]["unlabelled"]["shards"][0].update(
        bytes=file.bytes, sha256=file.sha256, idx_sha256=file.idx_sha256
    )
    (data / "index.json").write_text(json.dumps(manifest))
    return data


def test_a_sample_whose_name_is_unusable_fails_alone(
    partly_named: Path, call, content, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ended = call("unpack", "--data", partly_named, "--out", out)
    assert ended.code == 3
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    assert ended.out == f"3 samples in {out}, 1 could not be unpacked\n"
    expected = {f"p{number:03d}.png" for number in (0, 1, 3)}
    assert set(content(out / "images")) == expected
    assert not [*tmp_path.rglob("*leaves*")]
    assert call("unpack", "--data", partly_named, "--out", out).out == ended.out


@pytest.mark.parametrize("more", [(), ("--fail-fast",)])
def test_an_input_whose_name_is_unusable_fails_alone_in_predict(
    more: tuple[str, ...], partly_named: Path, make_checkpoint, call, content, tmp_path: Path
) -> None:
    out = tmp_path / "masks"
    given = ("--checkpoint", make_checkpoint(), "--input", partly_named, "--workers", 0, "--png")
    ended = call("predict", *given, "--out", out, *more)
    assert len(ended.err.splitlines()) == 1
    if more:
        assert ended.code == 1
        assert not (out / "index.json").exists()
        return
    assert ended.code == 3, ended.err
    assert "1 inputs could not be read" in ended.err
    # Whichever of a file and a folder of one name comes first is written.
    assert len(content(out / "png")) == 3
    assert len((out / "errors.jsonl").read_text().splitlines()) == 1
    assert json.loads((out / "state.json").read_text())["images"] == 3


def test_a_masked_image_with_a_name_of_255_bytes_is_packed_and_unpacked(
    pair: Path, call, content, tmp_path: Path
) -> None:
    for part in ("images", "masks"):
        (pair / part / "a.png").rename(pair / part / f"{'x' * 251}.png")
    out = round_trip(pair, tmp_path / "new", call, "--mask-format", "binary")
    assert {*content(out / "images"), *content(out / "masks")} == {f"{'x' * 251}.png"}


def test_a_bucket_that_never_answers_is_one_line(call, monkeypatch) -> None:
    pytest.importorskip("aiohttp")
    # Restored after the test.
    monkeypatch.setenv("UNET_REMOTE_TIMEOUT", "60")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(99)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/data"
        ended = call("unpack", "--data", url, "--out", "unused", "--remote-timeout", 0.5)
    assert ended.code == 1
    assert ended.err == (
        f"unet unpack: {url}/index.json: no answer within --remote-timeout 0.5; check address, "
        "credentials and network, then rerun the same command to resume\n"
    )
    wrong = call("unpack", "--data", url, "--out", "unused", "--remote-timeout", 0)
    assert wrong.code == 2
    assert wrong.err == "unet unpack: --remote-timeout must be a number of seconds > 0, got 0.0\n"
