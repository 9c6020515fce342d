"""`training.checkpoints`, `model.load`, `runtime.run_folder`, `training.stored_training`.

Checkpoints: atomic, resumed only with equal settings, found by run, folder or hub id.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.model.load import find_checkpoint, load_model
from pipelines.runtime.errors import RunError, UsageError
from pipelines.runtime.run_folder import RunFolder, RunLock
from pipelines.training.checkpoints import Checkpoints, TrainState, replace_link
from pipelines.training.optim import Learner, OptimConfig, build_learner
from shards.sample import DataError
from unet import UNet, UNetConfig, weights

STATE = TrainState(0, 0, 0.0, 0, None, None, {"seed": 0, "optim.lr": 0.1})


@pytest.fixture
def learner() -> Learner:
    torch.manual_seed(0)
    return build_learner(UNet(UNetConfig(base_channels=1, depth=1)), OptimConfig())


def learn(learner: Learner) -> None:
    """One optimizer step and one of the average."""
    learner.model(torch.rand(1, 3, 8, 8)).square().mean().backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    assert learner.average is not None
    learner.average.update(learner.model, 1)


def save(
    checkpoints: Checkpoints, state: TrainState, learner: Learner, *, is_best: bool = False
) -> None:
    """Save and wait until it is written."""
    checkpoints.save(state, learner, None, is_best=is_best)
    checkpoints.wait()


def test_what_was_saved_is_what_comes_back(learner: Learner, tmp_path: Path) -> None:
    learn(learner)
    checkpoints = Checkpoints(RunFolder(tmp_path), keep=2)
    state = replace(STATE, step=3, position=12, seconds=4.5, best=0.5, tracking_id="abc")
    save(checkpoints, state, learner, is_best=True)
    other = build_learner(UNet(UNetConfig(base_channels=1, depth=1)), OptimConfig())
    assert checkpoints.resume(STATE.fixed, other, None) == state
    for ours, theirs in (
        (other.model, learner.model),
        (other.scored, learner.scored),
    ):
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor)
    assert not torch.equal(*(m.head.weight for m in (learner.model, learner.scored)))
    # The next step is the same too: the optimizer's moments are back.
    for one in (learner, other):
        torch.manual_seed(1)
        learn(one)
    for name, tensor in learner.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], tensor)


def test_what_prediction_uses_is_the_average(learner: Learner, tmp_path: Path) -> None:
    learn(learner)
    save(Checkpoints(RunFolder(tmp_path), keep=2), STATE, learner)
    loaded = UNet.from_pretrained(str(tmp_path / "checkpoints" / "last"))
    assert torch.equal(loaded.head.weight, learner.scored.head.weight)


def test_without_a_checkpoint_a_run_starts(learner: Learner, tmp_path: Path) -> None:
    assert Checkpoints(RunFolder(tmp_path), keep=2).resume(STATE.fixed, learner, None) == STATE


def test_a_checkpoint_that_was_not_finished_is_not_seen(learner: Learner, tmp_path: Path) -> None:
    checkpoints = Checkpoints(RunFolder(tmp_path), keep=2)
    save(checkpoints, replace(STATE, step=1), learner)
    half = tmp_path / "checkpoints" / ".step-00000002.tmp"
    half.mkdir()
    (half / "state.json").write_text("{")
    assert checkpoints.resume(STATE.fixed, learner, None).step == 1
    save(checkpoints, replace(STATE, step=2), learner)
    assert not half.exists()
    assert checkpoints.resume(STATE.fixed, learner, None).step == 2


def test_pruning_keeps_the_newest_and_what_is_pointed_at(learner: Learner, tmp_path: Path) -> None:
    checkpoints = Checkpoints(RunFolder(tmp_path), keep=2)
    for step in range(1, 7):
        save(checkpoints, replace(STATE, step=step), learner, is_best=step == 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        *("best", "last", "step-00000002", "step-00000005", "step-00000006"),
    ]


def test_everything_that_differs_is_named(learner: Learner, tmp_path: Path) -> None:
    checkpoints = Checkpoints(RunFolder(tmp_path), keep=2)
    save(checkpoints, STATE, learner)
    with pytest.raises(UsageError) as refused:
        checkpoints.resume({"seed": 1, "optim.lr": 0.2}, learner, None)
    message = str(refused.value)
    assert "was created with --seed 0; keep that" in message
    assert message.endswith("(also different: --optim.lr)")


class Payload:
    """Leaves a trace when it is unpickled by something that trusts pickles."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


def test_nothing_in_a_checkpoint_is_executed(learner: Learner, tmp_path: Path) -> None:
    checkpoints = Checkpoints(RunFolder(tmp_path), keep=2)
    save(checkpoints, STATE, learner)
    trace = tmp_path / "trace"
    torch.save({"model": Payload(trace)}, tmp_path / "checkpoints" / "last" / "training.pt")
    strip_checksums(tmp_path / "checkpoints" / "last")
    with pytest.raises(DataError, match=r"training\.pt is damaged"):
        checkpoints.resume(STATE.fixed, learner, None)
    assert not trace.exists()


@pytest.fixture
def steps(learner: Learner, tmp_path: Path) -> Checkpoints:
    """A run with checkpoints of the steps 2, 4 (the best) and 6."""
    checkpoints = Checkpoints(RunFolder(tmp_path), keep=9)
    for step in (2, 4, 6):
        learn(learner)
        state = replace(
            STATE, step=step, validated=step, best=0.5, stale=0 if step == 4 else 1, position=step
        )
        save(checkpoints, state, learner, is_best=step == 4)
    return checkpoints


def lose(checkpoints: Path) -> None:
    for name in ("last", "best"):
        (checkpoints / name).unlink()


def dangle(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints / "step-00000006")


def copy_links(checkpoints: Path) -> None:
    for name in ("last", "best"):
        target = (checkpoints / name).resolve()
        (checkpoints / name).unlink()
        shutil.copytree(target, checkpoints / name)


@pytest.mark.parametrize(
    ("how", "step", "message"),
    [
        (lose, 6, "last is missing; resuming from step-00000006"),
        (dangle, 4, "is a link to step-00000006, which is missing; resuming from step-00000004"),
        (copy_links, 6, ""),
    ],
)
def test_a_run_folder_whose_links_are_lost_resumes_from_its_newest_checkpoint(
    how, step: int, message: str, steps: Checkpoints, learner: Learner, capsys, tmp_path: Path
) -> None:
    how(steps.run.checkpoints)
    assert find_checkpoint(str(tmp_path)) in (
        steps.run.checkpoints / "step-00000004",
        steps.run.best.resolve(),
    )
    state = steps.resume(STATE.fixed, learner, None)
    assert state.step == step
    errors = capsys.readouterr().err
    assert message in errors
    assert bool(errors) == bool(message)
    assert json.loads((steps.run.best / "state.json").read_text())["step"] == 4
    save(steps, replace(state, step=8), learner, is_best=True)
    assert os.readlink(steps.run.last) == os.readlink(steps.run.best) == "step-00000008"
    assert not [path for path in steps.run.checkpoints.iterdir() if path.name.startswith(".")]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILES = ("training.pt", "model.safetensors", "config.json", "state.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("spoil", [cut, flip, Path.unlink])
def test_a_damaged_file_of_last_is_named_and_the_checkpoint_before_is_resumed(
    file: str, spoil, steps: Checkpoints, learner: Learner, capsys
) -> None:
    before = (steps.run.checkpoints / "step-00000006" / "training.pt").read_bytes()
    spoil(steps.run.last / file)
    state = steps.resume(STATE.fixed, learner, None)
    assert (state.step, state.position) == (4, 4)
    errors = capsys.readouterr().err
    assert f"step-00000006/{file} " in errors
    assert "resuming from step-00000004, the newest complete checkpoint" in errors
    assert errors.count("\n") == 1
    # The damaged one is replaced when training reaches its step again.
    save(steps, replace(state, step=6), learner)
    assert steps.resume(STATE.fixed, learner, None).step == 6
    assert capsys.readouterr().err == ""
    assert before


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again(
    steps: Checkpoints, learner: Learner
) -> None:
    for path in steps.run.checkpoints.glob("step-*/training.pt"):
        cut(path)
    with pytest.raises(DataError, match=r"has no complete checkpoint: .*training.pt is damaged"):
        steps.resume(STATE.fixed, learner, None)
    lose(steps.run.checkpoints)
    assert steps.exist


def strip_checksums(folder: Path, **changes: object) -> None:
    """Turn a checkpoint into one of an earlier version."""
    path = folder / "state.json"
    plain = json.loads(path.read_text()) | changes
    del plain["checksums"]
    path.write_text(json.dumps(plain))


def test_a_checkpoint_without_checksums_still_loads(
    steps: Checkpoints, learner: Learner, capsys
) -> None:
    strip_checksums(steps.run.last)
    assert steps.resume(STATE.fixed, learner, None).step == 6
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "changes",
    [{"step": -1}, {"step": "6"}, {"seconds": -1}, {"best": 7}, {"wings": 2}, {"fixed": []}],
    ids=str,
)
def test_a_state_with_an_impossible_value_is_damaged(
    changes: dict[str, object], steps: Checkpoints, learner: Learner, capsys
) -> None:
    strip_checksums(steps.run.last, **changes)
    assert steps.resume(STATE.fixed, learner, None).step == 4
    assert "step-00000006/state.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("optimizer"), "it does not have the fields"),
        (lambda t: t["model"].popitem(), "model does not have the fields"),
        (lambda t: t["average"]["head.bias"].fill_(torch.nan), "average.head.bias contains NaN"),
        (
            lambda t: t["optimizer"]["param_groups"][0].update(lr=float("nan")),
            "optimizer.lr is nan",
        ),
        (lambda t: t["optimizer"]["state"][0].update(step="x"), "optimizer.0.step"),
        (
            lambda t: t["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
            "optimizer.0.exp_avg",
        ),
    ],
)
def test_training_state_that_does_not_fit_is_damaged(
    spoil, message: str, steps: Checkpoints, learner: Learner, capsys
) -> None:
    path = steps.run.last / "training.pt"
    training = torch.load(path, weights_only=True)
    spoil(training)
    torch.save(training, path)
    strip_checksums(steps.run.last)
    assert steps.resume(STATE.fixed, learner, None).step == 4
    errors = capsys.readouterr().err
    assert "training.pt is damaged" in errors
    assert message in errors


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_flipped_bit_in_a_checkpoint_is_not_predicted_with(file: str, steps: Checkpoints) -> None:
    flip(steps.run.best / file)
    with pytest.raises(DataError, match=f"--checkpoint .*{file} is damaged .*sha256"):
        load_model(str(steps.run.path))


def test_a_link_is_replaced_and_stays_relative(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        replace_link(tmp_path / "last", name)
        assert os.readlink(tmp_path / "last") == name
    (tmp_path / ".last.tmp").symlink_to("nowhere")
    replace_link(tmp_path / "last", "a")
    assert (tmp_path / "last").resolve() == tmp_path / "a"


def test_a_run_means_its_best_else_its_last(learner: Learner, tmp_path: Path) -> None:
    checkpoints = Checkpoints(RunFolder(tmp_path), keep=9)
    save(checkpoints, replace(STATE, step=1), learner)
    assert Path(find_checkpoint(str(tmp_path))).name == "step-00000001"
    save(checkpoints, replace(STATE, step=2), learner, is_best=True)
    save(checkpoints, replace(STATE, step=3), learner)
    assert Path(find_checkpoint(str(tmp_path))).name == "step-00000002"
    folder = tmp_path / "checkpoints" / "step-00000001"
    assert find_checkpoint(str(folder)) == folder
    assert find_checkpoint("owner/name") == "owner/name"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("/nowhere/at/all", "/nowhere/at/all: does not exist"),
        ("./nowhere", "./nowhere: does not exist"),
        ("runs/one/two", "runs/one/two: does not exist"),
        (
            "nowhere",
            "nowhere: is neither a local folder nor a hub id (owner/name); check the spelling",
        ),
    ],
)
def test_a_checkpoint_that_is_missing_is_reported(given: str, message: str) -> None:
    with pytest.raises(DataError) as refused:
        load_model(given)
    assert message in str(refused.value)


def test_a_hub_id_that_is_missing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Path:
        raise OSError("404")

    monkeypatch.setattr(weights, "find_folder", missing)
    with pytest.raises(DataError, match="does not exist here and was not found on the hub: 404"):
        load_model("owner/name")


DAMAGES = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "it has no model.safetensors"),
    "no header": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "does not describe a U-Net"),
    "no model": (lambda f: (f / "config.json").write_text("{}"), "it has no 'model'"),
    "a number": (lambda f: (f / "config.json").write_text('{"model": 3}'), "config.json"),
    "bad data": (lambda f: edit(f, data=3), "config.json"),
    "no data": (lambda f: edit(f, data=None), "config.json has no data spec"),
    "new field": (lambda f: edit(f, model={"wings": 2}), "UNetConfig has no field 'wings'"),
    "other size": (
        lambda f: edit(f, model={"num_classes": 5, "base_channels": 1, "depth": 1, "norm": "none"}),
        "the model needs",
    ),
    "other type": (lambda f: edit(f, model={"depth": "deep"}), "config.json"),
    "cut": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-9]
        ),
        "is damaged or not a safetensors file",
    ),
    "a pickle": (
        lambda f: (f / "model.safetensors").write_bytes(pickle.dumps({"a": 1})),
        "is damaged or not a safetensors file",
    ),
}


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_damaged_is_refused_by_name(
    damage: str, make_checkpoint, tmp_path: Path
) -> None:
    spoil, message = DAMAGES[damage]
    folder = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint(), folder)
    spoil(folder)
    with pytest.raises(DataError) as refused:
        load_model(str(folder))
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"--checkpoint {folder}")
    assert "\n" not in str(refused.value)


def test_a_run_that_has_saved_nothing_yet_is_reported(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(
        DataError, match="this run has not saved a checkpoint yet; rerun unet train"
    ):
        load_model(str(tmp_path))


def test_a_run_folder_is_for_one_process_and_free_when_it_ends(tmp_path: Path, wait_for) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from pipelines.runtime.run_folder import RunFolder, RunLock\n"
        "lock = RunLock(RunFolder(Path(sys.argv[1]))); print('locked', flush=True); "
        "sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(RunError, match="another process is training in"):
        RunLock(RunFolder(tmp_path))
    holder.kill()
    holder.communicate()
    RunLock(RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.pth", "is a PyTorch file (a pickle), not a checkpoint folder; convert one of "),
        ("model.safetensors", "is a file of a checkpoint; use its folder "),
        ("x.txt", "is a file, not a run folder, checkpoint folder or hub id"),
    ],
)
def test_a_file_in_place_of_a_checkpoint_is_named_with_its_flag(
    name: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError) as refused:
        load_model(str(tmp_path / name), "--init-from")
    assert str(refused.value).startswith(f"--init-from {tmp_path / name}: {message}")
