"""Print every table of the two README.md that comes from a raw file.

python results/tables.py
"""

import json
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER)]
import truth

from client import Row, Sample, summarize_all

Key = tuple[str, str, int]  # server, endpoint, uploads at once

PATHS = ("/ping", "/pong", "/pong?offload=thread", "/pong?offload=process")


@cache
def load(file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{file}.json").read_text())
    return content


@cache
def cells(file: str) -> dict[Key, dict[str, Row]]:
    """Statistics by run, from the samples."""
    return {
        (short(run["server"]), run["endpoint"], run["uploads"]): summarize_all(
            [Sample(*row) for row in run["samples"]]
        )
        for run in load(file)["runs"]
    }


def only(file: str) -> dict[str, Row]:
    """The statistics of a file with one run."""
    (report,) = cells(file).values()
    return report


def short(server: str) -> str:
    return server.replace(" server:app", "").replace(" --no-access-log", "")


def ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def markdown(titles: str, rows: Iterable[Iterable[Any]], texts: int) -> str:
    """A table whose first `texts` columns are text, and the others numbers."""
    names = [title.strip() for title in titles.split("|")]
    rule = ["---"] * texts + ["---:"] * (len(names) - texts)
    lines = [names, rule, *([str(cell) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def first() -> str:
    rows = (
        [
            name,
            f"`{path}`",
            row["count"],
            ms(row["median"]),
            ms(row["p95"]),
            ms(row["max"]),
        ]
        for (_, path, _), report in cells("first").items()
        for name, row in report.items()
    )
    return markdown("Request | Endpoint | Count | Median | p95 | Max", rows, 2)


def matrix(uploads: int) -> str:
    """p95 of `during`, of two runs, for each server and path."""
    runs = cells("servers"), cells("servers_again")

    def cell(server: str, path: str) -> str:
        pair = [run[server, path, uploads]["during"]["p95"] for run in runs]
        return " / ".join(map(ms, pair))

    servers = dict.fromkeys(server for server, _, _ in runs[0])
    rows = ([f"`{s}`", *(cell(s, path) for path in PATHS)] for s in servers)
    titles = ["server", *(f"`{path}`" for path in PATHS)]
    return markdown(" | ".join(titles), rows, 1)


def seed() -> str:
    """The table as the first demo had it: two sizes, two servers, two endpoints."""
    rows = [
        [
            name,
            f"`{server}`",
            f"`{path}`",
            *(ms(row[c]) for c in ("min", "median", "mean", "p95", "p99", "max")),
        ]
        for (server, path, uploads), report in cells("servers").items()
        for name, row in report.items()
        if uploads == 1
        if name in ("small", "large")
        if server == "uvicorn" or "--reuse-port" in server
        if path in PATHS[:2]
    ]
    return markdown(
        "request | server | endpoint | min | median | mean | p95 | p99 | max", rows, 3
    )


def uploads() -> str:
    runs = cells("uploads"), cells("uploads_again")

    def pair(key: Key, name: str, column: str) -> str:
        return " / ".join(ms(run[key][name][column]) for run in runs)

    rows = (
        [
            f"`{key[0]}`",
            f"`{key[1]}`",
            key[2],
            pair(key, "small", "p95"),
            pair(key, "during", "p95"),
        ]
        + [pair(key, "large", "median"), pair(key, "large", "count")]
        for key in runs[0]
    )
    return markdown(
        "server | endpoint | uploads at once | p95 of small | p95 of during | median of large | large answered",
        rows,
        2,
    )


def compare(files: Iterable[str], texts: dict[str, str] = {}) -> str:
    """The main figures of some files, a row for each run."""
    rows = []
    for file in files:
        for (server, endpoint, _), report in cells(file).items():
            what = texts.get(file, endpoint)
            figures = [
                ms(report["idle"]["median"]),
                ms(report["small"]["p90"]),
                ms(report["small"]["p95"]),
            ]
            figures += [
                ms(report["during"]["p95"]),
                ms(report["during"]["max"]),
                ms(report["large"]["median"]),
            ]
            errors = sum(
                int(row["errors"] or 0)
                for name, row in report.items()
                if name != "during"
            )
            rows.append(
                [
                    f"`{file}.json`",
                    f"`{server}`",
                    what,
                    *figures,
                    report["small"]["count"],
                    errors,
                ]
            )
    titles = "raw file | server | endpoint | idle median | small p90 | small p95 | during p95 | during max | large median | small answered | errors"
    return markdown(titles, rows, 3)


def sizes() -> str:
    def row(size_mb: int) -> Iterator[str]:
        yield str(size_mb)
        for report in cells(f"size_{size_mb}").values():
            yield f"{(report['large']['median'] or 0) / size_mb:.1f}"

    return markdown("MB | `/ping` | `/pong`", map(row, (1, 5, 25, 100)), 0)


def memory() -> str:
    def row(server: str, path: str) -> Iterator[str]:
        yield {
            "one": "`uvicorn`",
            "four": "`gunicorn -w 4 -k uvicorn_worker.UvicornWorker`",
        }[server]
        yield f"`{path}`"
        name = path.replace("=", "/").rpartition("/")[2]
        for n in (1, 4):
            yield f"{load(f'memory_{server}_{name}_{n}')['runs'][0]['peak_memory_mb']:.0f}"

    rows = (row(server, path) for server in ("one", "four") for path in PATHS)
    return markdown("server | endpoint | 1 upload | 4 at once", rows, 2)


def tools() -> str:
    """The range of three runs of results/truth.py."""
    runs = [truth.rows(FOLDER / f"truth_{i}") for i in (1, 2, 3)]

    def span(name: str, i: int) -> str:
        values = sorted(value for run in runs if (value := run[name][i]) is not None)
        ends = dict.fromkeys(
            f"{value:.0f}" for value in values[:: len(values) - 1 or 1]
        )
        return " to ".join(ends) or "-"

    rows = ([name, *(span(name, i) for i in range(4))] for name in runs[0])
    return markdown("tool | p90 | p95 | p99 | max", rows, 1)


def tables() -> dict[str, str]:
    """All of them by heading, as they stand in a README.md."""
    return {
        "try it": first(),
        "one upload": matrix(1),
        "eight uploads": matrix(8),
        "the first table": seed(),
        "uploads at once": uploads(),
        "threads, def, ijson": compare(["variants", "variants_again"]),
        "own API": compare(["own_documents", "own_fixed"]),
        "what comes back": compare(
            [
                f"models_{name}"
                for name in ("documents", "thread", "small_result", "models")
            ]
        ),
        "reuse-port": compare(["reuse_port", "reuse_port_again"]),
        "keep-alive": compare(["keep_alive", "keep_alive_again"]),
        "health check": compare(["health_check"]),
        "closed loop": compare(
            [
                f"loop_{loop}_{way}"
                for loop in ("open", "closed")
                for way in ("new", "new-client")
            ]
        ),
        "uvloop": compare(["uvloop", "uvloop_again"]),
        "sizes": sizes(),
        "per entry": (FOLDER / "per_entry.md").read_text(),
        "one body": (FOLDER / "one_body.md").read_text(),
        "memory": memory(),
        "tools": tools(),
    }


if __name__ == "__main__":
    for heading, text in tables().items():
        print(f"{heading}\n\n{text}")
