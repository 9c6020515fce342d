"""Scores after equal minutes on real data: `unet train`, plain loops, and other libraries.

    python tests/benchmarks/learning.py --set isbi2012 --folder isbi2012 --work DIR \
        --minutes 8 --seeds 3
    python tests/benchmarks/learning.py --set camvid_small --folder camvid_small --work DIR \
        --minutes 20 --seeds 3 --smp-python PYTHON --nnunet-python PYTHON

Packs the data set into DIR once and trains every contender on its training split, one after the
other, seed by seed, each in a process of its own with all cores. Minutes are those of training:
imports, what is read before the first step, and the trial of `unet plan` do not count; validations
during training do. All are scored on the same split at the size of the images, by counts that are
pooled over its images, with their last weights; only on camvid_small, whose test split is scored,
`unet` takes the checkpoint that is best on val. On a CPU that computes in bf16, `unet` does, as it
does by default; the loops and nnU-Net compute in float32. A rerun continues after the runs that
DIR/results.jsonl holds. Where other work disturbs the machine, --steps gives one arm of `unet
train` the steps that these minutes make on a quiet one; such runs are listed apart.

    unet      `unet train --model.preset small` with the defaults; `unet evaluate`, also with --tta
    encoder   the same with --model.encoder and the folder of --encoder
    random    the same network with --model.encoder-weights none
    plan      `unet plan` for the minutes, `unet train --config plan.yaml`; scored as `unet`
    common, careful, smp    the loops of learning_loops.py; smp requires --smp-python, the Python of
              an environment with segmentation_models_pytorch
    careful-upright    `careful` without quarter turns, as a plan may leave them out
    nnunet    nnU-Net 2-D with its own plan and trainer, cut to the minutes (learning_nnunet.py);
              requires --nnunet-python

Sets: isbi2012 (membrane Dice on slices 0, 5, ..., 25), camvid_small (mean IoU of eleven classes on
test), wbc_dataset1 (mean IoU of three classes on a fifth of the images, chosen by a hash).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.loading.dataset import DataSet
from shards.manifest import MANIFEST, read_manifest
from shards.store import Store

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class TestSet:
    """How a data set is packed, split and scored."""

    pack: tuple[str, ...]
    """Flags of `unet pack`; FOLDER stands for the folder."""
    split: str
    """Split to score."""
    counted: tuple[int, ...]
    """Classes whose mean counts."""
    metric: str
    """dice or iou."""
    crop: int
    """Side of the crops of the plain loops."""
    upright: bool = False


SETS = {
    "isbi2012": TestSet(
        pack=(
            *("--images", "FOLDER/images", "--masks", "FOLDER/masks", "--mask-format", "binary"),
            *("--invert", "--classes", "cell", "membrane", "--split-file", "FOLDER/split.csv"),
        ),
        split="val",
        counted=(1,),
        metric="dice",
        crop=256,
    ),
    "camvid_small": TestSet(
        pack=("--layout", "camvid", "FOLDER"),
        split="test",
        counted=tuple(range(11)),
        metric="iou",
        crop=256,
        upright=True,
    ),
    "wbc_dataset1": TestSet(
        pack=(
            *("--images", "FOLDER/mixed", "--masks", "FOLDER/mixed", "--image-ext", ".bmp"),
            *("--mask-ext", ".png", "--mask-format", "values", "--mask-values", "0", "128", "255"),
            *("--classes", "outside", "cytoplasm", "nucleus", "--val-fraction", "0.2"),
        ),
        split="val",
        counted=(0, 1, 2),
        metric="iou",
        crop=96,
    ),
}
OURS = ("unet", "encoder", "random", "plan")
ARMS = (*OURS, "common", "careful", "careful-upright", "smp", "nnunet")


def run(command: Sequence[object], log: Path) -> str:
    """Run a command; its output goes to a file too."""
    ended = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False
    )
    log.write_text(ended.stdout + ended.stderr)
    if ended.returncode:
        raise SystemExit(f"{log}: exit code {ended.returncode}\n{ended.stderr[-2000:]}")
    return ended.stdout


def unet(verb: str, *flags: object) -> list[object]:
    return [sys.executable, "-m", f"pipelines.{verb}", *flags]


def export_arrays(data: Path, file: Path) -> None:
    """Write all splits as arrays: {split}-image-{i} uint8 [H, W, C], {split}-mask-{i} uint8."""
    manifest = read_manifest(data)
    source, arrays = DataSet(Store(data), manifest, None, workers=0), {}
    for split, info in manifest.splits.items():
        if not info.samples:
            continue
        for i, (sample, mask) in enumerate(source.samples(split, range(info.samples))):
            arrays |= {f"{split}-image-{i}": sample.image, f"{split}-mask-{i}": mask}
    np.savez(file, **arrays)


def mean_score(classes: Sequence[dict[str, float]], test: TestSet) -> float:
    return statistics.mean(classes[c][test.metric] for c in test.counted)


def score_confusion(confusion: Sequence[Sequence[int]]) -> list[dict[str, float]]:
    """Dice and IoU of each class from [true, predicted] counts."""
    counts = np.array(confusion)
    tp = np.diag(counts)
    both = counts.sum(axis=0) + counts.sum(axis=1)
    return [
        {"dice": float(2 * t / max(1, b)), "iou": float(t / max(1, b - t))}
        for t, b in zip(tp, both, strict=True)
    ]


def name_run(arm: str, options: argparse.Namespace, seed: int) -> str:
    """Name the files and folders of a run by all that distinguishes it."""
    length = f"{options.steps}steps" if options.steps else f"{options.minutes:g}min"
    return f"{options.set}-{length}-{arm}-{seed}"


def train_unet(arm: str, options: argparse.Namespace, data: Path, seed: int) -> dict[str, Any]:
    """Train, evaluate without and with --tta; returns both scores."""
    test, place = SETS[options.set], options.work / name_run(arm, options, seed)
    flags = ["--data", data, "--run-dir", place, "--tracking.backend", "none", "--seed", seed]
    if arm == "plan":
        plan = options.work / f"{options.set}-{options.minutes:g}min-plan.yaml"
        if not plan.exists():
            flags_of_plan = ("--data", data, "--minutes", options.minutes, "--out", plan)
            run(unet("plan", *flags_of_plan), plan.with_suffix(".log"))
        flags += ["--config", plan]
    else:
        flags += ["--model.preset", "small"]
        flags += ["--steps", options.steps] if options.steps else ["--minutes", options.minutes]
        flags += ["--model.encoder", options.encoder] if arm in ("encoder", "random") else []
        flags += ["--model.encoder-weights", "none"] if arm == "random" else []
        flags += ["--augment.orientation", "upright"] if test.upright else []
    run(unet("train", *flags), options.work / f"{place.name}.log")
    found: dict[str, Any] = {"steps": json.loads((place / "state.json").read_text())["step"]}
    # The best checkpoint was chosen on val.
    checkpoint = place / "checkpoints" / "last" if test.split == "val" else place
    for name, more in (("scores", ()), ("tta", ("--tta",))):
        out = place / name
        scored = ("--checkpoint", checkpoint, "--data", data, "--split", test.split, "--out", out)
        run(unet("evaluate", *scored, *more), options.work / f"{place.name}.{name}.log")
        stored = json.loads((out / "scores.json").read_text())["classes"]
        found[name] = [{k: c[k] for k in ("dice", "iou")} for c in stored.values()]
    return found


def train_peer(arm: str, options: argparse.Namespace, arrays: Path, seed: int) -> dict[str, Any]:
    """Run one of the other contenders."""
    test, manifest = SETS[options.set], read_manifest(options.work / options.set)
    flags: list[object] = ["--arrays", arrays, "--minutes", options.minutes, "--seed", seed]
    flags += ["--split", test.split, "--classes", len(manifest.classes)]
    log = options.work / f"{name_run(arm, options, seed)}.log"
    if arm == "nnunet":
        work = options.work / name_run(arm, options, seed)
        command = [options.nnunet_python, HERE / "learning_nnunet.py", *flags, "--work", work]
    else:
        python = options.smp_python if arm == "smp" else sys.executable
        recipe, _, variant = arm.partition("-")
        flags += ["--recipe", recipe, "--crop", test.crop]
        flags += ["--upright"] if test.upright or variant == "upright" else []
        command = [python, HERE / "learning_loops.py", *flags]
    found = json.loads(run(command, log).strip().splitlines()[-1])
    return {"steps": found["steps"], "scores": score_confusion(found["confusion"])}


def print_table(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print the mean and the range over seeds of each contender."""
    test = SETS[options.set]
    print(f"\n{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs")
    print(f"\n| contender | seeds | steps | {test.metric}, mean | range |")
    print("| --- | --- | --- | --- | --- |")
    for arm in options.arms:
        mine = [row for row in rows if row["arm"] == arm]
        for kind in ("scores", "tta"):
            values = [mean_score(row[kind], test) for row in mine if kind in row]
            if not values:
                continue
            steps = statistics.mean(row["steps"] for row in mine)
            label = arm if kind == "scores" else f"{arm} --tta"
            spread = f"{min(values):.4f}-{max(values):.4f}"
            mean = statistics.mean(values)
            print(f"| {label} | {len(values)} | {steps:,.0f} | {mean:.4f} | {spread} |")
        if not mine:
            print(f"| {arm} | 0 | | not run | |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=SETS, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="the data set as published")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--steps", type=int, help="of one arm of `unet train`, not of plan")
    parser.add_argument("--encoder", type=Path, help="folder of a pretrained encoder")
    parser.add_argument("--smp-python", type=Path)
    parser.add_argument("--nnunet-python", type=Path)
    options = parser.parse_args()
    if options.steps and (len(options.arms) != 1 or options.arms[0] not in OURS[:3]):
        parser.error("--steps requires --arms with one of unet, encoder, random")
    options.work.mkdir(parents=True, exist_ok=True)
    data, arrays = options.work / options.set, options.work / f"{options.set}.npz"
    if not (data / MANIFEST).exists():
        flags = [flag.replace("FOLDER", str(options.folder)) for flag in SETS[options.set].pack]
        run(unet("pack", *flags, "--out", data), options.work / f"{options.set}-pack.log")
    if not arrays.exists():
        export_arrays(data, arrays)
    file = options.work / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    limits = {"set": options.set, "minutes": options.minutes, "limit": options.steps}
    rows = [row for row in rows if limits.items() <= row.items()]
    done = {(row["arm"], row["seed"]) for row in rows}
    required = {"smp": options.smp_python, "nnunet": options.nnunet_python}
    required |= dict.fromkeys(("encoder", "random"), options.encoder)
    for seed in range(options.seeds):
        for arm in options.arms:
            if (arm, seed) in done or (arm in required and required[arm] is None):
                continue
            if arm in OURS:
                found = train_unet(arm, options, data, seed)
            else:
                found = train_peer(arm, options, arrays, seed)
            rows.append({**limits, "arm": arm, "seed": seed, **found})
            with file.open("a") as out:
                out.write(json.dumps(rows[-1]) + "\n")
            score = mean_score(found["scores"], SETS[options.set])
            print(f"{options.set} {arm} seed {seed}: {score:.4f}, {found['steps']} steps")
            sys.stdout.flush()
    print_table(rows, options)


if __name__ == "__main__":
    main()
