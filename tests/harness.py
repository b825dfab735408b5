"""Start real servers and the real client as processes, and leave nothing behind."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from httpx import Client, Response

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent  # not resolved: the environment's own bin directory
ENV = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
UVICORN = "uvicorn server:app --port {port}"
JSON = "application/json"

Env = dict[str, str] | None
Body = bytes | Iterator[bytes]
Process = subprocess.Popen[bytes]


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def is_open(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], object], timeout_s: float = 30) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)


def processes() -> list[tuple[int, int, int]]:
    """The pid, parent and process group of each process that is not a zombie."""
    ps = ["ps", "-A", "-o", "pid=,ppid=,pgid=,stat="]
    listing = subprocess.run(ps, capture_output=True, text=True, check=True).stdout
    rows = map(str.split, listing.splitlines())
    return [(int(a), int(b), int(c)) for a, b, c, stat in rows if stat[0] != "Z"]


def children(pid: int) -> list[int]:
    return [child for child, parent, _ in processes() if parent == pid]


def group_alive(group: int) -> bool:
    """Whether any process is left in a process group."""
    return any(row[2] == group for row in processes())


@contextmanager
def started(
    command: list[str], output: int, errors: int, env: Env = None, cwd: Path = ROOT
) -> Iterator[Process]:
    """A process in a group of its own, of which nothing is left afterwards."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=ENV | (env or {}),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=errors,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()  # does nothing if the process has ended
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with suppress(ProcessLookupError, PermissionError):  # macOS: zombies alone
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Server(NamedTuple):
    """A started server: its base URL, its process, and all that it printed so far."""

    url: str
    port: int
    process: Process
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


@contextmanager
def serve(
    command: str, env: Env = None, cwd: Path = ROOT, tls: str = ""
) -> Iterator[Server]:
    """Run `command`, with {port} a free one, wait until it answers, and stop it at last."""
    port = free_port()
    words = shlex.split(command.format(port=port))
    url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    with (
        tempfile.NamedTemporaryFile() as log,
        started(words, log.fileno(), log.fileno(), env, cwd) as process,
    ):
        server = Server(url, port, process, Path(log.name))
        wait_until(lambda: is_open(port) or process.poll() is not None)
        assert process.poll() is None, f"the server did not start:\n{server.log}"
        yield server


@contextmanager
def connected(command: str = UVICORN, **env: str) -> Iterator[tuple[Server, Client]]:
    """A server of its own and a client of it."""
    with (
        serve(command, env) as server,
        Client(base_url=server.url, timeout=120) as client,
    ):
        yield server, client


def post(client: Client, path: str, body: Body, media_type: str = JSON) -> Response:
    headers = {"Content-Type": media_type} if media_type else {}
    return client.post(path, content=body, headers=headers)


def client_command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "client.py"), *arguments]


@dataclass
class Run:
    """What a finished client.py left."""

    status: int
    stdout: str
    stderr: str


def run_client(
    *arguments: str, cwd: Path = ROOT, env: Env = None, timeout_s: float = 60
) -> Run:
    """Run client.py to its end."""
    pipe, command = subprocess.PIPE, client_command(*arguments)
    with started(command, pipe, pipe, env, cwd) as process:
        output, errors = process.communicate(timeout=timeout_s)
    return Run(process.returncode, output.decode(), errors.decode())
