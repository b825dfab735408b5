"""Stand-in servers whose behaviour is known exactly, for the tests of client.py.

    uvicorn stub:app --app-dir tests --port PORT
    python tests/stub.py PORT cut|reset|silent|garbage

The first gives the right answer to a POST to any path, except where the path ends with

    /stall      right, but each large body blocks the event loop for 0.4 s
    /slow       right, 0.1 s later, and nobody else has to wait
    /status500  status 500        /wrong    another maxval
    /flaky      every third is 500    /notjson  no JSON
    /never      no answer, once a warm-up (11 small and 1 large) had its answers

With STALL=periodic in the environment it also blocks its event loop for the first 0.4 s
of every 1.5 s, whoever calls. The second kind, given the right port and fault, breaks off
every second answer, resets every second connection, accepts and never answers, or speaks
no HTTP. Both count the POSTs by path and name, GET /counts shows it.
"""

import asyncio
import functools
import json
import os
import resource
import socket
import struct
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

STALL_S, PERIOD_S, SLOW_S = 0.4, 1.5, 0.1
WARM_UP = {"small": 11, "large": 1}
NO_HTTP = b"220 mail.example ESMTP\r\n"

# By path: requests of each name, connections, and the most small ones at the same time.
seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
peers: set[tuple[str, Any]] = set()
in_flight: Counter[str] = Counter()


@functools.lru_cache
def right_answer(body: bytes) -> dict[str, Any]:
    document = json.loads(body)
    values = document["data"].values()
    maxval = max(values, default=0)
    return {"name": document["name"], "count": len(values), "maxval": maxval}


def block(seconds: float) -> None:
    """Freeze the event loop that calls this."""
    time.sleep(max(0, seconds))


async def stall_periodically() -> None:
    due_s = time.monotonic()
    while True:  # to absolute times, so that neither stall nor period drifts
        await asyncio.sleep(due_s - time.monotonic())
        block(due_s + STALL_S - time.monotonic())
        due_s += PERIOD_S


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))  # macOS: 256 before
    if os.environ.get("STALL") == "periodic":
        app.state.task = asyncio.create_task(stall_periodically())
    yield


async def answer(request: Request, path: str, body: bytes) -> Response:
    content = right_answer(body)
    name = content["name"]
    seen[path][name] += 1
    if path.endswith("/stall") and name == "large":
        block(STALL_S)
    elif path.endswith("/slow"):
        await asyncio.sleep(SLOW_S)
    elif path.endswith("/never") and seen[path][name] > WARM_UP[name]:
        await request.receive()  # until the client is gone
    elif path.endswith("/wrong"):
        content = content | {"maxval": content["maxval"] + 1}
    elif path.endswith("/notjson"):
        return Response(b"all well")
    every = {"status500": 1, "flaky": 3}.get(path.rpartition("/")[2])
    failed = every and seen[path][name] % every == 0
    return JSONResponse(content, 500 if failed else 200)


async def post(request: Request) -> Response:
    path = request.url.path
    if (path, request.client) not in peers:
        peers.add((path, request.client))
        seen[path]["connections"] += 1
    body = await request.body()
    if b'"small"' not in body[:20]:
        return await answer(request, path, body)
    in_flight[path] += 1
    seen[path]["at_once"] = max(seen[path]["at_once"], in_flight[path])
    try:
        return await answer(request, path, body)
    finally:
        in_flight[path] -= 1


async def get(request: Request) -> Response:
    return JSONResponse(seen)


routes = [
    Route("/{path:path}", get, methods=["GET"]),
    Route("/{path:path}", post, methods=["POST"]),
]
app = Starlette(routes=routes, lifespan=lifespan)


def http_answer(content: Any) -> bytes:
    body = json.dumps(content).encode()
    head = (
        f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def serve_raw(port: int, fault: str) -> None:
    """An answer or a fault to the one request of each connection."""

    async def connected(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split(" ", 2)
        if method == "GET":
            writer.write(http_answer(seen))
        elif fault == "silent":
            await reader.read()
        elif fault == "garbage":
            writer.write(NO_HTTP)
        else:
            length = head.lower().partition("content-length: ")[2].split("\r\n")[0]
            content = right_answer(await reader.readexactly(int(length)))
            seen[path][content["name"]] += 1
            if seen[path][content["name"]] % 2:
                writer.write(http_answer(content))
            elif fault == "cut":
                writer.write(http_answer(content)[:-5])
            else:
                sock = writer.get_extra_info("socket")
                sock.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", port, limit=2**20)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve_raw(int(sys.argv[1]), sys.argv[2]))
