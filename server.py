"""Two async endpoints that take large JSON bodies: one such body blocks all other requests.

/ping is what everybody writes: a pydantic model as the parameter. /pong reads the raw
request in chunks, parses it with orjson and checks `data` without copying it. Both hold
the event loop while they parse. /pong?offload=process parses in a worker process, and the
loop stays free; /pong?offload=thread helps little, as the parser holds the GIL. Bodies up
to 64 KiB are always parsed in the loop.

A body is {"name": at most 200 characters, "data": {any key: 64-bit integer, ...}}, the
answer {"name": ..., "count": len(data), "maxval": the largest value, or 0}, or an error:

  413  over 64 MiB; MAX_BODY_MB in the environment sets another limit, in MiB
  415  /pong: the Content-Type is not JSON (/ping says 422)
  422  not JSON (/ping says 400 where it is not even UTF-8), or the wrong shape; the input
       is not repeated
  503  offload: too many bodies are queued, or the worker process died

/ping takes what json.loads takes: also UTF-16, UTF-32, a BOM, NaN, numbers beyond a float
and lone surrogates in keys. /pong takes what orjson takes: RFC 8259 in UTF-8, up to 1024
levels deep. A body of nothing but brackets or tiny keys takes up to four times as long as
a valid one.

    uvicorn server:app --no-access-log
"""

import gc
import os
import re
import signal
import sys
import time
from typing import Annotated, Literal

import orjson
from anyio import BrokenWorkerProcess, CapacityLimiter, to_process, to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

MAX_BODY_MB = os.environ.get("MAX_BODY_MB", "64")
if not re.fullmatch("[0-9]{1,6}", MAX_BODY_MB):
    print(f"MAX_BODY_MB must be a number of MiB, not {MAX_BODY_MB!r}", file=sys.stderr)
    sys.exit(3)  # uvicorn and gunicorn give up; after another status they try again
INLINE_BYTES = 64 * 1024  # up to here parsing is quicker than handing it to a worker
MAX_WAITING = 8

limiter = CapacityLimiter(max(1, (os.cpu_count() or 1) - 1))  # leaves the loop a core
gc.set_threshold(50_000, 20, 100)  # by default it walks a growing document too often

Int64 = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]


class Payload(BaseModel):
    name: str = Field(max_length=200)
    # Without fail_fast a million bad values are a million errors, and take a minute.
    data: dict[str, Int64] = Field(fail_fast=True)


class Answer(BaseModel):
    name: str
    count: int
    maxval: int


app = FastAPI(max_body_size=int(MAX_BODY_MB) * 2**20, responses={413: {}})


@app.exception_handler(RequestValidationError)
@app.exception_handler(HTTPException)
@app.exception_handler(ClientDisconnect)
async def refuse(request: Request, exc: Exception) -> Response:
    """Answer as FastAPI does, but without the input, and let go of it."""
    exc.__cause__ = exc.__context__ = None  # else their tracebacks keep the body alive
    if isinstance(exc, RequestValidationError):
        detail = [{key: e[key] for key in ("type", "loc", "msg")} for e in exc.errors()]
        for error in detail:  # `loc` may have a key of the input
            error["loc"] = [p[:100] if isinstance(p, str) else p for p in error["loc"]]
        return JSONResponse({"detail": detail}, 422)
    if isinstance(exc, HTTPException):
        return await http_exception_handler(request, exc)
    return Response(status_code=400)  # nobody is there to read it


@app.post("/ping")
async def ping(payload: Payload) -> Answer:
    maxval = max(payload.data.values(), default=0)
    return Answer(name=payload.name, count=len(payload.data), maxval=maxval)


def digest(chunks: list[bytes]) -> tuple[Answer, dict[str, float]]:
    """All that /pong does with a body: the answer, and the seconds that each stage took."""
    begun = time.perf_counter()
    try:
        document = orjson.loads(b"".join(chunks))
    except orjson.JSONDecodeError as exc:
        error = {"type": "json_invalid", "loc": ("body", exc.pos), "msg": exc.msg}
        raise RequestValidationError([error]) from None
    parsed = time.perf_counter()
    count = maxval = 0
    data = document.get("data") if isinstance(document, dict) else None
    if isinstance(data, dict):
        # pydantic would copy all of `data`, so it gets the first wrong entry at most.
        count, document["data"] = len(data), {}
        only_integers = set(map(type, data.values())) <= {int}
        if only_integers:
            maxval = max(data.values(), default=0)
        if not only_integers or maxval >= 2**63:  # orjson reads them up to 2**64 - 1
            items = data.items()
            wrong = ((k, v) for k, v in items if type(v) is not int or v >= 2**63)
            document["data"] = dict([next(wrong)])
    try:
        name = Payload.model_validate(document).name
    except ValidationError as exc:
        found = exc.errors(include_input=False)
        errors = [{**error, "loc": ("body", *error["loc"])} for error in found]
        raise RequestValidationError(errors) from None
    answer = Answer(name=name, count=count, maxval=maxval)
    return answer, {"parse": parsed - begun, "validate": time.perf_counter() - parsed}


def digest_in_process(chunks: list[bytes]) -> tuple[Answer, dict[str, float]]:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server to handle
    return digest(chunks)


BODY = {"application/json": {"schema": Payload.model_json_schema()}}


@app.post(
    "/pong",
    response_model=Answer,
    responses={415: {}, 503: {}},
    openapi_extra={"requestBody": {"required": True, "content": BODY}},
)
async def pong(
    request: Request, offload: Literal["no", "thread", "process"] = "no"
) -> Response:
    begun = time.perf_counter()
    media_type = request.headers.get("Content-Type", "").partition(";")[0].strip()
    if not re.fullmatch(r"(?i)application/([^/]+\+)?json", media_type):
        raise HTTPException(415, "Content-Type must be application/json")
    chunks = [chunk async for chunk in request.stream()]
    read_s = time.perf_counter() - begun
    if sum(map(len, chunks)) <= INLINE_BYTES:
        offload = "no"
    if offload != "no" and limiter.statistics().tasks_waiting >= MAX_WAITING:
        raise HTTPException(503, "Too many bodies are queued", {"Retry-After": "1"})
    if offload == "no":
        answer, stages_s = digest(chunks)
    else:
        async with limiter:
            if offload == "thread":
                work = to_thread.run_sync(digest, chunks)
            else:
                work = to_process.run_sync(digest_in_process, chunks)
            try:
                answer, stages_s = await work
            except BrokenWorkerProcess:
                raise HTTPException(503, "The worker process died") from None
    stages_s = {"read": read_s, **stages_s, "total": time.perf_counter() - begun}
    timing = ", ".join(f"{stage};dur={1000 * s:.1f}" for stage, s in stages_s.items())
    headers = {"Content-Type": "application/json", "Server-Timing": timing}
    return Response(answer.model_dump_json(), headers=headers)
