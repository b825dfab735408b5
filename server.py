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
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import asynccontextmanager
from itertools import islice
from operator import countOf
from typing import Annotated, Any

import orjson
from fastapi import BackgroundTasks, FastAPI, HTTPException, Request, Response
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


def check_values(data: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """The largest value, 0 if none, and the first entry that is no 64-bit integer, if any.

    countOf and max look at a block at C speed; only a bad block is gone through here.
    """
    values, seen, tops = iter(data.values()), 0, []
    while block := list(islice(values, 10_000)):
        integers = countOf(map(type, block), int) == len(block)
        if not integers or (top := max(block)) >= 2**63:
            for key, value in islice(data.items(), seen, None):
                if type(value) is not int or value >= 2**63:
                    return 0, {key[:100]: value}  # all that an error tells of the input
        seen += len(block)
        tops.append(top)
    return max(tops, default=0), {}


def first_bad_value(data: Any, info: ValidationInfo) -> Any:
    """Reduce `data` with bad values to the first of them: one error, not a million."""
    if "name" not in info.data:
        return {}  # `name` is wrong, so there is no use in checking and copying `data`
    if isinstance(data, dict):
        _, bad = check_values(data)
        return bad or data
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
    gc.disable()  # JSON has no cycles, but many objects, walked again and again
    try:
        last = max(body.rfind(b"["), body.rfind(b"{"))  # count takes ten times as long
        if last >= MAX_BRACKETS and body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
            raise json.JSONDecodeError(f"More than {MAX_BRACKETS} brackets", "", 0)
        return orjson.loads(body)
    except json.JSONDecodeError as exc:
        loc, msg = ["body", exc.pos], f"JSON decode error: {exc.msg}"
        error = {"type": "json_invalid", "loc": loc, "msg": msg}
        raise HTTPException(422, [error]) from None  # passes FastAPI as it is
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
            # For nobody to read. Any other exception FastAPI keeps, and so the body.
            raise HTTPException(400) from None

    async def json(self) -> Any:
        return loads(await self.body())


class JSONRoute(APIRoute):
    """What both endpoints share: the media type and Server-Timing."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            begun = time.perf_counter()
            media = request.headers.get("content-type") or "application/json"
            if not re.match(r"(?i)\s*application/([^/;]*\+)?json\s*(;|$)", media):
                raise HTTPException(415, "Content-Type must be application/json")
            response = await handler(JSONRequest(request.scope, request.receive))
            stages_s = request.scope.get("stages_s", {})
            stages_s["total"] = time.perf_counter() - begun
            timing = [f"{stage};dur={1000 * s:.1f}" for stage, s in stages_s.items()]
            response.headers["Server-Timing"] = ", ".join(timing)
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


@app.exception_handler(RequestValidationError)
async def unprocessable(request: Request, exc: RequestValidationError) -> JSONResponse:
    """FastAPI's error body, without the input."""
    detail = [{key: e[key] for key in ("type", "loc", "msg")} for e in exc.errors()]

    async def free() -> None:
        # In both are frames that hold the document, until the collector finds them.
        exc.__traceback__ = exc.__context__ = None

    return JSONResponse({"detail": detail}, 422, background=BackgroundTask(free))


@app.post("/ping")
async def ping(payload: Payload) -> Answer:
    maxval = max(payload.data.values(), default=0)
    return Answer(name=payload.name, count=len(payload.data), maxval=maxval)


Digest = tuple[Answer, dict[str, float]]  # with the seconds by stage


def digest(chunks: list[bytes], kept: list[Any] | None = None) -> Digest:
    """All that /pong does with a body once it is read: in the event loop or in the pool.

    Freeing the document takes 30 ms, for which no answer should wait, so it goes to `kept`.
    Not so in the pool, where it would slow the next upload down.
    """
    begun = time.perf_counter()
    document = loads(b"".join(chunks))
    parsed = time.perf_counter()
    if kept is not None:
        kept.append(document)
    count = maxval = 0
    match document:
        case {"name": str(name), "data": dict(data)}:
            count = len(data)
            maxval, bad = check_values(data)
            document = {"name": name, "data": bad}  # pydantic would copy the rest
    try:
        name = Payload.model_validate(document, from_attributes=True).name
    except ValidationError as exc:
        errors = exc.errors(include_input=False)
        located = [{**error, "loc": ["body", *error["loc"]]} for error in errors]
        raise RequestValidationError(located) from None
    answer = Answer(name=name, count=count, maxval=maxval)
    return answer, {"parse": parsed - begun, "validate": time.perf_counter() - parsed}


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
        future = app.state.pool.submit(digest, chunks)
    except (AttributeError, BrokenProcessPool):  # none yet, or it has lost a process
        # Spawned: a fork would keep the listening socket open after the server is gone.
        app.state.pool = ProcessPoolExecutor(
            max(1, (os.cpu_count() or 1) - 1),  # a core is left to the event loop
            mp_context=multiprocessing.get_context("spawn"),
            initializer=follow_server,
        )
        future = app.state.pool.submit(digest, chunks)
    try:
        return await asyncio.wrap_future(future)
    except BrokenProcessPool:
        raise HTTPException(503, "The process with this body died, try again") from None


SCHEMA = {"application/json": {"schema": {"$ref": "#/components/schemas/Payload"}}}
DOCS = {"requestBody": {"required": True, "content": SCHEMA}}


@app.post("/pong", openapi_extra=DOCS)
async def pong(
    request: Request, after: BackgroundTasks, offload: bool = False
) -> Answer:
    begun, state, size_bytes = time.perf_counter(), app.state, 0
    kept: list[Any] = []
    after.add_task(kept.clear)
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
            answer, stages_s = await digest_in_pool(chunks)
        else:
            answer, stages_s = digest(chunks, kept)
    finally:
        state.held_bytes -= size_bytes * offload
        chunks.clear()
    request.scope["stages_s"] = {"read": read_s, **stages_s}
    return answer
