"""How an async FastAPI server takes large JSON bodies: one task, two endpoints.

/ping is what everybody writes, a pydantic model as the parameter. /pong reads the raw
request in chunks, parses it with orjson and checks it without a copy; with
/pong?offload=true another process does that, and the event loop stays free. They take

    {"name": "at most 200 characters", "data": {"any key": a 64-bit integer, ...}}

and answer {"name": ..., "count": len(data), "maxval": largest value or 0}, or 422 (not
that shape), 413 (over 64 MiB; MAX_BODY_MB in the environment changes it), 415 (a
Content-Type other than JSON; none at all counts as JSON), 503 (offload=true and the pool
is full or has lost the process). JSON is what orjson takes, on /ping as well: UTF-8
without BOM, no NaN, no lone surrogates, depth up to 1024, and up to a million brackets.
Run it: uvicorn server:app --no-access-log
"""

import asyncio
import ctypes
import gc
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import asynccontextmanager
from operator import countOf
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, ValidationInfo
from starlette.background import BackgroundTask
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import ClientDisconnect

MAX_BODY_MB = os.environ.get("MAX_BODY_MB", "64")
if not re.fullmatch(r"\d{1,6}(\.\d*)?", MAX_BODY_MB) or not float(MAX_BODY_MB):
    print(f"MAX_BODY_MB must be a number of MiB, not {MAX_BODY_MB!r}", file=sys.stderr)
    sys.exit(3)  # which gunicorn takes for final; after another it would start again
MAX_BODY_BYTES = int(float(MAX_BODY_MB) * 2**20)
MAX_HELD_BYTES = 4 * MAX_BODY_BYTES  # by all requests with offload=true together
MAX_BRACKETS = 1_000_000
INLINE_BYTES = 64 * 1024  # up to here parsing is quicker than the way to the pool
# Returns freed memory to the system, where glibc would keep it for later.
MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)


def first_bad_value(data: Any, info: ValidationInfo) -> Any:
    """Reduce `data` with bad values to the first of them: one error, not a million."""
    if "name" not in info.data:
        return {}  # `name` is wrong, so there is no use in checking and copying `data`
    if isinstance(data, dict):
        for key, value in data.items():
            if type(value) is not int or value >= 2**63:
                return {key: value}
    return data


# orjson makes an integer below -(2**63) a float, so that needs no check.
Int64 = Annotated[int, Field(strict=True, lt=2**63)]


class Payload(BaseModel):
    name: str = Field(max_length=200)
    data: Annotated[dict[str, Int64], BeforeValidator(first_bad_value)]


class Answer(BaseModel):
    name: str
    count: int
    maxval: int


def loads(body: bytes) -> Any:
    """`orjson.loads`, but not of a body that is mostly brackets: a byte each, 60 in memory."""
    last = max(body.rfind(b"["), body.rfind(b"{"))  # count takes ten times as long
    if last >= MAX_BRACKETS and body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
        raise json.JSONDecodeError(f"More than {MAX_BRACKETS} brackets", "", 0)
    gc.disable()  # JSON has no cycles, but many objects, walked again and again
    try:
        return orjson.loads(body)
    finally:
        gc.enable()


class JSONRequest(Request):
    """Parsed as on /pong: `json.loads` takes NaN, UTF-16 and more that orjson refuses."""

    async def stream(self) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in super().stream():
                yield chunk
        except ClientDisconnect:
            asyncio.get_running_loop().call_later(0.1, MALLOC_TRIM, 0)
            raise

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            # In a list with a name, a traceback would keep what arrived of a lost upload.
            self._body = b"".join([chunk async for chunk in self.stream()])
        return self._body

    async def json(self) -> Any:
        return loads(await self.body())


def server_timing(stages_s: dict[str, float]) -> str:
    return ", ".join(f"{stage};dur={1000 * s:.1f}" for stage, s in stages_s.items())


class JSONRoute(APIRoute):
    """What both endpoints share: the media type, clients that hang up, the total time."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            begun = time.perf_counter()
            media = request.headers.get("content-type") or "application/json"
            if not re.match(r"(?i)\s*application/([^/;]*\+)?json\s*(;|$)", media):
                raise HTTPException(415, "Content-Type must be application/json")
            try:
                response = await handler(JSONRequest(request.scope, request.receive))
            except ClientDisconnect:
                return Response(status_code=400)  # nobody is left to read it
            total = server_timing({"total": time.perf_counter() - begun})
            response.headers.setdefault("Server-Timing", total)
            return response

        return handle


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
    yield
    if app.state.pool:
        for process in multiprocessing.active_children():
            process.kill()
        app.state.pool.shutdown(cancel_futures=True)
        app.state.pool = None


app = FastAPI(lifespan=lifespan, strict_content_type=False)
app.state.pool, app.state.held_bytes = None, 0
app.router.route_class = JSONRoute
app.add_middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY_BYTES)


def refusal(errors: Sequence[Any]) -> JSONResponse:
    """FastAPI's error body, bounded, and with nothing of the input but a key's start."""
    detail = []
    for error in errors[:10]:
        loc = [part[:100] if isinstance(part, str) else part for part in error["loc"]]
        why = f": {error['ctx']['error']}" if error["type"] == "json_invalid" else ""
        detail.append({"type": error["type"], "loc": loc, "msg": error["msg"] + why})
    return JSONResponse({"detail": detail}, 422)


@app.exception_handler(RequestValidationError)
async def unprocessable(request: Request, exc: RequestValidationError) -> JSONResponse:
    exc.__traceback__ = None  # its frames hold the body until the collector finds them
    return refusal(exc.errors())


@app.post("/ping")
async def ping(payload: Payload) -> Answer:
    maxval = max(payload.data.values(), default=0)
    return Answer(name=payload.name, count=len(payload.data), maxval=maxval)


# The answer or the errors, and the seconds by stage.
Digest = tuple[dict[str, Any] | list[Any], dict[str, float]]


def digest(chunks: list[bytes], kept: list[Any]) -> Digest:
    """All that /pong does with a body once it is read: in the event loop or in the pool.

    The document goes to `kept`: freeing it takes 30 ms, for which no answer should wait.
    """
    begun = time.perf_counter()
    try:
        document = loads(b"".join(chunks))
    except json.JSONDecodeError as exc:
        error = {"type": "json_invalid", "loc": ["body", exc.pos]}
        return [error | {"msg": "JSON decode error", "ctx": {"error": exc.msg}}], {}
    parsed = time.perf_counter()
    kept.append(document)
    count = maxval = 0
    if isinstance(document, dict) and isinstance(data := document.get("data"), dict):
        values = data.values()  # countOf and max look at them at C speed
        integers = countOf(map(type, values), int) == len(data)
        if integers and (top := max(values, default=0)) < 2**63:
            count, maxval = len(data), top
            kept.append(data)
            document["data"] = {}  # found good: pydantic would only copy it
    try:
        name = Payload.model_validate(document, from_attributes=True).name
    except ValidationError as exc:
        errors = exc.errors(include_url=False, include_input=False)
        return [{**error, "loc": ["body", *error["loc"]]} for error in errors], {}
    answer = {"name": name, "count": count, "maxval": maxval}
    validate_s = time.perf_counter() - parsed
    return answer, {"parse": parsed - begun, "validate": validate_s}


def digest_and_free(chunks: list[bytes]) -> Digest:
    """In a pool process: what is freed after the answer slows the next upload down."""
    return digest(chunks, [])


def follow_server() -> None:
    """In a pool process: leave Ctrl-C to the server, and end when it ends, however it ends."""

    def watch() -> None:
        if server := multiprocessing.parent_process():
            server.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


async def digest_in_pool(chunks: list[bytes]) -> Digest:
    try:
        future = app.state.pool.submit(digest_and_free, chunks)
    except (AttributeError, BrokenProcessPool):  # none yet, or it has lost a process
        # Spawned: a fork would keep the listening socket open after the server is gone.
        app.state.pool = ProcessPoolExecutor(
            max(1, (os.cpu_count() or 1) - 1),  # a core is left to the event loop
            mp_context=multiprocessing.get_context("spawn"),
            initializer=follow_server,
        )
        future = app.state.pool.submit(digest_and_free, chunks)
    try:
        return await asyncio.wrap_future(future)
    except BrokenProcessPool:
        raise HTTPException(503, "The process with this body died, try again") from None


SCHEMA = {"application/json": {"schema": {"$ref": "#/components/schemas/Payload"}}}
DOCS = {"requestBody": {"required": True, "content": SCHEMA}}


@app.post("/pong", response_model=Answer, openapi_extra=DOCS)
async def pong(request: Request, offload: bool = False) -> JSONResponse:
    begun, state, size_bytes = time.perf_counter(), app.state, 0
    kept: list[Any] = []
    chunks = []  # not joined here: many small pieces are pickled far faster than one large
    try:
        async for chunk in request.stream():
            chunks.append(chunk)
            size_bytes += len(chunk)
            state.held_bytes += len(chunk) * offload
            if offload and state.held_bytes > MAX_HELD_BYTES:
                raise HTTPException(503, "Too many large bodies", {"Retry-After": "1"})
        read_s = time.perf_counter() - begun
        if offload and size_bytes > INLINE_BYTES:
            result, stages_s = await digest_in_pool(chunks)
        else:
            result, stages_s = digest(chunks, kept)
    finally:
        state.held_bytes -= size_bytes * offload
        chunks.clear()
    if isinstance(result, list):
        response = refusal(result)
    else:
        stages_s = {"read": read_s, **stages_s, "total": time.perf_counter() - begun}
        timing = {"Server-Timing": server_timing(stages_s)}
        response = JSONResponse(result, headers=timing)
    response.background = BackgroundTask(kept.clear)
    return response
