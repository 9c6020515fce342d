"""`evaluation.stored_predictions`.

`unet evaluate --predictions`: the scores of the checkpoint, from the masks that it predicted.
"""

import io
import json
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from shards.manifest import read_manifest


@pytest.fixture(scope="module")
def predicted(trained: Path, shards: Path, call, tmp_path_factory) -> Path:
    """Masks for all images of the data set, train and val, in shards of five."""
    out = tmp_path_factory.mktemp("predicted") / "masks"
    ended = predict(call, trained, shards, out)
    assert ended.code == 0, ended.err
    return out


def predict(call, checkpoint: Path, given: object, out: Path, *more: object):
    flags = ("--samples-per-shard", 5, "--workers", 0)
    return call(
        "predict", "--checkpoint", checkpoint, "--input", given, "--out", out, *flags, *more
    )


def evaluate(call, shards: Path, out: Path, *more: object):
    return call("evaluate", "--data", shards, "--out", out, "--workers", 0, *more)


def pack(call, folder: Path, out: Path, *more: object) -> Path:
    """The pairs in a folder as shards, all of them for training."""
    folders = ("--images", folder / "images", "--masks", folder / "masks", "--workers", 1)
    flags = ("--mask-format", "binary", "--val-fraction", 0, "--out", out)
    assert call("pack", *folders, *flags, *more).code == 0
    return out


def without_source(found: dict[str, bytes]) -> dict[str, object]:
    """Files of an evaluation, less the line that only predictions have."""
    scores = json.loads(found["scores.json"])
    assert [*scores].count("predictions") <= 1
    scores.pop("predictions", None)
    return {**found, "scores.json": json.dumps(scores)}


@pytest.mark.parametrize("batch_size", [4, 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_file_is_that_of_the_checkpoint_to_the_last_byte(
    batch_size: int, workers: int, trained, predicted, shards, call, content, tmp_path: Path
) -> None:
    more = ("--surface", "--worst", 3)
    by_model = evaluate(call, shards, tmp_path / "model", "--checkpoint", trained, *more)
    argv = ("--batch-size", batch_size, "--workers", workers)
    by_masks = evaluate(call, shards, tmp_path / "masks", "--predictions", predicted, *argv, *more)
    assert (by_model.code, by_masks.code) == (0, 0), by_masks.err
    expected, found = content(tmp_path / "model"), content(tmp_path / "masks")
    assert {name.partition("/")[0] for name in expected} == {"scores.json", "scores.csv", "worst"}
    assert without_source(found) == without_source(expected)
    assert by_masks.out.replace("/masks", "/model") == by_model.out
    scores = json.loads(found["scores.json"])
    assert scores["predictions"] == read_manifest(predicted).digest
    assert scores["num_images"] == 4
    assert scores["macro"]["dice"] is not None


def test_masks_of_the_folder_that_was_packed_are_found_too(
    trained, predicted, shards, cells: Path, call, content, tmp_path: Path
) -> None:
    assert predict(call, trained, cells / "images", tmp_path / "of folder").code == 0
    for name, masks in (("1", predicted), ("2", tmp_path / "of folder")):
        assert evaluate(call, shards, tmp_path / name, "--predictions", masks).code == 0
    one, two = (content(tmp_path / name) for name in "12")
    assert without_source(one) == without_source(two)


def test_masks_of_other_splits_are_counted_and_do_no_harm(
    trained, predicted, shards, call, content, tmp_path: Path
) -> None:
    ended = evaluate(call, shards, tmp_path / "all", "--predictions", predicted)
    assert f"{predicted}: ignoring 8 masks of images that are not in val" in ended.err
    assert predict(call, trained, f"{shards}/val-*.tar", tmp_path / "of val").code == 0
    ended = evaluate(call, shards, tmp_path / "val", "--predictions", tmp_path / "of val")
    assert "that are not in" not in ended.err
    one, two = (content(tmp_path / name) for name in ("all", "val"))
    assert without_source(one) == without_source(two)


@pytest.mark.ranks
def test_every_file_is_the_same_for_any_number_of_ranks(
    predicted, shards, call, launch, content, tmp_path: Path
) -> None:
    argv = ("--predictions", predicted, "--worst", 2, "--batch-size", 1, "--surface")
    assert evaluate(call, shards, tmp_path / "1", *argv).code == 0
    expected = content(tmp_path / "1")
    for world in (2, 3):
        out = tmp_path / str(world)
        ended = launch(world, "evaluate", "--data", shards, "--out", out, "--workers", 0, *argv)
        assert ended.code == 0, ended.err
        assert content(out) == expected
        assert ended.err.count("masks of images that are not in val") == 1


def test_scores_lie_with_the_masks_by_default(predicted, shards, call, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    shutil.copytree(predicted, masks)
    assert call("evaluate", "--data", shards, "--predictions", masks, "--workers", 0).code == 0
    assert {"scores.json", "scores.csv", "worst"} < {path.name for path in masks.iterdir()}
    # It is still what it was.
    assert evaluate(call, shards, tmp_path / "again", "--predictions", masks).code == 0


def test_masks_that_others_predicted_are_scored_as_well(shards, call, tmp_path: Path) -> None:
    # The truth, as somebody might have packed it, is predicted perfectly by itself.
    ended = evaluate(call, shards, tmp_path, "--predictions", shards, "--split", "train")
    assert ended.code == 0, ended.err
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["macro"] == scores["micro"] == scores["per_image"] == {"dice": 1, "iou": 1}
    # Nobody wrote down what made them.
    made = [scores[name] for name in ("checkpoint", "tile", "overlap", "tta")]
    assert made == [None, None, None, None]


def test_masks_of_indexed_tars_are_found_by_their_bare_names(
    make_checkpoint, call, draw, tmp_path: Path
) -> None:
    folder, tars = draw(tmp_path / "in", 3), tmp_path / "tars"
    tars.mkdir()
    with tarfile.open(tars / "val-0.tar", "w") as tar:
        for path in sorted((folder / "images").iterdir()):
            tar.add(path, f"deep/{path.stem}.v1.png")
            mask = np.asarray(Image.open(folder / "masks" / path.name)) // 255
            data = io.BytesIO()
            Image.fromarray(mask.astype(np.uint8)).save(data, "PNG")
            member = tarfile.TarInfo(f"deep/{path.stem}.v1.mask.png")
            member.size = data.tell()
            tar.addfile(member, io.BytesIO(data.getvalue()))
    classes = ("--classes", "background", "foreground")
    assert call("index", tars, *classes, "--workers", 1).code == 0
    model = make_checkpoint()
    assert predict(call, model, tars, tmp_path / "masks").code == 0
    ended = evaluate(call, tars, tmp_path / "1", "--predictions", tmp_path / "masks")
    assert ended.code == 0, ended.err
    assert evaluate(call, tars, tmp_path / "2", "--checkpoint", model).code == 0
    one, two = (json.loads((tmp_path / n / "scores.json").read_text()) for n in "12")
    assert one["confusion"] == two["confusion"]
    assert one["num_images"] == 3


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "give either --checkpoint or --predictions"),
        (("--checkpoint", "x", "--predictions", "y"), "give either --checkpoint or --predictions"),
        (("--predictions", "y", "--tta"), "--tta requires --checkpoint; --predictions are already"),
        (("--predictions", "y", "--tile", 512), "--tile requires --checkpoint; --predictions are"),
        (("--predictions", "y", "--overlap", 0.5), "--overlap requires --checkpoint"),
    ],
)
def test_flags_that_mean_nothing_are_refused(given: tuple, message: str, call) -> None:
    ended = call("evaluate", "--data", "x", *given)
    assert ended.code == 2
    assert message in ended.message


def test_predictions_at_a_url_need_a_place_for_their_scores(shards, call) -> None:
    ended = call("evaluate", "--data", shards, "--predictions", "s3://bucket/masks")
    message = (
        "--predictions s3://bucket/masks is not a local folder; use --out to choose where "
        "scores are written"
    )
    assert (ended.code, ended.err) == (2, f"unet evaluate: {message}\n")


def test_images_without_a_prediction_are_named_and_counted(
    trained, shards, cells: Path, call, tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text(f"{cells}/images/p000.png\n{cells}/images/p002.png\n")
    assert predict(call, trained, tmp_path / "list.txt", tmp_path / "masks").code == 0
    ended = evaluate(call, shards, tmp_path / "out", "--predictions", tmp_path / "masks")
    assert ended.code == 1
    assert (
        "2 problems (predict all of val; errors.jsonl lists inputs that could not be read):"
    ) in ended.err
    assert f"  {tmp_path / 'masks'} has no prediction of p00" in ended.err
    assert "(and 1 more: p003)" in ended.err
    assert {*re.findall(r"p00\d", ended.err)} == {"p001", "p003"}
    assert not (tmp_path / "out").exists()


def test_masks_of_something_else_altogether_are_reported_by_their_keys(
    trained, shards, cells: Path, call, tmp_path: Path
) -> None:
    # Predicted from one folder too high, every key is longer.
    assert predict(call, trained, f"{cells}/image*/*", tmp_path / "masks").code in (0, 3)
    ended = evaluate(call, shards, tmp_path / "out", "--predictions", tmp_path / "masks")
    assert ended.code == 1
    assert f"{tmp_path / 'masks'} has no prediction of any image of val: " in ended.err
    assert "it has images/p000 and 11 others, but not p0" in ended.err


def test_two_predictions_of_one_image_are_refused(predicted, shards, call, tmp_path) -> None:
    masks = tmp_path / "masks"
    shutil.copytree(predicted, masks)
    manifest = json.loads((masks / "index.json").read_text())
    split = manifest["splits"]["predicted"]
    for shard in [*split["shards"]]:
        for suffix in (".tar", ".idx"):
            file = (masks / shard["name"]).with_suffix(suffix)
            shutil.copy(file, file.with_name(f"again-{file.name}"))
        split["shards"].append({**shard, "name": f"again-{shard['name']}"})
    split["samples"] *= 2
    for size in split["sizes"]:
        size["images"] *= 2
    (masks / "index.json").write_text(json.dumps(manifest))
    ended = evaluate(call, shards, tmp_path / "out", "--predictions", masks)
    assert ended.code == 1
    assert "4 problems (remove one of each):" in ended.err
    assert f"  {masks} has two predictions of p00" in ended.err
    assert re.search(r"\(and 3 more: p00\d, p00\d, \.\.\.\)", ended.err)


def test_other_classes_are_refused(make_checkpoint, shards, call, tmp_path: Path) -> None:
    model = make_checkpoint(classes=("background", "nucleus"))
    assert predict(call, model, shards, tmp_path / "masks").code == 0
    ended = evaluate(call, shards, tmp_path / "out", "--predictions", tmp_path / "masks")
    assert ended.code == 1
    assert (
        f"{tmp_path / 'masks'} has the classes background, nucleus, {shards} has background, "
        "foreground; they must be the same"
    ) in ended.err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mask_of_another_size_is_named(workers, trained, draw, call, tmp_path: Path) -> None:
    data = pack(call, draw(tmp_path / "in", 3), tmp_path / "data")
    small = draw(tmp_path / "small", 3, size=(48, 40))
    assert predict(call, trained, small / "images", tmp_path / "masks").code == 0
    argv = ("--predictions", tmp_path / "masks", "--split", "train", "--workers", workers)
    ended = evaluate(call, data, tmp_path / "out", *argv)
    assert ended.code == 1
    assert "/predicted-000000.tar: p00" in ended.err
    assert ".mask.png is 40 x 48, its image 48 x 48; predict it again" in ended.err
    assert not (tmp_path / "out").exists()


def test_masks_with_pixels_left_out_are_refused(trained, shards, call, tmp_path: Path) -> None:
    more = ("--min-confidence", 0.999)
    assert predict(call, trained, shards, tmp_path / "masks", *more).code == 0
    ended = evaluate(call, shards, tmp_path / "out", "--predictions", tmp_path / "masks")
    assert ended.code == 1
    assert "has pixels without a class (255), written by --min-confidence" in ended.err


def test_images_are_not_predictions(shards, cells: Path, call, tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert call("pack", "--images", cells / "images", "--out", data, "--workers", 1).code == 0
    manifest = json.loads((data / "index.json").read_text())
    manifest.update(classes=["background", "foreground"], palette=[[0, 0, 0], [1, 1, 1]])
    (data / "index.json").write_text(json.dumps(manifest))
    ended = evaluate(call, shards, tmp_path / "out", "--predictions", data)
    assert ended.code == 1
    assert "has no mask; --predictions takes the output of unet predict" in ended.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda masks: (masks / "index.json").unlink(), "is not a data set (it has no index.json)"),
        (
            lambda masks: (masks / "job.json").write_text("{"),
            "job.json is damaged (Input data was truncated); predict into another --out",
        ),
        (lambda masks: (masks / "predicted-000000.tar").unlink(), "predicted-000000.tar cannot be"),
        (lambda masks: (masks / "predicted-000000.idx").unlink(), "predicted-000000.idx cannot be"),
    ],
)
def test_what_is_incomplete_is_refused_in_one_line(
    change: Callable[[Path], object], message: str, predicted, shards, call, tmp_path: Path
) -> None:
    masks = tmp_path / "masks"
    shutil.copytree(predicted, masks)
    change(masks)
    ended = evaluate(call, shards, tmp_path / "out", "--predictions", masks, "--split", "train")
    assert ended.code == 1
    ((line),) = [text for text in ended.err.splitlines() if "not in train" not in text]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_predictions_at_a_url_score_as_their_copy(
    s3: str, predicted, shards, call, content, tmp_path: Path
) -> None:
    system = fsspec.filesystem("s3")
    for name, data in content(predicted).items():
        system.pipe_file(f"bucket/masks/{name}", data)
    for name, masks in (("1", predicted), ("2", "s3://bucket/masks")):
        ended = evaluate(call, shards, tmp_path / name, "--predictions", masks, "--workers", 2)
        assert ended.code == 0, ended.err
    assert content(tmp_path / "1") == content(tmp_path / "2")
