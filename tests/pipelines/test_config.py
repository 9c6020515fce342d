"""Configuration: defaults, then YAML files, then flags; strict, and one line for every mistake."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from pipelines import config
from pipelines.config import UsageError, parse, run_command, to_plain
from shards.sample import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    """A group."""

    rate: float = 0.5
    """A number."""
    wide: bool = False
    """A switch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    """A verb."""

    out_dir: Path
    """A folder."""
    steps: int | None = None
    """A count."""
    names: tuple[str, ...] = ()
    """A list."""
    values: tuple[int, ...] = ()
    """A list of numbers."""
    mode: Literal["copy", "move"] = "copy"
    """A choice."""
    deep: bool = False
    """A switch."""
    optim: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.steps == 0:
            raise ValueError("steps must be above 0, got 0")


def read(*arguments: str) -> Outer:
    return parse(Outer, ["--out-dir", "o", *arguments], "verb")


@pytest.fixture
def file(tmp_path: Path):
    count = 0

    def write(text: str) -> str:
        nonlocal count
        count += 1
        path = tmp_path / f"c{count}.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_defaults_then_files_in_their_order_then_flags(file) -> None:
    first = file("steps: 1\nnames: [a, b]\noptim:\n  rate: 0.1\n  wide: true\n")
    second = file("steps: 2\nmode: move\n")
    assert read() == Outer(out_dir=Path("o"))
    assert read("--config", first).steps == 1
    both = read("--config", first, f"--config={second}")
    assert (both.steps, both.mode, both.names) == (2, "move", ("a", "b"))
    assert both.optim == Inner(rate=0.1, wide=True)
    assert read("--config", second, "--config", first).steps == 1
    # Wherever the flag stands.
    assert read("--steps", "3", "--config", first, "--config", second).steps == 3
    assert read("--config", first, "--optim.rate", "7").optim == Inner(rate=7, wide=True)
    assert read("--config", first, "--names", "z").names == ("z",)
    assert read("--config", first, "--optim.no-wide").optim.wide is False


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("optim: {rate: 1e-3}", "optim", Inner(rate=1e-3)),
        ("optim:\n  rate: 1", "optim", Inner(rate=1.0)),
        ("deep: true", "deep", True),
        ("deep: false", "deep", False),
        ("values: [0, 128, 255]", "values", (0, 128, 255)),
        ("names: [yes please, '1']", "names", ("yes please", "1")),
        ("names: one", "names", ("one",)),
        ("steps: null", "steps", None),
        ("steps:", "steps", None),
        ("out-dir: elsewhere", "out_dir", Path("elsewhere")),
        ("out_dir: else where", "out_dir", Path("else where")),
        ("out_dir: --strange", "out_dir", Path("--strange")),
        ("", "steps", None),
        ("# nothing", "steps", None),
    ],
)
def test_yaml_means_what_it_says(text: str, name: str, value: Any, file) -> None:
    given = ["--config", file(text)]
    # The folder stands in the file where the file has one.
    found = parse(Outer, given if "out" in text else ["--out-dir", "o", *given], "verb")
    assert getattr(found, name) == value
    assert type(getattr(found, name)) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stepz: 3", "unknown key stepz; did you mean steps?"),
        ("optim: {rat: 3}", "unknown key optim.rat; did you mean optim.rate?"),
        ("zzz: 3", "unknown key zzz; there are: out_dir, steps"),
        ("optim.rate: 3", "unknown key optim.rate"),
        ("optim: 3", "optim must be a mapping, found 3"),
        ("steps: {a: 1}", "steps must be a value, found {'a': 1}"),
        ("- a\n- b", "expected `key: value` lines, found list"),
        ("just words", "expected `key: value` lines, found str"),
        ("steps: [1", "while parsing a flow sequence"),
        ("steps: !!python/object:os.system x", "could not determine a constructor"),
        ("3: 4", "unknown key 3"),
    ],
)
def test_a_file_that_is_wrong_is_refused_in_one_line(
    text: str, said: str, file, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file(text)
    code = run_command(Outer, lambda _: 0, ["--out-dir", "o", "--config", path], "verb")
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith(f"unet verb: --config {path}: ")
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: many", "--steps"),
        ("steps: 1.5", "--steps"),
        ("steps: [1, 2]", "2"),
        ("steps: true", "--steps"),
        ("deep: 7", "Unrecognized options: 7"),
        ("mode: burn", "burn"),
        ("steps: 0", "steps must be above 0, got 0"),
        ("values: [1, x]", "x"),
        ("optim: {rate: fast}", "--optim.rate"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(
    text: str, said: str, file, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(Outer, lambda _: 0, ["--out-dir", "o", "--config", file(text)], "verb")
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert said in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config"], "--config needs a file"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: No such file or directory"),
        (["--config", "."], "--config .: Is a directory"),
    ],
)
def test_a_file_that_is_missing_is_said(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(Outer, lambda _: 0, ["--out-dir", "o", *arguments], "verb") == 2
    assert capsys.readouterr().err == f"unet verb: {said}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--out-dir", "o", "--step", "3"], "--steps"),
        (["--out-dir", "o", "--outt", "3"], "--outt"),
        (["--steps", "3"], "--out-dir"),
        (["--out-dir", "o", "--steps"], "--steps"),
        (["--out-dir", "o", "stray"], "stray"),
    ],
)
def test_a_wrong_flag_is_refused_with_the_nearest(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(Outer, lambda _: 0, arguments, "verb")
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stepz"], "Unrecognized options: --stepz"),
        (["--config", "nowhere"], "unet verb (rank 1): --config nowhere: No such file"),
        (["--steps", "0"], "steps must be above 0"),
    ],
)
def test_other_ranks_leave_it_to_rank_0_and_say_it_only_where_nobody_has_ended_them(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    heard = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(config.time, "sleep", lambda _: heard.append(capfd.readouterr()))
    try:
        code = run_command(Outer, lambda _: 0, ["--out-dir", "o", *arguments], "verb")
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert heard == [("", "")]
    assert said in capfd.readouterr().err


def test_help_is_shown_by_one_rank_and_none_waits(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        run_command(Outer, lambda _: 0, ["--help"], "verb")
    assert end.value.code == 0
    assert capfd.readouterr() == ("", "")


def raising(error: BaseException):
    def run(_: Outer) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("wrong flag; use another"), 2, "wrong flag; use another"),
        (DataError("a.png is empty"), 1, "a.png is empty"),
        (config.RunError("it failed"), 1, "it failed"),
        (FileNotFoundError(2, "No such file", "x/y"), 1, "x/y: No such file"),
        (OSError("odd"), 1, "odd"),
        (KeyboardInterrupt(), 130, "stopped; the same command goes on"),
    ],
)
def test_every_kind_of_failure_has_its_code_and_one_line(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(Outer, raising(error), ["--out-dir", "o"], "verb") == code
    assert capsys.readouterr().err == f"unet verb: {said}\n"


def test_a_mistake_of_the_program_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(Outer, raising(ZeroDivisionError()), ["--out-dir", "o"], "verb")


def test_a_configuration_survives_being_written_down(file) -> None:
    original = Outer(out_dir=Path("a b"), names=("x", "y"), optim=Inner(rate=1e-5, wide=True))
    written = file(yaml.safe_dump(to_plain(original)))
    assert parse(Outer, ["--config", written], "verb") == original


def test_the_positional_of_separate_can_stand_in_a_file(file, call, tmp_path: Path) -> None:
    path = file(f"folder: {tmp_path / 'nowhere'}\nout: {tmp_path / 'out'}\nmask_suffix: _m\n")
    ended = call("separate", "--config", path)
    assert ended.code == 1
    assert ended.err == f"unet separate: {tmp_path / 'nowhere'} is not a directory\n"
