"""How an async FastAPI server takes large JSON bodies: one task, two endpoints.

/ping is what everybody writes, a pydantic model as the parameter. /pong reads the raw
request in chunks and parses it with orjson; /pong?offload=true parses it in another
process, so that the event loop stays free for everybody else. They take

    {"name": "at most 200 characters", "data": {"any key": a 64-bit integer, ...}}

and answer {"name": ..., "count": len(data), "maxval": largest value or 0}, or 422 (not
that shape), 413 (over 64 MiB; MAX_BODY_MB in the environment changes it), 415 (a
Content-Type other than JSON; none at all counts as JSON), 503 (offload=true and the pool
is full or has lost the process). Run it: uvicorn server:app --no-access-log
"""

import asyncio
import ctypes
import email.message
import gc
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from starlette.datastructures import State
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import ClientDisconnect

MAX_BODY_MB = os.environ.get("MAX_BODY_MB", "64")
if not re.fullmatch(r"\d{1,6}(\.\d*)?", MAX_BODY_MB) or not float(MAX_BODY_MB):
    print(f"MAX_BODY_MB must be a number of MiB, not {MAX_BODY_MB!r}", file=sys.stderr)
    sys.exit(3)  # which gunicorn takes for final; after another it would start again
MAX_BODY_BYTES = int(float(MAX_BODY_MB) * 2**20)
INLINE_BYTES = 64 * 1024  # up to here parsing is quicker than the way to the pool
MAX_BRACKETS = 1_000_000
MAX_HELD_BYTES = 4 * MAX_BODY_BYTES  # by all requests with offload=true together


def first_bad_value(data: Any) -> Any:
    """Reduce `data` with bad values to the first of them: one error, not a million."""

    def good(value: Any) -> bool:
        return type(value) is int and -(2**63) <= value < 2**63

    if isinstance(data, dict) and data:
        values = data.values()  # set, min and max look at them at C speed
        if set(map(type, values)) != {int} or not good(min(values)) & good(max(values)):
            return dict([next(item for item in data.items() if not good(item[1]))])
    return data


Int64 = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]


class Payload(BaseModel):
    name: str = Field(max_length=200)
    data: Annotated[dict[str, Int64], BeforeValidator(first_bad_value)]


class Answer(BaseModel):
    name: str
    count: int
    maxval: int


def problem(errors: Any) -> dict[str, Any]:
    """FastAPI's error body, bounded, and with nothing of the input but a key's start."""

    def brief(error: Any) -> dict[str, Any]:
        loc = [part[:100] if isinstance(part, str) else part for part in error["loc"]]
        why = f": {error['ctx']['error']}" if error["type"] == "json_invalid" else ""
        return {"type": error["type"], "loc": loc, "msg": error["msg"] + why}

    return {"detail": [brief(error) for error in errors[:10]]}


@contextmanager
def gc_paused() -> Iterator[None]:
    """Parsing makes no cycles, but many objects, which the collector walks again and again."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def nested(body: bytes) -> bool:
    """Whether there are more brackets than the model's two objects have."""
    # find and `in` are ten times as fast as count.
    inner = body.find(b"{", body.find(b"{") + 1)
    return b"[" in body or body.find(b"{", inner + 1) > 0


def loads(body: bytes) -> Any:
    """`orjson.loads`, but not of a body that is mostly brackets: a byte each, 60 in memory."""
    if nested(body) and body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
        raise json.JSONDecodeError(f"More than {MAX_BRACKETS} brackets", "", 0)
    return orjson.loads(body)


def give_memory_back() -> None:
    """Return freed memory to the system, where glibc would keep it for later."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


class JSONRequest(Request):
    """Parsed with `json.loads` as always in FastAPI, but only where orjson would agree.

    The standard library also takes NaN, UTF-16, a BOM, lone surrogates and numbers past a
    float, and has its own limit of depth. So all but the plainest bodies are orjson's.
    """

    async def stream(self) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in super().stream():
                yield chunk
        except ClientDisconnect:
            asyncio.get_running_loop().call_later(0.1, give_memory_back)
            raise

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            # In a list with a name, a traceback would keep what arrived of a lost upload.
            self._body = b"".join([chunk async for chunk in self.stream()])
        return self._body

    async def json(self) -> Any:
        body = await self.body()
        with gc_paused():
            if not nested(body) and b"\\u" not in body:
                try:
                    document = json.loads(body.decode())
                    keys = 2 + len(document["data"])
                    # One more colon, and a key may hide another with the same name.
                    if set(document) == {"name", "data"} and body.count(b":") == keys:
                        return document
                except (ValueError, TypeError, KeyError):
                    pass  # for the same error from orjson
                document = None  # never two of them in memory
            return loads(body)


# Status, content, seconds by stage.
Digest = tuple[int, dict[str, Any], dict[str, float]]


@gc_paused()
def digest(chunks: list[bytes]) -> Digest:
    """All that /pong does with a body once it is read: in the event loop or in the pool."""
    begun = time.perf_counter()
    try:
        document = loads(b"".join(chunks))
    except json.JSONDecodeError as exc:
        error = {"type": "json_invalid", "loc": ["body", exc.pos]}
        reason = {"msg": "JSON decode error", "ctx": {"error": exc.msg}}
        return 422, problem([error | reason]), {}
    parsed = time.perf_counter()
    count = maxval = 0
    if isinstance(document, dict) and isinstance(data := document.get("data"), dict):
        values = data.values()  # none is below -(2**63), which orjson makes a float
        if set(map(type, values)) <= {int} and (top := max(values, default=0)) < 2**63:
            count, maxval = len(data), top
            document["data"] = {}  # found good: pydantic would only copy it
    try:
        name = Payload.model_validate(document, from_attributes=True).name
        status, content = 200, {"name": name, "count": count, "maxval": maxval}
    except ValidationError as exc:
        errors = exc.errors(include_url=False, include_input=False)
        located = [{**error, "loc": ["body", *error["loc"]]} for error in errors]
        status, content = 422, problem(located)
    validate_s = time.perf_counter() - parsed
    return status, content, {"parse": parsed - begun, "validate": validate_s}


def follow_server() -> None:
    """In a pool process: leave Ctrl-C to the server, and end when it ends, however it ends."""

    def watch() -> None:
        if server := multiprocessing.parent_process():
            server.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


async def digest_in_pool(chunks: list[bytes], state: State) -> Digest:
    try:
        future = state.pool.submit(digest, chunks)
    except (AttributeError, BrokenProcessPool):  # none yet, or it has lost a process
        # Spawned: a fork would keep the listening socket open after the server is gone.
        state.pool = ProcessPoolExecutor(
            max(1, (os.cpu_count() or 1) - 1),  # a core is left to the event loop
            mp_context=multiprocessing.get_context("spawn"),
            initializer=follow_server,
        )
        future = state.pool.submit(digest, chunks)
    try:
        return await asyncio.wrap_future(future)
    except BrokenProcessPool:
        raise HTTPException(503, "The process with this body died, try again") from None


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    if app.state.pool:
        for process in multiprocessing.active_children():
            process.kill()
        app.state.pool.shutdown(cancel_futures=True)
        app.state.pool = None


def server_timing(stages_s: dict[str, float]) -> str:
    return ", ".join(f"{stage};dur={1000 * s:.1f}" for stage, s in stages_s.items())


class JSONRoute(APIRoute):
    """What both endpoints share: the media type, clients that hang up, the total time."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            begun = time.perf_counter()
            header = email.message.Message()  # parses as FastAPI does
            value = request.headers.get("content-type")
            header["content-type"] = value or "application/json"
            if not re.fullmatch(r"application/(.+\+)?json", header.get_content_type()):
                raise HTTPException(415, "Content-Type must be application/json")
            try:
                response = await handler(JSONRequest(request.scope, request.receive))
            except ClientDisconnect:
                return Response(status_code=400)  # nobody is left to read it
            total = server_timing({"total": time.perf_counter() - begun})
            response.headers.setdefault("Server-Timing", total)
            return response

        return handle


app = FastAPI(lifespan=lifespan, strict_content_type=False)
app.state.pool, app.state.held_bytes = None, 0
app.router.route_class = JSONRoute
app.add_middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY_BYTES)


@app.exception_handler(RequestValidationError)
async def unprocessable(request: Request, exc: RequestValidationError) -> JSONResponse:
    exc.__traceback__ = None  # its frames hold the body until the collector finds them
    return JSONResponse(problem(exc.errors()), 422)


@app.post("/ping")
async def ping(payload: Payload) -> Answer:
    maxval = max(payload.data.values(), default=0)
    return Answer(name=payload.name, count=len(payload.data), maxval=maxval)


SCHEMA = {"application/json": {"schema": {"$ref": "#/components/schemas/Payload"}}}
DOCS = {"requestBody": {"required": True, "content": SCHEMA}}


@app.post("/pong", response_model=Answer, openapi_extra=DOCS)
async def pong(request: Request, offload: bool = False) -> JSONResponse:
    begun, state, size_bytes = time.perf_counter(), request.app.state, 0
    chunks = []  # not joined here: many small pieces are pickled far faster than one large
    try:
        async for chunk in request.stream():
            chunks.append(chunk)
            size_bytes += len(chunk)
            state.held_bytes += len(chunk) * offload
            if offload and state.held_bytes > MAX_HELD_BYTES:
                raise HTTPException(503, "Too many large bodies", {"Retry-After": "1"})
        read_s = time.perf_counter() - begun
        in_pool = offload and size_bytes > INLINE_BYTES
        result = await digest_in_pool(chunks, state) if in_pool else digest(chunks)
    finally:
        state.held_bytes -= size_bytes * offload
        chunks.clear()
    status, content, stages_s = result
    stages_s = {"read": read_s, **stages_s, "total": time.perf_counter() - begun}
    return JSONResponse(content, status, {"Server-Timing": server_timing(stages_s)})
