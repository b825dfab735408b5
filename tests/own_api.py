from anyio import CapacityLimiter, to_process
from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, Field, ValidationError

limiter = CapacityLimiter(1)  # worker processes, each with one body at a time
app = FastAPI(max_body_size=64 * 2**20)  # versions before 0.164 ignore it


class Record(BaseModel):
    id: int
    tags: list[str]


class Batch(BaseModel):
    records: list[Record] = Field(fail_fast=True)  # one error, not a million


async def check_token(request: Request) -> None:
    if request.headers.get("Authorization") != "Bearer a-secret":
        raise HTTPException(401, "wrong token")


@app.get("/health")
async def health() -> str:
    return "ok"


# Before: FastAPI parses in the event loop, then checks the token, then validates.
@app.post("/documents", status_code=201, dependencies=[Depends(check_token)])
async def documents(batch: Batch) -> int:
    return len(batch.records)


# After: the token is checked first, and large bodies are parsed in a worker process.
def count_records(body: bytes) -> int:
    try:
        batch = Batch.model_validate_json(body)
    except ValidationError as exc:
        detail = exc.errors(
            include_url=False, include_context=False, include_input=False
        )
        # Not detail=detail, as an exception's keyword arguments are lost in pickling.
        raise HTTPException(422, detail) from None
    return len(batch.records)  # a small result, not the models


@app.post("/fixed", status_code=201, dependencies=[Depends(check_token)])
async def fixed(request: Request) -> int:
    body = await request.body()
    if len(body) <= 64 * 1024:  # it need not queue behind large ones
        return count_records(body)
    async with limiter:  # limiter=limiter would pickle the bodies that wait
        return await to_process.run_sync(count_records, body)
