"""`plan`, `planning.facts`, `planning.trial`, `planning.settings`, `planning.plan_file`.

`unet plan`: what it concludes from a data set, how timings become settings, and the files.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import plan
from pipelines.planning import trial
from pipelines.planning.facts import (
    DataFacts,
    Upright,
    find_upright,
    gather_facts,
    locate_classes,
)
from pipelines.planning.settings import MIN_STEPS, choose_settings
from pipelines.planning.trial import Timing, count_saved_bytes
from pipelines.runtime import command
from pipelines.training.options import TrainConfig
from shards.manifest import read_manifest
from shards.masks.shift import Shift
from shards.sample import Uint8
from tests.conftest import flags, save_cells

FACTS = DataFacts(
    train=80,
    val=20,
    side=360,
    classes=("background", "sky", "pole"),
    shares=(0.5, 0.4, 0.1),
    masks=64,
    upright=None,
    shift=None,
)
WIDTHS = (Timing(8, 256, 2, 1, 0.1, 2**29), Timing(16, 256, 2, 1, 0.3, 2**30),
          Timing(32, 256, 2, 2, 1.0, 2**31))  # fmt: skip


def settings(facts: DataFacts = FACTS, minutes: float = 4, timings=WIDTHS) -> dict[str, object]:
    return {s.key: s.value for s in choose_settings(facts, timings, minutes)}


def blob(top: int, height: int = 40) -> Uint8:
    """A mask of class 1 in ten rows from `top`, class 0 elsewhere."""
    mask = np.zeros((height, 24), np.uint8)
    mask[top : top + 10] = 1
    return mask


def find(masks: Iterable[Uint8]) -> Upright | None:
    return find_upright([locate_classes(mask, 2) for mask in masks], ("ground", "sky"))


def test_the_widest_network_with_enough_steps_is_planned() -> None:
    limit = MIN_STEPS * 0.3 / 60
    assert settings(minutes=limit * 1.01)["model.base_channels"] == 16
    assert settings(minutes=limit * 0.99)["model.base_channels"] == 8
    assert settings(minutes=0.01)["model.base_channels"] == 8
    long = settings(minutes=1000)
    assert (long["model.base_channels"], long["accumulate"]) == (32, 2)


@pytest.mark.parametrize(
    ("crop_size", "depth"), [(512, 4), (64, 4), (48, 3), (32, 3), (16, 2), (8, 1)]
)
def test_small_crops_are_downsampled_less(crop_size: int, depth: int) -> None:
    timings = [replace(WIDTHS[0], crop_size=crop_size)]
    assert settings(timings=timings)["model.depth"] == depth


@pytest.mark.parametrize(("share", "value"), [(0.019, "inverse_sqrt"), (0.021, "none")])
def test_classes_are_weighted_if_one_is_rare(share: float, value: str) -> None:
    facts = replace(FACTS, shares=(0.5, 0.5 - share, share))
    assert settings(facts)["loss.class_weights"] == value


def test_an_absent_class_a_rare_background_and_uncounted_pixels_do_not_count_as_rare() -> None:
    for shares in ((0.5, 0.5, 0.0), (0.01, 0.5, 0.49), ()):
        assert settings(replace(FACTS, shares=shares))["loss.class_weights"] == "none"


def test_a_data_set_without_val_is_trained_without_validation() -> None:
    assert settings(replace(FACTS, val=0))["val"] is False
    assert "val" not in settings()
    # 2,200 steps.
    assert settings(minutes=11)["eval_every"] == 200


def test_a_class_that_lies_above_the_middle_makes_images_upright() -> None:
    rng = np.random.default_rng(0)
    above = [blob(int(top)) for top in rng.integers(0, 10, 20)]
    found = find(above)
    assert found is not None
    assert (found.name, found.masks) == ("sky", 20)
    # Centres are rows 5 to 14 of 40: between 0.375 and 0.15 above the middle.
    assert -0.375 < found.offset < -0.15
    facts = replace(FACTS, upright=found)
    assert settings(facts)["augment.orientation"] == "upright"
    below = find(mask[::-1] for mask in above)
    assert below is not None
    assert below.offset == pytest.approx(-found.offset)


def test_classes_in_any_place_or_in_few_masks_leave_every_orientation() -> None:
    tops = range(31)
    assert find(blob(top) for top in tops) is None
    assert find([blob(0)] * 7) is None
    assert find([blob(0)] * 8) == Upright("sky", -0.375, 8)
    assert find([]) is None
    assert settings()["augment.orientation"] == "any"


@pytest.mark.parametrize(
    ("down", "right", "value", "reason"),
    [
        (-0.6, 0.2, "upright", "masks are shifted up by 0.6 pixels (mean of 9 images); other"),
        (0, 1.25, "fixed", "masks are shifted to the right by 1.2 pixels (mean of 9 images); "),
        (0.5, -2, "fixed", "masks are shifted down by 0.5 and to the left by 2.0 pixels (mean"),
        (0.4, -0.4, "any", "no class lies clearly above or below the middle"),
    ],
)
def test_flips_that_would_average_a_shift_out_are_left_out(
    down: float, right: float, value: str, reason: str
) -> None:
    facts = replace(FACTS, shift=Shift(down, right, error=0.02, images=9))
    (found,) = [s for s in choose_settings(facts, WIDTHS, 4) if s.key == "augment.orientation"]
    assert found.value == value
    assert reason in found.reason


@pytest.mark.parametrize("up", [0, 1])
def test_the_shift_of_packed_masks_is_measured(up: int, call, tmp_path: Path) -> None:
    folder = save_cells(tmp_path / "in", 14, up=up)
    assert call("pack", *flags(folder, tmp_path / "out")).code == 0
    shift = gather_facts(str(tmp_path / "out"), read_manifest(tmp_path / "out")).shift
    assert shift is not None
    assert (shift.down, shift.right) == pytest.approx((-up, 0), abs=0.1)
    assert shift.vertical == bool(up)


def test_saved_bytes_are_those_of_feature_maps() -> None:
    layer = torch.nn.Conv2d(1, 4, 3, padding=1)
    image = torch.zeros(1, 1, 8, 8)
    # The input of the convolution and the output of the ReLU, which backward needs.
    expected = 4 * 8 * 8 * (1 + 4)
    assert count_saved_bytes(layer, lambda: layer(image).relu().sum().backward()) == expected


@pytest.fixture(scope="module")
def planned(tmp_path_factory, call, shards: Path) -> tuple[Path, str]:
    """A plan for the cells with the two narrowest networks, and what was printed."""
    out = tmp_path_factory.mktemp("plan") / "plan.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "WIDTHS", (2, 4))
        ended = call("plan", "--data", shards, "--minutes", 1, "--out", out)
    assert ended.code == 0, ended.err
    return out, ended.out


def test_every_line_of_a_plan_has_a_reason(planned: tuple[Path, str]) -> None:
    text = planned[0].read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    values = [line for line in lines if not re.fullmatch(r"\w+:", line)]
    assert len(values) == 12
    assert all(re.fullmatch(r" *\w+: \S+ +# \S.*", line) for line in values), text
    assert text in planned[1]


def test_a_plan_is_what_train_takes(planned: tuple[Path, str], shards: Path) -> None:
    config = command.parse(TrainConfig, ["--config", str(planned[0])], "train")
    assert (config.data, config.length.minutes) == (str(shards), 1)
    assert (config.model.preset, config.batch.crop_size) == ("small", 32)
    assert config.model.base_channels in (2, 4)


def test_training_by_a_plan_ends_with_its_minutes(
    planned: tuple[Path, str], call, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = ("--run-dir", run, "--minutes", 0.05, "--tracking.backend", "none")
    ended = call("train", "--config", planned[0], *flags)
    assert ended.code == 0, ended.err
    state = json.loads((run / "state.json").read_text())
    assert state["finished"]
    assert 3 <= state["seconds"] < 60


def test_the_same_timings_give_the_same_plan(
    planned: tuple[Path, str], call, shards: Path, tmp_path: Path
) -> None:
    out, record = planned[0], planned[0].with_suffix(".json")
    flags = ("--data", shards, "--minutes", 1, "--timings", record)
    plan_bytes, record_bytes = out.read_bytes(), record.read_bytes()
    ended = call("plan", *flags, "--out", out)
    assert ended.code == 0, ended.err
    assert (out.read_bytes(), record.read_bytes()) == (plan_bytes, record_bytes)
    assert f"{out} (unchanged), {record} (unchanged)" in ended.out
    longer = call("plan", "--data", shards, "--minutes", 50, "--timings", record,
                  "--out", tmp_path / "long.yaml")  # fmt: skip
    assert longer.code == 0, longer.err
    assert "base_channels: 4 " in longer.out


def test_a_plan_overwritten_by_another_says_so(
    planned: tuple[Path, str], call, shards: Path, tmp_path: Path
) -> None:
    flags = ("--data", shards, "--timings", planned[0].with_suffix(".json"))
    out = tmp_path / "p.yaml"
    call("plan", *flags, "--minutes", 1, "--out", out)
    ended = call("plan", *flags, "--minutes", 2, "--out", out)
    assert f"{out} (replaced the previous one)" in ended.out


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"version": 9}, "is not of this version of unet plan"),
        ({"timings": []}, "is not of this version of unet plan"),
        ({"manifest": "0" * 64}, "are of another data set than"),
        ({"device": 3}, "is damaged"),
        ({"more": 3}, "is damaged"),
    ],
)
def test_other_timings_are_refused_in_one_line(
    planned: tuple[Path, str], call, shards: Path, tmp_path: Path, change: dict, problem: str
) -> None:
    record = tmp_path / "t.json"
    stored = json.loads(planned[0].with_suffix(".json").read_text())
    record.write_text(json.dumps({**stored, **change}))
    ended = call("plan", "--data", shards, "--minutes", 1, "--timings", record, "--out",
                 tmp_path / "p.yaml")  # fmt: skip
    assert ended.code in (1, 2)
    assert ended.err.startswith(f"unet plan: --timings {record}"), ended.err
    assert problem in ended.message
    assert "make a plan without --timings" in ended.message
    assert not (tmp_path / "p.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--minutes", 0), "--minutes must be > 0, got 0.0"),
        (("--minutes", 1, "--memory", "lots"), "--memory must be a size such as 8GiB, got 'lots'"),
        (("--minutes", 1, "--out", "plan.txt"), "--out must end in .yaml, got plan.txt"),
        (("--minutes", 1, "--timings", "t.json"), "--timings t.json: No such file or directory"),
        (("--minutes", 1, "--memory", "1K"), "--memory: one sample of 32 x 32 pixels does not fit"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(
    call, shards: Path, tmp_path: Path, monkeypatch, arguments: tuple, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = call("plan", "--data", shards, *arguments)
    assert ended.code in (1, 2)
    assert ended.err.splitlines()[-1].startswith(f"unet plan: {line}")
    assert not [*tmp_path.iterdir()]


def test_less_memory_makes_more_passes(call, shards: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trial, "WIDTHS", (8,))

    def timing(memory: int) -> dict[str, int]:
        out = tmp_path / f"{memory}.yaml"
        ended = call("plan", "--data", shards, "--minutes", 1, "--memory", memory, "--out", out)
        assert ended.code == 0, ended.err
        return json.loads(out.with_suffix(".json").read_text())["timings"][0]

    whole = timing(2**33)
    assert whole["accumulate"] == 1
    assert timing(whole["memory"])["accumulate"] == 1
    halved = timing(whole["memory"] - 1)
    assert halved["accumulate"] == 2
    assert halved["memory"] < whole["memory"]


def test_a_plan_is_made_by_one_process(launch: Callable, shards: Path, tmp_path: Path) -> None:
    ended = launch(2, "plan", "--data", shards, "--minutes", 1, "--out", tmp_path / "p.yaml")
    assert ended.code
    assert "unet plan times one device; run it without accelerate launch" in ended.err


def test_wider_networks_are_not_tried_when_steps_take_too_long(
    call, shards: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(trial, "time_steps", lambda *_: 1.0)
    monkeypatch.setattr(trial, "WIDTHS", (2, 4, 8))
    for minutes, tried in ((0.1, 1), (1000, 3)):
        out = tmp_path / f"{tried}.yaml"
        ended = call("plan", "--data", shards, "--minutes", minutes, "--out", out)
        assert ended.code == 0, ended.err
        assert len(json.loads(out.with_suffix(".json").read_text())["timings"]) == tried
    assert plan.FEWEST_STEPS < MIN_STEPS
