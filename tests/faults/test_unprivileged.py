"""A user who is not root and has no home can pack, train, evaluate and predict."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
NOBODY = 65534
SETPRIV = ("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups")


def run_as_nobody(*command: object, home: str | None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONDONTWRITEBYTECODE": "1"}
    del environment["HOME"]
    return subprocess.run(
        [*SETPRIV, sys.executable, *map(str, command)],
        cwd="/",
        env={**environment, **({} if home is None else {"HOME": home})},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that any user may write to."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o777)
    yield path
    shutil.rmtree(path)


@pytest.mark.faults
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv, of util-linux")
@pytest.mark.parametrize("home", [None, "/proc/1"], ids=["unset", "unwritable"])
def test_all_verbs_run_as_a_user_without_a_home(
    home: str | None, draw, tiny: tuple[str, ...], folder: Path
) -> None:
    if run_as_nobody("-c", "import torch, pipelines", home=home).returncode:
        pytest.skip("the environment or this checkout cannot be read by other users")
    images = draw(folder / "in", 12)
    data, run = folder / "data", folder / "run"
    read = ("--data", data, "--workers", 0)
    pairs = ("--images", images / "images", "--masks", images / "masks", "--mask-format", "binary")
    predict = ("--checkpoint", run, "--input", images / "images", "--workers", 2)
    commands = (
        ("pack", *pairs, "--val-fraction", 0.3, "--out", data),
        ("train", *read, "--run-dir", run, *tiny, "--steps", 4, "--eval-every", 2),
        ("evaluate", *read, "--checkpoint", run, "--out", folder / "scores"),
        ("predict", *predict, "--out", folder / "masks"),
    )
    for verb, *flags in commands:
        ended = run_as_nobody("-m", f"pipelines.{verb}", *flags, home=home)
        assert ended.returncode == 0, f"{verb}: {ended.stderr}"
        assert "Traceback" not in ended.stderr
    assert (folder / "masks" / "index.json").exists()
