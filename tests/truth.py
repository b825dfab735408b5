"""What load generators report of a server whose percentiles follow from arithmetic.

    python tests/truth.py FOLDER

The stub freezes for 0.4 s of every 1.5 s, whoever calls. For requests spread evenly in time
P(latency > x) = (0.4 - x) / 1.5, so p90 = 250 ms, p95 = 325 ms, p99 = 385 ms, max = 400 ms.
Each tool sends 50 requests per second for 20 s, as it is commonly called (wrk cannot pace).
Prints a Markdown table, and writes what each tool printed to FOLDER. A tool that is not
installed is left out: hey and wrk (Debian), locust (PyPI), autocannon (npm).
"""

import ast
import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from harness import ENV, ROOT, free_port, serve

LOCUSTFILE = """
from locust import HttpUser, constant_throughput, task

class User(HttpUser):
    wait_time = constant_throughput(1)

    @task
    def get(self):
        self.client.get("/")
"""
Row = list[float | None]  # p90, p95, p99, max in ms


def from_client(output: str) -> Row:
    row = ast.literal_eval(output[output.index("{") : output.index("\n}") + 2])["small"]
    return [row["p90"], row["p95"], row["p99"], row["max"]]


def from_hey(output: str) -> Row:
    found = dict(re.findall(r"(\d+)%+ in (\S+) secs", output))
    slowest = re.findall(r"Slowest:\s+(\S+) secs", output)[0]
    return [
        1000 * float(value)
        for value in (found["90"], found["95"], found["99"], slowest)
    ]


def from_wrk(output: str) -> Row:
    unit_ms = {"us": 0.001, "ms": 1, "s": 1000}
    pattern = r"([\d.]+)(us|ms|s)\b"
    found = dict(re.findall(r"(\d+)%\s+(\S+)", output))
    worst = re.findall(r"Latency\s+\S+\s+\S+\s+(\S+)", output)[0]
    values = [
        re.findall(pattern, text)[0] for text in (found["90"], found["99"], worst)
    ]
    p90, p99, slowest = [float(number) * unit_ms[unit] for number, unit in values]
    return [p90, None, p99, slowest]


def from_autocannon(output: str) -> Row:
    latency_ms = json.loads(output)["latency"]
    return [latency_ms["p90"], None, latency_ms["p99"], latency_ms["max"]]


def from_locust(output: str) -> Row:
    rows = {row["Name"]: row for row in csv.DictReader(output.splitlines())}
    row = rows.get("small", rows["Aggregated"])
    return [float(row[name]) for name in ("90%", "95%", "99%", "100%")]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as temporary:
        locustfile = Path(temporary) / "locustfile.py"
        locustfile.write_text(LOCUSTFILE)
        stats = f"{temporary}/stats"
        locust = f"locust --headless -t 20s -H {url} --csv {stats}"
        open_loop = "distributed/locustfile.py -u 2 -r 2 --endpoint /"
        never = "--large-mb 0.01 --pause 100"
        quick = f"--endpoint / --duration 20 --idle 0 {never}"
        tools: dict[str, tuple[str, Callable[[str], Row]]] = {
            "hey, 1 connection at 50/s": (f"hey -c 1 -q 50 -z 20s {url}", from_hey),
            "hey, 50 connections at 1/s": (f"hey -c 50 -q 1 -z 20s {url}", from_hey),
            "Locust, 50 users, `constant_throughput(1)`": (
                f"{locust} -f {locustfile} -u 50 -r 50",
                from_locust,
            ),
            "autocannon, 1 connection at 50/s": (
                f"autocannon -j -c 1 -R 50 -d 20 {url}",
                from_autocannon,
            ),
            "autocannon, 50 connections at 50/s": (
                f"autocannon -j -c 50 -R 50 -d 20 {url}",
                from_autocannon,
            ),
            "wrk, unpaced, 1 connection": (
                f"wrk -t 1 -c 1 -d 20s --latency {url}",
                from_wrk,
            ),
            "Locust, `distributed/locustfile.py`": (
                f"{locust} -f {open_loop} {never}",
                from_locust,
            ),
            "`client.py`": (
                f"{sys.executable} client.py --base-url {url} {quick}",
                from_client,
            ),
        }
        print("| tool | p90 | p95 | p99 | max |\n| --- | ---: | ---: | ---: | ---: |")
        print("| **truth** | 250.0 | 325.0 | 385.0 | 400.0 |")
        stub = f"uvicorn stub:app --app-dir tests --port {port} --no-access-log"
        with serve(stub, port, {"STALL": "periodic"}):
            for name, (command, parse) in tools.items():
                if not shutil.which(command.split()[0], path=ENV["PATH"]):
                    continue
                done = subprocess.run(
                    command.split(),
                    cwd=ROOT,
                    env=ENV,
                    capture_output=True,
                    text=True,
                    check=True,
                )
                output = done.stdout
                if "locust" in command.split()[0]:
                    output = Path(stats + "_stats.csv").read_text()
                label = re.sub(r"\W+", "_", name.lower()).strip("_")
                (folder / f"{label}.txt").write_text(output)
                cells = ["-" if ms is None else f"{ms:.1f}" for ms in parse(output)]
                print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
