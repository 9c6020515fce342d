"""`runtime.outputs`: outputs are checked before the work, and a rerun reports what it found."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.runtime.errors import RunError, UsageError
from pipelines.runtime.outputs import require_writable, require_writable_file, write_result

WORK = {
    "separate": "pipelines.separate.plan_separation",
    "check": "pipelines.check.inspect_all",
    "pack": "pipelines.pack.pack_shards",
    "index": "pipelines.index.inspect_shards",
    "unpack": "pipelines.unpack.unpack_sample",
    "train": "pipelines.train.open_training",
    "evaluate": "pipelines.evaluation.score.score",
    "predict": "pipelines.predict.predict_shards",
    "export": "pipelines.export.load_models",
    "report": "pipelines.report.write_report",
    "demo": "pipelines.demo.draw_samples",
}
"""What each verb must not reach if an output cannot be written."""


@pytest.fixture
def inputs(draw, shards: Path, trained: Path, tmp_path: Path) -> dict[str, list[object]]:
    """Arguments of each verb, without outputs."""
    folder = draw(tmp_path / "in", 4)
    pair = ["--images", folder / "images", "--masks", folder / "masks"]
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name in ("images", "masks"):
        for path in (folder / name).iterdir():
            suffix = "_mask" if name == "masks" else ""
            (mixed / f"{path.stem}{suffix}{path.suffix}").write_bytes(path.read_bytes())
    read = ["--data", shards]
    return {
        "separate": [mixed, "--mask-suffix", "_mask"],
        "check": [*pair, "--mask-format", "binary", "--workers", 1],
        "pack": [*pair, "--mask-format", "binary", "--workers", 1, "--val-fraction", 0.3],
        "unpack": read,
        "train": [*read, "--steps", 1, "--tracking.backend", "none"],
        "evaluate": [*read, "--checkpoint", trained, "--workers", 0],
        "predict": ["--checkpoint", trained, "--input", folder / "images", "--workers", 0],
        "export": ["--checkpoint", trained, "--format", "torch"],
        "report": ["--run-dir", trained],
        "demo": [],
    }


@pytest.mark.parametrize("verb", sorted({*WORK} - {"index"}))
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    verb: str, inputs, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError(f"{verb} worked before its output was checked")

    monkeypatch.setattr(WORK[verb], work)
    (tmp_path / "file").write_bytes(b"")
    out = tmp_path / "file" / ("m.pt2" if verb == "export" else "out")
    flag = "--run-dir" if verb == "train" else "--out"
    ended = call(verb, *inputs[verb], flag, out)
    assert ended.code == 1
    (line,) = ended.err.splitlines()
    assert line.startswith(f"unet {verb}: ")
    assert str(tmp_path / "file") in line
    assert "; choose another" in line or "; use --out" in line
    assert (tmp_path / "file").read_bytes() == b""


def test_shards_in_a_read_only_folder_are_not_inspected(
    call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: object) -> None:
        raise AssertionError("inspected")

    def read_only(*, dir: Path) -> None:
        raise OSError(30, "Read-only file system")

    (tmp_path / "a.tar").write_bytes(b"")
    monkeypatch.setattr(WORK["index"], work)
    monkeypatch.setattr("pipelines.runtime.outputs.tempfile.TemporaryFile", read_only)
    ended = call("index", tmp_path)
    assert (ended.code, ended.err) == (
        1,
        f"unet index: FOLDER {tmp_path} cannot be written to: Read-only file system; copy the "
        "shards to a folder that can be\n",
    )


RERUN: dict[str, str] = {
    "separate": "already separated; nothing was written",
    "check": "check.json (unchanged)",
    "pack": "is already packed with these settings",
    "unpack": "already unpacked with these settings; nothing was written",
    "evaluate": "scores.csv (unchanged)",
    "predict": "is already predicted with these settings; nothing to do",
    "report": "out (unchanged)",
}


@pytest.mark.parametrize("verb", RERUN)
def test_a_rerun_with_the_same_settings_reports_that(
    verb: str, inputs, call, content, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = call(verb, *inputs[verb], "--out", out)
    assert first.code == 0, first.err
    assert RERUN[verb] not in first.out
    made = content(out) if out.is_dir() else out.read_bytes()
    second = call(verb, *inputs[verb], "--out", out)
    assert second.code == 0, second.err
    assert RERUN[verb] in second.out
    assert made == (content(out) if out.is_dir() else out.read_bytes())


def test_an_export_reports_whether_it_replaced_a_file(inputs, call, tmp_path: Path) -> None:
    out = tmp_path / "m.pt2"
    assert " MB, for images" in call("export", *inputs["export"], "--out", out).out
    again = call("export", *inputs["export"], "--out", out)
    assert again.code == 0
    assert "(unchanged)" in again.out or "(replaced the previous one)" in again.out


def test_a_finished_move_reports_that(inputs, call, content, tmp_path: Path) -> None:
    arguments = [*inputs["separate"], "--mode", "move", "--out", tmp_path / "out"]
    assert call("separate", *arguments).code == 0
    made = content(tmp_path / "out")
    again = call("separate", *arguments)
    assert (again.code, again.err) == (0, "")
    assert "4 pairs" in again.out
    assert "already separated; nothing was written" in again.out
    assert content(tmp_path / "out") == made


def test_separate_does_not_mix_two_folders(inputs, call, tmp_path: Path) -> None:
    assert call("separate", *inputs["separate"], "--out", tmp_path / "out").code == 0
    other = tmp_path / "other"
    other.mkdir()
    for name in ("x.png", "x_mask.png"):
        (other / name).write_bytes(b"x")
    ended = call("separate", other, "--mask-suffix", "_mask", "--out", tmp_path / "out")
    assert ended.code == 1
    assert "holds 8 files that this command does not make" in ended.err
    assert not (tmp_path / "out" / "images" / "x.png").exists()


def test_unpack_mixes_neither_splits_nor_foreign_files(
    inputs, shards: Path, call, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert call("unpack", *inputs["unpack"], "--split", "val", "--out", out).code == 0
    other = call("unpack", *inputs["unpack"], "--split", "train", "--out", out)
    assert other.code == 2
    assert "was created with --split val; keep that" in other.err
    (tmp_path / "own" / "images").mkdir(parents=True)
    (tmp_path / "own" / "images" / "mine.png").write_bytes(b"mine")
    ended = call("unpack", *inputs["unpack"], "--out", tmp_path / "own")
    assert ended.code == 2
    assert "was not made by unet unpack; choose another --out" in ended.err
    edited = next((out / "masks").rglob("*.png"))
    edited.write_bytes(b"edited")
    ended = call("unpack", *inputs["unpack"], "--split", "val", "--out", out)
    assert ended.code == 3
    assert f"{edited} differs from the data set" in ended.err
    assert edited.read_bytes() == b"edited"


def test_scores_of_other_settings_are_replaced_and_reported(inputs, call, tmp_path: Path) -> None:
    arguments = [*inputs["evaluate"], "--out", tmp_path / "out"]
    assert call("evaluate", *arguments).code == 0
    other = call("evaluate", *arguments, "--tile", 48)
    assert "scores.csv (replaced the previous one)" in other.out
    scores = json.loads((tmp_path / "out" / "scores.json").read_bytes())
    assert scores["tile"] == 48


def test_the_folder_is_probed_without_creating_it(tmp_path: Path) -> None:
    require_writable("--out", tmp_path / "a" / "b")
    require_writable("--out", Path("relative/and/missing"))
    require_writable_file("--out", tmp_path / "a" / "b.html")
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RunError, match=f"{tmp_path / 'file'} is a file"):
        require_writable("--out", tmp_path / "file" / "below")
    with pytest.raises(RunError, match=f"{tmp_path / 'file'} is a file"):
        require_writable("--out", tmp_path / "file")
    with pytest.raises(UsageError, match="is a directory; --out takes the file to write"):
        require_writable_file("--out", tmp_path)


def test_a_result_is_described_by_its_previous_one(tmp_path: Path) -> None:
    path: Any = tmp_path / "a" / "b"
    assert write_result(path, b"1") == ""
    assert write_result(path, b"1") == " (unchanged)"
    assert write_result(path, b"2") == " (replaced the previous one)"
    assert path.read_bytes() == b"2"
