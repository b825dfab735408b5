"""The contract of server.py, asked of real servers over HTTP."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import httpx
import pytest
from harness import ENV, ROOT, Server, free_port, group_alive, serve

PATHS = ("/ping", "/pong", "/pong?offload=true")
POOLED_BYTES = 70_000  # more than the 64 KiB up to which offload=true parses inline
LIMIT_BYTES = 64 * 2**20
SMALL = b'{"name":"a","data":{"x":-1,"y":7,"z":3}}'
SMALL_ANSWER = {"name": "a", "count": 3, "maxval": 7}
SECRET = "hunter2"

on_every_path = pytest.mark.parametrize("path", PATHS)


@contextmanager
def connected(**env: str) -> Iterator[tuple[Server, httpx.Client]]:
    """A server of its own and a client of it."""
    port = free_port()
    with (
        serve(f"uvicorn server:app --port {port}", port, env) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        yield server, client


def post(
    client: httpx.Client,
    path: str,
    body: bytes | Iterator[bytes],
    content_type: str | None = "application/json",
) -> httpx.Response:
    headers = {"Content-Type": content_type} if content_type else {}
    return client.post(path, content=body, headers=headers)


def chunked(body: bytes) -> Iterator[bytes]:
    """The body in pieces, which httpx sends without a Content-Length."""
    for start in range(0, len(body), 2**18):
        yield body[start : start + 2**18]


@cache
def valid_body(entries: int) -> tuple[bytes, dict[str, Any]]:
    """A valid body, 21 to 26 bytes per entry, and the right answer to it."""
    data = {f"key{i:010d}": i * 7919 % 2_000_003 - 1_000_000 for i in range(entries)}
    answer = {
        "name": "größe",
        "count": entries,
        "maxval": max(data.values(), default=0),
    }
    return json.dumps({"name": "größe", "data": data}).encode(), answer


def assert_answer(response: httpx.Response, answer: dict[str, Any]) -> None:
    assert (response.status_code, response.json()) == (200, answer)


def assert_problem(response: httpx.Response) -> None:
    """A rejection in the contract's form."""
    assert response.status_code in {400, 422}
    assert len(response.content) < 10_000
    content = response.json()
    assert content.keys() == {"detail"} and 1 <= len(content["detail"]) <= 10
    for error in content["detail"]:
        assert error.keys() == {"type", "loc", "msg"}
        assert isinstance(error["type"], str) and isinstance(error["msg"], str)
        assert all(isinstance(part, (str, int)) for part in error["loc"])


def wait_for(condition: Callable[[], object], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def end(
    server: Server,
    number: signal.Signals,
    kill: Callable[[int, int], None] = os.kill,
) -> None:
    """Send the signal; nothing of the server may be left, no process and no listener."""
    kill(server.process.pid, number)
    server.process.wait(30)
    wait_for(lambda: not group_alive(server.process.pid))
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with connected() as (_, client):
        yield client


@pytest.fixture(scope="module")
def one_mb_client() -> Iterator[httpx.Client]:
    with connected(MAX_BODY_MB="1") as (_, client):
        yield client


@on_every_path
@pytest.mark.parametrize("entries", [0, 1, 100, 2_500, 4_000, 100_000, 1_000_000])
def test_valid_bodies_of_all_sizes(
    client: httpx.Client, entries: int, path: str
) -> None:
    """A valid body is answered with its name, count and maximum, up to 25 MB."""
    body, answer = valid_body(entries)
    assert_answer(post(client, path, body), answer)


def brackets(count: int) -> bytes:
    """A valid body with exactly `count` opening brackets."""
    return b'{"name":"a","data":{},"x":[%s]}' % b",".join([b"[]"] * (count - 3))


def nested(depth: int) -> bytes:
    """A body nested `depth` deep in an unknown key."""
    return b'{"name":"a","data":{},"x":%s}' % (b"[" * (depth - 1) + b"]" * (depth - 1))


def start_of(value: object) -> str:
    """A short test id for a long body."""
    return repr(value)[:50]


ACCEPTED: list[tuple[bytes, str, int, int]] = [
    (b'{"name":"a","data":{"x":-5,"y":-3}}', "a", 2, -3),
    (b'{"name":"a","data":{"":9223372036854775807}}', "a", 1, 2**63 - 1),
    (b'{"name":"a","data":{"":-9223372036854775808}}', "a", 1, -(2**63)),
    (b'{"name":"a","data":{"x":-0}}', "a", 1, 0),
    (b'{"name":"","data":{}}', "", 0, 0),
    (b'{"name":"%s","data":{}}' % (b"x" * 200), "x" * 200, 0, 0),
    (b'{"name":"%s","data":{}}' % ("😀" * 200).encode(), "😀" * 200, 0, 0),
    (b'{"n\\u0061me":"\\ud83d\\ude00\\n","data":{}}', "😀\n", 0, 0),
    (b'{"x":[1.5,{"name":2}],"name":"a","data":{}}', "a", 0, 0),
    (b'{"name":1,"name":"a","data":{"x":9,"x":1.5,"x":2}}', "a", 1, 2),
    (b'\r\n\t {"name" : "a" , "data" : { } } \r\n', "a", 0, 0),
    (nested(1024), "a", 0, 0),
    (brackets(1_000_000), "a", 0, 0),
]


@on_every_path
@pytest.mark.parametrize("pad_bytes", [0, POOLED_BYTES])
@pytest.mark.parametrize(
    ("body", "name", "count", "maxval"), ACCEPTED, ids=map(start_of, ACCEPTED)
)
def test_unusual_valid_bodies(
    client: httpx.Client,
    body: bytes,
    name: str,
    count: int,
    maxval: int,
    pad_bytes: int,
    path: str,
) -> None:
    """What is at the edge but inside of the contract is answered right on all paths."""
    response = post(client, path, body.ljust(pad_bytes))
    assert_answer(response, {"name": name, "count": count, "maxval": maxval})


# Among them numbers that are no JSON or past a float, shadowed by a good value.
BAD_VALUES = [
    *b'1.5 1.0 1e2 true "1" null [1] {"y":1} NaN -Infinity 1e400 01 +1'.split(),
    *b"9223372036854775808 -9223372036854775809 18446744073709551616".split(),
    *b'NaN,"x":1 Infinity,"x":1 1e400,"x":1'.split(),
    b"",
    b"1" * 400,
    b'%s,"x":1' % (b"1" * 400),
]
REJECTED = [
    *(b'{"name":"a","data":{"w":0,"x":%s}}' % value for value in BAD_VALUES),
    *rb"""
    text null "name" {"data":{}} {"name":"a"} {"name":null,"data":{}}
    {"name":1,"data":{}} {"name":"a","data":null} {"name":"a","data":[]}
    {"name":"a","data":[["x",1]]} {"name":"a","data":{},} {'name':'a','data':{}}
    [{"name":"a","data":{}}] {"name":"a","data":{}}} {"name":"a","data":{}}//
    {"name":"a","data":{} {"name":"\x","data":{}} {"name":"\ud800","data":{}}
    {"name":"a","data":{"\udc00":1}} {"name":"a","data":{},"x":NaN}
    {"name":"a","data":{},"x":1e400} {"name":"a","data":{"x":NaN},"data":{}}
    """.split(),
    b"",
    b"  ",
    SMALL + SMALL,
    SMALL + b"\f",
    b"\xef\xbb\xbf" + SMALL,
    *(SMALL.decode().encode(codec) for codec in ("utf-16", "utf-16-le", "utf-32")),
    b'{"name":"\n","data":{}}',
    b'{"name":"\xe9","data":{}}',
    b'{"name":"\xed\xa0\xbd\xed\xb8\x80","data":{}}',  # a surrogate pair as UTF-8
    b'{"name":"%s","data":{}}' % (b"x" * 201),
    b'{"name":"a","name":"%s","data":{}}' % (b"x" * 201),
    nested(1025),
    brackets(1_000_001),
    b'{"name":"a","data":{"%s":1}}' % (b"{[" * 500_000),
]


@on_every_path
@pytest.mark.parametrize("pad_bytes", [0, POOLED_BYTES])
@pytest.mark.parametrize("body", REJECTED, ids=start_of)
def test_bodies_of_the_wrong_shape(
    client: httpx.Client, body: bytes, pad_bytes: int, path: str
) -> None:
    """What the contract excludes gets a short error in one form on all paths."""
    assert_problem(post(client, path, body.ljust(pad_bytes)))


@on_every_path
@pytest.mark.parametrize(
    "text",
    [
        '{"name":["SECRET"],"data":{}}',
        '{"name":"%s","data":{}}' % ("SECRET" * 50),
        '{"name":"a","data":{"x":"SECRET"}}',
        '{"name":"a","data":{"x":{"SECRET":1}}}',
        '{"name":"a","data":"SECRET"}',
        '["SECRET"]',
        '{"name":"a","data":{"x":SECRET}}',
        '{"name":"SECRET","data":{"x":1,}}',
        '{"name":"a","data":{"%sSECRET":"SECRET"}}' % ("k" * 5000),
    ],
)
def test_errors_do_not_echo(client: httpx.Client, text: str, path: str) -> None:
    """An error repeats nothing of the body but the start of an offending key."""
    response = post(client, path, text.replace("SECRET", SECRET).encode())
    assert_problem(response)
    assert SECRET not in response.text and "k" * 1000 not in response.text


@on_every_path
def test_plain_httpx(client: httpx.Client, path: str) -> None:
    """The shortest httpx call with `json=` is answered right."""
    document = {"name": "a", "data": {"x": 1, "y": 2}}
    with httpx.Client() as plain:
        response = plain.post(f"{client.base_url}".rstrip("/") + path, json=document)
    assert_answer(response, {"name": "a", "count": 2, "maxval": 2})


@on_every_path
@pytest.mark.parametrize("send", [bytes, chunked], ids=["length", "chunked"])
@pytest.mark.parametrize("over_bytes", [0, 1, 5 * 2**20])
def test_lowered_limit(
    one_mb_client: httpx.Client,
    over_bytes: int,
    send: Callable[[bytes], bytes | Iterator[bytes]],
    path: str,
) -> None:
    """MAX_BODY_MB=1 lets exactly 1 MiB pass and one byte more not, however it is sent."""
    body = SMALL.ljust(2**20 + over_bytes)
    response = post(one_mb_client, path, send(body))
    assert response.status_code == (413 if over_bytes else 200)
    assert_answer(post(one_mb_client, path, SMALL), SMALL_ANSWER)


@on_every_path
@pytest.mark.parametrize("over_bytes", [0, 1])
def test_default_limit(client: httpx.Client, over_bytes: int, path: str) -> None:
    """Without MAX_BODY_MB the limit is 64 MiB, to the byte."""
    response = post(client, path, SMALL.ljust(LIMIT_BYTES + over_bytes))
    assert response.status_code == (413 if over_bytes else 200)


@pytest.mark.parametrize("value", ["junk", "64MB", "nan"])
def test_junk_in_the_limit(value: str) -> None:
    """A MAX_BODY_MB that is no number ends the server with a line that names it."""
    done = subprocess.run(
        ["uvicorn", "server:app", "--port", str(free_port())],
        cwd=ROOT,
        env=ENV | {"MAX_BODY_MB": value},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode != 0
    assert "MAX_BODY_MB" in printed and "Traceback" not in printed


@on_every_path
@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (None, 200),
        ("application/json", 200),
        ("Application/JSON", 200),
        ("application/json; charset=utf-8", 200),
        ("application/vnd.api+json", 200),
        ("application/problem+json;charset=utf-8", 200),
        ("text/plain", 415),
        ("text/json", 415),
        ("application/jsonp", 415),
        ("application/xml", 415),
        ("application/json+xml", 415),
        ("application/octet-stream", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
    ],
)
def test_content_type(
    client: httpx.Client, content_type: str | None, status: int, path: str
) -> None:
    """JSON media types and none at all are read as JSON, all others get 415."""
    assert post(client, path, SMALL, content_type).status_code == status


@pytest.mark.parametrize("entries", [1, 200_000])
@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/ping", {"total"}),
        ("/pong", {"read", "parse", "validate", "total"}),
        ("/pong?offload=true", {"read", "parse", "validate", "total"}),
    ],
)
def test_server_timing(
    client: httpx.Client, path: str, names: set[str], entries: int
) -> None:
    """Server-Timing tells in milliseconds how long each stage of a request took."""
    response = post(client, path, valid_body(entries)[0])
    header = response.headers["Server-Timing"]
    stages = [re.fullmatch(r"(\w+);dur=([0-9.]+)", s) for s in header.split(", ")]
    ms = {stage[1]: float(stage[2]) for stage in stages if stage}
    assert all(stages) and ms.keys() >= names
    elapsed_ms = response.elapsed.total_seconds() * 1000
    assert sum(ms.values()) - ms["total"] <= ms["total"] + 1  # 1 ms for the rounding
    assert ms["total"] <= elapsed_ms + 1
    if entries > 1:  # seconds by mistake would be a thousand times less
        assert ms["total"] > elapsed_ms / 100


@pytest.mark.parametrize("path", ["/ping", "/pong"])
def test_openapi(client: httpx.Client, path: str) -> None:
    """/openapi.json has the schema of the JSON body of both endpoints."""
    document = client.get("/openapi.json").json()
    body = document["paths"][path]["post"]["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    if "$ref" in schema:
        for key in schema["$ref"].removeprefix("#/").split("/"):
            document = document[key]
        schema = document
    assert body["required"] and set(schema["required"]) == {"name", "data"}
    name, data = schema["properties"]["name"], schema["properties"]["data"]
    assert (name["type"], name["maxLength"]) == ("string", 200)
    assert (data["type"], data["additionalProperties"]["type"]) == ("object", "integer")


def test_docs(client: httpx.Client) -> None:
    """/docs is a page."""
    response = client.get("/docs")
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/html")


@pytest.mark.parametrize(
    "command",
    [
        "uvicorn server:app --port {port}",
        "uvicorn server:app --port {port} --workers 4",
        "uvicorn server:app --host 0.0.0.0 --port {port} --no-access-log",
        "gunicorn -w 4 -k uvicorn_worker.UvicornWorker server:app -b 127.0.0.1:{port}",
        "gunicorn -w 4 -k asgi server:app -b 127.0.0.1:{port}",
        "gunicorn -w 4 -k uvicorn.workers.UvicornWorker --reuse-port server:app -b :{port}",
    ],
)
def test_server_commands(command: str) -> None:
    """Each way to start the server answers everywhere and ends without a trace."""
    port = free_port()
    body, answer = valid_body(100_000)
    with (
        serve(command.format(port=port), port) as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        for path in PATHS:
            assert_answer(post(client, path, SMALL), SMALL_ANSWER)
            assert_answer(post(client, path, body), answer)
        end(server, signal.SIGTERM)
        assert "Traceback" not in server.log
