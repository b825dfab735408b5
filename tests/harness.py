"""Start real servers and leave nothing behind; bodies for server.py and what it answers."""

import json
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired, check_output
from typing import Any, NamedTuple

from httpx import Client, Response

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent  # not resolved: the environment's own bin directory
ENV = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
UVICORN = "uvicorn server:app --port {port}"
JSON = "application/json"

PATHS = ("/ping", "/pong", "/pong?offload=thread", "/pong?offload=process")
SMALL = b'{"name":"a","data":{"x":-1,"y":7,"z":3}}'
SMALL_ANSWER = {"name": "a", "count": 3, "maxval": 7}

Answer = dict[str, Any] | None
Env = dict[str, str] | None
Body = bytes | Iterator[bytes]
Process = Popen[bytes]


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
    rows = map(str.split, check_output(ps, text=True).splitlines())
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
    how: dict[str, Any] = {"cwd": cwd, "env": ENV | (env or {}), "stdin": DEVNULL}
    how |= {"stdout": output, "stderr": errors, "start_new_session": True}
    process = Popen(command, **how)
    try:
        yield process
    finally:
        process.terminate()  # does nothing if the process has ended
        with suppress(TimeoutExpired):
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
def serve(command: str, env: Env = None, cwd: Path = ROOT) -> Iterator[Server]:
    """Run `command`, with {port} a free one, wait until it answers, and stop it at last."""
    port = free_port()
    words = shlex.split(command.format(port=port))
    url = f"{'https' if '--ssl' in command else 'http'}://127.0.0.1:{port}"
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
    with serve(command, env) as server, Client(timeout=120) as client:
        client.base_url = server.url
        yield server, client


def post(client: Client, path: str, body: Body, media_type: str = JSON) -> Response:
    headers = {"Content-Type": media_type} if media_type else {}
    return client.post(path, content=body, headers=headers)


@cache
def valid_body(entries: int) -> tuple[bytes, Answer]:
    """A valid body, 21 to 26 bytes per entry, and the right answer to it."""
    data = {f"key{i:010d}": i * 7919 % 2_000_003 - 1_000_000 for i in range(entries)}
    answer = {"name": "é", "count": entries, "maxval": max(data.values(), default=0)}
    return json.dumps({"name": "é", "data": data}).encode(), answer


def answers(client: Client, body: bytes) -> list[Response]:
    """What all paths say to a body as it is, and padded past the 64 KiB for `offload`."""
    padded = {body, body.ljust(70_000)}
    return [post(client, path, content) for path in PATHS for content in padded]


def assert_answer(response: Response, answer: Answer = SMALL_ANSWER) -> None:
    assert (response.status_code, response.json()) == (200, answer)


def assert_problem(response: Response, statuses: tuple[int, ...] = (422,)) -> None:
    """A rejection in the contract's form."""
    assert response.status_code in statuses and len(response.content) < 2000
    if response.status_code == 422:
        assert response.json().keys() == {"detail"}
        for error in response.json()["detail"]:
            assert error.keys() == {"type", "loc", "msg"}
            assert isinstance(error["loc"], list) and isinstance(error["msg"], str)
