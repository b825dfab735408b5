"""What server.py does with hostile bodies, broken connections and a killed pool."""

import os
import re
import signal
import socket
import statistics
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import httpx
import pytest
from harness import ROOT, Server, free_port, serve
from hypothesis import given, settings
from hypothesis import strategies as st
from test_server import (
    PATHS,
    POOLED_BYTES,
    SMALL,
    SMALL_ANSWER,
    assert_answer,
    assert_problem,
    connected,
    end,
    on_every_path,
    post,
    valid_body,
    wait_for,
)

OFFLOAD = "/pong?offload=true"
SIZE_BYTES = 25_000_000
LARGE_ENTRIES = 1_000_000  # a valid body of about SIZE_BYTES


@lru_cache(maxsize=1)
def keyed(value: bytes, size_bytes: int = SIZE_BYTES) -> bytes:
    """A body of about this size with all values equal."""
    count = size_bytes // len(b'"k0000000":%s,' % value)
    items = b",".join(b'"k%07d":%s' % (i, value) for i in range(count))
    return b'{"name":"a","data":{%s}}' % items


def listed(item: bytes) -> bytes:
    return b"[%s]" % b",".join([item] * (SIZE_BYTES // (len(item) + 1)))


HOSTILE: dict[str, Callable[[], bytes]] = {
    "all floats": lambda: keyed(b"1.5"),
    "all strings": lambda: keyed(b'"x"'),
    "all lists": lambda: keyed(b"[]"),
    "all objects": lambda: keyed(b'{"a":1}'),
    "all past 64 bits": lambda: keyed(b"9" * 20),
    "bad value at the end": lambda: keyed(b"1")[:-2] + b',"z":1.5}}',
    "no name": lambda: keyed(b"1").replace(b'"name":"a",', b"", 1),
    "bad UTF-8": lambda: keyed(b"1")[:-4] + b'\xff":1}}',
    "half a body": lambda: keyed(b"1")[: SIZE_BYTES // 2],
    "name a list": lambda: b'{"name":%s,"data":{}}' % listed(b"1"),
    "name of 25 MB": lambda: b'{"name":"%s","data":{}}' % (b"x" * SIZE_BYTES),
    "name of escapes": lambda: (
        b'{"name":"%s","data":{}}' % (b"\\ud83d\\ude00" * (SIZE_BYTES // 12))
    ),
    "key of 25 MB": lambda: b'{"name":"a","data":{"%s":1.5}}' % (b"x" * SIZE_BYTES),
    "integer of 25 MB": lambda: b'{"name":"a","data":{"x":%s}}' % (b"1" * SIZE_BYTES),
    "zeros": lambda: listed(b"0"),
    "empty objects": lambda: listed(b"{}"),
    "nested lists": lambda: listed(b"[[[]]]"),
    "nested 200,000 deep": lambda: b"[" * 200_000 + b"]" * 200_000,
    "unknown key of objects": lambda: b'{"name":"a","data":{},"x":%s}' % listed(b"{}"),
}


def memory_bytes(server: Server, field: str) -> int:
    """A process's VmRSS or VmHWM, its present or its peak memory."""
    path = Path(f"/proc/{server.process.pid}/status")
    if not path.exists():
        pytest.skip("memory is measured in /proc, which this system does not have")
    found = re.search(rf"{field}:\s+(\d+) kB", path.read_text())
    assert found
    return int(found[1]) * 1024


@dataclass
class Attack:
    """A server, and what it answers to a hostile body, which is sent only once."""

    server: Server
    client: httpx.Client
    send: Callable[[str, str], httpx.Response]


@pytest.fixture(scope="module")
def attack() -> Iterator[Attack]:
    made = lru_cache(maxsize=1)(lambda name: HOSTILE[name]())
    with connected() as (server, client):

        @cache
        def send(name: str, path: str) -> httpx.Response:
            return post(client, path, made(name))

        yield Attack(server, client, send)


@pytest.mark.parametrize("path", PATHS[:2])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_body(attack: Attack, name: str, path: str) -> None:
    """A large hostile body gets a short error, and the next request is served."""
    response = attack.send(name, path)
    if response.status_code != 413:
        assert_problem(response)
    assert_answer(post(attack.client, path, SMALL), SMALL_ANSWER)


def test_hostile_memory(attack: Attack) -> None:
    """All the hostile bodies after each other take less than 1.2 GB of memory."""
    memory_bytes(attack.server, "VmHWM")  # skips before all the work, not after it
    for name in HOSTILE:
        for path in PATHS[:2]:
            attack.send(name, path)
    assert memory_bytes(attack.server, "VmHWM") < 1.2e9


@dataclass(frozen=True)
class Piece:
    """Some JSON and its meaning: MALFORMED, or None for what fits nowhere."""

    raw: bytes
    value: object


MALFORMED = object()


def pieces(raws: list[bytes], value: object) -> list[Piece]:
    return [Piece(raw, value) for raw in raws]


def make_object(members: list[tuple[Piece, Piece]]) -> Piece:
    raw = b",".join(key.raw + b":" + value.raw for key, value in members)
    values = {key.value: value.value for key, value in members}
    malformed = any(MALFORMED in (key.value, value.value) for key, value in members)
    return Piece(b"{%s}" % raw, MALFORMED if malformed else values)


def deep(room: int) -> list[Piece]:
    """Nested values, malformed where they need more levels than there is room for."""
    return [
        Piece(opening * n + b"1" + closing * n, None if n <= room else MALFORMED)
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}"))
        for n in (1000, room - 1, room, room + 1, 1030, 5000)
    ]


INTEGERS = [Piece(b"%d" % n, n) for n in (0, 1, -1, 2**63 - 1, -(2**63))]
INTEGERS += pieces([b"-0"], 0)
NAMES = [
    Piece(b'"%s"' % (raw * n), character * n)
    for raw, character in ((b"x", "x"), ("é".encode(), "é"), (b"\\ud83d\\ude00", "😀"))
    for n in (0, 199, 200, 201)
]
BEYOND = pieces([b"%d" % 2**63, b"%d" % (-(2**63) - 1)], None)
MISFITS = BEYOND + pieces(
    [
        *b'1.0 -0.0 1e2 1e-400 true false null [] [1.5] {"a":{}} {"name":null}'.split(),
        *(b"%d" % n for n in (2**64 - 1, 2**64, 10**308)),
    ],
    None,
)
REFUSED = pieces(
    [
        *rb'NaN Infinity -Infinity 1e400 -1e400 01 +1 .5 1. tru [1,] {1:1} "\x"'.split(),
        *rb'"\ud800" "\udc00\ud800" "\ud800x" {"\udfff":1}'.split(),
        *(b"1" * 400, b'"\xff"', b'"\t"', b'"\xed\xa0\x80"'),
        b'"\xed\xa0\xbd\xed\xb8\x80"',
    ],
    MALFORMED,
)
ANYTHING = [*INTEGERS, *NAMES, *MISFITS, *REFUSED]
NAME, DATA, KEY = (Piece(b'"%s"' % key.encode(), key) for key in ("name", "data", "k"))
KEYS = [
    *(NAME, DATA, KEY, Piece(b'"\\u006b"', "k"), Piece(b'"{["', "{[")),
    *(Piece(b'"n\\u0061me"', "name"), Piece(b'"\\ud83d\\ude00"', "😀")),
]
DATA_KEYS = [KEY] * 20 + KEYS + pieces([b'"\\udc00"'], MALFORMED)


@st.composite
def data_objects(draw: st.DrawFn) -> Piece:
    """Mostly integers, some of them after another value of the same key."""
    members = []
    for _ in range(draw(st.integers(0, 4))):
        key = draw(st.sampled_from(DATA_KEYS))
        kind = draw(st.sampled_from(["good"] * 4 + ["shadowed"] * 4 + ["bad"]))
        if kind != "good":
            values = draw(st.sampled_from([REFUSED, BEYOND, ANYTHING + deep(1022)]))
            members.append((key, draw(st.sampled_from(values))))
        if kind != "bad":
            members.append((key, draw(st.sampled_from(INTEGERS))))
    return make_object(members)


@st.composite
def documents(draw: st.DrawFn) -> Piece:
    """A name and data, often right, and at times other keys or the same once more."""
    members = [(NAME, draw(st.sampled_from(NAMES))), (DATA, draw(data_objects()))]
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        values = st.sampled_from(ANYTHING + deep(1023)) | data_objects()
        extra = draw(st.sampled_from(KEYS)), draw(values)
        members.insert(draw(st.integers(0, len(members))), extra)
    return make_object(members)


def right_answer(document: object) -> dict[str, object] | None:
    """The contract once more, or None for what it excludes."""
    if isinstance(document, dict):
        name, data = document.get("name"), document.get("data")
        if isinstance(name, str) and len(name) <= 200 and isinstance(data, dict):
            values = list(data.values())
            if all(type(v) is int and -(2**63) <= v < 2**63 for v in values):
                maxval = max(values, default=0)
                return {"name": name, "count": len(values), "maxval": maxval}
    return None


def agreed(client: httpx.Client, body: bytes, padded: bool) -> httpx.Response:
    """The one response of all paths, to a body padded so that it goes to the pool."""
    sent = body.ljust(POOLED_BYTES) if padded else body
    first, *others = (post(client, path, sent) for path in PATHS)
    for other in others:
        assert other.status_code == first.status_code
        assert first.status_code != 200 or other.json() == first.json()
    return first


@settings(max_examples=500, deadline=None, derandomize=True)
@given(document=documents(), padded=st.booleans())
def test_paths_follow_the_contract(
    attack: Attack, document: Piece, padded: bool
) -> None:
    """All paths accept the same documents, those of the contract, with one answer."""
    response = agreed(attack.client, document.raw, padded)
    if answer := right_answer(document.value):
        assert_answer(response, answer)
    else:
        assert_problem(response)


def mutated(raw: bytes, at: int, cut: int, inserted: bytes, codec: str) -> bytes:
    raw = raw[:at] + inserted + raw[at + cut :]
    if codec == "utf-8":
        return raw  # not decoded: it may be no UTF-8 any more
    return raw.decode(errors="replace").encode(codec, "replace")


insertions = [b"", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\0", b"\f", b"\n", b" "]
insertions += [b'"', b"\\", b",", b"{", b"}", b"]", b"0", b"-", b".5", b"NaN", b"1e400"]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    body=st.builds(
        mutated,
        documents().map(lambda document: document.raw),
        st.just(0) | st.integers(0, 60) | st.just(10**6),
        st.sampled_from([0, 0, 1, 2, 10**6]),
        st.sampled_from(insertions),
        st.sampled_from(["utf-8"] * 9 + ["utf-16", "utf-16-le", "utf-32", "latin-1"]),
    ),
    padded=st.booleans(),
)
def test_paths_agree_on_broken_json(attack: Attack, body: bytes, padded: bool) -> None:
    """Documents cut, mutated and recoded at random fare equally on all paths."""
    response = agreed(attack.client, body, padded)
    if response.status_code != 200:
        assert_problem(response)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    largest=st.tuples(st.integers(0, 29_999), st.integers(-9, 2**63 - 1)),
    bad=st.dictionaries(
        st.integers(0, 29_999),
        st.sampled_from([b"1.0", b"true", b"null", b"[]", b"%d" % 2**63]),
        max_size=3,
    ),
)
def test_first_bad_of_many(
    attack: Attack, largest: tuple[int, int], bad: dict[int, bytes]
) -> None:
    """Wherever they stand among many values, the first bad or else the largest is found."""
    values = [b"-9"] * 30_000
    values[largest[0]] = b"%d" % largest[1]
    for index, value in bad.items():
        values[index] = value
    items = b",".join(b'"k%d":%s' % item for item in enumerate(values))
    for path in PATHS:
        response = post(attack.client, path, b'{"name":"","data":{%s}}' % items)
        if bad:
            assert_problem(response)
            (error,) = response.json()["detail"]
            assert f"k{min(bad)}" in error["loc"]
        else:
            answer = {"name": "", "count": len(values), "maxval": largest[1]}
            assert_answer(response, answer)


def test_better_than_stock(attack: Attack) -> None:
    """Stock FastAPI answers 1 MB of bad values 100 times longer and 5 times slower."""
    body = keyed(b"1.5", 1_000_000)
    port = free_port()
    with (
        serve(f"uvicorn stock:app --port {port}", port, cwd=ROOT / "tests") as stock,
        httpx.Client(base_url=stock.url, timeout=120) as stock_client,
    ):
        pairs = [
            (post(stock_client, "/stock", body), post(attack.client, "/ping", body))
            for _ in range(3)
        ]
    for theirs, ours in pairs:
        assert theirs.status_code == ours.status_code == 422
        assert len(theirs.content) > 100 * len(ours.content)
    stock_s, our_s = (
        statistics.median(response.elapsed.total_seconds() for response in responses)
        for responses in zip(*pairs)
    )
    assert stock_s > 5 * our_s


def begin(server: Server, path: str, body: bytes, sent_bytes: int) -> socket.socket:
    """A connection on which only the start of a body was sent."""
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
    sock.sendall(head.encode() + body[:sent_bytes])
    return sock


def hang_up(server: Server, path: str) -> None:
    """40 clients at once that send half of a large body, half of them then reset."""
    body, _ = valid_body(LARGE_ENTRIES)
    socks = [begin(server, path, body, len(body) // 2) for _ in range(40)]
    for index, sock in enumerate(socks):
        linger = struct.pack("ii", index % 2, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        sock.close()


@on_every_path
def test_clients_gone(path: str) -> None:
    """Clients gone in the middle of a body leave no error in the log."""
    with connected() as (server, client):
        hang_up(server, path)
        assert_answer(post(client, path, SMALL), SMALL_ANSWER)
        end(server, signal.SIGTERM)
        assert "Traceback" not in server.log and " 500 " not in server.log
        assert " 200 " in server.log


@on_every_path
def test_memory_of_clients_gone(path: str) -> None:
    """Clients gone in the middle of a body give the memory of their bodies back."""
    body, answer = valid_body(LARGE_ENTRIES)
    with connected() as (server, client):
        assert_answer(post(client, path, body), answer)
        before_bytes = memory_bytes(server, "VmRSS")
        hang_up(server, path)
        assert_answer(post(client, path, SMALL), SMALL_ANSWER)
        limit_bytes = before_bytes + 100_000_000
        wait_for(lambda: memory_bytes(server, "VmRSS") < limit_bytes, timeout_s=10)


@on_every_path
def test_trickling_clients(attack: Attack, path: str) -> None:
    """While 20 clients send a byte now and then all others are served, then they too."""
    with ExitStack() as stack:
        started = (begin(attack.server, path, SMALL, 1) for _ in range(20))
        socks = [stack.enter_context(sock) for sock in started]
        for turn in range(100):
            socks[turn % 20].sendall(SMALL[1 + turn // 20 :][:1])
            assert_answer(post(attack.client, path, SMALL), SMALL_ANSWER)
        for sock in socks:
            sock.sendall(SMALL[6:])
            assert sock.recv(12) == b"HTTP/1.1 200"


def pool_processes(server: Server) -> dict[int, str]:
    """The server's living pool processes: their ids, and states as `ps` has them."""
    ps = ["ps", "-A", "-ww", "-o", "pid=,pgid=,stat=,command="]
    listing = subprocess.run(ps, capture_output=True, text=True, check=True)
    rows = [line.split(None, 3) for line in listing.stdout.splitlines()]
    return {
        int(row[0]): row[2]
        for row in rows
        if row[1] == str(server.process.pid)
        and "spawn_main" in row[3]
        and not row[2].startswith("Z")
    }


def test_pool_starts_late() -> None:
    """There are no pool processes before the first large body with offload=true."""
    body, answer = valid_body(10_000)
    with connected() as (server, client):
        assert_answer(post(client, OFFLOAD, SMALL), SMALL_ANSWER)
        assert_answer(post(client, "/pong", body), answer)
        assert not pool_processes(server)
        assert_answer(post(client, OFFLOAD, body), answer)
        assert pool_processes(server)


def test_idle_pool_killed() -> None:
    """A pool killed while idle is started again for the next large body."""
    body, answer = valid_body(10_000)
    with connected() as (server, client):
        assert_answer(post(client, OFFLOAD, body), answer)
        for pid in pool_processes(server):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
        assert_answer(post(client, OFFLOAD, body), answer)


def test_busy_pool_killed() -> None:
    """A pool process killed at work costs its request a 503, and the next nothing."""
    body, answer = valid_body(LARGE_ENTRIES)
    statuses: list[int] = []
    with ThreadPoolExecutor(1) as executor, connected() as (server, client):
        assert_answer(post(client, OFFLOAD, body), answer)
        while 503 not in statuses:  # at times the process is done before it is killed
            assert len(statuses) < 20, "no request was hit"
            request = executor.submit(post, client, OFFLOAD, body)
            busy: list[int] = []
            while not busy and not request.done():
                stats = pool_processes(server)
                busy = [pid for pid, stat in stats.items() if stat.startswith("R")]
            for pid in busy:
                os.kill(pid, signal.SIGKILL)
            statuses.append(request.result().status_code)
            assert statuses[-1] in {200, 503}
            time.sleep(0.5)
            assert_answer(post(client, OFFLOAD, body), answer)


def test_burst() -> None:
    """More large bodies than fit get either their answer or 503 with Retry-After."""
    body, answer = valid_body(155_000)
    assert 3_800_000 < len(body) < 4 * 2**20
    with ThreadPoolExecutor(24) as executor, connected(MAX_BODY_MB="4") as (_, client):
        requests = [executor.submit(post, client, OFFLOAD, body) for _ in range(24)]
        responses = [request.result() for request in requests]
        assert {response.status_code for response in responses} == {200, 503}
        for response in responses:
            if response.status_code == 503:
                assert int(response.headers["Retry-After"]) > 0
            else:
                assert_answer(response, answer)
        assert_answer(post(client, OFFLOAD, body), answer)


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
    number: signal.Signals, kill: Callable[[int, int], None]
) -> None:
    """A server stopped under load leaves no process, and its port to the next one."""
    body, answer = valid_body(LARGE_ENTRIES)
    statuses: list[int] = []

    def load(client: httpx.Client) -> None:
        try:
            while True:
                statuses.append(post(client, OFFLOAD, body).status_code)
        except httpx.TransportError:
            pass  # the server has stopped

    with ThreadPoolExecutor(4) as executor, connected() as (server, client):
        loads = [executor.submit(load, client) for _ in range(4)]
        wait_for(lambda: 200 in statuses)
        end(server, number, kill)
        for running in loads:
            running.result()
        assert set(statuses) <= {200, 503}
        with serve(f"uvicorn server:app --port {server.port}", server.port):
            assert_answer(post(client, OFFLOAD, body), answer)
