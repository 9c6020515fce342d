"""The documentation: every command in it parses, and every file that it names exists."""

import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from pipelines.cli import VERBS
from pipelines.runtime.command import parse

REPO = Path(__file__).resolve().parents[1]
MEASURED = "tests/benchmarks/README.md"
"""Its commands are in fenced blocks; inline code is the name of a contender."""
PAGES = ("README.md", "pipelines/README.md", "launch/README.md", MEASURED)
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SCRIPTS = {
    "./launch/hosts.sh": ("train", 2),
    **{f"launch/slurm/{verb}.sbatch": (verb, 0) for verb in ("train", "predict", "pack")},
}
"""Recipes that pass their arguments, after so many of their own, to a verb."""
INLINE = re.compile(r"`([^`]+)`")


def commands() -> list[tuple[str, str, list[str]]]:
    """Return (page, verb, arguments) of every `unet` command, fenced or inline."""
    found = []
    for page in PAGES:
        text = (REPO / page).read_text()
        lines = [
            line
            for block in FENCE.findall(text)
            for line in re.sub(r"\\\n\s*", " ", block).splitlines()
        ]
        prose = "" if page == MEASURED else re.sub(r"\s+", " ", FENCE.sub("", text))
        for line in (*lines, *(match for match in INLINE.findall(prose) if " --" in match)):
            words = shlex.split(line.replace("$(", "$( ").rstrip(")"), comments=True)
            script = next((w for w in words if w in SCRIPTS), None)
            module = next((w for w in words if w.startswith("pipelines.")), None)
            if words[:1] == ["unet"] and len(words) > 2:
                found.append((page, words[1], words[2:]))
            elif module is not None and words[words.index(module) - 1] == "-m":
                verb = module.removeprefix("pipelines.")
                found.append((page, verb, words[words.index(module) + 1 :]))
            elif script is not None:
                verb, skipped = SCRIPTS[script]
                found.append((page, verb, words[words.index(script) + 1 + skipped :]))
    return found


COMMANDS = commands()


def test_the_pages_have_commands_of_every_verb_with_flags() -> None:
    assert len(COMMANDS) >= 14
    assert {verb for _, verb, _ in COMMANDS} >= set(VERBS) - {"demo"}
    assert {page for page, _, _ in COMMANDS} == set(PAGES)


@pytest.mark.parametrize(
    ("page", "verb", "arguments"), COMMANDS, ids=[" ".join(c[2])[:60] for c in COMMANDS]
)
def test_every_command_parses(
    page: str, verb: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run.yaml", "plan.yaml"):
        Path(name).write_text("data: SHARDS\nrun_dir: RUN\n")
    Path("table.yaml").write_text("road: [9, 9, 9]\nsky: [0, 0, 255]\n")
    config = getattr(import_module(f"pipelines.{verb}"), f"{verb.capitalize()}Config")
    if arguments[-1:] == ["..."]:
        # A command whose flags are elided.
        arguments = [*arguments[:-1], "--data", "SHARDS", "--run-dir", "RUN"]
    parse(config, arguments, verb)


def test_the_benchmarks_have_the_documented_flags() -> None:
    text = "\n".join((REPO / page).read_text() for page in PAGES)
    joined = re.sub(r"\\\n\s*", " ", text)
    invocations = re.findall(r"python (tests/benchmarks/\w+\.py)([^`\n]*)", joined)
    assert len(invocations) >= 10
    for script, arguments in invocations:
        source = (REPO / script).read_text()
        for flag in re.findall(r"--[a-z-]+", arguments):
            assert f'"{flag}"' in source, f"{script} {flag}"


def test_accelerate_accepts_its_documented_flags() -> None:
    from accelerate.commands.launch import launch_command_parser

    text = "\n".join((REPO / page).read_text() for page in ("README.md", "pipelines/README.md"))
    lines = re.sub(r"\\\n\s*", " ", "\n".join(FENCE.findall(text))).splitlines()
    launches = [line for line in lines if "accelerate launch" in line]
    assert len(launches) >= 3
    for line in launches:
        words = shlex.split(line)
        parsed = launch_command_parser().parse_args(words[words.index("launch") + 1 :])
        assert parsed.module
        assert parsed.training_script.startswith("pipelines.")


def test_the_named_tests_and_files_exist() -> None:
    text = "\n".join((REPO / page).read_text() for page in PAGES)
    named = set(re.findall(r"`((?:tests|launch|shards|unet|pipelines)/[\w./]+\.\w+)`", text))
    assert len(named) >= 7
    missing = [name for name in named if not (REPO / name).exists()]
    assert not missing
    for script in set(re.findall(r"\./((?:launch|tests)/\w+\.sh)", text)):
        assert (REPO / script).stat().st_mode & 0o100, f"{script} is not executable"


def test_no_page_has_a_placeholder_or_an_empty_section() -> None:
    pages = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=REPO, capture_output=True, text=True, check=True
    ).stdout.split()
    assert len(pages) >= 4
    for page in pages:
        gaps = re.findall(r"^[A-Z]+_[A-Z_]+$|TODO|FIXME", (REPO / page).read_text(), re.MULTILINE)
        assert not gaps, page
        ends = re.findall(r"^(#+) .*\n\s*(?:\Z|^(#+) )", (REPO / page).read_text(), re.MULTILINE)
        assert not [end for end in ends if len(end[1]) <= len(end[0])], f"{page}: an empty section"


def test_the_front_page_is_short_and_every_link_leads_somewhere() -> None:
    assert len((REPO / "README.md").read_text().splitlines()) <= 150
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", (REPO / page).read_text()):
            path, _, anchor = target.partition("#")
            linked = (REPO / page).parent / path if path else REPO / page
            assert linked.exists(), f"{page}: {target}"
            assert not anchor or anchor in anchors(linked), f"{page}: {target}"


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", text.lower()).replace(" ", "-") for text in headings}


def test_the_python_example_runs(trained: Path) -> None:
    text = (REPO / "README.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    example = example.replace("RUN/", f"{trained}/")
    names = {"image": np.zeros((20, 30, 3), dtype=np.uint8)}
    exec(example, names)
    mask = names["mask"]
    assert (mask.shape, mask.dtype) == ((20, 30), np.uint8)
