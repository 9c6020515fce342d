"""Holds the scores' contract: exact integers in any order, 255 left out, absent classes as told."""

import json

import pytest
import torch
from torchmetrics.classification import (
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MulticlassPrecision,
    MulticlassRecall,
)

from unet import SegmentationScores, confusion_per_image, metrics

CLASSES = ("background", "cell", "wall")


def metric(classes=CLASSES, counted=(1, 2), empty="skip"):
    return SegmentationScores(classes, counted, empty)


def draw(batch, seed=0, side=6, classes=3):
    torch.manual_seed(seed)
    prediction = torch.randint(0, classes, (batch, side, side), dtype=torch.uint8)
    mask = torch.randint(0, classes, (batch, side, side), dtype=torch.uint8)
    mask[torch.rand(mask.shape) < 0.2] = 255
    return prediction, mask


def counts(m):
    return {name: value.tolist() for name, value in m.compute()._asdict().items()}


@pytest.fixture
def by_hand():
    # picture 1: truth 0 0 1 1 2 255, predicted 0 1 1 1 0 2; picture 2: truth and prediction 0
    m = metric()
    m.update(
        torch.tensor([[[0, 1, 1], [1, 0, 2]], [[0, 0, 0], [0, 0, 0]]], dtype=torch.uint8),
        torch.tensor([[[0, 0, 1], [1, 2, 255]], [[0, 0, 0], [0, 0, 0]]], dtype=torch.uint8),
    )
    return m.scores()


def test_scores_are_those_computed_by_hand(by_hand):
    assert by_hand.confusion == ((7, 1, 0), (0, 2, 0), (1, 0, 0))
    background, cell, wall = by_hand.classes
    assert (cell.tp, cell.fp, cell.fn) == (2, 1, 0)
    assert (cell.dice, cell.iou, cell.precision, cell.recall) == (4 / 5, 2 / 3, 2 / 3, 1.0)
    assert (wall.tp, wall.fp, wall.fn) == (0, 0, 1)
    assert (wall.dice, wall.iou, wall.precision, wall.recall) == (0.0, 0.0, None, 0.0)
    assert (background.tp, background.fp, background.fn) == (7, 1, 1)
    assert by_hand.num_images == 2


def test_background_is_scored_but_in_no_mean(by_hand):
    assert by_hand.classes[0].dice == 14 / 16
    assert by_hand.macro.dice == pytest.approx((4 / 5 + 0) / 2)
    assert by_hand.macro.iou == pytest.approx((2 / 3 + 0) / 2)
    # tp 2, fp 1, fn 1 pooled over cell and wall
    assert by_hand.micro.dice == 4 / 6
    assert by_hand.micro.iou == 2 / 4


def test_pictures_without_a_class_in_mask_and_prediction_are_skipped(by_hand):
    background, cell, wall = by_hand.classes
    assert (background.images, cell.images, wall.images) == (2, 1, 1)
    assert cell.image_dice == pytest.approx(4 / 5, abs=1e-9)
    assert wall.image_dice == 0.0
    assert background.image_dice == pytest.approx((2 / 4 + 1) / 2, abs=1e-9)
    assert background.image_iou == pytest.approx((1 / 3 + 1) / 2, abs=1e-9)
    assert by_hand.per_image.dice == pytest.approx((4 / 5 + 0) / 2, abs=1e-9)


def test_ignored_pixels_count_nowhere():
    prediction, mask = draw(4)
    one, other = metric(), metric()
    one.update(prediction, mask)
    other.update(torch.where(mask == 255, (prediction + 1) % 3, prediction), mask)
    assert counts(one) == counts(other)
    assert sum(map(sum, counts(one)["confusion"])) == (mask != 255).sum()


@pytest.mark.parametrize("empty", ["skip", "one", "zero"])
def test_a_picture_of_255_alone_is_seen_but_scores_nothing(empty):
    m = metric(empty=empty)
    m.update(torch.ones(1, 4, 4, dtype=torch.uint8), torch.full((1, 4, 4), 255, dtype=torch.uint8))
    scores = m.scores()
    assert (scores.num_images, scores.num_valid) == (1, 0)
    assert scores.macro.dice is scores.micro.dice is scores.per_image.dice is None
    assert all(c.dice is c.iou is c.image_dice is c.image_iou is None for c in scores.classes)


def policies(empty):
    """Three classes and `ghost`, which is nowhere; the second picture is 0 alone, the third 255.

    Picture 1: truth 0 0 1 1 2 255, predicted 0 1 1 1 0 2.
    """
    m = metric((*CLASSES, "ghost"), (1, 2, 3), empty)
    m.update(
        torch.tensor([[[0, 1, 1], [1, 0, 2]], [[0] * 3] * 2, [[1] * 3] * 2], dtype=torch.uint8),
        torch.tensor([[[0, 0, 1], [1, 2, 255]], [[0] * 3] * 2, [[255] * 3] * 2], dtype=torch.uint8),
    )
    return m


@pytest.mark.parametrize(
    ("empty", "cell_dice", "cell_iou", "wall", "ghost"),
    [
        # Pictures that count: the first, in which cell has 2 tp and 1 fp, and the second, without.
        ("skip", 4 / 5, 2 / 3, 0, None),
        ("one", (4 / 5 + 1) / 2, (2 / 3 + 1) / 2, 1 / 2, 1),
        ("zero", (4 / 5 + 0) / 2, (2 / 3 + 0) / 2, 0, 0),
    ],
)
def test_the_policy_says_what_a_class_scores_where_it_is_not(
    empty, cell_dice, cell_iou, wall, ghost
):
    scores = policies(empty).scores()
    classes = {c.name: c for c in scores.classes}
    assert scores.empty_policy == empty
    assert (scores.num_images, scores.num_valid) == (3, 2)
    assert classes["cell"].image_dice == pytest.approx(cell_dice, abs=1e-9)
    assert classes["cell"].image_iou == pytest.approx(cell_iou, abs=1e-9)
    assert classes["wall"].image_dice == classes["wall"].image_iou == wall
    # In both pictures: the policy does not touch it.
    assert classes["background"].image_dice == pytest.approx((2 / 4 + 1) / 2, abs=1e-9)
    assert [c.images for c in scores.classes] == [2, 1, 1, 0]
    # A class that is in no picture scores the same globally, and enters the mean or does not.
    absent = classes["ghost"]
    assert absent.dice == absent.iou == absent.image_dice == absent.image_iou == ghost
    assert absent.precision is absent.recall is None
    known = [] if ghost is None else [ghost]
    assert scores.macro.dice == pytest.approx(sum([4 / 5, 0, *known]) / (2 + len(known)))
    assert scores.macro.iou == pytest.approx(sum([2 / 3, 0, *known]) / (2 + len(known)))
    means = [cell_dice, wall, *known]
    assert scores.per_image.dice == pytest.approx(sum(means) / len(means), abs=1e-9)
    # tp 2, fp 1, fn 1 pooled: the policy has nothing to say.
    assert (scores.micro.dice, scores.micro.iou) == (4 / 6, 2 / 4)


@pytest.mark.parametrize(("empty", "expected"), [("skip", None), ("one", 1), ("zero", 0)])
def test_the_policy_also_holds_where_no_class_that_counts_is_anywhere(empty, expected):
    m = metric(empty=empty)
    m.update(*[torch.zeros(2, 3, 3, dtype=torch.uint8)] * 2)
    scores = m.scores()
    for mean in (scores.macro, scores.micro, scores.per_image):
        assert mean.dice == mean.iou == expected


def test_the_policy_changes_no_integer():
    assert counts(policies("skip")) == counts(policies("one")) == counts(policies("zero"))


def test_an_absent_class_is_none_and_in_no_mean():
    m = metric()
    mask = torch.tensor([[[0, 1, 1, 1]]], dtype=torch.uint8)
    m.update(torch.tensor([[[0, 1, 1, 0]]], dtype=torch.uint8), mask)
    scores = m.scores()
    wall = scores.classes[2]
    absent = (wall.dice, wall.iou, wall.precision, wall.recall, wall.image_dice, wall.image_iou)
    assert absent == (None,) * 6
    assert wall.images == 0
    assert scores.macro.dice == scores.classes[1].dice == 4 / 5


@pytest.mark.parametrize("empty", ["skip", "one", "zero"])
@pytest.mark.parametrize("sizes", [(8,), (1,) * 8, (3, 5), (5, 3), (1, 6, 1)])
def test_order_and_batching_change_no_integer(sizes, empty):
    prediction, mask = draw(8)
    # Some pictures lack a class, one has nothing that counts.
    prediction[:3], mask[:3] = prediction[:3] % 2, torch.where(mask[:3] == 2, 0, mask[:3])
    mask[3] = 255
    whole = metric(empty=empty)
    whole.update(prediction, mask)
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(len(sizes)))
    parts = metric(empty=empty)
    for some in shuffled.split(sizes):
        parts.update(prediction[some], mask[some])
    assert counts(parts) == counts(whole)
    assert parts.scores() == whole.scores()


def test_pictures_of_different_sizes_add_up():
    small, large = draw(2, side=3), draw(3, seed=1, side=9)
    one, other = metric(), metric()
    for pair in (small, large):
        one.update(*pair)
    for pair in (large, small):
        other.update(*pair)
    assert counts(one) == counts(other)
    assert one.scores().num_images == 5


def test_the_states_of_two_ranks_sum_to_those_of_one():
    prediction, mask = draw(7)
    whole, first, second = metric(), metric(), metric()
    whole.update(prediction, mask)
    first.update(prediction[:2], mask[:2])
    second.update(prediction[2:], mask[2:])
    for name, value in whole.compute()._asdict().items():
        assert value.dtype == torch.int64
        assert torch.equal(value, getattr(first, name) + getattr(second, name)), name


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_rank_that_saw_nothing_contributes_zeros():
    empty = metric().compute()
    assert not any(value.any() for value in empty)
    assert metric().scores().num_images == 0
    assert metric().scores().macro.dice is None


def test_every_state_is_reduced_by_summation():
    m = metric()
    assert len(m._reductions) == 6
    assert all(reduce(torch.tensor([1, 2])) == 3 for reduce in m._reductions.values())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_reset_forgets_everything():
    m = metric()
    m.update(*draw(3))
    m.reset()
    assert not any(value.any() for value in m.compute())


def test_the_plain_form_is_json_with_classes_by_name(by_hand):
    plain = json.loads(json.dumps(by_hand.to_plain(), allow_nan=False))
    assert list(plain["classes"]) == list(CLASSES)
    assert plain["counted"] == ["cell", "wall"]
    assert plain["empty_policy"] == "skip"
    assert plain["num_images"] == 2
    assert plain["macro"] == {"dice": pytest.approx(0.4), "iou": pytest.approx(1 / 3)}
    assert plain["classes"]["wall"]["precision"] is None
    assert plain["classes"]["cell"]["tp"] == 2
    assert plain["confusion"][0] == [7, 1, 0]


def test_per_image_sums_stay_exact_over_many_pictures():
    prediction, mask = draw(64, side=3)
    forwards, backwards = metric(), metric()
    for i in range(64):
        forwards.update(prediction[i : i + 1], mask[i : i + 1])
        backwards.update(prediction[63 - i :][:1], mask[63 - i :][:1])
    assert counts(forwards)["image_dice"] == counts(backwards)["image_dice"]
    assert counts(forwards)["image_iou"] == counts(backwards)["image_iou"]


# ---- counting


def counted_by_boolean_index(prediction, mask, classes):
    """What `confusion_per_image` must be equal to; it waits for the device three times."""
    batch, valid = len(mask), mask != 255
    sample = torch.arange(batch).view(-1, 1, 1).expand(mask.shape)
    cell = (sample * classes + mask.long()) * classes + prediction.long()
    counts = torch.bincount(cell[valid], minlength=batch * classes**2)
    return counts.view(batch, classes, classes)


@pytest.mark.parametrize(("batch", "side", "classes"), [(5, 9, 3), (1, 1, 2), (3, 40, 255)])
@pytest.mark.parametrize("pixels", [1, 60, metrics.PIXELS])
def test_counts_are_those_of_a_boolean_index(batch, side, classes, pixels, monkeypatch):
    monkeypatch.setattr(metrics, "PIXELS", pixels)
    prediction, mask = draw(batch, side=side, classes=classes)
    mask[0] = 255
    found = confusion_per_image(prediction, mask, classes)
    assert found.dtype == torch.int64
    assert torch.equal(found, counted_by_boolean_index(prediction, mask, classes))


@pytest.mark.parametrize("value", [3, 200, 254])
def test_a_value_that_is_no_class_is_never_counted(value):
    prediction, mask = draw(2)
    for which, what in ((mask, "mask"), (prediction, "predicted")):
        wrong = which.clone()
        wrong[1, 2, 3] = value
        pair = (prediction, wrong) if which is mask else (wrong, mask)
        with pytest.raises(RuntimeError, match=f"a {what} value is no class"):
            confusion_per_image(*pair, 3)


def test_counting_waits_for_nothing(dispatched):
    """On the meta device, where what asks for a value or a size that depends on it raises."""
    prediction, mask = (part.to("meta") for part in draw(4, side=32))
    m = metric().to("meta")
    with dispatched() as calls:
        m.update(prediction, mask)
    names = [call.name for call in calls]
    assert any("scatter_add" in name for name in names)
    for name in ("bincount", "nonzero", "_local_scalar_dense", "aten.index.Tensor"):
        assert not [called for called in names if name in called]
    assert not any(call.crosses for call in calls)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_counts_the_same_integers_and_is_not_waited_for():
    prediction, mask = draw(4, side=300)
    m, there = metric().to("cuda"), (prediction.to("cuda"), mask.to("cuda"))
    m.update(*there)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = confusion_per_image(*there, 3)
        m.add(found)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), counted_by_boolean_index(prediction, mask, 3))


def test_what_counting_takes_does_not_grow_with_the_image(monkeypatch):
    sizes = []
    where = torch.where
    monkeypatch.setattr(torch, "where", lambda *a: sizes.append(a[0].numel()) or where(*a))
    monkeypatch.setattr(metrics, "PIXELS", 1000)
    prediction, mask = draw(2, side=100)
    assert confusion_per_image(prediction, mask, 3).sum() == (mask != 255).sum()
    assert max(sizes) <= 1000
    assert sum(sizes) == mask.numel()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_counts_of_images_are_added_as_their_pixels_are():
    prediction, mask = draw(4)
    one, other = metric(), metric()
    one.update(prediction, mask)
    for _ in range(2):
        # Scores may be asked for in between.
        other.scores()
        other.add(confusion_per_image(prediction[:2], mask[:2], 3))
        prediction, mask = prediction[2:], mask[2:]
    assert counts(one) == counts(other)
    assert one.scores() == other.scores()


# ---- beside torchmetrics, where it answers the same question


def theirs(kind, prediction, mask, **options):
    measure = kind(num_classes=3, ignore_index=255, validate_args=True, **options)
    return measure(prediction.long(), mask.long())


@pytest.mark.parametrize("seed", range(5))
def test_global_scores_are_those_of_torchmetrics(seed):
    prediction, mask = draw(6, seed=seed)
    m = metric(counted=(0, 1, 2))
    m.update(prediction, mask)
    scores = m.scores()
    for kind, name in (
        (MulticlassF1Score, "dice"),
        (MulticlassJaccardIndex, "iou"),
        (MulticlassPrecision, "precision"),
        (MulticlassRecall, "recall"),
    ):
        expected = theirs(kind, prediction, mask, average="none").tolist()
        assert [getattr(c, name) for c in scores.classes] == pytest.approx(expected)
    for name, ours in (("macro", scores.macro), ("micro", scores.micro)):
        f1, jaccard = (
            theirs(kind, prediction, mask, average=name).item()
            for kind in (MulticlassF1Score, MulticlassJaccardIndex)
        )
        assert (ours.dice, ours.iou) == (pytest.approx(f1), pytest.approx(jaccard))
    expected = theirs(MulticlassConfusionMatrix, prediction, mask).tolist()
    assert [list(row) for row in scores.confusion] == expected


@pytest.mark.parametrize("empty", ["skip", "one", "zero"])
def test_scores_of_single_pictures_are_those_of_torchmetrics(empty):
    prediction, mask = draw(6, side=4)
    prediction[:2], mask[:2] = 0, 0
    samplewise = {"average": "none", "multidim_average": "samplewise"}
    f1 = theirs(MulticlassF1Score, prediction, mask, **samplewise)
    # Theirs is 0 in a picture without the class, whatever one would like it to be.
    present = torch.stack([((prediction == c) | (mask == c)) & (mask != 255) for c in range(3)])
    present = present.flatten(2).any(dim=2).T
    assert 0 < present.sum() < present.numel()
    m = metric(empty=empty)
    m.update(prediction, mask)
    f1[~present] = {"skip": torch.nan, "one": 1.0, "zero": 0.0}[empty]
    ours = [c.image_dice for c in m.scores().classes]
    assert ours == pytest.approx(f1.nanmean(dim=0).tolist(), abs=1e-6)
