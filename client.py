"""Measure how much large requests delay small ones, on any HTTP server.

  python client.py                   start `uvicorn server:app`, measure it, stop it
  python client.py --base-url URL    measure the server that is already there
  python client.py --serve "gunicorn -w 4 -k asgi server:app" --serve ...

For each server and endpoint stdout gets a dict to paste, at the end a Markdown table,
latencies in ms. The classes and words in them:

  small     open loop: request i is due at start + i/rate, whatever happened to the ones
            before it; latency = answer complete - due time, so a stall is counted for
            everybody whom it delayed
  large     one upload at a time, in chunks; latency = answer complete - start of sending
  idle      small, with no large request in the air: the baseline
  lateness  actual send - due; if its p99 passes 5 ms while idle, the client says that it
            is itself the bottleneck
  errors    wrong answer, bad status, timeout, refused or broken connection: counted by
            kind, shown, never in the percentiles

A warm-up (a few small, one large) is sent first and not counted. Exit status: 0 all
requests succeeded, 1 some failed, 2 wrong usage or no server, 130 interrupted (what was
measured so far is printed).
"""

import asyncio
import contextlib
import gc
import importlib.metadata
import importlib.util
import itertools
import math
import os
import platform
import random
import re
import resource
import shlex
import signal
import socket
import string
import sys
import tempfile
import textwrap
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from argparse import RawDescriptionHelpFormatter as HelpFormatter
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from typing import Any, NamedTuple, NoReturn

import httpx
import numpy as np
import orjson
from tqdm import tqdm

KINDS = ("idle", "small", "large")
COLUMNS = ("Min", "Median", "Mean", "p90", "p95", "p99", "Max")
CHUNK_BYTES = 256 * 1024
MAX_REQUESTS, MAX_SIZE_MB = 10_000_000, 4000
CONNECT_S, START_S, STOP_S = 5, 30, 10  # a running server; a started one; stopping it

Process = Popen[bytes]


class Failure(Exception):
    """What ends the run; its text tells the user what to do."""


def say(message: str) -> None:
    tqdm.write(f"client.py: {message}", file=sys.stderr)


# Workload: two bodies, made before anything is timed.


class Body(NamedTuple):
    content: bytes
    expected: dict[str, Any]


def make_body(name: str, size_bytes: int) -> Body:
    """A body of exactly `size_bytes` (up to 20 spaces at its end), always the same one.

    Raises ValueError if `size_bytes` is too small even for empty `data`.
    """
    data: dict[str, int] = {}
    room = size_bytes - len(orjson.dumps({"name": name, "data": data}))
    if room < 0:
        raise ValueError(f"a {name} body takes at least {size_bytes - room} bytes")
    rng = random.Random(0)
    for key in map("".join, itertools.product(string.ascii_lowercase, repeat=10)):
        value = 1 + int(1_000_000 * rng.random())
        room -= len(f'"{key}":{value},')
        if room < -1:  # the last entry has no comma
            break
        data[key] = value
    content = orjson.dumps({"name": name, "data": data}).ljust(size_bytes)
    maxval = max(data.values(), default=0)
    return Body(content, {"name": name, "count": len(data), "maxval": maxval})


async def chunks(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), CHUNK_BYTES):
        yield content[start : start + CHUNK_BYTES]


# Schedule.


def due_offsets_s(rate_hz: float, duration_s: float) -> list[float]:
    """The times i / rate before `duration_s`, in seconds since the start of the phase."""
    count = math.ceil(round(rate_hz * duration_s, 6))
    return [i / rate_hz for i in range(count)]


# Send: each request becomes one sample.


class Sample(NamedTuple):
    """One request; times in seconds since the start of the run, to the microsecond."""

    kind: str
    due_s: float
    sent_s: float
    done_s: float
    error: str | None
    stages_ms: dict[str, float]

    @property
    def latency_ms(self) -> float:
        return 1000 * (self.done_s - self.due_s)


class NewConnections(httpx.AsyncBaseTransport):
    """A new connection per request, each in its own pool: a shared one looks, at every
    request, through all connections, which takes seconds once a thousand wait.
    """

    def __init__(self) -> None:
        self.tls = httpx.create_ssl_context(trust_env=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        async with httpx.AsyncHTTPTransport(verify=self.tls) as transport:
            response = await transport.handle_async_request(request)
            await response.aread()
            return response


def new_client(reuse: str) -> httpx.AsyncClient:
    # Kept for 1 s: a connection that the server closes first would look like a fault.
    kept = httpx.Limits(max_connections=None, keepalive_expiry=1.0)
    own = NewConnections() if reuse == "client" else None
    return httpx.AsyncClient(transport=own, limits=kept, timeout=None, trust_env=False)


def classify(status: int, content: bytes, expected: dict[str, Any]) -> str | None:
    """What is wrong with an answer, or None."""
    if status != 200:
        return f"status {status}"
    with contextlib.suppress(orjson.JSONDecodeError):
        if orjson.loads(content) == expected:
            return None
    return "wrong answer"


@dataclass
class Run:
    """One server and endpoint under load; `measure` fills `samples`."""

    server: str
    endpoint: str
    options: Namespace
    small: Body
    large: Body
    client: httpx.AsyncClient
    samples: list[Sample] = field(default_factory=list)
    in_flight: int = 0
    phase: str = "warm-up"
    origin_s: float = field(default_factory=time.perf_counter)

    def now_s(self) -> float:
        return round(time.perf_counter() - self.origin_s, 6)

    async def post(self, content: bytes) -> httpx.Response:
        url = self.options.base_url + self.endpoint
        size_bytes = str(len(content))
        headers = {"Content-Type": "application/json", "Content-Length": size_bytes}
        if self.options.reuse != "none":
            return await self.client.post(url, content=chunks(content), headers=headers)
        async with new_client("none") as client:
            return await client.post(url, content=chunks(content), headers=headers)

    async def send(self, kind: str, body: Body, due_s: float | None = None) -> Sample:
        """Send one body, and record what came of it, also when interrupted."""
        sent_s = self.now_s()
        error: str | None = "interrupted"
        stages_ms: dict[str, float] = {}
        self.in_flight += 1
        task = asyncio.create_task(self.post(body.content))
        try:
            await asyncio.wait([task], timeout=self.options.timeout)
            if not task.done():
                error = "timeout"
            elif exception := task.exception():
                error = type(exception).__name__
            else:
                response = task.result()
                error = classify(response.status_code, response.content, body.expected)
                if kind == "large":
                    timing = response.headers.get("Server-Timing", "")
                    found = re.findall(r"([\w-]+)[^,]*?;dur=(\d+\.?\d*)", timing)
                    stages_ms = {stage: float(ms) for stage, ms in found}
        finally:
            task.cancel()
            self.in_flight -= 1
            due_s = sent_s if due_s is None else round(due_s, 6)
            sample = Sample(kind, due_s, sent_s, self.now_s(), error, stages_ms)
            self.samples.append(sample)
        return sample

    async def send_small(self, kind: str, duration_s: float) -> None:
        if self.options.closed_loop:
            return await self.send_small_closed(kind, duration_s)
        begun_s, tasks = self.now_s(), []
        try:
            for offset_s in due_offsets_s(self.options.rate, duration_s):
                due_s = begun_s + offset_s
                await asyncio.sleep(due_s - self.now_s())
                tasks.append(asyncio.create_task(self.send(kind, self.small, due_s)))
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def send_small_closed(self, kind: str, duration_s: float) -> None:
        end_s = self.now_s() + duration_s
        while self.now_s() < end_s:
            sample = await self.send(kind, self.small)
            await asyncio.sleep(sample.sent_s + 1 / self.options.rate - self.now_s())

    async def send_large(self, duration_s: float) -> None:
        end_s = self.now_s() + duration_s
        while self.now_s() < end_s:
            sample = await self.send("large", self.large)
            # Even without a pause, a server that refuses at once is not hammered.
            pause_s = max(self.options.pause, 0.1 if sample.error else 0)
            await asyncio.sleep(min(pause_s, end_s - self.now_s()))

    async def warm_up(self, process: Process | None) -> None:
        """Wait for a first HTTP answer of any status; Failure if none comes."""
        give_up_s = START_S if process else CONNECT_S
        while True:
            error = (await self.send("warm-up", self.small)).error
            if not error or error.startswith(("status", "wrong")):
                break
            if self.now_s() > give_up_s or process and process.poll() is not None:
                url = self.options.base_url + self.endpoint
                raise Failure(f"no HTTP answer from {url} ({error})")
            await asyncio.sleep(0.1)
        for body in [self.small] * 10 + [self.large]:
            sample = await self.send("warm-up", body)
            if sample.error:
                say(
                    f"{self.endpoint}, warm-up, {body.expected['name']}: {sample.error}"
                )
            if sample.error == "timeout":
                break
        self.samples.clear()

    async def measure(self) -> None:
        options, self.origin_s = self.options, time.perf_counter()
        self.phase = "idle"
        await self.send_small("idle", options.idle)
        self.phase = "small and large"
        small = self.send_small("small", options.duration)
        await asyncio.gather(small, self.send_large(options.duration))

    async def show_progress(self) -> None:
        """Keep a bar on stderr up to date; none where stderr is no terminal."""
        total_s = self.options.idle + self.options.duration
        form = "|{bar:20}| {desc}"
        with tqdm(total=total_s, bar_format=form, disable=None, leave=False) as bar:
            while True:
                bar.n = 0 if self.phase == "warm-up" else min(self.now_s(), total_s)
                errors = sum(sample.error is not None for sample in self.samples)
                bar.set_description_str(
                    f"{self.server}, {self.endpoint}, {self.phase}: "
                    f"{total_s - bar.n:.0f} s left, {len(self.samples)} answers, "
                    f"{self.in_flight} in flight, {errors} errors"
                )
                await asyncio.sleep(0.25)


# The server, where it is started here.


@contextlib.contextmanager
def started(command: Sequence[str], cwd: Path | None) -> Iterator[Process]:
    """A server in a process group of its own, which never outlives this process."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with tempfile.TemporaryFile() as output:
        try:
            process = Popen(
                command,
                cwd=cwd,
                env=os.environ | {"PATH": path},
                stdin=DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as exc:
            raise Failure(f"cannot start {command[0]}: {exc.strerror}") from None
        # Its input ends when this block does or this process, even by SIGKILL: then it
        # kills the group, and where something was left, gives it time to free the port.
        guard = f"read end; kill -KILL -{process.pid} 2>/dev/null && sleep 0.5"
        with (
            process,
            Popen(["/bin/sh", "-c", guard], stdin=PIPE, start_new_session=True),
        ):
            try:
                yield process
            finally:
                # It ended by itself, or gave no answer.
                if process.poll() is not None or sys.exc_info()[0] is Failure:
                    output.seek(0)
                    log = output.read().decode(errors="replace").splitlines()[-10:]
                    say("\n".join(["the server's log ends:", *log]))
                process.terminate()
                with contextlib.suppress(TimeoutExpired):
                    process.wait(STOP_S)


@contextlib.contextmanager
def server_at(base_url: str, serve: str | None) -> Iterator[tuple[str, Process | None]]:
    """The name of the server to measure, and its process if it is started here."""
    url, name, cwd = httpx.URL(base_url), "uvicorn server:app", None
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    try:
        socket.create_connection((url.host, port), CONNECT_S).close()
    except OSError:
        say(f"nothing listens at {base_url}")
    else:
        if serve:
            raise Failure(f"{base_url} is taken: stop that server or change --base-url")
        say(f"measuring the server at {base_url}")
        yield base_url, None
        return
    if serve:
        name, command = serve, shlex.split(serve)
    elif url.scheme == "http" and url.host in ("127.0.0.1", "localhost", "::1"):
        cwd = Path(__file__).resolve().parent
        where = ["--host", url.host, "--port", str(port), "--no-access-log"]
        command = [sys.executable, "-m", *name.split(), *where]
    else:
        raise Failure(f"no server at {base_url}: start it first")
    say(f"starting: {shlex.join(command)}")
    with started(command, cwd) as process:
        yield name, process


# Report: pure functions of the samples, and what prints them.


def statistics(latencies_ms: Sequence[float], errors: int) -> dict[str, float]:
    """Count, min, median, mean, percentiles and max in ms to one decimal, and errors.

    Percentiles are interpolated linearly (numpy.percentile). Without any latency there
    are only the count, 0, and the errors.
    """
    if not latencies_ms:
        return {"count": 0, "errors": errors}
    low, median, *high = np.percentile(latencies_ms, [0, 50, 90, 95, 99, 100])
    values = [low, median, np.mean(latencies_ms), *high]
    row = {name.lower(): round(float(ms), 1) for name, ms in zip(COLUMNS, values)}
    return {"count": len(latencies_ms), **row, "errors": errors}


def summarize(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """`statistics` for each of the classes idle, small and large."""
    rows = {}
    for kind in KINDS:
        chosen = [sample for sample in samples if sample.kind == kind]
        latencies_ms = [sample.latency_ms for sample in chosen if not sample.error]
        rows[kind] = statistics(latencies_ms, len(chosen) - len(latencies_ms))
    return rows


def format_stages(samples: Iterable[Sample]) -> str:
    """A line on what Server-Timing says of the large requests; empty without any."""
    timed = [s for s in samples if s.stages_ms and not s.error]
    if not timed:
        return ""
    medians_ms = {
        stage: np.median([sample.stages_ms.get(stage, 0) for sample in timed])
        for stage in timed[0].stages_ms
    }
    total_ms = medians_ms.get("total", sum(medians_ms.values()))
    share = total_ms / np.median([sample.latency_ms for sample in timed])
    stages = ", ".join(f"{stage} {ms:.1f}" for stage, ms in medians_ms.items())
    return f"# large in the server, median ms: {stages} ({share:.0%} of the latency)\n"


def format_run(run: Run) -> str:
    rows = [f"    {kind!r}: {row},\n" for kind, row in summarize(run.samples).items()]
    heading, stages = f"# {run.server}, {run.endpoint}\n", format_stages(run.samples)
    return heading + "{\n" + "".join(rows) + "}\n" + stages


def format_table(runs: Iterable[Run]) -> str:
    """The Markdown table, a row for each class of each run."""
    titles = ["Request Size", "Server", "Endpoint", "Count", *COLUMNS]
    rows = [titles, ["---"] * 3 + ["---:"] * (len(titles) - 3)]
    for run in runs:
        small, large = f"{run.options.small_kb:g} kB", f"{run.options.large_mb:g} MB"
        for kind, row in summarize(run.samples).items():
            size = f"{kind} ({large if kind == 'large' else small})"
            values = [str(row.get(name.lower(), "-")) for name in ("Count", *COLUMNS)]
            server = run.server.replace("|", "\\|")
            rows.append([size, server, run.endpoint, *values])
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def report(run: Run) -> None:
    """Print the dict on stdout, and on stderr what else a reader of it must know."""
    tqdm.write(format_run(run), file=sys.stdout)
    sys.stdout.flush()
    for kind in KINDS:
        samples = [sample for sample in run.samples if sample.kind == kind]
        errors = Counter(sample.error for sample in samples if sample.error)
        for error, count in errors.items():
            say(f"{run.endpoint}, {kind}: {count} x {error}")
        if kind != "large" and samples:
            late_ms = [1000 * (sample.sent_s - sample.due_s) for sample in samples]
            p99_ms = np.percentile(late_ms, 99)
            say(f"{run.endpoint}, {kind}: lateness of sending, p99 {p99_ms:.1f} ms")
            if kind == "idle" and p99_ms > 5:
                say("WARNING: this client is itself the bottleneck: figures too high")


def to_json(options: Namespace, runs: Iterable[Run]) -> dict[str, Any]:
    """Everything about the runs; README.md describes the schema."""
    cpu = platform.processor()
    with contextlib.suppress(OSError, IndexError):  # only Linux tells the model so
        cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    host = {"cores": os.cpu_count(), "cpu": cpu, "os": platform.platform()}
    return {
        "schema": 1,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join(["python", *sys.argv]).encode(errors="replace").decode(),
        "parameters": vars(options),
        "versions": {d.name: d.version for d in importlib.metadata.distributions()},
        "machine": host | {"python": platform.python_version()},
        "columns": Sample._fields,
        "runs": [
            {
                "server": run.server,
                "endpoint": run.endpoint,
                "statistics": summarize(run.samples),
                "samples": [list(sample) for sample in run.samples],
            }
            for run in runs
        ],
    }


def plot(runs: Sequence[Run], file: Path) -> None:
    """Latency over time: a row of panels for each server, a column for each endpoint."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colors = {"idle": "gray", "small": "tab:blue", "error": "tab:red"}
    columns = len({run.endpoint for run in runs})
    rows = math.ceil(len(runs) / columns)
    figure = Figure(figsize=(11, 1.2 + 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis, run in zip(axes.flat, runs):
        title = f"{run.server}, {run.endpoint}"
        title = textwrap.fill(title, 140 // columns, break_on_hyphens=False)
        axis.set_title(title, fontsize=9)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        for s in run.samples:
            if s.kind == "large":
                axis.axvspan(s.sent_s, s.done_s, color="orange", alpha=0.3, lw=0)
        for key, color in colors.items():
            shown = [s for s in run.samples if ("error" if s.error else s.kind) == key]
            due_s, latency_ms = [s.due_s for s in shown], [s.latency_ms for s in shown]
            axis.plot(due_s, latency_ms, ".", ms=3, color=color)
    figure.supxlabel("time when due, s")
    figure.supylabel("latency, ms")
    handles = [Patch(color=color, label=key) for key, color in colors.items()]
    handles += [Patch(color="orange", alpha=0.3, label="large in the air")]
    figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(file, dpi=110)


# The command line: what is wrong is better found before a long run than after it.


class Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def positive(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise ArgumentTypeError(f"must be a positive number, not {text}")
    return value


def positive_or_0(text: str) -> float:
    return positive(text) if float(text) else 0.0


def path(text: str) -> str:
    if not text.startswith("/"):
        raise ArgumentTypeError(f"must start with /, not {text!r}")
    return text


def command(text: str) -> str:
    if not shlex.split(text):  # ValueError where a quotation is open
        raise ValueError
    return text


def base_url(text: str) -> str:
    with contextlib.suppress(httpx.InvalidURL, UnicodeError):
        url = httpx.URL(text)
        known = url.scheme in ("http", "https") and url.port in (None, *range(1, 65536))
        if known and url.host and not url.query and not url.fragment:
            return text.rstrip("/")
    raise ArgumentTypeError(f"must be like http://127.0.0.1:8000, not {text!r}")


def output(text: str) -> Path:
    file = Path(text)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ArgumentTypeError(f"cannot write to {text}")
    return file


def picture(text: str) -> Path:
    if Path(text).suffix not in (".png", ".svg"):
        raise ArgumentTypeError(f"must end with .png or .svg, not {text!r}")
    if not importlib.util.find_spec("matplotlib"):
        raise ArgumentTypeError("needs matplotlib: pip install matplotlib")
    return output(text)


def parse() -> Namespace:
    parser = Parser(
        prog="client.py",
        description=__doc__,
        formatter_class=lambda prog: HelpFormatter(prog, width=88),
        allow_abbrev=False,
    )
    add = parser.add_argument
    text = "paths to measure, one after the other (default: /ping /pong)"
    pair = ["/ping", "/pong"]
    add("--endpoint", nargs="+", type=path, default=pair, metavar="PATH", help=text)
    text = "where the server is (default: %(default)s)"
    local = "http://127.0.0.1:8000"
    add("--base-url", type=base_url, default=local, metavar="URL", help=text)
    text = "start this server (in the foreground), measure, stop it; may be repeated"
    add("--serve", action="append", type=command, metavar="COMMAND", help=text)
    for flag, kind, n, unit, text in (
        ("--duration", positive, 30, "S", "seconds of mixed load for each endpoint"),
        ("--small-kb", positive, 1, "KB", "size of a small body, in 1000 bytes"),
        ("--large-mb", positive, 25, "MB", "size of a large body, in 1000 kB"),
        ("--rate", positive, 50, "HZ", "small requests per second"),
        ("--pause", positive_or_0, 2, "S", "seconds between two large requests"),
        ("--idle", positive_or_0, 3, "S", "seconds of small requests alone, first"),
        ("--timeout", positive, 60, "S", "seconds until a request is an error"),
    ):
        add(flag, type=kind, default=n, metavar=unit, help=f"{text} (default: {n})")
    text = "send a small request only after the last one's answer: hides stalls"
    add("--closed-loop", action="store_true", help=text)
    text = "client: one httpx client, a new connection per request; connection: "
    text += "keep-alive; none: a new httpx client on every call (default: client)"
    ways = ["client", "connection", "none"]
    add("--reuse", choices=ways, default="client", help=text)
    text = "write every sample, the parameters, versions and machine"
    add("--json", type=output, metavar="FILE", help=text)
    text = "draw latency over time, .png or .svg (needs matplotlib)"
    add("--plot", type=picture, metavar="FILE", help=text)
    options = parser.parse_args()
    requests = options.rate * (options.idle + options.duration)
    size_mb = max(options.small_kb / 1000, options.large_mb)
    if requests > MAX_REQUESTS or size_mb > MAX_SIZE_MB:
        parser.error(f"more than {MAX_REQUESTS} requests, or {MAX_SIZE_MB} MB")
    return options


async def measure_all(
    options: Namespace, small: Body, large: Body, runs: list[Run]
) -> None:
    """Fill `runs`, and report on each as soon as it is over or interrupted."""
    task = asyncio.current_task()
    assert task
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, task.cancel)
    for serve in options.serve or [None]:
        with server_at(options.base_url, serve) as (name, process):
            for endpoint in options.endpoint:
                async with new_client(options.reuse) as client:
                    run = Run(name, endpoint, options, small, large, client)
                    progress = asyncio.create_task(run.show_progress())
                    try:
                        await run.warm_up(process)
                        runs.append(run)
                        await run.measure()
                    finally:
                        progress.cancel()
                        if run in runs:
                            report(run)


def report_all(options: Namespace, runs: Sequence[Run]) -> None:
    """Print the table, and write the files even where nobody reads stdout any more."""
    try:
        print("Latency in ms, smaller is better:\n")
        print(format_table(runs), end="", flush=True)
    finally:
        if options.json:
            content = orjson.dumps(to_json(options, runs), default=str)
            options.json.write_bytes(content)
        if options.plot:
            plot(runs, options.plot)


def main() -> int:
    options = parse()
    loop = "closed loop" if options.closed_loop else "open loop"
    say(
        f"{' '.join(options.endpoint)}: {options.idle:g} s idle and {options.duration:g} s "
        f"of load each; {options.small_kb:g} kB at {options.rate:g}/s, {loop}; "
        f"{options.large_mb:g} MB with {options.pause:g} s between; "
        f"reuse: {options.reuse}; timeout {options.timeout:g} s"
    )
    # Requests pile up behind a stalled server, and each holds a file descriptor.
    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    runs: list[Run] = []
    try:
        small = make_body("small", round(1000 * options.small_kb))
        large = make_body("large", round(1_000_000 * options.large_mb))
        gc.freeze()  # spares the collector all that is here to stay
        try:
            asyncio.run(measure_all(options, small, large, runs))
        finally:
            if runs:
                report_all(options, runs)
        return int(any(sample.error for run in runs for sample in run.samples))
    except BrokenPipeError:  # whoever read stdout is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Failure, OSError, ValueError) as exc:
        say(str(exc))
        return 2
    except (asyncio.CancelledError, KeyboardInterrupt):
        say("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
