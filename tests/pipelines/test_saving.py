"""`training.checkpoints`, `training.snapshot`, `model.checkpoint_files`.

Checkpoints written in the background: training continues, bit-identical, failures reported.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.runtime.errors import RunError
from pipelines.runtime.run_folder import RunFolder
from pipelines.training import checkpoints as checkpoint_files
from pipelines.training.checkpoints import Checkpoints, TrainState
from pipelines.training.optim import Average, Learner, OptimConfig, build_learner
from pipelines.training.snapshot import HostBuffers, Snapshot
from pipelines.training.tracking import Tracker
from unet import UNet, UNetConfig

STATE = TrainState(1, 4, 0.0, 0, None, None, {"seed": 0})
CONSTANT = ("--optim.schedule", "constant", "--optim.warmup", 0)
SECONDS = 60
"""After this a test that waits for another thread has failed."""


@pytest.fixture
def learner() -> Learner:
    torch.manual_seed(0)
    model = UNet(UNetConfig(base_channels=1, depth=1, norm="batch"))
    learner = build_learner(model, OptimConfig())
    learn(learner)
    return learner


def learn(learner: Learner) -> None:
    learner.model(torch.rand(2, 3, 8, 8)).square().mean().backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    assert learner.average is not None
    learner.average.update(learner.model, 1)


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of nested dicts, by their path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    parts = value.items() if isinstance(value, dict) else ()
    return {k: t for key, part in parts for k, t in tensors(part, f"{name}.{key}").items()}


def saved(folder: Path) -> dict[str, torch.Tensor]:
    training = torch.load(folder / "training.pt", weights_only=True)
    return tensors({**training, "scored": UNet.from_pretrained(folder).state_dict()})


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert len(theirs) > 20
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def argv(data: Path, run_dir: Path, tiny: tuple[str, ...], *more: object) -> list[object]:
    flags = ("--data", data, "--run-dir", run_dir, *tiny, "--workers", 0, "--log-every", 1)
    return [*flags, "--tracking.pictures", 0, *CONSTANT, *more]


# ---- the copy


def test_a_snapshot_is_of_the_moment_it_was_taken(
    learner: Learner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    resume_writing = threading.Event()
    write = Snapshot.write

    def later(self: Snapshot, folder: Path) -> None:
        assert resume_writing.wait(SECONDS)
        write(self, folder)

    before = {name: tensor.clone() for name, tensor in tensors(learner.state_dict()).items()}
    monkeypatch.setattr(Snapshot, "write", later)
    with Checkpoints(RunFolder(tmp_path), keep=2) as checkpoints:
        checkpoints.save(STATE, learner, None, is_best=True)
        learn(learner)
        resume_writing.set()
    after = tensors(learner.state_dict())
    assert not torch.equal(before[".model.head.weight"], after[".model.head.weight"])
    found = saved(tmp_path / "checkpoints" / "best")
    scored = {k.replace(".average", ".scored", 1): t for k, t in before.items() if ".average" in k}
    assert_equal(found, before | scored)


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_the_optimizer_updates_the_model_after_a_resume(
    flagged: bool, decay: float, tmp_path: Path
) -> None:
    """`flagged`: as checkpoints of earlier versions, whose weights torch would assign."""
    torch.manual_seed(0)
    config = OptimConfig(ema_decay=decay)
    model = UNet(UNetConfig(base_channels=1, depth=1, norm="batch"))
    learner = build_learner(model, config)
    model(torch.rand(2, 3, 8, 8)).square().mean().backward()
    learner.optimizer.step()
    with Checkpoints(RunFolder(tmp_path), keep=2) as checkpoints:
        checkpoints.save(STATE, learner, None, is_best=True)
    file = tmp_path / "checkpoints" / "last" / "training.pt"
    training = torch.load(file, weights_only=True)
    if flagged:
        for metadata in training["model"]._metadata.values():
            metadata["assign_to_params_buffers"] = True
    resumed = build_learner(UNet(UNetConfig(base_channels=1, depth=1, norm="batch")), config)
    resumed.load_state_dict(training)
    before = [parameter.clone() for parameter in resumed.model.parameters()]
    resumed.model(torch.rand(2, 3, 8, 8)).square().mean().backward()
    resumed.optimizer.step()
    after = resumed.model.parameters()
    assert not any(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_the_same_memory_takes_one_snapshot_after_another(learner: Learner) -> None:
    learner.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    scaler = torch.amp.GradScaler("cpu")  # type: ignore[attr-defined]
    buffers, places = HostBuffers(), []
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for _ in range(2):
        learn(learner)
        torch.manual_seed(5)
        taken = buffers.take(learner, scaler)
        assert torch.equal(torch.get_rng_state(), before)
        assert taken.training["scaler"] == scaler.state_dict()
        own = {name: t for name, t in tensors(taken.training).items() if ".scaler" not in name}
        theirs = tensors(learner.state_dict())
        assert_equal(own, theirs)
        assert [t.stride() for t in own.values()] == [t.stride() for t in theirs.values()]
        assert {t.data_ptr() for t in own.values()}.isdisjoint(
            t.data_ptr() for t in theirs.values()
        )
        # Modules know by it in which form their state was saved.
        assert taken.training["model"]._metadata == learner.model.state_dict()._metadata
        places.append([t.data_ptr() for t in own.values()])
    assert places[0] == places[1]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread")
def test_the_writer_yields_busy_cores_to_training(
    learner: Learner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours, writers = os.getpriority(os.PRIO_PROCESS, 0), []
    write = Snapshot.write

    def record(self: Snapshot, folder: Path) -> None:
        writers.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        write(self, folder)

    monkeypatch.setattr(Snapshot, "write", record)
    with Checkpoints(RunFolder(tmp_path), keep=2) as checkpoints:
        checkpoints.save(STATE, learner, None, is_best=True)
    assert writers == [checkpoint_files.NICENESS] != [ours]
    assert os.getpriority(os.PRIO_PROCESS, 0) == ours


def test_a_second_save_waits_for_the_first(
    learner: Learner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish = Checkpoints.publish
    now, most = 0, 0

    def slow(self: Checkpoints, *given: Any, **named: Any) -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        time.sleep(0.05)
        publish(self, *given, **named)
        now -= 1

    monkeypatch.setattr(Checkpoints, "publish", slow)
    with Checkpoints(RunFolder(tmp_path), keep=9) as checkpoints:
        for step in range(1, 4):
            checkpoints.save(replace(STATE, step=step), learner, None, is_best=False)
            there = [path.name for path in (tmp_path / "checkpoints").glob("step-*")]
            assert sorted(there) == [f"step-{n:08d}" for n in range(1, step)]
    assert most == 1
    assert (tmp_path / "checkpoints" / "last").resolve().name == "step-00000003"


# ---- failures


@pytest.fixture
def in_the_way(tmp_path: Path) -> Callable[[int], Path]:
    """Makes the checkpoint of a step impossible: a file has the name of its folder."""

    def obstruct(step: int) -> Path:
        path = tmp_path / "checkpoints" / f"step-{step:08d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    return obstruct


def fails(checkpoints: Checkpoints) -> None:
    """Wait for a write that fails."""
    assert checkpoints.writing is not None
    assert checkpoints.writing.exception(SECONDS) is not None


def test_a_failure_is_raised_by_whatever_is_called_next(
    learner: Learner, in_the_way, tmp_path: Path
) -> None:
    in_the_way(1)
    checkpoints = Checkpoints(RunFolder(tmp_path), keep=2)
    checkpoints.raise_failure()
    checkpoints.save(STATE, learner, None, is_best=False)
    fails(checkpoints)
    for action in (
        checkpoints.raise_failure,
        checkpoints.wait,
        lambda: checkpoints.save(replace(STATE, step=2), learner, None, is_best=False),
    ):
        with pytest.raises(RunError, match=r"step-00000001 cannot be written \(.*Not a directory"):
            action()
    assert not checkpoints.exist


def test_a_failure_is_not_lost_where_the_run_ends_with_another(
    learner: Learner, in_the_way, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    in_the_way(1)
    with (
        pytest.raises(RunError, match="cannot be written"),
        Checkpoints(RunFolder(tmp_path), 2) as ours,
    ):
        ours.save(STATE, learner, None, is_best=False)
    assert caplog.text == ""
    ours = Checkpoints(RunFolder(tmp_path), 2)
    ours.save(STATE, learner, None, is_best=False)
    ours.__exit__(None, ZeroDivisionError(), None)
    assert "step-00000001 cannot be written" in caplog.text


def test_a_failure_ends_the_run_before_the_next_save(
    shards: Path, tiny, call, in_the_way, metrics, tmp_path: Path
) -> None:
    in_the_way(100)
    more = ("--steps", 100_000, "--save-every", 100, "--eval-every", 100_000)
    ended = call("train", *argv(shards, tmp_path, tiny, *more))
    assert ended.code == 1
    message = ended.err.splitlines()[-1]
    assert message.startswith(f"unet train: {tmp_path / 'checkpoints' / 'step-00000100'} cannot be")
    assert "free some space, then rerun the same command to resume" in message
    assert ended.err.count("cannot be written") == 1
    assert metrics(tmp_path)[-1]["step"] < 200
    assert not (tmp_path / "checkpoints" / "last").exists()


def test_a_failure_of_the_last_checkpoint_is_one_of_the_run(
    shards: Path, tiny, call, in_the_way, tmp_path: Path
) -> None:
    way = in_the_way(3)
    more = ("--steps", 3, "--eval-every", 2)
    ended = call("train", *argv(shards, tmp_path, tiny, *more))
    assert ended.code == 1
    assert "step-00000003 cannot be written" in ended.err.splitlines()[-1]
    assert "finished" not in ended.out
    assert not (tmp_path / "state.json").exists()
    assert json.loads((tmp_path / "checkpoints/last/state.json").read_text())["step"] == 2
    way.unlink()
    ended = call("train", *argv(shards, tmp_path, tiny, *more))
    assert ended.code == 0, ended.err
    assert "finished at step 3" in ended.out


@pytest.mark.ranks
def test_a_failure_ends_all_ranks(shards: Path, tiny, launch, in_the_way, tmp_path: Path) -> None:
    in_the_way(20)
    more = ("--steps", 1_000_000, "--save-every", 20, "--eval-every", 1_000_000)
    ended = launch(2, "train", *argv(shards, tmp_path, tiny, *more))
    assert ended.code == 1
    assert ended.err.count("step-00000020 cannot be written") == 1


# ---- beside training

TEN = ("--steps", 10, "--save-every", 4, "--eval-every", 100, "--keep-checkpoints", 9)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Runs of TEN write checkpoints 4 and 8 when two more steps are made; those that they saw."""
    made = threading.Condition()
    now, seen = 0, []
    update, publish = Average.update, Checkpoints.publish

    def counted(self: Average, model: UNet, step: int) -> None:
        nonlocal now
        update(self, model, step)
        with made:
            now = step
            made.notify_all()

    def late(self: Checkpoints, state: TrainState, *given: Any, **named: Any) -> None:
        if state.step < 10:
            with made:
                assert made.wait_for(lambda: now >= state.step + 2, SECONDS)
                seen.append(now)
        publish(self, state, *given, **named)

    monkeypatch.setattr(Average, "update", counted)
    monkeypatch.setattr(Checkpoints, "publish", late)
    return seen


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves return when the checkpoint is on the disk."""
    save = Checkpoints.save

    def saved(self: Checkpoints, *given: Any, **named: Any) -> None:
        save(self, *given, **named)
        self.wait()

    monkeypatch.setattr(Checkpoints, "save", saved)


@pytest.fixture(scope="module", params=[(), ("--model.norm", "batch", "--model.dropout", 0.5)])
def network(request: pytest.FixtureRequest) -> tuple[object, ...]:
    return request.param


def test_steps_continue_while_a_checkpoint_is_written_and_its_bits_are_the_same(
    network, shards: Path, tiny, call, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "beside"
    request.getfixturevalue("at_once")
    assert call("train", *argv(shards, whole, tiny, *TEN, *network)).code == 0
    request.getfixturevalue("monkeypatch").undo()
    seen = request.getfixturevalue("beside")
    ended = call("train", *argv(shards, run_dir, tiny, *TEN, *network))
    assert ended.code == 0, ended.err
    assert len(seen) == 2
    assert 6 <= seen[0] <= 8
    assert seen[1] == 10
    for step in (4, 8, 10):
        name = f"checkpoints/step-{step:08d}"
        assert_equal(saved(run_dir / name), saved(whole / name))


def test_what_comes_after_training_finds_the_checkpoints_complete(
    shards: Path, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish, finish = Checkpoints.publish, Tracker.finish
    found = []

    def slow(self: Checkpoints, *given: Any, **named: Any) -> None:
        time.sleep(0.5)
        publish(self, *given, **named)

    def noting(self: Tracker) -> None:
        found.append((self.folder.best.resolve().name, saved(self.folder.best)))
        finish(self)

    monkeypatch.setattr(Checkpoints, "publish", slow)
    monkeypatch.setattr(Tracker, "finish", noting)
    ended = call("train", *argv(shards, tmp_path, tiny, "--steps", 2, "--eval-every", 2))
    assert ended.code == 0, ended.err
    assert "report: " in ended.out
    assert [name for name, _ in found] == ["step-00000002"]


def test_sigterm_while_a_checkpoint_is_written_ends_with_a_complete_one(
    shards: Path, tiny, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publish = Checkpoints.publish

    def request_stop(self: Checkpoints, state: TrainState, *given: Any, **named: Any) -> None:
        if state.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            # Long enough for the run to take notice and to save again.
            time.sleep(3)
        publish(self, state, *given, **named)

    whole, run_dir = tmp_path / "whole", tmp_path / "stopped"
    many = ("--save-every", 5, "--eval-every", 1_000_000, "--keep-checkpoints", 9)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "publish", request_stop)
        ended = call("train", *argv(shards, run_dir, tiny, *many, "--steps", 1_000_000))
    assert ended.code == 75, ended.err
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    step = json.loads((run_dir / "state.json").read_text())["step"]
    assert step > 5
    assert names == ["last", "step-00000005", f"step-{step:08d}"]
    assert (run_dir / "checkpoints" / "last").resolve().name == names[-1]
    # It resumes identically.
    for folder in (run_dir, whole):
        ended = call("train", *argv(shards, folder, tiny, *many, "--steps", step + 2))
        assert ended.code == 0, ended.err
    last = f"checkpoints/step-{step + 2:08d}"
    assert_equal(saved(run_dir / last), saved(whole / last))


def killed_in_the_background(moment: int, log: Path, arguments: list[object]) -> None:
    """Trains; the second checkpoint's thread waits for a later step and ends the process."""
    from pipelines import train

    flush, count = checkpoint_files.flush_to_disk, 0

    def last_step() -> int:
        return json.loads(log.read_text().splitlines()[-1])["step"]

    def deadly(file: Path) -> None:
        nonlocal count
        count += 1
        if count == moment:
            until = time.monotonic() + SECONDS
            while last_step() < 10:
                assert time.monotonic() < until
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        flush(file)

    checkpoint_files.flush_to_disk = deadly
    os._exit(train.main([str(argument) for argument in arguments]))


@pytest.mark.parametrize("moment", [7, 9])
def test_a_kill_while_training_is_ahead_of_the_disk_costs_the_steps_since_the_checkpoint_before(
    moment: int, shards: Path, tiny, call, metrics, tmp_path: Path
) -> None:
    whole, run_dir = tmp_path / "whole", tmp_path / "killed"
    # Six files are flushed of each checkpoint.
    given = ("--steps", 12, "--save-every", 4, "--eval-every", 100)
    process = multiprocessing.get_context("fork").Process(
        target=killed_in_the_background,
        args=(moment, run_dir / "metrics.jsonl", argv(shards, run_dir, tiny, *given)),
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert metrics(run_dir)[-1]["step"] >= 10
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {"last", "step-00000004", ".step-00000008.tmp"}
    for folder in (whole, run_dir):
        ended = call("train", *argv(shards, folder, tiny, *given))
        assert ended.code == 0, ended.err
    last = "checkpoints/step-00000012"
    assert_equal(saved(run_dir / last), saved(whole / last))
    losses = [
        [(line["step"], line["train/loss"]) for line in metrics(folder) if "train/loss" in line]
        for folder in (whole, run_dir)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_snapshot_of_a_card_is_complete_and_in_page_locked_memory(learner: Learner) -> None:
    model = learner.model.to("cuda")
    on_card = build_learner(model, OptimConfig())
    on_card.model(torch.rand(2, 3, 8, 8, device="cuda")).square().mean().backward()
    on_card.optimizer.step()
    expected = {name: t.cpu() for name, t in tensors(on_card.state_dict()).items()}
    taken = HostBuffers().take(on_card, None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = tensors(taken.training)
    assert_equal(found, expected)
    pinned = [t.is_pinned() for name, t in found.items() if ".step" not in name]
    assert all(pinned)
    assert taken.model.head.weight.device.type == "cpu"
