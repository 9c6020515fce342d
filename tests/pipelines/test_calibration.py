"""`evaluate`, `predict`, `evaluation.calibration`, `evaluation.evidence`, `evaluation.findings`,
`evaluation.temperature`, `model.temperature`.

Calibration and temperature of a trained model: against plain NumPy and scikit-learn, on any ranks.
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.evaluation.calibration import average_precision, describe_histograms
from pipelines.evaluation.temperature import fit_temperature
from shards.manifest import read_manifest
from unet import TileConfig
from unet.calibration import LEVELS, CalibrationCounts, TemperatureCounts


def evaluate(call, data: Path, *argv: object):
    return call("evaluate", "--data", data, "--workers", 0, *argv)


def scored(call, data: Path, out: Path, *argv: object) -> dict:
    ended = evaluate(call, data, "--out", out, *argv)
    assert ended.code == 0, ended.err
    return json.loads((out / "scores.json").read_text())


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    """A copy of a trained checkpoint, beside which a temperature may be stored."""
    return Path(shutil.copytree(trained / "checkpoints" / "best", tmp_path / "checkpoint"))


def draw(num: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Over-confident probabilities of two classes, and the classes drawn from the true ones."""
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 1.2, num)
    classes = (rng.random(num) < 1 / (1 + np.exp(-logit))).astype(np.uint8)
    # Of the middle of a level, so that levels lose nothing.
    overconfident = 1 / (1 + np.exp(-2.5 * logit))
    return (np.floor(overconfident * LEVELS) + 0.5) / LEVELS, classes


def describe(probability: np.ndarray, classes: np.ndarray):
    counts = CalibrationCounts(2)
    counts.update(
        torch.tensor(probability, dtype=torch.float32).view(1, 1, 1, -1),
        torch.tensor(classes).view(1, 1, -1),
    )
    return describe_histograms(counts.compute(), ("ground", "cell"), 1.0)


def test_reliability_ece_and_thresholds_equal_those_of_numpy() -> None:
    probability, classes = draw()
    found = describe(probability, classes)
    bins = np.minimum((probability * 20).astype(int), 19)
    ece = 0.0
    for number, own in enumerate(found.classes["cell"].bins):
        chosen = bins == number
        assert own.pixels == chosen.sum()
        assert own.probability == pytest.approx(probability[chosen].mean(), abs=1e-6)
        assert own.share == pytest.approx(classes[chosen].mean(), abs=1e-12)
        ece += chosen.mean() * abs(probability[chosen].mean() - classes[chosen].mean())
    assert found.classes["cell"].ece == pytest.approx(ece, abs=1e-6)
    assert found.ece is not None
    assert found.ece > 0.05
    dice = {}
    for k in range(1, LEVELS):
        predicted = probability >= k / LEVELS
        dice[k / LEVELS] = 2 * (predicted & (classes == 1)).sum() / (
            predicted.sum() + classes.sum()
        )  # fmt: skip
    assert found.sweep is not None
    assert found.sweep.of == "cell"
    assert found.sweep.best.dice == pytest.approx(max(dice.values()), abs=1e-12)
    assert dice[found.sweep.best.threshold] == max(dice.values())
    for point in found.classes["cell"].curve:
        predicted = probability >= point.threshold
        assert point.recall == pytest.approx(predicted[classes == 1].mean(), abs=1e-12)
        assert point.precision == pytest.approx(classes[predicted].mean(), abs=1e-12)
        assert point.dice == pytest.approx(dice[point.threshold], abs=1e-12)


def test_average_precision_of_a_hand_computed_table() -> None:
    # From the top: 1 of the class, 1 not, 2 of the class: precision 1, 1/2, 3/4; recall 1/3, 1/3, 1
    pixels = np.zeros((LEVELS, 2), np.int64)
    pixels[900, 1], pixels[700, 0], pixels[100, 1] = 1, 1, 2
    assert average_precision(pixels) == pytest.approx(1 / 3 + 2 / 3 * 3 / 4)
    assert average_precision(np.zeros((LEVELS, 2), np.int64)) is None


def test_scikit_learn_agrees() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    calibration = pytest.importorskip("sklearn.calibration")
    probability, classes = draw()
    found = describe(probability, classes).classes["cell"]
    share, mean = calibration.calibration_curve(classes, probability, n_bins=20)
    known = [one for one in found.bins if one.pixels]
    np.testing.assert_allclose([one.share for one in known], share, atol=1e-12)
    np.testing.assert_allclose([one.probability for one in known], mean, atol=1e-6)
    expected = metrics.average_precision_score(classes, probability)
    assert found.average_precision == pytest.approx(expected, abs=1e-12)


def test_monai_agrees_on_one_image() -> None:
    monai = pytest.importorskip("monai.metrics")
    probability, classes = draw()
    found = describe(probability, classes)
    p, y = torch.tensor(probability, dtype=torch.float32), torch.tensor(classes)
    metric = monai.CalibrationErrorMetric(num_bins=20, include_background=True)
    metric(torch.stack([1 - p, p])[None, :, None], torch.stack([1 - y, y])[None, :, None])
    expected = (found.classes["ground"].ece, found.classes["cell"].ece)
    assert float(metric.aggregate()) == pytest.approx(sum(expected) / 2, abs=2e-3)


@pytest.mark.parametrize(("true", "low", "high"), [(2.5, 2.4, 2.6), (0.7, 0.67, 0.73)])
def test_the_temperature_of_known_logits_is_found(true: float, low: float, high: float) -> None:
    from scipy.optimize import minimize_scalar

    rng = np.random.default_rng(1)
    logit = rng.normal(0, 1.2, 50_000)
    classes = torch.tensor(rng.random(50_000) < 1 / (1 + np.exp(-logit))).byte()
    given = torch.tensor(logit * true)
    counts = TemperatureCounts()
    counts.update(given.float().sigmoid().view(1, 1, 1, -1), classes.view(1, 1, -1))
    found = fit_temperature(counts.compute(), "0" * 64, "1" * 64, TileConfig())

    def loss(log_t: float) -> float:
        return float(
            torch.nn.functional.binary_cross_entropy_with_logits(
                given / np.exp(log_t), classes.double()
            )
        )

    best = minimize_scalar(loss, bounds=(-1, 2), method="bounded")
    assert found.temperature == pytest.approx(np.exp(best.x), rel=5e-3)
    assert low < found.temperature < high
    assert found.nll == pytest.approx(best.fun, rel=1e-4)
    assert found.nll_before == pytest.approx(loss(0), rel=1e-5)


def test_evaluate_writes_calibration_of_every_pixel(checkpoint, shards, call, tmp_path) -> None:
    argv = ("--checkpoint", checkpoint)
    plain = scored(call, shards, tmp_path / "plain", *argv)
    found = scored(call, shards, tmp_path / "out", *argv, "--calibration")
    calibration = found.pop("calibration")
    assert found == plain
    assert calibration["num_pixels"] == sum(map(sum, plain["confusion"]))
    half = calibration["sweep"]["half"]
    own = plain["classes"]["foreground"]
    for name in ("dice", "precision", "recall"):
        assert half[name] == pytest.approx(own[name])
    assert calibration["sweep"]["best"]["dice"] >= own["dice"]
    lines = list(csv.DictReader((tmp_path / "out" / "calibration.csv").open()))
    assert len(lines) == LEVELS
    for name in ("background", "foreground"):
        in_class = sum(int(line[f"true/{name}"]) for line in lines)
        assert in_class == plain["classes"][name]["tp"] + plain["classes"][name]["fn"]
    right = sum(int(line["true"]) for line in lines)
    assert right == sum(plain["confusion"][c][c] for c in (0, 1))
    # Files of an earlier scoring do not stay beside another one.
    scored(call, shards, tmp_path / "out", *argv)
    assert not (tmp_path / "out" / "calibration.csv").exists()


def test_the_best_threshold_has_that_dice_when_predicted(
    checkpoint, shards, call, tmp_path
) -> None:
    argv = ("--checkpoint", checkpoint)
    best = scored(call, shards, tmp_path / "a", *argv, "--calibration")["calibration"]["sweep"][
        "best"
    ]
    masks = tmp_path / "masks"
    ended = call(
        "predict",
        *(*argv, "--input", shards, "--split", "val", "--out", masks, "--workers", 0),
        *("--threshold", best["threshold"]),
    )
    assert ended.code == 0, ended.err
    found = scored(call, shards, tmp_path / "b", "--predictions", masks)
    for name in ("dice", "precision", "recall"):
        assert found["classes"]["foreground"][name] == best[name]


def test_a_fitted_temperature_is_stored_and_applied(checkpoint, shards, call, tmp_path) -> None:
    argv = ("--checkpoint", checkpoint)
    ended = evaluate(call, shards, *argv, "--calibration", "--calibrated", "--out", tmp_path / "x")
    assert (ended.code, "temperature.json does not exist; fit it" in ended.err) == (2, True)
    before = scored(call, shards, tmp_path / "a", *argv, "--calibration", "--fit-temperature")
    stored = json.loads((checkpoint / "temperature.json").read_text())
    assert stored["manifest"] == read_manifest(shards).digest
    assert stored["checkpoint"] == before["checkpoint"]
    assert stored["nll"] <= stored["nll_before"]
    after = scored(call, shards, tmp_path / "b", *argv, "--calibration", "--calibrated")
    assert after["calibration"]["temperature"] == stored["temperature"] != 1
    assert after["confusion"] == before["confusion"]
    assert after["calibration"]["confidence"] != before["calibration"]["confidence"]
    # Monotone: thresholds move, the order of pixels does not.
    assert after["calibration"]["sweep"]["best"]["dice"] == pytest.approx(
        before["calibration"]["sweep"]["best"]["dice"], abs=5e-3
    )
    masks = tmp_path / "masks"
    predict = (*argv, "--input", shards, "--split", "val", "--out", masks, "--workers", 0)
    threshold = ("--threshold", after["calibration"]["sweep"]["best"]["threshold"])
    ended = call("predict", *predict, "--calibrated", *threshold)
    assert ended.code == 0, ended.err
    assert f"--calibrated: temperature {stored['temperature']:g}" in ended.err
    job = json.loads((masks / "job.json").read_text())
    assert (job["calibrated"], job["temperature"]) == (True, stored["temperature"])
    found = scored(call, shards, tmp_path / "c", "--predictions", masks)
    assert found["classes"]["foreground"]["dice"] == after["calibration"]["sweep"]["best"]["dice"]
    ended = call("predict", *predict, *threshold)
    assert (ended.code, "was created with --calibrated" in ended.err) == (2, True)
    (checkpoint / "temperature.json").write_text(json.dumps({**stored, "temperature": 3.5}))
    ended = call("predict", *predict, "--calibrated", *threshold)
    assert ended.code == 2
    assert "the temperature is 3.5, that of" in ended.err
    (checkpoint / "temperature.json").write_text(json.dumps({**stored, "tta": True}))
    ended = call("predict", *predict, "--calibrated", *threshold)
    assert (ended.code, "fitted with --tta True, not False" in ended.err) == (0, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0}, "is damaged"),
        ({"temperature": "2"}, "is damaged"),
        ({"checkpoint": "0" * 64}, "is that of other weights"),
        ({"more": 1}, "Unknown field"),
    ],
)
def test_a_damaged_temperature_is_refused(
    change: dict, message: str, checkpoint, shards, cells, call, tmp_path
) -> None:
    argv = ("--checkpoint", checkpoint)
    scored(call, shards, tmp_path / "a", *argv, "--fit-temperature")
    path = checkpoint / "temperature.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    given = (*argv, "--input", cells / "images", "--out", tmp_path / "masks", "--calibrated")
    ended = call("predict", *given, "--workers", 0)
    assert (ended.code, len(ended.err.splitlines())) == (1, 1)
    assert message in ended.err
    assert "fit it again (unet evaluate --fit-temperature)" in ended.err
    assert not (tmp_path / "masks" / "job.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--split", "train", "--fit-temperature"), "--fit-temperature requires --split val"),
        (("--fit-temperature", "--calibrated"), "--fit-temperature has no effect with"),
        (("--calibrated",), "--calibrated requires --calibration"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(
    argv: tuple, message: str, trained, shards, call, tmp_path
) -> None:
    ended = evaluate(call, shards, "--checkpoint", trained, "--out", tmp_path / "o", *argv)
    assert (ended.code, message in ended.err) == (2, True)
    assert not (tmp_path / "o").exists()


def test_stored_masks_have_no_probabilities(shards, call, tmp_path) -> None:
    ended = evaluate(call, shards, "--predictions", tmp_path, "--calibration")
    assert (ended.code, "--calibration requires --checkpoint" in ended.err) == (2, True)


def test_an_ensemble_has_calibration_but_no_temperature(
    checkpoint, trained, shards, call, tmp_path
) -> None:
    both = ("--checkpoint", checkpoint, trained, "--out", tmp_path / "out")
    for more in (("--fit-temperature",), ("--calibration", "--calibrated")):
        ended = evaluate(call, shards, *both, *more)
        assert ended.code == 2
        assert f"{more[-1]}: a temperature belongs to one checkpoint, got 2" in ended.err
    alone = scored(call, shards, tmp_path / "one", "--checkpoint", checkpoint, "--calibration")
    found = scored(call, shards, tmp_path / "out", *both[:3], "--calibration")
    assert found["calibration"]["num_pixels"] == alone["calibration"]["num_pixels"]
    assert found["calibration"]["ece"] == pytest.approx(alone["calibration"]["ece"], abs=1e-4)


@pytest.mark.ranks
def test_counts_are_equal_on_1_2_and_3_ranks(checkpoint, shards, call, launch, tmp_path) -> None:
    argv = ("--checkpoint", checkpoint, "--data", shards, "--workers", 0, "--calibration")
    argv += ("--fit-temperature", "--batch-size", 1)
    ended = call("evaluate", *argv, "--out", tmp_path / "1")
    assert ended.code == 0, ended.err
    stored = (checkpoint / "temperature.json").read_bytes()
    for world in (2, 3):
        (checkpoint / "temperature.json").unlink()
        ended = launch(world, "evaluate", *argv, "--out", tmp_path / str(world))
        assert ended.code == 0, ended.err
        assert (checkpoint / "temperature.json").read_bytes() == stored
        for name in ("scores.json", "calibration.csv"):
            assert (tmp_path / str(world) / name).read_bytes() == (
                tmp_path / "1" / name
            ).read_bytes()
