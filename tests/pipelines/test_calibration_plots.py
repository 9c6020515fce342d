"""`reporting.calibration_plots`: reliability, precision and thresholds on the page of a run."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipelines.reporting.calibration_plots import describe_plots, make_plots
from pipelines.reporting.charts import draw_plot


@pytest.fixture
def run(trained: Path, shards: Path, call, tmp_path: Path) -> Path:
    """A run scored with --calibration."""
    folder = shutil.copytree(trained, tmp_path / "run", symlinks=True)
    argv = ("--checkpoint", folder, "--data", shards, "--workers", 0, "--calibration")
    ended = call("evaluate", *argv)
    assert ended.code == 0, ended.err
    return folder


def test_the_page_shows_the_calibration_that_was_measured(run: Path, call) -> None:
    assert call("report", "--run-dir", run).code == 0
    page = (run / "report.html").read_text()
    assert "<h2>Calibration</h2>" in page
    for title in ("Reliability", "Precision and recall", "Thresholds"):
        assert f"<h3>{title}</h3>" in page
    scores = json.loads((run / "scores.json").read_text())
    assert f"is {scores['calibration']['sweep']['best']['threshold']:g}: Dice" in page
    scores["calibration"]["ece"] = "none"
    (run / "scores.json").write_text(json.dumps(scores))
    assert call("report", "--run-dir", run).code == 0
    page = (run / "report.html").read_text()
    assert "scores.json is damaged." in page
    assert "<h2>Calibration</h2>" not in page


def test_plots_have_the_points_of_scores_json(run: Path) -> None:
    scores = json.loads((run / "scores.json").read_text())
    reliability, precision, thresholds = make_plots(scores)
    own = scores["calibration"]["classes"]["foreground"]
    assert [one.name for one in reliability.series] == ["confidence", "foreground"]
    known = [one for one in own["bins"] if one["pixels"]]
    assert [*reliability.series[1].x] == [one["probability"] for one in known]
    assert [*reliability.series[1].y] == [one["share"] for one in known]
    known = [one for one in own["curve"] if one["precision"] is not None]
    assert [*precision.series[0].y] == [one["precision"] for one in known]
    assert [one.name for one in thresholds.series] == ["Dice", "precision", "recall"]
    drawn = ElementTree.fromstring(draw_plot(reliability))
    dots = drawn.findall("circle")
    assert len(dots) == sum(len(one.x) for one in reliability.series)
    assert all(0 <= float(dot.attrib["cx"]) <= 400 for dot in dots)
    assert "The ECE of the confidence is" in describe_plots(scores)
    del scores["calibration"]
    assert (make_plots(scores), make_plots(None), describe_plots(scores)) == ((), (), "")
