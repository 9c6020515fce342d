"""`shards.leftovers`: what killed processes left is removed by the next start, nothing else."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from shards.leftovers import SHARED, process_space, remove_leftovers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="semaphores are not files")
SLEEPERS = """
from pipelines.runtime.processes import run_all
from shards.leftovers import name_semaphores, temporary_folder
name_semaphores()
kept = temporary_folder()
task = "import os, time; os.write(1, bytes([117, 112, 10])); time.sleep(600)"
list(run_all(exec, [task] * 2, 2, remote=True))
"""


def list_owned(pid: int) -> list[str]:
    """List what a process owns in /dev/shm and in the temporary folder."""
    folders = (SHARED, Path(tempfile.gettempdir()))
    part = f"unet-{process_space()}-{pid}-"
    return [name for folder in folders for name in os.listdir(folder) if part in name]


@pytest.fixture
def dead() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_semaphores_and_folders_of_a_killed_group_are_removed_by_the_next_start(call) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPERS], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    try:
        assert [process.stdout.readline() for _ in range(2)] == [b"up\n"] * 2
        owned = list_owned(process.pid)
        assert any(name.startswith("sem.") for name in owned)
        assert len([name for name in owned if not name.startswith("sem.")]) == 2
        remove_leftovers()
        assert list_owned(process.pid) == owned, "the owner is alive"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert list_owned(process.pid)
    assert call("unpack", "--help").code == 0
    assert list_owned(process.pid) == []


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A shared-memory and a temporary folder for this test."""
    shared, temporary = tmp_path / "shm", tmp_path / "tmp"
    shared.mkdir()
    temporary.mkdir()
    monkeypatch.setattr("shards.leftovers.SHARED", shared)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return shared, temporary


def test_only_files_of_dead_processes_of_this_machine_are_removed(
    dead: int, places: tuple[Path, Path], tmp_path: Path
) -> None:
    shared, temporary = places
    space = process_space()
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "kept").touch()
    gone = [shared / f"sem.unet-{space}-{dead}-abc", temporary / f"unet-{space}-{dead}-abc"]
    link = temporary / f"unet-{space}-{dead}-link"
    kept = [
        shared / "sem.mp-abc",
        shared / f"sem.unet-{space}-{os.getpid()}-abc",
        shared / f"sem.unet-00000000-{dead}-abc",
        shared / f"sem.unet-{space}-{dead}",
        shared / f"sem.unet-{space}--1-abc",
        temporary / f"unet-{space}-1-abc",
        temporary / f"sem.unet-{space}-{dead}-abc",
        temporary / f"unet-{space}-cells",
    ]
    for path in (gone[0], *kept):
        path.touch()
    (gone[1] / "deep").mkdir(parents=True)
    (gone[1] / "deep" / "file").touch()
    link.symlink_to(tmp_path / "target")
    remove_leftovers()
    assert not any(path.exists() for path in gone)
    assert not link.is_symlink()
    assert (tmp_path / "target" / "kept").exists()
    assert all(path.exists() for path in kept)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to give a file to another user")
def test_files_of_other_users_are_kept(dead: int, places: tuple[Path, Path]) -> None:
    path = places[0] / f"sem.unet-{process_space()}-{dead}-abc"
    path.touch()
    os.chown(path, 65534, 65534)
    remove_leftovers()
    assert path.exists()
