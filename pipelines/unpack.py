"""`unet unpack`: shards -> folders of images and masks, as they were before packing."""

import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from pipelines.drawing.overlay import draw_overlay
from pipelines.runtime.command import run_command
from pipelines.runtime.errors import INCOMPLETE, UsageError, refuse_changed_settings
from pipelines.runtime.outputs import refuse_unusable_name, require_writable
from pipelines.runtime.progress import progress
from pipelines.runtime.verification import verify_shards
from shards.images.files import IMAGE_EXTENSIONS, encode_png
from shards.images.pixels import decode_image
from shards.manifest import Manifest, SplitInfo, read_manifest
from shards.masks.png import decode_mask
from shards.order import EvalPlan
from shards.raw import RawSample
from shards.reader import SampleSource, ShardReader
from shards.requests import REMOTE_TIMEOUT
from shards.sample import IGNORE, DataError, Uint8, is_safe_path
from shards.store import Store
from shards.writer import write_atomically, write_json

JOB = "unpack.json"
"""File that records what was unpacked into a folder."""
FOLDERS = ("images", "masks", "overlay")


@dataclass(frozen=True, kw_only=True, slots=True)
class UnpackConfig:
    """Write the images and masks of a data set back into folders.

    OUT/images holds the original image files, OUT/masks PNGs with the original pixel values. To
    keep splits apart, unpack one at a time with --split.
    """

    data: str
    """Folder of shards, or a URL such as s3://bucket/folder."""
    out: Path
    """Folder in which `images`, `masks` and `overlay` are created."""
    split: str | None = None
    """Split to unpack; default: all."""
    overlay: bool = False
    """Also write images with their masks drawn over them."""
    max_memory: str | None = None
    """Memory for decoding images, such as 8GiB, shared by the processes of this machine; an image
    that takes more is refused before decoding. Default: 40 % of what is free."""
    verify_shards: bool = False
    """First read every shard and compare its sha256 with the manifest."""
    remote_timeout: float = REMOTE_TIMEOUT
    """Seconds for a request to a bucket, retries included."""


def run(config: UnpackConfig) -> int:
    """Unpack all samples of the chosen splits; files that exist already are kept.

    Returns 3 if some samples could not be unpacked.
    """
    require_writable("--out", config.out)
    manifest = read_manifest(config.data, "--data")
    names = list(manifest.splits) if config.split is None else [config.split]
    splits = [manifest.split(name, config.data) for name in names]
    if config.verify_shards:
        verify_shards(Store(config.data), [shard for split in splits for shard in split.shards])
    settings = {"manifest": manifest.digest, "split": config.split}
    refuse_other_contents(config.out, settings)
    paint = make_painter(manifest)
    seen: set[str] = set()
    problems: list[str] = []
    num_samples, num_written = sum(split.samples for split in splits), 0
    with progress(total=num_samples, desc="unpack", unit="sample") as bar:
        for raw in read_samples(config.data, splits):
            try:
                path = read_source_path(raw)
                refuse_repeated_name(raw, path, seen)
                if not seen:
                    # From here on OUT has contents; only a rerun may add to them.
                    config.out.mkdir(parents=True, exist_ok=True)
                    write_json(config.out / JOB, settings)
                seen.add(str(path.with_suffix("")))
                num_written += unpack_sample(raw, path, config, manifest, paint)
            except DataError as error:
                problems.append(str(error))
            bar.update()
    return print_result(config.out, num_samples, problems, num_written)


def read_samples(data: str, splits: Sequence[SplitInfo]) -> Iterator[RawSample]:
    """Yield the samples of some splits. Raises DataError if a shard is missing or damaged."""
    for split in splits:
        plan = EvalPlan(tuple(s.samples for s in split.shards), chunk=1, rank=0, world=1)
        for (raw,) in SampleSource(ShardReader(data, split.shards), plan):
            yield raw


def refuse_repeated_name(raw: RawSample, path: PurePosixPath, seen: Collection[str]) -> None:
    """Raise DataError if another sample has the same name, apart from the extension."""
    if (stem := str(path.with_suffix(""))) in seen:
        raise DataError(
            f"{raw.where}: another sample is named {stem} too; "
            "unpack one split at a time with --split, or rename it"
        )


def print_result(out: Path, num_samples: int, problems: Sequence[str], num_written: int) -> int:
    """Print what was unpacked and what was not; returns the exit code."""
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    left = f", {len(problems)} could not be unpacked" if problems else ""
    done = "" if num_written else ", already unpacked with these settings; nothing was written"
    print(f"{num_samples - len(problems)} samples in {out}{left}{'' if left else done}")
    return INCOMPLETE if problems else 0


def refuse_other_contents(out: Path, settings: dict[str, str | None]) -> None:
    """Raise UsageError if `out` was created with other settings, or holds other files."""
    path, elsewhere = out / JOB, "choose another --out"
    if path.exists():
        try:
            started = json.loads(path.read_bytes())
        except ValueError:
            started = None
        if not isinstance(started, dict):
            raise DataError(f"{path} is damaged; {elsewhere}")
        refuse_changed_settings(str(out), started, settings, elsewhere=elsewhere)
        return
    for folder in (out / name for name in FOLDERS):
        if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
            raise UsageError(f"{folder} exists and was not made by unet unpack; {elsewhere}")


def make_painter(manifest: Manifest) -> Callable[[Uint8], Image.Image] | None:
    """Make the function that turns class indices [H, W] into the original values or colours.

    None if the original values are the class indices: then the stored bytes are written.
    """
    form = manifest.mask_format
    if form.get("kind") == "rgb":
        colours = [tuple(colour) for colour in form["colours"]]
        ignored = [tuple(colour) for colour in form["ignore_colours"]] or [
            find_free_colour(colours)
        ]
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
    # Without an ignore value, ignored pixels get a value that no class has.
    free = next(value for value in range(IGNORE, -1, -1) if value not in values)
    levels[IGNORE] = free if ignore_value is None else ignore_value
    if levels.max() < 256:
        return lambda mask: Image.fromarray(levels.astype(np.uint8)[mask])
    return lambda mask: Image.fromarray(levels[mask])


def find_free_colour(colours: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Find the lightest grey that is not the colour of a class."""
    greys = ((level,) * len(colours[0]) for level in range(255, -1, -1))
    return next(grey for grey in greys if grey not in colours)


def read_source_path(raw: RawSample) -> PurePosixPath:
    """Original path of a sample's image. Raises DataError for a path outside the folder."""
    source = raw.parse_info().get("source", f"{raw.key}.{raw.extension}")
    if not isinstance(source, str) or not is_safe_path(source):
        raise DataError(f"{raw.where}: source {source!r} is not a relative path inside the folder")
    return PurePosixPath(source)


def unpack_sample(
    raw: RawSample,
    path: PurePosixPath,
    config: UnpackConfig,
    manifest: Manifest,
    paint: Callable[[Uint8], Image.Image] | None,
) -> int:
    """Write the files of one sample; returns how many did not exist."""
    num_written = 0
    # Predictions may lack their image; the member in its place is then the mask.
    has_image = not raw.is_mask
    if has_image:
        num_written += unpack_image(raw, config.out / "images", path)
    if raw.mask is None:
        return num_written
    mask_path = path.with_suffix(".png")
    mask = decode_mask(raw.mask, len(manifest.classes), raw.where)
    data = raw.mask if paint is None else encode_png(paint(mask))
    num_written += write_file(config.out / "masks" / mask_path, data)
    if config.overlay and has_image:
        image = decode_image(raw.image, manifest.image_format, raw.where)
        drawn = draw_overlay(image, mask, manifest.palette)
        num_written += write_file(config.out / "overlay" / mask_path, encode_png(drawn))
    return num_written


def unpack_image(raw: RawSample, folder: Path, path: PurePosixPath) -> bool:
    """Write the original bytes of the image; returns as `write_file`.

    Raises DataError for an unknown extension.
    """
    extension = f".{raw.extension}"
    if extension not in IMAGE_EXTENSIONS:
        raise DataError(f"{raw.where}: {extension} is not an image extension")
    # An image that packing rotated or resized was stored as PNG.
    unchanged = path.suffix.lower() == extension
    return write_file(folder / (path if unchanged else path.with_suffix(extension)), raw.image)


def write_file(path: Path, data: bytes) -> bool:
    """Write a file atomically, creating its parent folders; returns whether it did not exist.

    Raises DataError if it exists with other contents, or if the file system refuses its name.
    """
    with refuse_unusable_name(path):
        if path.is_file():
            if path.read_bytes() != data:
                raise DataError(
                    f"{path} differs from the data set; move it away, or choose another --out"
                )
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data, durable=False)
        return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(UnpackConfig, run, argv, "unpack")


if __name__ == "__main__":
    sys.exit(main())
