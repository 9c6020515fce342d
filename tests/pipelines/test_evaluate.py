"""`evaluate`, `evaluation.score`, `evaluation.per_image`, `evaluation.table`, `drawing.panels`.

`unet evaluate`: scores that can be computed by hand, and one-line refusals.
"""

import csv
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import evaluate
from pipelines.drawing.panels import GAP, IGNORED, WRONG
from pipelines.evaluation import per_image
from pipelines.evaluation.per_image import ImageCounts, PendingCounts
from pipelines.model.load import load_model
from shards.offsets import read_offsets
from unet.metrics import confusion_per_image


@pytest.fixture
def hand(tmp_path: Path, make_checkpoint, call) -> tuple[Path, Path]:
    """A model that finds what is bright, and three images of which it gets some pixels wrong."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    #   predicted   11..   mask   1...   ..11   ....   value 9 is ignored
    for name, bright, mask in (
        ("a", [1, 1, 0, 0, 0, 0], [1, 0, 0, 1, 9, 0]),
        ("b", [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 9]),
        ("c", [0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 9]),
    ):
        pixels = np.repeat(np.array([bright], np.uint8)[..., None] * 200, 3, axis=2)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(np.array([mask], np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    classes = ("background", "cell", "ghost")
    lines = ["path,split", "a.png,val", "b.png,val", "c.png,val"]
    (tmp_path / "split.csv").write_text("\n".join(lines))
    ended = call(
        "pack",
        *("--images", tmp_path / "images", "--masks", tmp_path / "masks", "--workers", 1),
        *("--mask-format", "index", "--classes", *classes, "--ignore-value", 9),
        *("--split-file", tmp_path / "split.csv", "--out", tmp_path / "shards"),
        "--allow-absent-classes",
    )
    assert ended.code == 0, ended.err
    return make_checkpoint(classes=classes), tmp_path / "shards"


def test_scores_equal_hand_computed_values(hand, call, tmp_path: Path) -> None:
    checkpoint, data = hand
    argv = ("--checkpoint", checkpoint, "--data", data, "--out", tmp_path / "out", "--workers", 0)
    ended = call("evaluate", *argv)
    assert ended.code == 0, ended.err
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    # cell: a has tp 1, fp 1, fn 1; b has tp 3, fp 1, fn 0; c has none in what counts.
    cell = scores["classes"]["cell"]
    assert (cell["tp"], cell["fp"], cell["fn"]) == (4, 2, 1)
    assert cell["dice"] == 8 / 11
    assert cell["iou"] == 4 / 7
    assert cell["precision"] == 4 / 6
    assert cell["recall"] == 4 / 5
    assert cell["images"] == 2
    assert cell["image_dice"] == pytest.approx((2 / 4 + 6 / 7) / 2, abs=1e-9)
    assert cell["image_iou"] == pytest.approx((1 / 3 + 3 / 4) / 2, abs=1e-9)
    assert scores["confusion"] == [[8, 2, 0], [1, 4, 0], [0, 0, 0]]
    # A class that occurs nowhere has no score and enters no mean; nor does the background.
    ghost = scores["classes"]["ghost"]
    assert [ghost[name] for name in ("dice", "iou", "precision", "recall")] == [None] * 4
    assert scores["macro"] == {"dice": 8 / 11, "iou": 4 / 7}
    assert scores["micro"] == {"dice": 8 / 11, "iou": 4 / 7}
    assert scores["per_image"]["dice"] == cell["image_dice"]
    assert scores["counted"] == ["cell", "ghost"]
    assert scores["classes"]["background"]["dice"] == 16 / 19
    assert (scores["num_images"], scores["split"]) == (3, "val")
    assert scores["empty_policy"] == "skip"
    assert (scores["tile"], scores["overlap"], scores["tta"]) == (1024, 0.25, False)
    weights = (checkpoint / "model.safetensors").read_bytes()
    assert scores["checkpoint"] == hashlib.sha256(weights).hexdigest()
    assert scores["manifest"] == hashlib.sha256((data / "index.json").read_bytes()).hexdigest()
    assert "0.7273" in ended.out
    assert "n/a" in ended.out


@pytest.mark.parametrize(
    ("empty", "image_dice", "ghost"),
    [("one", (2 / 4 + 6 / 7 + 1) / 3, 1), ("zero", (2 / 4 + 6 / 7 + 0) / 3, 0)],
)
def test_what_an_absent_class_scores_can_be_declared(
    empty: str, image_dice: float, ghost: int, hand, call, tmp_path: Path
) -> None:
    checkpoint, data = hand
    argv = ("--checkpoint", checkpoint, "--data", data, "--out", tmp_path / "out", "--workers", 0)
    ended = call("evaluate", *argv, "--empty", empty)
    assert ended.code == 0, ended.err
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["empty_policy"], scores["num_images"], scores["num_valid"]) == (empty, 3, 3)
    # The cell is in two of the three images, the ghost in none.
    assert scores["classes"]["cell"]["image_dice"] == pytest.approx(image_dice, abs=1e-9)
    assert scores["classes"]["cell"]["dice"] == 8 / 11
    assert scores["classes"]["ghost"]["dice"] == ghost
    assert scores["macro"]["dice"] == pytest.approx((8 / 11 + ghost) / 2)
    assert scores["per_image"]["dice"] == pytest.approx((image_dice + ghost) / 2, abs=1e-9)


@pytest.mark.parametrize(
    ("more", "tolerance", "of_a", "of_b"), [((), 2, 1, 1), ((0.5,), 0.5, 2 / 4, 6 / 7)]
)
def test_boundary_scores_equal_hand_computed_values(
    more: tuple, tolerance: float, of_a: float, of_b: float, hand, call, tmp_path: Path
) -> None:
    checkpoint, data = hand
    argv = ("--checkpoint", checkpoint, "--data", data, "--out", tmp_path / "out", "--workers", 0)
    given = ("--surface", *(("--surface-tolerance", *more) if more else ()), "--empty", "one")
    ended = call("evaluate", *argv, *given)
    assert ended.code == 0, ended.err
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    # a: mask pixels 0 and 3 are 0 and 2 from the prediction's 0 and 1, these 0 and 1 from them;
    # b: the prediction's four are 0 0 0 1 from the mask's three; c: no cell in what counts.
    cell, ghost = scores["classes"]["cell"], scores["classes"]["ghost"]
    assert cell["hd95"] == pytest.approx((1.9 + 0.85) / 2, abs=1e-7)
    assert cell["surface_dice"] == pytest.approx((of_a + of_b) / 2, abs=1e-9)
    assert cell["surface_failures"] == scores["surface_failures"] == 0
    # The policy is about Dice and IoU.
    assert (ghost["dice"], ghost["hd95"], ghost["surface_dice"]) == (1, None, None)
    assert scores["per_image"]["hd95"] == cell["hd95"]
    assert scores["per_image"]["surface_dice"] == cell["surface_dice"]
    assert scores["classes"]["background"]["hd95"] > 0
    assert scores["surface_tolerance"] == tolerance
    header, *_ = ended.out.splitlines()
    assert header.split()[-3:] == ["HD95", "sDice", "failed"]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def test_each_image_has_a_line_of_hand_computed_scores(hand, call, tmp_path: Path) -> None:
    checkpoint, data = hand
    argv = ("--checkpoint", checkpoint, "--data", data, "--out", tmp_path / "out", "--workers", 0)
    ended = call("evaluate", *argv)
    assert ended.code == 0, ended.err
    assert "scores.csv" in ended.out
    lines = read_csv(tmp_path / "out" / "scores.csv")
    order = [read_offsets(data / "val-000000.tar")[row].key for row in range(3)]
    assert [line["key"] for line in lines] == order
    assert {(line["width"], line["height"]) for line in lines} == {("6", "1")}
    a, b, c = sorted(lines, key=lambda line: line["key"])
    # The ghost is nowhere; the cell is not in c, whose ignored pixel is the only bright one.
    assert (float(a["dice/cell"]), float(a["iou/cell"])) == (2 / 4, 1 / 3)
    assert (float(b["dice/cell"]), float(b["iou/cell"])) == (6 / 7, 3 / 4)
    assert float(a["dice/background"]) == 4 / 6
    assert (c["dice/cell"], c["iou/cell"], c["dice"], c["iou"]) == ("", "", "", "")
    assert {line[f"{score}/ghost"] for line in lines for score in ("dice", "iou")} == {""}
    # The background counts in no mean.
    assert [float(line["dice"]) for line in (a, b)] == [2 / 4, 6 / 7]


@pytest.mark.parametrize("empty", ["skip", "one", "zero"])
def test_the_lines_of_the_images_add_up_to_the_scores(
    empty: str, hand, call, tmp_path: Path
) -> None:
    checkpoint, data = hand
    argv = ("--checkpoint", checkpoint, "--data", data, "--out", tmp_path / "out", "--workers", 0)
    assert call("evaluate", *argv, "--empty", empty, "--worst", 0).code == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    lines = read_csv(tmp_path / "out" / "scores.csv")
    assert len(lines) == scores["num_images"] == 3
    for score in ("dice", "iou"):
        means = {}
        for name, found in scores["classes"].items():
            of = [float(line[f"{score}/{name}"]) for line in lines if line[f"{score}/{name}"]]
            means[name] = np.mean(of) if of else None
            assert means[name] == (
                None if not of else pytest.approx(found[f"image_{score}"], abs=1e-9)
            )
            assert empty != "skip" or len(of) == found["images"]
        counted = [means[name] for name in scores["counted"] if means[name] is not None]
        assert np.mean(counted) == pytest.approx(scores["per_image"][score], abs=1e-9)


def test_the_worst_images_are_drawn_beside_their_masks(hand, call, tmp_path: Path) -> None:
    checkpoint, data = hand
    out = tmp_path / "out"
    argv = ("--checkpoint", checkpoint, "--data", data, "--out", out, "--workers", 0)
    assert call("evaluate", *argv).code == 0
    # Of c nothing can be message.
    names = sorted(path.name for path in (out / "worst").iterdir())
    assert names == ["1-0.5000-a.png", "2-0.8571-b.png"]
    drawn = np.asarray(Image.open(out / "worst" / names[0]))
    assert drawn.shape == (1, 4 * 6 + 3 * GAP, 3)
    image, truth, prediction, difference = (
        drawn[0, number * (6 + GAP) :][:6].tolist() for number in range(4)
    )
    black, red = [0, 0, 0], [255, 51, 51]
    assert image == [[200] * 3] * 2 + [black] * 4
    assert truth == [red, black, black, red, [*IGNORED], black]
    assert prediction == [red, red, black, black, black, black]
    bright = [120, 120, 120]
    assert difference == [bright, [*WRONG], black, [*WRONG], [*IGNORED], black]


def test_images_of_other_scores_do_not_stay_and_other_files_do(hand, call, tmp_path: Path) -> None:
    checkpoint, data = hand
    folder = tmp_path / "out" / "worst"
    folder.mkdir(parents=True)
    for name in ("8-0.1234-gone.png", "mine.png"):
        (folder / name).write_bytes(b"")
    argv = ("--checkpoint", checkpoint, "--data", data, "--out", tmp_path / "out", "--workers", 0)
    assert call("evaluate", *argv, "--worst", 1).code == 0
    assert {path.name for path in folder.iterdir()} == {"1-0.5000-a.png", "mine.png"}
    assert call("evaluate", *argv, "--worst", 0).code == 0
    assert {path.name for path in folder.iterdir()} == {"mine.png"}


def test_a_large_image_is_drawn_smaller(make_checkpoint, call, tmp_path: Path) -> None:
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    image = np.zeros((40, 2000), np.uint8)
    image[:, 500:] = 255
    Image.merge("RGB", [Image.fromarray(image)] * 3).save(tmp_path / "images" / "a.png")
    Image.fromarray(np.roll(image, 40)).save(tmp_path / "masks" / "a.png")
    folders = ("--images", tmp_path / "images", "--masks", tmp_path / "masks", "--workers", 1)
    packed = ("--mask-format", "binary", "--val-fraction", 0, "--out", tmp_path / "data")
    assert call("pack", *folders, *packed).code == 0
    argv = ("--checkpoint", make_checkpoint(), "--data", tmp_path / "data", "--split", "train")
    assert call("evaluate", *argv, "--out", tmp_path / "out", "--workers", 0).code == 0
    (drawn,) = (tmp_path / "out" / "worst").iterdir()
    assert Image.open(drawn).size == (4 * 1000 + 3 * GAP, 20)


@pytest.mark.ranks
def test_every_file_is_the_same_for_any_number_of_ranks(
    make_checkpoint, shards: Path, launch, call, content, tmp_path: Path
) -> None:
    argv = ("--checkpoint", make_checkpoint(), "--data", shards, "--worst", 2, "--batch-size", 1)
    assert call("evaluate", *argv, "--out", tmp_path / "1", "--workers", 0).code == 0
    expected = content(tmp_path / "1")
    assert {name.partition("/")[0] for name in expected} == {"scores.json", "scores.csv", "worst"}
    assert len(read_csv(tmp_path / "1" / "scores.csv")) == 4
    for world in (2, 3):
        ended = launch(world, "evaluate", *argv, "--out", tmp_path / str(world), "--workers", 0)
        assert ended.code == 0, ended.err
        assert content(tmp_path / str(world)) == expected


class Meeting:
    """Stands in for the Accelerator of rank 0: knows what all ranks would send, call by call."""

    is_main_process, device = True, torch.device("cpu")

    def __init__(self, everyone: list[ImageCounts]) -> None:
        self.everyone, self.sent = everyone, 0

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        first, self.sent = self.sent, self.sent + len(mine)
        parts = [counts.rows[first : self.sent].astype(np.int64) for counts in self.everyone]
        padded = [np.pad(part, ((0, len(mine) - len(part)), (0, 0))) for part in parts]
        np.testing.assert_array_equal(mine.numpy(), padded[0])
        return torch.from_numpy(np.concatenate(padded))


@pytest.mark.parametrize("most", [2**22, 30])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_counts_come_together_in_pieces_as_they_do_at_once(
    world: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(per_image, "MAX_GATHERED", most)
    given = {"batch_size": 2, "world": world}
    everyone = [ImageCounts((5, 1, 7), 2, rank=rank, **given) for rank in range(world)]
    mask = torch.zeros(1, 3, 4, dtype=torch.uint8)
    for counts in everyone:
        first, last = counts.first, counts.first + len(counts.rows)
        for position in range(first, last):
            prediction = torch.zeros_like(mask)
            prediction.view(-1)[: position % 12] = 1
            confusion = confusion_per_image(prediction, mask, 2)
            counts.update(confusion, torch.tensor([position]), (3, 4))
    whole = everyone[0].gather(Meeting(everyone))
    wrong = np.arange(13) % 12
    expected = np.stack([0 * wrong + 4, 0 * wrong + 3, 12 - wrong, 0 * wrong, 0 * wrong,
                         wrong, wrong, 0 * wrong], axis=1)  # fmt: skip
    np.testing.assert_array_equal(whole, expected)


def test_counts_of_a_gpu_are_read_once_they_have_arrived() -> None:
    class Copy:
        """Stands in for the event after a copy; the numbers are there once it is waited for."""

        def synchronize(self) -> None:
            counted[:] = torch.arange(6).expand(2, 6)

    counts = ImageCounts((3,), 2, batch_size=2, rank=0, world=1)
    counted = torch.full((2, 6), 99)
    counts._pending = PendingCounts(np.array([0, 2]), (5, 7), counted, Copy())
    counts.update(torch.eye(2, dtype=torch.int64)[None], torch.tensor([1]), (3, 4))
    first = [7, 5, 0, 1, 2, 3, 4, 5]
    assert counts.rows.tolist() == [first, [4, 3, 1, 1, 0, 0, 0, 0], first]


def test_boundaries_cost_nothing_and_are_nowhere_unless_asked_for(
    hand, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoint, data = hand
    argv = ("--checkpoint", checkpoint, "--data", data, "--out", tmp_path / "out", "--workers", 0)
    # As if SciPy were not installed.
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    ended = call("evaluate", *argv)
    assert ended.code == 0, ended.err
    assert "surface" not in (tmp_path / "out" / "scores.json").read_text()
    assert "HD95" not in ended.out


def test_boundaries_without_scipy_are_refused_before_any_work(
    call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    nowhere = ("--checkpoint", tmp_path / "nowhere", "--data", tmp_path / "nowhere")
    ended = call("evaluate", *nowhere, "--surface")
    message = "unet evaluate: --surface requires SciPy: pip install 'unet-shards[scipy]'\n"
    assert (ended.code, ended.err) == (2, message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--surface-tolerance", 3), "--surface-tolerance requires --surface"),
        (
            ("--surface", "--surface-tolerance", -1),
            "--surface-tolerance must be a number >= 0, got -1.0",
        ),
        (
            ("--surface", "--surface-tolerance", "nan"),
            "--surface-tolerance nan: not a finite number",
        ),
        (("--empty", "two"), "--empty"),
        (("--worst", -1), "--worst must be >= 0, got -1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given: tuple, message: str, call) -> None:
    ended = call("evaluate", "--checkpoint", "x", "--data", "x", *given)
    assert ended.code == 2
    assert message in ended.message


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_neither_workers_nor_batches_change_a_digit(
    batch_size: int, workers: int, hand, call, tmp_path: Path
) -> None:
    checkpoint, data = hand
    argv = ("--checkpoint", checkpoint, "--data", data, "--surface")
    assert call("evaluate", *argv, "--out", tmp_path / "1", "--workers", 0).code == 0
    more = ("--batch-size", batch_size, "--workers", workers)
    assert call("evaluate", *argv, "--out", tmp_path / "2", *more).code == 0
    one, two = ((tmp_path / name / "scores.json").read_bytes() for name in "12")
    assert one == two


def test_perfect_predictions_score_one(make_checkpoint, draw, call, tmp_path: Path) -> None:
    folder = draw(tmp_path / "in", 4)
    for path in (folder / "masks").iterdir():
        mask = Image.open(path)
        Image.merge("RGB", [mask] * 3).save(folder / "images" / path.name)
    folders = ("--images", folder / "images", "--masks", folder / "masks", "--workers", 1)
    packed = ("--mask-format", "binary", "--val-fraction", 0, "--out", tmp_path / "data")
    assert call("pack", *folders, *packed).code == 0
    argv = ("--checkpoint", make_checkpoint(), "--data", tmp_path / "data", "--split", "train")
    # Also in tiles.
    for tile in (1024, 32):
        more = ("--out", tmp_path / "out", "--workers", 0, "--tile", tile)
        assert call("evaluate", *argv, *more).code == 0
        scores = json.loads((tmp_path / "out" / "scores.json").read_text())
        assert scores["macro"] == scores["micro"] == scores["per_image"] == {"dice": 1, "iou": 1}


def test_the_scores_of_a_run_lie_in_its_folder_and_are_those_of_its_best(
    trained: Path, shards: Path, call, metrics, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    ended = call("evaluate", "--checkpoint", run, "--data", shards, "--workers", 0)
    assert ended.code == 0
    scores = json.loads((run / "scores.json").read_text())
    best = max(line["val/dice"] for line in metrics(run) if "val/dice" in line)
    assert scores["macro"]["dice"] == best


def test_a_split_that_is_missing_names_those_there_are(trained, shards, call) -> None:
    ended = call("evaluate", "--checkpoint", trained, "--data", shards, "--split", "test")
    assert ended.code == 1
    assert "has no samples in the split 'test'; splits with samples: train, val" in ended.err


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"classes": ("background", "nucleus")}, "has the classes background, nucleus, "),
        ({"classes": ("background", "a", "b")}, "they must be the same"),
        ({"channels": "L"}, "was trained on L images, "),
    ],
)
def test_a_model_of_something_else_is_refused(
    made: dict, message: str, make_checkpoint, shards: Path, call, tmp_path: Path
) -> None:
    argv = ("--checkpoint", make_checkpoint(**made), "--data", shards, "--out", tmp_path / "out")
    ended = call("evaluate", *argv)
    assert ended.code == 1
    assert message in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_images_without_masks_cannot_be_scored(
    workers: int, make_checkpoint, cells: Path, call, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    assert call("pack", "--images", cells / "images", "--out", data, "--workers", 1).code == 0
    manifest = json.loads((data / "index.json").read_text())
    manifest.update(classes=["background", "foreground"], palette=[[0, 0, 0], [1, 1, 1]])
    (data / "index.json").write_text(json.dumps(manifest))
    argv = ("--checkpoint", make_checkpoint(), "--data", data, "--split", "unlabelled")
    ended = call("evaluate", *argv, "--out", tmp_path / "out", "--workers", workers)
    assert ended.code == 1
    assert "has no mask; pack the images with --masks" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_does_not_decode_is_never_skipped(
    workers: int, make_checkpoint, shards: Path, call, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    path = data / "val-000001.tar"
    entry = read_offsets(path)[0]
    with path.open("r+b") as file:
        file.seek(entry.image.offset)
        file.write(bytes(16))
    argv = ("--checkpoint", make_checkpoint(), "--data", data, "--out", tmp_path / "out")
    ended = call("evaluate", *argv, "--workers", workers)
    assert ended.code == 1
    assert f"{path}: {entry.key} " in ended.err.strip().splitlines()[-1]
    assert "Traceback" not in ended.err
    assert not (tmp_path / "out").exists()


def test_a_flipped_byte_is_found_by_verify_shards_alone(
    make_checkpoint, shards: Path, call, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(shards, data)
    argv = (
        *("--checkpoint", make_checkpoint(), "--data", data),
        *("--out", tmp_path / "out", "--workers", 0),
    )
    assert call("evaluate", *argv, "--verify-shards").code == 0
    for name, code in (("train-000001.tar", 0), ("val-000001.tar", 1)):
        path = data / name
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
        assert call("evaluate", *argv).code == 0
        # Only the split that is scored is read.
        ended = call("evaluate", *argv, "--verify-shards")
        assert ended.code == code
    assert f"{path} does not match the manifest (sha256); copy or pack it again" in ended.err


def test_a_checkpoint_that_is_not_a_folder_needs_a_place_for_its_scores(
    make_checkpoint, shards: Path, call, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(str(make_checkpoint()))
    monkeypatch.setattr(evaluate, "load_models", lambda *_, **__: loaded)
    ended = call("evaluate", "--checkpoint", "owner/name", "--data", shards)
    assert ended.code == 2
    assert "use --out to choose where scores are written" in ended.err


def test_a_folder_that_is_not_a_data_set_is_refused(trained: Path, call, tmp_path: Path) -> None:
    ended = call("evaluate", "--checkpoint", trained, "--data", tmp_path / "nowhere")
    assert (ended.code, "does not exist" in ended.err) == (1, True)
    ended = call("evaluate", "--checkpoint", trained, "--data", tmp_path)
    assert (ended.code, "is not a data set (it has no index.json)" in ended.err) == (1, True)
