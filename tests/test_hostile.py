"""Hostile bodies and broken connections: what they cost server.py, and what is kept of them."""

import os
import socket
import struct
import subprocess
import sys

import harness as h

MB = 1_000_000


def keyed(value: bytes, size: int, end: bytes = b"") -> bytes:
    """A body of about this size with all values equal, but for what comes at the end."""
    count = size // len(b'"k0000000":%s,' % value)
    items = b",".join(b'"k%07d":%s' % (i, value) for i in range(count))
    return b'{"name":"a","data":{%s%s}}' % (items, end)


def listed(item: bytes, size: int) -> bytes:
    return b"[%s]" % b",".join([item] * (size // (len(item) + 1)))


def hostile(size: int) -> list[bytes]:
    """Invalid bodies of about this size, each as costly as its kind can be."""
    values = (b"1.5", b'"x"', b'{"a":1}', b"9" * 20)
    ends = (b',"z":1.5', b',"\xff":1', b",")
    return [
        *(keyed(value, size) for value in values),
        *(keyed(b"1", size, end) for end in ends),
        keyed(b"1", 0, b'"\xe9":1'),
        keyed(b"1", size)[: size // 2],
        keyed(b"1", size).replace(b'"name":"a",', b"", 1),
        b'{"name":%s,"data":{}}' % listed(b"1", size),
        b'{"name":"%s","data":{}}' % (b"x" * size),
        b'{"name":"a","data":{"%s":1.5}}' % (b"x" * size),
        b'{"name":"a","data":{"x":%s}}' % (b"1" * size),
        *(listed(item, size) for item in (b"{}", b"[[[]]]")),
        b"[" * (size // 2) + b"]" * (size // 2),
    ]


def abandon(port: int, path: str, body: bytes, reset: bool) -> None:
    """Send half of a body and leave, be it with a reset of the connection."""
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(head.encode() + body[: len(body) // 2])
        linger = struct.pack("ii", reset, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def memory_mb(pid: int) -> float:
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)])) / 1000


def test_hostile() -> None:
    """Hostile bodies and clients that leave cost the next nothing, and leave nothing behind."""
    valid, answer = h.valid_body(100_000)  # 2.5 MB
    bodies = hostile(MB)
    with h.connected(MAX_BODY_MB="4") as (server, client):

        def attack() -> None:
            for path in h.PATHS:
                statuses = (422, 400) if path == "/ping" else (422,)
                for body in bodies:
                    h.assert_problem(h.post(client, path, body), statuses)
                    h.assert_answer(h.post(client, path, h.SMALL))
                h.assert_problem(h.post(client, path, iter([valid, valid])), (413,))
                for reset in (True, False, True, False):
                    abandon(server.port, path, valid, reset)
                h.assert_answer(h.post(client, path, valid), answer)

        attack()
        attack()  # from now on memory is only used again
        limit_mb = memory_mb(server.process.pid) + 8
        attack()
        if sys.platform == "linux":  # elsewhere what was freed may still count
            h.wait_until(lambda: memory_mb(server.process.pid) < limit_mb, 5)
        server.process.terminate()
        server.process.wait(30)
        assert "Traceback" not in server.log and " 500 " not in server.log


def test_refused_bodies_are_freed_25_mb() -> None:
    """After 13 bodies that are no UTF-8 the server is no larger than after 3."""
    body = b'{"name":"%s\xff"}' % (b"x" * 25 * MB)
    with h.connected() as (server, client):
        sizes_mb = []
        for count in (3, 10):
            for _ in range(count):
                h.assert_problem(h.post(client, "/ping", body), (422, 400))
            sizes_mb.append(memory_mb(server.process.pid))
    assert sizes_mb[1] < sizes_mb[0] + 100


def test_hostile_25_mb() -> None:
    """The costliest kinds take a few times as long as a valid body, and under 1.3 GB."""
    valid, answer = h.valid_body(1_000_000)
    bad_end, brackets = keyed(b"1", 25 * MB, b',"z":1.5'), listed(b"[[[]]]", 25 * MB)
    seconds = {}
    with h.connected() as (server, client):
        for body in (valid, bad_end, brackets):
            responses = [h.post(client, "/pong", body) for _ in range(2)]
            seconds[body] = min(r.elapsed.total_seconds() for r in responses)
            if body is not valid:
                h.assert_problem(responses[0])
        assert seconds[bad_end] < 4 * seconds[valid]
        assert seconds[brackets] < 6 * seconds[valid]
        h.assert_answer(h.post(client, "/pong", valid), answer)
        server.process.terminate()
        _, _, usage = os.wait4(server.process.pid, 0)
    assert usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) < 1300 * MB
