"""Other ways to take a large body, to measure what they cost; see README.md here.

uvicorn variants:app --app-dir results
"""

import asyncio
import sys
from pathlib import Path

import ijson  # type: ignore[import-untyped]  # it has no annotations
from anyio import to_process, to_thread
from fastapi import FastAPI, Request
from pydantic import BaseModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from own_api import Batch, count_records, limiter

SLICE_BYTES = 64 * 1024

app = FastAPI()


class Payload(BaseModel):
    name: str
    data: dict[str, int]


class Answer(BaseModel):
    name: str
    count: int
    maxval: int


def answer(payload: Payload) -> Answer:
    maxval = max(payload.data.values(), default=0)
    return Answer(name=payload.name, count=len(payload.data), maxval=maxval)


@app.post("/stock")
async def stock(payload: Payload) -> Answer:
    return answer(payload)


@app.post("/stock_def")
def stock_def(payload: Payload) -> Answer:
    return answer(payload)


@app.post("/ijson")
async def by_ijson(request: Request) -> Answer:
    """A parser that is fed a slice per turn of the event loop."""
    name, count, maxval = "", 0, 0
    events = ijson.sendable_list()
    parser = ijson.parse_coro(events)
    async for chunk in request.stream():
        for start in range(0, len(chunk), SLICE_BYTES):
            parser.send(chunk[start : start + SLICE_BYTES])
            for prefix, event, value in events:
                if prefix == "name":
                    name = value
                elif event == "number":
                    count, maxval = count + 1, max(maxval, value)
            events.clear()
            await asyncio.sleep(0)
    parser.close()
    return Answer(name=name, count=count, maxval=maxval)


@app.get("/health")
async def health() -> str:
    return "ok"


@app.post("/documents")
async def documents(batch: Batch) -> int:
    return len(batch.records)


@app.post("/thread")
async def in_a_thread(request: Request) -> int:
    return await to_thread.run_sync(count_records, await request.body())


@app.post("/small_result")
async def small_result(request: Request) -> int:
    return await to_process.run_sync(
        count_records, await request.body(), limiter=limiter
    )


@app.post("/models")
async def models(request: Request) -> int:
    """The process hands all models back, where a small result would do."""
    validate = Batch.model_validate_json
    batch = await to_process.run_sync(validate, await request.body(), limiter=limiter)
    return len(batch.records)
