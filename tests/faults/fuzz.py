"""Coverage-guided fuzzing of everything that is parsed: `python tests/faults/fuzz.py TARGET`.

Needs atheris, in an environment of its own that sees the others (`--system-site-packages` or
PYTHONPATH). Further arguments are those of libFuzzer, such as -max_total_time=600. It starts from a
valid document of the target. A target may raise the errors that end a command in one line; anything
else is a finding.
"""

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["shards", "unet", "pipelines.runtime.strict_yaml"]):
    import yaml
    from PIL import Image

    from pipelines.pack import main as pack
    from pipelines.runtime.strict_yaml import load_typed_yaml, load_yaml
    from shards.images.files import ImageRule, open_image
    from shards.manifest import read_manifest
    from shards.offsets import ShardOffsets, check_offsets
    from shards.sample import DataError
    from shards.tar_headers import iter_members
    from unet import UNet, UNetConfig, weights

FOLDER = Path(tempfile.mkdtemp())
SHARD = FOLDER / "data" / "train-000000.tar"
CHECKPOINT = FOLDER / "checkpoint"
CONFIG = UNetConfig(in_channels=3, num_classes=2, base_channels=1, depth=1)
YAML = b"optim:\n  lr: 1e-3\nclasses: [a, b]\nname: '1.10'\n"


def fuzz_manifest(data: bytes) -> None:
    (FOLDER / "index.json").write_bytes(data)
    with contextlib.suppress(DataError):
        read_manifest(FOLDER)


def fuzz_yaml(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    for load in (load_yaml, load_typed_yaml):
        with contextlib.suppress(yaml.YAMLError):
            load(text)


def fuzz_image(data: bytes) -> None:
    with contextlib.suppress(DataError):
        open_image(data, "x", ImageRule())


def fuzz_idx(data: bytes) -> None:
    with contextlib.suppress(DataError):
        offsets = check_offsets(ShardOffsets(data, "x.idx"), data, None)
        for row in range(len(offsets)):
            offsets[row]


def fuzz_tar(data: bytes) -> None:
    with contextlib.suppress(DataError):
        for _ in iter_members(io.BytesIO(data), "x.tar"):
            pass


def fuzz_checkpoint(data: bytes) -> None:
    (CHECKPOINT / weights.HEADER).write_bytes(data)
    with contextlib.suppress(ValueError):
        UNet.from_pretrained(CHECKPOINT)


def fuzz_weights(data: bytes) -> None:
    (CHECKPOINT / weights.WEIGHTS).write_bytes(data)
    with contextlib.suppress(ValueError):
        weights.check_weights(UNet(CONFIG).state_dict(), CHECKPOINT)


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], bytes]]] = {
    "manifest": (fuzz_manifest, (FOLDER / "data" / "index.json").read_bytes),
    "yaml": (fuzz_yaml, lambda: YAML),
    "image": (fuzz_image, (FOLDER / "in" / "images" / "0.png").read_bytes),
    "idx": (fuzz_idx, SHARD.with_suffix(".idx").read_bytes),
    "tar": (fuzz_tar, SHARD.read_bytes),
    "checkpoint": (fuzz_checkpoint, (CHECKPOINT / weights.HEADER).read_bytes),
    "weights": (fuzz_weights, (CHECKPOINT / weights.WEIGHTS).read_bytes),
}
"""Each target and what reads its valid document."""


def make_documents() -> None:
    """Make a small data set and a checkpoint."""
    for name in ("images", "masks"):
        (FOLDER / "in" / name).mkdir(parents=True)
        for number in range(4):
            image = Image.new("L", (8, 8), 0)
            image.putpixel((number, 0), 255)
            image.save(FOLDER / "in" / name / f"{number}.png")
    flags = ["--images", FOLDER / "in" / "images", "--masks", FOLDER / "in" / "masks"]
    flags += ["--mask-format", "binary", "--val-fraction", 0.5, "--workers", 1]
    if pack([*map(str, flags), "--out", str(FOLDER / "data")]):
        raise SystemExit("pack failed")
    UNet(CONFIG).save_pretrained(CHECKPOINT)


if __name__ == "__main__":
    make_documents()
    fuzz, read_document = TARGETS[sys.argv[1]]
    seeds = FOLDER / "seeds"
    seeds.mkdir()
    (seeds / "valid").write_bytes(read_document())
    atheris.Setup([sys.argv[0], *sys.argv[2:], str(seeds)], fuzz)
    atheris.Fuzz()
