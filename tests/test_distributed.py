"""distributed/locustfile.py: the same two streams, from a master and two workers."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
from harness import ENV, ROOT, free_port, serve, stop
from test_client import GUNICORN, STUB
from test_instrument import TRUTH_MS, WHOLE_CYCLES, measure

DURATION_S, RATE_HZ = 10, 50


def swarm(folder: Path, url: str, *flags: str) -> dict[str, dict[str, str]]:
    """The rows of Locust's CSV by name, after a headless run with two workers."""
    port = free_port()
    locust = [sys.executable, "-m", "locust", "-f", "distributed/locustfile.py"]
    master = [*locust, "--headless", "--master", f"--master-bind-port={port}"]
    master += ["--expect-workers=2", "-u2", "-r2", f"-t{DURATION_S}", "-s30"]
    master += [f"--csv={folder}/run", f"--host={url}", *flags]
    worker = [*locust, "--worker", f"--master-port={port}"]
    log = folder / "log"
    processes = []
    try:
        for command in (master, worker, worker):
            with log.open("ab") as file:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=ENV,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            processes.append(process)
        assert processes[0].wait(90) in (0, 1), log.read_text()[-2000:]
    finally:
        for process in processes:
            stop(process)
    with (folder / "run_stats.csv").open() as file:
        return {row["Name"]: row for row in csv.DictReader(file)}


def test_both_streams(tmp_path: Path) -> None:
    """Against gunicorn, both streams are reported, and all their answers were right."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    command = f"gunicorn -w 2 -k uvicorn_worker.UvicornWorker server:app -b {address}"
    with serve(command, port) as server:
        flags = ["--endpoint=/pong", "--pause=1", "--large-mb=5"]
        rows = swarm(tmp_path, server.url, *flags)
    small, large = rows["small"], rows["large"]
    assert {row["Failure Count"] for row in rows.values()} == {"0"}
    assert int(small["Request Count"]) > 0.6 * DURATION_S * RATE_HZ
    assert int(large["Request Count"]) > 1


def test_failures(tmp_path: Path) -> None:
    """A wrong answer is a failure, and the report says so."""
    port = free_port()
    with serve(f"{GUNICORN} 127.0.0.1:{port}", port) as server:
        rows = swarm(tmp_path, server.url, "--endpoint=/wrong", "--large-mb=0.1")
    for row in (rows["small"], rows["large"]):
        assert row["Failure Count"] == row["Request Count"] != "0"
    with (tmp_path / "run_failures.csv").open() as file:
        assert all("wrong answer" in row["Error"] for row in csv.DictReader(file))


def test_counts_stalls_as_the_client_does(tmp_path: Path) -> None:
    """A stall counts for all whom it delayed: the p95 is that of client.py within 25 %."""
    port = free_port()
    with serve(f"{STUB} {port}", port, {"STALL": "periodic"}) as server:
        found = measure(tmp_path, server.url, f"--endpoint /client {WHOLE_CYCLES}")
        rows = swarm(tmp_path, server.url, "--large-mb=0.01", "--pause=99")
    p95_ms = np.array([found.printed()["small"]["p95"], float(rows["small"]["95%"])])
    assert abs(p95_ms[1] - p95_ms[0]) <= 0.25 * p95_ms[0], p95_ms
    assert abs(p95_ms - TRUTH_MS[1]).max() <= 0.25 * TRUTH_MS[1], p95_ms
