"""`evaluate`, `runtime.outputs`.

Scores are written where they can be: found out before anything is scored.
"""

import errno
import tempfile
from pathlib import Path

import pytest

from pipelines.evaluation import score
from pipelines.runtime import outputs


def test_a_run_folder_that_cannot_be_written_to_is_refused_before_scoring(
    trained: Path, shards: Path, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    temporary_file = tempfile.TemporaryFile

    def read_only(*, dir: Path):
        if dir == trained:
            raise OSError(errno.EROFS, "Read-only file system")
        return temporary_file(dir=dir)

    def score_nothing(*_: object, **__: object) -> None:
        raise AssertionError("scored before the folder was checked")

    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", read_only)
    flags = ("--checkpoint", trained, "--data", shards, "--workers", 0)
    with monkeypatch.context() as patch:
        patch.setattr(score, "score", score_nothing)
        ended = call("evaluate", *flags)
    assert ended.code == 1
    assert ended.err == (
        f"unet evaluate: --out {trained} cannot be written to: Read-only file system; use --out to "
        "write the scores elsewhere\n"
    )
    assert call("evaluate", *flags, "--out", tmp_path / "scores").code == 0
    assert (tmp_path / "scores" / "scores.json").exists()
