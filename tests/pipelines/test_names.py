"""`runtime.command`, `runtime.processes`, `inference.encode`.

One rule for names: what pack accepts, predict and unpack accept, without a change.
"""

import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.runtime.command import expand_home
from pipelines.runtime.errors import RunError
from pipelines.runtime.processes import run_all
from shards.writer import write_atomically

LONG = "x" * 251
NAMES = (
    "a\\b.png",
    "A.png",
    "a.PNG",
    f"{LONG}.png",
    "é" * 120 + ".JPEG",
    unicodedata.normalize("NFC", "é.png"),
    unicodedata.normalize("NFD", "é.png"),
    "tab\there.TIF",
    "new\nline.png",
    "100%.png",
    "d.ir/x.y.z.Png",
    os.fsdecode(b"caf\xe9.png"),
)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for number, name in enumerate(NAMES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        form = {".tif": "TIFF", ".jpeg": "JPEG"}.get(path.suffix.lower(), "PNG")
        pixels = np.full((16, 20, 3), 20 * number + 10, np.uint8)
        Image.fromarray(pixels).save(path, form)
    return folder


def test_every_name_is_packed_predicted_and_unpacked(
    images: Path, make_checkpoint, call, content, tmp_path: Path
) -> None:
    packed = call("pack", "--images", images, "--workers", 1, "--out", tmp_path / "shards")
    assert packed.code == 0, packed.err
    ended = call("unpack", "--data", tmp_path / "shards", "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert content(tmp_path / "out" / "images") == content(images)
    for given in (images, tmp_path / "shards"):
        out = tmp_path / f"masks of {given.name}"
        options = (
            *("--checkpoint", make_checkpoint(), "--input", given),
            *("--out", out, "--workers", 0),
        )
        ended = call("predict", *options, "--png", "--overlay")
        assert (ended.code, ended.err) == (0, "")
        expected = {os.path.splitext(name)[0] + ".png" for name in NAMES}
        assert set(content(out / "png")) == set(content(out / "overlay")) == expected


def test_the_figure_of_a_long_name_fits(
    images: Path, make_checkpoint, call, tmp_path: Path
) -> None:
    given = ("--checkpoint", make_checkpoint(), "--input", images / f"{LONG}.png", "--workers", 0)
    ended = call("predict", *given, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    (figure,) = (tmp_path / "out").glob("*.figure.png")
    assert len(figure.name) == 255


def test_temporary_names_do_not_grow_with_the_name(tmp_path: Path) -> None:
    write_atomically(tmp_path / ("x" * 255), b"data")
    assert (tmp_path / ("x" * 255)).read_bytes() == b"data"


def test_files_are_utf8_whatever_the_locale(make_checkpoint, images: Path, tmp_path: Path) -> None:
    name = "日本.png"
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / name)
    (tmp_path / "list.txt").write_text(f"in/{name}\n", encoding="utf-8")
    locale = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    out = tmp_path / "out"
    command = [sys.executable, "-m", "pipelines.predict", "--checkpoint", make_checkpoint()]
    command += ["--input", tmp_path / "list.txt", "--out", out, "--png", "--workers", "1"]
    repo = Path(__file__).resolve().parents[2]
    ended = subprocess.run(command, env=locale, cwd=repo, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in (out / "png").iterdir()] == [name]


class TwoArgumentsError(Exception):
    """Cannot be unpickled from its message."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


def fail(_: int) -> None:
    raise TwoArgumentsError("the", "reason")


def test_an_exception_of_a_worker_is_reported_as_itself() -> None:
    # As itself where a library has made exceptions picklable, as Dask does.
    with pytest.raises((RunError, TwoArgumentsError), match="the reason"):
        list(run_all(fail, [1, 2], 2))


def test_home_is_expanded_in_every_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = ("~/a", "--out=~/b", "a~b", "--x", "s3://~", "~")
    assert [expand_home(one) for one in given] == [
        *("/home/me/a", "--out=/home/me/b", "a~b", "--x", "s3://~", "~"),
    ]


def test_a_closed_pipe_ends_silently() -> None:
    repo = Path(__file__).resolve().parents[2]
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", PRINTS]
    ended = subprocess.run(command, cwd=repo, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


PRINTS = """
import sys
from dataclasses import dataclass
from pipelines.runtime.command import run_command
@dataclass(frozen=True)
class Config:
    \"\"\"None.\"\"\"
def run(config):
    print("x" * 100_000)
    return 0
sys.exit(run_command(Config, run, [], "test"))
"""
