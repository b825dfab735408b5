"""What everybody writes: the measure of what server.py adds to it."""

from fastapi import FastAPI
from pydantic import BaseModel

app = FastAPI()


class Stock(BaseModel):
    name: str
    data: dict[str, int]


@app.post("/stock")
async def stock(payload: Stock) -> dict[str, int]:
    return {"count": len(payload.data)}
