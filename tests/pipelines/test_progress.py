"""Progress in log files: periodic lines."""

import re

import pytest

from pipelines.runtime import progress


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("verb", "unit"), [("check", "pair"), ("pack", "sample")])
def test_without_a_terminal_periodic_lines_are_printed(
    verb: str, unit: str, workers: int, draw, call, monkeypatch, tmp_path
) -> None:
    folder = draw(tmp_path / "in", 12, size=(8, 8))
    arguments = (
        *("--images", folder / "images", "--masks", folder / "masks", "--mask-format", "binary"),
        *("--workers", workers, "--val-fraction", 0),
    )
    monkeypatch.setattr(progress, "LINE_INTERVAL", 1e-9)
    ended = call(verb, *arguments, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    assert "\r" not in ended.err
    lines = [line for line in ended.err.splitlines() if line.startswith(f"{verb}: ")]
    assert lines
    for line in lines:
        assert re.fullmatch(rf"{verb}: \d+ of 12 {unit}s, [\d.,]+/s, \d\d:\d\d left", line)
    monkeypatch.undo()
    assert call(verb, *arguments, "--out", tmp_path / "again").err == ""


def test_large_numbers_have_separators(monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL", 1e-9)
    with progress.progress(total=400_000, desc="pack", unit="sample") as bar:
        bar.start_t -= 10
        bar.last_print_t -= 10
        bar.update(12_000)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"pack: 12,000 of 400,000 samples, 1,\d{3}\.\d/s, 05:\d\d left", line)
