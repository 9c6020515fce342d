"""Splitting a mixed folder: every file is placed once, atomically, and none is lost."""

import hashlib
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

FILES = {
    "a.bmp": b"image a",
    "a.png": b"mask a",
    "deep/b.BMP": b"image b",
    "deep/b.png": b"mask b",
}
BY_EXTENSION = ("--image-ext", ".bmp", "--mask-ext", "png")


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        path = tmp_path / "mixed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "mixed"


def run_killed_after(files: int, arguments: list[str]) -> None:
    """Split a folder, and get SIGKILL after a number of files."""
    from pipelines import separate

    replace, count = Path.replace, 0

    def counting(source: Path, target: Path) -> None:
        nonlocal count
        replace(source, target)
        count += 1
        if count == files:
            os.kill(os.getpid(), signal.SIGKILL)

    Path.replace = counting  # type: ignore[assignment]
    os._exit(separate.main(arguments))


@pytest.mark.parametrize("mode", ["copy", "move", "link"])
def test_by_extension(mode: str, mixed: Path, call, content, tmp_path: Path) -> None:
    ended = call("separate", mixed, "--out", tmp_path / "out", *BY_EXTENSION, "--mode", mode)
    assert ended.code == 0, ended.err
    assert "2 pairs" in ended.out
    assert content(tmp_path / "out") == {
        "images/a.bmp": b"image a",
        "images/deep/b.BMP": b"image b",
        "masks/a.png": b"mask a",
        "masks/deep/b.png": b"mask b",
    }
    assert content(mixed) == ({} if mode == "move" else FILES)
    assert (tmp_path / "out" / "images" / "a.bmp").is_symlink() == (mode == "link")


def test_by_suffix_which_is_removed_from_masks(call, content, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.jpg", "a_mask.png", "b_1.png", "b_1_mask.png"):
        (tmp_path / "in" / name).write_bytes(name.encode())
    ended = call("separate", tmp_path / "in", "--out", tmp_path / "out", "--mask-suffix", "_mask")
    assert ended.code == 0, ended.err
    assert content(tmp_path / "out") == {
        "images/a.jpg": b"a.jpg",
        "images/b_1.png": b"b_1.png",
        "masks/a.png": b"a_mask.png",
        "masks/b_1.png": b"b_1_mask.png",
    }


@pytest.mark.parametrize("pattern", [r"_(?:seg|gt)$", r"^(.*)_(?:seg|gt)$"], ids=["left", "groups"])
def test_by_pattern_which_decides_the_names_of_masks(
    pattern: str, call, content, tmp_path: Path
) -> None:
    for name in ("a.jpg", "a_seg.png", "deep/b.png", "deep/b_gt.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    ended = call("separate", tmp_path / "in", "--out", tmp_path / "out", "--mask-pattern", pattern)
    assert ended.code == 0, ended.err
    assert "2 pairs" in ended.out
    assert content(tmp_path / "out") == {
        "images/a.jpg": b"a.jpg",
        "images/deep/b.png": b"deep/b.png",
        "masks/a.png": b"a_seg.png",
        "masks/deep/b.png": b"deep/b_gt.png",
    }


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("_mask$", "a.png has no mask"), ("^(a)(?:_seg)?$", "a.png and a_seg.png have the same name")],
)
def test_a_pattern_that_does_not_fit_is_refused(
    pattern: str, message: str, call, content, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "a_seg.png"):
        (tmp_path / "in" / name).write_bytes(b"")
    before = content(tmp_path / "in")
    ended = call("separate", tmp_path / "in", "--out", tmp_path / "out", "--mask-pattern", pattern)
    assert ended.code == 1
    assert message in ended.err
    assert not (tmp_path / "out").exists()
    assert content(tmp_path / "in") == before


def test_a_dry_run_prints_everything_and_writes_nothing(
    mixed: Path, call, content, tmp_path: Path
) -> None:
    ended = call("separate", mixed, "--out", tmp_path / "out", *BY_EXTENSION, "--dry-run")
    assert ended.code == 0
    assert f"{mixed / 'a.png'} -> {tmp_path / 'out' / 'masks' / 'a.png'}" in ended.out
    assert len(ended.out.splitlines()) == 5
    assert "nothing was written" in ended.out
    assert not (tmp_path / "out").exists()
    assert content(mixed) == FILES


@pytest.mark.parametrize("mode", ["copy", "link"])
def test_a_rerun_changes_nothing(mode: str, mixed, call, content, tmp_path: Path) -> None:
    arguments = (mixed, "--out", tmp_path / "out", *BY_EXTENSION, "--mode", mode)
    assert call("separate", *arguments).code == 0
    before = {path: os.lstat(path).st_mtime_ns for path in (tmp_path / "out").rglob("*.*")}
    assert call("separate", *arguments).code == 0
    assert {path: os.lstat(path).st_mtime_ns for path in before} == before


def test_a_move_interrupted_within_a_file_resumes(mixed, call, content, tmp_path: Path) -> None:
    # A copy whose source still exists, and an incomplete temporary file.
    (tmp_path / "out" / "masks").mkdir(parents=True)
    (tmp_path / "out" / "masks" / "a.png").write_bytes(FILES["a.png"])
    (tmp_path / "out" / "masks" / f".{hashlib.sha256(b'a.png').hexdigest()[:16]}.tmp").write_bytes(
        b"ma"
    )
    ended = call("separate", mixed, "--out", tmp_path / "out", *BY_EXTENSION, "--mode", "move")
    assert ended.code == 0, ended.err
    assert content(mixed) == {}
    assert (tmp_path / "out" / "masks" / "a.png").read_bytes() == FILES["a.png"]


@pytest.mark.parametrize("moved", range(1, 4))
def test_a_move_killed_between_two_files_resumes(moved: int, call, content, tmp_path: Path) -> None:
    names = ("a.png", "a_seg.png", "b.png", "b_seg.png")
    arguments = ("--out", tmp_path / "out", "--mask-pattern", "_seg$", "--mode", "move")
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).write_bytes(name.encode())
    arguments = [str(word) for word in (tmp_path / "in", *arguments)]
    process = multiprocessing.get_context("fork").Process(
        target=run_killed_after, args=(moved, arguments)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len([*(tmp_path / "out").rglob("*.png")]) == moved
    ended = call("separate", *arguments)
    assert ended.code == 0, ended.err
    assert content(tmp_path / "in") == {}
    assert content(tmp_path / "out") == {
        "images/a.png": b"a.png",
        "images/b.png": b"b.png",
        "masks/a.png": b"a_seg.png",
        "masks/b.png": b"b_seg.png",
    }


def test_a_target_that_differs_is_not_overwritten(mixed, call, content, tmp_path: Path) -> None:
    target = tmp_path / "out" / "masks" / "a.png"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"precious")
    ended = call("separate", mixed, "--out", tmp_path / "out", *BY_EXTENSION)
    assert ended.code == 1
    assert f"{target} exists and differs from {mixed / 'a.png'}; choose another" in ended.err
    assert target.read_bytes() == b"precious"
    assert content(mixed) == FILES


@pytest.mark.parametrize(
    ("name", "rule", "message"),
    [
        ("c.bmp", BY_EXTENSION, "c.bmp has no mask"),
        ("c.png", BY_EXTENSION, "c.png has no image"),
        ("c.tif", BY_EXTENSION, "c.tif ends neither in .bmp nor in .png"),
        ("a.bmp", ("--mask-suffix", "_mask"), "a.bmp and a.png have the same name"),
    ],
)
def test_a_file_that_fits_no_rule_is_named_and_nothing_is_written(
    name: str, rule: tuple[str, ...], message: str, mixed: Path, call, tmp_path: Path
) -> None:
    (mixed / name).write_bytes(b"")
    ended = call("separate", mixed, "--out", tmp_path / "out", *rule)
    assert ended.code == 1
    assert message in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ((), "use --mask-suffix, or --mask-pattern, or --image-ext together with"),
        (("--image-ext", ".bmp"), "or --mask-pattern, or --image-ext together with"),
        ((*BY_EXTENSION, "--mask-suffix", "_m"), "use --mask-suffix, or --mask-pattern, or"),
        (("--mask-pattern", "_m$", "--mask-suffix", "_m"), "use --mask-suffix, or --mask-pattern"),
        (("--mask-pattern", "("), "--mask-pattern '(' is not a regular expression: "),
        (("--mask-suffix", ""), "--mask-suffix must not be empty"),
        (("--image-ext", "PNG", "--mask-ext", ".png"), "must differ; otherwise use --mask-suffix"),
        ((*BY_EXTENSION, "--mode", "burn"), "burn"),
    ],
)
def test_an_invalid_rule_is_refused(
    rule: tuple[str, ...], message: str, mixed: Path, call, tmp_path: Path
) -> None:
    ended = call("separate", mixed, "--out", tmp_path / "out", *rule)
    assert ended.code == 2
    assert message in ended.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_without_images_is_refused(there: bool, call, tmp_path: Path) -> None:
    if there:
        (tmp_path / "in").mkdir()
    ended = call("separate", tmp_path / "in", "--out", tmp_path / "out", *BY_EXTENSION)
    assert ended.code == 1
    assert ("contains no images" if there else "does not exist") in ended.err
