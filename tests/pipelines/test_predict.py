"""`unet predict`: the right mask for every image, byte-identical after kills, as a data set."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import predict
from shards.manifest import read_manifest
from shards.order import Address
from shards.reader import ShardReader
from tests.conftest import TINY_TRAINING
from unet import UNet


@pytest.fixture(scope="module")
def bright(make_checkpoint) -> Path:
    """A model that finds what is above 127 in the red channel."""
    return make_checkpoint()


@pytest.fixture(scope="module")
def valid(bright: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with valid convolutions: it sees 8 pixels more on each side than it predicts."""
    found = UNet.from_pretrained(bright)
    model = UNet(replace(found.config, padding="valid"), found.spec)
    model.load_state_dict(found.state_dict())
    folder = tmp_path_factory.mktemp("valid") / "checkpoint"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven images of odd sizes, modes and places, from one pixel up."""
    root = tmp_path_factory.mktemp("images")
    sizes = [(1, 1), (1, 37), (33, 1), (48, 48), (48, 48), (47, 51), (64, 40), (90, 130)]
    for number, size in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 255, (*size, 3)).astype(np.uint8)
        path = root / f"{'abc'[number % 3]}/deep" / f"p{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    grey = np.random.default_rng(90).integers(0, 255, (20, 30)).astype(np.uint8)
    Image.fromarray(grey).save(root / "grey.v2.png")
    Image.fromarray(grey).convert("P").save(root / "indexed.gif")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(grey).save(root / "turned.png", exif=exif)
    return root


def argv(checkpoint: Path, given: object, out: Path, *more: object) -> list[object]:
    return ["--checkpoint", checkpoint, "--input", given, "--out", out, "--workers", 0, *more]


def results(out: Path) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    """{source: (mask, json)} of a finished prediction, read as a data set."""
    manifest = read_manifest(out)
    found = {}
    for number, shard in enumerate(manifest.splits["predicted"].shards):
        reader = ShardReader(out, manifest.splits["predicted"].shards)
        for row in range(shard.samples):
            raw = reader.read(Address(0, number, row))
            assert raw.mask is not None
            mask = Image.open(io.BytesIO(raw.mask))
            assert mask.mode == "P"
            info = raw.parse_info()
            found[info["source"]] = (np.asarray(mask), info)
    return found


def upright(path: Path) -> np.ndarray:
    image = Image.open(path)
    pixels = np.asarray(image.convert("RGB"))
    return np.rot90(pixels, -1) if path.stem == "turned" else pixels


def test_every_image_gets_the_mask_it_should_have_in_its_own_size(
    bright: Path, images: Path, call, tmp_path: Path
) -> None:
    ended = call("predict", *argv(bright, images, tmp_path, "--samples-per-shard", 4))
    assert ended.code == 0, ended.err
    assert f"11 masks in {tmp_path}" in ended.out
    found = results(tmp_path)
    files = [path for path in images.rglob("*.*") if path.is_file()]
    assert set(found) == {str(path.relative_to(images)) for path in files}
    for path in files:
        mask, info = found[str(path.relative_to(images))]
        image = upright(path)
        assert mask.shape == image.shape[:2]
        np.testing.assert_array_equal(mask, image[..., 0] > 127)
        assert (info["height"], info["width"]) == mask.shape
        assert info["shares"]["foreground"] == round(float((mask == 1).mean()), 6)
        assert 0.5 <= info["confidence"] <= 1


def test_tiles_join_without_a_seam(bright: Path, images: Path, call, tmp_path: Path) -> None:
    more = ("--tile", 32, "--overlap", 0.3, "--batch-size", 3)
    assert call("predict", *argv(bright, images, tmp_path, *more)).code == 0
    for source, (mask, _) in results(tmp_path).items():
        np.testing.assert_array_equal(mask, upright(images / source)[..., 0] > 127)


def test_an_overlap_without_effect_is_refused(valid: Path, images: Path, call, tmp_path) -> None:
    ended = call("predict", *argv(valid, images, tmp_path / "out", "--overlap", 0.5))
    assert ended.code == 2
    assert "--overlap 0.5: has no effect on this network of valid convolutions" in ended.err
    assert not (tmp_path / "out").exists()


def test_a_network_of_valid_convolutions_gives_masks_that_lie_on_the_images(
    valid: Path, images: Path, call, tmp_path: Path
) -> None:
    more = ("--tile", 48, "--batch-size", 3)
    assert call("predict", *argv(valid, images, tmp_path, *more)).code == 0
    found = results(tmp_path)
    assert len(found) == 11
    for source, (mask, _) in found.items():
        np.testing.assert_array_equal(mask, upright(images / source)[..., 0] > 127)


def test_evaluation_counts_the_masks_that_are_predicted(
    valid: Path, shards: Path, cells: Path, call, tmp_path: Path
) -> None:
    tiles = ("--tile", 40, "--batch-size", 3)
    given = ("--checkpoint", valid, "--data", shards, "--split", "val", "--out", tmp_path / "s")
    assert call("evaluate", *given, "--workers", 0, *tiles).code == 0
    scores = json.loads((tmp_path / "s" / "scores.json").read_text())
    assert call("predict", *argv(valid, shards, tmp_path / "m", *tiles)).code == 0
    found = results(tmp_path / "m")
    expected = {"tp": 0, "fp": 0, "fn": 0}
    for name in (f"p{number:03d}.png" for number in range(scores["num_images"])):
        mask, true = found[name][0] == 1, np.asarray(Image.open(cells / "masks" / name)) > 0
        expected["tp"] += int((mask & true).sum())
        expected["fp"] += int((mask & ~true).sum())
        expected["fn"] += int((~mask & true).sum())
    assert {name: scores["classes"]["foreground"][name] for name in expected} == expected


def test_mirrors_are_averaged(trained: Path, images: Path, call, tmp_path: Path) -> None:
    for name, more in (("plain", ()), ("tta", ("--tta",))):
        assert call("predict", *argv(trained, images, tmp_path / name, *more)).code == 0
    turned = tmp_path / "turned"
    for path in images.rglob("p*.png"):
        (turned / path.parent.relative_to(images)).mkdir(parents=True, exist_ok=True)
        image = Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image.save(turned / path.relative_to(images))
    assert call("predict", *argv(trained, turned, tmp_path / "back", "--tta")).code == 0
    tta, back = results(tmp_path / "tta"), results(tmp_path / "back")
    assert len(back) == 8
    for source, (mask, info) in back.items():
        # Two classes may be as likely as each other but for rounding.
        assert (mask[:, ::-1] != tta[source][0]).mean() < 0.01
        assert info["confidence"] == pytest.approx(tta[source][1]["confidence"], abs=1e-5)
    plain = results(tmp_path / "plain")
    assert any(
        info["confidence"] != plain[source][1]["confidence"] for source, (_, info) in tta.items()
    )


@pytest.mark.parametrize(
    ("orientation", "flip", "equal"),
    [
        ("any", Image.Transpose.FLIP_TOP_BOTTOM, True),
        ("upright", Image.Transpose.FLIP_LEFT_RIGHT, True),
        ("upright", Image.Transpose.FLIP_TOP_BOTTOM, False),
    ],
)
def test_mirrors_are_those_of_the_training(
    trained: Path, images: Path, call, tmp_path: Path, orientation: str, flip, equal: bool
) -> None:
    checkpoint, folders = tmp_path / "checkpoint", (tmp_path / "plain", tmp_path / "turned")
    UNet.from_pretrained(trained / "checkpoints" / "best").save_pretrained(checkpoint)
    plain = json.loads((checkpoint / "config.json").read_text())
    plain["data"]["orientation"] = orientation
    (checkpoint / "config.json").write_text(json.dumps(plain))
    image = Image.open(next(images.rglob("p7.png")))
    for folder, pixels in zip(folders, (image, image.transpose(flip)), strict=True):
        folder.mkdir()
        pixels.save(folder / "p.png")
        flags = argv(checkpoint, folder, folder / "out", "--tta")
        assert call("predict", *flags).code == 0
    first, second = (results(folder / "out")["p.png"][1]["confidence"] for folder in folders)
    assert (first == pytest.approx(second, abs=1e-5)) is equal


def test_mirrors_that_no_image_of_the_training_had_are_refused(
    shards: Path, images: Path, call, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ("--data", shards, "--run-dir", run, "--steps", 1, *TINY_TRAINING)
    ended = call("train", *flags, "--augment.orientation", "fixed")
    assert ended.code == 0, ended.err
    stored = json.loads((run / "checkpoints" / "best" / "config.json").read_text())
    assert stored["data"]["orientation"] == "fixed"
    ended = call("predict", *argv(run, images, tmp_path / "out", "--tta"))
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    line = "--tta: the model was trained with --augment.orientation fixed, without flips; remove it"
    assert line in ended.err
    ended = call("train", *flags, "--augment.orientation", "fixed", "--tiles.tta")
    assert "--tiles.tta has no effect with --augment.orientation fixed" in ended.err


def test_the_manifest_counts_what_was_predicted(
    bright: Path, images: Path, call, tmp_path: Path
) -> None:
    assert call("predict", *argv(bright, images, tmp_path, "--samples-per-shard", 4)).code == 0
    manifest = read_manifest(tmp_path)
    split = manifest.splits["predicted"]
    assert manifest.classes == ("background", "foreground")
    assert [shard.samples for shard in split.shards] == [4, 4, 3]
    assert sum(size.images for size in split.sizes) == 11
    masks = [mask for mask, _ in results(tmp_path).values()]
    pixels = np.sum([shard.pixels for shard in split.shards], axis=0)
    assert pixels.tolist() == [
        sum(int((mask == 0).sum()) for mask in masks),
        sum(int((mask == 1).sum()) for mask in masks),
        0,
    ]
    state = json.loads((tmp_path / "state.json").read_text())
    assert state == {"finished": True, "images": 11, "errors": 0}


def test_predicted_shards_are_unpacked_like_any_other(
    bright: Path, images: Path, call, tmp_path: Path
) -> None:
    assert call("predict", *argv(bright, images, tmp_path / "masks")).code == 0
    ended = call("unpack", "--data", tmp_path / "masks", "--out", tmp_path / "folders")
    assert ended.code == 0, ended.err
    masks = {
        str(path.relative_to(tmp_path / "folders" / "masks").with_suffix(""))
        for path in (tmp_path / "folders" / "masks").rglob("*.png")
    }
    files = [path for path in images.rglob("*.*") if path.is_file()]
    assert masks == {str(path.relative_to(images).with_suffix("")) for path in files}


def test_png_and_overlay_lie_beside_in_the_size_of_the_image(
    bright: Path, images: Path, call, tmp_path: Path
) -> None:
    ended = call("predict", *argv(bright, images, tmp_path, "--png", "--overlay"))
    assert ended.code == 0
    files = [path for path in images.rglob("*.*") if path.is_file()]
    for path in files:
        name = path.relative_to(images).with_suffix(".png")
        image = upright(path)
        mask = Image.open(tmp_path / "png" / name)
        assert mask.mode == "P"
        np.testing.assert_array_equal(np.asarray(mask), image[..., 0] > 127)
        drawn = np.asarray(Image.open(tmp_path / "overlay" / name))
        assert drawn.shape == image.shape
        flat = np.asarray(mask) == 0
        np.testing.assert_array_equal(drawn[flat], image[flat])


def test_one_image_a_pattern_and_a_list_are_inputs_too(
    bright: Path, images: Path, call, tmp_path: Path
) -> None:
    one = images / "a/deep/p3.png"
    (tmp_path / "list.txt").write_text(f"# two of them\n{one}\n\n{images / 'grey.v2.png'}\n")
    for number, (given, expected) in enumerate(
        [
            (one, {"p3.png"}),
            (f"{images}/*/deep/p[34].png", {"a/deep/p3.png", "b/deep/p4.png"}),
            (tmp_path / "list.txt", {"a/deep/p3.png", "grey.v2.png"}),
        ]
    ):
        out = tmp_path / str(number)
        ended = call("predict", *argv(bright, given, out))
        assert ended.code == 0, ended.err
        assert set(results(out)) == expected


def test_shards_are_inputs_too(bright: Path, shards: Path, cells: Path, call, tmp_path) -> None:
    assert call("predict", *argv(bright, shards, tmp_path)).code == 0
    found = results(tmp_path)
    assert set(found) == {path.name for path in (cells / "images").iterdir()}
    for source, (mask, _) in found.items():
        image = np.asarray(Image.open(cells / "images" / source))
        np.testing.assert_array_equal(mask, image[..., 0] > 127)


def test_colour_images_go_into_a_grey_model(make_checkpoint, images: Path, call, tmp_path) -> None:
    assert call("predict", *argv(make_checkpoint("L"), images, tmp_path)).code == 0
    mask, _ = results(tmp_path)["a/deep/p3.png"]
    grey = np.asarray(Image.open(images / "a/deep/p3.png").convert("L"))
    np.testing.assert_array_equal(mask, grey > 127)


@pytest.mark.parametrize(("workers", "precision"), [(1, "no"), (2, "no"), (2, "bf16")])
def test_the_bytes_do_not_depend_on_the_number_of_workers(
    workers: int, precision: str, trained, images: Path, call, content, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    more = ("--samples-per-shard", 4, "--tile", 64)
    assert call("predict", *argv(trained, images, tmp_path / "0", *more)).code == 0
    given = argv(trained, images, tmp_path / "n", *more)
    assert call("predict", *given, "--workers", workers).code == 0
    assert content(tmp_path / "n") == content(tmp_path / "0")


# ---- killed


def test_after_kills_the_bytes_are_the_same_and_nothing_is_done_twice(
    trained: Path, draw, call, spawn, wait_for, kill, content, tmp_path: Path
) -> None:
    images = draw(tmp_path / "in", 40, size=(160, 160)) / "images"
    more = ("--samples-per-shard", 2)
    assert call("predict", *argv(trained, images, tmp_path / "whole", *more)).code == 0
    out = tmp_path / "out"
    finished: dict[Path, tuple[int, int]] = {}
    num_kills = 0
    for target in (1, 5):
        process = spawn("predict", *argv(trained, images, out, *more))
        wait_for(lambda t=target: len([*out.glob("*.tar")]) >= t, f"shard {target}")
        kill(process)
        if (out / "index.json").exists():
            break
        num_kills += 1
        for path in out.glob("*.tar"):
            stat = (path.stat().st_ino, path.stat().st_mtime_ns)
            assert finished.setdefault(path, stat) == stat
    assert num_kills >= 1
    assert call("predict", *argv(trained, images, out, *more)).code == 0
    for path, stat in finished.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == stat
    found = {name: data for name, data in content(out).items() if not name.startswith(".")}
    assert found == content(tmp_path / "whole")


def killed_at(rename: int, before: bool, arguments: list[str]) -> None:
    """Predicts, and dies by SIGKILL just before or after the rename of that number."""
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
    os._exit(predict.main(arguments))


# The job; index, report and shard of each of two; state and manifest.
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("rename", range(1, 10))
def test_a_kill_at_any_rename_leaves_nothing_behind(
    rename: int, before: bool, bright: Path, draw, call, content, tmp_path: Path
) -> None:
    images = draw(tmp_path / "in", 3, size=(16, 16)) / "images"
    more = ("--samples-per-shard", 2)
    assert call("predict", *argv(bright, images, tmp_path / "whole", *more)).code == 0
    out = tmp_path / "out"
    arguments = [str(flag) for flag in argv(bright, images, out, *more)]
    process = multiprocessing.get_context("fork").Process(
        target=killed_at, args=(rename, before, arguments)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (out / "index.json").exists() == (rename == 9 and not before)
    ended = call("predict", *arguments)
    assert ended.code == 0, ended.err
    assert content(out) == content(tmp_path / "whole")


# ---- reruns with other settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--samples-per-shard", 3), "--samples-per-shard 4"),
        (("--tile", 512), "--tile 1024"),
        (("--overlap", 0.5), "--overlap 0.25"),
        (("--batch-size", 1), "--batch-size 4"),
        (("--tta",), "--no-tta"),
        (("--png",), "--no-png"),
        (("--overlay",), "--no-overlay"),
        (("--out-split", "train"), "--out-split predicted"),
        (("--threshold", 0.4), "no --threshold"),
        (("--min-area", 9), "--min-area 0"),
        (("--min-confidence", 0.9), "--min-confidence 0.0"),
        (("--probabilities", "png"), "--probabilities none"),
        (("--include-image",), "--no-include-image"),
    ],
)
def test_another_job_in_the_same_folder_is_refused_by_name(
    change: tuple[object, ...], message: str, bright: Path, images: Path, call, content, tmp_path
) -> None:
    given = argv(bright, images, tmp_path, "--samples-per-shard", 4)
    assert call("predict", *given).code == 0
    before = content(tmp_path)
    ended = call("predict", *given, *change)
    assert ended.code == 2
    given_now = " ".join(map(str, change))
    assert f"{given_now}: {tmp_path} was created with {message}; keep that" in ended.err
    assert content(tmp_path) == before
    ended = call("predict", *given)
    assert ended.code == 0
    assert content(tmp_path) == before


def test_another_checkpoint_or_other_inputs_are_refused(
    bright: Path, trained: Path, images: Path, call, tmp_path: Path
) -> None:
    mine = tmp_path / "in"
    shutil.copytree(images / "a", mine)
    assert call("predict", *argv(bright, mine, tmp_path / "out")).code == 0
    ended = call("predict", *argv(trained, mine, tmp_path / "out"))
    assert (ended.code, "was created with --checkpoint " in ended.err) == (2, True)
    shutil.copy(images / "grey.v2.png", mine / "more.png")
    ended = call("predict", *argv(bright, mine, tmp_path / "out"))
    assert (ended.code, "was created with --input (count " in ended.err) == (2, True)


def test_another_precision_is_refused(
    bright: Path, images: Path, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = argv(bright, images, tmp_path)
    assert call("predict", *given).code == 0
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    ended = call("predict", *given)
    assert (ended.code, "--mixed_precision bf16: " in ended.err) == (2, True)


def test_a_folder_with_other_shards_is_left_alone(
    bright: Path, images: Path, shards: Path, call, content
) -> None:
    before = content(shards)
    ended = call("predict", *argv(bright, images, shards))
    assert ended.code == 2
    assert "holds other shards" in ended.err
    assert content(shards) == before


# ---- what cannot be read


def test_what_cannot_be_read_is_listed_and_the_job_continues(
    bright: Path, draw, call, content, tmp_path: Path
) -> None:
    images = draw(tmp_path / "in", 6, size=(20, 20)) / "images"
    (images / "p001.png").write_bytes(b"")
    (images / "p002.png").write_bytes(b"no image")
    (images / "p004.png").write_bytes((images / "p004.png").read_bytes()[:-300])
    Image.new("RGBA", (8, 8)).save(images / "p900.png")
    (images / "p901.png").symlink_to(tmp_path / "nowhere.png")
    out = tmp_path / "out"
    given = argv(bright, images, out, "--samples-per-shard", 2)
    ended = call("predict", *given)
    assert ended.code == 3
    assert "5 inputs could not be read" in ended.out
    assert "Traceback" not in ended.err
    lines = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
    for (name, reason), line in zip(
        [
            ("p001.png", "is empty"),
            ("p002.png", "is not a readable image"),
            ("p004.png", "is damaged"),
            ("p900.png", "has transparent pixels"),
            ("p901.png", "cannot be read: No such file or directory"),
        ],
        lines,
        strict=True,
    ):
        assert line["input"] == str(images / name)
        assert reason in line["error"]
    parts = sorted(out.glob("predicted-*.errors.jsonl"))
    assert "".join(part.read_text() for part in parts) == (out / "errors.jsonl").read_text()
    assert set(results(out)) == {"p000.png", "p003.png", "p005.png"}
    assert json.loads((out / "state.json").read_text())["errors"] == 5
    # A rerun has the same exit code and leaves the same files.
    before = content(out)
    assert call("predict", *given).code == 3
    assert content(out) == before


def test_a_hostile_source_cannot_leave_the_folder(bright: Path, draw, call, tmp_path: Path) -> None:
    from shards.writer import ShardWriter

    data = tmp_path / "data"
    folder = draw(tmp_path / "in", 2, size=(16, 16))
    packed = ("--images", folder / "images", "--out", data, "--workers", 1)
    assert call("pack", *packed).code == 0
    manifest = json.loads((data / "index.json").read_text())
    image = (folder / "images" / "p000.png").read_bytes()
    sources = ["../../escaped.png", "/tmp/escaped.png", "fine.png"]
    with ShardWriter(data / "unlabelled-000000.tar") as writer:
        for number, source in enumerate(sources):
            info = json.dumps({"source": source}).encode()
            writer.add(f"k{number}", {"png": image, "json": info})
        file = writer.seal()
    manifest["splits"]["unlabelled"]["shards"][0].update(
        samples=file.samples,
        bytes=file.bytes,
        sha256=file.sha256,
        idx_sha256=file.idx_sha256,
    )
    manifest["splits"]["unlabelled"]["sizes"][0]["images"] = file.samples
    manifest["splits"]["unlabelled"]["samples"] = file.samples
    (data / "index.json").write_text(json.dumps(manifest))
    out = tmp_path / "deep" / "out"
    ended = call("predict", *argv(bright, data, out, "--png"))
    assert ended.code == 3
    assert [path.name for path in (out / "png").rglob("*")] == ["fine.png"]
    assert not [*tmp_path.rglob("escaped*")]
    assert (out / "errors.jsonl").read_text().count("a path that leaves the folder") == 2


@pytest.mark.parametrize("info", [b"[]", b"{", b'{"source": 5}', b"\xff"])
def test_a_damaged_description_is_an_error_of_its_own(
    info: bytes, bright: Path, draw, call, tmp_path: Path
) -> None:
    from shards.writer import ShardWriter

    data = tmp_path / "data"
    folder = draw(tmp_path / "in", 2, size=(16, 16))
    packed = ("--images", folder / "images", "--out", data, "--workers", 1)
    assert call("pack", *packed).code == 0
    manifest = json.loads((data / "index.json").read_text())
    image = (folder / "images" / "p000.png").read_bytes()
    with ShardWriter(data / "unlabelled-000000.tar") as writer:
        writer.add("bad", {"png": image, "json": info})
        writer.add("good", {"png": image, "json": b'{"source": "good.png"}'})
        file = writer.seal()
    manifest["splits"]["unlabelled"]["shards"][0].update(
        samples=file.samples,
        bytes=file.bytes,
        sha256=file.sha256,
        idx_sha256=file.idx_sha256,
    )
    (data / "index.json").write_text(json.dumps(manifest))
    ended = call("predict", *argv(bright, data, tmp_path / "out"))
    assert ended.code in (0, 3)
    assert "good.png" in results(tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ("nowhere", 2, "nowhere: does not exist; use an image, a folder, a list (.txt)"),
        ("nothing*.png", 2, "matches no file; check the pattern"),
        ("empty", 1, "contains no images"),
        ("twice", 1, "would write the same output; rename one of each"),
        ("empty.txt", 1, "lists no images"),
        ("binary.txt", 1, "binary.txt"),
    ],
)
def test_an_input_that_means_nothing_is_refused(
    given: str, code: int, message: str, bright: Path, call, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "twice").mkdir()
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / "twice" / name)
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    ended = call("predict", *argv(bright, tmp_path / given, tmp_path / "out"))
    assert ended.code == code
    assert message in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--samples-per-shard", 0), "--samples-per-shard must be >= 1, got 0"),
        (("--batch-size", 0), "--batch-size must be at least 1, got 0"),
        (("--tile", 8), "--tile must be at least 16 pixels, got 8"),
        (("--overlap", 1), "--overlap must be in [0, 0.75], got 1"),
        (("--workers", -1), "--workers must be >= 0, got -1"),
        (("--threshold", 0), "--threshold must be in (0, 1], got 0.0"),
        (("--threshold", 1.1), "--threshold must be in (0, 1], got 1.1"),
        (("--min-area", -1), "--min-area must be >= 0, got -1"),
        (("--min-confidence", 1), "--min-confidence must be in [0, 1), got 1.0"),
        (("--out-split", "../train"), "--out-split must be made of letters"),
        (("--out", "s3://bucket/*"), "--out s3://bucket/*: a URL must name a bucket"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    change: tuple[object, ...], message: str, call, tmp_path: Path
) -> None:
    ended = call("predict", *argv(tmp_path, tmp_path, tmp_path / "out", *change))
    assert ended.code == 2
    assert message in ended.message


def test_names_of_any_characters_become_safe_members(bright: Path, call, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    names = ["a b.c.png", "über.png", "x" * 120 + ".png", "semi;colon'.png"]
    for name in names:
        Image.new("RGB", (5, 4), (200, 0, 0)).save(tmp_path / "in" / name)
    assert call("predict", *argv(bright, tmp_path / "in", tmp_path / "out", "--png")).code == 0
    assert set(results(tmp_path / "out")) == set(names)
    assert {path.name for path in (tmp_path / "out" / "png").iterdir()} == set(names)
    with tarfile.open(tmp_path / "out" / "predicted-000000.tar") as tar:
        assert all(name.isascii() and " " not in name for name in tar.getnames())
