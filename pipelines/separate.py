"""`unet separate`: a folder that mixes images and masks -> OUT/images and OUT/masks."""

import filecmp
import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pipelines.runtime.command import run_command
from pipelines.runtime.outputs import require_writable
from pipelines.runtime.progress import progress
from pipelines.runtime.yaml_flags import Positional
from shards.folders.pairs import normalise_extension, validate_regex
from shards.folders.separation import FileMove, count_moved_pairs, list_others, plan_separation
from shards.sample import DataError
from shards.writer import name_path


@dataclass(frozen=True, kw_only=True, slots=True)
class SeparateConfig:
    """Split a folder that mixes images and masks into OUT/images and OUT/masks.

    Masks are recognised by a suffix (`cell_mask.png` for `cell.png`), a pattern, or an extension.
    """

    USAGE: ClassVar[str] = "FOLDER --mask-suffix SUFFIX --out PATH"
    """Arguments of the usual call, which `--help` lists first."""
    folder: Positional[Path]
    """Folder that contains both."""
    out: Path
    """Folder in which `images` and `masks` are created."""
    mask_suffix: str | None = None
    """End of a mask's name, before the extension: `_mask`. It is removed from the name."""
    mask_pattern: str | None = None
    """Regular expression that matches the paths (without extension) of masks and of no image. A
    mask's name becomes its path without the match, `_(?:seg|gt)$`, or the groups of the match,
    `^seg_(.*)$`."""
    image_ext: str | None = None
    """Extension of the images: `.bmp`."""
    mask_ext: str | None = None
    """Extension of the masks: `.png`."""
    mode: Literal["copy", "move", "link"] = "copy"
    """Copy the files, move them, or create symbolic links to them."""
    dry_run: bool = False
    """Print what would be done and exit."""

    def __post_init__(self) -> None:
        by_extension = (self.image_ext is not None, self.mask_ext is not None)
        ways = [self.mask_suffix is not None, self.mask_pattern is not None, any(by_extension)]
        if sum(ways) != 1 or (any(by_extension) and not all(by_extension)):
            raise ValueError(
                "use --mask-suffix, or --mask-pattern, or --image-ext together with --mask-ext"
            )
        if self.mask_suffix == "":
            raise ValueError("--mask-suffix must not be empty")
        if self.mask_pattern is not None:
            validate_regex("--mask-pattern", self.mask_pattern)
        if all(by_extension) and normalise_extension(self.image_ext) == normalise_extension(
            self.mask_ext
        ):
            raise ValueError("--image-ext and --mask-ext must differ; otherwise use --mask-suffix")


def run(config: SeparateConfig) -> int:
    """Place every file, or print where it would go; files placed before are kept."""
    if not config.dry_run:
        require_writable("--out", config.out)
        if config.mode == "move" and config.folder.is_dir():
            require_writable("FOLDER", config.folder, "use --mode copy")
    if config.mode == "move" and config.folder.is_dir():
        num_moved = count_moved_pairs(config.folder, config.out)
        if num_moved:
            print(f"{num_moved} pairs in {config.out}, already separated; nothing was written")
            return 0
    plan = plan_separation(
        config.folder,
        config.out,
        mask_suffix=config.mask_suffix,
        mask_pattern=config.mask_pattern,
        image_ext=normalise_extension(config.image_ext),
        mask_ext=normalise_extension(config.mask_ext),
    )
    others = [] if config.mode == "move" else list_others(plan, config.out)
    if others:
        raise DataError(
            f"--out {config.out} holds {len(others)} files that this command does not make, the "
            f"first: {others[0]}; choose another --out"
        )
    num_masks = sum(file.is_mask for file in plan)
    if config.dry_run:
        for file in plan:
            print(f"{file.source} -> {file.target}")
        print(f"{num_masks} pairs; nothing was written (--dry-run)")
        return 0
    num_placed = sum(
        place_file(file, config.mode) for file in progress(plan, desc="separate", unit="file")
    )
    done = "" if num_placed else ", already separated; nothing was written"
    print(f"{num_masks} pairs in {config.out / 'images'} and {config.out / 'masks'}{done}")
    print(
        f"next: unet pack --images {config.out / 'images'} --masks {config.out / 'masks'} "
        "--mask-format ... --out SHARDS"
    )
    return 0


def place_file(file: FileMove, mode: Literal["copy", "move", "link"]) -> bool:
    """Copy, move or link one file atomically; an identical file at the target is kept.

    Returns whether the target did not exist.

    Raises DataError if the target exists and differs.
    """
    file.target.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(file.target):
        if not file.target.exists() or not filecmp.cmp(file.source, file.target, shallow=False):
            raise DataError(
                f"{file.target} exists and differs from {file.source}; choose another --out"
            )
        if mode == "move" and not file.source.samefile(file.target):
            file.source.unlink()
        return False
    # Not longer than the target's name, and the same on a rerun, which removes it.
    digest = hashlib.sha256(os.fsencode(file.target.name)).hexdigest()
    temporary = file.target.with_name(f".{digest[:16]}.tmp")
    temporary.unlink(missing_ok=True)
    if mode == "link":
        temporary.symlink_to(file.source.resolve())
    else:
        with name_path(file.target):
            shutil.copyfile(file.source, temporary)
    temporary.replace(file.target)
    if mode == "move":
        file.source.unlink()
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(SeparateConfig, run, argv, "separate")


if __name__ == "__main__":
    sys.exit(main())
