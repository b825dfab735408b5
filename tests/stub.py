"""Stand-in servers whose behaviour is known exactly, for the tests of client.py.

    uvicorn stub:app --app-dir tests --port PORT
    python tests/stub.py PORT cut|reset|silent|garbage|periodic|held

The first gives the right answer to a POST to any path, except where the path ends with

    /stall      right, but each large body blocks the event loop for 0.4 s
    /slow       right, 0.1 s later, and nobody else has to wait
    /status500  status 500        /wrong    another maxval
    /flaky      every third is 500    /notjson  no JSON
    /never      no answer, once a warm-up (11 small and 1 large) had its answers
    /chunked    right, without a Content-Length

The second kind, given the right port and fault, breaks off every second answer, resets every
second connection, accepts and never answers, or speaks no HTTP; freezes for the first 0.4 s
of every 1.5 s; or holds 1,000 small requests after a warm-up, and then answers all at once.
GET /counts shows the POSTs by path and name, GET /left when each answer to a small request
left, on the clock of time.perf_counter(), which all processes share.
"""

import asyncio
import functools
import json
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
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

STALL_S, PERIOD_S, SLOW_S = 0.4, 1.5, 0.1
WARM_UP = {"small": 11, "large": 1}
HELD = 1000

# By path: requests of each name, connections, and the most small ones at the same time.
seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
peers: set[tuple[str, Any]] = set()
in_flight: Counter[str] = Counter()


def block(seconds: float) -> None:
    """Freeze the event loop that calls this."""
    time.sleep(max(0, seconds))


@functools.lru_cache
def right_answer(body: bytes) -> dict[str, Any]:
    document = json.loads(body)
    values = document["data"].values()
    maxval = max(values, default=0)
    return {"name": document["name"], "count": len(values), "maxval": maxval}


def raise_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))  # macOS: 256 before


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    raise_limit()
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
    elif path.endswith("/chunked"):
        text = json.dumps(content)
        return StreamingResponse(iter([text[:9], text[9:]]))
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
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


async def stall_periodically() -> None:
    due_s = time.monotonic()
    while True:  # to absolute times, so that neither stall nor period drifts
        await asyncio.sleep(due_s - time.monotonic())
        block(due_s + STALL_S - time.monotonic())
        due_s += PERIOD_S


async def serve_raw(port: int, fault: str) -> None:
    left_s: list[float] = []
    held: list[tuple[asyncio.StreamWriter, bytes]] = []

    def leave(writer: asyncio.StreamWriter, content: bytes) -> None:
        left_s.append(time.perf_counter())  # before: the client may be quicker
        writer.write(content)

    async def connected(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            while await serve_one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        if not any(writer is other for other, _ in held):
            writer.close()

    async def serve_one(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, path, _ = head.split(" ", 2)
        if method == "GET":
            writer.write(http_answer(left_s if path == "/left" else seen))
            return True
        if fault == "garbage":
            writer.write(b"220 mail.example ESMTP\r\n")
            return False
        length = int(head.lower().partition("content-length: ")[2].split("\r\n")[0])
        content = right_answer(await reader.readexactly(length))
        name = content["name"]
        seen[path][name] += 1
        right = http_answer(content)
        if fault == "silent":
            await reader.read()
        elif fault == "held" and name == "small" and seen[path][name] > WARM_UP[name]:
            held.append((writer, right))
            if len(held) == HELD:
                await asyncio.sleep(0.5)
                for other, answer in held:
                    leave(other, answer)
                held.clear()
            return True
        elif fault in ("held", "periodic") or seen[path][name] % 2:
            if name == "small":
                leave(writer, right)
            else:
                writer.write(right)
            return True
        elif fault == "cut":
            writer.write(right[:-5])
        else:
            sock = writer.get_extra_info("socket")
            reset = struct.pack("ii", 1, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
        return False

    raise_limit()
    server = await asyncio.start_server(
        connected, "127.0.0.1", port, limit=2**20, backlog=4096
    )
    if fault == "periodic":
        await stall_periodically()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve_raw(int(sys.argv[1]), sys.argv[2]))
