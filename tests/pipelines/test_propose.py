"""`--mask-format auto`: all masks are surveyed, a command is proposed, nothing is packed."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

INDEX = np.repeat(np.arange(24)[:, None] // 8, 30, axis=1).astype(np.uint8)
"""Three stripes: class 0, 1, 2."""
COLOURS = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255)], np.uint8)


def paletted() -> Image.Image:
    image = Image.fromarray(INDEX, "P")
    image.putpalette(COLOURS.tobytes())
    return image


MASKS: dict[str, tuple[Image.Image, str, np.ndarray]] = {
    "binary": (
        Image.fromarray((INDEX > 0).astype(np.uint8) * 255),
        "--mask-format binary",
        INDEX > 0,
    ),
    "index": (
        Image.fromarray(INDEX),
        "--mask-format index --classes class_0 class_1 class_2",
        INDEX,
    ),
    "values": (
        Image.fromarray(np.array([0, 128, 255], np.uint8)[INDEX]),
        "--mask-format values --mask-values 0 128 255 --classes class_0 class_128 class_255",
        INDEX,
    ),
    "palette": (
        paletted(),
        "--mask-format palette --classes class_0 class_1 class_2",
        INDEX,
    ),
    "rgb": (
        Image.fromarray(COLOURS[INDEX]),
        "--mask-format rgb --colours colours.yaml",
        np.array([0, 2, 1])[INDEX],
    ),
}


@pytest.fixture
def folder(draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six images in a folder with a space in its name; the test runs in its parent."""
    monkeypatch.chdir(tmp_path)
    return draw(tmp_path / "my data", 6, size=(24, 30))


def auto(folder: Path, *more: object) -> list[object]:
    return [
        *("--images", folder / "images", "--masks", folder / "masks"),
        *("--mask-format", "auto", "--workers", 1, *more),
    ]


def proposed(message: str) -> list[str]:
    """Words of the proposed command."""
    ((line),) = [line for line in message.splitlines() if line.startswith("unet ")]
    return shlex.split(line)


@pytest.mark.parametrize("kind", MASKS)
def test_the_proposed_command_packs_the_masks(
    kind: str, folder: Path, call, content, samples, tmp_path: Path
) -> None:
    mask, flags, expected = MASKS[kind]
    for path in (folder / "masks").iterdir():
        mask.save(path)
    before = content(tmp_path)
    ended = call("pack", *auto(folder, "--val-fraction", 0, "--out", tmp_path / "out"))
    assert ended.code == 0
    assert content(tmp_path) == before
    assert not (tmp_path / "out").exists()
    program, verb, *words = proposed(ended.out)
    assert (program, verb) == ("unet", "pack")
    if table := re.search(r"Save as colours\.yaml:\n\n((?:.*: \[.*\]\n)+)", ended.out):
        (tmp_path / "colours.yaml").write_text(table.group(1))
    assert bool(table) == (kind == "rgb")
    if kind == "palette":
        # Either format reads these masks correctly.
        assert words[words.index("--mask-format") + 1] in ("index", "palette")
    else:
        assert shlex.join(words).endswith(flags)
    ended = call("pack", *words)
    assert ended.code == 0, ended.err
    found = samples(tmp_path / "out")
    assert len(found) == 6
    for sample in found.values():
        np.testing.assert_array_equal(sample.mask, expected)


def test_the_proposed_command_keeps_the_given_flags(folder: Path, call, tmp_path: Path) -> None:
    more = ("--test-fraction", 0.25, "--skip-unpaired", "--image-range", 5, 900, "--frame", 0)
    ended = call("check", *auto(folder, *more, "--out", tmp_path / "a look"))
    assert ended.code == 0
    words = proposed(ended.out)
    assert words[:2] == ["unet", "check"]
    line = shlex.join(words)
    for kept in (
        f"--images '{folder / 'images'}' --masks '{folder / 'masks'}'",
        "--test-fraction 0.25",
        "--skip-unpaired",
        "--image-range 5 900",
        "--frame 0",
        "--workers 1",
        f"--out '{tmp_path / 'a look'}'",
    ):
        assert kept in line
    assert "auto" not in line
    assert "--val-fraction" not in line
    assert not (tmp_path / "a look").exists()


def test_the_contents_of_the_masks_are_printed(folder: Path, call) -> None:
    ended = call("pack", *auto(folder, "--out", "out"))
    pixels = [np.asarray(Image.open(path)) for path in (folder / "masks").iterdir()]
    foreground = sum(int((mask == 255).sum()) for mask in pixels)
    assert "6 masks: 6 of mode L" in ended.out
    assert re.search(rf"\b255 +{foreground:,} px \(", ended.out)


@pytest.mark.parametrize("workers", [2, 3])
def test_the_proposal_does_not_depend_on_the_number_of_workers(
    workers: int, folder: Path, draw, call
) -> None:
    draw(folder, 30, size=(24, 30), values=(0, 100, 200, 255), name="more{}", seed=2)
    (folder / "masks" / "more7.png").write_bytes(b"")
    one = call("pack", *auto(folder, "--out", "out"))
    several = call("pack", *auto(folder, "--out", "out", "--workers", workers))
    assert one.code == several.code == 0
    assert one.out.replace("--workers 1", "") == several.out.replace(f"--workers {workers}", "")
    assert one.err == several.err


def test_masks_that_cannot_be_read_are_named(folder: Path, call) -> None:
    for number in (1, 4):
        (folder / "masks" / f"p{number:03d}.png").write_bytes(b"")
    (folder / "masks" / "p002.png").unlink()
    (folder / "masks" / "p002.png").symlink_to(folder / "nowhere")
    ended = call("pack", *auto(folder, "--out", "out"))
    assert ended.code == 0
    assert [ended.err.count(name) for name in ("p001", "p002", "p004")] == [1, 1, 1]
    first, second = ended.err.splitlines()
    assert "p001.png is empty (and 1 more: " in first
    assert "p004" in first
    assert "p002" in second
    assert "3 masks: 3 of mode L" in ended.out


def test_masks_that_fit_no_format_get_no_command(folder: Path, call) -> None:
    rng = np.random.default_rng(0)
    for path in (folder / "masks").iterdir():
        Image.fromarray(rng.integers(0, 255, (24, 30, 3)).astype(np.uint8)).save(path)
    ended = call("pack", *auto(folder, "--out", "out"))
    assert ended.code == 1
    assert "photographs" in ended.out
    assert not [line for line in ended.out.splitlines() if line.startswith("unet ")]


def test_a_folder_without_masks_is_refused(folder: Path, call) -> None:
    ended = call("pack", "--images", folder / "images", "--mask-format", "auto", "--out", "out")
    assert ended.code == 2
    assert "--mask-format needs --masks" in ended.message


def move(folder: Path, template: str, part: str = "masks") -> None:
    """Rename all masks: `lab/{}_m.png`."""
    for path in sorted((folder / part).iterdir()):
        target = folder / template.format(path.stem)
        target.parent.mkdir(exist_ok=True)
        path.rename(target)


def lists(folder: Path, prefix: str) -> Path:
    path = folder / "pairs.txt"
    names = [path.name for path in sorted((folder / "images").iterdir())]
    path.write_text("".join(f"{prefix}images/{n} {prefix}masks/{n}\n" for n in names))
    return path


REPAIRS = {
    "an end of the masks": ("masks/{}_m.png", "--mask-suffix _m"),
    "sibling folder": ("imagesannot/{}.png", "--masks 'my data/imagesannot'"),
    "sibling folder with an end": ("labels/{}_gt.png", "--mask-suffix _gt"),
    "numbers": ("masks/m_{}_x.png", "--pair-regex"),
}


@pytest.mark.parametrize("case", REPAIRS)
def test_flags_that_pair_nothing_are_replaced_in_the_proposed_command(
    case: str, folder: Path, call, samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, flag = REPAIRS[case]
    monkeypatch.chdir(folder.parent)
    for number, path in enumerate(sorted((folder / "images").iterdir())):
        path.rename(folder / "images" / f"{number + 100}.png")
        (folder / "masks" / path.name).rename(folder / "masks" / f"{number + 100}.png")
    move(folder, template)
    ended = call(
        *("pack", "--images", "my data/images", "--masks", "my data/masks"),
        *("--mask-format", "auto", "--workers", 1, "--out", "out"),
    )
    assert ended.code == 0, ended.err
    assert "the command below pairs 6 images" in ended.err
    words = proposed(ended.out)
    assert flag in shlex.join(words)
    ended = call(*words[1:])
    assert ended.code == 0, ended.err
    assert len(samples(Path("out"))) == 6


@pytest.mark.parametrize("prefix", ["/gone/data/", "data/"])
def test_lists_with_folders_of_another_machine_are_proposed_with_their_root(
    prefix: str, folder: Path, call, samples, tmp_path: Path
) -> None:
    path = lists(folder, prefix)
    flags = ("--pairs", path, "--workers", 1, "--out", tmp_path / "out")
    ended = call("pack", *flags, "--mask-format", "auto")
    assert ended.code == 0, ended.err
    assert "does not exist here and is read as" in ended.err
    words = proposed(ended.out)
    ended = call(*words[1:])
    assert ended.code == 0, ended.err
    assert "in 6 paths" in ended.out
    assert len(samples(tmp_path / "out")) == 6


def test_flags_that_cannot_be_repaired_get_the_reason(folder: Path, call) -> None:
    for number, path in enumerate(sorted((folder / "masks").iterdir())):
        path.rename(folder / "masks" / f"{'abcdef'[number]}.png")
    ended = call("pack", *auto(folder, "--out", "out"))
    assert ended.code == 1
    assert "no image in" in ended.err
    assert "unet pack --" not in ended.out
