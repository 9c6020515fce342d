"""Headers of tars are walked as `tarfile` does, but bounded: in time, in memory and by the file."""

import io
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from shards.foreign import MAX_UNUSABLE, Role, group_members
from shards.sample import DataError
from shards.tar_headers import BLOCK, MAX_EXTENDED_BYTES, TarMember, iter_members

ROLES: dict[str, Role] = {"mask.png": "mask", "json": "json", "png": "image"}
END = bytes(2 * BLOCK)


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """Build a header with any size field and a valid checksum."""
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: bytes, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name, b"%011o\0" % len(data), kind) + data + bytes(-len(data) % BLOCK)


def record(key: bytes, value: bytes) -> bytes:
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def walk(data: bytes) -> list[TarMember]:
    return list(iter_members(io.BytesIO(data), "a.tar"))


def refusal(data: bytes) -> str:
    with pytest.raises(DataError) as caught:
        walk(data)
    return str(caught.value)


# ---- as tarfile


def random_name(rng: np.random.Generator) -> str:
    letters = list("abcXYZ019._- é漢/")
    length = int(rng.choice([3, 20, 99, 100, 101, 155, 256, 400]))
    parts = "".join(rng.choice(letters, length)).split("/")
    return "/".join(part for part in parts if part.strip(".")) or "a"


def random_tar(rng: np.random.Generator, form: int) -> bytes:
    out = io.BytesIO()
    options = {"pax_headers": {"comment": "one for all"}} if form == tarfile.PAX_FORMAT else {}
    with tarfile.open(fileobj=out, mode="w", format=form, **options) as archive:
        archive.addfile(tarfile.TarInfo("first"))
        for _ in range(int(rng.integers(0, 12))):
            info = tarfile.TarInfo(random_name(rng))
            info.type = rng.choice([tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE])
            info.mtime = float(rng.choice([0, 1.5]))
            if info.issym():
                info.linkname = random_name(rng)
            if info.isreg():
                info.size = int(rng.choice([0, 1, 511, 512, 513, 3000]))
            try:
                archive.addfile(info, io.BytesIO(rng.bytes(info.size)))
            except ValueError:  # a name that does not fit into this format
                continue
    return out.getvalue()


def kind_of(info: tarfile.TarInfo) -> str:
    if info.isdir():
        return "folder"
    if info.issparse():
        return "sparse"
    return "file" if info.isreg() else "other"


@pytest.mark.parametrize(
    "form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=str
)
def test_members_are_those_of_tarfile(form: int) -> None:
    seen = 0
    for seed in range(60):
        data = random_tar(np.random.default_rng([seed, form]), form)
        with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as archive:
            expected = [(info.name, info.offset_data, info.size, kind_of(info)) for info in archive]
        assert walk(data) == expected
        seen += len(expected)
    assert seen > 200


def test_sizes_of_8_gib_in_binary_and_v7_headers_are_read() -> None:
    large = (b"\x80" + (2**33).to_bytes(11, "big"), b"0")
    message = refusal(header(b"a.png", *large) + END)
    assert message == (
        "a.tar is truncated or not a tar (unexpected end of data); copy or write it again"
    )
    old = bytearray(member(b"a.png", b"x", b"\0"))
    old[257:265] = bytes(8)
    old[148:156] = b" " * 8
    old[148:156] = b"%6o\0 " % sum(old[:BLOCK])
    assert walk(bytes(old) + END) == [("a.png", 512, 1, "file")]


def test_a_name_that_is_not_utf8_keeps_its_bytes() -> None:
    (found,) = walk(member(b"\xff.png", b"x") + END)
    assert found.name == "\udcff.png"


def test_links_devices_and_sparse_files_are_no_files() -> None:
    sparse = bytearray(header(b"s.png", b"%011o\0" % 3, b"S"))
    sparse[482] = 1
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    data = b"".join(
        [
            *(header(b"%c.png" % kind, b"%011o\0" % 999, b"%c" % kind) for kind in b"12346"),
            bytes(sparse) + bytes(BLOCK) + b"abc" + bytes(509),
            member(b"V", b"data", b"V"),
            member(b"x", record(b"GNU.sparse.major", b"1"), b"x") + member(b"t.png", b"x"),
            member(b"a.png", b"x"),
            END,
        ]
    )
    kinds = [(found.name, found.kind) for found in walk(data)]
    assert kinds == [
        *((f"{kind}.png", "other") for kind in "12346"),
        ("s.png", "sparse"),
        ("V", "other"),
        ("t.png", "sparse"),
        ("a.png", "file"),
    ]


# ---- hostile


@pytest.mark.parametrize(
    "value", [b"-1536", b"-1", b"1.5", b"0x10", b"1_0", b" 1", b"", b"+1", b"9" * 4000]
)
def test_a_pax_size_that_is_not_decimal_is_refused(value: bytes) -> None:
    extended = member(b"x", record(b"size", value), b"x")
    assert "PAX size that is not a decimal number" in refusal(
        member(b"a.png", b"x") + extended + member(b"b.png", b"") + END
    )


@pytest.mark.parametrize(
    "size", [b"-0000001536\0", b"\xff" * 12, b"0x10\0", b"1_0\0", b"99999999999\0", b"abc"]
)
@pytest.mark.parametrize("kind", [b"0", b"x", b"L", b"g"])
def test_a_size_that_is_no_octal_number_is_refused(size: bytes, kind: bytes) -> None:
    message = refusal(member(b"a.png", b"x") + header(b"b.png", size, kind) + END)
    assert "invalid size in the header at byte 1,024" in message


@pytest.mark.parametrize("kind", [b"x", b"g", b"X", b"L", b"K"])
@pytest.mark.parametrize("size", [MAX_EXTENDED_BYTES + 1, 6 * 2**30])
def test_an_extended_header_of_gigabytes_is_refused_unread(
    kind: bytes, size: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.tar"
    with path.open("wb") as out:
        out.write(header(b"x", b"%011o\0" % size, kind))
        out.truncate(BLOCK + size)
        out.seek(0, io.SEEK_END)
        out.write(bytes(-size % BLOCK) + member(b"b.png", b"x") + END)
    tracemalloc.start()
    with path.open("rb") as file, pytest.raises(DataError, match=f"{size:,} bytes at byte 0"):
        list(iter_members(file, path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize(
    "body",
    [
        b"1" * MAX_EXTENDED_BYTES,
        b"1" * 20 + b" a=b\n",
        b"5 a=\n" * 3 + b"6 abc\n",
        b"0 a=b\n",
        b"999 a=b\n",
        b"6 a=bX",
        b"-6 a=b\n",
        b" a=b\n",
    ],
)
def test_damaged_pax_records_are_refused_in_linear_time(body: bytes) -> None:
    begin = time.perf_counter()
    message = refusal(member(b"x", body, b"x") + member(b"a.png", b"x") + END)
    assert "damaged PAX record at byte 0" in message
    assert time.perf_counter() - begin < 1


def test_many_records_take_linear_time() -> None:
    last = record(b"path", b"b.png")
    body = record(b"k", b"v") * ((MAX_EXTENDED_BYTES - len(last)) // 6) + last
    begin = time.perf_counter()
    found = walk(member(b"x", body, b"x") + member(b"a.png", b"x") + END)
    assert [one.name for one in found] == ["b.png"]
    assert time.perf_counter() - begin < 5


def test_chained_extended_headers_do_not_recurse() -> None:
    chain = member(b"x", record(b"comment", b"x"), b"x") * 20_000
    assert [one.name for one in walk(chain + member(b"a.png", b"x") + END)] == ["a.png"]
    assert "no member after an extended header" in refusal(chain + END)


def test_gigabytes_of_zeros_after_the_end_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with path.open("wb") as out:
        out.write(member(b"a.png", b"x") + END)
        out.truncate(2**40)
    with path.open("rb") as file, pytest.raises(DataError, match="after its end marker"):
        list(iter_members(file, path))


def group(data: bytes, path: str = "a.tar") -> None:
    group_members(io.BytesIO(data), path, ROLES, declared=False)


def flood(name: Callable[[int], bytes], kind: bytes = b"0") -> bytes:
    return b"".join(header(name(i), b"%011o\0" % 0, kind) for i in range(2 * MAX_UNUSABLE)) + END


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (lambda i: b"k%07d.png" % i, b"0"),
        (lambda i: b"k%07d.json" % i, b"0"),
        (lambda i: b"k%07d.png" % i, b"2"),
        (lambda i: b"../k%07d.txt" % i, b"0"),
        (lambda i: b"k.png", b"0"),
    ],
)
def test_a_tar_of_unusable_members_is_refused(name: Callable[[int], bytes], kind: bytes) -> None:
    with pytest.raises(DataError, match="more than 10,000 members are empty or cannot be used"):
        group(flood(name, kind))


@pytest.mark.parametrize(
    ("name", "kind", "kinds"),
    [
        (lambda i: b"folder%07d" % i, b"5", 0),
        (lambda i: b".hidden%07d" % i, b"0", 1),
        (lambda i: b"k.e%07d" % i, b"0", 1001),
    ],
)
def test_members_of_no_sample_are_counted_not_kept(
    name: Callable[[int], bytes], kind: bytes, kinds: int
) -> None:
    data = flood(name, kind)
    contents = group_members(io.BytesIO(data), "a.tar", ROLES, declared=False)
    assert len(contents.ignored) == kinds
    assert contents.ignored.total() in (0, 2 * MAX_UNUSABLE)


def test_every_cut_is_an_error_and_none_is_another_exception() -> None:
    parts: Sequence[bytes] = (
        member(b"x", record(b"path", b"long/" * 50 + b"a.png"), b"x"),
        member(b"a.png", b"xyz"),
        member(b"././@LongLink", b"b" * 300 + b".png\0", b"L"),
        member(b"b.png", b"xyz"),
    )
    whole = b"".join(parts)
    for length in range(0, len(whole), 7):
        with pytest.raises(DataError):
            walk(whole[:length])


def test_flipped_bits_give_only_clean_errors() -> None:
    rng = np.random.default_rng(0)
    whole = random_tar(np.random.default_rng(3), tarfile.PAX_FORMAT)
    for _ in range(2000):
        data = bytearray(whole)
        place = int(rng.integers(len(data)))
        data[place] ^= 1 << int(rng.integers(8))
        with suppress(DataError):
            assert len(walk(bytes(data))) < 20
