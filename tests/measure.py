"""Run client.py and read what it left: the dicts, the table, the samples."""

import ast
import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
from harness import ROOT, Run, run_client

CLASSES = ("idle", "small", "during", "large")
COLUMNS = ("min", "median", "mean", "p90", "p95", "p99", "max")
NAMES = ("count", *COLUMNS, "errors")
SAMPLE = ("kind", "due_s", "sent_s", "done_s", "error", "stages_ms")
SHORT = "--idle 0.5 --duration 1 --large-mb 0.1 --pause 0.2"
STUB = f"uvicorn stub:app --app-dir {shlex.quote(str(ROOT / 'tests'))} --port {{port}}"
RAW_STUB = f"python {shlex.quote(str(ROOT / 'tests' / 'stub.py'))} {{port}}"

GUNICORN = "gunicorn -k uvicorn_worker.UvicornWorker --chdir tests stub:app"
GUNICORN += " -b 127.0.0.1:{port}"

Row = dict[str, Any]


def reports(stdout: str) -> dict[str, dict[str, Row]]:
    """The dicts on stdout by heading."""
    found = re.findall(r"^# (.+)\n(\{\n(?: .*\n)+\})$", stdout, re.MULTILINE)
    return {heading: ast.literal_eval(text) for heading, text in found}


def table(stdout: str) -> list[list[str]]:
    """The cells of the Markdown table, without its titles and rule."""
    lines = [line for line in stdout.splitlines() if line.startswith("|")]
    cells = [line.strip("| ").split(" | ") for line in lines]
    titles = "Request Server Endpoint Count Errors Min Median Mean p90 p95 p99 Max"
    assert cells[0] == titles.split()
    assert set("".join(cells[1])) == set("-:")
    return cells[2:]


@dataclass
class Measured:
    """A finished run of the client with --json."""

    run: Run
    saved: dict[str, Any] = field(default_factory=dict)

    def samples(self, *kinds: str, run: int = 0) -> list[dict[str, Any]]:
        rows = self.saved["runs"][run]["samples"]
        return [dict(zip(SAMPLE, row)) for row in rows if row[0] in kinds]

    def statistics(self, run: int = 0) -> dict[str, Row]:
        statistics: dict[str, Row] = self.saved["runs"][run]["statistics"]
        return statistics


def measure(
    folder: Path, url: str, flags: str, meanwhile: Callable[[], None] | None = None
) -> Measured:
    """Run the client to its end, as something else happens."""
    file = folder / "json"
    arguments = ["--base-url", url, "--json", str(file), *shlex.split(flags)]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run_client, *arguments)
        if meanwhile:
            meanwhile()
        run = future.result()
    assert run.status in (0, 1, 3) and "Traceback" not in run.stderr, run.stderr
    return Measured(run, json.loads(file.read_text()))


def latencies_ms(samples: Iterable[dict[str, Any]]) -> list[float]:
    """Of those that succeeded, from when they were due."""
    return [1000 * (s["done_s"] - s["due_s"]) for s in samples if not s["error"]]


def seen_by(url: str, path: str) -> Row:
    """What a stub counted on a path."""
    counts: Row = httpx.get(f"{url}/counts").json().get(path) or {}
    return counts


T = TypeVar("T")


def together(jobs: Mapping[str, Callable[[], T]]) -> dict[str, T]:
    """Do what mostly waits at the same time."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        return {name: future.result() for name, future in futures.items()}
