"""`train`, `training.checkpoints`: initial weights, kept and best checkpoints, and patience."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from pipelines.evaluation import score
from unet import UNet, metrics


def argv(data: Path, run_dir: Path, tiny: tuple[str, ...], *more: object) -> list[object]:
    return ["--data", data, "--run-dir", run_dir, *tiny, "--workers", 0, *more]


def steps(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "checkpoints").glob("step-*")}


@pytest.fixture
def graded(monkeypatch: pytest.MonkeyPatch):
    """Makes the validations of a run return the given scores."""

    def set_scores(*values: float) -> None:
        coming = iter(values)
        monkeypatch.setattr(metrics, "mean_of", lambda scores, name: next(coming))

    return set_scores


def test_checkpoints_are_also_saved_without_a_validation(
    shards: Path, tiny, call, tmp_path: Path
) -> None:
    more = ("--steps", 6, "--save-every", 2, "--eval-every", 6, "--keep-checkpoints", 9)
    assert call("train", *argv(shards, tmp_path, tiny, *more)).code == 0
    assert steps(tmp_path) == {f"step-{n:08d}" for n in (2, 4, 6)}
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [line["step"] for line in map(json.loads, lines) if "val/dice" in line] == [6]


def test_checkpoints_of_every_so_many_steps_are_kept_for_good(
    shards: Path, tiny, call, graded, tmp_path: Path
) -> None:
    graded(0.5, 0.9, 0.4, 0.3, 0.2, 0.1)
    more = ("--steps", 6, "--eval-every", 1, "--keep-checkpoints", 1, "--keep-every", 3)
    assert call("train", *argv(shards, tmp_path, tiny, *more)).code == 0
    # 2 is the best, 6 the last
    assert steps(tmp_path) == {f"step-{n:08d}" for n in (2, 3, 6)}


@pytest.mark.parametrize("name", ["dice", "iou", "image_dice", "image_iou"])
def test_the_best_checkpoint_is_the_best_by_the_declared_score(
    name: str, shards: Path, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []
    score_split = score.score

    def noting(*arguments: Any, **named: Any) -> Any:
        seen.append(score_split(*arguments, **named))
        return seen[-1]

    monkeypatch.setattr(score, "score", noting)
    more = ("--steps", 4, "--eval-every", 2, "--best-by", name)
    assert call("train", *argv(shards, tmp_path, tiny, *more)).code == 0
    means = [s.per_image if name.startswith("image") else s.macro for s in seen]
    values = [m.iou if name.endswith("iou") else m.dice for m in means]
    state = json.loads((tmp_path / "checkpoints" / "best" / "state.json").read_text())
    assert state["best"] == max(values)
    assert state["step"] == 2 * (1 + values.index(max(values)))


def test_a_run_ends_when_validation_has_not_become_better_for_so_long_also_over_a_resume(
    shards: Path, tiny, call, graded, tmp_path: Path
) -> None:
    more = ("--steps", 50, "--eval-every", 1, "--patience", 3)
    graded(0.5, 0.6, 0.6, 0.4, 0.1)
    ended = call("train", *argv(shards, tmp_path, tiny, *more))
    assert ended.code == 0, ended.err
    assert "finished at step 5, " in ended.out
    assert "no improvement for 3 validations" in ended.out
    assert json.loads((tmp_path / "state.json").read_text())["finished"]
    # A rerun does not resume, unless it has more patience.
    again = call("train", *argv(shards, tmp_path, tiny, *more))
    assert "had already finished at step 5" in again.out
    graded(0.5)
    more = ("--steps", 50, "--eval-every", 1, "--patience", 4)
    assert "finished at step 6, " in call("train", *argv(shards, tmp_path, tiny, *more)).out


def test_a_run_starts_from_the_weights_of_another(
    trained: Path, shards: Path, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = {}
    load_state_dict = UNet.load_state_dict

    def noting(self: UNet, tensors: Any, *more: Any, **named: Any) -> Any:
        first.setdefault("tensors", {name: t.clone() for name, t in tensors.items()})
        return load_state_dict(self, tensors, *more, **named)

    best = UNet.from_pretrained(trained / "checkpoints" / "best").state_dict()
    monkeypatch.setattr(UNet, "load_state_dict", noting)
    more = ("--init-from", trained, "--steps", 2, "--eval-every", 2)
    ended = call("train", *argv(shards, tmp_path, tiny, *more))
    assert ended.code == 0, ended.err
    assert all(torch.equal(tensor, best[name]) for name, tensor in first["tensors"].items())
    # The other run is not needed to resume.
    again = call("train", *argv(shards, tmp_path, tiny, *more))
    assert "had already finished at step 2" in again.out


def test_other_classes_get_a_head_of_their_own(
    trained: Path, draw, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = draw(tmp_path / "three", 8, values=(0, 100, 200))
    ended = call(
        "pack",
        *("--images", folder / "images", "--masks", folder / "masks", "--out", tmp_path / "data"),
        *("--mask-format", "values", "--mask-values", 0, 100, 200, "--classes", "a", "b", "c"),
        *("--val-fraction", 0.4, "--workers", 1),
    )
    assert ended.code == 0, ended.err
    more = ("--init-from", trained, "--steps", 1, "--eval-every", 1, "--optim.lr", 1e-9)
    ended = call("train", *argv(tmp_path / "data", tmp_path / "run", tiny, *more))
    assert ended.code == 0, ended.err
    best = UNet.from_pretrained(trained / "checkpoints" / "best").state_dict()
    started = torch.load(tmp_path / "run/checkpoints/last/training.pt", weights_only=True)["model"]
    assert started["head.weight"].shape[0] == 3
    for name, tensor in started.items():
        if not name.startswith(("head.", "level_heads.")):
            torch.testing.assert_close(tensor, best[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--model.base-channels", 4), "has base_channels = 2, this run has 4; set --model.base"),
        (("--model.norm", "group"), "has norm = instance, this run has group; set --model.norm"),
    ],
)
def test_another_network_is_refused_with_the_flag_that_makes_it_alike(
    flags, complaint: str, trained: Path, shards: Path, tiny, call, tmp_path: Path
) -> None:
    ended = call("train", *argv(shards, tmp_path / "run", tiny, "--init-from", trained, *flags))
    assert ended.code == 2
    assert complaint in ended.message


def test_a_checkpoint_to_start_from_that_is_missing_is_named(
    shards: Path, tiny, call, tmp_path: Path
) -> None:
    more = ("--init-from", tmp_path / "absent")
    ended = call("train", *argv(shards, tmp_path / "run", tiny, *more))
    assert ended.code == 1
    assert "absent" in ended.err
    assert len(ended.err.splitlines()) == 1


def test_weights_that_are_not_finite_are_never_saved(
    shards: Path, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backward = Accelerator.backward
    calls = 0

    def spoiled(self: Any, loss: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        # The loss of the fifth step is finite; what would come of it is not.
        factor = 1e38 if calls == 5 else 1
        backward(self, loss * factor * factor)

    monkeypatch.setattr(Accelerator, "backward", spoiled)
    more = ("--steps", 50, "--save-every", 1, "--optim.clip-norm", 0)
    ended = call("train", *argv(shards, tmp_path, tiny, *more))
    assert ended.code == 1
    assert "step 5: gradient not finite" in ended.err
    assert steps(tmp_path) >= {"step-00000004"}
    for folder in steps(tmp_path):
        saved = tmp_path / "checkpoints" / folder
        tensors = torch.load(saved / "training.pt", weights_only=True)["model"]
        found = {**tensors, **UNet.from_pretrained(saved).state_dict()}
        assert all(tensor.isfinite().all() for tensor in found.values()), folder


def test_gradients_that_are_not_finite_stop_the_run_by_name(
    shards: Path, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def spoil(parameters: Any, *more: Any, **named: Any) -> torch.Tensor:
        return torch.tensor(float("inf"))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoil)
    ended = call("train", *argv(shards, tmp_path, tiny, "--steps", 9, "--save-every", 1))
    assert ended.code == 1
    assert "step 1: gradient not finite; its samples are " in ended.err
    assert steps(tmp_path) == set()


def test_steps_that_a_loss_scaler_leaves_out_one_after_the_other_end_the_run(
    shards: Path, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", True)
    ended = call("train", *argv(shards, tmp_path, tiny, "--steps", 50))
    assert ended.code == 1
    assert "the gradients of 30 steps in a row were too large for float16" in ended.err
