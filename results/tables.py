"""Print every table of the two README.md that comes from a raw file.

python results/tables.py
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER)]
import truth

from client import Row, Sample, summarize_all

Key = tuple[str, str, int]  # server, endpoint, uploads at once
BODIES = FOLDER / "one_body.md", FOLDER / "one_body_again.md"
MODELS = ("documents", "thread", "small_result", "models")

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


def figure(file: str, key: Key, name: str, column: str) -> float:
    value = cells(file)[key][name][column]
    assert value is not None
    return value


def pair(file: str, key: Key, name: str, column: str = "p95") -> str:
    """The figure of two runs."""
    return " / ".join(ms(figure(f, key, name, column)) for f in (file, f"{file}_again"))


def p95(file: str) -> str:
    """p95 of `during` of two files with a run each."""
    (key,) = cells(file)
    return pair(file, key, "during")


def short(server: str) -> str:
    return re.sub(r" (server:app|--no-access-log|--app-dir \w+)", "", server)


def ms(value: float | None) -> str:
    """Three digits at most: a fourth would not be the same in the next run."""
    if value is None:
        return "-"
    return f"{float(f'{value:.3g}'):.0f}" if value >= 10 else f"{value:.1f}"


def markdown(titles: str, rows: Iterable[Iterable[Any]], texts: int) -> str:
    """A table whose first `texts` columns are text, and the others numbers."""
    names = [title.strip() for title in titles.split("|")]
    rule = ["---"] * texts + ["---:"] * (len(names) - texts)
    lines = [names, rule, *([str(cell) for cell in row] for row in rows)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text.replace(" / ", "\u00a0/\u00a0")  # a pair is not to be wrapped


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
    servers = dict.fromkeys(server for server, _, _ in cells("servers"))
    rows = (
        [f"`{s}`", *(pair("servers", (s, path, uploads), "during") for path in PATHS)]
        for s in servers
    )
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
    rows = (
        [f"`{key[0]}`", f"`{key[1]}`", key[2]]
        + [pair("uploads", key, "small"), pair("uploads", key, "large", "median")]
        + [pair("uploads", key, "large", "count")]
        for key in cells("uploads")
    )
    titles = "server | endpoint | uploads at once | p95 of small | median of large"
    return markdown(f"{titles} | large answered", rows, 2)


COLUMNS = (  # a title, and where it is
    ("idle median", "idle", "median"),
    ("during p95", "during", "p95"),
    ("during max", "during", "max"),
    ("large median", "large", "median"),
)
CLOSED = (
    ("small answered", "small", "count"),
    ("small p95", "small", "p95"),
    ("small max", "small", "max"),
    COLUMNS[0],
)


def compare(*files: str, columns: Iterable[tuple[str, str, str]] = COLUMNS) -> str:
    """A row for each run; a second run, in FILE_again, stands beside the first."""
    rows = []
    for file in files:
        again = [f for f in (file, f"{file}_again") if (FOLDER / f"{f}.json").exists()]
        for key in cells(file):
            row = [
                f"`{key[0]}`",
                f"`{key[1]}`" if len(files) == 1 else f"`{file}.json`",
            ]
            for _, name, column in columns:
                row.append(" / ".join(ms(cells(f)[key][name][column]) for f in again))
            rows.append(row)
    second = "endpoint" if len(files) == 1 else "raw file"
    titles = ["server", second, *(title for title, _, _ in columns)]
    return markdown(" | ".join(titles), rows, 2)


def large_ms(size_mb: int, path: str, suffix: str) -> float:
    return figure(f"size_{size_mb}{suffix}", (ONE, path, 1), "large", "median")


def sizes() -> str:
    def row(size_mb: int) -> Iterator[str]:
        yield str(size_mb)
        for path in PATHS[:2]:
            values = [large_ms(size_mb, path, suffix) for suffix in ("", "_again")]
            yield " / ".join(f"{value / size_mb:.1f}" for value in values)

    return markdown("MB | `/ping` | `/pong`", map(row, (1, 5, 25, 100)), 0)


def memory() -> str:
    def row(server: str, path: str) -> Iterator[str]:
        yield f"`{server}`"
        yield f"`{path}`"
        program, name = server.split()[0], path.strip("/").rpartition("=")[2]
        for n in (1, 4):
            file = f"memory_{program}_{name}_{n}"
            peaks_mb = [
                load(f)["runs"][0]["peak_memory_mb"] for f in (file, f"{file}_again")
            ]
            yield " / ".join(f"{peak_mb:.0f}" for peak_mb in peaks_mb)

    rows = (row(server, path) for server in (ONE, FOUR) for path in PATHS)
    return markdown("server | endpoint | 1 upload | 4 at once", rows, 2)


def tools(among: str = "") -> str:
    """The range of four runs of results/truth.py, of all or of the tools that match."""
    runs = [truth.rows(FOLDER / f"truth_{i}") for i in (1, 2, 3, 4)]

    def span(name: str, i: int) -> str:
        values = sorted(value for run in runs if (value := run[name][i]) is not None)
        ends = dict.fromkeys(
            f"{value:.0f}" for value in values[:: len(values) - 1 or 1]
        )
        return " to ".join(ends) or "-"

    rows = (
        [name, *(span(name, i) for i in range(4))]
        for name in runs[0]
        if re.search(among, name)
    )
    return markdown("tool | p90 | p95 | p99 | max", rows, 1)


def bodies() -> Iterator[list[str]]:
    """The rows of two runs of one_body.py, titles first: pairs of seconds, all else equal."""
    lines = (file.read_text().splitlines() for file in BODIES)
    for both in zip(*lines, strict=True):
        cells = zip(*(line.strip("| ").split(" | ") for line in both), strict=True)
        yield [" / ".join(p if "." in p[0] else dict.fromkeys(p)) for p in cells]


def one_body() -> str:
    titles, _, *rows = bodies()
    return markdown(" | ".join(titles), rows, 3)


def body_row(*which: str) -> list[str]:
    """For an app, endpoint and body: status, seconds, longest wait in s, bytes of the answer."""
    return next(row[3:] for row in bodies() if tuple(row[:3]) == which)


def tables() -> dict[str, str]:
    """All of them, as they stand in a README.md."""
    loops = ("loop_open_new", "loop_closed_new", "loop_closed_new-client")
    return {
        "try it": first(),
        "one upload": matrix(1),
        "eight uploads": matrix(8),
        "the first table": seed(),
        "uploads at once": uploads(),
        "stock, def, ijson": compare("variants"),
        "limiter": compare("limiter"),
        "own API": compare("own_documents", "own_fixed"),
        "what comes back": compare(*(f"models_{name}" for name in MODELS)),
        "reuse-port": compare("reuse_port"),
        "keep-alive": compare("keep_alive"),
        "health check": compare("health_check"),
        "closed loop": compare(*loops, columns=CLOSED),
        "uvloop": compare("uvloop"),
        "sizes": sizes(),
        "per entry": (FOLDER / "per_entry.md").read_text(),
        "one body": one_body(),
        "memory": memory(),
        "tools": tools(),
        "some tools": tools(r"arithmetic|hey, 1 |Locust, 50|client|log"),
    }


def seconds(file: str, key: Key, name: str, column: str) -> str:
    return f"{figure(file, key, name, column) / 1000:.2f} s"


def stage_ms(name: str) -> str:
    """The median of a stage of /pong, in the server's own words."""
    (run,) = [run for run in load("picture")["runs"] if run["endpoint"] == "/pong"]
    stages = [sample[5] for sample in run["samples"] if sample[0] == "large"]
    return ms(median(stage[name] for stage in stages))


def own_error_ms() -> float:
    """The largest difference of client.py to the log of the stub, in four runs."""
    name, log = "`client.py`", "the stub's own log of these"
    runs = [truth.rows(FOLDER / f"truth_{i}") for i in (1, 2, 3, 4)]
    pairs = [zip(run[name], run[log], strict=True) for run in runs]
    return max(abs((a or 0) - (b or 0)) for row in pairs for a, b in row)


ONE, FOUR = "uvicorn", "gunicorn -w 4 -k uvicorn_worker.UvicornWorker"
REUSE = f"{FOUR} --reuse-port"
PONG, THREAD, PROCESS = PATHS[1:]
VARIANTS = "uvicorn variants:app"


def sentences() -> dict[str, str]:
    """Whatever else has a figure in it, word for word."""
    ping = "first", (ONE, "/ping", 1)
    sizes = {n: pair(f"size_{n}", (ONE, "/ping", 1), "large", "median") for n in (1, 5)}
    stock = body_row("variants:app", "/stock", "all floats")
    held = " / ".join(f"{float(text):.1f}" for text in stock[2].split(" / "))
    fast = body_row("server:app", "/ping", "all floats")
    depends = body_row("own_api:app", "/documents", "valid, no token")
    first = body_row("own_api:app", "/fixed", "valid, no token")
    models = {name: p95(f"models_{name}") for name in MODELS}
    loops = {
        name: pair(f"loop_{name}", (ONE, "/ping", 1), *column)
        for name, column in {
            "open_new": ("small", "p95"),
            "closed_new": ("small", "p95"),
            "closed_new-client": ("idle", "median"),
        }.items()
    }
    idle = pair("loop_closed_new", (ONE, "/ping", 1), "idle", "median")
    at_once = {n: pair("uploads", (FOUR, PONG, n), "small") for n in (2, 4, 8)}
    begun = [
        pair("uploads", key, "large", "count")
        for key in ((ONE, PROCESS, 8), (ONE, PONG, 8), (FOUR, PONG, 8))
    ]
    uvloop = ".venv-uvloop/bin/uvicorn --loop uvloop --http httptools"
    shown = [
        " or ".join(
            sorted({str(row[name]["count"]) for row in cells("picture").values()})
        )
        for name in ("small", "large")
    ]
    return {
        "panels": f"Each panel has {shown[0]} small requests and {shown[1]} uploads.",
        "headline": f"median {seconds(*ping, 'during', 'median')}, max "
        f"{seconds(*ping, 'during', 'max')}, against "
        f"{ms(figure(*ping, 'idle', 'median'))} ms when idle.",
        "small bodies": f"A `/ping` of 1 MB takes {sizes[1]} ms, one of 5 MB {sizes[5]} ms "
        "(two runs).",
        "reuse": "`--reuse-port`: a single upload pushes p95 to "
        f"{pair('servers', (REUSE, '/ping', 1), 'during')} ms, as the kernel keeps "
        "assigning connections to the blocked worker.",
        "thread bounded": "One worker, thread, eight uploads: "
        f"{pair('servers', (ONE, THREAD, 8), 'during')} ms instead of "
        f"{pair('servers', (ONE, PONG, 8), 'during')} ms. This needs both the thread and "
        "its limiter; "
        "[neither is enough alone](results/README.md#a-thread-or-the-limiter-that-comes-with-it).",
        "workers": f"Four workers hold up at two uploads, with a p95 of {at_once[2]} "
        f"ms, but not at four: {at_once[4]} ms, at eight {at_once[8]} ms.",
        "process": f"{pair('uploads', (ONE, PROCESS, 8), 'small')} ms at eight",
        "price": f"at eight, {begun[0]} begin within 15 s, against {begun[1]} without "
        f"the process, and {begun[2]} on four workers.",
        "parse": f"Of {stage_ms('total')} ms for a `/pong`, {stage_ms('parse')} ms are "
        "one call of the parser.",
        "def": f"p95 {pair('variants', (VARIANTS, '/stock_def', 1), 'during')} ms with "
        f"`def`, {pair('variants', (VARIANTS, '/stock', 1), 'during')} ms with "
        "`async def`",
        "ijson": f"p95 {pair('variants', (VARIANTS, '/ijson', 1), 'during')} ms; the "
        f"upload takes {pair('variants', (VARIANTS, '/ijson', 1), 'large', 'median')} ms",
        "gunicorn 23": "p95 "
        f"{pair('reuse_port', (f'.venv23/bin/{REUSE}', '/ping', 1), 'during')} ms with "
        f"gunicorn 23, {pair('reuse_port', (REUSE, '/ping', 1), 'during')} ms with "
        "gunicorn 27",
        "kept": "idle median "
        f"{pair('keep_alive', ('uvicorn --workers 4', '/ping', 1), 'idle', 'median')} ms "
        "on keep-alive connections, "
        f"{pair('keep_alive', (FOUR, '/ping', 1), 'idle', 'median')} ms with gunicorn",
        "closed": f"{loops['closed_new']} ms, where the open loop sees "
        f"{loops['open_new']} ms",
        "new client": f"idle median {loops['closed_new-client']} ms instead of {idle} ms",
        "uvloop p95": f"p95 {pair('uvloop', (uvloop, '/ping', 1), 'during')} ms with them, "
        f"{pair('uvloop', (ONE, '/ping', 1), 'during')} ms without",
        "invalid": f"holds a plain FastAPI endpoint for {held} s, and is answered with "
        f"{float(stock[3]) / 1e6:.0f} MB of errors; `/ping` for {fast[2]} s, with "
        f"{fast[3]} bytes.",
        "token": f"401 after {depends[1]} s, blocking everyone else; after {first[1]} s "
        "where the endpoint reads the body itself",
        "before": "p95 of `GET /health` while 21 MB are in flight: "
        f"{p95('own_documents')} ms before, "
        f"{p95('own_fixed')} ms after.",
        "models": f"p95 {models['models']} ms where the process "
        f"returns the models, {models['small_result']} ms with a "
        "number.",
        "log": "`client.py` agrees with the stub's own log of the same requests to within "
        f"{own_error_ms():.1f} ms at p90, p95, p99 and max, in four runs.",
    }


if __name__ == "__main__":
    for heading, text in tables().items():
        print(f"{heading}\n\n{text}")
    print(*sentences().values(), sep="\n")
