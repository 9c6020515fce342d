"""`unet demo`: generate sample images, then pack, train, evaluate, predict and report.

Each step is the command that a user would type, and is printed before it runs.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from pipelines.runtime.command import run_command
from pipelines.runtime.errors import RunError, UsageError
from pipelines.runtime.outputs import require_writable
from pipelines.runtime.run_folder import RunFolder
from shards.images.files import encode_png
from shards.manifest import MANIFEST
from shards.writer import write_atomically

CPU_RANKS = 2
MADE = {"pictures", "shards", "run", "masks"}
"""Names in the folder of a demo."""
LABELLED, UNSEEN = 60, 12


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Run the full workflow on generated sample images: cells on a textured background.

    Generates 60 images with masks and 12 without, packs them, trains a small U-Net on all GPUs (on
    two CPU processes without one), evaluates it, predicts the images without masks and writes the
    report.
    """

    out: Path = Path("demo")
    """Output folder."""
    size: int = 256
    """Side of the sample images in pixels."""
    steps: int = 200
    """Optimizer steps."""
    seed: int = 0
    """Seed of the images and of training."""

    def __post_init__(self) -> None:
        for name, least in (("size", 64), ("steps", 1), ("seed", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"--{name} must be >= {least}, got {value}")


def run(config: DemoConfig) -> int:
    """Run all steps and print where the results are."""
    out = config.out
    require_writable("--out", out)
    refuse_other_files(out)
    refuse_other_size(out / "pictures" / "images", config.size)
    samples, shards, run_dir, masks = out / "pictures", out / "shards", out / "run", out / "masks"
    folder = RunFolder(run_dir)
    draw_samples(samples, config)
    if not (shards / MANIFEST).exists():
        folders = quote("--images", samples / "images", "--masks", samples / "masks")
        rule = "--mask-format binary --classes background cell --val-fraction 0.2"
        run_step("pack", f"{folders} {rule} {quote('--out', shards)}")
    where = quote("--data", shards, "--run-dir", run_dir)
    size = "--model.preset small --model.base-channels 12 --crop-size 128 --global-batch-size 4"
    length = f"--steps {config.steps} --eval-every 100 --seed {config.seed}"
    run_step("train", f"{where} {size} {length}", launch=True)
    run_step("evaluate", quote("--checkpoint", run_dir, "--data", shards, "--split", "val"))
    what = quote("--checkpoint", run_dir, "--input", samples / "unseen", "--out", masks)
    run_step("predict", f"{what} --png --overlay")
    run_step("report", quote("--run-dir", run_dir))
    scores = json.loads(folder.scores.read_text(encoding="utf-8"))
    print(
        f"\nDice of class cell on {scores['num_images']} held-out images: "
        f"{scores['classes']['cell']['dice']:.4f}"
    )
    print(f"report:    {folder.report}")
    print(f"scores:    {folder.scores}")
    print(f"overlays:  {masks / 'overlay'}")
    print(f"shards:    {masks}")
    return 0


def refuse_other_files(out: Path) -> None:
    """Raise UsageError if a folder holds anything that the demo does not make."""
    if out.is_dir() and {path.name for path in out.iterdir()} - MADE:
        raise UsageError(f"--out {out}: holds other files; choose another --out")


def refuse_other_size(images: Path, size: int) -> None:
    """Raise UsageError if sample images of another size exist, which are kept."""
    if (image := next(images.glob("*.png"), None)) is not None:
        with Image.open(image) as opened:
            width, _ = opened.size
        if width != size:
            raise UsageError(
                f"--size {size}: {images} holds images of {width}; choose another --out"
            )


def quote(*parts: object) -> str:
    """Join parts of a command line, quoted for the shell where needed."""
    return shlex.join(str(part) for part in parts)


def run_step(verb: str, flags: str, *, launch: bool = False) -> None:
    """Print a command and run it. Raises RunError if it fails."""
    module = f"pipelines.{verb}"
    environment = dict(os.environ)
    if launch:
        command, extra, shown = make_launch_command(module)
        environment.update(extra)
        print(
            "\n$", *(f"{name}={value}" for name, value in extra.items()), *shown, flags, flush=True
        )
    else:
        command = [sys.executable, "-m", module]
        print(f"\n$ unet {verb} {flags}", flush=True)
    code = subprocess.run([*command, *shlex.split(flags)], env=environment).returncode
    if code:
        raise RunError(f"unet {verb} failed with exit code {code}; see its message above")


def make_launch_command(module: str) -> tuple[list[str], dict[str, str], list[str]]:
    """Build `accelerate launch` on all GPUs, else on two CPU processes.

    Returns:
        Command, environment variables, and the command as printed.
    """
    import torch

    from pipelines.runtime.devices import native_precision

    num_gpus = torch.cuda.device_count()
    ranks = num_gpus or CPU_RANKS
    flags = [
        "launch",
        "--num_machines",
        "1",
        "--dynamo_backend",
        "no",
        "--num_processes",
        str(ranks),
    ]
    flags += ["--mixed_precision", native_precision()]
    if ranks > 1:
        flags.append("--multi_gpu")
    # Without it, each CPU process under --multi_gpu would train on its own.
    extra = {} if num_gpus else {"ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *flags, "-m", module]
    return command, extra, ["accelerate", *flags, "-m", module]


def draw_samples(folder: Path, config: DemoConfig) -> None:
    """Draw missing images and masks, and the unseen images."""
    names = [f"images/{i:03d}.png" for i in range(LABELLED)] + [
        f"unseen/{i:03d}.png" for i in range(UNSEEN)
    ]
    missing = [name for name in names if not (folder / name).exists()]
    for part in ("images", "masks", "unseen"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name in tqdm(missing, desc="draw", unit="image", disable=not sys.stderr.isatty()):
        rng = np.random.default_rng([config.seed, names.index(name)])
        image, mask = draw_cells(rng, config.size)
        if name.startswith("images"):
            write_atomically(folder / "masks" / Path(name).name, encode_png(mask))
        # The image last: if it exists, so does its mask.
        write_atomically(folder / name, encode_png(image))


def draw_cells(rng: np.random.Generator, size: int) -> tuple[Image.Image, Image.Image]:
    """Draw blurred, noisy ellipses on a textured background; the mask is 0 and 255."""
    mask = Image.new("L", (size, size))
    cells = Image.new("L", (size, size))
    for _ in range(rng.integers(6, 16)):
        radius = rng.uniform(size / 28, size / 9)
        width, height = radius * rng.uniform(0.7, 1.3), radius * rng.uniform(0.7, 1.3)
        x, y = rng.uniform(0, size, 2)
        box = (x - width, y - height, x + width, y + height)
        ImageDraw.Draw(mask).ellipse(box, fill=255)
        ImageDraw.Draw(cells).ellipse(box, fill=int(rng.integers(70, 130)))
    background = sum(draw_texture(rng, size, cell) for cell in (8, 32))
    light = np.asarray(cells.filter(ImageFilter.GaussianBlur(1.2)), dtype=np.float64)
    pixels = 70 + 22 * background + light + rng.normal(0, 9, (size, size))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def draw_texture(rng: np.random.Generator, size: int, cell: int) -> NDArray[np.float64]:
    """Draw smooth noise [size, size] with blobs of about `cell` pixels, standard deviation 1."""
    coarse = Image.fromarray(rng.normal(0, 1, (size // cell + 2,) * 2).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_command(DemoConfig, run, argv, "demo")


if __name__ == "__main__":
    sys.exit(main())
