"""Hostile bodies and broken connections: what they cost server.py, and what is kept of them."""

import re
import socket
import statistics
import struct
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from bodies import (
    PATHS,
    PROCESS,
    SMALL,
    SMALL_ANSWER,
    assert_answer,
    assert_problem,
    keyed,
    valid_body,
)
from harness import Server, connected, post, wait_until

MB = 1_000_000


def listed(item: bytes, size_bytes: int) -> bytes:
    return b"[%s]" % b",".join([item] * (size_bytes // (len(item) + 1)))


def hostile(size_bytes: int) -> dict[str, bytes]:
    """Invalid bodies of about this size, each as costly as its kind can be."""
    good = keyed(b"1", size_bytes)
    text = b"x" * size_bytes
    return {
        "all floats": keyed(b"1.5", size_bytes),
        "all strings": keyed(b'"x"', size_bytes),
        "all objects": keyed(b'{"a":1}', size_bytes),
        "all past 64 bits": keyed(b"9" * 20, size_bytes),
        "bad value at the end": good[:-2] + b',"z":1.5}}',
        "no name": good.replace(b'"name":"a",', b"", 1),
        "bad UTF-8": good[:-4] + b'\xff":1}}',
        "half a body": good[: size_bytes // 2],
        "name a list": b'{"name":%s,"data":{}}' % listed(b"1", size_bytes),
        "long name": b'{"name":"%s","data":{}}' % text,
        "long key": b'{"name":"a","data":{"%s":1.5}}' % text,
        "long integer": b'{"name":"a","data":{"x":%s}}' % (b"1" * size_bytes),
        "empty objects": listed(b"{}", size_bytes),
        "nested lists": listed(b"[[[]]]", size_bytes),
        "deep": b"[" * (size_bytes // 2) + b"]" * (size_bytes // 2),
    }


def memory_mb(server: Server, field: str) -> float:
    """A process's VmRSS or VmHWM, its present or its peak memory."""
    path = Path(f"/proc/{server.process.pid}/status")
    if not path.exists():
        pytest.skip("memory is measured in /proc, which this system does not have")
    return int(re.findall(rf"{field}:\s+(\d+) kB", path.read_text())[0]) * 1024 / 1e6


def test_hostile(api: httpx.Client) -> None:
    """A hostile body gets a short error on every path, and the next request is served."""
    for body in hostile(2 * MB).values():
        for path in PATHS:
            statuses = (422, 400) if path == "/ping" else (422,)
            assert_problem(post(api, path, body), statuses)
            assert_answer(post(api, path, SMALL), SMALL_ANSWER)


def test_hostile_25_mb() -> None:
    """The costliest kinds take a few times as long as a valid body, and under 1.3 GB."""
    valid, answer = valid_body(1_000_000)
    costly = {
        4: keyed(b"1", 25 * MB)[:-2] + b',"z":1.5}}',
        6: listed(b"[[[]]]", 25 * MB),
    }
    with connected() as (server, client):
        responses = [post(client, "/pong", valid) for _ in range(3)]
        valid_s = statistics.median(r.elapsed.total_seconds() for r in responses)
        for times, body in costly.items():
            response = post(client, "/pong", body)
            assert_problem(response)
            assert response.elapsed.total_seconds() < times * valid_s
        assert memory_mb(server, "VmHWM") < 1300
        assert_answer(post(client, "/pong", valid), answer)


def begin(server: Server, path: str, body: bytes, sent_bytes: int) -> socket.socket:
    """A connection on which only the start of a body was sent."""
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
    sock.sendall(body[:sent_bytes])
    return sock


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_kept(path: str) -> None:
    """Bodies that are refused, too large, or lost in mid-upload leave memory and no traceback."""
    valid, answer = valid_body(200_000)  # 5 MB
    bodies = hostile(5 * MB)
    names = ("half a body", "all floats", "long name", "bad value at the end")
    with connected(MAX_BODY_MB="8") as (server, client):

        def refuse(rounds: int) -> None:
            for _ in range(rounds):
                for name in names:
                    post(client, path, bodies[name])
                post(client, path, iter([valid, valid]))
                with begin(server, path, valid, len(valid) // 2) as sock:
                    reset = struct.pack("ii", 1, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            assert_answer(post(client, path, valid), answer)

        refuse(1)
        limit_mb = memory_mb(server, "VmRSS") + 40
        refuse(5)
        wait_until(lambda: memory_mb(server, "VmRSS") < limit_mb, timeout_s=5)
        assert "Traceback" not in server.log and " 500 " not in server.log


def test_clients_gone() -> None:
    """40 clients gone in the middle of their bodies leave no error in the log."""
    body, _ = valid_body(40_000)
    with connected() as (server, client):
        for index in range(40):
            with begin(server, PATHS[index % 4], body, len(body) // 2) as sock:
                reset = struct.pack("ii", index // 4 % 2, 0)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        assert_answer(post(client, "/ping", SMALL), SMALL_ANSWER)
        server.process.terminate()
        server.process.wait(30)
        assert "Traceback" not in server.log and " 500 " not in server.log


def test_stalled_uploads() -> None:
    """Uploads that stop one byte short change nothing for anybody else, and end right."""
    body, answer = valid_body(40_000)
    with connected() as (server, client), ExitStack() as stack:
        started = (begin(server, PROCESS, body, len(body) - 1) for _ in range(20))
        socks = [stack.enter_context(sock) for sock in started]
        time.sleep(0.2)
        for _ in range(5):
            assert_answer(post(client, PROCESS, body), answer)
        socks[0].sendall(body[-1:])
        assert socks[0].recv(12) == b"HTTP/1.1 200"
