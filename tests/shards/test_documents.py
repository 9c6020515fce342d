"""`documents`, `manifest`: a wrong field is refused by name, in one line."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shards.documents import convert, decode, parse_json
from shards.manifest import ShardInfo, read_manifest, write_manifest
from shards.sample import DataError
from shards.store import Store


@pytest.fixture
def written(make_shards, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A data set with its manifest, and the manifest as JSON data."""
    folder, manifest, _ = make_shards([2, 1])
    write_manifest(Store(str(folder)), manifest)
    return folder, json.loads((folder / "index.json").read_bytes())


def train(plain: dict[str, Any]) -> dict[str, Any]:
    return plain["splits"]["train"]


def shard(plain: dict[str, Any]) -> dict[str, Any]:
    return train(plain)["shards"][0]


LARGE = 10**12
WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "name is a number": (lambda m: shard(m).update(name=5), "Expected `str`, got `int`"),
    "name with NUL": (lambda m: shard(m).update(name="a\0.tar"), "matching regex"),
    "name with an escape": (lambda m: shard(m).update(name="\x1b[31m.tar"), "matching regex"),
    "name above the folder": (lambda m: shard(m).update(name="../x.tar"), "within the folder"),
    "absolute name": (lambda m: shard(m).update(name="/etc/x.tar"), "within the folder"),
    "chained URL": (lambda m: shard(m).update(name="a::file:///x.tar"), "within the folder"),
    "name of no tar": (lambda m: shard(m).update(name="index.json"), "within the folder"),
    "two entries, one shard": (
        lambda m: train(m)["shards"].append(dict(shard(m))),
        "fit|listed twice|sizes of",
    ),
    "sha256 is a path": (lambda m: shard(m).update(sha256="/tmp/x"), "matching regex"),
    "sha256 in capitals": (lambda m: shard(m).update(sha256="A" * 64), "matching regex"),
    "samples is a string": (lambda m: shard(m).update(samples="2"), "Expected `int`, got `str`"),
    "samples is null": (lambda m: shard(m).update(samples=None), "Expected `int`, got `null`"),
    "samples is a fraction": (lambda m: shard(m).update(samples=1.5), "Expected `int`"),
    "samples below zero": (lambda m: shard(m).update(samples=-5), "Expected `int` >= 0"),
    "samples beyond 64 bits": (lambda m: shard(m).update(samples=10**30), "int"),
    "more samples than fit": (lambda m: shard(m).update(samples=LARGE), "do not fit into"),
    "sizes of more images": (lambda m: train(m)["sizes"][0].update(images=LARGE), "sizes of"),
    "a side of zero": (lambda m: train(m)["sizes"][0].update(width=0), "Expected `int` >= 1"),
    "another sum of samples": (lambda m: train(m).update(samples=7), "lists 7 samples"),
    "pixels are strings": (lambda m: shard(m).update(pixels=["a"] * 3), "Expected `int`"),
    "pixels of another class": (lambda m: shard(m).update(pixels=[1] * 7), "7 pixel counts"),
    "classes are numbers": (lambda m: m.update(classes=[1, 2]), "Expected `str`"),
    "one class less": (lambda m: m.update(classes=["a"]), "2 palette colours for 1 classes"),
    "a class twice": (lambda m: m.update(classes=["a", "a"]), "each once"),
    "a class without a name": (lambda m: m.update(classes=["", "b"]), "length >= 1"),
    "classes are nested": (lambda m: m.update(classes=[["a"], ["b"]]), "Expected `str`"),
    "a colour beyond a byte": (lambda m: m["palette"][0].__setitem__(0, 256), "<= 255"),
    "mean of strings": (lambda m: m.update(mean=["a"] * 3), "Expected `float`"),
    "mean of two channels": (lambda m: m.update(mean=[0.5] * 2), "expected 3 numbers"),
    "mean is not a number": (lambda m: m.update(mean=[float("nan")] * 3), "JSON is malformed"),
    "mean beyond 1": (lambda m: m.update(mean=[7.0] * 3), "expected 3 numbers"),
    "no deviation": (lambda m: m.update(std=[0.0] * 3), "expected 3 numbers"),
    "deviation below zero": (lambda m: m.update(std=[-1.0] * 3), "expected 3 numbers"),
    "mask_format is a string": (lambda m: m.update(mask_format="values"), "Expected `object`"),
    "mask_format of no kind": (lambda m: m.update(mask_format={"kind": "x"}), "Invalid enum"),
    "mask_format, other field": (
        lambda m: m.update(mask_format={"kin": "rgb"}),
        "Unknown field - at `.*kin`",
    ),
    "rgb without colours": (lambda m: m.update(mask_format={"kind": "rgb"}), "one colour"),
    "channels of no mode": (lambda m: m["image_format"].update(channels="CMYK"), "Invalid enum"),
    "range upside down": (lambda m: m["image_format"].update(range=[9, 3]), "range"),
    "range of three": (lambda m: m["image_format"].update(range=[1, 2, 3]), "length 2"),
    "border_sigma below zero": (lambda m: m.update(border_sigma=-1), "border_sigma"),
    "verified by nobody": (lambda m: m.update(verified="yes"), "Invalid enum"),
    "version is a boolean": (lambda m: m.update(version=True), "not an integer"),
    "splits is a list": (lambda m: m.update(splits=[]), "Expected `object`"),
    "an unknown field": (lambda m: train(m).update(extra=1), "Unknown field - at `.*extra`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_manifest_is_refused_in_one_line_that_names_the_field(case: str, written) -> None:
    folder, plain = written
    change, expected = WRONG[case]
    change(plain)
    (folder / "index.json").write_text(json.dumps(plain))
    with pytest.raises(DataError, match=expected) as caught:
        read_manifest(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder / 'index.json'} is damaged (")
    assert message.isprintable()


def test_the_manifest_of_the_cases_above_is_valid(written) -> None:
    assert read_manifest(written[0]).split("train", "").samples == 3


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"null", b"\xff", b'{"a": NaN}', b'{"a": "\\ud800"}', b'{"a":' + b"[" * 100_000],
)
def test_what_is_not_a_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_json(text)


def test_decode_names_the_document_and_the_remedy() -> None:
    with pytest.raises(DataError) as caught:
        decode(b"{}", ShardInfo, "x/shard.json", "write it again")
    assert str(caught.value) == (
        "x/shard.json is damaged (Object missing required field `name`); write it again"
    )


def test_convert_does_not_coerce() -> None:
    plain = {"name": "a.tar", "samples": 1, "bytes": 2048, "sha256": "0" * 64, "pixels": []}
    assert convert(copy.deepcopy(plain), ShardInfo) == ShardInfo("a.tar", 1, 2048, "0" * 64, ())
    for field, value in (("samples", True), ("samples", "1"), ("name", 5), ("pixels", {})):
        with pytest.raises(msgspec.ValidationError, match=f"\\$.{field}"):
            convert({**plain, field: value}, ShardInfo)
