"""/pong with or without a thread, with or without a limiter: which of them helps?

uvicorn limiter:app --app-dir results
"""

import contextlib
import sys
from pathlib import Path

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from server import INLINE_BYTES, Answer, digest

app = FastAPI()
limiter = CapacityLimiter(1)


@app.post("/parse")
async def parse(request: Request, thread: bool, limited: bool) -> Answer:
    chunks = [chunk async for chunk in request.stream()]
    if sum(map(len, chunks)) <= INLINE_BYTES:
        return digest(chunks)[0]
    async with limiter if limited else contextlib.nullcontext():
        if thread:
            return (await to_thread.run_sync(digest, chunks))[0]
        return digest(chunks)[0]
