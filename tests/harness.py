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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent  # not resolved: the environment's own bin directory
ENV = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def is_open(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], object], timeout_s: float = 30) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)


@dataclass
class Server:
    """A started server: its base URL, its process, and all that it printed so far."""

    url: str
    port: int
    process: subprocess.Popen[bytes]
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


def processes() -> list[tuple[int, int, int]]:
    """The pid, parent and process group of each process that is not a zombie."""
    ps = ["ps", "-A", "-o", "pid=,ppid=,pgid=,stat="]
    listing = subprocess.run(ps, capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listing.splitlines()]
    return [
        (int(row[0]), int(row[1]), int(row[2]))
        for row in rows
        if not row[3].startswith("Z")
    ]


def children(pid: int) -> list[int]:
    return [child for child, parent, _ in processes() if parent == pid]


def group_alive(group: int) -> bool:
    """Whether any process is left in a process group."""
    return any(row[2] == group for row in processes())


def stop(process: subprocess.Popen[bytes], timeout_s: float = 10) -> None:
    """SIGTERM, and SIGKILL for whatever is left of the process's own group."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@contextmanager
def started(
    command: list[str],
    output: int,
    errors: int,
    env: dict[str, str] | None = None,
    cwd: Path = ROOT,
) -> Iterator[subprocess.Popen[bytes]]:
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
        stop(process)


@contextmanager
def serve(
    command: str, env: dict[str, str] | None = None, cwd: Path = ROOT, tls: str = ""
) -> Iterator[Server]:
    """Run `command`, with {port} a free one, wait until it answers, and stop it at last."""
    port = free_port()
    scheme = "https" if tls else "http"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        words = shlex.split(command.format(port=port))
        with (
            path.open("wb") as log,
            started(words, log.fileno(), log.fileno(), env, cwd) as process,
        ):
            server = Server(f"{scheme}://127.0.0.1:{port}", port, process, path)
            wait_until(lambda: is_open(port) or process.poll() is not None)
            assert process.poll() is None, f"the server did not start:\n{server.log}"
            yield server


def client_command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "client.py"), *arguments]


@dataclass
class Run:
    """What a finished client.py left: exit status, stdout, stderr."""

    status: int
    stdout: str
    stderr: str


def run_client(
    *arguments: str,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    timeout_s: float = 60,
) -> Run:
    """Run client.py to its end."""
    done = subprocess.run(
        client_command(*arguments),
        cwd=cwd,
        env=ENV | (env or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr)


def post(
    client: httpx.Client,
    path: str,
    body: bytes | Iterator[bytes],
    content_type: str | None = "application/json",
) -> httpx.Response:
    headers = {"Content-Type": content_type} if content_type else {}
    return client.post(path, content=body, headers=headers)


@contextmanager
def connected(
    command: str = "uvicorn server:app --port {port}", **env: str
) -> Iterator[tuple[Server, httpx.Client]]:
    """A server of its own and a client of it."""
    with (
        serve(command, env) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        yield server, client
