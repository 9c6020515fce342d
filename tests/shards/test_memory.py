"""`shards.images.memory`, `shards.images.cost`: what decoding takes is known before it starts."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from shards.images import memory
from shards.images.cost import estimate_decoding
from shards.images.files import ImageFormat, ImageRule, open_image, read_image
from shards.images.pixels import decode_file, decode_image
from shards.images.tiff import read_tiff_tags
from shards.masks.png import decode_mask, encode_mask
from shards.sample import DataError

SIDE = 1500
EXIF = Image.Exif()
EXIF[0x112] = 6
CASES = {
    "grey PNG": ("PNG", "L", {}),
    "palette PNG": ("PNG", "P", {}),
    "RGB PNG": ("PNG", "RGB", {}),
    "RGBA PNG": ("PNG", "RGBA", {}),
    "16-bit PNG": ("PNG", "I;16", {}),
    "RGB JPEG": ("JPEG", "RGB", {}),
    "progressive JPEG": ("JPEG", "RGB", {"progressive": True}),
    "rotated JPEG": ("JPEG", "RGB", {"exif": EXIF}),
    "CMYK JPEG": ("JPEG", "CMYK", {}),
    "TIFF of one strip": ("TIFF", "RGB", {"compression": "tiff_lzw", "strip_size": 2**30}),
    "WebP": ("WEBP", "RGB", {}),
    "GIF": ("GIF", "P", {}),
}


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    for name in (memory.VARIABLE, memory.SHARE_VARIABLE):
        # Set first, so that what the test sets is undone.
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)


def encode(kind: str, mode: str, options: dict) -> bytes:
    ramp = np.add.outer(np.arange(SIDE), np.arange(SIDE)) % 256
    image = Image.fromarray(ramp.astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "RGBA":
        image = image.convert("RGB")
    file = io.BytesIO()
    (image if mode == "I;16" else image.convert(mode)).save(file, kind, **options)
    return file.getvalue()


def peak(function) -> int:
    """Return the bytes by which a call raises the peak memory of a fresh process."""
    read, write = os.pipe()
    if not (child := os.fork()):
        status = 1
        try:
            before = measure("VmRSS")
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            function()
            os.write(write, str(measure("VmHWM") - before).encode())
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as file:
        assert status == 0
        return int(file.read())


def measure(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


@pytest.mark.parametrize("name", CASES)
def test_decoding_takes_at_most_what_the_header_says(name):
    data = encode(*CASES[name])
    opened = Image.open(io.BytesIO(data))
    estimate = estimate_decoding(opened, read_tiff_tags(opened))
    form = ImageFormat("RGB", "drop", (0, 65535))
    taken = peak(lambda: decode_file(data, form, "a"))
    assert taken <= estimate <= 30 * SIDE * SIDE


def test_a_small_file_of_a_billion_pixels_is_refused_before_it_is_decoded(raw_png):
    memory.set_max_memory("2GiB")
    data = bytearray(raw_png([b"\0"], 1, 1, 0))
    data[16:24] = struct.pack(">II", 31600, 31600)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(DataError) as caught:
        read_image(bytes(data), ImageRule(), "a.png")
    assert str(caught.value) == (
        "a.png is 31600 x 31600 pixels, which take 14,285 MiB to decode, more than the 2,048 MiB "
        "of a process; raise --max-memory, use fewer --workers, or split it into smaller images"
    )


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP"])
def test_every_format_is_bounded(kind):
    data = encode(kind, "P" if kind == "GIF" else "RGB", {})
    memory.set_max_memory("20M")
    with pytest.raises(DataError, match="to decode, more than the 20 MiB of a process"):
        decode_image(data, ImageFormat("RGB"), "a")


def test_masks_of_shards_are_bounded():
    data = encode_mask(np.zeros((SIDE, SIDE), np.uint8), ((0, 0, 0),))
    assert decode_mask(data, 1, "a").shape == (SIDE, SIDE)
    memory.set_max_memory("20M")
    with pytest.raises(DataError, match="to decode, more than the 20 MiB of a process"):
        decode_mask(data, 1, "a")


def test_the_tile_of_a_tiff_may_be_larger_than_its_image(raw_tiff):
    memory.set_max_memory("1M")
    open_image(raw_tiff(bytes(256), (16, 16), 8, 1), "a", ImageRule())
    tile = [(322, "I", [65536]), (323, "I", [65536]), (324, "I", [8]), (325, "I", [256])]
    with pytest.raises(DataError, match="take 8,192 MiB to decode, more than"):
        open_image(raw_tiff(bytes(256), (16, 16), 8, 1, tags=tile), "a", ImageRule())


def test_processes_share_the_memory(monkeypatch):
    memory.set_max_memory("8GiB")
    assert memory.memory_limit() == 8 * 2**30
    memory.share_memory(4)
    assert memory.memory_limit() == 2 * 2**30
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.memory_limit() == 2**30


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 2**33), ("500M", 500 * 2**20), ("1.5g", 3 * 2**29), ("10", 10)]
)
def test_sizes_have_units(text, size):
    assert memory.parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "8 apples", "nan", "1e9", "9" * 400, "8GiBB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="--max-memory must be a size such as 8GiB, got"):
        memory.parse_memory(text)


def test_the_default_is_a_share_of_what_the_tightest_cgroup_leaves(tmp_path):
    for folder, limit in (
        (tmp_path, "max"),
        (tmp_path / "a", "1000000"),
        (tmp_path / "a/b", "max"),
    ):
        folder.mkdir(exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("400000\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    names = "memory.max", "memory.current"
    assert list(memory.iter_cgroup(tmp_path, "/a/b", *names)) == [700000]
    assert list(memory.iter_cgroup(tmp_path, "/not/mounted", *names)) == []
    assert memory.memory_limit() <= memory.FREE_SHARE * memory.measure_free() * 1.1
