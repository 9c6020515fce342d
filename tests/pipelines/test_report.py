"""`report`, `reporting.charts`, `reporting.checkpoint_results`, `reporting.compose`,
`reporting.score_tables`, `reporting.page`, `reporting.run_record`, `runtime.environment`.

One page about what a run left, also of runs that are incomplete, hostile or huge.
"""

import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipelines.evaluate import EvaluateConfig
from pipelines.export import ExportConfig
from pipelines.inference.options import PredictConfig
from pipelines.reporting import charts, checkpoint_results, compose, page, run_record
from pipelines.reporting.charts import Chart, Series, draw_chart, label, step_axis, value_axis
from pipelines.reporting.run_record import MIN_POINTS, Thinner, read_metrics
from pipelines.runtime import environment
from pipelines.runtime.command import parse
from pipelines.runtime.outputs import REPLACED, UNCHANGED
from pipelines.runtime.run_folder import RunFolder
from pipelines.training.options import TrainConfig
from shards.manifest import read_manifest
from tests.conftest import REPO

VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a browser would make of a page; fails where a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def images(self) -> int:
        return len(self.named("img"))


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A finished run of six steps, validated after 3 and 6, without its report and environment."""
    made = shutil.ignore_patterns("report.html", "environment.json")
    return shutil.copytree(trained, tmp_path / "run", symlinks=True, ignore=made)


def test_a_run_ends_with_its_report(trained: Path) -> None:
    assert Page((trained / "report.html").read_text()).images == 16
    written = json.loads((trained / "environment.json").read_text())
    assert (written["ranks"], written["device"]) == (1, "cpu")


@pytest.fixture
def report(call, run_dir: Path) -> Callable[..., Page]:
    """`unet report` of the run, read."""

    def make(*more: object) -> Page:
        ended = call("report", "--run-dir", run_dir, *more)
        assert ended.code == 0, ended.err
        line = f"report: {run_dir / 'report.html'}"
        assert ended.out in {f"{line}{end}\n" for end in ("", UNCHANGED, REPLACED)}
        return Page((run_dir / "report.html").read_text())

    return make


def append(path: Path, *lines: object) -> None:
    with path.open("a") as file:
        file.write("".join(line if isinstance(line, str) else json.dumps(line) for line in lines))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def made_run(folder: Path, checkpoint: Path, data: Path, **scores: float) -> Path:
    """A run folder around a checkpoint that no run made."""
    step = folder / "checkpoints" / "step-00000007"
    shutil.copytree(checkpoint, step)
    state = {
        "step": 7,
        "position": 14,
        "seconds": 3,
        "fixed": {"manifest": read_manifest(data).digest},
    }
    (step / "state.json").write_text(json.dumps(state))
    for name in ("best", "last"):
        (folder / "checkpoints" / name).symlink_to(step.name)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": str(data)}))
    append(folder / "metrics.jsonl", {"step": 7, "train/loss": 0.5}, "\n")
    append(folder / "metrics.jsonl", {"step": 7, "val/dice": 0.5, **scores}, "\n")
    return folder


def test_a_run_is_reported_on_one_page(report, run_dir: Path, shards: Path, metrics) -> None:
    made = report()
    best = max(
        (line for line in metrics(run_dir) if "val/dice" in line), key=lambda v: v["val/dice"]
    )
    good = f"Dice {best['val/dice']:.4f} and IoU {best['val/iou']:.4f} in validation, best at step"
    assert f"{good} {best['step']}. Finished at step 6 after " in made.text
    for title in ("Loss", "Validation", "Learning rate", "Samples per second"):
        assert title in [attrs.get("aria-label") for attrs in made.named("svg")]
    for words in ("cross entropy", "8 train, 4 val images", "24, 3.0 epochs of 8", "parameters"):
        assert words in made.text
    # Every setting, and what it ran on.
    assert (run_dir / "config.yaml").read_text().split() == made.text.split("Configuration ")[
        1
    ].split(" Versions ")[0].split()
    assert re.search(r"torch \d+\.\d+", made.text)
    # All four images, each as image, mask, prediction and difference.
    assert "Chosen from all val images by Dice." in made.text
    assert made.images == 4 * 4
    assert made.text.rindex("The worst") < made.text.rindex("The best")
    shown = [
        float(dice) for dice in re.findall(r" Dice (0\.\d{4})", made.text.split("The worst")[1])
    ]
    assert len(shown) == 4
    assert max(shown[:2]) <= min(shown[2:])
    assert shown[0] == min(shown)
    assert shown[2] == max(shown)
    # Every pixel of the validation masks is in the confusion matrix.
    cells = [attrs["title"] for attrs in made.named("td") if "title" in attrs]
    pixels = [int(re.search(r"([\d,]+) pixels", cell)[1].replace(",", "")) for cell in cells]
    counted = np.sum([shard.pixels for shard in read_manifest(shards).splits["val"].shards], axis=0)
    assert [sum(pixels[:2]), sum(pixels[2:])] == counted[:2].tolist()


def test_the_page_needs_nothing_but_itself(report) -> None:
    made = report()
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in made.tags}
    assert {attrs["src"].partition(",")[0] for attrs in made.named("img")} == {
        "data:image/jpeg;base64",
        "data:image/png;base64",
    }
    for attrs in [attrs for _, attrs in made.tags]:
        assert not {
            name for name in attrs if name.startswith("on") or name in ("href", "xlink:href")
        }
        assert "url(" not in (attrs.get("style") or "")
    policy = [a["content"] for a in made.named("meta") if a.get("http-equiv")]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_the_same_folder_gives_the_same_page_and_is_left_as_it_was(
    report, run_dir: Path, content
) -> None:
    before = content(run_dir)
    report()
    first = content(run_dir)
    report()
    assert content(run_dir) == first
    del first["report.html"]
    assert first == before


def test_the_page_is_written_to_the_given_path(call, run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    ended = call("report", "--run-dir", run_dir, "--out", out)
    assert (ended.code, ended.out) == (0, f"report: {out}\n")
    assert Page(out.read_text()).images == 16
    assert not (run_dir / "report.html").exists()


def test_the_suggested_next_commands_parse(report, run_dir: Path, shards: Path) -> None:
    made = report()
    configs = {
        "train": TrainConfig,
        "evaluate": EvaluateConfig,
        "predict": PredictConfig,
        "export": ExportConfig,
    }
    shown = made.text.split(" Next steps ")[1].split(" Configuration ")[0]
    lines = re.findall(r"unet (\w+) (.*?)(?= Score every| Predict| Export|$)", shown)
    assert [verb for verb, _ in lines] == list(configs)
    for verb, flags in lines:
        words = ["2" if word == "MORE" else word for word in shlex.split(flags)]
        config = parse(configs[verb], words, verb)
        if isinstance(config, TrainConfig):
            # The resolved configuration resolves to itself.
            assert (config.data, config.run_dir, config.length.minutes) == (str(shards), run_dir, 2)
            assert config.length.steps == 6


def test_scores_of_evaluate_are_taken_where_they_are_of_this_checkpoint(
    report, call, run_dir: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = report()
    assert call("evaluate", "--checkpoint", run_dir, "--data", shards, "--workers", 0).code == 0
    # It is not scored again.
    monkeypatch.setattr(checkpoint_results, "score_sample", None)
    made = report()
    # And that is the page which was made without them.
    assert made.text == alone.text
    change(run_dir / "scores.json", manifest="0")
    assert "scores.json belongs to other data" in report("--no-pictures").text
    change(run_dir / "scores.json", checkpoint="0")
    assert ("scores.json belongs to another checkpoint and is not shown.") in report(
        "--no-pictures"
    ).text


def test_scores_with_test_time_augmentation_are_labelled(
    report, call, run_dir: Path, shards: Path
) -> None:
    options = ("--checkpoint", run_dir, "--data", shards, "--workers", 0)
    assert call("evaluate", *options, "--tta", "--tile", 32).code == 0
    scores = json.loads((run_dir / "scores.json").read_text())
    made = report()
    expected = "on all val images, with test-time augmentation (--tta)."
    assert f"The best checkpoint {expected}" in made.text
    low, high = scores["intervals"]["macro"]["dice"]
    assert f"macro {scores['macro']['dice']:.4f} {low:.4f}\u2013{high:.4f} " in made.text
    assert "95% intervals: 10,000 bootstrap resamples of 4 images." in made.text
    read = checkpoint_results.read_tiles(run_record.read_record(run_dir), scores)
    assert (read.tile, read.overlap, read.tta) == (32, 0.25, True)


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"classes": 1}'])
def test_scores_that_are_damaged_are_left_out(damage: bytes, report, call, run_dir, shards) -> None:
    assert call("evaluate", "--checkpoint", run_dir, "--data", shards, "--workers", 0).code == 0
    whole = json.loads((run_dir / "scores.json").read_text())
    if damage.startswith(b'{"'):
        change(run_dir / "scores.json", classes=dict.fromkeys(whole["classes"], 1))
    else:
        (run_dir / "scores.json").write_bytes(damage)
    assert "scores.json is damaged." in report().text
    assert report().images == 16


@pytest.mark.parametrize(
    "damaged",
    [
        {"intervals": 3},
        {"intervals": {"unit": "image"}},
        {"groups": {"per": "site", "parts": [{"value": 3}], "num_others": 0}},
    ],
)
def test_damaged_intervals_and_groups_are_left_out(
    damaged: dict, report, call, run_dir: Path, shards: Path
) -> None:
    assert call("evaluate", "--checkpoint", run_dir, "--data", shards, "--workers", 0).code == 0
    change(run_dir / "scores.json", **damaged)
    assert "scores.json is damaged." in report("--no-pictures").text


def test_scores_per_site_are_a_table_of_their_own(
    report, call, run_dir: Path, shards: Path, tmp_path: Path
) -> None:
    table = tmp_path / "sites.csv"
    table.write_text("key,site\np000,<b>\np001,<b>\np002,south\np003,south\n")
    options = ("--checkpoint", run_dir, "--data", shards, "--workers", 0)
    assert call("evaluate", *options, "--per", "site", "--columns", table).code == 0
    parts = json.loads((run_dir / "scores.json").read_text())["groups"]["parts"]
    made = report("--no-pictures")
    assert "Per site" in made.text
    for part in parts:
        low, high = part["intervals"]["macro"]["dice"]
        dice = f"{part['macro']['dice']:.4f} {low:.4f}\u2013{high:.4f}"
        assert f"{part['value']} 2 {dice}" in made.text
    assert "b" not in {tag for tag, _ in made.tags}


def test_scores_of_objects_are_a_section_of_their_own(
    report, call, run_dir: Path, shards: Path
) -> None:
    assert "Objects" not in report("--no-pictures").text
    options = ("--checkpoint", run_dir, "--data", shards, "--workers", 0)
    assert call("evaluate", *options, "--objects").code == 0
    stored = json.loads((run_dir / "scores.json").read_text())["objects"]
    text = report("--no-pictures").text
    assert f"Objects Class foreground Matched {stored['matched']} of {stored['true']} true" in text
    for name in ("precision", "recall", "f1"):
        shown = "n/a" if stored[name] is None else f"{stored[name]:.4f}"
        assert f"{name.capitalize()} {shown}" in text
    bias = f"bias {stored['count_bias']:+.2f}"
    assert f"Count error {stored['count_error']:.2f} per image, {bias}" in text
    assert f"Mean area {stored['true_area']:,.1f} pixels true" in text


def test_scores_of_a_subset_of_the_images_are_labelled(
    report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_results, "MAX_SCORED", 3)
    made = report()
    assert "The best checkpoint on 3 of 4 val images, evenly spread." in made.text
    assert made.images == 3 * 4


def test_missing_data_are_reported_and_left_out(
    report, call, trained: Path, run_dir: Path, shards: Path, tmp_path: Path, metrics
) -> None:
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    gone = tmp_path / "gone"
    (run_dir / "config.yaml").write_text(yaml.safe_dump({**config, "data": str(gone)}))
    made = report()
    assert f"No images: {gone} does not exist; check the path." in made.text
    assert (made.images, "Confusion" in made.text) == (0, False)
    # The scores of the classes are in metrics.jsonl all the same.
    best = max(
        (line for line in metrics(run_dir) if "val/dice" in line), key=lambda v: v["val/dice"]
    )
    assert f"Validation at step {best['step']}." in made.text
    assert f"foreground {best['val/dice/foreground']:.4f}" in made.text
    # It has moved.
    shutil.copytree(shards, tmp_path / "moved")
    assert report("--data", tmp_path / "moved").images == 16
    # It is another one.
    path = tmp_path / "moved" / "index.json"
    path.write_text(path.read_text() + "\n")
    made = report("--data", tmp_path / "moved")
    assert "moved is not the data that the run was trained on." in made.text
    assert made.images == 0


def test_a_missing_shard_is_reported(report, run_dir: Path, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "data")
    (tmp_path / "data" / "val-000001.tar").unlink()
    made = report("--data", tmp_path / "data")
    assert "val-000001.tar cannot be opened: No such file" in made.text
    assert made.images == 0


def test_images_can_be_left_out(report) -> None:
    made = report("--no-pictures")
    assert made.images == 0
    assert "No images" not in made.text


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ['{"step": 8, "train/lo'],
            ["The last line of metrics.jsonl is incomplete and is ignored."],
        ),
        (['{"step": 8, "train/loss": 0.5}'], ["killed after step 8."]),
        (["nonsense\n", "[1]\n", '{"loss": 3}\n'], ["3 lines of metrics.jsonl are damaged and"]),
        (['{"step": 8, "train/loss": NaN}\n'], ["1 values in metrics.jsonl are not finite and"]),
        (['{"step": 8, "train/lr": null, "x": "y"}\n'], ["after step 8."]),
        (['{"step": 8, "train/loss": 1' + 400 * "0" + "}\n"], ["after step 8."]),
    ],
)
def test_what_is_cut_or_damaged_in_the_metrics_is_noted(
    lines: list[str], expected: list[str], report, run_dir: Path
) -> None:
    append(run_dir / "metrics.jsonl", *lines)
    made = report("--no-pictures")
    for words in expected:
        assert words in made.text
    assert ("are damaged" in made.text) == ("are damaged" in expected[0])


def test_a_run_that_has_just_started_has_a_page(report, run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    for name in ("state.json", "metrics.jsonl"):
        (run_dir / name).unlink()
    made = report()
    for words in (
        "No step is recorded yet.",
        "metrics.jsonl does not exist yet.",
        "There are no images: the run has no checkpoint yet.",
        "Still running, or killed after step 0.",
        "Resume this run",
    ):
        assert words in made.text
    append(run_dir / "metrics.jsonl", {"step": 2, "train/loss": 0.75}, "\n")
    made = report()
    assert "Not validated yet; the loss is 0.7500. Still running" in made.text
    assert [a["aria-label"] for a in made.named("svg") if "aria-label" in a] == ["Loss"]


@pytest.mark.parametrize(
    ("state", "last", "ending"),
    [
        ({"finished": True, "step": 6, "seconds": 90061}, 6, "Finished at step 6 after 1 d 1 h."),
        (
            {"finished": False, "step": 6, "seconds": 61},
            6,
            "Interrupted at step 6 after 1 min 1 s;",
        ),
        ({"finished": False, "step": 6, "seconds": 61}, 9, "or killed after step 9."),
        ({"finished": True, "step": 6}, 6, "Finished at step 6."),
        ([], 6, "state.json is damaged."),
    ],
)
def test_how_a_run_ended_is_reported(
    state: Any, last: int, ending: str, report, run_dir: Path
) -> None:
    (run_dir / "state.json").write_text(json.dumps(state))
    append(run_dir / "metrics.jsonl", {"step": last, "train/loss": 0.5}, "\n")
    assert ending in report("--no-pictures").text


def test_what_was_left_out_and_the_deciding_settings_are_reported(report, run_dir: Path) -> None:
    assert "Excluded" not in report("--no-pictures").text
    values = {"step": 6, "train/skipped": 3, "train/overflows": 2, "train/memory_gib": 1.25}
    append(run_dir / "metrics.jsonl", values, "\n")
    config = run_dir / "config.yaml"
    config.write_text(config.read_text().replace("best_by: dice", "best_by: iou"))
    made = report("--no-pictures")
    for words in ("3 samples that could not be", "2 steps whose gradients", "peak 1.2 GiB"):
        assert words in made.text
    assert "GiB on the GPU" not in made.text
    assert "in validation, best by iou at step" in made.text


def test_the_rate_of_arithmetic_is_reported_with_its_share_of_the_peak(
    report, run_dir: Path
) -> None:
    assert re.search(r"Compute [\d.e-]+ TFLOP/s per device Memory", report("--no-pictures").text)
    (run_dir / "metrics.jsonl").unlink()
    for step, tflops in enumerate((300, 310, 320), 1):
        values = {"train/tflops": tflops, "train/mfu": tflops / 989, "train/memory_gib": 30}
        line = {"step": step, **values, "train/gpu_memory_gib": 20.0 + step}
        append(run_dir / "metrics.jsonl", line, "\n")
    text = report("--no-pictures").text
    assert "Compute 310 TFLOP/s per device, 31.3% of peak (MFU)" in text
    assert "peak 30.0 GiB on the GPU" in text


@pytest.mark.parametrize("broken", ["a: [", "- 1", "a: &a [*a]", 200_000 * "x"])
def test_a_configuration_that_is_damaged_is_shown_as_it_is(broken: str, report, run_dir) -> None:
    (run_dir / "config.yaml").write_text(broken)
    made = report()
    assert broken[:80] in made.text
    assert len(made.text) < 110_000
    assert "the location of the training data is unknown; set it with --data" in made.text


def test_names_are_text_whatever_they_hold(make_checkpoint, call, draw, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    folder = draw(tmp_path / "in", 2, name="<img src=x onerror=alert({})>&amp;\"'")
    data = tmp_path / "<b>data"
    ended = call(
        "pack",
        *("--images", folder / "images", "--masks", folder / "masks", "--out", data),
        *("--mask-format", "binary", "--classes", "ground", evil, "--workers", 1),
        *("--split-file", split_of(folder, tmp_path)),
    )
    assert ended.code == 0, ended.err
    run_dir = made_run(
        tmp_path / "<i>run",
        make_checkpoint(classes=("ground", evil)),
        data,
        **{f"val/dice/{evil}": 0.5},
    )
    (run_dir / "environment.json").write_text(json.dumps({"cpu": evil, "versions": {evil: evil}}))
    ended = call("report", "--run-dir", run_dir)
    assert ended.code == 0, ended.err
    text = (run_dir / "report.html").read_text()
    made = Page(text)
    assert not {"script", "i", "b"} & {tag for tag, _ in made.tags}
    assert not [attrs for attrs in made.named("img") if "onerror" in attrs]
    assert made.images == 4
    assert made.text.count(evil) >= 5
    assert evil not in text
    assert "<b>data" in made.text


def split_of(folder: Path, place: Path) -> Path:
    """A split file that makes the first image validation."""
    names = sorted(path.name for path in (folder / "images").iterdir())
    quoted = [name.replace('"', '""') for name in names]
    path = place / "split.csv"
    path.write_text(f'path,split\n"{quoted[0]}",val\n"{quoted[1]}",train\n')
    return path


def test_a_page_of_incompressible_images_is_small(make_checkpoint, call, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for number in range(11):
        pixels = rng.integers(0, 256, (330, 330, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray((pixels[..., 1] > 127) * np.uint8(255)).save(
            tmp_path / "masks" / f"{number}.png"
        )
    (tmp_path / "split.csv").write_text(
        "path,split\n0.png,train\n" + "".join(f"{n}.png,val\n" for n in range(1, 11))
    )
    ended = call(
        "pack",
        *("--images", tmp_path / "images", "--masks", tmp_path / "masks", "--workers", 1),
        *("--mask-format", "binary", "--out", tmp_path / "data"),
        *("--split-file", tmp_path / "split.csv"),
    )
    assert ended.code == 0, ended.err
    run_dir = made_run(tmp_path / "run", make_checkpoint(), tmp_path / "data")
    assert call("report", "--run-dir", run_dir).code == 0
    assert Page((run_dir / "report.html").read_text()).images == 40
    assert 2_000_000 < (run_dir / "report.html").stat().st_size < 6_000_000


def test_a_long_run_has_a_short_page(call, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    losses = rng.uniform(0, 1, 100_000).tolist()
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate(losses, 1):
            file.write(f'{{"step": {step}, "train/loss": {loss}, "train/lr": 1e-3}}\n')
    ended = call("report", "--run-dir", tmp_path)
    assert ended.code == 0, ended.err
    assert (tmp_path / "report.html").stat().st_size < 100_000
    curve = read_metrics(tmp_path / "metrics.jsonl", None).curves["train/loss"]
    assert MIN_POINTS <= len(curve.values) <= 2 * MIN_POINTS
    # Each point is the mean of as many, the last perhaps of fewer.
    width = -(-len(losses) // len(curve.values))
    width = 1 << (width - 1).bit_length()
    expected = [np.mean(losses[i : i + width]) for i in range(0, len(losses), width)]
    np.testing.assert_allclose(curve.values, expected)
    assert curve.steps[0] == (1 + width) / 2


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1000, 1001, 4001])
def test_a_short_curve_keeps_all_its_points_and_a_long_one_its_mean(count: int) -> None:
    thinner = Thinner()
    for step in range(count):
        thinner.add(step, float(step % 7))
    curve = thinner.curve()
    assert len(curve.steps) == len(curve.values) <= 2 * MIN_POINTS
    if count < 2 * MIN_POINTS:
        assert curve.steps == tuple(range(count))
    weights = np.full(len(curve.values), thinner.width)
    if count:
        weights[-1] = count - weights[:-1].sum()
        means = (np.mean(range(count)), np.mean([n % 7 for n in range(count)]))
        np.testing.assert_allclose(np.average(curve.steps, weights=weights), means[0])
        np.testing.assert_allclose(np.average(curve.values, weights=weights), means[1])


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, 1.0], [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ([0.91, 0.958], [0.91, 0.92, 0.93, 0.94, 0.95, 0.96]),
        ([-3.0, 5.0], [-4, -2, 0, 2, 4, 6]),
        ([5.0], [4.5, 4.7, 4.9, 5.1, 5.3, 5.5]),
        ([0.0], [-0.1, -0.05, 0, 0.05, 0.1]),
        ([0.2, 0.3, 0.4, 2000.0], [0.1, 1, 10, 100, 1000, 10000]),
    ],
)
def test_axes_have_round_ticks_around_all_values(values: list[float], ticks: list[float]) -> None:
    axis = value_axis(values)
    assert axis.low <= min(values) <= max(values) <= axis.high
    assert 0 <= axis.share(min(values)) <= axis.share(max(values)) <= 1
    assert len(axis.ticks) <= 8
    if len(values) > 1 or values == [0.0]:
        np.testing.assert_allclose(axis.ticks, ticks, atol=1e-12)


def test_an_axis_from_zero_starts_there() -> None:
    assert value_axis([3.4, 4.0], from_zero=True).ticks == (0, 1, 2, 3, 4)
    assert value_axis([-3.4, -3.0], from_zero=True).ticks == (-4, -3, -2, -1, 0)
    assert value_axis([0.0], from_zero=True).low < 0 < value_axis([0.0], from_zero=True).high


@pytest.mark.parametrize(
    ("last", "ticks"), [(0, [0, 1]), (7, [0, 2, 4, 6]), (447, [0, 100, 200, 300, 400])]
)
def test_the_axis_of_steps_ends_with_the_run(last: int, ticks: list[float]) -> None:
    axis = step_axis(last)
    assert (axis.low, axis.high, list(axis.ticks)) == (0, max(1, last), ticks)


@pytest.mark.parametrize(
    ("value", "whole", "expected"),
    [
        *((0, True, "0"), (9000, True, "9,000"), (20_000, True, "20k"), (2_500_000, True, "2.5M")),
        *((0.30000000000000004, False, "0.3"), (5e-05, False, "5e-05"), (0.0015, False, "0.0015")),
    ],
)
def test_labels_are_short(value: float, whole: bool, expected: str) -> None:
    assert label(value, whole=whole) == expected


def test_a_chart_draws_each_point_where_it_belongs() -> None:
    chart = Chart("T", (Series("a<b", (0, 50, 100), (0.0, 1.0, 0.5)),), 100, (50, 1.0))
    drawn = str(draw_chart(chart))
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    top, bottom = charts.TOP, charts.HEIGHT - charts.BOTTOM
    middle = [(left + right) / 2, (top + bottom) / 2]
    expected = f"M{left:.1f} {bottom:.1f} {middle[0]:.1f} {top:.1f} {right:.1f} {middle[1]:.1f}"
    assert f'<path class="s0" d="{expected}"/>' in drawn
    assert "a&lt;b, step 50: 1</title>" in drawn
    assert "best, step 50: 1</title>" in drawn
    Page(drawn)


def test_a_matrix_of_very_many_classes_is_not_drawn(
    report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose, "MAX_CLASSES", 1)
    made = report()
    assert "A confusion matrix of 2 classes is not drawn." in made.text
    assert "Per cent of the pixels" not in made.text
    assert "Precision" in made.text


def test_a_folder_that_is_no_run_is_refused(call, tmp_path: Path) -> None:
    ended = call("report", "--run-dir", tmp_path)
    expected = (
        f"unet report: --run-dir {tmp_path} is not a run folder: it has neither "
        "config.yaml nor metrics.jsonl; use the --run-dir of unet train"
    )
    assert (ended.code, ended.err.strip()) == (1, expected)
    assert not (tmp_path / "report.html").exists()


class Alone:
    """Stands in for the Accelerator of a rank among several that have ended."""

    num_processes, mixed_precision, is_main_process = 3, "no", True

    def __init__(self) -> None:
        import torch

        self.device = torch.device("cpu")

    def autocast(self) -> Any:
        from contextlib import nullcontext

        return nullcontext()


def test_at_the_end_of_a_run_the_main_process_reports_alone(run_dir: Path) -> None:
    environment.write_environment(RunFolder(run_dir), Alone())
    line = compose.write_report_safely(run_dir, Alone())
    assert line == f"report: {run_dir / 'report.html'}"
    made = Page((run_dir / "report.html").read_text())
    assert made.images == 16
    assert "3 ranks on cpu, float32" in made.text
    assert "are those of the process that made this page" not in made.text
    recorded = json.loads((run_dir / "environment.json").read_text())
    assert recorded["versions"]["torch"] in made.text


def test_what_a_run_ran_on_is_what_it_wrote_down(report, run_dir: Path) -> None:
    assert "are those of the process that made this page" in report("--no-pictures").text
    written = {
        "gpus": 8 * ["NVIDIA H200"],
        **{"cpu": "Some CPU", "cpus": 96, "memory_bytes": 2**40, "ranks": 16, "device": "cuda"},
        **{"precision": "bf16", "platform": "Linux-9", "versions": {"torch": "9.9.9"}},
    }
    (run_dir / "environment.json").write_text(json.dumps(written))
    made = report("--no-pictures")
    assert "8 x NVIDIA H200, Some CPU, 96 CPUs, 1024 GiB, 16 ranks on cuda, bf16" in made.text
    assert "torch 9.9.9" in made.text
    assert "are those of the process that made this page" not in made.text


def test_a_report_that_fails_does_not_fail_the_run(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(compose, "load_results", fail)
    line = compose.write_report_safely(run_dir, Alone())
    assert line == f"no report (out of memory); to retry: unet report --run-dir {run_dir}"
    assert not (run_dir / "report.html").exists()


def test_the_template_is_installed_with_the_code() -> None:
    settings = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert (REPO / "pipelines" / "reporting" / page.TEMPLATE).exists()
    assert any(
        fnmatch(page.TEMPLATE, some) for some in settings["package-data"]["pipelines.reporting"]
    )


def test_the_processor_is_named_as_linux_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["processor\t: 0\n", "model name\t: Some CPU @ 3GHz\n", "model name\t: other\n"]
    assert environment.cpu_name(lines) == "Some CPU @ 3GHz"
    monkeypatch.setattr(environment, "platform", SimpleNamespace(machine=lambda: "arm64"))
    assert environment.cpu_name([]) == "arm64"
