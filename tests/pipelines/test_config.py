"""`runtime.command`, `runtime.flags`, `runtime.flag_values`, `runtime.help_text`,
`runtime.config_files`, `runtime.yaml_flags`, `runtime.errors`.

Configuration: defaults, YAML files, flags, in that order; strict, with one-line errors.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from pipelines.pack import PackConfig
from pipelines.runtime import command, errors
from pipelines.runtime.command import parse, run_command
from pipelines.runtime.errors import UsageError
from pipelines.runtime.yaml_flags import (
    Flat,
    Positional,
    refuse_unused,
    setting_types,
    settings_of,
    to_plain,
)
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
    pair: tuple[int, int] | None = None
    """Two numbers."""
    much: int | Literal["auto"] = 1
    """A number or a word."""
    optim: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.steps == 0:
            raise ValueError("--steps must be above 0, got 0")


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


def test_files_override_defaults_and_flags_override_files(file) -> None:
    first = file("steps: 1\nnames: [a, b]\noptim:\n  rate: 0.1\n  wide: true\n")
    second = file("steps: 2\nmode: move\n")
    assert read() == Outer(out_dir=Path("o"))
    assert read("--config", first).steps == 1
    both = read("--config", first, f"--config={second}")
    assert (both.steps, both.mode, both.names) == (2, "move", ("a", "b"))
    assert both.optim == Inner(rate=0.1, wide=True)
    assert read("--config", second, "--config", first).steps == 1
    # Regardless of the position of the flag.
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
        ("out_dir: --name", "out_dir", Path("--name")),
        ("", "steps", None),
        ("# nothing", "steps", None),
    ],
)
def test_yaml_values_have_the_declared_type(text: str, name: str, value: Any, file) -> None:
    arguments = ["--config", file(text)]
    # The file sets the folder in some cases.
    found = parse(Outer, arguments if "out" in text else ["--out-dir", "o", *arguments], "verb")
    assert getattr(found, name) == value
    assert type(getattr(found, name)) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", "unknown key stepz; did you mean steps?"),
        ("optim: {rat: 3}", "unknown key optim.rat; did you mean optim.rate?"),
        ("rate: 3", "unknown key rate; did you mean optim.rate?"),
        ("zzz: 3", "unknown key zzz; --help lists all flags, which are the keys"),
        ("optim.rate: 3", "unknown key optim.rate"),
        ("optim: 3", "optim must be a mapping, found 3"),
        ("steps: {a: 1}", "steps must be a value, found a mapping"),
        ("- a\n- b", "expected `key: value` lines, found list"),
        ("just words", "expected `key: value` lines, found str"),
        ("steps: [1", "line 1, column 10: while parsing a flow sequence, expected ',' or ']'"),
        ("steps: !!python/object:os.system x", "remove the tag"),
        ("3: 4", "unknown key 3"),
    ],
)
def test_an_invalid_file_is_refused_in_one_line(
    text: str, message: str, file, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file(text)
    code = run_command(Outer, lambda _: 0, ["--out-dir", "o", "--config", path], "verb")
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith(f"unet verb: --config {path}: ")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: many", "--steps many: not a whole number"),
        ("steps: 1.5", "--steps 1.5: not a whole number"),
        ("steps: [1, 2]", "--steps 1 2: takes one value, got 2"),
        ("steps: true", "--steps true: not a whole number"),
        ("deep: 7", "--deep 7: not true or false"),
        ("deep:", "deep: needs a value"),
        ("mode: burn", "--mode burn: unknown; use copy or move"),
        ("mode: null", "mode: needs a value"),
        ("steps: 0", "--steps must be above 0, got 0"),
        ("values: [1, x]", "--values 1 x: not a whole number"),
        ("optim: {rate: fast}", "--optim.rate fast: not a number"),
        ("optim: {rate: .nan}", "--optim.rate .nan: not a number"),
        ("pair: [1]", "--pair 1: takes 2 values (INT INT), got 1"),
        ("much: some", "--much some: not a whole number or auto"),
        ("out_dir: ''", "--out-dir '': is empty; give a path"),
        ("out_dir: s3://b/out", "--out-dir s3://b/out: is a URL; give a local path"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(
    text: str, message: str, file, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file(text)
    assert (
        run_command(
            Outer,
            lambda _: 0,
            ["--out-dir", "o"] * ("out" not in text) + ["--config", path],
            "verb",
        )
        == 2
    )
    assert capsys.readouterr().err == f"unet verb: --config {path}: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config"], "--config needs a file"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: No such file or directory"),
        (["--config", "."], "--config .: Is a directory"),
    ],
)
def test_a_missing_file_is_reported(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(Outer, lambda _: 0, ["--out-dir", "o", *arguments], "verb") == 2
    assert capsys.readouterr().err == f"unet verb: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out-dir", "o", "--step", "3"], "--step: unknown flag; did you mean --steps?"),
        (["--out-dir", "o", "--rate", "3"], "--rate: unknown flag; did you mean --optim.rate?"),
        (["--out-dir", "o", "--x.steps", "3"], "--x.steps: unknown flag; did you mean --steps?"),
        (["--out-dir", "o", "--zzz=3"], "--zzz: unknown flag; --help lists all flags"),
        (["--out-dir", "o", "-x"], "-x: unknown flag; --help lists all flags"),
        (["--steps", "3"], "--out-dir is missing; usage: unet verb --out-dir PATH [FLAGS]"),
        (["--out-dir", "o", "--steps"], "--steps: needs a value; see --help"),
        (["--out-dir", "o", "--names"], "--names: needs a value; see --help"),
        (["--out-dir", "o", "--steps", "--deep"], "--steps: needs a value; see --help"),
        (["--out-dir", "o", "stray"], "stray: unexpected after --out-dir; remove it"),
        (["--out-dir", "o", "--deep", "no"], "no: unexpected after --deep; remove it"),
        (["stray"], "stray: unexpected after the verb; remove it"),
        (
            ["--out-dir", "o", "--deep=true"],
            "--deep=true: takes no value; use --deep or --no-deep",
        ),
        (["--out-dir", "o", "--steps", "five"], "--steps five: not a whole number"),
        (["--out-dir", "o", "--steps="], "--steps '': not a whole number"),
        (["--out-dir", "o", "--optim.rate", "inf"], "--optim.rate inf: not a finite number"),
        (["--out-dir", "o", "--mode", "burn"], "--mode burn: unknown; use copy or move"),
        (["--out-dir", "o", "--pair", "1"], "--pair 1: takes 2 values (INT INT), got 1"),
        (["--out-dir", "o", "--values", "1", "2 3"], "--values 1 '2 3': not a whole number"),
        (["--out-dir="], "--out-dir '': is empty; give a path"),
        (["--out-dir", "s3://b/out"], "--out-dir s3://b/out: is a URL; give a local path"),
    ],
)
def test_a_wrong_flag_or_value_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(Outer, lambda _: 0, arguments, "verb") == 2
    assert capsys.readouterr().err == f"unet verb: {message}\n"


def test_numbers_below_0_and_words_with_a_dash_are_values() -> None:
    assert read("--pair", "-5", "3", "--values", "-1", "-2").pair == (-5, 3)
    assert read("--names", "-mask", "b").names == ("-mask", "b")
    assert read("--out_dir", "p").out_dir == Path("p")
    assert read("--much", "auto").much == "auto"
    assert read("--steps", "None").steps is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepz"], "unet verb (rank 1): --stepz: unknown flag"),
        (["--config", "nowhere"], "unet verb (rank 1): --config nowhere: No such file"),
        (["--steps", "0"], "steps must be above 0"),
    ],
)
def test_other_ranks_report_an_error_only_if_rank_0_did_not_end_them(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    outputs = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(command.time, "sleep", lambda _: outputs.append(capfd.readouterr()))
    assert run_command(Outer, lambda _: 0, ["--out-dir", "o", *arguments], "verb") == 2
    assert outputs == [("", "")]
    assert message in capfd.readouterr().err


def test_only_rank_0_prints_help_and_no_rank_waits(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as end:
        run_command(Outer, lambda _: 0, ["--help"], "verb")
    assert end.value.code == 0
    assert capfd.readouterr() == ("", "")


# ---- flat groups


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """Width and height."""

    width: int = 4
    """A width."""
    crop: tuple[int, ...] = ()
    """A list."""
    fit: bool = False
    """A switch."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"--width must be at least 1, got {self.width}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """Size and colour."""

    size: Flat[Size]
    colour: str = "red"
    """A colour."""

    def __post_init__(self) -> None:
        if self.colour == "none":
            refuse_unused(self.size, "needs a --colour", "crop", "fit")


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """Draw."""

    title: str
    """A title."""
    frame: Flat[Frame]
    optim: Inner = field(default_factory=Inner)


def draw(*arguments: str) -> Drawing:
    return parse(Drawing, ["--title", "t", *arguments], "verb")


WIDE = Drawing(title="t", frame=Frame(size=Size(width=9, crop=(1, 2), fit=True), colour="blue"))
WIDE_FLAGS = ("--width", "9", "--crop", "1", "2", "--fit", "--colour", "blue")


def test_flags_of_a_group_have_no_prefix() -> None:
    assert draw() == Drawing(title="t", frame=Frame(size=Size()))
    assert draw(*WIDE_FLAGS) == WIDE
    assert [*setting_types(Drawing)] == ["title", "width", "crop", "fit", "colour", "optim"]


def test_keys_of_a_group_have_no_prefix(file) -> None:
    path = file("width: 9\ncrop: [1, 2]\nfit: true\ncolour: blue\noptim: {rate: 0.1}\n")
    found = draw("--config", path)
    assert (found.frame, found.optim) == (WIDE.frame, Inner(rate=0.1))
    assert draw("--config", path, "--no-fit", "--width", "2").frame.size == Size(
        width=2, crop=(1, 2)
    )


def test_a_configuration_with_groups_is_saved_flat_and_loaded_again(file) -> None:
    saved = to_plain(WIDE)
    assert saved == {
        "title": "t",
        "width": 9,
        "crop": [1, 2],
        "fit": True,
        "colour": "blue",
        "optim": {"rate": 0.5, "wide": False},
    }
    assert parse(Drawing, ["--config", file(yaml.safe_dump(saved))], "verb") == WIDE


def test_a_pack_configuration_is_saved_flat_and_loaded_again(file) -> None:
    flags = ["--out", "o", "--images", "i", "--masks", "m", "--mask-format", "index"]
    flags += ["--classes", "a", "b", "--image-range", "5", "900", "--fold", "1/3", "--seed", "7"]
    original = parse(PackConfig, [*flags, "--skip-unpaired", "--part", "2/4"], "pack")
    saved = to_plain(original)
    assert (saved["images"], saved["classes"], saved["part"]) == (["i"], ["a", "b"], "2/4")
    assert not [name for name, value in saved.items() if isinstance(value, dict)]
    assert parse(PackConfig, ["--config", file(yaml.safe_dump(saved))], "pack") == original


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widht: 3", "unknown key widht; did you mean width?"),
        ("frame: {width: 3}", "unknown key frame; --help lists all flags, which are the keys"),
        ("size: 3", "unknown key size; --help lists all flags, which are the keys"),
        ("width: {a: 3}", "width must be a value, found a mapping"),
    ],
)
def test_a_wrong_key_gets_the_nearest_of_all_groups(text: str, message: str, file, capsys) -> None:
    assert run_command(Drawing, lambda _: 0, ["--config", file(text)], "verb") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "0"], "--width must be at least 1, got 0"),
        (["--colour", "none", "--width", "3", "--fit"], "--fit needs a --colour"),
    ],
)
def test_checks_within_and_across_groups_end_with_2(arguments, message, capsys) -> None:
    assert run_command(Drawing, lambda _: 0, ["--title", "t", *arguments], "verb") == 2
    assert capsys.readouterr().err == f"unet verb: {message}\n"


def test_help_lists_required_flags_then_titled_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(Drawing, lambda _: 0, ["--help"], "verb")
    text = capsys.readouterr().out
    parts = ["usage: unet verb --title TITLE [FLAGS]", "Draw.", "--config FILE.yaml"]
    parts += ["Width and height:", "--width INT", "Size and colour:", "--colour", "A group:"]
    parts += ["--optim.rate FLOAT", "(default: 0.5)"]
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Compare folders."""

    folder: Positional[tuple[Path, ...]]
    """Folders."""
    mask_suffix: str = ""
    """The end of a name."""
    fold: str | None = None
    """One of several folds."""


def test_an_argument_of_several_values_takes_all_words_before_the_next_flag() -> None:
    found = parse(Comparison, ["a", "b", "c", "--fold", "1/2"], "verb")
    assert (found.folder, found.fold) == ((Path("a"), Path("b"), Path("c")), "1/2")
    with pytest.raises(UsageError, match="d: unexpected after --fold; remove it"):
        parse(Comparison, ["a", "--fold", "1/2", "d"], "verb")


def test_help_names_what_a_text_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(Comparison, lambda _: 0, ["--help"], "verb")
    text = capsys.readouterr().out
    assert "usage: unet verb FOLDER ... [FLAGS]" in text
    assert "--mask-suffix SUFFIX" in text
    assert "--fold i/k" in text


def test_settings_are_walked_with_their_values() -> None:
    values = {entry.name: value for entry, value in settings_of(WIDE)}
    assert [*values] == [*setting_types(Drawing)]
    assert (values["width"], values["optim"]) == (9, Inner())


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """Summary.

    A second paragraph
    of two lines.
    """


def test_the_description_has_no_stray_indentation(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(Described, lambda _: 0, ["--help"], "verb")
    assert "\nSummary.\n\nA second paragraph of two lines.\n" in capsys.readouterr().out


# ---- failures


LESS_MEMORY = "lower --workers, or use a machine or job with more memory"


def test_training_without_memory_names_crop_and_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(Outer, raising(MemoryError()), ["--out-dir", "o"], "train") == 1
    assert "lower --crop-size, --global-batch-size or --workers" in capsys.readouterr().err


FREE = "free some space or choose another place, then rerun the same command"


def raising(error: BaseException):
    def run(_: Outer) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("wrong flag; use another"), 2, "wrong flag; use another"),
        (DataError("a.png is empty"), 1, "a.png is empty"),
        (errors.RunError("it failed"), 1, "it failed"),
        (FileNotFoundError(2, "No such file", "x/y"), 1, "x/y: No such file"),
        (OSError("failed"), 1, "failed"),
        (OSError(28, "No space left on device", "x/y"), 1, f"x/y: No space left on device; {FREE}"),
        (OSError(28, "No space left on device"), 1, f"o: No space left on device; {FREE}"),
        (
            OSError(30, "Read-only file system", "x"),
            1,
            "x: Read-only file system; make it writable (mount -o remount,rw) or choose another "
            "place",
        ),
        (
            PermissionError(13, "Permission denied", "x"),
            1,
            "x: Permission denied; correct its permissions (chmod, chown) or choose another place",
        ),
        (
            OSError(122, "Disk quota exceeded"),
            1,
            "o: Disk quota exceeded; free some space or raise the quota, then rerun the same "
            "command",
        ),
        (MemoryError(), 1, f"memory ran out; {LESS_MEMORY}"),
        (OSError(12, "Cannot allocate memory"), 1, f"memory ran out; {LESS_MEMORY}"),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."
            ),
            1,
            f"memory ran out (4,096 bytes at once); {LESS_MEMORY}",
        ),
        (KeyboardInterrupt(), 130, "stopped; rerun the same command to resume"),
    ],
)
def test_every_kind_of_failure_has_its_exit_code_and_one_line(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(Outer, raising(error), ["--out-dir", "o"], "verb") == code
    assert capsys.readouterr().err == f"unet verb: {message}\n"


def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(Outer, raising(ZeroDivisionError()), ["--out-dir", "o"], "verb")


def test_a_configuration_can_be_saved_and_loaded(file) -> None:
    original = Outer(out_dir=Path("a b"), names=("x", "y"), optim=Inner(rate=1e-5, wide=True))
    written = file(yaml.safe_dump(to_plain(original)))
    assert parse(Outer, ["--config", written], "verb") == original


def test_a_positional_argument_can_be_set_in_a_file(file, call, tmp_path: Path) -> None:
    path = file(f"folder: {tmp_path / 'nowhere'}\nout: {tmp_path / 'out'}\nmask_suffix: _m\n")
    ended = call("separate", "--config", path)
    assert ended.code == 1
    assert ended.err == (
        f"unet separate: FOLDER {tmp_path / 'nowhere'}: does not exist; check the path\n"
    )
