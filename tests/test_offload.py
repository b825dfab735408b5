"""What ?offload=process promises: a free event loop, bounded waiting, and no stray process."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from bodies import PROCESS, SMALL, SMALL_ANSWER, assert_answer, valid_body
from harness import children, connected, group_alive, post, serve, wait_until

LARGE_ENTRIES = 1_000_000  # about 25 MB


def longest_wait_s(url: str, path: str) -> float:
    """The longest time that a small request takes while three of 25 MB come one by one."""
    body, answer = valid_body(LARGE_ENTRIES)
    waits_s: list[float] = []
    over = threading.Event()

    def probe() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not over.is_set():
                waits_s.append(post(client, path, SMALL).elapsed.total_seconds())
                time.sleep(0.005)

    with (
        ThreadPoolExecutor(1) as executor,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        assert_answer(post(client, path, body), answer)
        probing = executor.submit(probe)
        try:
            for _ in range(3):
                assert_answer(post(client, path, body), answer)
        finally:
            over.set()
        probing.result()
    return max(waits_s)


def test_process_keeps_the_loop_free_25_mb() -> None:
    """With offload=process nobody waits for a large body; with a thread all do, as without."""
    with serve("uvicorn server:app --port {port}") as server:
        waits_s = {
            path: longest_wait_s(server.url, path)
            for path in ("/pong", "/pong?offload=thread", PROCESS)
        }
    assert waits_s["/pong?offload=thread"] > waits_s["/pong"] / 4
    assert waits_s[PROCESS] < waits_s["/pong?offload=thread"] / 2


def test_small_bodies_stay_inline() -> None:
    """No process is started before the first body that is worth it."""
    body, answer = valid_body(4_000)
    with connected() as (server, client):
        assert_answer(post(client, PROCESS, SMALL), SMALL_ANSWER)
        assert_answer(post(client, "/pong", body), answer)
        assert not children(server.process.pid)
        assert_answer(post(client, PROCESS, body), answer)
        assert len(children(server.process.pid)) == 1


@pytest.mark.parametrize("mode", ["process", "thread"])
def test_burst(mode: str) -> None:
    """Of more bodies than can wait, some get their answer and others 503 with Retry-After."""
    body, answer = valid_body(120_000)
    path = f"/pong?offload={mode}"
    with ThreadPoolExecutor(40) as executor, connected() as (_, client):
        limits = httpx.Limits(max_connections=None)
        with httpx.Client(base_url=client.base_url, limits=limits, timeout=60) as many:
            requests = [executor.submit(post, many, path, body) for _ in range(40)]
            responses = [request.result() for request in requests]
        assert {response.status_code for response in responses} == {200, 503}
        for response in responses:
            if response.status_code == 503:
                assert int(response.headers["Retry-After"]) > 0
            else:
                assert_answer(response, answer)
        assert_answer(post(client, path, body), answer)


def test_killed_processes() -> None:
    """A killed pool process costs one request a 503 at most, and the next nothing."""
    body, answer = valid_body(200_000)
    seen = set()
    with ThreadPoolExecutor(1) as executor, connected() as (server, client):
        assert_answer(post(client, PROCESS, body), answer)
        for delay_s in [0.01 * turn for turn in range(12)]:
            request = executor.submit(post, client, PROCESS, body)
            time.sleep(delay_s)  # at last it is over, and the process idle
            for pid in children(server.process.pid):
                os.kill(pid, signal.SIGKILL)
            statuses = [request.result().status_code]
            statuses.append(post(client, PROCESS, body).status_code)
            assert statuses in ([200, 200], [503, 200], [200, 503])
            assert_answer(post(client, PROCESS, body), answer)
            seen.update(statuses)
        assert seen == {200, 503}
        assert "Traceback" not in server.log


@pytest.mark.parametrize("command", ["uvicorn server:app --port {port}"])
@pytest.mark.parametrize(
    ("number", "kill"),
    [
        (signal.SIGTERM, os.kill),
        (signal.SIGINT, os.kill),
        (signal.SIGINT, os.killpg),  # as Ctrl-C in a terminal does
        (signal.SIGKILL, os.kill),
    ],
)
def test_stop_under_load(
    command: str, number: signal.Signals, kill: Callable[[int, int], None]
) -> None:
    """A server stopped under load leaves no process, no traceback, and its port to the next."""
    body, _ = valid_body(200_000)
    statuses: list[int] = []

    def load(client: httpx.Client) -> None:
        try:
            while True:
                statuses.append(post(client, PROCESS, body).status_code)
        except httpx.TransportError:
            pass  # the server has stopped

    with ThreadPoolExecutor(4) as executor, connected(command) as (server, client):
        loads = [executor.submit(load, client) for _ in range(4)]
        wait_until(lambda: len(statuses) > 4)
        kill(server.process.pid, number)
        server.process.wait(30)
        wait_until(lambda: not group_alive(server.process.pid), 10)
        for running in loads:
            running.result()
        assert set(statuses) <= {200, 503}
        assert "Traceback" not in server.log
        with socket.create_server(("127.0.0.1", server.port)):
            pass
