"""Every flag that an error names exists on the verbs that print the error."""

import ast
import io
import re
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from functools import cache
from importlib import import_module

import pytest

from tests.test_architecture import MODULES

FLAG = re.compile(r"(?<![\w-])--[a-z]+(?:-[a-z]+)*(?:\.[a-z-]+)?")
FOLDERS = ("check", "pack")
MODELS = ("train", "evaluate", "predict", "export")
PRINTED_BY = {
    "pipelines.index": ("index",),
    "pipelines.predict": ("predict",),
    "pipelines.evaluate": ("evaluate",),
    "pipelines.unpack": ("unpack",),
    "pipelines.export": ("export",),
    "pipelines.separate": ("separate",),
    "pipelines.inference.input_rules": ("predict",),
    "pipelines.inference.inputs": ("predict",),
    "pipelines.inference.input_readers": ("predict",),
    "pipelines.inference.input_tars": ("predict",),
    "pipelines.inference.compiled": ("predict",),
    "pipelines.inference.decoding": ("predict",),
    "pipelines.inference.job": ("predict",),
    "pipelines.inference.options": ("predict",),
    "pipelines.inference.reading": ("predict",),
    "pipelines.packing.foreign": ("index",),
    "shards.foreign": ("index", "predict"),
    "shards.images.files": (*FOLDERS, "predict"),
    "shards.raw": MODELS,
}
"""Modules that read what users give, and the verbs that print their errors."""


@cache
def verb_flags(verb: str) -> frozenset[str]:
    with redirect_stdout(io.StringIO()) as printed, suppress(SystemExit):
        import_module(f"pipelines.{verb}").main(["--help"])
    return frozenset(FLAG.findall(printed.getvalue()))


def raised_texts(module: str) -> Iterator[str]:
    """Yield the texts in the `raise` statements of a module, and its remedies."""
    for node in ast.walk(MODULES[module]):
        remedy = isinstance(node, ast.Assign) and "REMEDY" in ast.unparse(node.targets[0])
        if remedy or (isinstance(node, ast.Raise) and node.exc is not None):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    # `unet VERB --flag` names a flag of another verb.
                    yield re.sub(r"unet [a-z]+( --[a-z-]+)+", "", part.value)


@pytest.mark.parametrize("module", PRINTED_BY)
def test_flags_in_errors_exist_on_every_verb_that_prints_them(module: str) -> None:
    named = {flag for text in raised_texts(module) for flag in FLAG.findall(text)}
    missing = {(verb, flag) for verb in PRINTED_BY[module] for flag in named - verb_flags(verb)}
    assert not missing


def test_the_walk_finds_flags() -> None:
    named = {flag for text in raised_texts("shards.images.files") for flag in FLAG.findall(text)}
    assert {"--frame", "--alpha", "--image-range", "--max-pixels"} <= named


@pytest.mark.parametrize(
    "module", sorted(m for m in MODULES if m.startswith("pipelines.inference."))
)
def test_every_module_of_prediction_is_walked(module: str) -> None:
    named = {flag for text in raised_texts(module) for flag in FLAG.findall(text)}
    assert module in PRINTED_BY or not named
