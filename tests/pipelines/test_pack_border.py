"""Border maps: made when they are asked for, the same bytes for all workers, one more member."""

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
from pipelines.config import RunError
from pipelines.pack import PackConfig
from shards.border import compute_border_map
from shards.index import read_manifest, read_offsets
from tests.conftest import flags

SIGMA = ("--border-sigma", 5)
THREE = ("--classes", "background", "cell", "nucleus")


@pytest.fixture(scope="session")
def dots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of 9 pictures and masks of the indices 0, 1 and 2: squares, some near each other."""
    folder = tmp_path_factory.mktemp("dots")
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for number in range(9):
        rng = np.random.default_rng([3, number])
        picture = rng.integers(0, 255, (40, 48, 3)).astype(np.uint8)
        mask = np.zeros((40, 48), np.uint8)
        for row, column in rng.integers(0, 34, (7, 2)):
            mask[row : row + 5, column : column + 5] = rng.integers(1, 3)
        Image.fromarray(picture).save(folder / "images" / f"d{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"d{number}.png")
    return folder


def told(folder: Path, out: Path, *more: object) -> list[object]:
    """The flags that pack `dots` with border maps, three samples a shard."""
    more = ("--samples-per-shard", 3, *SIGMA, *THREE, *more)
    return flags(folder, out, *more, mask_format="index")


@pytest.fixture(scope="session")
def bordered(tmp_path_factory: pytest.TempPathFactory, dots: Path, call) -> Path:
    """`dots` packed with border maps."""
    out = tmp_path_factory.mktemp("bordered") / "out"
    ended = call("pack", *told(dots, out))
    assert ended.code == 0, ended.err
    assert "border maps: sigma 5 pixels, the cells are: cell, nucleus" in ended.out
    return out


def test_every_sample_holds_the_map_of_its_mask(bordered: Path, samples) -> None:
    found = samples(bordered)
    assert len(found) == 9
    for sample in found.values():
        border = sample.raw.decode_border((48, 40))
        assert np.array_equal(border, compute_border_map(sample.mask, (1, 2), 5))
        assert border.max() > 100


def test_without_the_flag_there_is_none(dots: Path, call, samples, tmp_path: Path) -> None:
    ended = call("pack", *flags(dots, tmp_path / "out", *THREE, mask_format="index"))
    assert (ended.code, "border" in ended.out) == (0, False)
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.border_sigma, manifest.border_classes) == (None, ())
    for sample in samples(tmp_path / "out").values():
        assert (sample.raw.border, sample.raw.decode_border((48, 40))) == (None, None)


def test_all_else_is_as_without_maps(bordered: Path, dots: Path, call, samples, tmp_path) -> None:
    ended = call("pack", *flags(dots, tmp_path / "out", *THREE, mask_format="index"))
    assert ended.code == 0
    plain, found = samples(tmp_path / "out"), samples(bordered)
    assert {
        s: (p.split, p.raw.key, p.raw.image, p.raw.mask, p.raw.info) for s, p in plain.items()
    } == {s: (p.split, p.raw.key, p.raw.image, p.raw.mask, p.raw.info) for s, p in found.items()}


def test_the_manifest_says_what_the_maps_are(bordered: Path) -> None:
    manifest = read_manifest(bordered)
    assert manifest.border_sigma == 5
    assert manifest.border_classes == ("cell", "nucleus")


def test_the_index_files_point_at_the_maps(bordered: Path) -> None:
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


# ---- what is a cell


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
def test_the_classes_that_are_cells(names, chosen, cells) -> None:
    config = PackConfig(
        images=Path("images"),
        masks=Path("masks"),
        out="out",
        mask_format="index",
        classes=names,
        border_sigma=2.5,
        border_classes=chosen,
    )
    rule = config.border_rule()
    assert rule is not None
    assert (config.border_names(), rule.sigma) == (cells, 2.5)
    assert tuple(names[number] for number in rule.classes) == cells


def test_maps_are_made_of_the_classes_that_were_named(
    dots: Path, call, samples, tmp_path: Path
) -> None:
    ended = call("pack", *told(dots, tmp_path / "out", "--border-classes", "nucleus"))
    assert ended.code == 0, ended.err
    assert read_manifest(tmp_path / "out").border_classes == ("nucleus",)
    for sample in samples(tmp_path / "out").values():
        expected = compute_border_map(sample.mask, (2,), 5)
        assert np.array_equal(sample.raw.decode_border((48, 40)), expected)


def test_maps_are_made_of_the_mask_as_it_is_stored(dots: Path, call, samples, tmp_path) -> None:
    ended = call("pack", *told(dots, tmp_path / "out", "--resize", 24))
    assert ended.code == 0, ended.err
    for sample in samples(tmp_path / "out").values():
        border = sample.raw.decode_border((24, 20))
        assert np.array_equal(border, compute_border_map(sample.mask, (1, 2), 5))


# ---- the same bytes


@pytest.mark.parametrize("workers", [2, 3])
def test_the_bytes_of_maps_do_not_depend_on_the_workers(
    workers: int, dots: Path, bordered: Path, call, content, tmp_path: Path
) -> None:
    ended = call("pack", *told(dots, tmp_path / "out"), "--workers", workers)
    assert ended.code == 0, ended.err
    assert content(tmp_path / "out") == content(bordered)


def test_parts_make_the_same_maps(dots: Path, bordered: Path, call, content, tmp_path) -> None:
    for part in (("--part", "2/2"), ("--part", "1/2"), ("--finish",)):
        ended = call("pack", *told(dots, tmp_path / "out", *part))
        assert ended.code == 0, ended.err
    assert content(tmp_path / "out") == content(bordered)


def test_believing_headers_makes_the_same_shards(
    dots: Path, call, content, samples, tmp_path: Path
) -> None:
    canonical = tmp_path / "in"
    assert call("pack", *told(dots, tmp_path / "first")).code == 0
    assert call("unpack", "--data", tmp_path / "first", "--out", canonical).code == 0
    for verify in ("full", "headers"):
        ended = call("pack", *told(canonical, tmp_path / verify, "--verify", verify))
        assert ended.code == 0, ended.err
    full, headers = content(tmp_path / "full"), content(tmp_path / "headers")
    assert full.pop("index.json") != headers.pop("index.json")
    assert full == headers
    assert all(sample.raw.border for sample in samples(tmp_path / "headers").values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--border-sigma", 4), "other settings (border sigma)"),
        (("--border-classes", "cell"), "other settings (border classes)"),
    ],
)
def test_a_pack_goes_on_with_the_same_maps_only(
    change, said: str, dots: Path, call, content, bordered: Path, tmp_path: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(dots, folder)
    ended = call("pack", *told(folder, out, "--part", "1/2"))
    assert ended.code == 0, ended.err
    ended = call("pack", *told(folder, out, *change))
    assert (ended.code, said in ended.err) == (1, True)
    # The files were copied with their times.
    assert call("pack", *told(folder, out)).code == 0
    assert content(out) == content(bordered)


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--border-sigma", 0), "--border-sigma must be a finite number of pixels > 0, got 0.0"),
        (
            ("--border-sigma", "nan"),
            "--border-sigma must be a finite number of pixels > 0, got nan",
        ),
        (("--border-classes", "cell"), "--border-classes needs --border-sigma"),
        (
            (*SIGMA, "--border-classes", "cells"),
            "--border-classes cells: there is no such class, only background cell nucleus",
        ),
    ],
)
def test_maps_that_cannot_be_are_refused_before_anything_is_read(
    change: tuple[object, ...], said: str, call, tmp_path: Path
) -> None:
    more = flags(tmp_path / "in", tmp_path / "out", *THREE, *change, mask_format="index")
    ended = call("pack", *more)
    assert ended.code == 2
    assert said in ended.said
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", [SIGMA, ("--border-classes", "cell")])
def test_maps_need_masks(flag: tuple[object, ...], call, tmp_path: Path) -> None:
    ended = call("pack", "--images", tmp_path, "--out", tmp_path / "out", *flag)
    assert ended.code == 2
    assert f"{flag[0]} needs --masks" in ended.said


def test_a_format_is_proposed_with_maps_asked_for(dots: Path, call, tmp_path: Path) -> None:
    ended = call("pack", *flags(dots, tmp_path / "out", *SIGMA, mask_format="auto"))
    assert ended.code == 1, ended.err
    assert "--border-sigma 5" in ended.out


def test_without_scipy_nothing_is_begun(dots: Path, call, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    ended = call("pack", *told(dots, tmp_path / "out"))
    assert ended.code == 2
    assert "--border-sigma needs SciPy: pip install 'unet-shards[scipy]'" in ended.said
    assert not (tmp_path / "out").exists()
    # Nobody else needs it.
    ended = call("pack", *flags(dots, tmp_path / "out", *THREE, mask_format="index"))
    assert ended.code == 0, ended.err


def test_a_worker_without_scipy_is_said_in_one_line(
    dots: Path, tmp_path: Path, monkeypatch
) -> None:
    begun = []

    def elsewhere(*arguments: object, **options: object) -> list[str]:
        monkeypatch.setitem(sys.modules, "scipy", None)
        begun.append(arguments)
        return write_shard(*arguments, **options)

    write_shard = pack.write_shard
    monkeypatch.setattr(pack, "write_shard", elsewhere)
    config = PackConfig(
        images=dots / "images",
        masks=dots / "masks",
        out=str(tmp_path / "out"),
        mask_format="index",
        classes=("background", "cell", "nucleus"),
        border_sigma=5,
        workers=1,
    )
    with pytest.raises(RunError, match=r"a worker of the cluster cannot make border maps: .*scipy"):
        pack.run(config)
    assert begun
    assert not [*(tmp_path / "out").glob("*.tar")]


def test_a_name_without_room_for_a_map_is_refused_by_name(call, dots: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(dots, folder)
    fits, long = f"{'x' * 89}.png", f"{'y' * 90}.png"
    for part in ("images", "masks"):
        (folder / part / "d0.png").rename(folder / part / fits)
        (folder / part / "d1.png").rename(folder / part / long)
    ended = call("pack", *told(folder, tmp_path / "out"))
    assert ended.code == 1
    assert (
        f"{folder / 'images' / long} has a key of 90 bytes; with border maps a tar has room for "
        "89: shorten its name" in ended.err
    )
    assert fits not in ended.err
    ended = call("pack", *told(folder, tmp_path / "out", "--keep-going"))
    assert ended.code == 3, ended.err
    assert sum(split.samples for split in read_manifest(tmp_path / "out").splits.values()) == 8


# ---- the other verbs


def test_maps_are_not_unpacked(bordered: Path, dots: Path, call, tmp_path: Path) -> None:
    assert call("unpack", "--data", bordered, "--out", tmp_path / "out").code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"images", "masks"}
    for part in ("images", "masks"):
        names = {path.name for path in (tmp_path / "out" / part).iterdir()}
        assert names == {path.name for path in (dots / part).iterdir()}


def test_shards_with_maps_get_their_manifest_back(
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
    # Their sigma is nowhere in the shards.
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


def test_a_map_alone_is_no_sample(bordered: Path, samples, call, tmp_path: Path) -> None:
    raw = samples(bordered)["d0.png"].raw
    whole = {"a.png": raw.image, "a.mask.png": raw.mask}
    write_tar(tmp_path / "in" / "s.tar", {**whole, "b.border.png": raw.border})
    ended = call("index", tmp_path / "in", *THREE, "--workers", 1)
    assert ended.code == 1
    assert "b.border.png has no picture" in ended.err


def test_among_pictures_without_masks_border_is_but_a_name(
    bordered: Path, samples, call, tmp_path: Path
) -> None:
    raw = samples(bordered)["d0.png"].raw
    members = {"a.png": raw.image, "a.border.png": samples(bordered)["d1.png"].raw.image}
    write_tar(tmp_path / "in" / "s.tar", members)
    ended = call("index", tmp_path / "in", "--workers", 1)
    assert ended.code == 0, ended.err
    assert {*samples(tmp_path / "in")} == {"a.png", "a.border.png"}


def test_the_name_of_maps_is_none_for_pictures_of_foreign_shards(call, tmp_path: Path) -> None:
    ended = call("index", tmp_path, "--image-ext", "border.png")
    assert ended.code == 2
    assert "--image-ext must not hold json or mask.png or border.png" in ended.said
