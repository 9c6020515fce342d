"""`runtime.strict_yaml`: hostile and ambiguous configuration ends in one line, quickly."""

import os
import re
import time
from pathlib import Path

import pytest
import yaml

from pipelines.runtime.command import parse
from pipelines.runtime.errors import UsageError
from pipelines.runtime.strict_yaml import MAX_BYTES, load_yaml
from pipelines.runtime.yaml_flags import to_plain
from pipelines.train import TrainConfig

BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30)
)


def load(content: bytes, folder: Path) -> TrainConfig:
    file = folder / "c.yaml"
    file.write_bytes(content)
    flags = ["--data", "d", "--run-dir", "r", "--steps", "1", "--config", str(file)]
    return parse(TrainConfig, flags, "train")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[" * 100_000, "nested more than 16 levels"),
        (b"a: " + b"{a: " * 100_000, "nested more than 16 levels"),
        (b"- " * 100_000 + b"a", "nested more than 16 levels"),
        (BOMB.encode(), "*a0: write the value instead"),
        (MERGES.encode(), "*a0: write the value instead"),
        (b"a: &a [*a]", "*a: write the value instead"),
        (b"a: !!python/object/apply:os.system [id]", "remove the tag"),
        (b"steps: !!int 'x'", "remove the tag"),
        (b"steps: !!timestamp 2020-99-99", "remove the tag"),
        (b"? [a, b]\n: 1", "a list or mapping as key"),
        (b"{[a]: 1}", "a list or mapping as key"),
        (b"seed: 1\nseed: 2", "duplicate key seed"),
        (b"run-dir: a\nrun_dir: b", "duplicate key run_dir"),
        (b"optim: {lr: 1, lr: 2}", "duplicate key lr"),
        (b"seed: 010", "010 may be octal"),
        (b"<<: {seed: 1}", "unknown key <<"),
        (b"optim:\n\tlr: 2", "line 2"),
        (b"\xff\xfeseed: 1", "not UTF-8"),
        (b"seed: \xe9", "not UTF-8"),
        (b"seed: 1\n---\nseed: 2", "but found another document"),
        (b"seed: 1\0", "special characters"),
        (b"- seed", "expected `key: value` lines, found list"),
        (b"x" * (MAX_BYTES + 1), "more than 1,048,576 bytes"),
        (b"minutes: nan", "--minutes nan: not a finite number"),
        (b"minutes: inf", "--minutes inf: not a finite number"),
        (b"optim: {lr: nan}", "--optim.lr nan: not a finite number"),
    ],
)
def test_a_hostile_or_ambiguous_file_is_refused_in_one_line(
    content: bytes, problem: str, tmp_path: Path
) -> None:
    start = time.process_time()
    with pytest.raises(UsageError) as refused:
        load(content, tmp_path)
    message = str(refused.value)
    assert problem in message
    assert "\n" not in message
    assert len(message) < 1000
    assert time.process_time() - start < 5


@pytest.mark.parametrize("text", ["seed: 1:30", "seed: 0x10", "seed: 1e3", "minutes: .nan"])
def test_text_that_only_yaml_reads_as_a_number_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(text.split(": ")[1])):
        load(text.encode(), tmp_path)


def test_a_file_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.touch()
    os.truncate(file, 2**30)
    start = time.process_time()
    with pytest.raises(UsageError, match="more than 1,048,576 bytes"):
        parse(TrainConfig, ["--config", str(file)], "train")
    assert time.process_time() - start < 1


def test_scalars_keep_their_text(tmp_path: Path) -> None:
    text = "a: 1.10\nb: '010'\nc: 2020-01-01\nd: no\ne: true\nf: null\ng: [1e-3]\n"
    assert load_yaml(text) == {
        "a": "1.10",
        "b": "010",
        "c": "2020-01-01",
        "d": "no",
        "e": True,
        "f": None,
        "g": ["1e-3"],
    }


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    assert to_plain(load(b"\xef\xbb\xbfseed: 7", tmp_path))["seed"] == 7


def test_what_yaml_dumps_is_loaded_as_text() -> None:
    values = ["010", "1:30", "true", "null", "no", ".nan", "<<", "é", "a: b", ""]
    assert load_yaml(yaml.safe_dump(values, allow_unicode=True)) == values
