"""Shared fixtures: generated images, verbs run in or out of process, a tiny trained run."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    contextmanager,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, Literal
from urllib.request import Request, urlopen

import numpy as np
import psutil
import pytest
from PIL import Image

from pipelines.runtime import progress

# Before torch is imported, and inherited by every process that a test starts.
os.environ.update(
    OMP_NUM_THREADS="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    HF_HUB_OFFLINE="1",
    COLUMNS="120",
)
if not Path("/dev/nvidiactl").exists():
    # Without a GPU, expected numbers hold on CPUs that compute in bf16 and on those that do not.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
for launched in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU"):
    os.environ.pop(launched, None)

REPO = Path(__file__).resolve().parents[1]
TINY_TRAINING = (
    *("--model.preset", "small", "--model.base-channels", "2", "--model.depth", "2"),
    *("--crop-size", "32", "--global-batch-size", "4", "--tracking.backend", "none"),
)


@dataclass(frozen=True)
class CommandResult:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """stderr in one line."""
        return " ".join(self.err.split())


def flags(folder: Path, out: Path, *more: object, mask_format: str = "binary") -> list[object]:
    """Return flags of `pack` and `check` for a folder made by `draw` or `pair`."""
    return [
        *("--images", folder / "images", "--masks", folder / "masks", "--out", out),
        *("--mask-format", mask_format, "--workers", 1, *more),
    ]


def solid_image(
    colour: int = 9, size: tuple[int, int] = (20, 16), mode: str = "RGB"
) -> Image.Image:
    return Image.new(mode, size, colour if mode != "RGB" else (colour,) * 3)


def save_cells(folder: Path, count: int = 9, *, up: int = 0, left: int = 0) -> Path:
    """Save images of bright squares and their binary masks, which are shifted by some pixels."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        cells = np.kron(rng.random((12, 12)) < 0.4, np.ones((4, 4)))
        noisy = 80 + 90 * cells + rng.normal(0, 8, cells.shape)
        Image.fromarray(noisy.round().astype(np.uint8)).save(folder / "images" / f"{i}.png")
        mask = (255 * np.roll(cells, (-up, -left), (0, 1))).astype(np.uint8)
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    return folder


def levels(*values: int, like: type = np.uint8) -> np.ndarray:
    """Make a mask of zeros that starts with these values."""
    pixels = np.zeros((16, 20), like)
    pixels[0, : len(values)] = values
    return pixels


def plain(arguments: Sequence[object]) -> list[str]:
    return [str(argument) for argument in arguments]


def forget_accelerator() -> None:
    """Reset the process-wide state of Accelerate, since each command expects a fresh one."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()


@pytest.fixture(scope="session", autouse=True)
def no_progress() -> None:
    """What a verb prints does not depend on how long a busy machine takes for it."""
    progress.LINE_INTERVAL = 1e9


@dataclass(frozen=True)
class Dispatched:
    """An operator call, as dispatched by torch."""

    name: str
    """For example `aten.add.Tensor`."""
    devices: tuple[str, ...]
    """Device types of the tensor arguments."""
    target: str | None
    """Requested device type of the result."""

    @property
    def crosses(self) -> bool:
        """Whether the call copies from the host to another device."""
        return self.devices[:1] == ("cpu",) and self.target not in (None, "cpu")


@pytest.fixture(scope="session")
def dispatched() -> Callable[[], AbstractContextManager[list[Dispatched]]]:
    """Logs the operators dispatched within a context, including backward passes."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[Dispatched] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs))
                       if isinstance(a, torch.Tensor)]  # fmt: skip
            target = kwargs.get("device")
            found = func(*args, **kwargs)
            if str(func) == "aten.copy_.default":
                target = tensors[0].device
                tensors = tensors[1:]
            self.calls.append(
                Dispatched(
                    str(func),
                    tuple(tensor.device.type for tensor in tensors),
                    None if target is None else torch.device(target).type,
                )
            )
            return found

    @contextmanager
    def log() -> Iterator[list[Dispatched]]:
        with Log() as mode:
            yield mode.calls

    return log


@pytest.fixture(scope="session")
def call() -> Callable[..., CommandResult]:
    """Runs `unet VERB ARGUMENTS` in this process."""

    def run(verb: str, *arguments: object) -> CommandResult:
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        out, err = io.StringIO(), io.StringIO()
        forget_accelerator()
        try:
            with redirect_stdout(out), redirect_stderr(err):
                code = import_module(f"pipelines.{verb}").main(plain(arguments))
        except SystemExit as end:
            code = end.code
        finally:
            forget_accelerator()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return CommandResult(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def spawn() -> Callable[..., subprocess.Popen[str]]:
    """Starts `python -m pipelines.VERB ARGUMENTS` in its own process group, without waiting."""

    def start(verb: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", f"pipelines.{verb}", *plain(arguments)],
            cwd=REPO,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="session")
def spawn_ranks() -> Callable[..., subprocess.Popen[str]]:
    """Starts a verb on several CPU ranks in its own process group.

    The ranks are forked, which saves their imports, or started by `accelerate launch`.
    """

    def start(
        ranks: int, verb: str, *arguments: object, accelerate: bool = False, use_cpu: bool = True
    ) -> subprocess.Popen[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
            *("--multi_gpu", "--num_processes", ranks, "--num_machines", 1),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port),
            *("-m", f"pipelines.{verb}", *arguments),
        ]
        if not accelerate:
            command = [sys.executable, REPO / "tests" / "fork_ranks.py", ranks, port, verb]
            command += arguments
        return subprocess.Popen(
            plain(command),
            cwd=REPO,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")]),
                **({"ACCELERATE_USE_CPU": "true"} if use_cpu else {}),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.fixture(scope="session")
def launch(spawn_ranks: Callable[..., subprocess.Popen[str]]) -> Callable[..., CommandResult]:
    """Runs a verb on several CPU ranks; arguments as those of `spawn_ranks`."""

    def run(*arguments: Any, **named: Any) -> CommandResult:
        process = spawn_ranks(*arguments, **named)
        out, err = process.communicate(timeout=400)
        return CommandResult(process.returncode, out, err)

    return run


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., Any]:
    """Polls until a condition is true and returns its value; fails after a timeout."""

    def wait(condition: Callable[[], Any], what: str, seconds: float = 300) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.002)
        raise AssertionError(f"{what} did not happen within {seconds} s")

    return wait


@pytest.fixture(scope="session")
def kill() -> Callable[[subprocess.Popen[str]], None]:
    """Kills a spawned command and all its descendants, as a power cut would."""

    def kill_all(process: subprocess.Popen[str]) -> None:
        started = []
        with suppress(psutil.NoSuchProcess):
            # A launcher puts each rank into its own process group.
            started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for one in started:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.communicate()

    return kill_all


@pytest.fixture(scope="session")
def draw() -> Callable[..., Path]:
    """Writes `images` (a bright disc on noise) and `masks` (the disc) into a folder."""

    def draw_into(
        folder: Path,
        count: int = 8,
        *,
        size: tuple[int, int] = (48, 48),
        values: Sequence[int] = (0, 255),
        mode: str = "RGB",
        seed: int = 0,
        name: str = "p{:03d}",
    ) -> Path:
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            rng = np.random.default_rng([seed, number])
            height, width = size
            y, x = np.mgrid[:height, :width]
            radius = rng.uniform(0.2, 0.4) * min(size)
            centre = rng.uniform(0.3, 0.7, 2) * size
            distance = np.hypot(y - centre[0], x - centre[1]) / radius
            index = np.minimum((distance < 1) * (len(values) - 1 - (distance * 2).astype(int)), 255)
            index = np.clip(index, 0, len(values) - 1)
            pixels = rng.integers(0, 90, (height, width, 3)) + (index > 0)[..., None] * 120
            image = Image.fromarray(pixels.astype(np.uint8)).convert(mode)
            path = folder / "images" / f"{name.format(number)}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
            mask = folder / "masks" / f"{name.format(number)}.png"
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.array(values, dtype=np.uint8)[index]).save(mask)
        return folder

    return draw_into


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A folder with one good pair, `a.png`, 20 x 16."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    solid_image().save(tmp_path / "images" / "a.png")
    mask = levels()
    mask[4:8, 4:8] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    return tmp_path


@pytest.fixture(scope="session")
def content() -> Callable[[Path], dict[str, bytes]]:
    """Reads {relative path: bytes} of all files below a folder, including hidden ones."""

    def read(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return read


@dataclass(frozen=True)
class Packed:
    """A sample of a data set, decoded as for training."""

    split: str
    raw: Any
    image: Any
    mask: Any


@pytest.fixture(scope="session")
def samples() -> Callable[[Path], dict[str, Packed]]:
    """Reads {source: sample} of all splits of a data set."""
    from shards.manifest import read_manifest
    from shards.order import EvalPlan
    from shards.reader import SampleSource, ShardReader

    def read(data: Path) -> dict[str, Packed]:
        manifest, packed = read_manifest(data), {}
        for name, split in manifest.splits.items():
            plan = EvalPlan(tuple(s.samples for s in split.shards), chunk=1, rank=0, world=1)
            for (raw,) in SampleSource(ShardReader(data, split.shards), plan):
                decoded = raw.decode(manifest.image_format, len(manifest.classes))
                packed[raw.parse_info()["source"]] = Packed(name, raw, decoded.image, decoded.mask)
        return packed

    return read


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """Reads the lines of a run's metrics.jsonl."""

    def read(run_dir: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    return read


@pytest.fixture(scope="session")
def cells(tmp_path_factory: pytest.TempPathFactory, draw: Callable[..., Path]) -> Path:
    """Folders of 12 images and binary masks."""
    return draw(tmp_path_factory.mktemp("cells"), 12)


@pytest.fixture(scope="session")
def split_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split file with the first four cells for validation."""
    path = tmp_path_factory.mktemp("split") / "split.csv"
    lines = [f"p{i:03d}.png,{'val' if i < 4 else 'train'}" for i in range(12)]
    path.write_text("\n".join(["path,split", *lines]) + "\n")
    return path


@pytest.fixture(scope="session")
def shards(
    tmp_path_factory: pytest.TempPathFactory,
    call: Callable[..., CommandResult],
    cells: Path,
    split_file: Path,
) -> Path:
    """The cells as shards: 8 for training in 3 shards, 4 for validation in 2."""
    out = tmp_path_factory.mktemp("data") / "shards"
    ended = call(
        "pack",
        *("--images", cells / "images", "--masks", cells / "masks", "--mask-format", "binary"),
        *("--split-file", split_file, "--samples-per-shard", 3, "--workers", 1, "--out", out),
    )
    assert ended.code == 0, ended.err
    return out


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Flags of a training that takes a few seconds."""
    return TINY_TRAINING


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, call: Callable[..., CommandResult], shards: Path
) -> Path:
    """The run folder of a tiny training of six steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    ended = call(
        "train",
        *("--data", shards, "--run-dir", run_dir, *TINY_TRAINING, "--workers", 0),
        *("--steps", 6, "--log-every", 2, "--eval-every", 3),
    )
    assert ended.code == 0, ended.err
    return run_dir


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A local S3 server that this process and its children use."""
    import fsspec

    s3fs, moto = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    named = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in named.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        # A running fork server would start workers with the old environment.
        forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]
        # Objects of an earlier server are still in the memory of this process.
        urlopen(Request(f"{named['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")).close()
        fsspec.filesystem("s3").mkdir("bucket")
        yield named["AWS_ENDPOINT_URL"]
    s3fs.S3FileSystem.clear_instance_cache()
    forkserver._forkserver._stop()  # pyright: ignore[reportAttributeAccessIssue]
    server.stop()


@pytest.fixture(scope="module")
def objects(s3: str) -> Callable[[str], dict[str, bytes]]:
    """Reads {name: bytes} below a URL."""
    import fsspec

    def read(url: str) -> dict[str, bytes]:
        system, root = fsspec.url_to_fs(url)
        system.invalidate_cache()
        return {name.removeprefix(f"{root}/"): system.cat_file(name) for name in system.find(root)}

    return read


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes checkpoints with hand-set weights: class 1 where the first channel is above 127."""

    def make(
        channels: Literal["L", "RGB"] = "RGB",
        classes: tuple[str, ...] = ("background", "foreground"),
    ) -> Path:
        import torch

        from unet import DataSpec, UNet, UNetConfig

        count = len(channels)
        spec = DataSpec(
            classes=classes,
            palette=((0, 0, 0), (255, 51, 51), (9, 99, 200))[: len(classes)],
            channels=channels,
            mean=(0.0,) * count,
            std=(1.0,) * count,
            crop_size=32,
        )
        config = UNetConfig(
            in_channels=count, num_classes=len(classes), base_channels=1, depth=1, norm="none"
        )
        model = UNet(config, spec)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.zero_()
                if weight.shape[-2:] == (3, 3) and not name.startswith("bottom"):
                    weight[0, 0, 1, 1] = 1
            model.head.weight[1] = 1000
            model.head.bias[1] = -1000 * 127.5 / 255
            model.head.bias[2:] = -1e6
        folder = tmp_path_factory.mktemp("checkpoint") / "checkpoint"
        model.save_pretrained(folder)
        return folder

    return make
