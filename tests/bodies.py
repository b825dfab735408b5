"""Bodies for server.py, and what they are answered with."""

import json
from functools import cache
from typing import Any

from harness import post
from httpx import Client, Response

Answer = dict[str, Any] | None
PATHS = ("/ping", "/pong", "/pong?offload=thread", "/pong?offload=process")
SMALL = b'{"name":"a","data":{"x":-1,"y":7,"z":3}}'
SMALL_ANSWER: Answer = {"name": "a", "count": 3, "maxval": 7}


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
        (detail,) = response.json().items()
        assert detail[0] == "detail" and 1 <= len(detail[1]) <= 2
        for error in detail[1]:
            assert error.keys() == {"type", "loc", "msg"}
            assert isinstance(error["type"], str) and isinstance(error["msg"], str)
            assert all(isinstance(part, (str, int)) for part in error["loc"])
