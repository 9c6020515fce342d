"""The GPU benchmark runs on a CPU in rehearsal, and a failing row does not affect the others."""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path
from types import FrameType, SimpleNamespace

import gpu
import gpu_train
import psutil
import pytest
from gpu_bench import LOG, Bench, Figure
from gpu_observe import place_of

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "tests" / "benchmarks" / "gpu.sh"

ROWS = """
import os, subprocess, sys, time
from gpu_bench import NotApplicableError

def works(bench, value=1):
    bench.report("value", value, "ms", "about 1 | 2")
    bench.report_ratio("of the first", value, "one", "works", "value")

def hangs(bench):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    bench.report("child", child.pid)
    print("last words", flush=True)
    time.sleep(600)

def dies(bench):
    bench.report("before", 2)
    os._exit(3)

def raises(bench):
    raise ValueError("no such figure")

def skips(bench):
    raise NotApplicableError("not here")
"""
PROGRAM = """
import sys
import gpu
gpu.ROWS = (
    gpu.Row("one", "works", 60, "rows:works"),
    gpu.Row("one", "hangs", 1, "rows:hangs"),
    gpu.Row("one", "dies", 60, "rows:dies"),
    gpu.Row("one", "raises", 60, "rows:raises"),
    gpu.Row("two", "skips", 60, "rows:skips"),
    gpu.Row("two", "works again", 60, "rows:works", {"value": 3}),
)
gpu.STEPS = ("one", "two")
sys.exit(gpu.main())
"""


def run_rows(folder: Path, *flags: str) -> tuple[int, dict[str, dict]]:
    """Run the test rows; returns the exit code and the result of each row."""
    (folder / "rows.py").write_text(ROWS)
    (folder / "program.py").write_text(PROGRAM)
    ended = subprocess.run(
        [sys.executable, folder / "program.py", "--out", folder / "out", *flags],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)},
        check=False,
        timeout=120,
    )
    written = json.loads((folder / "out" / "gpu.json").read_text())
    return ended.returncode, {row["name"]: row for row in written["rows"]}


def test_a_row_that_hangs_dies_or_raises_does_not_affect_the_others(tmp_path: Path) -> None:
    code, rows = run_rows(tmp_path)
    assert code == 1
    states = {name: row["state"] for name, row in rows.items()}
    assert states == {
        "works": "done",
        "hangs": "failed",
        "dies": "failed",
        "raises": "failed",
        "skips": "skipped",
        "works again": "done",
    }
    assert rows["hangs"]["message"].endswith("last words")
    child = int(rows["hangs"]["figures"][0]["value"])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"
    # Figures measured before the end are kept.
    assert rows["dies"]["figures"][0]["value"] == 2
    assert "exited with 3" in rows["dies"]["message"]
    assert rows["raises"]["message"] == "ValueError: no such figure"
    assert rows["skips"]["message"] == "not here"
    # A new process knows the figures of earlier rows.
    ratio = rows["works again"]["figures"][1]
    assert (ratio["name"], ratio["value"]) == ("of the first", 3)
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert "| one | works | value | 1 ms | about 1 \\| 2 |" in table
    assert "| one | raises | FAILED | ValueError: no such figure |  |" in table


def test_rows_beyond_the_budget_are_listed_as_skipped(tmp_path: Path) -> None:
    code, rows = run_rows(tmp_path, "--budget", "0", "--only", "two")
    assert code == 0
    assert {name: row["state"] for name, row in rows.items()} == {
        "skips": "skipped",
        "works again": "skipped",
    }
    assert rows["works again"]["message"] == "the budget of 0 s was spent"


def test_a_second_run_keeps_the_rows_of_the_first_and_compares_with_them(tmp_path: Path) -> None:
    assert run_rows(tmp_path, "--only", "one")[0] == 1
    code, rows = run_rows(tmp_path, "--only", "two")
    # The failures of the first run are not those of the second.
    assert code == 0
    assert [*rows] == ["works", "hangs", "dies", "raises", "skips", "works again"]
    assert rows["works"]["figures"][0]["value"] == 1
    assert rows["hangs"]["state"] == "failed"
    ratio = rows["works again"]["figures"][1]
    assert (ratio["name"], ratio["value"]) == ("of the first", 3)
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert re.match(r"Measured; [-0-9]+ [:+0-9]+, \d+ s; [-0-9]+ [:+0-9]+, \d+ s\.\n", table)
    assert table.count("| one | works | value |") == 1
    # A row that is measured again has only the new figures.
    _, rows = run_rows(tmp_path, "--only", "two")
    assert len(rows["works again"]["figures"]) == 2


def test_a_rehearsal_does_not_replace_measurements(tmp_path: Path) -> None:
    run_rows(tmp_path, "--only", "two")
    before = (tmp_path / "out" / "gpu.json").read_bytes()
    code, _ = run_rows(tmp_path, "--only", "two", "--rehearse")
    assert code == 2
    assert (tmp_path / "out" / "gpu.json").read_bytes() == before


def test_every_function_of_a_row_exists() -> None:
    for row in gpu.ROWS:
        module, _, name = row.function.partition(":")
        source = (SCRIPT.parent / f"{module}.py").read_text()
        assert f"def {name}(" in source, row
    assert len({(row.step, row.name) for row in gpu.ROWS}) == len(gpu.ROWS)
    # Rows of a step share a process, so they must be adjacent.
    order = [row.step for row in gpu.ROWS]
    assert order == sorted(order, key=gpu.STEPS.index)


def test_every_file_with_tests_marked_gpu_is_run() -> None:
    marked = {
        str(path.relative_to(REPO))
        for path in (REPO / "tests").rglob("test_*.py")
        if path != Path(__file__) and "pytest.mark.gpu" in path.read_text()
    }
    rows = [row for row in gpu.ROWS if row.function == "gpu_train:pytest_gpu"]
    run = [file for row in rows for file in row.arguments["files"]]
    assert sorted(run) == sorted(marked)


def test_a_sampled_thread_is_attributed_to_our_line_in_any_sub_package() -> None:
    def place(path: str, caller: FrameType | None = None) -> str | None:
        code = SimpleNamespace(co_filename=path, co_name="work")
        return place_of(SimpleNamespace(f_code=code, f_lineno=7, f_back=caller))

    ours = REPO / "pipelines" / "inference" / "encode.py"
    frame = SimpleNamespace(
        f_code=SimpleNamespace(co_filename=str(ours), co_name="encode"), f_lineno=3, f_back=None
    )
    assert place(str(ours)) == "encode.py:7 work"
    assert place("/lib/zlib.py", frame) == "encode.py:3 encode > zlib.py work"
    assert place(str(REPO / "unet" / "model.py")) == "model.py:7 work"
    # Another package of that name is not ours.
    assert place("/lib/diffusers/pipelines/inference/encode.py") == "encode.py work"
    assert place("/lib/threading.py", frame) == "encode.py:3 encode > threading.py work"
    idle = SimpleNamespace(co_filename="/lib/threading.py", co_name="wait")
    assert place_of(SimpleNamespace(f_code=idle, f_lineno=1, f_back=frame)) is None


TESTS = """
import os, pytest, time

@pytest.mark.gpu
def test_that_passes(record_property):
    record_property("difference", 0.25)

@pytest.mark.gpu
def test_that_fails():
    raise ValueError

@pytest.mark.gpu
def test_that_ends_the_process():
    os._exit(9)
"""


def test_figures_of_tests_are_kept_when_their_process_dies(tmp_path: Path) -> None:
    (tmp_path / "test_these.py").write_text(TESTS)
    (tmp_path / LOG).touch()
    figures: list[Figure] = []
    bench = Bench(tmp_path, tmp_path, None, True, figures.append, {})
    with pytest.raises(RuntimeError, match="exited with 9; 1 tests failed"):
        gpu_train.pytest_gpu(bench, files=[str(tmp_path / "test_these.py")])
    found = {figure.name.rpartition("::")[2]: figure.value for figure in figures}
    assert found == {
        "test_that_passes: difference": 0.25,
        "test_that_fails": "failed",
        "passed": 1,
        "failed": 1,
        "skipped": 0,
    }


def test_every_dependency_is_expected_or_shipped() -> None:
    header = SCRIPT.read_text().split("set -euo pipefail")[0]
    named = set(re.findall(r"[a-z][a-z0-9-]+", header.lower()))
    wanted = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[<>=!~ \[]", text)[0].replace("_", "-") for text in wanted}
    assert len(names) >= 14
    assert not names - named


def test_without_wheels_the_command_that_downloads_them_is_printed(tmp_path: Path) -> None:
    ended = subprocess.run(
        [SCRIPT, "--out", "out"],
        cwd=tmp_path,
        env={**os.environ, "WHEELS": "missing"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    first, *command = ended.stderr.splitlines()
    assert first.startswith("WHEELS: missing does not exist; download the wheels")
    assert command[0].startswith("python -m pip download --dest .whl")
    assert command[-1].strip().endswith("segmentation-models-pytorch")
    assert all(line.endswith("\\") for line in command[:-1])
    assert [*tmp_path.iterdir()] == []


def test_paths_are_relative_to_the_folder_of_the_caller(tmp_path: Path) -> None:
    ended = subprocess.run(
        [SCRIPT, "--out", "out", "--isbi", "isbi", "--budget", "0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHON": sys.executable, "WHEELS": ""},
        check=False,
    )
    assert ended.returncode == 0
    assert (tmp_path / "out" / "gpu.json").exists()


def test_the_rehearsal_runs_every_row(tmp_path: Path) -> None:
    start = time.monotonic()
    ended = subprocess.run(
        [SCRIPT, "--rehearse", "--out", tmp_path, "--budget", "800"],
        env={**os.environ, "PYTHON": sys.executable, "WHEELS": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        check=False,
        timeout=860,
    )
    print(ended.stdout, f"{time.monotonic() - start:.0f} s")
    written = json.loads((tmp_path / "gpu.json").read_text())
    rows = {(row["step"], row["name"]): row for row in written["rows"]}
    assert [*rows] == [(row.step, row.name) for row in gpu.ROWS]
    expected = dict.fromkeys(rows, "done")
    if find_spec("segmentation_models_pytorch") is None:
        expected["grid", "smp resnet34, channels_last"] = "skipped"
    messages = {key: row["message"] for key, row in rows.items() if row["state"] != expected[key]}
    assert {key: row["state"] for key, row in rows.items()} == expected, messages
    assert all(row["figures"] for key, row in rows.items() if expected[key] == "done")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    # The machine returns at most eight files.
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md", "gpu.log"}
    found = [
        figure["value"]
        for key in (("tests", "pytest -m gpu"), ("tests", "pytest -m gpu, other files"))
        for figure in rows[key]["figures"]
        if figure["name"] == "skipped"
    ]
    assert found[0] > 10
    assert found[1] >= 13
