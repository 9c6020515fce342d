"""`training.checkpoints`, `model.load`, `runtime.run_folder`.

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
    assert "was started with optim.lr = 0.1, now it is 0.2" in message
    assert message.endswith("(also: seed)")


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
    with pytest.raises(DataError, match=r"training\.pt is damaged"):
        checkpoints.resume(STATE.fixed, learner, None)
    assert not trace.exists()


def test_a_damaged_training_state_is_refused_in_one_line(
    trained: Path, shards: Path, tiny, call, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    path = run / "checkpoints" / "last" / "training.pt"
    path.write_bytes(path.read_bytes()[:100])
    args = ("--data", shards, "--run-dir", run, *tiny, "--workers", 0, "--steps", 8)
    ended = call("train", *args)
    assert ended.code == 1
    assert "training.pt" in ended.err
    assert len(ended.err.splitlines()) == 1


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
        ("nowhere", "nowhere: is neither a local folder nor a hub id (owner/name)"),
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
    with pytest.raises(DataError, match="this run has not saved a checkpoint yet"):
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
