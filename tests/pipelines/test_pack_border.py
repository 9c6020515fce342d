"""`packing.pack_options`, `pack`: border maps, byte-identical for any number of workers."""

import io
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipelines import pack
from pipelines.pack import BorderOptions, PackConfig
from pipelines.packing.options import MaskOptions, PairingOptions, SourceOptions
from pipelines.runtime.errors import RunError
from shards.manifest import read_manifest
from shards.masks.borders import compute_border_map
from shards.offsets import read_offsets
from tests.conftest import flags

SIGMA = ("--border-sigma", 5)
THREE = ("--classes", "background", "cell", "nucleus")


@pytest.fixture(scope="session")
def dots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of 9 images and masks of classes 0, 1 and 2: squares, some near each other."""
    folder = tmp_path_factory.mktemp("dots")
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for number in range(9):
        rng = np.random.default_rng([3, number])
        pixels = rng.integers(0, 255, (40, 48, 3)).astype(np.uint8)
        mask = np.zeros((40, 48), np.uint8)
        for row, column in rng.integers(0, 34, (7, 2)):
            mask[row : row + 5, column : column + 5] = rng.integers(1, 3)
        Image.fromarray(pixels).save(folder / "images" / f"d{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"d{number}.png")
    return folder


def border_flags(folder: Path, out: Path, *more: object) -> list[object]:
    """Return flags that pack `dots` with border maps, three samples per shard."""
    more = ("--samples-per-shard", 3, *SIGMA, *THREE, *more)
    return flags(folder, out, *more, mask_format="index")


@pytest.fixture(scope="session")
def bordered(tmp_path_factory: pytest.TempPathFactory, dots: Path, call) -> Path:
    """`dots` packed with border maps."""
    out = tmp_path_factory.mktemp("bordered") / "out"
    ended = call("pack", *border_flags(dots, out))
    assert ended.code == 0, ended.err
    assert "border maps: sigma 5 pixels, objects: cell, nucleus" in ended.out
    return out


def test_every_sample_has_the_map_of_its_mask(bordered: Path, samples) -> None:
    found = samples(bordered)
    assert len(found) == 9
    for sample in found.values():
        border = sample.raw.decode_border((48, 40))
        assert np.array_equal(border, compute_border_map(sample.mask, (1, 2), 5))
        assert border.max() > 100


def test_without_border_sigma_there_are_no_maps(dots: Path, call, samples, tmp_path: Path) -> None:
    ended = call("pack", *flags(dots, tmp_path / "out", *THREE, mask_format="index"))
    assert (ended.code, "border maps" in ended.out) == (0, False)
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.border_sigma, manifest.border_classes) == (None, ())
    for sample in samples(tmp_path / "out").values():
        assert (sample.raw.border, sample.raw.decode_border((48, 40))) == (None, None)


def test_maps_change_nothing_else_in_the_shards(
    bordered: Path, dots: Path, call, samples, tmp_path
) -> None:
    ended = call("pack", *flags(dots, tmp_path / "out", *THREE, mask_format="index"))
    assert ended.code == 0
    plain, found = samples(tmp_path / "out"), samples(bordered)
    assert {
        s: (p.split, p.raw.key, p.raw.image, p.raw.mask, p.raw.info) for s, p in plain.items()
    } == {s: (p.split, p.raw.key, p.raw.image, p.raw.mask, p.raw.info) for s, p in found.items()}


def test_the_manifest_describes_the_maps(bordered: Path) -> None:
    manifest = read_manifest(bordered)
    assert manifest.border_sigma == 5
    assert manifest.border_classes == ("cell", "nucleus")


def test_idx_files_locate_the_maps(bordered: Path) -> None:
    for shard in sorted(bordered.glob("*.tar")):
        data, index = shard.read_bytes(), read_offsets(shard)
        with tarfile.open(shard) as tar:
            expected = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        entries = [index[row] for row in range(len(index))]
        members = [m for e in entries for m in (e.image, e.mask, e.info, e.border) if m is not None]
        assert {m.name: data[m.offset : m.offset + m.size] for m in members} == expected
        assert [e.border.name for e in entries if e.border] == [
            f"{e.key}.border.png" for e in entries
        ]


def test_stock_webdataset_reads_shards_with_maps(bordered: Path) -> None:
    files = [str(path) for path in sorted(bordered.glob("*.tar"))]
    found = list(webdataset.WebDataset(files, shardshuffle=False))
    assert len({sample["__key__"] for sample in found}) == 9
    for sample in found:
        image = Image.open(io.BytesIO(sample["border.png"]))
        assert (image.mode, image.size) == ("L", (48, 40))
        assert {"png", "mask.png", "json"} <= set(sample)


# ---- classes that are objects


@pytest.mark.parametrize(
    ("names", "chosen", "cells"),
    [
        (("background", "cell", "nucleus"), (), ("cell", "nucleus")),
        (("cell", "Background", "nucleus"), (), ("cell", "nucleus")),
        (("membrane", "cell", "nucleus"), (), ("cell", "nucleus")),
        (("background", "cell", "nucleus"), ("nucleus",), ("nucleus",)),
        (("background", "cell", "nucleus"), ("nucleus", "cell", "cell"), ("cell", "nucleus")),
        (("background", "cell", "nucleus"), ("background",), ("background",)),
    ],
)
def test_which_classes_are_objects(names, chosen, cells) -> None:
    options = BorderOptions(border_sigma=2.5, border_classes=chosen)
    rule = options.make_rule(names)
    assert rule is not None
    assert (options.class_names(names), rule.sigma) == (cells, 2.5)
    assert tuple(names[number] for number in rule.classes) == cells


def test_maps_use_the_given_classes(dots: Path, call, samples, tmp_path: Path) -> None:
    ended = call("pack", *border_flags(dots, tmp_path / "out", "--border-classes", "nucleus"))
    assert ended.code == 0, ended.err
    assert read_manifest(tmp_path / "out").border_classes == ("nucleus",)
    for sample in samples(tmp_path / "out").values():
        expected = compute_border_map(sample.mask, (2,), 5)
        assert np.array_equal(sample.raw.decode_border((48, 40)), expected)


def test_maps_are_made_of_the_stored_mask(dots: Path, call, samples, tmp_path) -> None:
    ended = call("pack", *border_flags(dots, tmp_path / "out", "--resize", 24))
    assert ended.code == 0, ended.err
    for sample in samples(tmp_path / "out").values():
        border = sample.raw.decode_border((24, 20))
        assert np.array_equal(border, compute_border_map(sample.mask, (1, 2), 5))


# ---- byte-identical


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_of_maps_do_not_depend_on_the_workers(
    workers: int, dots: Path, bordered: Path, call, content, tmp_path: Path
) -> None:
    ended = call("pack", *border_flags(dots, tmp_path / "out"), "--workers", workers)
    assert ended.code == 0, ended.err
    assert content(tmp_path / "out") == content(bordered)


def test_parts_make_the_same_maps(dots: Path, bordered: Path, call, content, tmp_path) -> None:
    for part in (("--part", "2/2"), ("--part", "1/2"), ("--finish",)):
        ended = call("pack", *border_flags(dots, tmp_path / "out", *part))
        assert ended.code == 0, ended.err
    assert content(tmp_path / "out") == content(bordered)


def test_verify_headers_writes_the_same_shards(
    dots: Path, call, content, samples, tmp_path: Path
) -> None:
    canonical = tmp_path / "in"
    assert call("pack", *border_flags(dots, tmp_path / "first")).code == 0
    assert call("unpack", "--data", tmp_path / "first", "--out", canonical).code == 0
    for verify in ("full", "headers"):
        ended = call("pack", *border_flags(canonical, tmp_path / verify, "--verify", verify))
        assert ended.code == 0, ended.err
    full, headers = content(tmp_path / "full"), content(tmp_path / "headers")
    for name in ("index.json", ".pack/plan.json"):
        assert full.pop(name) != headers.pop(name)
    assert full == headers
    assert all(sample.raw.border for sample in samples(tmp_path / "headers").values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--border-sigma", 4), "other settings (border sigma)"),
        (("--border-classes", "cell"), "other settings (border classes)"),
    ],
)
def test_a_pack_resumes_only_with_the_same_map_settings(
    change, message: str, dots: Path, call, content, bordered: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(dots, folder)
    ended = call("pack", *border_flags(folder, out, "--part", "1/2"))
    assert ended.code == 0, ended.err
    ended = call("pack", *border_flags(folder, out, *change))
    assert (ended.code, message in ended.err) == (1, True)
    # The copied files have the same times as the originals.
    assert call("pack", *border_flags(folder, out)).code == 0
    assert content(out) == content(bordered)


# ---- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--border-sigma", 0), "--border-sigma must be a finite number of pixels > 0, got 0.0"),
        (
            ("--border-sigma", "nan"),
            "--border-sigma nan: not a finite number",
        ),
        (("--border-classes", "cell"), "--border-classes needs --border-sigma"),
        (
            (*SIGMA, "--border-classes", "cells"),
            "--border-classes cells is not a class; classes: background cell nucleus",
        ),
    ],
)
def test_invalid_map_settings_are_refused_before_anything_is_read(
    change: tuple[object, ...], message: str, call, tmp_path: Path
) -> None:
    more = flags(tmp_path / "in", tmp_path / "out", *THREE, *change, mask_format="index")
    ended = call("pack", *more)
    assert ended.code == 2
    assert message in ended.message
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", [SIGMA, ("--border-classes", "cell")])
def test_maps_need_masks(flag: tuple[object, ...], call, tmp_path: Path) -> None:
    ended = call("pack", "--images", tmp_path, "--out", tmp_path / "out", *flag)
    assert ended.code == 2
    assert f"{flag[0]} needs --masks" in ended.message


def test_a_proposed_command_keeps_border_sigma(dots: Path, call, tmp_path: Path) -> None:
    ended = call("pack", *flags(dots, tmp_path / "out", *SIGMA, mask_format="auto"))
    assert ended.code == 0, ended.err
    assert "--border-sigma 5" in ended.out


def test_without_scipy_nothing_is_started(dots: Path, call, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    ended = call("pack", *border_flags(dots, tmp_path / "out"))
    assert ended.code == 2
    assert "--border-sigma requires SciPy: pip install 'unet-shards[scipy]'" in ended.message
    assert not (tmp_path / "out").exists()
    # Packing without maps does not need it.
    ended = call("pack", *flags(dots, tmp_path / "out", *THREE, mask_format="index"))
    assert ended.code == 0, ended.err


def test_a_worker_without_scipy_is_reported(dots: Path, tmp_path: Path, monkeypatch) -> None:
    calls = []

    def without_scipy(*arguments: object, **options: object) -> list[str]:
        monkeypatch.setitem(sys.modules, "scipy", None)
        calls.append(arguments)
        return pack_shard(*arguments, **options)

    pack_shard = pack.pack_shard
    monkeypatch.setattr(pack, "pack_shard", without_scipy)
    config = PackConfig(
        out=str(tmp_path / "out"),
        workers=1,
        source=SourceOptions(
            pairing=PairingOptions(images=(dots / "images",), masks=(dots / "masks",)),
            mask=MaskOptions(mask_format="index", classes=("background", "cell", "nucleus")),
        ),
        border=BorderOptions(border_sigma=5),
    )
    with pytest.raises(RunError, match=r"a worker of the cluster cannot make border maps: .*scipy"):
        pack.run(config)
    assert calls
    assert not [*(tmp_path / "out").glob("*.tar")]


def test_a_key_too_long_for_a_map_is_refused_by_name(call, dots: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(dots, folder)
    fits, long = f"{'x' * 89}.png", f"{'y' * 90}.png"
    for part in ("images", "masks"):
        (folder / part / "d0.png").rename(folder / part / fits)
        (folder / part / "d1.png").rename(folder / part / long)
    ended = call("pack", *border_flags(folder, tmp_path / "out"))
    assert ended.code == 1
    assert (
        f"{folder / 'images' / long} has a key of 90 bytes; the limit with border maps is "
        "89: shorten its name" in ended.err
    )
    assert fits not in ended.err
    ended = call("pack", *border_flags(folder, tmp_path / "out", "--keep-going"))
    assert ended.code == 3, ended.err
    assert sum(split.samples for split in read_manifest(tmp_path / "out").splits.values()) == 8


# ---- the other verbs


def test_maps_are_not_unpacked(bordered: Path, dots: Path, call, tmp_path: Path) -> None:
    assert call("unpack", "--data", bordered, "--out", tmp_path / "out").code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "images",
        "masks",
        "unpack.json",
    }
    for part in ("images", "masks"):
        names = {path.name for path in (tmp_path / "out" / part).iterdir()}
        assert names == {path.name for path in (dots / part).iterdir()}


def test_shards_with_maps_can_be_indexed_again(
    bordered: Path, call, content, samples, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(bordered, out)
    (out / "index.json").unlink()
    ended = call("index", out, *THREE, "--workers", 1)
    assert ended.code == 0, ended.err
    before, after = content(bordered), content(out)
    assert before.pop("index.json") != after.pop("index.json")
    assert before == after
    # The shards do not record the sigma.
    assert read_manifest(out).border_sigma is None
    assert {s: p.raw.border for s, p in samples(out).items()} == {
        s: p.raw.border for s, p in samples(bordered).items()
    }


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_map_alone_is_not_a_sample(bordered: Path, samples, call, tmp_path: Path) -> None:
    raw = samples(bordered)["d0.png"].raw
    sample = {"a.png": raw.image, "a.mask.png": raw.mask}
    write_tar(tmp_path / "in" / "s.tar", {**sample, "b.border.png": raw.border})
    ended = call("index", tmp_path / "in", *THREE, "--workers", 1)
    assert ended.code == 1
    assert "b.border.png has no image" in ended.err


def test_without_masks_border_png_may_be_an_image_too(
    bordered: Path, samples, call, tmp_path: Path
) -> None:
    raw = samples(bordered)["d0.png"].raw
    members = {"a.png": raw.image, "a.border.png": samples(bordered)["d1.png"].raw.image}
    write_tar(tmp_path / "in" / "s.tar", members)
    ended = call("index", tmp_path / "in", "--workers", 1)
    assert ended.code == 1
    assert "a.png and a.border.png may be images of one sample" in ended.err


def test_border_png_is_not_an_image_extension(call, tmp_path: Path) -> None:
    ended = call("index", tmp_path, "--image-ext", "border.png")
    assert ended.code == 2
    assert "not an extension of images in shards; json, mask.png and border.png" in ended.message
