"""The command line `unet VERB`: fast help, suggestions for mistyped verbs, exit codes."""

import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.runtime.command import expand_home
from pipelines.runtime.flags import list_flags
from pipelines.runtime.help_text import first_line
from pipelines.runtime.yaml_flags import plain_type, setting_types

SCRIPT = Path(sys.executable).parent / "unet"


def unet(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=200)


def test_the_script_lists_every_verb() -> None:
    ended = unet("--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    for verb, summary in cli.VERBS.items():
        assert f"  {verb}" in ended.stdout
        assert summary in ended.stdout


def test_without_arguments_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: unet VERB")


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"unet {version('unet-shards')}"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("trian", "unknown command 'trian'; did you mean train?"),
        ("predcit", "did you mean predict?"),
        ("pac", "did you mean pack?"),
        ("xyzzy", "commands: separate, check, pack, index, unpack, plan, train"),
    ],
)
def test_an_unknown_verb_suggests_the_nearest(
    typed: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([typed]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_the_exit_code_is_that_of_the_verb(tmp_path: Path) -> None:
    folders = ("--images", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    ended = unet("pack", *folders)
    assert ended.returncode == 1
    assert ended.stderr == (
        f"unet pack: --images {tmp_path / 'nowhere'}: does not exist; check the path\n"
    )


def config_class(verb: str) -> type:
    return getattr(import_module(f"pipelines.{verb}"), f"{verb.capitalize()}Config")


def flag_names(config: type, prefix: str = "") -> Iterator[str]:
    for name, annotation in setting_types(config).items():
        kind = plain_type(annotation)
        if is_dataclass(kind):
            yield from flag_names(kind, f"{prefix}{name}.")
        else:
            yield f"--{prefix}{name}".replace("_", "-")


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_its_flags(verb: str, call) -> None:
    ended = call(verb, "--help")
    assert ended.code == 0
    assert "--config FILE.yaml" in ended.out
    for flag in flag_names(config_class(verb)):
        assert flag in ended.out or flag in ("--folder", "--scored"), flag


@pytest.mark.parametrize("verb", ["separate", "check", "pack", "index", "unpack", "demo"])
def test_required_flags_come_first_in_help(verb: str, call) -> None:
    text = call(verb, "--help").out
    defaults = re.findall(r"\((required|default)\b", text)
    assert defaults == sorted(defaults, reverse=True)
    assert "default" in defaults


@pytest.mark.parametrize("verb", ["check", "pack", "index"])
def test_groups_are_titled_and_their_flags_have_no_prefix(verb: str, call) -> None:
    text = call(verb, "--help").out
    titles = re.findall(r"^(?!usage)(\w.*):\n +--\w", text, re.MULTILINE)
    config = config_class(verb)
    owners = dict.fromkeys(flag.owner for flag in list_flags(config) if flag.owner is not config)
    assert titles == ["General", *(first_line(owner).rstrip(".") for owner in owners)]
    assert len(titles) == {"index": 2, "check": 9, "pack": 12}[verb]
    assert not [flag for flag in flag_names(config_class(verb)) if "." in flag]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_runs_as_a_module(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [verb, "--nonsense"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"pipelines.{verb}", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"unet {verb}: --nonsense: unknown flag; ")


def test_the_home_folder_is_expanded_after_an_equals_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    words = ["--images=~/i", "~/m", "--mask-suffix=~", "--group-by=a~/b"]
    expanded = ["--images=/somewhere/i", "/somewhere/m", "--mask-suffix=~", "--group-by=a~/b"]
    assert [expand_home(word) for word in words] == expanded
