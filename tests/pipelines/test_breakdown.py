"""`evaluation.breakdown`, `evaluation.groups`: scores per patient or per column of a CSV file."""

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipelines.evaluation.breakdown import MAX_LINES, Breakdown, Labels, break_down, format_parts
from pipelines.evaluation.groups import number_groups, read_groups
from pipelines.loading.dataset import DataSet
from shards.manifest import read_manifest
from shards.offsets import read_offsets
from shards.store import Store


@dataclass(frozen=True)
class Case:
    """A checkpoint and a data set of seven images of three patients."""

    checkpoint: Path
    data: Path
    out: Path

    @property
    def flags(self) -> tuple[object, ...]:
        return (
            *("--checkpoint", self.checkpoint, "--data", self.data, "--split", "train"),
            *("--out", self.out, "--workers", 0, "--worst", 0),
        )

    def read(self) -> dict:
        return json.loads((self.out / "scores.json").read_text())

    def lines(self, name: str = "scores.csv") -> list[dict[str, str]]:
        with (self.out / name).open(newline="") as file:
            return [*csv.DictReader(file)]


@pytest.fixture
def patients(draw, call, make_checkpoint, tmp_path: Path) -> Case:
    folder = tmp_path / "in"
    for number, count in enumerate((3, 3, 1)):
        draw(folder, count, name=f"pat{number}_{{:02d}}", seed=number)
    folders = ("--images", folder / "images", "--masks", folder / "masks", "--workers", 1)
    how = ("--mask-format", "binary", "--val-fraction", 0, "--group-by", "(pat[0-9]+)_")
    data = tmp_path / "data"
    ended = call("pack", *folders, *how, "--samples-per-shard", 2, "--out", data)
    assert ended.code == 0, ended.err
    return Case(make_checkpoint(), data, tmp_path / "out")


def counts_of(lines: list[dict[str, str]], name: str = "foreground") -> np.ndarray:
    return np.array([[int(line[f"{c}/{name}"]) for c in ("tp", "fp", "fn")] for line in lines])


def dice_of(counts: np.ndarray) -> float:
    tp, fp, fn = counts.sum(axis=0).tolist()
    return 2 * tp / (2 * tp + fp + fn)


def test_patients_are_resampled_where_the_data_set_has_them(patients: Case, call) -> None:
    ended = call("evaluate", *patients.flags)
    assert ended.code == 0, ended.err
    assert "95% intervals: 10,000 bootstrap resamples of 3 groups" in ended.out
    found = patients.read()["intervals"]
    assert (found["unit"], found["num_units"]) == ("group", 3)
    lines = patients.lines()
    assert [line["group"] for line in lines] == [line["key"][:4] for line in lines]
    # All 27 resamples of three patients.
    own = [counts_of([line for line in lines if line["group"] == f"pat{n}"]) for n in range(3)]
    every = [dice_of(np.concatenate([own[a], own[b], own[c]]))
             for a in range(3) for b in range(3) for c in range(3)]  # fmt: skip
    low, high = found["classes"]["foreground"]["dice"]
    assert (low, high) == pytest.approx((min(every), max(every)), abs=1e-12)


def test_the_counts_of_the_images_are_written_and_add_up(patients: Case, call) -> None:
    assert call("evaluate", *patients.flags).code == 0
    scores = patients.read()
    for name, expected in scores["classes"].items():
        summed = counts_of(patients.lines(), name).sum(axis=0).tolist()
        assert summed == [expected[count] for count in ("tp", "fp", "fn")]


def test_each_patient_is_scored(patients: Case, call) -> None:
    ended = call("evaluate", *patients.flags, "--per", "group")
    assert ended.code == 0, ended.err
    groups, lines = patients.read()["groups"], patients.lines()
    assert (groups["per"], groups["num_others"]) == ("group", 0)
    assert [part["value"] for part in groups["parts"]] == ["pat0", "pat1", "pat2"]
    assert [part["num_images"] for part in groups["parts"]] == [3, 3, 1]
    for part, row in zip(groups["parts"], patients.lines("groups.csv"), strict=True):
        own = counts_of([line for line in lines if line["group"] == part["value"]])
        assert part["macro"]["dice"] == part["classes"]["foreground"]["dice"] == dice_of(own)
        assert part["intervals"]["unit"] == "image"
        assert (row["group"], int(row["images"])) == (part["value"], len(own))
        assert float(row["dice/foreground"]) == float(row["dice"]) == dice_of(own)
        assert f"{part['value']}" in ended.out
    # One image has no interval.
    assert groups["parts"][2]["intervals"]["macro"]["dice"] is None
    assert (row["dice_low"], row["dice_high/foreground"]) == ("", "")
    # Without --per, none of it stays.
    assert call("evaluate", *patients.flags).code == 0
    assert "groups" not in patients.read()
    assert not (patients.out / "groups.csv").exists()


def write_columns(path: Path, lines: list[dict[str, str]], header: str = "key,site") -> Path:
    rows = [f"{line['key']},{'north' if i % 2 else 'south'}" for i, line in enumerate(lines)]
    path.write_text("\n".join([header, *rows, "elsewhere,north"]) + "\n")
    return path


@pytest.mark.parametrize("by_path", [False, True])
def test_each_site_of_a_table_is_scored_and_patients_are_resampled(
    by_path: bool, patients: Case, call, tmp_path: Path
) -> None:
    assert call("evaluate", *patients.flags).code == 0
    lines = patients.lines()
    table = write_columns(tmp_path / "sites.csv", lines)
    if by_path:
        text = table.read_text().replace("key,", "path,")
        table.write_text(text.replace(",north", ".png,north").replace(",south", ".png,south"))
    ended = call("evaluate", *patients.flags, "--per", "site", "--columns", table)
    assert ended.code == 0, ended.err
    assert "ignoring 1 rows of images that are not in the split" in ended.out
    groups = patients.read()["groups"]
    assert groups["num_others"] == 1
    assert [(p["value"], p["num_images"]) for p in groups["parts"]] == [("north", 3), ("south", 4)]
    for part, own in zip(groups["parts"], (lines[1::2], lines[::2]), strict=True):
        assert part["macro"]["dice"] == dice_of(counts_of(own))
        found = part["intervals"]
        assert (found["unit"], found["num_units"]) == ("group", len({r["group"] for r in own}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace("key,site", "name,site"), "sites.csv has neither a column key nor"),
        (lambda t: t.replace("key,site", "key,hospital"), "no column site; its columns are key, h"),
        (lambda t: t.replace("pat1_00", "pat9_00"), "sites.csv has no row of pat1_00; add a row"),
        (lambda t: t.replace("pat1_00", "pat1_01"), "is a second row of pat1_01; correct the file"),
        (lambda t: t.replace("north\n", "\n", 1), " has no site of pat"),
        (lambda t: t.replace("north\n", "north,x\n", 1), "has 3 cells, its header 2; correct"),
        (lambda t: t.replace("pat1_00", '"pat1_00'), "is not a CSV file in UTF-8"),
        (lambda t: t.replace("key,site", "key,site\udcff"), "is not a CSV file in UTF-8"),
        (None, "sites.csv cannot be read: No such file or directory"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_before_scoring(
    change, message: str, patients: Case, call, tmp_path: Path
) -> None:
    assert call("evaluate", *patients.flags).code == 0
    table = write_columns(tmp_path / "sites.csv", patients.lines())
    before = (patients.out / "scores.json").stat().st_ino
    if change is None:
        table.unlink()
    else:
        table.write_bytes(change(table.read_text()).encode("utf-8", "surrogateescape"))
    ended = call("evaluate", *patients.flags, "--per", "site", "--columns", table)
    assert ended.code == 1
    assert message in ended.err
    assert (patients.out / "scores.json").stat().st_ino == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--per", "site"), "--per site requires --columns FILE.csv, which has that column"),
        (("--columns", "x.csv"), "--columns requires --per COLUMN"),
    ],
)
def test_flags_that_mean_nothing_alone_are_refused(given: tuple, message: str, call) -> None:
    ended = call("evaluate", "--checkpoint", "x", "--data", "x", *given)
    assert ended.code == 2
    assert message in ended.message


def test_a_data_set_without_groups_has_no_scores_per_group(
    make_checkpoint, shards: Path, call, tmp_path: Path
) -> None:
    flags = ("--checkpoint", make_checkpoint(), "--data", shards, "--out", tmp_path / "out")
    ended = call("evaluate", *flags, "--workers", 0, "--per", "group")
    message = (
        f"--per group: {shards} has no groups in val; pack it with --group-by, or use --columns"
    )
    assert (ended.code, ended.err) == (1, f"unet evaluate: {message}\n")


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (b"{", "is damaged"),
        (b'{"group": 3}', "group must be a string, got 3; pack it again"),
    ],
)
def test_a_damaged_group_is_named(
    info: bytes, message: str, patients: Case, call, tmp_path: Path
) -> None:
    data = tmp_path / "damaged"
    shutil.copytree(patients.data, data)
    path = data / "train-000000.tar"
    entry = read_offsets(path)[0]
    with path.open("r+b") as file:
        file.seek(entry.info.offset)
        file.write(info.ljust(entry.info.size))
    ended = call("evaluate", *patients.flags, "--data", data, "--per", "group")
    assert ended.code == 1
    assert f"{path}: {entry.key}.json" in ended.err
    assert message in ended.err


def test_groups_of_some_images_are_read_without_the_others(patients: Case) -> None:
    manifest = read_manifest(patients.data)
    data = DataSet(Store(patients.data), manifest, None, workers=0)
    every = read_groups(data, "train", range(7))
    assert sorted(every) == ["pat0"] * 3 + ["pat1"] * 3 + ["pat2"]
    assert read_groups(data, "train", [5, 0]) == [every[5], every[0]]


def test_images_without_a_group_are_units_of_their_own() -> None:
    assert number_groups([None, None]) is None
    assert number_groups(["b", None, "b", "a", None]).tolist() == [0, 1, 0, 2, 3]


def test_a_long_table_is_cut_with_a_count() -> None:
    rows = np.ones((MAX_LINES + 5, 2 + 3), np.uint32)
    labels = Labels("site", tuple(f"site {n:03d}" for n in range(len(rows))))
    made: Breakdown = break_down(labels, rows, [None] * len(rows), ("cell",), (0,), "skip")
    assert len(made.parts) == MAX_LINES + 5
    lines = format_parts(made).splitlines()
    assert len(lines) == MAX_LINES + 2
    assert lines[-1] == "and 5 more: groups.csv"


@pytest.mark.ranks
def test_groups_are_the_same_for_any_number_of_ranks(
    patients: Case, call, launch, content, tmp_path: Path
) -> None:
    assert call("evaluate", *patients.flags).code == 0
    table = write_columns(tmp_path / "sites.csv", patients.lines())
    more = ("--per", "site", "--columns", table, "--batch-size", 2)
    assert call("evaluate", *patients.flags, *more).code == 0
    expected = content(patients.out)
    assert {*expected} == {"scores.json", "scores.csv", "groups.csv"}
    for world in (2, 3):
        out = tmp_path / str(world)
        ended = launch(world, "evaluate", *patients.flags, *more, "--out", out)
        assert ended.code == 0, ended.err
        assert content(out) == expected
