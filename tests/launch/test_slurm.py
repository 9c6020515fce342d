"""The Slurm recipes, on a real two-node cluster on this machine (slurm_cluster.sh)."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parents[2]
CLUSTER = Path(__file__).with_name("slurm_cluster.sh")
MISSING = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if not shutil.which(name)]

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)}: see {CLUSTER.name}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to start the daemons of Slurm"),
    # Each attempt starts Python on two nodes that share this machine's cores.
    pytest.mark.timeout(900),
]
# Makes the weights independent of the planned length of the run.
CONSTANT = ("--optim.schedule", "constant", "--optim.warmup", 0)


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    number: str
    log: Path
    wait_for: Callable[..., Any]

    def show(self) -> dict[str, str]:
        """Return the fields of `scontrol show job`. Throttled: each call starts a process."""
        time.sleep(0.2)
        return dict(re.findall(r"(\w+)=(\S*)", slurm("scontrol", "show", "job", self.number)))

    @property
    def state(self) -> str:
        return self.show()["JobState"]

    def wait(self, *states: str) -> dict[str, str]:
        """Wait until the job is in one of these states; returns `show()`."""
        try:
            self.wait_for(lambda: self.state in states, f"{self.number} {states}", seconds=240)
        except AssertionError as error:
            raise AssertionError(f"{error}; it is {self.state}:\n{self.output}") from None
        return self.show()

    def end(self) -> str:
        """Wait until the job and its processes have ended; returns its state."""
        self.wait("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        ask = ("squeue", "--noheader", "--states", "RUNNING,COMPLETING", "--format", "%T")
        self.wait_for(lambda: not slurm(*ask, "--job", self.number), "the end of its processes")
        return self.state

    def release(self) -> None:
        """Start a requeued job without the two minutes by which Slurm delays it.

        Repeated, since Slurm resets the start time when the previous attempt ends.
        """
        at_once = ("scontrol", "update", f"JobId={self.number}", "StartTime=now")

        def running() -> bool:
            if self.state == "PENDING":
                subprocess.run(at_once, check=False, capture_output=True)
            return self.state == "RUNNING"

        self.wait_for(running, f"another attempt of {self.number}")

    def signal(self, *which: str) -> None:
        slurm("scancel", "--signal=USR1", *which, self.number)

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def slurm(*command: object) -> str:
    """Run a command of Slurm; returns its output."""
    ended = subprocess.run(
        [str(word) for word in command], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, f"{command}: {ended.stderr}"
    return ended.stdout.strip()


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """The cluster that this process and its jobs use."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        # Jobs inherit the environment of the submitting process.
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        subprocess.run([CLUSTER, "start", folder], check=True, timeout=120)
        try:
            yield
        finally:
            subprocess.run(["scancel", "--user", "root"], check=False, timeout=60)
            subprocess.run([CLUSTER, "stop", folder], check=True, timeout=120)


@pytest.fixture
def submit(wait_for: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """`sbatch OPTIONS launch/slurm/RECIPE ARGUMENTS`."""
    jobs = []

    def start(recipe: str, *arguments: object, options: tuple[object, ...] = ()) -> Job:
        command = ("sbatch", "--parsable", "--output", tmp_path / "%A_%a.log", *options)
        number = slurm(*command, f"launch/slurm/{recipe}.sbatch", *arguments)
        jobs.append(Job(number, tmp_path / f"{number}_4294967294.log", wait_for))
        return jobs[-1]

    yield start
    for job in jobs:
        subprocess.run(["scancel", job.number], check=False, capture_output=True)


def train_flags(data: Path, run_dir: Path, tiny: tuple[str, ...], *more: object) -> list[object]:
    flags = ("--data", data, "--run-dir", run_dir, *tiny, "--workers", 0, "--log-every", 1)
    return [*flags, "--tracking.pictures", 0, "--eval-every", 1_000_000, *CONSTANT, *more]


def state_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "state.json").read_text())


def steps_of(run_dir: Path) -> int:
    """Count the lines of metrics so far."""
    log = run_dir / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def losses(lines: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]


@pytest.mark.parametrize("recipe", ["train", "predict", "pack"])
def test_slurm_accepts_the_recipe(recipe: str) -> None:
    slurm("sbatch", "--test-only", "--nodes", 1, f"launch/slurm/{recipe}.sbatch", "--run-dir", "R")


TWO_NODES = ("--nodes", 2)


def test_a_warned_training_requeues_itself_and_ends_with_the_weights_of_an_uninterrupted_one(
    shards: Path, tiny, launch, submit, wait_for, metrics, tmp_path: Path
) -> None:
    run_dir, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    config = tmp_path / "run.yaml"
    config.write_text("steps: 1000000\n")
    flags = train_flags(shards, run_dir, tiny, "--config", config)
    job = submit("train", *flags, options=TWO_NODES)

    # As with --signal=USR1: all processes of all nodes, but not the script.
    wait_for(lambda: steps_of(run_dir) > 3, "the fourth step", seconds=240)
    job.signal()
    job.wait("PENDING")
    first = state_of(run_dir)
    assert not first["finished"]
    job.release()

    # As with --signal=B:USR1: the script alone; here before its ranks handle signals.
    steps = ("squeue", "--noheader", "--steps", "--format", "%i")
    wait_for(lambda: f"{job.number}.0" in slurm(*steps).split(), "the second attempt's ranks")
    job.signal("--batch")
    job.wait("PENDING")
    second = state_of(run_dir)
    assert not second["finished"]
    assert second["step"] > first["step"]

    config.write_text(f"steps: {second['step'] + 9}\n")
    job.release()
    assert job.end() == "COMPLETED", job.output
    shown = job.show()
    assert (shown["Restarts"], shown["ExitCode"]) == ("2", "0:0")
    assert state_of(run_dir) | {"best": 0, "seconds": 0} == {
        **{"finished": True, "step": second["step"] + 9, "go_on": None, "best": 0, "seconds": 0}
    }
    # One log for all attempts.
    assert job.output.count("interrupted at step") == 2
    assert job.output.count("train.sbatch: interrupted; requeued") == 2
    assert job.output.count("finished at step") == 1
    assert "Traceback" not in job.output

    flags = train_flags(shards, uninterrupted, tiny, "--steps", second["step"] + 9)
    ended = launch(2, "train", *flags)
    assert ended.code == 0, ended.err
    assert losses(metrics(run_dir)) == losses(metrics(uninterrupted))
    weights, expected = (
        load_file(folder / "checkpoints" / "last" / "model.safetensors")
        for folder in (run_dir, uninterrupted)
    )
    assert weights.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []


def test_after_a_lost_node_training_resumes_from_the_last_checkpoint(
    shards: Path, tiny, submit, wait_for, tmp_path: Path
) -> None:
    run_dir, config = tmp_path / "run", tmp_path / "run.yaml"
    config.write_text("steps: 1000000\nsave_every: 5\n")
    flags = train_flags(shards, run_dir, tiny, "--config", config)
    job = submit("train", *flags, options=TWO_NODES)
    saved = run_dir / "checkpoints" / "last" / "state.json"
    wait_for(saved.exists, "the first checkpoint", seconds=240)
    slurm("scontrol", "update", "NodeName=127.0.0.2", "State=DOWN", "Reason=test")
    job.wait("PENDING")
    # The node may have returned by itself.
    resume = ("scontrol", "update", "NodeName=127.0.0.2", "State=RESUME")
    subprocess.run(resume, check=False, capture_output=True)
    step = state_of(saved.parent)["step"]
    config.write_text(f"steps: {step + 5}\nsave_every: 5\n")
    job.release()
    assert job.end() == "COMPLETED", job.output
    assert job.show()["Restarts"] == "1"
    assert state_of(run_dir)["step"] == step + 5


def test_a_cancelled_training_saves_a_checkpoint_and_is_not_requeued(
    shards: Path, tiny, submit, wait_for, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    flags = train_flags(shards, run_dir, tiny, "--steps", 1_000_000)
    job = submit("train", *flags, options=TWO_NODES)
    wait_for(lambda: steps_of(run_dir) > 3, "the fourth step", seconds=240)
    slurm("scancel", job.number)
    assert job.end() == "CANCELLED"
    assert job.show()["Restarts"] == "0"
    state = state_of(run_dir)
    assert not state["finished"]
    assert (run_dir / "checkpoints" / f"step-{state['step']:08d}" / "training.pt").exists()
    assert "train.sbatch: interrupted; rerun the same command to resume" in job.output


def test_a_failed_training_is_not_requeued_whatever_its_previous_state(
    shards: Path, tiny, submit, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "state.json").write_text('{\n "finished": false,\n "step": 5\n}\n')
    nowhere = tmp_path / "nowhere"
    flags = train_flags(nowhere, run_dir, tiny, "--steps", 2)
    job = submit("train", *flags, options=TWO_NODES)
    assert job.end() == "FAILED"
    shown = job.show()
    assert (shown["Restarts"], shown["ExitCode"]) == ("0", "1:0")
    assert f"{nowhere}" in job.output
    assert "failed, not requeued" in job.output


def test_a_training_without_a_run_folder_on_the_command_line_is_refused(
    shards: Path, submit, tmp_path: Path
) -> None:
    job = submit("train", "--data", shards, "--config", tmp_path / "run.yaml")
    assert job.end() == "FAILED"
    assert job.show()["ExitCode"] == "2:0"
    assert job.output.startswith("train.sbatch: --run-dir is missing; pass it here")


def test_every_gpu_of_every_node_gets_a_rank(
    shards: Path, tiny, submit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The GPUs are simulated, the ranks are real.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run_dir = tmp_path / "run"
    options = (*TWO_NODES, "--gpus-per-node", 2)
    job = submit("train", *train_flags(shards, run_dir, tiny, "--steps", 1), options=options)
    assert job.end() == "COMPLETED", job.output
    environment = json.loads((run_dir / "environment.json").read_text())
    assert (environment["ranks"], environment["precision"]) == (4, "bf16")


@pytest.mark.parametrize(
    ("options", "precision"),
    [((), "no"), (("--gpus-per-node", 2), "bf16")],
    ids=["without GPUs", "two ranks per node"],
)
def test_an_array_predicts_the_bytes_of_one_process_and_reports_skipped_inputs(
    options: tuple[object, ...],
    precision: str,
    trained: Path,
    cells: Path,
    submit,
    call,
    content,
    wait_for,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # The GPUs are simulated, the ranks are real.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    images = tmp_path / "images"
    shutil.copytree(cells / "images", images)
    (images / "broken.png").write_bytes(b"not an image")
    flags = ("--checkpoint", trained, "--input", images, "--workers", 0)
    more = ("--samples-per-shard", 4, "--batch-size", 2)
    array = submit(
        *("predict", *flags, *more, "--out", tmp_path / "masks"),
        options=("--array", "1-2", *options),
    )

    def code(part: int) -> str | None:
        job = Job(f"{array.number}_{part}", tmp_path, wait_for).show()
        return job["ExitCode"] if job["JobState"] in ("COMPLETED", "FAILED") else None

    # The broken image is the first one, in a shard of the first part.
    codes = [wait_for(partial(code, part), f"part {part}", seconds=240) for part in (1, 2)]
    assert codes == ["3:0", "0:0"]
    state = state_of(tmp_path / "masks")
    assert (state["finished"], state["images"], state["errors"]) == (True, 12, 1)
    assert call("predict", *flags, *more, "--out", tmp_path / "alone").code == 3
    assert content(tmp_path / "masks") == content(tmp_path / "alone")


def test_an_array_trains_one_fold_per_job(
    shards: Path, tiny, submit, call, wait_for, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    array = submit(
        "train", *train_flags(shards, runs, tiny, "--steps", 1), options=("--array", "1-2")
    )

    def code(part: int) -> str | None:
        job = Job(f"{array.number}_{part}", tmp_path, wait_for).show()
        return job["ExitCode"] if job["JobState"] in ("COMPLETED", "FAILED") else None

    codes = [wait_for(partial(code, part), f"part {part}", seconds=240) for part in (1, 2)]
    assert codes == ["0:0", "0:0"], (tmp_path / f"{array.number}_1.log").read_text()
    assert sorted(path.name for path in runs.iterdir()) == ["fold-1", "fold-2"]
    assert all(state_of(run)["finished"] for run in runs.iterdir())
    argv = ("--checkpoint", runs, "--data", shards, "--split", "cross-validated", "--workers", 0)
    ended = call("evaluate", *argv)
    assert ended.code == 0, ended.err
    assert "12 images of cross-validated" in ended.out


def test_an_array_packs_the_bytes_of_one_process(
    cells: Path, split_file: Path, submit, call, content, tmp_path: Path
) -> None:
    flags = (
        *("--images", cells / "images", "--masks", cells / "masks", "--mask-format", "binary"),
        *("--split-file", split_file, "--samples-per-shard", 3),
    )
    out = ("--out", tmp_path / "shards")
    parts = submit("pack", *flags, *out, options=("--array", "1-3"))
    after = ("--dependency", f"afterany:{parts.number}")
    last = submit("pack", *flags, *out, "--finish", options=after)
    assert last.end() == "COMPLETED", last.output
    logs = [(tmp_path / f"{parts.number}_{part}.log").read_text() for part in (1, 2, 3)]
    assert [f"part {part}/3: " in logs[part - 1] for part in (1, 2, 3)] == [True] * 3
    assert call("pack", *flags, "--out", tmp_path / "alone", "--workers", 1).code == 0
    assert content(tmp_path / "shards") == content(tmp_path / "alone")


def test_an_array_with_a_gap_is_refused(cells: Path, submit, wait_for, tmp_path: Path) -> None:
    flags = ("--images", cells / "images", "--out", tmp_path / "shards")
    job = submit("pack", *flags, options=("--array", "1,3"))
    logs = [tmp_path / f"{job.number}_{part}.log" for part in (1, 3)]
    wait_for(lambda: all(log.exists() and log.read_text() for log in logs), "both refusals")
    assert {log.read_text() for log in logs} == {
        "unet-pack: --array must be 1-N; what is finished is skipped\n"
    }
    assert not (tmp_path / "shards").exists()
