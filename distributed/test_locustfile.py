"""locustfile.py: the same two streams, from a master and two workers."""

import csv
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent / "tests"))
import harness as h
import measure as m
from stub import STALL_S

DURATION_S = 5
LOCUST = [sys.executable, "-m", "locust", "-f", str(FOLDER / "locustfile.py")]


def swarm(folder: Path, url: str, *flags: str) -> dict[str, dict[str, str]]:
    """The rows of Locust's CSV by name, after a headless run with two workers."""
    folder.mkdir()
    port, log = h.free_port(), folder / "log"
    master = [*LOCUST, "--headless", "--master", f"--master-bind-port={port}"]
    master += ["--expect-workers=2", "-u2", "-r2", f"-t{DURATION_S}", "-s30"]
    master += [f"--csv={folder}/run", f"--host={url}", *flags]
    worker = [*LOCUST, "--worker", f"--master-port={port}"]
    with (
        log.open("ab") as file,
        h.started(worker, file.fileno(), file.fileno(), cwd=folder),
        h.started(worker, file.fileno(), file.fileno(), cwd=folder),
        h.started(master, file.fileno(), subprocess.STDOUT, cwd=folder) as process,
    ):
        assert process.wait(60) in (0, 1), log.read_text()[-2000:]
    with (folder / "run_stats.csv").open() as rows:
        return {row["Name"]: row for row in csv.DictReader(rows)}


def test_locust(tmp_path: Path) -> None:
    """A stall counts for all whom it delayed, as in client.py; own requests with a token succeed."""
    (tmp_path / "body").write_text('{"records": [{"id": 1, "tags": ["a"]}]}')
    own = ["--small=GET /health", f"--large=POST /documents @{tmp_path}/body"]
    own += ["--header=Authorization: Bearer a-secret", "--pause=1"]
    own_api = "uvicorn own_api:app --app-dir tests --port {port}"
    tiny = "--large-mb=0.01"
    flags = f"--endpoint /a --idle 0 --duration {DURATION_S} {tiny} --pause 99"
    with h.serve(f"{m.RAW_STUB} periodic") as stub, h.serve(own_api) as api:
        jobs = {
            "demo": (swarm, tmp_path / "demo", stub.url, tiny, "--pause=99"),
            "own": (swarm, tmp_path / "own", api.url, *own),
            "client": (m.measure, stub.url, flags),
        }
        demo, own_rows, client = m.together(jobs).values()
    p95_ms = float(demo["small"]["95%"])
    assert abs(p95_ms - client.statistics("small")["p95"]) < 0.2 * p95_ms
    assert p95_ms > 1000 * STALL_S / 2
    assert int(demo["small"]["Request Count"]) > 0.6 * DURATION_S * 50
    failures = [own_rows[name]["Failure Count"] for name in ("small", "large")]
    assert failures == ["0", "0"]
    assert int(own_rows["large"]["Request Count"]) > 2
