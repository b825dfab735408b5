"""What ?offload=process promises: a free event loop, bounded waiting, and no stray process."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import harness as h
import pytest
from httpx import Client, TransportError

PONG, THREAD, PROCESS = h.PATHS[1:]


def longest_wait_s(api: Client, path: str) -> float:
    """The longest time that a small request takes while two of 25 MB come one by one."""
    body, answer = h.valid_body(1_000_000)
    h.assert_answer(h.post(api, path, body), answer)
    waits_s = []
    with ThreadPoolExecutor(1) as executor:
        larges = [executor.submit(h.post, api, path, body) for _ in range(2)]
        while not larges[-1].done():
            waits_s.append(h.post(api, path, h.SMALL).elapsed.total_seconds())
            time.sleep(0.005)
    for large in larges:
        h.assert_answer(large.result(), answer)
    return max(waits_s)


def test_process_keeps_the_loop_free_25_mb(api: Client) -> None:
    """With offload=process nobody waits for a large body; with a thread all do, as without."""
    waits_s = {path: longest_wait_s(api, path) for path in (PONG, THREAD, PROCESS)}
    assert waits_s[THREAD] > waits_s[PONG] / 4
    assert waits_s[PROCESS] < waits_s[THREAD] / 2


def test_burst() -> None:
    """40 stalled uploads change nothing for others; once they go on, too many of them get 503."""
    body, answer = h.valid_body(120_000)
    start, barrier = body[:-1], threading.Barrier(41, timeout=60)

    def stalled() -> Iterator[bytes]:
        yield start
        barrier.wait()
        yield body[-1:]

    with h.connected() as (_, client):
        with ThreadPoolExecutor(40) as executor:
            uploads = [stalled() for _ in range(40)]
            requests = [executor.submit(h.post, client, PROCESS, up) for up in uploads]
            h.wait_until(lambda: barrier.n_waiting == 40)
            for _ in range(5):
                h.assert_answer(h.post(client, PROCESS, body), answer)
            barrier.wait()
        responses = [request.result() for request in requests]
        assert {response.status_code for response in responses} == {200, 503}
        for response in responses:
            if response.status_code == 200:
                h.assert_answer(response, answer)
            else:
                assert int(response.headers["Retry-After"]) > 0
        h.assert_answer(h.post(client, PROCESS, body), answer)


def test_killed_processes() -> None:
    """The first large body starts a process; one killed costs a 503 at most, the next nothing."""
    body, answer = h.valid_body(100_000)
    seen = set()
    with h.connected() as (server, client), ThreadPoolExecutor(1) as executor:
        h.assert_answer(h.post(client, PROCESS, h.SMALL))
        h.assert_answer(h.post(client, PONG, body), answer)
        assert not h.children(server.process.pid)
        h.assert_answer(h.post(client, PROCESS, body), answer)
        assert len(h.children(server.process.pid)) == 1
        for delay_s in (0, 0.01, 0.02, 0.04, 0.2):
            request = executor.submit(h.post, client, PROCESS, body)
            time.sleep(delay_s)  # at last it is over, and the process idle
            for pid in h.children(server.process.pid):
                os.kill(pid, signal.SIGKILL)
            statuses = [request.result().status_code]
            statuses.append(h.post(client, PROCESS, body).status_code)
            assert statuses in ([200, 200], [503, 200], [200, 503])
            h.assert_answer(h.post(client, PROCESS, body), answer)
            seen.update(statuses)
        assert seen == {200, 503} and "Traceback" not in server.log


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGINT", "SIGINT as Ctrl-C", "SIGKILL"])
def test_stop_under_load(sent: str) -> None:
    """A server stopped under load leaves no process, no traceback, and its port to the next."""
    body, _ = h.valid_body(100_000)
    name, _, to_group = sent.partition(" ")  # Ctrl-C in a terminal goes to the group
    kill = os.killpg if to_group else os.kill
    statuses = []

    def load(client: Client) -> None:
        with contextlib.suppress(TransportError):  # the server has stopped
            while True:
                statuses.append(h.post(client, PROCESS, body).status_code)

    with ThreadPoolExecutor(4) as executor, h.connected() as (server, client):
        loads = [executor.submit(load, client) for _ in range(4)]
        h.wait_until(lambda: len(statuses) > 4)
        kill(server.process.pid, signal.Signals[name])
        server.process.wait(30)
        h.wait_until(lambda: not h.group_alive(server.process.pid), 10)
        for running in loads:
            running.result()
        assert set(statuses) <= {200, 503} and "Traceback" not in server.log
        socket.create_server(("127.0.0.1", server.port)).close()
