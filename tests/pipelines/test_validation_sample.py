"""`loading.sample_size`, `training.validation`: validation takes a share of the work of training.

It scores the same images on any number of ranks and after a resume; the last table is of all.
"""

import json
import os
import signal
from pathlib import Path

import pytest

from pipelines import train
from pipelines.evaluation import score
from pipelines.loading.sample_size import choose_num_images
from pipelines.training import validation
from shards.manifest import SizeCount, SplitInfo
from shards.order import EvalPlan


def split_of(*sizes: tuple[int, int, int]) -> SplitInfo:
    from shards.manifest import ShardInfo

    num_samples = sum(count for _, _, count in sizes)
    shard = ShardInfo("val-000000.tar", num_samples, 1, "0" * 64, (), "0" * 64)
    return SplitInfo((shard,), tuple(SizeCount(w, h, "RGB", n) for w, h, n in sizes))


@pytest.mark.parametrize(
    ("trained_pixels", "share", "expected"),
    [
        (500 * 8 * 512**2, 0.1, 1200),  # 3 passes of 4,000 crops, of which a tenth
        (500 * 8 * 512**2, 0.01, 120),
        (30 * 2 * 256**2, 0.1, 32),  # the minimum
        (500 * 8 * 512**2, float("inf"), 4000),
        (10**12, 0.1, 4000),
    ],
)
def test_the_number_of_images_follows_the_pixels_of_training(
    trained_pixels: int, share: float, expected: int
) -> None:
    # As many pixels as 4,000 images of 512 x 512.
    split, small = split_of((1024, 256, 2000), (512, 512, 2000)), split_of((8, 8, 5))
    rule = {"share": share, "min_images": 32}
    assert choose_num_images(split, trained_pixels=trained_pixels, **rule) == expected
    assert choose_num_images(small, trained_pixels=1, **rule) == 5


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("num_chosen", [1, 4, 9, 28])
def test_the_chosen_samples_are_spread_evenly_and_scored_once(num_chosen: int, world: int) -> None:
    sizes = (5, 1, 12, 7, 3)
    plans = [EvalPlan(sizes, 2, rank, world, num_chosen) for rank in range(world)]
    found = [address for plan in plans for batch in plan.batches(0, 1) for address in batch]
    expected = [place * 28 // num_chosen for place in range(num_chosen)]
    assert [address.position for address in found] == expected
    starts = (0, 5, 6, 18, 25)
    assert all(starts[a.shard] + a.row == a.position for a in found)
    for plan in plans:
        mine = [address for batch in plan.batches(0, 1) for address in batch]
        if mine:
            assert {a.shard for a in mine} <= {*plan.upcoming_shards(mine[0].position)}


def test_a_run_validates_on_a_sample_and_ends_with_the_table_of_all(
    shards: Path, tiny, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "MIN_IMAGES", 1)
    scored: list[int] = []
    count_split = score.count_split

    def counting(*arguments, **named):
        scores = count_split(*arguments, **named)
        scored.append(scores.num_images)
        return scores

    monkeypatch.setattr(score, "count_split", counting)
    num_val = json.loads((shards / "index.json").read_bytes())["splits"]["val"]
    total = sum(shard["samples"] for shard in num_val["shards"])
    flags = ["--data", shards, *tiny, "--workers", 0, "--eval-every", 2, "--val-share", 0]
    whole = call("train", *flags, "--run-dir", tmp_path / "whole", "--steps", 4)
    assert whole.code == 0, whole.err
    assert scored == [1, 1, total]
    assert f"validation during training: 1 of {total} images, evenly spread" in whole.err
    # A resume keeps the sample, although another share is asked for.
    first = call("train", *flags, "--run-dir", tmp_path / "parts", "--steps", 2)
    assert first.code == 0
    more = [*flags[:-2], "--val-share", "1e9", "--run-dir", tmp_path / "parts", "--steps", 4]
    assert call("train", *more).code == 0
    assert scored == [1, 1, total, 1, total, 1, total]


@pytest.mark.parametrize("share", ["1e9", "0"])
def test_a_signal_ends_the_table_at_the_end_and_a_rerun_makes_it(
    share: str, shards: Path, tiny, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "MIN_IMAGES", 1)
    flags = ["--data", shards, "--run-dir", tmp_path, *tiny, "--workers", 0, "--steps", 1]
    flags += ["--tiles.batch-size", 1, "--val-share", share]
    predicted: list[int] = []
    predict_mask, finish = score.predict_mask, train.finish_saving

    def count(*arguments, **named):
        predicted.append(1)
        if len(predicted) == 2 and share == "0":
            # The second image of four, of the table at the end.
            os.kill(os.getpid(), signal.SIGTERM)
        return predict_mask(*arguments, **named)

    def end(*arguments):
        finish(*arguments)
        if share == "1e9":
            raise KeyboardInterrupt  # as if killed before state.json

    monkeypatch.setattr(score, "predict_mask", count)
    monkeypatch.setattr(train, "finish_saving", end)
    stopped = call("train", *flags)
    assert stopped.code == (75 if share == "0" else 130)
    assert "finished at step" not in stopped.out
    assert len(predicted) == (2 if share == "0" else 4)
    monkeypatch.undo()
    rerun = call("train", *flags)
    assert rerun.code == 0, rerun.err
    assert "finished at step 1" in rerun.out
    assert "macro" in rerun.out
    assert (tmp_path / "report.html").exists()
    again = call("train", *flags)
    assert again.code == 0
    assert "had already finished at step 1" in again.out


def test_all_images_are_scored_where_the_share_allows_it(
    shards: Path, tiny, call, tmp_path: Path
) -> None:
    flags = ["--data", shards, "--run-dir", tmp_path, *tiny, "--workers", 0, "--steps", 1]
    ended = call("train", *flags)
    assert ended.code == 0
    assert "validation during training" not in ended.err
    wrong = call("train", *flags, "--val-share", -1)
    assert wrong.code == 2
    assert "--val-share must be >= 0, got -1.0" in wrong.message


@pytest.mark.ranks
def test_the_sample_has_equal_scores_on_two_ranks_and_after_a_resume(
    draw, tiny, call, launch, metrics, tmp_path: Path
) -> None:
    images, data = draw(tmp_path / "in", 50, size=(24, 24)), tmp_path / "data"
    pairs = ("--images", images / "images", "--masks", images / "masks", "--mask-format", "binary")
    pack = call("pack", *pairs, "--val-fraction", 0.9, "--workers", 1, "--out", data)
    assert pack.code == 0, pack.err
    flags = ["--data", data, *tiny, "--workers", 0, "--eval-every", 1, "--val-share", 0]
    # So small a rate leaves the weights as they are: ranks add gradients in another order.
    flags += ["--optim.lr", "1e-30"]
    whole, parts, ranks = tmp_path / "whole", tmp_path / "parts", tmp_path / "ranks"
    ended = [
        call("train", *flags, "--run-dir", whole, "--steps", 2),
        call("train", *flags, "--run-dir", parts, "--steps", 1),
        call("train", *flags, "--run-dir", parts, "--steps", 2),
        launch(2, "train", *flags, "--run-dir", ranks, "--steps", 2),
    ]
    for end in ended:
        assert end.code == 0, end.err
        assert end.err.count("validation during training: 32 of 4") == 1

    def scores(run: Path) -> list[dict[str, float]]:
        lines = [line for line in metrics(run) if "val/dice" in line]
        return [{k: v for k, v in line.items() if not k.startswith("train/")} for line in lines]

    assert [line["step"] for line in scores(whole)] == [1, 2]
    assert 0 < scores(whole)[-1]["val/dice"] < 1
    assert scores(parts) == scores(whole) == scores(ranks)
