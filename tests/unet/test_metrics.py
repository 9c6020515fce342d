"""Scores: exact integers in any order, 255 ignored, absent classes by the policy."""

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

from unet import metrics
from unet.metrics import SegmentationScores, confusion_per_image

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
def hand_computed():
    # image 1: mask 0 0 1 1 2 255, prediction 0 1 1 1 0 2; image 2: mask and prediction 0
    m = metric()
    m.update(
        torch.tensor([[[0, 1, 1], [1, 0, 2]], [[0, 0, 0], [0, 0, 0]]], dtype=torch.uint8),
        torch.tensor([[[0, 0, 1], [1, 2, 255]], [[0, 0, 0], [0, 0, 0]]], dtype=torch.uint8),
    )
    return m.scores()


def test_scores_equal_hand_computed_ones(hand_computed):
    assert hand_computed.confusion == ((7, 1, 0), (0, 2, 0), (1, 0, 0))
    background, cell, wall = hand_computed.classes
    assert (cell.tp, cell.fp, cell.fn) == (2, 1, 0)
    assert (cell.dice, cell.iou, cell.precision, cell.recall) == (4 / 5, 2 / 3, 2 / 3, 1.0)
    assert (wall.tp, wall.fp, wall.fn) == (0, 0, 1)
    assert (wall.dice, wall.iou, wall.precision, wall.recall) == (0.0, 0.0, None, 0.0)
    assert (background.tp, background.fp, background.fn) == (7, 1, 1)
    assert hand_computed.num_images == 2


def test_background_is_scored_but_enters_no_mean(hand_computed):
    assert hand_computed.classes[0].dice == 14 / 16
    assert hand_computed.macro.dice == pytest.approx((4 / 5 + 0) / 2)
    assert hand_computed.macro.iou == pytest.approx((2 / 3 + 0) / 2)
    # tp 2, fp 1, fn 1 pooled over cell and wall
    assert hand_computed.micro.dice == 4 / 6
    assert hand_computed.micro.iou == 2 / 4


def test_images_without_a_class_in_mask_and_prediction_are_skipped(hand_computed):
    background, cell, wall = hand_computed.classes
    assert (background.images, cell.images, wall.images) == (2, 1, 1)
    assert cell.image_dice == pytest.approx(4 / 5, abs=1e-9)
    assert wall.image_dice == 0.0
    assert background.image_dice == pytest.approx((2 / 4 + 1) / 2, abs=1e-9)
    assert background.image_iou == pytest.approx((1 / 3 + 1) / 2, abs=1e-9)
    assert hand_computed.per_image.dice == pytest.approx((4 / 5 + 0) / 2, abs=1e-9)


def test_ignored_pixels_are_not_counted():
    prediction, mask = draw(4)
    one, other = metric(), metric()
    one.update(prediction, mask)
    other.update(torch.where(mask == 255, (prediction + 1) % 3, prediction), mask)
    assert counts(one) == counts(other)
    assert sum(map(sum, counts(one)["confusion"])) == (mask != 255).sum()


@pytest.mark.parametrize("empty", ["skip", "one", "zero"])
def test_an_image_of_255_only_is_counted_but_not_scored(empty):
    m = metric(empty=empty)
    m.update(torch.ones(1, 4, 4, dtype=torch.uint8), torch.full((1, 4, 4), 255, dtype=torch.uint8))
    scores = m.scores()
    assert (scores.num_images, scores.num_valid) == (1, 0)
    assert scores.macro.dice is scores.micro.dice is scores.per_image.dice is None
    assert all(c.dice is c.iou is c.image_dice is c.image_iou is None for c in scores.classes)


def policies(empty):
    """Score three images of three classes and `ghost`, which is absent.

    Image 1: mask 0 0 1 1 2 255, prediction 0 1 1 1 0 2. Image 2: all 0. Image 3: mask all 255.
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
        # Two images are valid: the first, with 2 tp and 1 fp of cell, and the second, without it.
        ("skip", 4 / 5, 2 / 3, 0, None),
        ("one", (4 / 5 + 1) / 2, (2 / 3 + 1) / 2, 1 / 2, 1),
        ("zero", (4 / 5 + 0) / 2, (2 / 3 + 0) / 2, 0, 0),
    ],
)
def test_the_policy_decides_the_score_of_an_absent_class(empty, cell_dice, cell_iou, wall, ghost):
    scores = policies(empty).scores()
    classes = {c.name: c for c in scores.classes}
    assert scores.empty_policy == empty
    assert (scores.num_images, scores.num_valid) == (3, 2)
    assert classes["cell"].image_dice == pytest.approx(cell_dice, abs=1e-9)
    assert classes["cell"].image_iou == pytest.approx(cell_iou, abs=1e-9)
    assert classes["wall"].image_dice == classes["wall"].image_iou == wall
    # Present in both images: the policy does not apply.
    assert classes["background"].image_dice == pytest.approx((2 / 4 + 1) / 2, abs=1e-9)
    assert [c.images for c in scores.classes] == [2, 1, 1, 0]
    # A class absent everywhere gets the same global score, and enters the mean unless None.
    absent = classes["ghost"]
    assert absent.dice == absent.iou == absent.image_dice == absent.image_iou == ghost
    assert absent.precision is absent.recall is None
    known = [] if ghost is None else [ghost]
    assert scores.macro.dice == pytest.approx(sum([4 / 5, 0, *known]) / (2 + len(known)))
    assert scores.macro.iou == pytest.approx(sum([2 / 3, 0, *known]) / (2 + len(known)))
    means = [cell_dice, wall, *known]
    assert scores.per_image.dice == pytest.approx(sum(means) / len(means), abs=1e-9)
    # tp 2, fp 1, fn 1 pooled: the policy does not apply.
    assert (scores.micro.dice, scores.micro.iou) == (4 / 6, 2 / 4)


@pytest.mark.parametrize(("empty", "expected"), [("skip", None), ("one", 1), ("zero", 0)])
def test_the_policy_applies_if_no_counted_class_is_present(empty, expected):
    m = metric(empty=empty)
    m.update(*[torch.zeros(2, 3, 3, dtype=torch.uint8)] * 2)
    scores = m.scores()
    for mean in (scores.macro, scores.micro, scores.per_image):
        assert mean.dice == mean.iou == expected


def test_the_policy_changes_no_integer():
    assert counts(policies("skip")) == counts(policies("one")) == counts(policies("zero"))


def test_an_absent_class_is_none_and_enters_no_mean():
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
    # Some images lack a class, one has no valid pixel.
    prediction[:3], mask[:3] = prediction[:3] % 2, torch.where(mask[:3] == 2, 0, mask[:3])
    mask[3] = 255
    together = metric(empty=empty)
    together.update(prediction, mask)
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(len(sizes)))
    batched = metric(empty=empty)
    for some in shuffled.split(sizes):
        batched.update(prediction[some], mask[some])
    assert counts(batched) == counts(together)
    assert batched.scores() == together.scores()


def test_images_of_different_sizes_add_up():
    small, large = draw(2, side=3), draw(3, seed=1, side=9)
    one, other = metric(), metric()
    for pair in (small, large):
        one.update(*pair)
    for pair in (large, small):
        other.update(*pair)
    assert counts(one) == counts(other)
    assert one.scores().num_images == 5


def test_the_states_of_two_ranks_add_up_to_those_of_one():
    prediction, mask = draw(7)
    together, first, second = metric(), metric(), metric()
    together.update(prediction, mask)
    first.update(prediction[:2], mask[:2])
    second.update(prediction[2:], mask[2:])
    for name, value in together.compute()._asdict().items():
        assert value.dtype == torch.int64
        assert torch.equal(value, getattr(first, name) + getattr(second, name)), name


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_rank_without_images_contributes_zeros():
    empty = metric().compute()
    assert not any(value.any() for value in empty)
    assert metric().scores().num_images == 0
    assert metric().scores().macro.dice is None


def test_every_state_is_reduced_by_sum():
    m = metric()
    assert len(m._reductions) == 6
    assert all(reduce(torch.tensor([1, 2])) == 3 for reduce in m._reductions.values())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_reset_clears_all_states():
    m = metric()
    m.update(*draw(3))
    m.reset()
    assert not any(value.any() for value in m.compute())


def test_the_plain_form_is_valid_json_with_classes_by_name(hand_computed):
    plain = json.loads(json.dumps(hand_computed.to_plain(), allow_nan=False))
    assert list(plain["classes"]) == list(CLASSES)
    assert plain["counted"] == ["cell", "wall"]
    assert plain["empty_policy"] == "skip"
    assert plain["num_images"] == 2
    assert plain["macro"] == {"dice": pytest.approx(0.4), "iou": pytest.approx(1 / 3)}
    assert plain["classes"]["wall"]["precision"] is None
    assert plain["classes"]["cell"]["tp"] == 2
    assert plain["confusion"][0] == [7, 1, 0]


def test_per_image_sums_are_exact_over_many_images():
    prediction, mask = draw(64, side=3)
    forwards, backwards = metric(), metric()
    for i in range(64):
        forwards.update(prediction[i : i + 1], mask[i : i + 1])
        backwards.update(prediction[63 - i :][:1], mask[63 - i :][:1])
    assert counts(forwards)["image_dice"] == counts(backwards)["image_dice"]
    assert counts(forwards)["image_iou"] == counts(backwards)["image_iou"]


# ---- counting


def count_by_boolean_index(prediction, mask, classes):
    """Reference for `confusion_per_image`; it synchronises with the device three times."""
    batch, valid = len(mask), mask != 255
    sample = torch.arange(batch).view(-1, 1, 1).expand(mask.shape)
    cell = (sample * classes + mask.long()) * classes + prediction.long()
    counts = torch.bincount(cell[valid], minlength=batch * classes**2)
    return counts.view(batch, classes, classes)


@pytest.mark.parametrize(("batch", "side", "classes"), [(5, 9, 3), (1, 1, 2), (3, 40, 255)])
@pytest.mark.parametrize("pixels", [1, 60, metrics.PIXELS])
def test_counts_equal_the_reference(batch, side, classes, pixels, monkeypatch):
    monkeypatch.setattr(metrics, "PIXELS", pixels)
    prediction, mask = draw(batch, side=side, classes=classes)
    mask[0] = 255
    found = confusion_per_image(prediction, mask, classes)
    assert found.dtype == torch.int64
    assert torch.equal(found, count_by_boolean_index(prediction, mask, classes))


@pytest.mark.parametrize("value", [3, 200, 254])
def test_a_value_that_is_not_a_class_is_refused(value):
    prediction, mask = draw(2)
    for which, what in ((mask, "mask"), (prediction, "predicted")):
        wrong = which.clone()
        wrong[1, 2, 3] = value
        pair = (prediction, wrong) if which is mask else (wrong, mask)
        with pytest.raises(RuntimeError, match=f"a {what} value is not a class"):
            confusion_per_image(*pair, 3)


def test_counting_does_not_synchronise(dispatched):
    """The meta device raises for every operator that needs a value or a shape depending on one."""
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
def test_a_gpu_counts_the_same_integers_without_synchronising():
    prediction, mask = draw(4, side=300)
    m, on_gpu = metric().to("cuda"), (prediction.to("cuda"), mask.to("cuda"))
    m.update(*on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = confusion_per_image(*on_gpu, 3)
        m.add(found)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.cpu(), count_by_boolean_index(prediction, mask, 3))


def test_memory_for_counting_does_not_grow_with_the_image(monkeypatch):
    sizes = []
    where = torch.where
    monkeypatch.setattr(torch, "where", lambda *a: sizes.append(a[0].numel()) or where(*a))
    monkeypatch.setattr(metrics, "PIXELS", 1000)
    prediction, mask = draw(2, side=100)
    assert confusion_per_image(prediction, mask, 3).sum() == (mask != 255).sum()
    assert max(sizes) <= 1000
    assert sum(sizes) == mask.numel()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_adding_confusions_equals_updating_with_pixels():
    prediction, mask = draw(4)
    one, other = metric(), metric()
    one.update(prediction, mask)
    for _ in range(2):
        # Scores may be computed in between.
        other.scores()
        other.add(confusion_per_image(prediction[:2], mask[:2], 3))
        prediction, mask = prediction[2:], mask[2:]
    assert counts(one) == counts(other)
    assert one.scores() == other.scores()


# ---- compared with torchmetrics


def reference(kind, prediction, mask, **options):
    measure = kind(num_classes=3, ignore_index=255, validate_args=True, **options)
    return measure(prediction.long(), mask.long())


@pytest.mark.parametrize("seed", range(5))
def test_global_scores_equal_those_of_torchmetrics(seed):
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
        expected = reference(kind, prediction, mask, average="none").tolist()
        assert [getattr(c, name) for c in scores.classes] == pytest.approx(expected)
    for name, ours in (("macro", scores.macro), ("micro", scores.micro)):
        f1, jaccard = (
            reference(kind, prediction, mask, average=name).item()
            for kind in (MulticlassF1Score, MulticlassJaccardIndex)
        )
        assert (ours.dice, ours.iou) == (pytest.approx(f1), pytest.approx(jaccard))
    expected = reference(MulticlassConfusionMatrix, prediction, mask).tolist()
    assert [list(row) for row in scores.confusion] == expected


@pytest.mark.parametrize("empty", ["skip", "one", "zero"])
def test_per_image_scores_equal_those_of_torchmetrics(empty):
    prediction, mask = draw(6, side=4)
    prediction[:2], mask[:2] = 0, 0
    samplewise = {"average": "none", "multidim_average": "samplewise"}
    f1 = reference(MulticlassF1Score, prediction, mask, **samplewise)
    # torchmetrics scores 0 in an image without the class; apply the policy.
    present = torch.stack([((prediction == c) | (mask == c)) & (mask != 255) for c in range(3)])
    present = present.flatten(2).any(dim=2).T
    assert 0 < present.sum() < present.numel()
    m = metric(empty=empty)
    m.update(prediction, mask)
    f1[~present] = {"skip": torch.nan, "one": 1.0, "zero": 0.0}[empty]
    ours = [c.image_dice for c in m.scores().classes]
    assert ours == pytest.approx(f1.nanmean(dim=0).tolist(), abs=1e-6)
