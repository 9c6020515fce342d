"""`RUN/report.html`: what the folder of a run, its best checkpoint and its data tell."""

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
from pipelines.reporting.charts import Chart, Series
from pipelines.reporting.checkpoint_results import CheckpointResults, load_results
from pipelines.reporting.page import MOST_CLASSES, Report, Row, Swatch, Table, render
from pipelines.reporting.run_record import RunRecord, number, read_record
from pipelines.runtime.run_folder import RunFolder
from shards.sample import Palette
from shards.writer import write_atomically

LEFT_OUT = {
    "train/skipped": "samples that could not be decoded, replaced by others",
    "train/overflows": "steps whose gradients overflowed",
}
logger = logging.getLogger(__name__)


def close_run(run_dir: Path, accelerator: Accelerator) -> str:
    """Make the report at the end of a run, on its main process alone; a line that says where it is.

    The other ranks may have ended: nobody is waited for. RUN/state.json should be there. A report
    that fails is told in the line and ends nothing.
    """
    try:
        return f"report: {write_report(run_dir, accelerator)}"
    except Exception as error:  # whatever it is: the run itself is done
        logger.debug("no report", exc_info=True)
        again = shlex.join(["unet", "report", "--run-dir", str(run_dir)])
        return f"no report ({' '.join(str(error).split())[:200]}); again: {again}"


def write_report(
    run_dir: Path,
    accelerator: Accelerator,
    *,
    out: Path | None = None,
    data: str | None = None,
    pictures: bool = True,
) -> Path:
    """Write the page, whole or not at all: the same bytes for the same folder, program and device.

    `out`: the file, RUN/report.html by default; the others: see `findings.load_results`. Raises
    DataError where `run_dir` is no run folder.
    """
    record = read_record(run_dir)
    found = load_results(record, accelerator, data, images=pictures)
    page = render(compose(record, found))
    path = out or RunFolder(run_dir).report
    path.parent.mkdir(parents=True, exist_ok=True)
    # Names of files may be no text.
    write_atomically(path, page.encode("utf-8", "backslashreplace"))
    return path


def compose(record: RunRecord, found: CheckpointResults) -> Report:
    """What the page says."""
    confusion = found.scores["confusion"] if found.scores else ()
    notes = [*record.notes, *found.notes]
    if len(confusion) > MOST_CLASSES:
        notes.append(f"A confusion matrix of {len(confusion)} classes is not drawn.")
        confusion = ()
    spec = found.loaded.spec if found.loaded else None
    swatches = zip(spec.classes, spec.palette, strict=True) if spec else ()
    return Report(
        title=record.name,
        subtitle=subtitle(record, found),
        verdict=verdict(record),
        notes=tuple(notes),
        charts=tuple(charts(record)),
        table=table(record, found),
        classes=spec.classes if spec else (),
        confusion=tuple(tuple(row) for row in confusion),
        galleries=found.galleries,
        gallery_note=(
            f"From {found.among}, by the Dice of each. Left to right, then down: image, truth, "
            "prediction, difference."
        ),
        legends=(
            tuple(Swatch(name, colour) for name, colour in swatches),
            (Swatch("wrong", WRONG), Swatch("ignored, counts nowhere", IGNORED)),
        ),
        facts=tuple(facts(record, found)),
        versions=tuple(versions(record)),
        config=tuple(blocks(record.config_text)),
        commands=tuple(commands(record)),
    )


def subtitle(record: RunRecord, found: CheckpointResults) -> str:
    """Network and data in a line."""
    parts = []
    if preset := record.setting("model", "preset"):
        parts.append(f"U-Net, preset {preset}")
    if (data := record.setting("data")) is not None:
        parts.append(f"data {data}")
    if found.manifest is not None:
        counts = {name: split.samples for name, split in found.manifest.splits.items()}
        parts.append(", ".join(f"{count:,} {name}" for name, count in counts.items()) + " images")
    return " · ".join(parts)


def verdict(record: RunRecord) -> str:
    """How good it is and how it ended, in two sentences."""
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
    """How the run ended, if it did."""
    state, last = record.state, record.metrics.last_step or 0
    step = number(state.get("step"))
    if step is None or step < last:
        return f"It has not ended: it goes on, or was killed after step {last:,}."
    if state.get("finished") is True:
        return f"Finished at step {step:,.0f}{after(record)}."
    return f"Interrupted at step {step:,.0f}{after(record)}; it can go on."


def after(record: RunRecord) -> str:
    """How long it took."""
    seconds = number(record.state.get("seconds"))
    return "" if seconds is None else f" after {duration(seconds)}"


def duration(seconds: float) -> str:
    """The two largest units."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = ((days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s"))
    first = next((n for n, (count, _) in enumerate(units) if count), 3)
    return " ".join(f"{count} {unit}" for count, unit in units[first : first + 2] if count) or "0 s"


def charts(record: RunRecord) -> Iterator[Chart]:
    """Loss, scores, learning rate and speed over the steps, those that were recorded."""
    curves = record.metrics.curves
    losses = [name for name in curves if name.startswith("train/loss_")]
    checks = [name for name in curves if name.startswith("val/loss")]
    best = record.metrics.best
    mark = (best["step"], best["val/dice"]) if best else None
    last = record.metrics.last_step or 0
    # From 0, scores that matter in the end could not be told apart.
    for title, names, from_zero, point in (
        ("Loss", ["train/loss", *losses, *checks], True, None),
        ("Validation", ["val/dice", "val/iou"], False, mark),
        ("Learning rate", ["train/lr"], True, None),
        ("Samples a second", ["train/samples_per_second"], True, None),
    ):
        series = tuple(named(record, name) for name in names if name in curves)
        if series:
            yield Chart(title, series, last, point, from_zero)


def named(record: RunRecord, name: str) -> Series:
    """A curve as the page names it."""
    curve = record.metrics.curves[name]
    words = {"train/loss": "loss", "val/dice": "Dice", "val/iou": "IoU"}
    shown = words.get(name, name.removeprefix("train/loss_").replace("_", " "))
    return Series(shown, curve.steps, curve.values)


def table(record: RunRecord, found: CheckpointResults) -> Table | None:
    """The scores of each class: of the best checkpoint, else as they were validated."""
    best = record.metrics.best
    if found.scores is not None and found.loaded is not None:
        return scored_table(record, found.of, found.scores, found.loaded.spec.palette)
    names = [name.removeprefix("val/dice/") for name in best if name.startswith("val/dice/")]
    if not names:
        return None
    rows = [Row(n, cells(best, f"val/dice/{n}", f"val/iou/{n}"), history(record, n)) for n in names]
    rows.append(Row("macro", cells(best, "val/dice", "val/iou"), is_mean=True))
    caption = f"As validated at step {best['step']:,.0f}."
    return Table(caption, ("Dice", "IoU"), tuple(rows))


def scored_table(record: RunRecord, of: str, scores: dict[str, Any], palette: Palette) -> Table:
    """Dice, IoU, precision, recall and share of the pixels."""
    pixels = [sum(line) for line in scores["confusion"]]
    rows = []
    for place, (name, values) in enumerate(scores["classes"].items()):
        share = f"{pixels[place] / max(1, sum(pixels)):.1%}"
        shown = (*cells(values, "dice", "iou", "precision", "recall"), share)
        note = "" if name in scores["counted"] else "in no mean"
        rows.append(Row(name, shown, history(record, name), palette[place], note))
    for name in ("macro", "micro", "per_image"):
        shown = cells(scores[name], "dice", "iou")
        rows.append(Row(name.replace("_", " "), shown, is_mean=True))
    caption = f"The best checkpoint on {of}."
    return Table(caption, ("Dice", "IoU", "Precision", "Recall", "Pixels"), tuple(rows))


def history(record: RunRecord, name: str) -> Series | None:
    """The Dice of a class over the steps."""
    curve = record.metrics.curves.get(f"val/dice/{name}")
    return Series(f"Dice of {name}", curve.steps, curve.values) if curve else None


def cells(values: dict[str, Any], *names: str) -> tuple[str, ...]:
    """Scores as text."""
    scores = (number(values.get(name)) for name in names)
    return tuple("n/a" if score is None else f"{score:.4f}" for score in scores)


def facts(record: RunRecord, found: CheckpointResults) -> Iterator[tuple[str, str]]:
    """Names and values, those that are known."""
    yield "Ended", ended(record)
    seconds = number(record.last.get("seconds"))
    if seconds is not None:
        yield "Time", f"{duration(seconds)}, validation included"
    position = number(record.last.get("position"))
    if position is not None:
        epochs = ""
        if found.manifest is not None and found.manifest.splits["train"].samples:
            samples = found.manifest.splits["train"].samples
            epochs = f", {position / samples:.1f} epochs of {samples:,}"
        yield "Samples", f"{position:,.0f}{epochs}"
    if (size := record.setting("global_batch_size")) is not None:
        crop = record.setting("crop_size")
        yield "Batch", f"{size} crops of {crop} x {crop} pixels a step"
    if speed := record.metrics.curves.get("train/samples_per_second"):
        wait = record.metrics.curves.get("train/data_wait")
        waited = f"; waited for data {mean(wait.values):.1%} of the time" if wait else ""
        yield "Speed", f"{median(speed.values):,.1f} samples/s{waited}"
    if tflops := record.metrics.curves.get("train/tflops"):
        mfu = record.metrics.curves.get("train/mfu")
        share = f", {median(mfu.values):.1%} of its peak (MFU)" if mfu else ""
        yield "Compute", f"{median(tflops.values):.3g} TFLOP/s per device{share}"
    if memory := record.metrics.curves.get("train/memory_gib"):
        where = " on the GPU" if "train/gpu_memory_gib" in record.metrics.curves else ""
        yield "Memory", f"{max(memory.values):.1f} GiB at most{where}"
    for name, said in LEFT_OUT.items():
        if count := record.metrics.latest.get(name):
            yield "Left out", f"{count:,.0f} {said}"
    if found.loaded is not None:
        parameters = sum(p.numel() for p in found.loaded.model.parameters())
        yield "Network", f"{parameters:,} parameters"
        yield "Weights", f"sha256 {found.loaded.digest}"
    yield "Devices", devices(record.environment)


def devices(environment: dict[str, Any]) -> str:
    """What was computed on."""
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
        parts.append("float32" if precision == "no" else f"{precision} where it is safe")
    return ", ".join(parts)


def blocks(text: str) -> Iterator[str]:
    """The configuration, parted where a group of settings begins."""
    lines: list[str] = []
    for line in text.splitlines():
        if lines and re.fullmatch(r"\w+:", line):
            yield "\n".join(lines)
            lines = []
        lines.append(line)
    if lines:
        yield "\n".join(lines)


def versions(record: RunRecord) -> Iterator[tuple[str, str]]:
    """Packages and their versions."""
    known = record.environment.get("versions")
    if isinstance(known, dict):
        yield from ((str(name), str(value)) for name, value in known.items())
    if "platform" in record.environment:
        yield "platform", str(record.environment["platform"])


def commands(record: RunRecord) -> Iterator[tuple[str, str]]:
    """What to do next, and how."""
    run_dir, data = str(record.run_dir), str(record.setting("data") or "SHARDS")
    told = ("--checkpoint", run_dir)
    # The folder may have moved.
    same = ("--config", str(RunFolder(record.run_dir).config), "--run-dir", run_dir)
    if record.state.get("finished") is True:
        yield "Train on", command("train", *same, "--minutes", "MORE")
    else:
        yield "Go on with this run", command("train", *same)
    yield "Score every image", command("evaluate", *told, "--data", data, "--split", "val")
    masks = ("--input", "PICTURES", "--out", "MASKS", "--png", "--overlay")
    yield "Predict", command("predict", *told, *masks)
    yield "Take it elsewhere", command("export", *told, "--format", "onnx", "--out", "model.onnx")


def command(verb: str, *words: str) -> str:
    """A command line, quoted where the shell needs it."""
    return shlex.join(["unet", verb, *words])
