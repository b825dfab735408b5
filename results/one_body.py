"""One 25 MB body to a fresh server: how long it takes, and how long it freezes the others.

    python results/one_body.py

Meanwhile GET /openapi.json is sent again and again, each 10 ms after the last answer.
Prints a Markdown table.
"""

import json
import sys
import threading
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import client

URL = "http://127.0.0.1:8765"
VALID = client.make_body("large", 25_000_000).content
FLOATS = VALID.replace(b",", b".5,").replace(b'".5,', b'",', 1).replace(b"}}", b".5}}")
RECORDS = [{"id": i, "tags": ["red", "green", f"t{i}"]} for i in range(400_000)]
NESTED = json.dumps({"records": RECORDS}).encode()  # 21 MB
CASES = [
    ("variants:app --app-dir results", "/stock", "valid", VALID),
    ("variants:app --app-dir results", "/stock", "all floats", FLOATS),
    ("server:app", "/ping", "valid", VALID),
    ("server:app", "/ping", "all floats", FLOATS),
    ("server:app", "/pong", "valid", VALID),
    ("server:app", "/pong", "all floats", FLOATS),
    ("own_api:app --app-dir tests", "/documents", "valid, no token", NESTED),
    ("own_api:app --app-dir tests", "/fixed", "valid, no token", NESTED),
]


def send(path: str, body: bytes) -> tuple[httpx.Response, float, float]:
    """The answer, its seconds, and the longest that another request waited."""
    over = threading.Event()
    waits_s: list[float] = []

    def probe() -> None:
        while not over.is_set():
            response = httpx.get(f"{URL}/openapi.json", timeout=600)
            waits_s.append(response.elapsed.total_seconds())
            time.sleep(0.01)

    prober = threading.Thread(target=probe)
    prober.start()
    time.sleep(0.5)
    headers = {"Content-Type": "application/json"}
    begun_s = time.perf_counter()
    try:
        response = httpx.post(URL + path, content=body, headers=headers, timeout=600)
    finally:
        seconds = time.perf_counter() - begun_s
        over.set()
        prober.join()
    return response, seconds, max(waits_s)


def main() -> None:
    print("| app | endpoint | body | status | seconds ", end="")
    print("| longest wait of another, s | answer, bytes |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
    for app, path, kind, body in CASES:
        command = f"uvicorn {app} --port 8765 --no-access-log"
        with client.server_at(httpx.URL(URL), command, False) as _:
            while True:
                try:
                    httpx.get(f"{URL}/openapi.json")
                    break
                except httpx.TransportError:
                    time.sleep(0.1)
            response, seconds, wait_s = send(path, body)
        cells = [app.split()[0], path, kind, response.status_code, f"{seconds:.2f}"]
        cells += [f"{wait_s:.2f}", len(response.content)]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
