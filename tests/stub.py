"""Stand-in servers whose behaviour is known exactly, for the tests of client.py.

    uvicorn stub:app --app-dir tests --port PORT
    python tests/stub.py PORT cut|reset|silent|garbage|periodic|held

The first gives the right answer to a POST, unless the last part of the path says otherwise.
The second breaks off every second answer, resets every second connection, never answers, or
speaks no HTTP; freezes for the first 0.4 s of every 1.5 s; or holds 1,000 small requests and
then answers all at once. GET /counts shows the POSTs by path and name, GET /left when each
answer to a small request left, on the clock of time.perf_counter(), which processes share.
"""

import asyncio
import contextlib
import json
import resource
import socket
import struct
import sys
import time
from asyncio import StreamReader, StreamWriter
from collections import Counter, defaultdict
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

STALL_S, PERIOD_S, SLOW_S = 0.4, 1.5, 0.1
WARM_UP = {"small": 11, "large": 1}
HELD = 1000
block = time.sleep  # freezes the event loop that calls it

# By path: requests of each name, connections, and the most small ones at the same time.
seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
peers: set[tuple[str, Any]] = set()


def right_answer(body: bytes) -> dict[str, Any]:
    name, data = json.loads(body).values()
    return {"name": name, "count": len(data), "maxval": max(data.values(), default=0)}


def raise_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(8192, hard), hard))  # macOS: 256


async def answer(request: Request) -> Response:
    raise_limit()
    path, body = request.url.path, await request.body()
    if request.method == "GET":
        return JSONResponse(seen)
    if path.endswith("/echo"):  # in capitals, as --header's values are shown as ***
        return Response(f"{request.headers['content-type'].upper()} {body!r}", 404)
    counts, content, fault = seen[path], right_answer(body), path.rpartition("/")[2]
    name = content["name"]
    counts["connections"] += (path, request.client) not in peers
    peers.add((path, request.client))
    counts.update([name, f"{name} now"])
    if counts["small"] > WARM_UP["small"]:
        counts["at_once"] = max(counts["at_once"], counts["small now"])
    if fault == "stall" and name == "large":
        block(STALL_S)
    elif fault == "slow":  # nobody else has to wait
        await asyncio.sleep(SLOW_S)
    elif fault in ("never", f"no{name}") and counts[name] > WARM_UP[name]:
        await request.receive()  # until the client is gone
    counts[f"{name} now"] -= 1
    if fault == "chunked":  # without a Content-Length
        text = json.dumps(content)
        return StreamingResponse(iter([text[:9], text[9:]]))
    content["maxval"] += fault == "wrong"
    failed = fault == "status500" or fault == "flaky" and counts[name] % 3 == 0
    return JSONResponse(content, 500 if failed else 200)


app = Starlette(routes=[Route("/{_:path}", answer, methods=["GET", "POST", "PUT"])])


def http_answer(content: Any) -> bytes:
    body = json.dumps(content).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


async def serve_raw(port: int, fault: str) -> None:
    left_s: list[float] = []
    held: list[tuple[StreamWriter, bytes]] = []

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split(" ", 2)
            if method == "GET":
                writer.write(http_answer(left_s if path == "/left" else seen))
                continue
            if fault == "garbage":
                return writer.write(b"220 mail.example ESMTP\r\n")
            length = int(head.lower().partition("content-length: ")[2].split("\r\n")[0])
            content = right_answer(await reader.readexactly(length))
            name, answers = content["name"], [(writer, http_answer(content))]
            seen[path][name] += 1
            if fault == "silent":
                await reader.read()
            if fault == "held" and name == "small" and seen[path][name] > WARM_UP[name]:
                held.extend(answers)
                if len(held) < HELD:
                    continue
                await asyncio.sleep(0.5)
                answers, held[:] = held[:], []
            if fault == "cut" and seen[path][name] % 2 == 0:
                return writer.write(answers[0][1][:-5])
            if fault == "reset" and seen[path][name] % 2 == 0:
                sock, reset = writer.get_extra_info("socket"), struct.pack("ii", 1, 0)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
                return
            for other, right in answers:
                if name == "small":
                    left_s.append(time.perf_counter())  # the client may be quicker
                other.write(right)

    async def connected(reader: StreamReader, writer: StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await serve(reader, writer)
        writer.close()

    raise_limit()
    server = await asyncio.start_server(connected, "127.0.0.1", port, backlog=4096)
    due_s = time.monotonic()
    while fault == "periodic":  # to absolute times, so that nothing drifts
        await asyncio.sleep(due_s - time.monotonic())
        block(max(0, due_s + STALL_S - time.monotonic()))
        due_s += PERIOD_S
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve_raw(int(sys.argv[1]), sys.argv[2]))
