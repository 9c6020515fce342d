"""Composes `RUN/report.html` from a run folder, its best checkpoint and its data."""

import logging
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

from accelerate import Accelerator

from pipelines.drawing.panels import IGNORED, WRONG
from pipelines.reporting.calibration_plots import describe_plots, make_plots
from pipelines.reporting.charts import Chart, Series
from pipelines.reporting.checkpoint_results import CheckpointResults, load_results
from pipelines.reporting.page import MAX_CLASSES, Report, Swatch, render
from pipelines.reporting.run_record import RunRecord, number, read_record
from pipelines.reporting.score_tables import describe_objects, make_parts_table, make_table
from pipelines.runtime.outputs import write_result
from pipelines.runtime.run_folder import RunFolder
from unet import EncoderConfig, UNet

EXCLUDED = {
    "train/skipped": "samples that could not be decoded and were replaced",
    "train/overflows": "steps whose gradients overflowed",
}
logger = logging.getLogger(__name__)


def write_report_safely(run_dir: Path, accelerator: Accelerator) -> str:
    """Write the report at the end of a run and return a line with its path, or with the error.

    Runs on the main process without collectives, since other ranks may have exited. Never raises:
    a failed report must not fail the run. Call it after RUN/state.json is written.
    """
    try:
        return f"report: {write_report(run_dir, accelerator)}"
    except Exception as error:  # whatever it is: training has succeeded
        logger.debug("no report", exc_info=True)
        command = shlex.join(["unet", "report", "--run-dir", str(run_dir)])
        return f"no report ({' '.join(str(error).split())[:200]}); to retry: {command}"


def write_report(
    run_dir: Path,
    accelerator: Accelerator,
    *,
    out: Path | None = None,
    data: str | None = None,
    images: bool = True,
) -> str:
    """Write the page atomically; equal inputs on the same device give equal bytes.

    Args:
        run_dir: run folder.
        accelerator: provides the device.
        out: file to write; default: report.html in the run folder.
        data: location of the training data, if it has moved.
        images: whether to read the data and show images.

    Returns:
        The file, and whether it was unchanged or replaced, for a message.

    Raises:
        DataError: `run_dir` is not a run folder.
    """
    record = read_record(run_dir)
    results = load_results(record, accelerator, data, images=images)
    page = render(compose(record, results))
    path = out or RunFolder(run_dir).report
    # File names may not be valid text.
    done = write_result(path, page.encode("utf-8", "backslashreplace"))
    return f"{path}{done}"


def compose(record: RunRecord, results: CheckpointResults) -> Report:
    """Compose the contents of the page."""
    confusion = results.scores["confusion"] if results.scores else ()
    notes = [*record.notes, *results.notes]
    if len(confusion) > MAX_CLASSES:
        notes.append(f"A confusion matrix of {len(confusion)} classes is not drawn.")
        confusion = ()
    spec = results.loaded.spec if results.loaded else None
    swatches = zip(spec.classes, spec.palette, strict=True) if spec else ()
    return Report(
        title=record.name,
        subtitle=subtitle(record, results),
        verdict=verdict(record),
        notes=tuple(notes),
        charts=tuple(charts(record)),
        table=make_table(record, results),
        parts=make_parts_table(results.scores),
        objects=tuple(describe_objects(results.scores)),
        plots=make_plots(results.scores),
        plots_note=describe_plots(results.scores),
        classes=spec.classes if spec else (),
        confusion=tuple(tuple(row) for row in confusion),
        galleries=results.galleries,
        gallery_note=(
            f"Chosen from {results.among} by Dice. Left to right, then down: image, mask, "
            "prediction, difference."
        ),
        legends=(
            tuple(Swatch(name, colour) for name, colour in swatches),
            (Swatch("wrong", WRONG), Swatch("ignored in all scores", IGNORED)),
        ),
        facts=tuple(facts(record, results)),
        versions=tuple(versions(record)),
        config=tuple(blocks(record.config_text)),
        commands=tuple(commands(record)),
    )


def subtitle(record: RunRecord, results: CheckpointResults) -> str:
    """Describe network and data in one line."""
    parts = []
    if preset := record.setting("model", "preset"):
        encoder = record.setting("model", "encoder")
        parts.append(f"U-Net, preset {preset}" + (f", encoder {encoder}" if encoder else ""))
    if (data := record.setting("data")) is not None:
        parts.append(f"data {data}")
    if results.manifest is not None:
        counts = {name: split.samples for name, split in results.manifest.splits.items()}
        parts.append(", ".join(f"{count:,} {name}" for name, count in counts.items()) + " images")
    return " · ".join(parts)


def verdict(record: RunRecord) -> str:
    """Describe the best scores and how the run ended, in two sentences."""
    best, loss = record.metrics.best, record.metrics.curves.get("train/loss")
    if best:
        iou = f" and IoU {best['val/iou']:.4f}" if "val/iou" in best else ""
        rule = record.setting("best_by")
        by = "" if rule in (None, "dice") else f" by {rule}"
        dice = f"Dice {best['val/dice']:.4f}{iou} in validation"
        good = f"{dice}, best{by} at step {best['step']:,.0f}."
    elif loss is not None:
        good = f"Not validated yet; the loss is {loss.values[-1]:.4f}."
    else:
        good = "No step is recorded yet."
    return f"{good} {ended(record)}"


def ended(record: RunRecord) -> str:
    """Describe how the run ended."""
    state, last = record.state, record.metrics.last_step or 0
    step = number(state.get("step"))
    if step is None or step < last:
        return f"Still running, or killed after step {last:,}."
    if state.get("finished") is True:
        return f"Finished at step {step:,.0f}{after(record)}."
    return f"Interrupted at step {step:,.0f}{after(record)}; it can be resumed."


def after(record: RunRecord) -> str:
    """Describe how long the run took."""
    seconds = number(record.state.get("seconds"))
    return "" if seconds is None else f" after {duration(seconds)}"


def duration(seconds: float) -> str:
    """Format a duration by its two largest units."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = ((days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s"))
    first = next((n for n, (count, _) in enumerate(units) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in units[first : first + 2] if count) or "0 s"


def charts(record: RunRecord) -> Iterator[Chart]:
    """Yield charts of loss, scores, learning rate and speed, as far as they were recorded."""
    curves = record.metrics.curves
    losses = [name for name in curves if name.startswith("train/loss_")]
    checks = [name for name in curves if name.startswith("val/loss")]
    best = record.metrics.best
    mark = (best["step"], best["val/dice"]) if best else None
    last = record.metrics.last_step or 0
    # An axis from 0 would hide the differences between good scores.
    for title, names, from_zero, point in (
        ("Loss", ["train/loss", *losses, *checks], True, None),
        ("Validation", ["val/dice", "val/iou"], False, mark),
        ("Learning rate", ["train/lr"], True, None),
        ("Samples per second", ["train/samples_per_second"], True, None),
    ):
        series = tuple(named(record, name) for name in names if name in curves)
        if series:
            yield Chart(title, series, last, point, from_zero)


def named(record: RunRecord, name: str) -> Series:
    """Return a curve under its name on the page."""
    curve = record.metrics.curves[name]
    words = {"train/loss": "loss", "val/dice": "Dice", "val/iou": "IoU"}
    shown = words.get(name, name.removeprefix("train/loss_").replace("_", " "))
    return Series(shown, curve.steps, curve.values)


def facts(record: RunRecord, results: CheckpointResults) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of the facts that are known."""
    yield "Ended", ended(record)
    seconds = number(record.last.get("seconds"))
    if seconds is not None:
        yield "Time", f"{duration(seconds)}, validation included"
    position = number(record.last.get("position"))
    if position is not None:
        epochs = ""
        if results.manifest is not None and results.manifest.splits["train"].samples:
            samples = results.manifest.splits["train"].samples
            epochs = f", {position / samples:.1f} epochs of {samples:,}"
        yield "Samples", f"{position:,.0f}{epochs}"
    if (size := record.setting("global_batch_size")) is not None:
        crop = record.setting("crop_size")
        yield "Batch", f"{size} crops of {crop} x {crop} pixels per step"
    if speed := record.metrics.curves.get("train/samples_per_second"):
        wait = record.metrics.curves.get("train/data_wait")
        waited = f"; waited for data {mean(wait.values):.1%} of the time" if wait else ""
        yield "Speed", f"{median(speed.values):,.1f} samples/s{waited}"
    if tflops := record.metrics.curves.get("train/tflops"):
        mfu = record.metrics.curves.get("train/mfu")
        share = f", {median(mfu.values):.1%} of peak (MFU)" if mfu else ""
        yield "Compute", f"{median(tflops.values):.3g} TFLOP/s per device{share}"
    if memory := record.metrics.curves.get("train/memory_gib"):
        where = " on the GPU" if "train/gpu_memory_gib" in record.metrics.curves else ""
        yield "Memory", f"peak {max(memory.values):.1f} GiB{where}"
    for name, what in EXCLUDED.items():
        if count := record.metrics.latest.get(name):
            yield "Excluded", f"{count:,.0f} {what}"
    if results.loaded is not None:
        parameters = sum(p.numel() for p in results.loaded.model.parameters())
        yield "Network", f"{parameters:,} parameters"
        if (encoder := results.loaded.model.config.encoder) is not None:
            yield "Encoder", describe_encoder(encoder, results.loaded.members[0])
        yield "Weights", f"sha256 {results.loaded.digest}"
    yield "Devices", devices(record.environment)


def describe_encoder(encoder: EncoderConfig, model: UNet) -> str:
    """Describe where an encoder came from, its licence and its size."""
    assert model.encoder is not None
    parameters = sum(p.numel() for p in model.encoder.parameters())
    parts = [
        f"{encoder.source} ({encoder.architecture}), {parameters:,} parameters",
        f"weights {encoder.weights}",
        *([f"first convolution {encoder.input}"] if encoder.input else []),
    ]
    parts += [f"revision {encoder.revision}"] if encoder.revision else []
    parts += [f"sha256 {encoder.sha256}"] if encoder.sha256 else []
    parts += [f"licence {encoder.licence}"] if encoder.licence else []
    return ", ".join(parts)


def devices(environment: dict[str, Any]) -> str:
    """Describe the devices."""
    gpus = environment.get("gpus")
    names = Counter(map(str, gpus)) if isinstance(gpus, list) else Counter()
    parts = [f"{count} x {name}" for name, count in names.items()]
    parts += [str(environment[key]) for key in ("cpu",) if key in environment]
    if "cpus" in environment:
        parts.append(f"{environment['cpus']} CPUs")
    if memory := number(environment.get("memory_bytes")):
        parts.append(f"{memory / 2**30:.0f} GiB")
    if "ranks" in environment:
        ranks, precision = environment["ranks"], environment.get("precision", "no")
        parts.append(f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {environment.get('device')}")
        parts.append("float32" if precision == "no" else f"{precision} mixed precision")
    return ", ".join(parts)


def blocks(text: str) -> Iterator[str]:
    """Split config.yaml before each group of settings."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and re.fullmatch(r"\w+:", line):
            yield "\n".join(lines)
            lines = []
        lines.append(line)
    if lines:
        yield "\n".join(lines)


def versions(record: RunRecord) -> Iterator[tuple[str, str]]:
    """Yield packages and their versions."""
    known = record.environment.get("versions")
    if isinstance(known, dict):
        yield from ((str(name), str(value)) for name, value in known.items())
    if "platform" in record.environment:
        yield "platform", str(record.environment["platform"])


def commands(record: RunRecord) -> Iterator[tuple[str, str]]:
    """Yield (purpose, command) of what to do next."""
    run_dir, data = str(record.run_dir), str(record.setting("data") or "SHARDS")
    checkpoint = ("--checkpoint", run_dir)
    # --run-dir again, since the folder may have moved.
    same = ("--config", str(RunFolder(record.run_dir).config), "--run-dir", run_dir)
    if record.state.get("finished") is True:
        yield "Train longer", command("train", *same, "--minutes", "MORE")
    else:
        yield "Resume this run", command("train", *same)
    if record.setting("val") is not False:
        yield (
            "Score every image",
            command("evaluate", *checkpoint, "--data", data, "--split", "val"),
        )
    masks = ("--input", "IMAGES", "--out", "MASKS", "--png", "--overlay")
    yield "Predict", command("predict", *checkpoint, *masks)
    yield "Export", command("export", *checkpoint, "--format", "onnx", "--out", "model.onnx")


def command(verb: str, *words: str) -> str:
    """Format a command line, quoted for the shell where needed."""
    return shlex.join(["unet", verb, *words])
