"""`unet train` on a GPU end to end, its tests, and learning."""

import json
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_bench import REPO, TUNED, Bench, NotApplicableError
from gpu_outcomes import VARIABLE as OUTCOMES
from gpu_process import LAUNCH, Process, observe_verb, run, verb
from learning import SETS, export_arrays, score_confusion
from packing import prepare
from PIL import Image

from shards.manifest import MANIFEST

RATE = "train/samples_per_second"
MEASURED = (
    ("train/data_wait", "data wait", "goal < 0.03"),
    ("train/gpu_memory_gib", "GPU memory, GiB", "24-28"),
    ("train/memory_gib", "peak memory, GiB", "24-28"),
    ("train/tflops", "TFLOP/s as logged", ""),
    ("train/mfu", "MFU as logged", ""),
)
"""Metric, name of the figure, expected; metrics that a run does not log are skipped."""


# --------------------------------------------------------------------------------------- end to end


def pack_shards(bench: Bench) -> None:
    """Generate pairs of 512 x 512 and pack them."""
    start = time.perf_counter()
    prepare(bench.work, bench.sizes.pairs)
    bench.report("generated in", time.perf_counter() - start, "s")
    start = time.perf_counter()
    shards_of(bench)
    rate = bench.sizes.pairs / (time.perf_counter() - start)
    bench.report("packed at", rate, "pairs/s, including startup")


def shards_of(bench: Bench, pairs: int | None = None) -> Path:
    """Return the folder of as many packed pairs; packs them once. Default: those to train on."""
    pairs = pairs or bench.sizes.pairs
    folder = bench.work / f"shards-{pairs}"
    if not (folder / MANIFEST).exists():
        data = prepare(bench.work, pairs)
        flags = ("--images", data.images, "--masks", data.binary, "--mask-format", "binary")
        split = ("--val-fraction", bench.sizes.val_fraction, "--out", folder)
        with Process(bench, [*verb("pack"), *flags, *split]) as process:
            process.wait()
    return folder


def fastest(bench: Bench) -> tuple[str, tuple[str, str]]:
    """Return the fastest row of the bare step, and the equivalent flags."""
    ways = {
        "compiled, channels_last": ("--compile", "--channels-last"),
        "eager, channels_last": ("--no-compile", "--channels-last"),
        "eager": ("--no-compile", "--no-channels-last"),
    }
    rates = {way: bench.known.get(("step", way, TUNED), 0.0) for way in ways}
    # The first if nothing was measured.
    best = max(rates, key=lambda way: rates[way])
    return best, ways[best]


def train_flags(
    bench: Bench, run_dir: Path, *more: object, pairs: int | None = None
) -> list[object]:
    """Return the flags of `unet train`; the data are `pairs` pairs, packed if necessary."""
    sizes = bench.sizes
    model = [f"--model.{name.replace('_', '-')}={n}" for name, n in sizes.network.items()]
    return [
        *("--data", shards_of(bench, pairs), "--run-dir", run_dir, *model),
        *("--crop-size", sizes.side),
        *("--global-batch-size", sizes.batch, "--log-every", sizes.log_every),
        *("--model.preset", "modern", "--eval-every", 10**9, *fastest(bench)[1], *more),
    ]


UNTRACKED = ("--tracking.backend", "none")
"""A broken tracker must not cost these figures; one launched run uses the default."""


def read_metrics(run_dir: Path, after: int = 0) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl with a loss, for steps above `after`."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    # The last line may be incomplete.
    text = path.read_text().rpartition("\n")[0]
    found = [json.loads(line) for line in text.splitlines()]
    return [line for line in found if "train/loss" in line and line["step"] > after]


def last_step(run_dir: Path) -> int:
    lines = read_metrics(run_dir)
    return lines[-1]["step"] if lines else 0


def report_speed(bench: Bench, lines: Sequence[dict[str, Any]]) -> float:
    """Report medians over lines of metrics.jsonl and ratios to other rows; returns samples/s."""
    if not lines:
        raise RuntimeError("no line of metrics.jsonl to measure")
    rate = statistics.median(line[RATE] for line in lines)
    bench.report("samples/s", rate, f"({len(lines)} lines)", "276 is 40 % of 798 TFLOP/s")
    way, _ = fastest(bench)
    ratios = (
        ("of the bare step", way, "goal 0.97"),
        ("of the public loop", "public loop", "goal 2"),
        ("of the public loop, channels_last", "public loop, channels_last", "goal 2"),
    )
    for name, row, expected in ratios:
        bench.report_ratio(name, rate, "step", row, TUNED, expected)
    speed, flops = (bench.known.get(("step", way, f)) for f in (TUNED, "rate, cudnn.benchmark"))
    if speed and flops:
        share = ("limits", "card", "matrix rate", "goal 0.40")
        bench.report_ratio("share of the matrix rate", rate * flops / speed, *share)
    for metric, name, expected in MEASURED:
        values = [line[metric] for line in lines if line.get(metric) is not None]
        if values:
            bench.report(name, statistics.median(values), "", expected)
    return rate


def train(bench: Bench) -> None:
    """Time a run at full speed, profile some steps, then interrupt it."""
    run_dir, seen, sizes = bench.work / "run", bench.work / "train-seen.json", bench.sizes
    bench.report("settings", " ".join(fastest(bench)[1]))
    flags = train_flags(bench, run_dir, "--steps", 10**6, *UNTRACKED)
    with Process(bench, [*observe_verb("train", seen), *flags]) as process:
        first = process.wait_until(lambda: last_step(run_dir), "the first line of metrics")
        bench.report("first line of metrics after", first, "s")
        # Compilation happens in the first steps.
        first_step = last_step(run_dir) + sizes.settle
        end = first_step + sizes.window
        process.wait_until(lambda: last_step(run_dir) >= end, f"step {end}")
        report_speed(bench, read_metrics(run_dir, after=first_step))
        first_step = last_step(run_dir)
        process.signal(signal.SIGUSR2)
        last = first_step + sizes.watched
        process.wait_until(lambda: last_step(run_dir) >= last, f"step {last}")
        steps = last_step(run_dir) - first_step
        process.signal(signal.SIGUSR2)
        process.wait_until(seen.exists, "the profile was written")
        report_profile(bench, seen, steps)
        signalled = process.seconds
        process.signal(signal.SIGTERM)
        bench.report("SIGTERM to exit 75", process.wait(expected=75) - signalled, "s")


def report_profile(bench: Bench, file: Path, steps: int = 0) -> None:
    """Report the profile of gpu_observe.py; `steps`: number of profiled steps."""
    seen = json.loads(file.read_text())
    bench.report("profiled for", seen["seconds"], "s")
    for name in ("main", "threads"):
        listed = "; ".join(f"{share:.1%} {place}" for place, share in seen[name])
        bench.report(f"{name}, top 15", listed or "idle")
    total = sum(seen["syncs"].values())
    lines = ", ".join(f"{place} {count}" for place, count in seen["syncs"].items())
    if steps:
        unit = f"per step ({lines or 'none'})"
        bench.report("synchronisations", total / steps, unit, "0, except for logging")
    else:
        bench.report("synchronisations", total, f"in total ({lines or 'none'})")


def resume(bench: Bench) -> None:
    """Resume the interrupted run by the same command; compare its speed with that before."""
    run_dir, sizes = bench.work / "run", bench.sizes
    last = run_dir / "checkpoints" / "last" / "state.json"
    if not last.exists():
        raise RuntimeError("no run to resume: the previous row left no checkpoint")
    first_step = json.loads(last.read_text())["step"]
    end = first_step + sizes.settle + sizes.window
    flags = train_flags(bench, run_dir, "--steps", end, *UNTRACKED)
    with Process(bench, [*verb("train"), *flags]) as process:
        spent = process.wait()
    bench.report("resumed at step", first_step)
    rate = report_speed(bench, read_metrics(run_dir, after=first_step + sizes.settle))
    bench.report_ratio("of the speed before", rate, "train", "unet train", "samples/s", "1.0")
    bench.report("entire command", spent, "s, including startup, validation and checkpoint")


def launched(bench: Bench) -> None:
    """Time a run under `accelerate launch`: NCCL with one rank, the default tracker offline."""
    run_dir, sizes = bench.work / "run-launched", bench.sizes
    flags = train_flags(bench, run_dir, "--steps", sizes.settle + sizes.window)
    with Process(bench, launch(bench, 1, flags), NCCL_DEBUG="VERSION") as process:
        process.wait()
        nccl = [line.strip() for line in process.output.splitlines() if "NCCL version" in line]
    if not nccl and not bench.rehearse:
        raise RuntimeError("NCCL did not print its version: was it used?")
    bench.report("backend", nccl[0][:60] if nccl else "gloo")
    rate = report_speed(bench, read_metrics(run_dir, after=sizes.settle))
    bench.report_ratio("of one process", rate, "train", "unet train", "samples/s", "> 0.99")


def launch(bench: Bench, ranks: int, flags: Sequence[object]) -> list[object]:
    """Return an `accelerate launch` command for training with the shipped configuration."""
    settings = ("--mixed_precision", "no") if bench.rehearse else ()
    return [
        *(*LAUNCH, "--config_file", REPO / "accelerate_config.yaml", "--num_processes", ranks),
        *(*settings, "--main_process_port", 0, "-m", "pipelines.train", *flags),
    ]


# ------------------------------------------------------------------------------- tests and messages


def pytest_gpu(bench: Bench, *, files: Sequence[str]) -> None:
    """Run the tests marked gpu of some files; their figures are reported as they come.

    Raises RuntimeError if one fails or none ran.
    """
    outcomes = bench.work / "outcomes.jsonl"
    outcomes.write_text("")
    # -v: the log says which test was running when the time limit was reached.
    flags = ("-v", "-m", "gpu", "-p", "no:cacheprovider", "-p", "gpu_outcomes", "-n", 0)
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {OUTCOMES: str(outcomes), "PYTHONPATH": paths}
    count: Counter[str] = Counter()
    command = [sys.executable, "-m", "pytest", *flags, *files]
    with Process(bench, command, **environment) as process, outcomes.open() as lines:
        while True:
            ended = process.process.poll() is not None
            for line in lines:
                found = json.loads(line)
                name = found["test"].rpartition("::")[2]
                count[found["outcome"]] += 1
                for key, value in found["properties"].items():
                    bench.report(f"{name}: {key}", value)
                if found["outcome"] == "failed":
                    bench.report(found["test"], "failed", "", "passed")
            if ended:
                break
            time.sleep(0.05)
        code = process.process.returncode
    for outcome in ("passed", "failed", "skipped"):
        bench.report(outcome, count[outcome])
    if code:
        raise RuntimeError(f"pytest exited with {code}; {count['failed']} tests failed")
    if not count["skipped" if bench.rehearse else "passed"]:
        raise RuntimeError("no test was found")


def out_of_memory(bench: Bench) -> None:
    """Check the message of `unet train` for a batch that does not fit into GPU memory."""
    batch, few = bench.sizes.oom_batch, bench.sizes.few_pairs
    more = ("--global-batch-size", batch, "--steps", 1, "--workers", 2, *UNTRACKED)
    run_dir = bench.work / "run-too-large"
    flags = train_flags(bench, run_dir, "--no-compile", *more, pairs=few)
    code, output = run(bench, [*verb("train"), *flags])
    report_message(bench, code, output, about="memory")
    if "Traceback" in output:
        raise RuntimeError("a user would see a traceback")


def too_many_ranks(bench: Bench) -> None:
    """Check the message of more ranks than GPUs; in a rehearsal, on a CPU, two ranks train."""
    gpus = 1 if bench.rehearse else torch.cuda.device_count()
    more = ("--no-compile", "--steps", 1, *UNTRACKED)
    flags = train_flags(bench, bench.work / "run-ranks", *more, pairs=bench.sizes.few_pairs)
    # The launcher always adds its own traceback.
    report_message(bench, *run(bench, launch(bench, gpus + 1, flags)), about=f"{gpus} GPU")


def report_message(bench: Bench, code: int, output: str, *, about: str) -> None:
    """Report exit code and message. Raises RuntimeError if they are not as expected."""
    lines = [line for line in output.splitlines() if line.startswith("unet ")]
    bench.report("exit code", code, "", "not 0")
    bench.report("message", " / ".join(lines) or "none", "", "one line, with the remedy")
    if bench.rehearse and code:
        raise RuntimeError("unexpected failure on a CPU")
    if not bench.rehearse and (code == 0 or not any(about in line for line in lines)):
        raise RuntimeError(f"expected an exit code > 0 and a line about {about}")


# ----------------------------------------------------------------------------------------- learning


def isbi(bench: Bench) -> Path:
    """Return the folder with images, masks and split.csv; in a rehearsal, a generated one."""
    if bench.isbi is not None:
        return bench.isbi
    if not bench.rehearse:
        raise NotApplicableError("requires --isbi FOLDER")
    folder = bench.work / "isbi"
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    lines, rng = ["path,split"], np.random.default_rng(0)
    for number in range(4):
        pixels = rng.integers(0, 256, (512, 512), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        mask = np.where(pixels > 60, 255, 0).astype(np.uint8)
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")
        lines.append(f"{number}.png,{'train' if number else 'val'}")
    (folder / "split.csv").write_text("\n".join(lines) + "\n")
    return folder


def isbi_shards(bench: Bench) -> Path:
    """Return the folder of the packed data set; packs it once."""
    folder, data = isbi(bench), bench.work / "isbi-shards"
    if not (data / MANIFEST).exists():
        flags = [flag.replace("FOLDER", str(folder)) for flag in SETS["isbi2012"].pack]
        with Process(bench, [*verb("pack"), *flags, "--out", data]) as process:
            process.wait()
    return data


def learn(bench: Bench) -> None:
    """Report the membrane Dice after training with default settings for `learn_seconds`."""
    data, run_dir = isbi_shards(bench), bench.work / "isbi-run"
    tiny = [f"--model.{name.replace('_', '-')}={n}" for name, n in bench.sizes.network.items()]
    tiny += ["--crop-size", "32"] if bench.rehearse else []
    limits = ("--minutes", bench.sizes.learn_seconds / 60, "--model.preset", "modern", *tiny)
    flags = ("--data", data, "--run-dir", run_dir, *limits, *UNTRACKED)
    with Process(bench, [*verb("train"), *flags]) as process:
        process.wait()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    scored = [line for line in lines if "val/dice/membrane" in line]
    bench.report("steps", scored[-1]["step"])
    bench.report("membrane Dice", scored[-1]["val/dice/membrane"], "", "above the public loop")


def learn_public(bench: Bench) -> None:
    """Report the membrane Dice of the settings of public single-file repositories, same time."""
    arrays = bench.work / "isbi.npz"
    export_arrays(isbi_shards(bench), arrays)
    script = Path(__file__).with_name("learning_loops.py")
    flags = (
        *("--arrays", arrays, "--recipe", "common", "--width", bench.sizes.width),
        *("--minutes", bench.sizes.learn_seconds / 60, "--device", bench.device.type),
    )
    with Process(bench, [sys.executable, script, *flags]) as process:
        process.wait()
        found = json.loads(process.output.strip().splitlines()[-1])
    bench.report("steps", found["steps"])
    bench.report("membrane Dice", score_confusion(found["confusion"])[1]["dice"])
