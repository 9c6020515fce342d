"""An `.idx` that disagrees with the manifest or with the tar is an error, never another sample."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.manifest import ShardInfo
from shards.masks.png import encode_mask
from shards.order import Address
from shards.reader import ShardReader
from shards.sample import DataError
from shards.writer import ShardWriter

Line = list[list[str]]
"""The members of a sample, four words each."""


@pytest.fixture
def info(tmp_path: Path) -> ShardInfo:
    with ShardWriter(tmp_path / "a.tar") as writer:
        for number in range(4):
            mask = encode_mask(np.full((4, 4), number % 2, np.uint8), ((0, 0, 0), (9, 9, 9)))
            about = json.dumps({"source": f"k{number}.png"}).encode()
            writer.add(f"k{number}", {"png": b"%d" % number, "json": about, "mask.png": mask})
        file = writer.seal()
    return ShardInfo(file.name, file.samples, file.bytes, file.sha256, (), file.idx_sha256)


def rewrite(folder: Path, change: Callable[[list[Line]], list[Line]]) -> None:
    path = folder / "a.idx"
    first, *lines = path.read_text().splitlines()
    words = [line.split(" ") for line in lines]
    samples = [[line[i : i + 4] for i in range(0, len(line), 4)] for line in words]
    lines = [" ".join(word for member in line for word in member) for line in change(samples)]
    path.write_text("\n".join([first, *lines]) + "\n")


def read_all(folder: Path, info: ShardInfo) -> list[bytes]:
    reader = ShardReader(folder, [info])
    return [raw.image for raw in reader.read_all([Address(n, 0, n) for n in range(4)])]


def put(extension: str, word: int, change: Callable[[str], str]) -> Callable[[list[Line]], list]:
    def changed(samples: list[Line]) -> list[Line]:
        for member in samples[2]:
            if member[0] == extension:
                member[word] = change(member[word])
                break
        return samples

    return changed


def swap_words(*words: int) -> Callable[[list[Line]], list]:
    def changed(samples: list[Line]) -> list[Line]:
        mask, image = (next(m for m in samples[2] if m[0] == e) for e in ("mask.png", "png"))
        for word in words:
            mask[word], image[word] = image[word], mask[word]
        return samples

    return changed


CHANGES: dict[str, Callable[[list[Line]], list[Line]]] = {
    "one sample throughout": lambda samples: [samples[0]] * 4,
    "one sample twice, members in another order": lambda s: [s[0], s[1], s[2], s[0][::-1]],
    "image called json": put("png", 0, lambda _: "json"),
    "image called jpg": put("png", 0, lambda _: "jpg"),
    "image called mask": put("png", 0, lambda _: "mask.png"),
    "image of another sample": lambda s: [s[0], s[1], s[2], [*s[3][:-1], s[2][-1]]],
    "mask of another sample": lambda s: [s[0], s[1], s[2], [s[3][0], s[2][1], s[3][2]]],
    "mask's bytes under the image's name": swap_words(1, 2),
    "mask in place of the image": swap_words(0),
    "mask alone, called an image": lambda s: [*s[:3], [["png", *s[3][1][1:]]]],
    "offset + 1": put("png", 1, lambda word: str(int(word) + 1)),
    "offset - 512": put("png", 1, lambda word: str(int(word) - 512)),
    "offset 0": put("png", 1, lambda _: "0"),
    "offset with a sign": put("png", 1, lambda word: "+" + word),
    "offset of another script": put("png", 1, lambda word: "²" + word),
    "huge offset": put("png", 1, lambda _: "9" * 40),
    "size 0": put("png", 2, lambda _: "0"),
    "size + 1": put("png", 2, lambda word: str(int(word) + 1)),
    "another key": put("png", 3, lambda _: "k9.png"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_idx_that_lies_is_refused_with_and_without_its_sha256(
    name: str, info: ShardInfo, tmp_path: Path
) -> None:
    older = replace(info, idx_sha256=None)
    assert read_all(tmp_path, info) == read_all(tmp_path, older) == [b"0", b"1", b"2", b"3"]
    rewrite(tmp_path, CHANGES[name])
    with pytest.raises(DataError, match=r"a\.idx does not match the manifest \(sha256\)"):
        read_all(tmp_path, info)
    with pytest.raises(DataError, match=r"a\.(idx|tar)"):
        read_all(tmp_path, older)
