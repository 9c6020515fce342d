"""Architecture: allowed imports between packages, top-level files, what each command loads."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from pipelines.cli import VERBS

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("unet", "shards", "pipelines")
TOP_LEVEL = {
    *("unet", "pipelines", "launch", "shards", "tests"),
    *("accelerate_config.yaml", "Dockerfile", "pyproject.toml"),
    *("README.md", "LICENSE", "CHANGELOG.md"),
}
LIGHT = ("check", "pack", "index", "separate", "unpack", "runtime.command", "cli", "demo")
STAGES: dict[str, set[str]] = {
    "runtime": set(),
    "drawing": set(),
    "packing": {"runtime"},
    "loading": {"runtime"},
    "model": {"runtime"},
    "training": {"runtime", "drawing", "loading", "model"},
    "planning": {"runtime", "loading", "model", "training"},
    "inference": {"runtime", "drawing", "model"},
    "evaluation": {"runtime", "drawing", "loading", "model", "training", "inference"},
    "reporting": {"runtime", "drawing", "loading", "model", "evaluation"},
}
"""The sub-packages of pipelines and those that each may import: a DAG, listed bottom up."""


def list_files(*options: str) -> list[str]:
    """List the files that `git ls-files --cached` knows of, without deleted ones."""
    command = ["git", "ls-files", "--cached", *options]
    lines = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout
    return sorted(line for line in set(lines.splitlines()) if (REPO / line).exists())


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {path: ast.parse(path.read_text()) for path in sorted(REPO.glob("*/**/*.py"))
           if path.relative_to(REPO).parts[0] in PACKAGES}  # fmt: skip
MODULES = {module_name(path): tree for path, tree in SOURCES.items()}


def type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imported(tree: ast.AST, *, at_import: bool = False) -> Iterator[str]:
    """Yield the modules that a file imports; with `at_import`, only those loaded on its import."""
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
    """Return all modules loaded by importing one of ours, followed through our modules."""
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


def test_every_python_file_is_checked() -> None:
    files = [name for name in list_files("--others", "--exclude-standard") if name.endswith(".py")]
    ours = {str(path.relative_to(REPO)) for path in SOURCES}
    assert len(ours) > 30
    assert {name for name in files if not name.startswith("tests/")} == ours


def test_the_top_level_has_exactly_the_expected_entries() -> None:
    names = {name.split("/")[0] for name in list_files()}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


@pytest.mark.parametrize("word", ["utils", "util", "common", "helpers", "base", "misc"])
def test_no_module_has_a_catch_all_name(word: str) -> None:
    assert not [name for name in MODULES if word in name.split(".")]


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Count the lines of a function without its docstring, comments and blank lines."""
    documented = ast.get_docstring(function) is not None
    first = function.body[0].end_lineno if documented else function.lineno
    assert first is not None
    rest = lines[first : function.end_lineno]
    return sum(not re.match(r"\s*(#|$)", line) for line in rest)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_no_function_has_more_than_50_lines_of_code(path: Path) -> None:
    lines = path.read_text().splitlines()
    long = {
        node.name: number
        for node in ast.walk(SOURCES[path])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (number := code_lines(node, lines)) > 50
    }
    assert not long


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] == "unet"])
def test_unet_imports_neither_data_nor_launchers(module: str) -> None:
    forbidden = {"shards", "pipelines", "launch", "accelerate", "webdataset", "wandb"}
    assert not roots(imported(MODULES[module])) & forbidden


@pytest.mark.parametrize("module", [name for name in MODULES if name.split(".")[0] == "shards"])
def test_shards_import_neither_models_nor_launchers(module: str) -> None:
    forbidden = {"unet", "pipelines", "launch", "accelerate", "wandb"}
    if module != "shards.reader":
        forbidden |= {"torch", "webdataset"}
    assert not roots(imported(MODULES[module])) & forbidden


@pytest.mark.parametrize("library", ["webdataset"])
def test_only_the_reader_imports_webdataset(library: str) -> None:
    users = {name for name, tree in MODULES.items() if library in roots(imported(tree))}
    assert users == {"shards.reader"}


@pytest.mark.parametrize("module", MODULES)
def test_collectives_and_trackers_are_used_through_accelerate_only(module: str) -> None:
    tree = MODULES[module]
    names = set(imported(tree))
    assert not [name for name in names if name.startswith("torch.distributed")]
    assert "wandb" not in roots(names)
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert "torch.distributed" not in used


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_recipes_or_tests(module: str) -> None:
    assert not roots(imported(MODULES[module])) & {"launch", "tests"}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("pipelines.")])
def test_no_module_imports_a_verb(module: str) -> None:
    verbs = {f"pipelines.{verb}" for verb in VERBS} - {module}
    assert not set(imported(MODULES[module])) & verbs


def test_only_the_command_line_imports_modules_by_name() -> None:
    names = {"import_module", "__import__"}
    users = {
        module
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in names
    }
    assert users == {"pipelines.cli"}


def test_imports_are_acyclic() -> None:
    modules = {name for name in MODULES if "." in name}
    edges = {name: modules & set(imported(MODULES[name], at_import=True)) for name in modules}
    assert sum(map(len, edges.values())) > 50
    order = list(TopologicalSorter(edges).static_order())
    assert sorted(order) == sorted(modules)


def stage_of(module: str) -> str | None:
    """Return the sub-package of pipelines that a module belongs to; None for verbs and others."""
    parts = module.split(".")
    return parts[1] if parts[0] == "pipelines" and len(parts) > 2 else None


@pytest.mark.parametrize("module", [name for name in MODULES if stage_of(name)])
def test_sub_packages_import_only_what_is_below_them(module: str) -> None:
    stage = stage_of(module)
    assert stage in STAGES, f"{stage} is not listed in STAGES"
    modules = {name for name in imported(MODULES[module]) if name in MODULES}
    used = {stage_of(name) for name in modules} - {stage, None}
    assert used <= STAGES[stage]


def test_stages_are_listed_bottom_up() -> None:
    names = list(STAGES)
    for position, stage in enumerate(names):
        assert STAGES[stage] <= set(names[:position])
    folders = {
        path.name for path in (REPO / "pipelines").iterdir() if (path / "__init__.py").exists()
    }
    assert folders == set(names)


def served_modules(path: Path) -> set[str]:
    """Return the modules that a test file serves: of its name, and in backticks in its first lines.

    `loading.crop` in tests/pipelines is pipelines.loading.crop; complete names work everywhere.
    """
    package = path.relative_to(REPO / "tests").parts[0]
    name = path.stem.removeprefix("test_")
    by_name = {m for m in MODULES if m.split(".")[0] == package and m.split(".")[-1] == name}
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    words = re.findall(r"`([\w.]+)`", first)
    return by_name | ({*words, *(f"{package}.{word}" for word in words)} & {*MODULES})


TEST_FILES = [path for name in PACKAGES for path in sorted((REPO / "tests" / name).rglob("*.py"))
              if path.name.startswith("test_")]  # fmt: skip
SERVED = {str(path.relative_to(REPO)): served_modules(path) for path in TEST_FILES}


@pytest.mark.parametrize("file", SERVED)
def test_every_test_file_names_the_modules_that_it_serves(file: str) -> None:
    assert SERVED[file]


@pytest.mark.parametrize("module", [module_name(path) for path in SOURCES
                                    if path.name != "__init__.py"])  # fmt: skip
def test_every_module_is_served_by_a_test_file(module: str) -> None:
    assert module in set().union(*SERVED.values())


@pytest.mark.parametrize("module", [name for name in MODULES if "." in name])
def test_no_module_has_more_than_400_lines(module: str) -> None:
    file = REPO / Path(*module.split("."))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    assert len(file.read_text().splitlines()) <= 400


@pytest.mark.parametrize("module", LIGHT)
def test_modules_without_a_device_do_not_import_accelerate(module: str) -> None:
    assert "accelerate" not in roots(closure(f"pipelines.{module}"))


@pytest.mark.parametrize("verb", ["train", "evaluate", "predict"])
def test_verbs_that_run_on_devices_import_accelerate(verb: str) -> None:
    assert "accelerate" in roots(closure(f"pipelines.{verb}"))


@pytest.mark.parametrize("module", ["predict", "export", "loading.batches"])
def test_prediction_and_loader_workers_do_not_wait_for_torchmetrics(module: str) -> None:
    # It imports SciPy's signal processing and, if it is installed, transformers.
    assert f"pipelines.{module}" in MODULES
    assert "torchmetrics" not in roots(closure(f"pipelines.{module}"))


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
def test_light_commands_do_not_load_torch(code: str) -> None:
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
    and node.name.endswith(("Config", "Options"))
    and "dataclass" in "".join(map(ast.unparse, node.decorator_list))
]


def test_every_verb_has_a_config() -> None:
    names = {node.name for _, node in CONFIGS}
    assert {f"{verb.capitalize()}Config" for verb in VERBS} <= names


@pytest.mark.parametrize(
    ("module", "config"), CONFIGS, ids=[f"{module}.{node.name}" for module, node in CONFIGS]
)
def test_every_setting_has_a_docstring_and_every_config_is_frozen(
    module: str, config: ast.ClassDef
) -> None:
    assert ast.get_docstring(config)
    assert "frozen=True" in "".join(map(ast.unparse, config.decorator_list))
    groups = {node.name for _, node in CONFIGS}
    bare = [
        ast.unparse(field.target)
        for field, following in zip(config.body, [*config.body[1:], None], strict=True)
        if isinstance(field, ast.AnnAssign)
        # A group of settings is explained by its own class.
        and re.sub(r"Flat\[(\w+)\]", r"\1", ast.unparse(field.annotation)) not in groups
        and not (
            isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        )
    ]
    assert not bare
