"""`unet unpack`: shards -> folders of pictures and masks, as they were before packing."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from pipelines.config import refuse_url, run_command
from pipelines.overlay import draw_overlay
from pipelines.progress import progress
from shards.images import IMAGE_EXTENSIONS, decode_image, encode_png
from shards.index import Manifest, read_manifest
from shards.masks import decode_mask
from shards.order import EvalPlan
from shards.reader import RawSample, SampleSource, ShardReader
from shards.sample import IGNORE, DataError, Uint8, is_safe_path
from shards.writer import write_atomically


@dataclass(frozen=True, kw_only=True, slots=True)
class UnpackConfig:
    """Write the pictures and masks of a data set back into folders.

    OUT/images holds the pictures' own bytes under their own names, OUT/masks PNGs with the pixel
    values that the mask files had. A split of its own folder where there are several: --split.
    """

    data: str
    """Folder of shards, or a URL such as s3://bucket/folder."""
    out: Path
    """Where `images`, `masks` and `overlay` are made."""
    split: str | None = None
    """The split to unpack; left out: all of them."""
    overlay: bool = False
    """Also write the pictures with their masks drawn over them."""

    def __post_init__(self) -> None:
        refuse_url("--out", self.out)


def run(config: UnpackConfig) -> int:
    """Unpack sample by sample."""
    manifest = read_manifest(config.data)
    names = list(manifest.splits) if config.split is None else [config.split]
    splits = [manifest.split(name, config.data) for name in names]
    paint = mask_painter(manifest)
    seen: set[str] = set()
    with progress(
        total=sum(split.samples for split in splits), desc="unpack", unit="sample"
    ) as bar:
        for split in splits:
            plan = EvalPlan(tuple(s.samples for s in split.shards), chunk=1, rank=0, world=1)
            for (raw,) in SampleSource(ShardReader(config.data, split.shards), plan):
                path = source_path(raw)
                stem = str(path.with_suffix(""))
                if stem in seen:
                    raise DataError(
                        f"{raw.where}: a sample called {stem} was unpacked before; "
                        "unpack one split at a time with --split, or rename it"
                    )
                seen.add(stem)
                unpack_sample(raw, path, config, manifest, paint)
                bar.update()
    print(f"{len(seen)} samples in {config.out}")
    return 0


def mask_painter(manifest: Manifest) -> Callable[[Uint8], Image.Image] | None:
    """What turns class indices [H, W] into the mask files' own values or colours.

    None where these are the indices, so that the stored bytes serve.
    """
    form = manifest.mask_format
    if form.get("kind") == "rgb":
        colours = [tuple(colour) for colour in form["colours"]]
        ignored = [tuple(colour) for colour in form["ignore_colours"]] or [free_colour(colours)]
        table = np.zeros((256, len(colours[0])), dtype=np.uint8)
        table[: len(colours)] = colours
        table[IGNORE] = ignored[0]
        return lambda mask: Image.fromarray(table[mask])
    values = form.get("source_values", ())
    ignore_value = form.get("ignore_value")
    if list(values) == list(range(len(values))) and ignore_value in (None, IGNORE):
        return None
    levels = np.arange(256, dtype=np.uint16)
    levels[: len(values)] = values
    # Without a value of their own, ignored pixels take one that no class has.
    free = next(value for value in range(IGNORE, -1, -1) if value not in values)
    levels[IGNORE] = free if ignore_value is None else ignore_value
    if levels.max() < 256:
        return lambda mask: Image.fromarray(levels.astype(np.uint8)[mask])
    return lambda mask: Image.fromarray(levels[mask])


def free_colour(colours: list[tuple[int, ...]]) -> tuple[int, ...]:
    """White, or the first grey below it that no class has."""
    greys = ((level,) * len(colours[0]) for level in range(255, -1, -1))
    return next(grey for grey in greys if grey not in colours)


def source_path(raw: RawSample) -> PurePosixPath:
    """Where a sample's picture lay. Raises DataError for a path that would leave the folder."""
    source = raw.parse_info().get("source", f"{raw.key}.{raw.extension}")
    if not isinstance(source, str) or not is_safe_path(source):
        raise DataError(
            f"{raw.where} names {source!r} as its source, a path that leaves the folder; "
            "it is not unpacked"
        )
    return PurePosixPath(source)


def unpack_sample(
    raw: RawSample,
    path: PurePosixPath,
    config: UnpackConfig,
    manifest: Manifest,
    paint: Callable[[Uint8], Image.Image] | None,
) -> None:
    """Write the files of one sample."""
    # Predictions may come without their pictures; the mask then stands in.
    has_image = not raw.is_mask
    if has_image:
        unpack_image(raw, config.out / "images", path)
    if raw.mask is None:
        return
    mask_path = path.with_suffix(".png")
    mask = decode_mask(raw.mask, len(manifest.classes), raw.where)
    data = raw.mask if paint is None else encode_png(paint(mask))
    write(config.out / "masks" / mask_path, data)
    if config.overlay and has_image:
        image = decode_image(raw.image, manifest.image_format, raw.where)
        drawn = draw_overlay(image, mask, manifest.palette)
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
