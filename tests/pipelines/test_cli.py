"""The command line: `unet VERB`, quick, with a way out of every mistake."""

import runpy
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

from pipelines import cli

SCRIPT = Path(sys.executable).parent / "unet"


def unet(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=200)


def test_the_script_lists_every_verb() -> None:
    ended = unet("--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    for verb, summary in cli.VERBS.items():
        assert f"  {verb}" in ended.stdout
        assert summary in ended.stdout


def test_nothing_said_means_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert capsys.readouterr().out.startswith("usage: unet VERB")


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"unet {version('unet-shards')}"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("trian", "unknown command 'trian'; did you mean train?"),
        ("predcit", "did you mean predict?"),
        ("pac", "did you mean pack?"),
        ("xyzzy", "there are: separate, check, pack, index, unpack, train, evaluate"),
    ],
)
def test_an_unknown_verb_gets_the_nearest(
    typed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([typed]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_the_exit_code_is_the_verbs(tmp_path: Path) -> None:
    folders = ("--images", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    ended = unet("pack", *folders)
    assert ended.returncode == 1
    assert ended.stderr == f"unet pack: {tmp_path / 'nowhere'} is not a directory\n"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_explains_its_flags(verb: str, call) -> None:
    from dataclasses import fields, is_dataclass
    from typing import get_type_hints

    module = import_module(f"pipelines.{verb}")
    config = getattr(module, f"{verb.capitalize()}Config")
    ended = call(verb, "--help")
    assert ended.code == 0
    assert "--config FILE.yaml" in ended.out
    for field in fields(config):
        kind = get_type_hints(config)[field.name]
        for name in (
            [f"{field.name}.{inner.name}" for inner in fields(kind)]
            if is_dataclass(kind)
            else [field.name]
        ):
            flag = "--" + name.replace("_", "-")
            assert flag in ended.out or name == "folder", flag


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_is_a_module_too(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [verb, "--nonsense"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"pipelines.{verb}", run_name="__main__")
    assert ended.value.code == 2
    assert f"unet {verb}" in capsys.readouterr().err
