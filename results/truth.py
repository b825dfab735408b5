"""What load generators report of a server whose percentiles follow from arithmetic.

    python results/truth.py FOLDER   (in the folder of the project)

tests/stub.py freezes for 0.4 s of every 1.5 s, whoever calls. For requests spread evenly in
time P(latency > x) = (0.4 - x) / 1.5, so p90 = 250 ms, p95 = 325 ms, p99 = 385 ms, max =
400 ms. Each tool sends 50 requests per second for 15 s, as it is commonly called (wrk cannot
pace). A tool that is not installed is left out: hey and wrk (Debian), locust (PyPI),
autocannon (npm). What each printed goes to FOLDER, and a Markdown table to stdout; its last
row is the stub's own log of the requests of client.py.
"""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
ENV = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
URL = "http://127.0.0.1:8766"
DURATION_S = 15  # ten periods of the stub
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
    row = json.loads(output)["runs"][0]["statistics"]["small"]
    return [row["p90"], row["p95"], row["p99"], row["max"]]


def from_hey(output: str) -> Row:
    found = dict(re.findall(r"(\d+)%+ in (\S+) secs", output))
    found["max"] = re.findall(r"Slowest:\s+(\S+) secs", output)[0]
    return [1000 * float(found[name]) for name in ("90", "95", "99", "max")]


def from_wrk(output: str) -> Row:
    unit_ms = {"us": 0.001, "ms": 1, "s": 1000}
    found = dict(re.findall(r"(\d+)%\s+(\S+)", output))
    found["max"] = re.findall(r"Latency\s+\S+\s+\S+\s+(\S+)", output)[0]
    values = {
        name: float(number) * unit_ms[unit]
        for name, text in found.items()
        for number, unit in re.findall(r"([\d.]+)(us|ms|s)", text)
    }
    return [values["90"], None, values["99"], values["max"]]


def from_autocannon(output: str) -> Row:
    latency_ms = json.loads(output)["latency"]
    return [latency_ms["p90"], None, latency_ms["p99"], latency_ms["max"]]


def from_locust(output: str) -> Row:
    rows = {row["Name"]: row for row in csv.DictReader(output.splitlines())}
    row = rows.get("small", rows["Aggregated"])
    return [float(row[name]) for name in ("90%", "95%", "99%", "100%")]


def from_log(folder: Path) -> Row:
    """Latencies by the stub's log: its clock is set by the quickest answer."""
    samples = json.loads((folder / "client_py.txt").read_text())["runs"][0]["samples"]
    done_s, due_s = np.array(
        sorted((row[3], row[1]) for row in samples if row[0] == "small")
    ).T
    left_s = np.array(json.loads((folder / "left.txt").read_text())[-len(done_s) :])
    true_ms = 1000 * (left_s + (done_s - left_s).min() - due_s)
    return [float(np.percentile(true_ms, q)) for q in (90, 95, 99, 100)]


LOCUST = f"locust --headless -t {DURATION_S}s -H {URL} --csv FOLDER/stats -f"
NEVER = "--large-mb 0.01 --pause 100"
CLIENT = f"python client.py --base-url {URL} --duration {DURATION_S} --idle 0 {NEVER}"
TOOLS: dict[str, tuple[str, Callable[[str], Row]]] = {
    "hey, 1 connection at 50/s": (f"hey -c 1 -q 50 -z {DURATION_S}s {URL}", from_hey),
    "hey, 50 connections at 1/s": (f"hey -c 50 -q 1 -z {DURATION_S}s {URL}", from_hey),
    "Locust, 50 users, `constant_throughput(1)`": (
        f"{LOCUST} FOLDER/locustfile.py -u 50 -r 50",
        from_locust,
    ),
    "autocannon, 1 connection at 50/s": (
        f"autocannon -j -c 1 -R 50 -d {DURATION_S} {URL}",
        from_autocannon,
    ),
    "autocannon, 50 connections at 50/s": (
        f"autocannon -j -c 50 -R 50 -d {DURATION_S} {URL}",
        from_autocannon,
    ),
    "wrk, unpaced, 1 connection": (
        f"wrk -t 1 -c 1 -d {DURATION_S}s --latency {URL}",
        from_wrk,
    ),
    "Locust, `distributed/locustfile.py`": (
        f"{LOCUST} distributed/locustfile.py -u 2 -r 2 --endpoint / {NEVER}",
        from_locust,
    ),
    "`client.py`": (f"{CLIENT} --endpoint / --json FOLDER/json", from_client),
}


def rows(folder: Path) -> dict[str, Row]:
    """What each tool printed, between the two truths."""
    found: dict[str, Row] = {"**arithmetic**": [250.0, 325.0, 385.0, 400.0]}
    for name, (_, parse) in TOOLS.items():
        if (file := folder / f"{label(name)}.txt").exists():
            found[name] = parse(file.read_text())
    return found | {"the stub's own log of these": from_log(folder)}


def table(folder: Path) -> str:
    lines = ["| tool | p90 | p95 | p99 | max |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, row in rows(folder).items():
        cells = ["-" if ms is None else f"{ms:.1f}" for ms in row]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "".join(line + "\n" for line in lines)


def label(name: str) -> str:
    return re.sub(r"\W+", "_", name.lower()).strip("_")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "locustfile.py").write_text(LOCUSTFILE)
    stub = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "stub.py", "8766", "periodic"]
    )
    try:
        time.sleep(2)
        for name, (command, _) in TOOLS.items():
            words = command.replace("FOLDER", str(folder)).split()
            if not shutil.which(words[0], path=ENV["PATH"]):
                continue
            print(" ".join(words), file=sys.stderr)
            done = subprocess.run(
                words, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True, check=False
            )
            output = done.stdout
            if words[0] == "locust":
                output = (folder / "stats_stats.csv").read_text()
            elif words[0] == "python":
                output = (folder / "json").read_text()
                log = httpx.get(f"{URL}/left", timeout=60).text
                (folder / "left.txt").write_text(log)
            (folder / f"{label(name)}.txt").write_text(output)
    finally:
        stub.terminate()
        stub.wait()
    for extra in (*folder.glob("stats_*"), folder / "json", folder / "locustfile.py"):
        extra.unlink(missing_ok=True)
    print(table(folder), end="")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
