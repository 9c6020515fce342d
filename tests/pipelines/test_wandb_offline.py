"""`runtime.wandb_run`: without a server that answers, a run is kept offline within seconds."""

import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipelines.runtime import wandb_run


@contextmanager
def refusing() -> Iterator[str]:
    with socket.socket() as bound:  # bound, but not listening
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


@contextmanager
def silent() -> Iterator[str]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(8)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@contextmanager
def failing() -> Iterator[str]:
    """A server that answers every request with an error, as a proxy does."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_error(403)

        do_HEAD = do_GET = do_POST = answer  # noqa: N815

        def log_message(self, format: str, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def end_wandb() -> None:
    """End the service of wandb, which keeps the server of its first run."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    end_wandb()
    yield
    end_wandb()


@pytest.mark.parametrize("server", [refusing, silent, failing])
def test_a_run_without_a_server_is_kept_offline_with_the_command_to_upload_it(
    server, key, shards: Path, tiny, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT", 2)
    run_dir = tmp_path / "run"
    flags = ["--data", shards, "--run-dir", run_dir, *tiny, "--workers", 0, "--steps", 1]
    with server() as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        start = time.monotonic()
        ended = call("train", *flags, "--tracking.backend", "wandb")
    assert time.monotonic() - start < 30
    assert ended.code == 0, ended.err
    (line,) = (line for line in ended.err.splitlines() if line.startswith("tracking: "))
    found = re.search("; the run is kept offline, to upload it: wandb sync (.+)$", line)
    assert found is not None, line
    assert [*Path(found[1]).glob("*.wandb")], line
    assert found[1].startswith(f"{run_dir}/wandb/offline-run-")


def test_online_without_a_key_is_kept_offline(
    shards: Path, tiny, call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--data", shards, "--run-dir", tmp_path / "run", *tiny, "--workers", 0, "--steps", 1]
    ended = call("train", *flags, "--tracking.backend", "wandb")
    assert ended.code == 0
    assert "tracking: wandb has no key (WANDB_API_KEY or wandb login); the run is kept" in ended.err
