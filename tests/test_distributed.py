"""distributed/locustfile.py: the same two streams, from a master and two workers."""

import csv
import subprocess
import sys
from pathlib import Path

from harness import ROOT, free_port, serve, started
from measure import RAW_STUB, measure, together
from stub import PERIOD_S, STALL_S

DURATION_S = 6


def swarm(folder: Path, url: str, *flags: str) -> dict[str, dict[str, str]]:
    """The rows of Locust's CSV by name, after a headless run with two workers."""
    port = free_port()
    locust = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        str(ROOT / "distributed/locustfile.py"),
    ]
    master = [*locust, "--headless", "--master", f"--master-bind-port={port}"]
    master += ["--expect-workers=2", "-u2", "-r2", f"-t{DURATION_S}", "-s30"]
    master += [f"--csv={folder}/run", f"--host={url}", *flags]
    worker = [*locust, "--worker", f"--master-port={port}"]
    log = folder / "log"
    with (
        log.open("ab") as file,
        started(worker, file.fileno(), file.fileno(), cwd=folder),
        started(worker, file.fileno(), file.fileno(), cwd=folder),
        started(master, file.fileno(), subprocess.STDOUT, cwd=folder) as process,
    ):
        assert process.wait(60) in (0, 1), log.read_text()[-2000:]
    with (folder / "run_stats.csv").open() as file_:
        return {row["Name"]: row for row in csv.DictReader(file_)}


def test_locust(tmp_path: Path) -> None:
    """A stall counts for all whom it delayed, as in client.py; own requests with a token succeed."""
    (tmp_path / "body").write_text('{"records": [{"id": 1, "tags": ["a"]}]}')
    for name in ("client", "demo", "own"):
        (tmp_path / name).mkdir()
    tiny = ("--large-mb=0.01", "--pause=99")
    own = ["--small=GET /health", f"--large=POST /documents @{tmp_path}/body"]
    own += ["--header=Authorization: Bearer a-secret", "--pause=1"]
    own_api = "uvicorn own_api:app --app-dir tests --port {port}"
    with serve(f"{RAW_STUB} periodic") as stub, serve(own_api) as api:
        flags = f"--endpoint /a --idle 0 --duration {4 * PERIOD_S} {' '.join(tiny)}"
        found = together(
            {
                "demo": lambda: swarm(tmp_path / "demo", stub.url, *tiny),
                "own": lambda: swarm(tmp_path / "own", api.url, *own),
                "client": lambda: {
                    "small": measure(
                        tmp_path / "client", stub.url, flags.replace("=", " ")
                    ).statistics()["small"]
                },
            }
        )
    p95_ms = float(found["demo"]["small"]["95%"])
    assert abs(p95_ms - found["client"]["small"]["p95"]) < 0.2 * p95_ms
    assert p95_ms > 1000 * STALL_S / 2
    assert int(found["demo"]["small"]["Request Count"]) > 0.6 * DURATION_S * 50
    for name in ("small", "large"):
        assert found["own"][name]["Failure Count"] == "0"
    assert int(found["own"]["large"]["Request Count"]) > 2
