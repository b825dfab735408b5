"""What one invalid body costs: a stock FastAPI endpoint against server.py.

    python tests/invalid.py [MEGABYTES]

Posts a valid body and one whose values are all floats, of 25 MB each if not said otherwise,
to a fresh server each. Prints a Markdown table: seconds to the answer, size of the answer
in bytes, and the peak memory of the server in MB (Linux).
"""

import sys
import time
from pathlib import Path

import httpx
from harness import free_port, serve

SERVERS = {
    "/stock": "uvicorn stock:app --app-dir tests --no-access-log",
    "/ping": "uvicorn server:app --no-access-log",
    "/pong": "uvicorn server:app --no-access-log",
}


def make(value: str, size_bytes: int) -> bytes:
    entry = f'"k0000000":{value},'
    entries = (f'"k{i:07}":{value}' for i in range(size_bytes // len(entry)))
    return f'{{"name":"a","data":{{{",".join(entries)}}}}}'.encode()


def peak_mb(pid: int) -> str:
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return "-"
    return f"{int(status.read_text().split('VmHWM:')[1].split()[0]) * 1024 / 1e6:.1f}"


def main(size_bytes: int) -> None:
    print("| endpoint | body | status | seconds | answer, bytes | peak memory, MB |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for path, command in SERVERS.items():
        for name, value in {"valid": "15", "all floats": "1.5"}.items():
            port, body = free_port(), make(value, size_bytes)
            with serve(f"{command} --port {port}", port) as server:
                headers = {"Content-Type": "application/json"}
                begun = time.perf_counter()
                answer = httpx.post(
                    server.url + path, content=body, headers=headers, timeout=600
                )
                time_s = time.perf_counter() - begun
                memory = peak_mb(server.process.pid)
            cells = [path, name, str(answer.status_code), f"{time_s:.1f}"]
            cells += [str(len(answer.content)), memory]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(int(1e6 * float(sys.argv[1] if sys.argv[1:] else 25)))
