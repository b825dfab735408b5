"""The contract of server.py over HTTP: what it takes, what it answers, how it starts and stops."""

import json
import re
from subprocess import PIPE, STDOUT
from typing import Any

import harness as h
import pytest
from httpx import Client
from hypothesis import given, settings
from hypothesis import strategies as st


def right_answer(document: Any) -> dict[str, Any] | None:
    """The contract once more, or None for what it excludes."""
    match document:
        case {"name": str(name), "data": dict(data)} if len(name) <= 200:
            values = data.values()
            if all(type(v) is int and -(2**63) <= v < 2**63 for v in values):
                maxval = max(values, default=0)
                return {"name": name, "count": len(data), "maxval": maxval}
    return None


VALID = [h.valid_body(entries)[0] for entries in (0, 1, 4_000)]
VALID += [b'{"name":"%s","data":{}}' % ("😀" * 200).encode()]
VALID += [b'\r\n{"name":"","data":{ }}\t']
VALID += rb"""
    {"name":"a","data":{"x":-5,"y":-3}} {"x":[1.5,{"name":2}],"name":"a","data":{}}
    {"name":"","data":{"":-9223372036854775808}} {"name":"a","data":{"x":-0}}
    {"name":1,"name":"a","data":{"x":9223372036854775807,"y":1.5,"y":2}}
    {"n\u0061me":"\ud83d\ude00\n","data":{}}
    """.split()


@pytest.mark.parametrize("body", VALID, ids=lambda body: repr(body)[:40])
def test_valid(api: Client, body: bytes) -> None:
    """What is inside of the contract, be it at the edge, is answered right on all paths."""
    for response in h.answers(api, body):
        h.assert_answer(response, right_answer(json.loads(body)))


def test_valid_25_mb(api: Client) -> None:
    """25 MB are answered right, and Server-Timing tells where the milliseconds of /pong went."""
    body, answer = h.valid_body(1_000_000)
    ping, *pongs = h.answers(api, body)
    h.assert_answer(ping, answer)
    assert "Server-Timing" not in ping.headers
    for pong in pongs:
        h.assert_answer(pong, answer)
        stages = [s.split(";dur=") for s in pong.headers["Server-Timing"].split(", ")]
        assert [stage for stage, _ in stages] == ["read", "parse", "validate", "total"]
        *parts_ms, total_ms = [float(ms) for _, ms in stages]
        elapsed_ms = 1000 * pong.elapsed.total_seconds()
        assert elapsed_ms / 100 < sum(parts_ms) <= total_ms + 1 <= elapsed_ms + 2


BAD_VALUES = b'1.5 1.0 1e2 true "1" null [1] {"y":1} 01 +1'.split()
BAD_VALUES += b"9223372036854775808 -9223372036854775809 18446744073709551616".split()
WRONG = [b'{"name":"a","data":{"w":0,"x":%s}}' % value for value in BAD_VALUES]
WRONG += rb"""
    text null "name" {"data":{}} {"name":"a"} {"name":null,"data":{}} {"name":1,"data":{}}
    {"name":"a","data":null} {"name":"a","data":[]} {"name":"a","data":[["x",1]]}
    {"name":"a","data":{},} [{"name":"a","data":{}}] {"name":"a","data":{}}}
    {"name":"\x","data":{}} {"name":"\ud800","data":{}} {"name":"a","data":{"x":NaN}}
    {"name":["SECRET"],"data":{}} {"name":"a","data":{"x":"SECRET"}} ["SECRET"]
    {"name":"a","data":{"x":{"SECRET":1}}} {"name":"a","data":{"x":SECRET}}
    {"name":"SECRET","data":{"x":1,}}
    """.split()
WRONG += [b"", b"  ", h.SMALL + h.SMALL, b'{"name":"\n","data":{}}']
WRONG += [b'{"name":"%s","data":{}}' % name for name in (b"x" * 201, b"SECRET" * 50)]
WRONG += [b'{"name":1,"data":{"%sSECRET":"SECRET"}}' % (b"k" * 5000)]


@pytest.mark.parametrize("body", WRONG, ids=lambda body: repr(body)[:40])
def test_wrong(api: Client, body: bytes) -> None:
    """What the contract excludes gets a short error, that repeats 100 characters of a key at most."""
    for response in h.answers(api, body):
        h.assert_problem(response)
        assert "SECRET" not in response.text and "k" * 101 not in response.text


def test_dialects(api: Client) -> None:
    """Where json.loads and orjson differ, so do /ping and /pong, as the docstring says."""
    ping = [h.SMALL.decode().encode(code) for code in ("utf-16", "utf-32", "utf-8-sig")]
    rests = rb'{},"x":NaN {},"x":1e400 {"\ud800":1} {"x":1e400,"x":1}'.split()
    ping += [b'{"name":"a","data":%s}' % rest for rest in rests]
    for body in ping:
        assert h.post(api, "/ping", body).status_code == 200
        for pong in h.answers(api, body)[2:]:
            h.assert_problem(pong)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
integers = st.integers(-(2**63), 2**63 - 1)
scalars = st.none() | st.booleans() | st.integers() | st.floats(-1e300, 1e300) | texts
anything = st.recursive(scalars, lambda x: st.lists(x) | st.dictionaries(texts, x))
names = texts | st.just("é" * 200) | anything
values = st.dictionaries(texts, integers) | st.dictionaries(texts, integers | scalars)
required = {"name": names, "data": values | anything}
documents = st.fixed_dictionaries(required, optional={"": anything})


@settings(max_examples=100, deadline=None, derandomize=True)
@given(documents | anything, st.booleans(), st.sampled_from([None, 2]))
def test_paths_agree(api: Client, document: Any, ascii: bool, indent: int) -> None:
    """On RFC 8259 JSON in UTF-8 all paths give the answer of the contract."""
    text = json.dumps(document, ensure_ascii=ascii, indent=indent)
    answer = right_answer(document)
    for response in h.answers(api, text.encode().ljust(70_000)):
        h.assert_answer(response, answer) if answer else h.assert_problem(response)


def test_limit(api: Client) -> None:
    """MAX_BODY_MB=1 lets exactly 1 MiB pass, however it is sent; without it are 64 MiB."""
    with h.connected(MAX_BODY_MB="1") as (_, client):
        for over_bytes, status in {0: 200, 1: 413, 5 * 2**20: 413}.items():
            body = h.SMALL.ljust(2**20 + over_bytes)
            for path in h.PATHS:
                pieces = (body[at : at + 2**18] for at in range(0, len(body), 2**18))
                assert h.post(client, path, body).status_code == status
                assert h.post(client, path, pieces).status_code == status  # no length
                h.assert_answer(h.post(client, path, h.SMALL))
    for over_bytes, status in {0: 200, 1: 413}.items():
        body = h.SMALL.ljust(64 * 2**20 + over_bytes)
        assert h.post(api, "/pong", body).status_code == status


@pytest.mark.parametrize("value", ["64MB", "-1", ""])
def test_junk_in_the_limit(value: str) -> None:
    """A MAX_BODY_MB that is no number ends the server at once, with a line that names it."""
    command, env = ["uvicorn", "server:app", "--port=0"], {"MAX_BODY_MB": value}
    with h.started(command, PIPE, STDOUT, env) as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert re.fullmatch(".*MAX_BODY_MB.*\n", output.decode())


def test_wrong_request(api: Client) -> None:
    """Without a JSON media type /ping answers 422 and /pong 415, and 422 to an unknown offload."""
    h.assert_problem(h.post(api, "/pong?offload=fork", h.SMALL))
    right = "application/json|Application/JSON; charset=utf-8|application/vnd.api+json"
    wrong = "|text/plain|text/json|application/jsonp|application/json+xml|multipart/x"
    for path in h.PATHS:
        for media_type in right.split("|"):
            h.assert_answer(h.post(api, path, h.SMALL, media_type))
        for media_type in wrong.split("|"):
            status = h.post(api, path, h.SMALL, media_type).status_code
            assert status == (422 if path == "/ping" else 415)


def test_openapi(api: Client) -> None:
    """/openapi.json has the schema of the JSON body and all answers; /docs is a page."""
    document = api.get("/openapi.json").json()
    codes = {"/ping": "200 413 422", "/pong": "200 413 415 422 503"}
    for path, statuses in codes.items():
        operation = document["paths"][path]["post"]
        assert sorted(operation["responses"]) == statuses.split()
        body = operation["requestBody"]
        schema = body["content"]["application/json"]["schema"]
        if reference := schema.get("$ref"):
            schema = document["components"]["schemas"][reference.rpartition("/")[2]]
        name, data = schema["properties"]["name"], schema["properties"]["data"]
        types = name["type"], data["type"], data["additionalProperties"]["type"]
        assert types == ("string", "object", "integer") and name["maxLength"] == 200
        assert body["required"] and set(schema["required"]) == {"name", "data"}
    assert api.get("/docs").headers["Content-Type"].startswith("text/html")


GUNICORN = "gunicorn -w 2 server:app -b 127.0.0.1:{port} -k "
COMMANDS = [f"{h.UVICORN} --workers 2 --no-access-log", f"{GUNICORN} asgi"]
COMMANDS += [f"{GUNICORN} uvicorn_worker.UvicornWorker"]
COMMANDS += [f"{GUNICORN} uvicorn.workers.UvicornWorker --reuse-port"]


@pytest.mark.parametrize("command", COMMANDS)
def test_server_commands(command: str) -> None:
    """Each way to start the server answers everywhere and ends without a trace."""
    body, answer = h.valid_body(4_000)
    with h.connected(command) as (server, client):
        for path in h.PATHS:
            h.assert_answer(h.post(client, path, h.SMALL))
            h.assert_answer(h.post(client, path, body), answer)
        server.process.terminate()
        server.process.wait(30)
        h.wait_until(lambda: not h.group_alive(server.process.pid), 10)
        assert not h.is_open(server.port) and "Traceback" not in server.log
