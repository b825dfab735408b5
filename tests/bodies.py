"""Bodies for server.py, and what they are answered with."""

import json
from functools import cache
from typing import Any

import httpx

PATHS = ("/ping", "/pong", "/pong?offload=thread", "/pong?offload=process")
PROCESS = PATHS[-1]
POOLED_BYTES = 70_000  # more than the 64 KiB up to which `offload` does nothing
SMALL = b'{"name":"a","data":{"x":-1,"y":7,"z":3}}'
SMALL_ANSWER = {"name": "a", "count": 3, "maxval": 7}


@cache
def valid_body(entries: int) -> tuple[bytes, dict[str, Any]]:
    """A valid body, 21 to 26 bytes per entry, and the right answer to it."""
    data = {f"key{i:010d}": i * 7919 % 2_000_003 - 1_000_000 for i in range(entries)}
    maxval = max(data.values(), default=0)
    answer = {"name": "größe", "count": entries, "maxval": maxval}
    return json.dumps({"name": "größe", "data": data}).encode(), answer


def keyed(value: bytes, size_bytes: int) -> bytes:
    """A body of about this size with all values equal."""
    count = size_bytes // len(b'"k0000000":%s,' % value)
    items = b",".join(b'"k%07d":%s' % (i, value) for i in range(count))
    return b'{"name":"a","data":{%s}}' % items


def assert_answer(response: httpx.Response, answer: dict[str, Any]) -> None:
    assert (response.status_code, response.json()) == (200, answer)


def assert_problem(
    response: httpx.Response, statuses: tuple[int, ...] = (422,)
) -> None:
    """A rejection in the contract's form."""
    assert response.status_code in statuses
    assert len(response.content) < 2000
    if response.status_code != 422:
        return
    content = response.json()
    assert content.keys() == {"detail"} and 1 <= len(content["detail"]) <= 2
    for error in content["detail"]:
        assert error.keys() == {"type", "loc", "msg"}
        assert isinstance(error["type"], str) and isinstance(error["msg"], str)
        assert all(isinstance(part, (str, int)) for part in error["loc"])
