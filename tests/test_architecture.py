"""The house: which room may know of which, what it is made of, and what each command loads."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from pipelines.cli import VERBS

REPO = Path(__file__).resolve().parents[1]
ROOMS = ("unet", "shards", "pipelines")
TOP_LEVEL = {
    *("unet", "pipelines", "launch", "shards", "tests"),
    *("accelerate_config.yaml", "Dockerfile", "pyproject.toml"),
    *("README.md", "LICENSE", "CHANGELOG.md"),
}
LIGHT = ("check", "pack", "index", "separate", "unpack", "config", "cli", "demo")


def listed(*options: str) -> list[str]:
    """What git knows of, and what it would take up, without what was deleted."""
    command = ["git", "ls-files", "--cached", *options]
    lines = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    return sorted(line for line in set(lines.splitlines()) if (REPO / line).exists())


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {path: ast.parse(path.read_text()) for path in sorted(REPO.glob("*/**/*.py"))
           if path.relative_to(REPO).parts[0] in ROOMS}  # fmt: skip
MODULES = {module_name(path): tree for path, tree in SOURCES.items()}


def type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imported(tree: ast.AST, *, at_import: bool = False) -> Iterator[str]:
    """Modules that a file imports; `at_import`: those that importing the file loads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (at_import and (isinstance(node, ast.FunctionDef) or type_checking(node))):
            yield from imported(node, at_import=at_import)


def roots(names: set[str] | Iterator[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def closure(module: str) -> set[str]:
    """Everything that importing one of our modules imports, ours followed."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            todo += imported(MODULES[name], at_import=True)
            todo.append(name.split(".")[0])
    return seen


def test_every_python_file_is_looked_at() -> None:
    files = [name for name in listed("--others", "--exclude-standard") if name.endswith(".py")]
    ours = {str(path.relative_to(REPO)) for path in SOURCES}
    assert len(ours) > 30
    assert {name for name in files if not name.startswith("tests/")} == ours


def test_the_top_level_holds_what_it_should_and_nothing_else() -> None:
    names = {name.split("/")[0] for name in listed()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


@pytest.mark.parametrize("word", ["utils", "util", "common", "helpers", "base", "misc"])
def test_no_module_is_a_drawer(word: str) -> None:
    assert not [name for name in MODULES if word in name.split(".")]


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] == "unet"])
def test_unet_is_mathematics_only(module: str) -> None:
    forbidden = {"shards", "pipelines", "launch", "accelerate", "webdataset", "wandb"}
    assert not roots(imported(MODULES[module])) & forbidden


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] == "shards"])
def test_shards_are_bytes_only(module: str) -> None:
    forbidden = {"unet", "pipelines", "launch", "accelerate", "wandb"}
    if module != "shards.reader":
        forbidden |= {"torch", "webdataset"}
    assert not roots(imported(MODULES[module])) & forbidden


@pytest.mark.parametrize("library", ["webdataset"])
def test_only_the_reader_knows_webdataset(library: str) -> None:
    users = {name for name, tree in MODULES.items() if library in roots(imported(tree))}
    assert users == {"shards.reader"}


@pytest.mark.parametrize("module", MODULES)
def test_ranks_meet_and_trackers_are_met_through_accelerate_only(module: str) -> None:
    tree = MODULES[module]
    names = set(imported(tree))
    assert not [name for name in names if name.startswith("torch.distributed")]
    assert "wandb" not in roots(names)
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "torch.distributed" not in used


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_recipes_or_tests(module: str) -> None:
    assert not roots(imported(MODULES[module])) & {"launch", "tests"}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("pipelines.")])
def test_no_room_imports_a_verb(module: str) -> None:
    verbs = {f"pipelines.{verb}" for verb in VERBS} - {module}
    assert not set(imported(MODULES[module])) & verbs


def test_modules_are_looked_up_by_name_in_the_command_line_alone() -> None:
    names = {"import_module", "__import__"}
    users = {
        module
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in names
    }
    assert users == {"pipelines.cli"}


def test_imports_make_no_circle() -> None:
    modules = {name for name in MODULES if "." in name}
    edges = {name: modules & set(imported(MODULES[name], at_import=True)) for name in modules}
    assert sum(map(len, edges.values())) > 50
    order = list(TopologicalSorter(edges).static_order())
    assert sorted(order) == sorted(modules)


@pytest.mark.parametrize("room", LIGHT)
def test_what_needs_no_device_imports_no_accelerate(room: str) -> None:
    assert "accelerate" not in roots(closure(f"pipelines.{room}"))


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict"])
def test_what_runs_on_devices_imports_accelerate(verb: str) -> None:
    assert "accelerate" in roots(closure(f"pipelines.{verb}"))


@pytest.mark.parametrize(
    "code",
    [
        "from pipelines.cli import main; main(['--help'])",
        "import pipelines.pack",
        "import pipelines.separate",
        "import pipelines.demo",
        "import shards",
    ],
)
def test_what_needs_no_torch_loads_none(code: str) -> None:
    probe = (
        f"{code}\nimport sys; print(sorted({{'torch', 'accelerate', 'wandb'}} & {{*sys.modules}}))"
    )
    command = [sys.executable, "-c", probe]
    ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


CONFIGS = [
    (module, node)
    for module, tree in MODULES.items()
    for node in ast.walk(tree)
    if isinstance(node, ast.ClassDef)
    and node.name.endswith("Config")
    and "dataclass" in "".join(map(ast.unparse, node.decorator_list))
]


def test_every_verb_has_its_config() -> None:
    names = {(module, node.name) for module, node in CONFIGS}
    assert {(f"pipelines.{verb}", f"{verb.capitalize()}Config") for verb in VERBS} <= names


@pytest.mark.parametrize(
    ("module", "config"), CONFIGS, ids=[f"{module}.{node.name}" for module, node in CONFIGS]
)
def test_every_setting_is_explained_and_frozen(module: str, config: ast.ClassDef) -> None:
    assert ast.get_docstring(config)
    assert "frozen=True" in "".join(map(ast.unparse, config.decorator_list))
    groups = {node.name for _, node in CONFIGS}
    bare = [
        ast.unparse(field.target)
        for field, following in zip(config.body, [*config.body[1:], None], strict=True)
        if isinstance(field, ast.AnnAssign)
        # A group of settings is explained by its own class.
        and ast.unparse(field.annotation) not in groups
        and not (
            isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        )
    ]
    assert not bare
