"""`unet unpack`: shards -> folders of pictures and masks, as they were before packing."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipelines.config import run_command
from pipelines.overlay import draw_overlay
from shards.index import Manifest, read_manifest
from shards.order import EvalPlan
from shards.reader import RawSample, SampleSource, ShardReader
from shards.sample import (
    IGNORE,
    IMAGE_EXTENSIONS,
    MASK_EXTENSION,
    DataError,
    encode_png,
    is_safe_path,
)
from shards.writer import write_atomically


@dataclass(frozen=True, kw_only=True, slots=True)
class UnpackConfig:
    """Write the pictures and masks of a data set back into folders.

    OUT/images holds the pictures' own bytes under their own names, OUT/masks PNGs with the pixel
    values that the mask files had. A split of its own folder where there are several: --split.
    """

    data: Path
    """Folder of shards."""
    out: Path
    """Where `images`, `masks` and `overlay` are made."""
    split: str | None = None
    """The split to unpack; left out: all of them."""
    overlay: bool = False
    """Also write the pictures with their masks drawn over them."""


def run(config: UnpackConfig) -> int:
    """Unpack sample by sample."""
    manifest = read_manifest(config.data)
    names = list(manifest.splits) if config.split is None else [config.split]
    splits = [manifest.split(name, config.data) for name in names]
    table = source_table(manifest)
    written = 0
    with tqdm(
        total=sum(split.samples for split in splits),
        desc="unpack",
        unit="sample",
        disable=not sys.stderr.isatty(),
    ) as bar:
        for split in splits:
            plan = EvalPlan(tuple(s.samples for s in split.shards), chunk=1, rank=0, world=1)
            for (raw,) in SampleSource(ShardReader(config.data, split.shards), plan):
                unpack_sample(raw, config, manifest, table)
                written += 1
                bar.update()
    print(f"{written} samples in {config.out}")
    return 0


def source_table(manifest: Manifest) -> np.ndarray | None:
    """The mask file's pixel value of each class index [256]; None where they are the same."""
    values = manifest.mask_format.get("source_values")
    if values is None or (
        list(values) == list(range(len(values)))
        and manifest.mask_format.get("ignore_value") in (None, IGNORE)
    ):
        return None
    table = np.arange(256, dtype=np.uint8)
    table[: len(values)] = values
    ignore_value = manifest.mask_format.get("ignore_value")
    table[IGNORE] = IGNORE if ignore_value is None else ignore_value
    return table


def unpack_sample(
    raw: RawSample, config: UnpackConfig, manifest: Manifest, table: np.ndarray | None
) -> None:
    """Write the files of one sample. Raises DataError for a path that would leave the folder."""
    source = raw.describe().get("source")
    if not isinstance(source, str) or not is_safe_path(source):
        raise DataError(
            f"{raw.where} names {source!r} as its source, a path that leaves the folder"
        )
    path = PurePosixPath(source)
    # Predictions may come without their pictures; the mask then stands in.
    has_image = raw.extension != MASK_EXTENSION
    if has_image:
        unpack_image(raw, config.out / "images", path)
    if raw.mask is not None:
        mask_path = path.with_suffix(".png")
        sample = raw.decode(manifest.channels)
        assert sample.mask is not None
        mask_file = config.out / "masks" / mask_path
        if table is None:
            write(mask_file, raw.mask)
        else:
            write(mask_file, encode_png(Image.fromarray(table[sample.mask])))
        if config.overlay and has_image:
            drawn = draw_overlay(sample.image, sample.mask, manifest.palette)
            write(config.out / "overlay" / mask_path, encode_png(drawn))


def unpack_image(raw: RawSample, folder: Path, path: PurePosixPath) -> None:
    """Write the picture's own bytes. Raises DataError for a kind that is no picture."""
    extension = f".{raw.extension}"
    if extension not in IMAGE_EXTENSIONS:
        raise DataError(f"{raw.where} has a picture of the unknown kind {extension}")
    # A picture that was stored upright is a PNG now, whatever it was.
    kept = path.suffix.lower() == extension
    write(folder / (path if kept else path.with_suffix(extension)), raw.image)


def write(path: Path, data: bytes) -> None:
    """A file, whole, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data, durable=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_command(UnpackConfig, run, argv, "unpack")


if __name__ == "__main__":
    sys.exit(main())
