"""The contract of server.py over HTTP: what it takes, what it answers, how it starts and stops."""

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from bodies import (
    PATHS,
    POOLED_BYTES,
    SMALL,
    SMALL_ANSWER,
    assert_answer,
    assert_problem,
    valid_body,
)
from harness import (
    ENV,
    ROOT,
    connected,
    free_port,
    group_alive,
    is_open,
    post,
    wait_until,
)
from hypothesis import given, settings
from hypothesis import strategies as st

SECRET = "hunter2"

on_every_path = pytest.mark.parametrize("path", PATHS)


@on_every_path
@pytest.mark.parametrize("entries", [0, 1, 4_000])
def test_valid(api: httpx.Client, entries: int, path: str) -> None:
    """A valid body is answered with its name, count and maximum."""
    body, answer = valid_body(entries)
    assert_answer(post(api, path, body), answer)


@on_every_path
def test_valid_25_mb(api: httpx.Client, path: str) -> None:
    """25 MB are answered right, and Server-Timing tells where the milliseconds of /pong went."""
    body, answer = valid_body(1_000_000)
    response = post(api, path, body)
    assert_answer(response, answer)
    if path == "/ping":
        assert "Server-Timing" not in response.headers
        return
    stages = [s.split(";dur=") for s in response.headers["Server-Timing"].split(", ")]
    assert [stage for stage, _ in stages] == ["read", "parse", "validate", "total"]
    *parts_ms, total_ms = [float(ms) for _, ms in stages]
    elapsed_ms = 1000 * response.elapsed.total_seconds()
    assert elapsed_ms / 100 < sum(parts_ms) <= total_ms + 1 <= elapsed_ms + 2


@pytest.mark.parametrize(
    ("body", "name", "count", "maxval"),
    [
        (b'{"name":"a","data":{"x":-5,"y":-3}}', "a", 2, -3),
        (b'{"name":"a","data":{"":9223372036854775807}}', "a", 1, 2**63 - 1),
        (b'{"name":"a","data":{"":-9223372036854775808}}', "a", 1, -(2**63)),
        (b'{"name":"a","data":{"x":-0}}', "a", 1, 0),
        (b'{"name":"%s","data":{}}' % ("😀" * 200).encode(), "😀" * 200, 0, 0),
        (b'{"n\\u0061me":"\\ud83d\\ude00\\n","data":{}}', "😀\n", 0, 0),
        (b'{"x":[1.5,{"name":2}],"name":"a","data":{}}', "a", 0, 0),
        (b'{"name":1,"name":"a","data":{"x":9,"x":1.5,"x":2}}', "a", 1, 2),
        (b'\r\n\t {"name" : "" , "data" : { } } \r\n', "", 0, 0),
    ],
)
def test_valid_at_the_edge(
    api: httpx.Client, body: bytes, name: str, count: int, maxval: int
) -> None:
    """What is at the edge but inside of the contract is answered right on all paths."""
    for path in PATHS:
        answer = {"name": name, "count": count, "maxval": maxval}
        assert_answer(post(api, path, body.ljust(POOLED_BYTES)), answer)


BAD_VALUES = b'1.5 1.0 1e2 true "1" null [1] {"y":1} 01 +1'.split()
BAD_VALUES += b"9223372036854775808 -9223372036854775809 18446744073709551616".split()
WRONG = [b'{"name":"a","data":{"w":0,"x":%s}}' % value for value in BAD_VALUES]
WRONG += rb"""
    text null "name" {"data":{}} {"name":"a"} {"name":null,"data":{}} {"name":1,"data":{}}
    {"name":"a","data":null} {"name":"a","data":[]} {"name":"a","data":[["x",1]]}
    {"name":"a","data":{},} [{"name":"a","data":{}}] {"name":"a","data":{}}}
    {"name":"\x","data":{}} {"name":"\ud800","data":{}} {"name":"a","data":{"x":NaN}}
    """.split()
WRONG += [b"", b"  ", SMALL + SMALL, b'{"name":"\n","data":{}}', b'{"name":"\xe9"}']
WRONG += [b'{"name":"%s","data":{}}' % (b"x" * 201)]


@pytest.mark.parametrize("body", WRONG, ids=lambda body: repr(body)[:40])
def test_wrong_shape(api: httpx.Client, body: bytes) -> None:
    """What the contract excludes gets a short error in one form on all paths."""
    for path in PATHS:
        statuses = (422, 400) if path == "/ping" else (422,)
        assert_problem(post(api, path, body), statuses)
        assert_problem(post(api, path, body.ljust(POOLED_BYTES)), statuses)


@pytest.mark.parametrize(
    "text",
    [
        '{"name":["SECRET"],"data":{}}',
        '{"name":"%s","data":{}}' % ("SECRET" * 50),
        '{"name":"a","data":{"x":"SECRET"}}',
        '{"name":"a","data":{"x":{"SECRET":1}}}',
        '["SECRET"]',
        '{"name":"a","data":{"x":SECRET}}',
        '{"name":"SECRET","data":{"x":1,}}',
        '{"name":1,"data":{"%sSECRET":"SECRET"}}' % ("k" * 5000),
    ],
)
def test_errors_do_not_echo(api: httpx.Client, text: str) -> None:
    """An error repeats nothing of the body but the first 100 characters of a key."""
    body = text.replace("SECRET", SECRET).encode()
    for path in PATHS:
        response = post(api, path, body.ljust(POOLED_BYTES))
        assert_problem(response)
        assert SECRET not in response.text and "k" * 101 not in response.text


@pytest.mark.parametrize(
    ("body", "ping", "pong"),
    [
        (SMALL.decode().encode("utf-16"), 200, 422),
        (SMALL.decode().encode("utf-32"), 200, 422),
        (b"\xef\xbb\xbf" + SMALL, 200, 422),
        (b'{"name":"a","data":{},"x":NaN}', 200, 422),
        (b'{"name":"a","data":{},"x":1e400}', 200, 422),
        (b'{"name":"a","data":{"\\ud800":1}}', 200, 422),
        (b'{"name":"a","data":{"x":1e400,"x":1}}', 200, 422),
        (b'{"name":"a","data":{},"x":%s1%s}' % (b"[" * 1022, b"]" * 1022), None, 200),
        (b'{"name":"a","data":{},"x":%s1%s}' % (b"[" * 1024, b"]" * 1024), None, 422),
    ],
)
def test_dialects(api: httpx.Client, body: bytes, ping: int | None, pong: int) -> None:
    """Where json.loads and orjson differ, so do /ping and /pong, as the docstring says."""
    if ping:
        assert post(api, "/ping", body).status_code == ping
    for path in PATHS[1:]:
        assert post(api, path, body.ljust(POOLED_BYTES)).status_code == pong


def right_answer(document: Any) -> dict[str, Any] | None:
    """The contract once more, or None for what it excludes."""
    if isinstance(document, dict):
        name, data = document.get("name"), document.get("data")
        if isinstance(name, str) and len(name) <= 200 and isinstance(data, dict):
            values = list(data.values())
            if all(type(v) is int and -(2**63) <= v < 2**63 for v in values):
                maxval = max(values, default=0)
                return {"name": name, "count": len(values), "maxval": maxval}
    return None


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
integers = st.integers(-(2**63), 2**63 - 1)
scalars = st.none() | st.booleans() | st.integers() | st.floats(-1e300, 1e300) | texts
anything = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=8
)
documents = st.fixed_dictionaries(
    {
        "name": texts | st.just("é" * 200) | anything,
        "data": st.dictionaries(texts, integers)
        | st.dictionaries(texts, integers | scalars)
        | anything,
    },
    optional={"other": anything, "": anything},
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(document=documents | anything, ascii_only=st.booleans(), indent=st.booleans())
def test_paths_agree(
    api: httpx.Client, document: Any, ascii_only: bool, indent: bool
) -> None:
    """On RFC 8259 JSON in UTF-8 all paths give the answer of the contract."""
    text = json.dumps(document, ensure_ascii=ascii_only, indent=2 if indent else None)
    for path in PATHS:
        response = post(api, path, text.encode().ljust(POOLED_BYTES))
        if answer := right_answer(document):
            assert_answer(response, answer)
        else:
            assert_problem(response)


def chunked(body: bytes) -> Iterator[bytes]:
    """The body in pieces, which httpx sends without a Content-Length."""
    for start in range(0, len(body), 2**18):
        yield body[start : start + 2**18]


def test_limit() -> None:
    """MAX_BODY_MB=1 lets exactly 1 MiB pass and one byte more not, however it is sent."""
    with connected(MAX_BODY_MB="1") as (_, client):
        for path in PATHS:
            for over_bytes in (0, 1, 5 * 2**20):
                body = SMALL.ljust(2**20 + over_bytes)
                for sent in (body, chunked(body)):
                    response = post(client, path, sent)
                    assert response.status_code == (413 if over_bytes else 200)
            assert_answer(post(client, path, SMALL), SMALL_ANSWER)


def test_default_limit(api: httpx.Client) -> None:
    """Without MAX_BODY_MB the limit is 64 MiB, to the byte."""
    for over_bytes, status in {0: 200, 1: 413}.items():
        body = SMALL.ljust(64 * 2**20 + over_bytes)
        assert post(api, "/pong", body).status_code == status


@pytest.mark.parametrize("value", ["junk", "64MB", "-1", ""])
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
    assert done.returncode == 3
    assert "MAX_BODY_MB" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content_type", "is_json"),
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("application/vnd.api+json", True),
        (None, False),
        ("text/plain", False),
        ("text/json", False),
        ("application/jsonp", False),
        ("application/json+xml", False),
        ("multipart/form-data; boundary=x", False),
    ],
)
def test_content_type(
    api: httpx.Client, content_type: str | None, is_json: bool
) -> None:
    """Without a JSON media type /ping answers 422 and /pong 415."""
    for path in PATHS:
        status = 200 if is_json else 422 if path == "/ping" else 415
        assert post(api, path, SMALL, content_type).status_code == status


def test_unknown_offload(api: httpx.Client) -> None:
    """An `offload` that does not exist gets 422, not another path than was asked for."""
    assert_problem(post(api, "/pong?offload=fork", SMALL))


@pytest.mark.parametrize(
    ("path", "statuses"), [("/ping", "200 413 422"), ("/pong", "200 413 415 422 503")]
)
def test_openapi(api: httpx.Client, path: str, statuses: str) -> None:
    """/openapi.json has the schema of the JSON body and all answers; /docs is a page."""
    document = api.get("/openapi.json").json()
    operation = document["paths"][path]["post"]
    assert sorted(operation["responses"]) == statuses.split()
    body = operation["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    if "$ref" in schema:
        for key in schema["$ref"].removeprefix("#/").split("/"):
            document = document[key]
        schema = document
    assert body["required"] and set(schema["required"]) == {"name", "data"}
    name, data = schema["properties"]["name"], schema["properties"]["data"]
    assert (name["type"], name["maxLength"]) == ("string", 200)
    assert (data["type"], data["additionalProperties"]["type"]) == ("object", "integer")
    assert api.get("/docs").headers["Content-Type"].startswith("text/html")


@pytest.mark.parametrize(
    "command",
    [
        "uvicorn server:app --port {port} --workers 2 --no-access-log",
        "gunicorn -w 2 -k uvicorn_worker.UvicornWorker server:app -b 127.0.0.1:{port}",
        "gunicorn -w 2 -k asgi server:app -b 127.0.0.1:{port}",
        "gunicorn -w 2 -k uvicorn.workers.UvicornWorker --reuse-port server:app -b 127.0.0.1:{port}",
    ],
)
def test_server_commands(command: str) -> None:
    """Each way to start the server answers everywhere and ends without a trace."""
    body, answer = valid_body(4_000)
    with connected(command) as (server, client):
        for path in PATHS:
            assert_answer(post(client, path, SMALL), SMALL_ANSWER)
            assert_answer(post(client, path, body), answer)
        server.process.terminate()
        server.process.wait(30)
        wait_until(lambda: not group_alive(server.process.pid), 10)
        assert not is_open(server.port) and "Traceback" not in server.log
