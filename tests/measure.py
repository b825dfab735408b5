"""Run client.py and read what it left: the dicts, the table, the samples."""

import ast
import json
import re
import shlex
import sys
import tempfile
import time
from collections import Counter, UserDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE
from typing import Any, NamedTuple

import httpx
from harness import ROOT, started

CLASSES = ("idle", "small", "during", "large")
COLUMNS = ("min", "median", "mean", "p90", "p95", "p99", "max")
NEEDED = {"p90": 10, "p95": 20, "p99": 100}  # samples
SAMPLE = ("kind", "due_s", "sent_s", "done_s", "error", "stages_ms")
SHORT = "--idle 0.5 --duration 1 --large-mb 0.1 --pause 0.2"
CLIENT = [sys.executable, str(ROOT / "client.py")]
TESTS = shlex.quote(str(ROOT / "tests"))
STUB = f"uvicorn stub:app --app-dir {TESTS} --port {{port}}"
RAW_STUB = f"python {TESTS}/stub.py {{port}}"
GUNICORN = f"gunicorn -k uvicorn_worker.UvicornWorker --chdir {TESTS} stub:app"
GUNICORN += " -b 127.0.0.1:{port}"

Row = dict[str, Any]


def reports(stdout: str) -> dict[str, dict[str, Row]]:
    """The dicts on stdout by heading."""
    found = re.findall(r"^# (.+)\n(\{\n(?: .*\n)+\})$", stdout, re.MULTILINE)
    return {heading: ast.literal_eval(text) for heading, text in found}


def table(stdout: str) -> list[list[str]]:
    """The cells of the Markdown table, without its titles and rule."""
    lines = [line for line in stdout.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    titles = "Request Server Endpoint Count Errors Min Median Mean p90 p95 p99 Max"
    assert cells[0] == titles.split() and set("".join(cells[1])) == set("-:")
    return cells[2:]


class Measured(NamedTuple):
    """A finished run of the client, with what it wrote to --json."""

    status: int
    stdout: str
    stderr: str
    saved: dict[str, Any]
    ended_s: float  # since 1970

    def samples(self, *kinds: str, run: int = 0) -> list[Row]:
        rows = self.saved["runs"][run]["samples"]
        return [dict(zip(SAMPLE, row)) for row in rows if row[0] in kinds]

    def statistics(self, kind: str) -> Any:
        return self.saved["runs"][0]["statistics"][kind]


def measure(url: str, flags: str, cwd: Path = ROOT, env: Row | None = None) -> Measured:
    """Run the client to its end."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "json"
        where = ["--base-url", url] if url else []
        command = [*CLIENT, "--json", str(file), *where, *shlex.split(flags)]
        with started(command, PIPE, PIPE, env, cwd) as process:
            stdout, stderr = map(bytes.decode, process.communicate(timeout=60))
        saved = json.loads(file.read_text()) if file.exists() else {}
    assert "Traceback" not in stderr, stderr
    return Measured(process.returncode, stdout, stderr, saved, time.time())


def seen_by(url: str, path: str) -> Counter[str]:
    """What a stub counted on a path."""
    return Counter(httpx.get(f"{url}/counts").json().get(path))


class Outcome(UserDict[str, Any]):
    """What came of each job; where one failed, so does the test that asks for it."""

    def __getitem__(self, name: str) -> Any:
        return self.data[name].result()


def together(jobs: Mapping[str, Sequence[Any]]) -> Outcome:
    """Do what mostly waits at the same time: functions with their arguments."""
    with ThreadPoolExecutor(8) as pool:
        return Outcome({name: pool.submit(*job) for name, job in jobs.items()})
