"""`compare`, `evaluation.comparison`, `evaluation.stored_scores`, `evaluation.unscored`,
`reporting.comparison_page`.

`unet compare`: differences, intervals and p-values against SciPy and by hand, and what is refused.
"""

import csv
import json
import re
import shlex
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from pipelines.evaluation import comparison, intervals
from pipelines.evaluation.comparison import ImageChange, compare
from pipelines.evaluation.stored_scores import Header, StoredClass, StoredScores
from pipelines.reporting import comparison_page
from tests.pipelines.test_report import Page

CLASSES = ("background", "cell")


def store(name: str, counts: np.ndarray, groups: tuple[str | None, ...] | None = None,
          **header: object) -> StoredScores:  # fmt: skip
    """Scores of images from tp, fp and fn of two classes, [N, 6]."""
    counts = np.asarray(counts)
    rows = np.concatenate([np.full((len(counts), 2), 9), counts], axis=1).astype(np.uint32)
    sums = counts.sum(axis=0).reshape(3, 2).T.tolist()
    classes = {name: StoredClass(*map(int, own)) for name, own in zip(CLASSES, sums, strict=True)}
    given = {"split": "val", "manifest": "0", "empty_policy": "skip", "counted": ("cell",)}
    made = Header(**{**given, "classes": classes, **header})
    keys = tuple(f"p{number:03d}" for number in range(len(counts)))
    return StoredScores(Path(name), made, keys, groups or (None,) * len(keys), rows)


def draw_pair(count: int, gain: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Counts of two scorings of images with the same masks."""
    rng = np.random.default_rng(seed)
    cell, pixels = rng.integers(20, 60, (2, count, 1))
    pair = []
    for shift in (0, gain):
        tp = (cell * np.clip(rng.normal(0.7 + shift, 0.1, (count, 1)), 0, 1)).astype(int)
        fp = (pixels * np.clip(rng.normal(0.2, 0.05, (count, 1)), 0, 1)).astype(int)
        fn = cell - tp
        pair.append(np.concatenate([pixels - fp, tp, fn, fp, fp, fn], axis=1))
    return pair[0], pair[1]


def dice(counts: np.ndarray, axis: int = 0) -> np.ndarray:
    """Dice of the cell: counts as [..., 6]."""
    sums = counts.sum(axis=axis)
    return 2 * sums[..., 1] / (2 * sums[..., 1] + sums[..., 3] + sums[..., 5])


def test_the_difference_of_two_images_is_computed_by_hand() -> None:
    # a: 4 of 8 pixels, then 8 of 8; b: 6 of 8 in both. No false positives.
    one = np.array([[9, 4, 4, 0, 0, 4], [9, 6, 2, 0, 0, 2]])
    two = np.array([[9, 8, 0, 0, 0, 0], [9, 6, 2, 0, 0, 2]])
    found = compare(store("A", one), store("B", two))
    cell = found.classes["cell"]
    assert (cell.dice.first, cell.dice.second) == (20 / 26, 28 / 30)
    assert cell.iou.difference == pytest.approx(14 / 16 - 10 / 16)
    # Resamples: aa changes by 1 - 2/3, ab as observed, bb not at all.
    assert cell.dice.interval == pytest.approx((0, 1 / 3))
    # Of four ways to swap, all change |difference| by as much: b is equal in both.
    assert (found.exact, found.num_permutations, cell.dice.p_value) == (True, 4, 1)
    assert found.macro == cell
    assert found.images == (ImageChange("p000", 2 / 3, 1), ImageChange("p001", 6 / 7, 6 / 7))
    assert [image.key for image in found.most_changed()] == ["p000"]


@pytest.mark.parametrize(("count", "gain"), [(8, 0.1), (60, 0.02)])
def test_intervals_and_p_values_equal_those_of_scipy(count: int, gain: float) -> None:
    one, two = draw_pair(count, gain)
    found = compare(store("A", one), store("B", two)).classes["cell"].dice
    positions = np.arange(count)

    def change(drawn: np.ndarray, axis: int) -> np.ndarray:
        return dice(two[drawn], -2) - dice(one[drawn], -2)

    expected = stats.bootstrap(
        (positions,), change, n_resamples=10_000, method="percentile",
        random_state=np.random.default_rng(3),
    ).confidence_interval  # fmt: skip
    width = expected.high - expected.low
    assert found.interval == pytest.approx(tuple(expected), abs=0.06 * width)
    both = np.stack([one, two])

    def swapped(x: np.ndarray, y: np.ndarray) -> float:
        # x and y: which scoring each image takes, as position + N * scoring.
        flat = both.reshape(-1, 6)
        return abs(float(dice(flat[y.astype(int)]) - dice(flat[x.astype(int)])))

    tested = stats.permutation_test(
        (positions, positions + count), swapped, permutation_type="samples", n_resamples=9999,
        vectorized=False, alternative="greater", random_state=np.random.default_rng(4),
    )  # fmt: skip
    assert abs(found.difference) == pytest.approx(tested.statistic)
    tolerance = 1e-12 if count == 8 else 0.02
    assert found.p_value == pytest.approx(tested.pvalue, abs=tolerance)
    assert 0.001 < found.p_value < 0.9


def test_all_ways_to_swap_are_enumerated_for_few_images() -> None:
    one, two = draw_pair(5)
    found = compare(store("A", one), store("B", two)).classes["cell"].dice
    observed = dice(two) - dice(one)
    ways = [
        dice(np.where(flip, one, two)) - dice(np.where(flip, two, one))
        for flips in product([False, True], repeat=5)
        for flip in [np.array(flips)[:, None]]
    ]
    assert found.p_value == np.mean(np.abs(ways) >= abs(observed) - 1e-12)


def test_neither_order_nor_memory_changes_a_digit(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = draw_pair(40, 0.03)
    first, second = store("A", one), store("B", two)
    expected = compare(first, second)
    order = np.random.default_rng(5).permutation(40)
    moved = StoredScores(
        second.place,
        second.header,
        tuple(second.keys[n] for n in order),
        second.groups,
        second.rows[order],
    )
    assert compare(first, moved) == expected
    for module in (intervals, comparison):
        monkeypatch.setattr(module, "MAX_DRAWN", 100)
    assert compare(first, second) == expected


def test_patients_are_swapped_as_one() -> None:
    one, two = draw_pair(12)
    groups = tuple(f"patient {number // 4}" for number in range(12))
    found = compare(store("A", one, groups), store("B", two, groups))
    assert (found.unit, found.num_units, found.num_permutations) == ("group", 3, 8)
    assert found.macro.dice.p_value == 2 / 8


def test_equal_scores_differ_by_nothing() -> None:
    one, _ = draw_pair(20)
    found = compare(store("A", one), store("B", one)).macro.dice
    assert (found.difference, found.interval, found.p_value) == (0, (0, 0), 1)


def test_one_image_has_neither_interval_nor_p_value() -> None:
    one, two = draw_pair(1)
    made = compare(store("A", one), store("B", two))
    assert (made.macro.dice.interval, made.macro.dice.p_value) == (None, None)
    assert made.macro.dice.difference is not None
    line = comparison.describe_method(made)
    assert line == "no intervals and p-values: they require 2 images with counted pixels"
    page = Page(comparison_page.render_comparisons([made]))
    assert "One image shows nothing about others." in page.text


def test_a_class_that_is_nowhere_has_no_difference() -> None:
    one, two = draw_pair(4)
    one[:, [1, 3, 5]] = two[:, [1, 3, 5]] = 0
    made = compare(store("A", one), store("B", two))
    assert made.macro.dice.difference is made.macro.dice.p_value is None
    assert made.images == ()
    assert made.to_plain()["images"]["undefined"] == 4
    assert "undefined in one of them" in comparison_page.render_comparisons([made])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "A and B differ in split: val, and test; evaluate both"),
        ({"empty_policy": "one"}, "differ in --empty: skip, and one"),
        ({"counted": CLASSES}, "differ in counted classes: cell, and background, cell"),
        (
            {"classes": dict.fromkeys(("background", "dog"), StoredClass(0, 0, 0))},
            "differ in classes: background, cell, and background, dog",
        ),
    ],
)
def test_other_splits_and_classes_are_refused(change: dict, message: str) -> None:
    one, two = draw_pair(3)
    with pytest.raises(comparison.DataError, match=message):
        compare(store("A", one), store("B", two, **change))


def test_other_images_are_named_and_counted() -> None:
    one, two = draw_pair(7)
    expected = re.escape("B does not have 5 images (p002, p003, p004, ...) of A; evaluate both on")
    with pytest.raises(comparison.DataError, match=expected):
        compare(store("A", one), store("B", two[:2]))
    with pytest.raises(comparison.DataError, match=re.escape("A does not have 1 image (p006) of")):
        compare(store("A", one[:6]), store("B", two))


def test_other_masks_are_named_and_counted() -> None:
    one, two = draw_pair(4)
    two[2, 1] += 1
    expected = re.escape("A and B have other masks of 1 image (p002); evaluate both on the same")
    with pytest.raises(comparison.DataError, match=expected):
        compare(store("A", one), store("B", two))


@pytest.fixture
def scored(trained: Path, make_checkpoint, shards: Path, call, tmp_path: Path) -> list[Path]:
    """A run, and a checkpoint, both evaluated."""
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(trained, run, symlinks=True)
    shutil.copytree(make_checkpoint(), other)
    for place in (run, other):
        argv = ("--checkpoint", place, "--data", shards, "--workers", 0, "--worst", 0)
        assert call("evaluate", *argv).code == 0
    return [run, other]


def test_runs_are_compared_as_table_json_and_page(scored, call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = call("compare", *scored, "--out", out)
    assert ended.code == 0, ended.err
    (made,) = json.loads((out / "comparison.json").read_text())["comparisons"]
    scores = [json.loads((place / "scores.json").read_text()) for place in scored]
    found = made["macro"]["dice"]
    assert [found["first"], found["second"]] == [score["macro"]["dice"] for score in scores]
    assert found["difference"] == found["second"] - found["first"]
    assert (made["num_images"], made["split"], made["unit"]) == (4, "val", "image")
    assert (made["exact"], made["num_permutations"]) == (True, 16)
    assert len(made["images"]["most_changed"]) == 4
    assert f"{found['difference']:+.4f}" in ended.out
    assert "10,000 paired bootstrap resamples and all 16 sign flips of 4 images" in ended.out
    page = Page((out / "comparison.html").read_text())
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert len(page.named("circle")) == 4
    assert f"The macro Dice changes by {found['difference']:+.4f}" in page.text
    before = [(out / name).read_bytes() for name in ("comparison.json", "comparison.html")]
    assert call("compare", *scored, "--out", out).code == 0
    assert [(out / name).read_bytes() for name in ("comparison.json", "comparison.html")] == before


def test_predictions_and_outputs_of_evaluate_are_compared_with_the_first(
    scored, trained, shards: Path, call, tmp_path: Path
) -> None:
    masks, out = tmp_path / "masks", tmp_path / "elsewhere"
    argv = ("--checkpoint", trained, "--input", shards, "--out", masks, "--workers", 0)
    assert call("predict", *argv).code == 0
    argv = ("--predictions", masks, "--data", shards, "--workers", 0)
    assert call("evaluate", *argv).code == 0
    assert call("evaluate", *argv, "--out", out).code == 0
    ended = call("compare", scored[0], masks, out, "--out", tmp_path / "result")
    assert ended.code == 0, ended.err
    made = json.loads((tmp_path / "result" / "comparison.json").read_text())["comparisons"]
    assert [c["second"] for c in made] == [str(masks), str(out)]
    assert [c["macro"]["dice"]["difference"] for c in made] == [0, 0]


def test_what_has_no_scores_is_scored_as_unet_evaluate_does(
    scored, trained, shards: Path, call, tmp_path: Path
) -> None:
    masks = tmp_path / "masks"
    argv = ("--checkpoint", trained, "--input", shards, "--out", masks, "--workers", 0)
    assert call("predict", *argv).code == 0
    expected = [(place / "scores.json").read_bytes() for place in scored]
    untouched = (scored[0] / "scores.csv").stat().st_mtime_ns
    (scored[1] / "scores.json").unlink()
    out = tmp_path / "result"
    ended = call("compare", *scored, masks, "--data", shards, "--out", out)
    assert ended.code == 0, ended.err
    assert f"\nunet evaluate --predictions {masks} --data {shards} --split val\n" in ended.out
    assert ended.out.startswith(f"unet evaluate --checkpoint {scored[1]} --data {shards} --split")
    assert f"unet evaluate --checkpoint {scored[0]}" not in ended.out
    assert [(place / "scores.json").read_bytes() for place in scored] == expected
    assert (scored[0] / "scores.csv").stat().st_mtime_ns == untouched
    made = json.loads((out / "comparison.json").read_text())["comparisons"]
    assert [c["macro"]["dice"]["difference"] for c in made][1] == 0
    # Everything has scores now.
    assert "unet evaluate" not in call("compare", *scored, masks, "--out", out).out


def test_outdated_scores_are_replaced_with_data(scored, shards: Path, call, tmp_path: Path) -> None:
    shutil.copy(scored[0] / "scores.json", scored[1] / "scores.json")
    ended = call("compare", *scored, "--data", shards, "--out", tmp_path / "out")
    assert ended.code == 0, ended.err
    header = json.loads((scored[1] / "scores.json").read_text())
    assert header["checkpoint"] != json.loads((scored[0] / "scores.json").read_text())["checkpoint"]


def test_without_data_the_commands_that_score_are_printed(
    scored, trained, shards: Path, call, tmp_path: Path
) -> None:
    for place in scored:
        (place / "scores.json").unlink()
    ended = call("compare", *scored, "--split", "train", "--out", tmp_path / "out")
    assert ended.code == 1
    # A run knows its data, a checkpoint does not.
    one, other = (shlex.quote(str(place)) for place in scored)
    assert ended.err == (
        f"unet compare: {scored[0]} has no scores.json, {scored[1]} has no scores.json; add --data "
        f"SHARDS, or run: unet evaluate --checkpoint {one} --data {shards} --split train && "
        f"unet evaluate --checkpoint {other} --data SHARDS --split train\n"
    )


def test_a_failed_scoring_ends_the_comparison(scored, call, tmp_path: Path) -> None:
    (scored[1] / "scores.json").unlink()
    nowhere = tmp_path / "nowhere"
    ended = call("compare", *scored, "--data", nowhere, "--out", tmp_path / "out")
    assert ended.code == 1
    assert len(ended.err.splitlines()) == 1
    assert ended.err.startswith("unet evaluate: ")
    assert not (tmp_path / "out").exists()


def test_other_splits_are_refused_before_anything_is_scored(
    scored, shards: Path, call, tmp_path: Path
) -> None:
    flags = ("--data", shards, "--out", tmp_path / "out")
    ended = call("compare", *scored, *flags, "--split", "train")
    assert (ended.code, ended.out) == (1, "")
    assert f"--split train, {scored[0]} has scores of val; run unet evaluate on" in ended.err
    argv = ("--checkpoint", scored[1], "--data", shards, "--workers", 0, "--worst", 0)
    assert call("evaluate", *argv, "--split", "train").code == 0
    ended = call("compare", *scored, *flags)
    assert (ended.code, ended.out) == (1, "")
    assert f"{scored[0]} has scores of val, {scored[1]} has scores of train; run" in ended.err
    # The split of what has scores is that of the others.
    (scored[0] / "scores.json").unlink()
    ended = call("compare", *scored, *flags)
    assert ended.code == 0, ended.err
    assert json.loads((scored[0] / "scores.json").read_text())["split"] == "train"


def test_other_folders_are_refused(scored, shards: Path, call, tmp_path: Path) -> None:
    ended = call("compare", scored[0], tmp_path, "--data", shards, "--out", tmp_path / "out")
    assert ended.code == 1
    assert f"{tmp_path} holds no run, checkpoint, predictions or scores; name a folder" in ended.err


def test_hostile_names_stay_text_on_the_page() -> None:
    one, two = draw_pair(2)
    first = store("<script>A</script>", one)
    page = Page(comparison_page.render_comparisons([compare(first, store("B", two))]))
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script>A</script>" in page.text


def test_a_large_split_is_thinned_with_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_page, "MAX_DOTS", 10)
    one, two = draw_pair(35)
    page = Page(comparison_page.render_comparisons([compare(store("A", one), store("B", two))]))
    assert len(page.named("circle")) == 9
    assert "9 of 35 images are shown, evenly spread." in page.text


def change_csv(place: Path, change: Callable[[list[list[str]]], object]) -> None:
    path = place / "scores.csv"
    with path.open(newline="") as file:
        lines = [*csv.reader(file)]
    change(lines)
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def set_cell(lines: list[list[str]], column: str, value: str) -> None:
    lines[1][lines[0].index(column)] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: (p / "scores.json").unlink(),
            " has no scores.json; add --data SHARDS, or run: ",
        ),
        (lambda p: (p / "scores.json").write_text("{"), "scores.json is damaged ("),
        (lambda p: (p / "scores.json").write_text('{"split": 3}'), "scores.json is damaged ("),
        (lambda p: (p / "scores.csv").unlink(), "scores.csv cannot be read: No such file"),
        (lambda p: (p / "scores.csv").write_text("key\n"), "is damaged (no column width); run"),
        (
            lambda p: change_csv(p, lambda lines: set_cell(lines, "tp/foreground", "-1")),
            "scores.csv is damaged (a count is not a number of pixels); run unet evaluate again",
        ),
        (
            lambda p: change_csv(p, lambda lines: set_cell(lines, "tp/foreground", "7")),
            "scores.csv does not add up to scores.json; run unet evaluate again",
        ),
        (lambda p: change_csv(p, lambda lines: lines[1].pop()), "scores.csv is damaged ("),
        (
            lambda p: change_csv(p, lambda lines: set_cell(lines, "key", lines[2][0])),
            "scores.csv has two images of one key; pack them under unique names",
        ),
        (
            lambda p: (p / "model.safetensors").open("ab").write(b"x"),
            "belongs to another checkpoint or other masks than",
        ),
    ],
)
def test_scores_that_are_damaged_or_outdated_are_refused_in_one_line(
    change: Callable[[Path], object], message: str, scored, call, tmp_path: Path
) -> None:
    change(scored[1])
    ended = call("compare", *scored, "--out", tmp_path / "out")
    assert ended.code == 1
    assert len(ended.err.splitlines()) == 1
    assert message in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("A",), "give at least two folders, got 1; for example: unet compare RUN1 RUN2"),
        (("A", "B", "A"), "A is listed twice; name each folder once"),
        (("A", "s3://bucket/B"), "FOLDER A s3://bucket/B: is a URL; give a local path"),
    ],
)
def test_what_cannot_be_compared_is_a_usage_error(given: tuple, message: str, call) -> None:
    ended = call("compare", *given)
    assert ended.code == 2
    assert message in ended.message
