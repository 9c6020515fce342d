"""Forks the commands that tests start from one process that has imported torch and the verbs.

Imports take most of the time of a small command. `python -m tests.fork_server` is that process; a
`ForkServer` starts it and has it fork real processes, each in its own session.
"""

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import IO

REPO = Path(__file__).resolve().parents[1]
PRELOADED = (
    *("pipelines.train", "pipelines.evaluate", "pipelines.predict"),
    # Imported by verbs when they are first needed.
    *("torch._dynamo", "accelerate.tracking", "pipelines.report"),
)
VERB = "import sys; from pipelines.{} import main; sys.exit(main(sys.argv[1:]))"


class Command:
    """A forked command, with those members of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, streams: tuple[IO[str], IO[str]], watcher: socket.socket) -> None:
        self.pid = pid
        self.stdout, self.stderr = streams
        self.returncode: int | None = None
        self._watcher = watcher
        self._output: list[str] | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while the command runs."""
        if self.returncode is None and select.select([self._watcher], [], [], 0)[0]:
            self.returncode = int(self._watcher.recv(64))
            self._watcher.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the command and return its output; kills it after a timeout and raises."""
        if self._output is None:
            output = ["", ""]

            def read(number: int, stream: IO[str]) -> None:
                with stream:
                    output[number] = stream.read()

            streams = enumerate((self.stdout, self.stderr))
            readers = [Thread(target=read, args=one, daemon=True) for one in streams]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join(timeout)
            if any(reader.is_alive() for reader in readers):
                os.killpg(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self._output = output
        if self.returncode is None:
            select.select([self._watcher], [], [])
            self.poll()
        return self._output[0], self._output[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """Starts commands; the server starts with the first one, and anew in another environment."""

    def __init__(self) -> None:
        self._environment: dict[str, str] = {}
        self._requests: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, code: str, *arguments: str, **environment: str) -> Command:
        """Run Python code with `sys.argv[1:]` and additional variables of the environment.

        The variables are set after the imports. Those of this process hold during imports too.
        """
        ours = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        if self._requests is None or ours != self._environment:
            self.close()
            self._launch(ours)
        assert self._requests is not None
        request = {"code": code, "arguments": arguments, "environment": {**ours, **environment}}
        watcher, answers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        theirs = [out_end, err_end, answers.detach()]
        socket.send_fds(self._requests, [json.dumps(request).encode()], theirs)
        for end in theirs:
            os.close(end)
        return Command(int(watcher.recv(64)), (open(out), open(err)), watcher)

    def _launch(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = filter(None, (str(REPO), environment.get("PYTHONPATH")))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fork_server", str(theirs.fileno())],
                cwd=REPO,
                env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def close(self) -> None:
        """End the server; its commands continue."""
        if self._requests is not None and self._process is not None:
            self._requests.close()
            self._process.wait()
            self._requests = self._process = None


def serve(requests: socket.socket) -> None:
    """Fork the requested commands until the other end is closed."""
    for name in PRELOADED:
        import_module(name)
    gc.freeze()
    # The kernel reaps the watchers.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, ends, _, _ = socket.recv_fds(requests, 2**20, 3)
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            watch(json.loads(message), *ends)
            return
        for end in ends:
            os.close(end)


def watch(request: dict, out: int, err: int, answers: int) -> None:
    """Fork a command, and report its process id and exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if (pid := os.fork()) == 0:
        os.setsid()
        os.dup2(out, 1)
        os.dup2(err, 2)
        for end in (out, err, answers):
            os.close(end)
        os.environ.clear()
        os.environ.update(request["environment"])
        sys.argv = ["command", *request["arguments"]]
        exec(request["code"], {"__name__": "__main__"})
        return
    os.close(out)
    os.close(err)
    with socket.socket(fileno=answers) as end:
        end.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        end.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
