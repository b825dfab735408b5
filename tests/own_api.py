from anyio import CapacityLimiter, to_process
from fastapi import Depends, FastAPI, HTTPException, Request
from pydantic import BaseModel, ValidationError

limiter = CapacityLimiter(1)  # worker processes, each with one body at a time
app = FastAPI(max_body_size=64 * 2**20)


class Record(BaseModel):
    id: int
    tags: list[str]


class Batch(BaseModel):
    records: list[Record]


async def check_token(request: Request) -> None:
    if request.headers.get("Authorization") != "Bearer a-secret":
        raise HTTPException(401, "wrong token")


@app.get("/health")
async def health() -> str:
    return "well"


# Before: FastAPI parses and validates in the event loop, and checks the token after that.
@app.post("/documents", status_code=201, dependencies=[Depends(check_token)])
async def documents(batch: Batch) -> int:
    return len(batch.records)


# After: the token first, and the rest in a worker process.
def store(body: bytes) -> int:
    try:
        batch = Batch.model_validate_json(body)
    except ValidationError as exc:
        raise HTTPException(422, f"{exc.error_count()} errors") from None
    return len(batch.records)  # a small result, not the models


schema = {"application/json": {"schema": Batch.model_json_schema()}}


@app.post(
    "/fixed",
    status_code=201,
    openapi_extra={"requestBody": {"content": schema, "required": True}},
)
async def fixed(request: Request) -> int:
    await check_token(request)
    return await to_process.run_sync(store, await request.body(), limiter=limiter)
