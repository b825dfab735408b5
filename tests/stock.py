"""What everybody writes: the measure of what server.py adds to it."""

from fastapi import FastAPI
from pydantic import BaseModel

app = FastAPI()


class Stock(BaseModel):
    name: str
    data: dict[str, int]


class Answer(BaseModel):
    name: str
    count: int
    maxval: int


def answer(payload: Stock) -> Answer:
    maxval = max(payload.data.values(), default=0)
    return Answer(name=payload.name, count=len(payload.data), maxval=maxval)


@app.post("/stock")
async def stock(payload: Stock) -> Answer:
    return answer(payload)


@app.post("/stock_def")
def stock_def(payload: Stock) -> Answer:
    return answer(payload)
