"""`unet demo`: draws sample pictures, then packs, trains, evaluates, predicts, as a user would.

Each step is the command that a user would type, and is shown before it runs.
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

from pipelines.config import RunError, run_command
from shards.images import encode_png
from shards.index import MANIFEST
from shards.writer import write_atomically

CPU_RANKS = 2
LABELLED, UNSEEN = 60, 12


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """The whole road on sample pictures: cells on a textured ground.

    Draws 60 pictures with masks and 12 without, packs them, trains a small U-Net on all GPUs (on
    two processes where there is none), evaluates it, predicts the pictures without masks and makes
    the report.
    """

    out: Path = Path("demo")
    """Folder for everything that is made."""
    size: int = 256
    """Side of the sample pictures in pixels."""
    steps: int = 200
    """Optimizer steps of the training."""
    seed: int = 0
    """Seed of the pictures and the training."""

    def __post_init__(self) -> None:
        if self.size < 64 or self.steps < 1:
            raise ValueError("--size must be at least 64 and --steps at least 1")


def run(config: DemoConfig) -> int:
    """Draw, pack, train, evaluate, predict, report; then say where to look."""
    out = config.out
    pictures, shards, run_dir, masks = out / "pictures", out / "shards", out / "run", out / "masks"
    draw_all(pictures, config)
    if not (shards / MANIFEST).exists():
        folders = words("--images", pictures / "images", "--masks", pictures / "masks")
        rule = "--mask-format binary --classes background cell --val-fraction 0.2"
        step("pack", f"{folders} {rule} {words('--out', shards)}")
    where = words("--data", shards, "--run-dir", run_dir)
    size = "--model.preset small --model.base-channels 12 --crop-size 128 --global-batch-size 4"
    length = f"--steps {config.steps} --eval-every 100 --seed {config.seed}"
    step("train", f"{where} {size} {length}", launch=True)
    step("evaluate", words("--checkpoint", run_dir, "--data", shards, "--split", "val"))
    what = words("--checkpoint", run_dir, "--input", pictures / "unseen", "--out", masks)
    step("predict", f"{what} --png --overlay")
    step("report", words("--run-dir", run_dir))
    scores = json.loads((run_dir / "scores.json").read_text())
    print(
        f"\nDice of the cells on {scores['num_images']} held-back pictures: "
        f"{scores['classes']['cell']['dice']:.4f}"
    )
    print(f"report:    {run_dir / 'report.html'}")
    print(f"scores:    {run_dir / 'scores.json'}")
    print(f"overlays:  {masks / 'overlay'}")
    print(f"shards:    {masks}")
    return 0


def words(*parts: object) -> str:
    """Parts of a command line, quoted where the shell needs it."""
    return shlex.join(str(part) for part in parts)


def step(verb: str, flags: str, *, launch: bool = False) -> None:
    """Show a command and run it. Raises RunError if it fails."""
    module = f"pipelines.{verb}"
    environment = dict(os.environ)
    if launch:
        command, extra, shown = launch_command(module)
        environment.update(extra)
        print(
            "\n$", *(f"{name}={value}" for name, value in extra.items()), *shown, flags, flush=True
        )
    else:
        command = [sys.executable, "-m", module]
        print(f"\n$ unet {verb} {flags}", flush=True)
    code = subprocess.run([*command, *shlex.split(flags)], env=environment).returncode
    if code:
        raise RunError(f"unet {verb} ended with exit code {code}; its own message stands above")


def launch_command(module: str) -> tuple[list[str], dict[str, str], list[str]]:
    """Accelerate on all GPUs, else on two CPU processes: command, environment, as shown."""
    import torch

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
    flags += ["--mixed_precision", "bf16" if num_gpus and torch.cuda.is_bf16_supported() else "no"]
    if ranks > 1:
        flags.append("--multi_gpu")
    # Without this, CPU processes under --multi_gpu would each train alone.
    extra = {} if num_gpus else {"ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *flags, "-m", module]
    return command, extra, ["accelerate", *flags, "-m", module]


def draw_all(folder: Path, config: DemoConfig) -> None:
    """Draw what is missing: images and masks, and unseen pictures."""
    names = [f"images/{i:03d}.png" for i in range(LABELLED)] + [
        f"unseen/{i:03d}.png" for i in range(UNSEEN)
    ]
    missing = [name for name in names if not (folder / name).exists()]
    for part in ("images", "masks", "unseen"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name in tqdm(missing, desc="draw", unit="picture", disable=not sys.stderr.isatty()):
        rng = np.random.default_rng([config.seed, names.index(name)])
        picture, mask = draw_cells(rng, config.size)
        if name.startswith("images"):
            write_atomically(folder / "masks" / Path(name).name, encode_png(mask))
        # Last, since the picture says that both are there.
        write_atomically(folder / name, encode_png(picture))


def draw_cells(rng: np.random.Generator, size: int) -> tuple[Image.Image, Image.Image]:
    """Ellipses of varied brightness on a textured ground, blurred, noisy; the mask is 0 and 255."""
    mask = Image.new("L", (size, size))
    cells = Image.new("L", (size, size))
    for _ in range(rng.integers(6, 16)):
        radius = rng.uniform(size / 28, size / 9)
        width, height = radius * rng.uniform(0.7, 1.3), radius * rng.uniform(0.7, 1.3)
        x, y = rng.uniform(0, size, 2)
        box = (x - width, y - height, x + width, y + height)
        ImageDraw.Draw(mask).ellipse(box, fill=255)
        ImageDraw.Draw(cells).ellipse(box, fill=int(rng.integers(70, 130)))
    ground = sum(texture(rng, size, cell) for cell in (8, 32))
    light = np.asarray(cells.filter(ImageFilter.GaussianBlur(1.2)), dtype=np.float64)
    pixels = 70 + 22 * ground + light + rng.normal(0, 9, (size, size))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask


def texture(rng: np.random.Generator, size: int, cell: int) -> NDArray[np.float64]:
    """Smooth noise [size, size] with bumps of about `cell` pixels, deviation about 1."""
    coarse = Image.fromarray(rng.normal(0, 1, (size // cell + 2,) * 2).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run_command(DemoConfig, run, argv, "demo")


if __name__ == "__main__":
    sys.exit(main())
