"""`model.backbone_files`.

Encoders from a hub: a local server that answers like huggingface.co, and none at all.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from pipelines.model.backbone_files import find_backbone
from pipelines.runtime.errors import UsageError

transformers = pytest.importorskip("transformers", reason="the extra `encoders` is not installed")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY = (
    *("--model.preset", "small", "--model.base-channels", "2", "--crop-size", "64"),
    *("--global-batch-size", "4", "--tracking.backend", "none", "--workers", "0"),
    *("--steps", "1", "--model.encoder", "me/tiny"),
)


@dataclass
class Hub:
    """Repository me/tiny, and how often each of its files was downloaded."""

    folder: Path
    address: str = ""
    downloads: Counter[str] = field(default_factory=Counter)

    def environment(self, cache: Path, *, offline: bool = False) -> dict[str, str]:
        return {
            **os.environ,
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": str(int(offline)),
            "HF_HUB_DISABLE_XET": "1",
        }


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    found = Hub(tmp_path / "repository")
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
    transformers.ConvNextForImageClassification(config).save_pretrained(found.folder)
    (found.folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    (found.folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1]})
    )

    class Handler(BaseHTTPRequestHandler):
        def answer(self, *, body: bool) -> None:
            path = found.folder / self.path.partition("?")[0].rpartition("/")[2]
            exists = path.is_file() and "/me/tiny/resolve/" in self.path
            data = path.read_bytes() if exists else b""
            self.send_response(200 if exists else 404)
            self.send_header("X-Repo-Commit", COMMIT)
            if exists:
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            else:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                found.downloads[path.name] += exists
                self.wfile.write(data)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()


def train(data: Path, run_dir: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pipelines.train", "--data", data, "--run-dir", run_dir]
    return subprocess.run(
        [*map(str, command), *TINY], env=environment, capture_output=True, text=True
    )


def header(run_dir: Path) -> dict:
    return json.loads((run_dir / "checkpoints" / "last" / "config.json").read_text())


def test_a_repository_is_downloaded_once_and_then_used_offline(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    ended = train(shards, tmp_path / "a", hub.environment(tmp_path / "cache"))
    assert ended.returncode == 0, ended.stderr
    encoder = header(tmp_path / "a")["model"]["encoder"]
    digest = hashlib.sha256((hub.folder / "model.safetensors").read_bytes()).hexdigest()
    assert (encoder["source"], encoder["revision"]) == ("me/tiny", COMMIT)
    assert (encoder["sha256"], encoder["licence"]) == (digest, "apache-2.0")
    assert encoder["mean"] == [0.5, 0.4, 0.3]
    assert "apache-2.0" in (tmp_path / "a" / "report.html").read_text()
    assert hub.downloads["model.safetensors"] == 1
    ended = train(shards, tmp_path / "b", hub.environment(tmp_path / "cache", offline=True))
    assert ended.returncode == 0, ended.stderr
    assert header(tmp_path / "b") == header(tmp_path / "a")
    assert hub.downloads["model.safetensors"] == 1


def test_a_missing_repository_offline_names_the_files_and_the_command(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    ended = train(shards, tmp_path / "a", hub.environment(tmp_path / "cache", offline=True))
    assert ended.returncode == 2
    assert len(ended.stderr.strip().splitlines()) == 1
    assert (
        "`hf download me/tiny config.json preprocessor_config.json model.safetensors "
        "--local-dir tiny`"
    ) in ended.stderr
    assert "pass --model.encoder tiny" in ended.stderr


def test_retries_of_the_hub_are_not_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def retry(*_: object, **__: object) -> str:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 8s [Retry 5/5].")
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("pipelines.model.backbone_files.hf_hub_download", retry)
    logging.getLogger("huggingface_hub").setLevel(logging.WARNING)
    with pytest.raises(UsageError, match="the hub cannot be reached"):
        find_backbone("me/tiny", "pretrained")
    assert not caplog.records


def test_a_repository_of_pickles_is_refused_and_nothing_of_it_is_downloaded(
    hub: Hub, shards: Path, tmp_path: Path
) -> None:
    (hub.folder / "model.safetensors").rename(hub.folder / "pytorch_model.bin")
    ended = train(shards, tmp_path / "a", hub.environment(tmp_path / "cache"))
    assert ended.returncode == 2
    assert len(ended.stderr.strip().splitlines()) == 1
    assert "only pytorch_model.bin, a pickle, which can run code" in ended.stderr
    assert hub.downloads["pytorch_model.bin"] == 0


@pytest.mark.ranks
def test_one_of_two_ranks_downloads(
    hub: Hub, shards: Path, launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in hub.environment(tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    ended = launch(2, "train", "--data", shards, "--run-dir", tmp_path / "run", *TINY)
    assert ended.code == 0, ended.err
    assert {name: hub.downloads[name] for name in hub.downloads if hub.downloads[name]} == {
        "config.json": 1,
        "model.safetensors": 1,
        "preprocessor_config.json": 1,
        "README.md": 1,
    }
    (hub.folder / "config.json").unlink()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "other"))
    ended = launch(2, "train", "--data", shards, "--run-dir", tmp_path / "run2", *TINY)
    assert ended.code != 0
    assert ended.err.count("the repository has no config.json") == 1
