"""Remote requests end in time, and temporary failures are retried within it."""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import count
from pathlib import Path

import pytest

from shards import requests
from shards.requests import finish_within, retry, set_remote_timeout
from shards.sample import DataError
from shards.store import ByteRange, Store


@pytest.fixture
def silent() -> Iterator[str]:
    """URL of a server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(99)
        yield f"http://127.0.0.1:{server.getsockname()[1]}/data"


class Stalling(BaseHTTPRequestHandler):
    """Sends headers and a byte, then nothing more."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x")
        self.wfile.flush()
        time.sleep(5)

    def log_message(self, *_: object) -> None:
        pass


class Unavailable(Stalling):
    """Answers with 503."""

    def do_GET(self) -> None:
        self.send_error(503)


@pytest.fixture
def serve() -> Iterator:
    servers = []

    def start(handler: type[BaseHTTPRequestHandler]) -> str:
        servers.append(HTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/data"

    yield start
    for server in servers:
        threading.Thread(target=server.shutdown, daemon=True).start()


@pytest.fixture
def one_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(requests.VARIABLE, "1")


def requests_of(store: Store, file: Path) -> dict:
    file.write_bytes(b"12")
    return {
        "names": store.names,
        "kind": store.kind,
        "find": store.find,
        "exists": lambda: store.exists("f"),
        "read": lambda: store.read("f"),
        "read_ranges": lambda: store.read_ranges([ByteRange("f", 0, 9)]),
        "size": lambda: store.size("f"),
        "remove": lambda: store.remove("f"),
        "upload": lambda: store.upload(file, "f"),
    }


NAMES = ("names", "kind", "find", "exists", "read", "read_ranges", "size", "remove", "upload")


@pytest.mark.parametrize("name", NAMES)
def test_every_request_to_a_server_that_never_answers_ends_in_time(
    name: str, silent: str, one_second: None, tmp_path: Path
) -> None:
    pytest.importorskip("aiohttp")
    start = time.monotonic()
    with pytest.raises(DataError) as error:
        requests_of(Store(silent), tmp_path / "file")[name]()
    assert time.monotonic() - start < 2.5
    assert str(error.value).startswith(silent)
    if name not in ("remove", "upload"):
        # The client for HTTP neither removes nor uploads.
        assert "no answer within --remote-timeout 1;" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("handler", [Stalling, Unavailable])
def test_reads_from_a_server_that_stalls_or_is_unavailable_end_in_time(
    handler: type[BaseHTTPRequestHandler], serve, one_second: None
) -> None:
    pytest.importorskip("aiohttp")
    start = time.monotonic()
    with pytest.raises(DataError, match="check address, credentials and network"):
        Store(serve(handler)).read("f")
    assert time.monotonic() - start < 2.5


def test_an_attempt_that_is_never_answered_leaves_time_for_another() -> None:
    attempts = count(1)

    def request() -> int:
        if (attempt := next(attempts)) == 1:
            time.sleep(10)
        return attempt

    assert retry(request, 1.0) == 2


def test_errors_are_retried_until_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "RETRY_DELAYS", (0.1,) * 100)
    attempts = count()

    def request() -> None:
        next(attempts)
        raise OSError("503")

    with pytest.raises(OSError, match="503"):
        retry(request, 0.5)
    assert 5 <= next(attempts) <= 10


def test_an_error_of_a_request_is_raised_as_it_is() -> None:
    with pytest.raises(KeyError, match="name"):
        finish_within(lambda: {}["name"], 5, 5)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_that_is_no_duration_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="--remote-timeout must be a number of seconds > 0"):
        set_remote_timeout(seconds)
