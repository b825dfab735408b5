"""Measure how much large requests delay small ones, on any HTTP server.

  python client.py                   start `uvicorn server:app`, measure it, stop it
  python client.py --base-url URL    measure the server that is already there
  python client.py --serve "gunicorn -w 4 -k asgi server:app" --serve ...
  python client.py --base-url URL --small "GET /health" --large "POST /documents @big.json"

stdout gets, for each server and endpoint, a dict to paste and a line that says it in words,
then a Markdown table; latencies are in ms. The terms:

  idle      small requests with no large one in flight: the baseline
  small     small requests while large ones come and go. Open loop: each is due at a random
            moment of its own slot of 1/rate, whatever happened to the ones before it;
            latency = arrival of the answer - due time, so a stall counts against every
            request that it delays
  during    those of `small` that were due while a large one was in flight
  large     latency = arrival of the answer - start of sending, connecting included
  arrival   when the last byte reaches the client's process, not when a task gets its turn
            (except with --connections new-client)
  lateness  how long after its due time the client began to act on a small request; a p99
            above 5 ms in the idle phase, or 20 ms in the mixed one, is a warning
  errors    wrong answer, bad status, timeout, refused, broken or interrupted connection:
            counted by kind and shown; a timeout's waiting time is in the percentiles
  None, -   too few samples: p90 needs 10, p95 20, p99 100

What is measured:
  --endpoint PATH ...     paths of the demo: bodies are generated, answers checked
                          (default: /ping /pong "/pong?offload=process")
  --small, --large "METHOD PATH [@FILE]"
                          your own requests instead; any 2xx is a success
  --header "Name: value"  sent with every request, its value masked in all output (repeat)
  --base-url URL          the server (default: http://127.0.0.1:8000, where the demo is
                          started if nothing listens)
  --serve COMMAND         start this server (in the foreground), measure, stop it (repeat)
How:
  --duration S, --idle S  seconds of mixed load (20), and of small requests alone (3)
  --small-kb KB, --large-mb MB
                          size of the demo's bodies, in units of 1000 (1, 25)
  --rate HZ               small requests per second (50)
  --uploads N ...         large requests in flight at once; several numbers are measured
                          one after the other (1)
  --pause S               between two large requests of one stream (2)
  --timeout S             seconds before a request counts as failed (60)
  --connections new | keep-alive | new-client
                          one per request (default), reused, or a new httpx client each
  --closed-loop           no small request while another waits: hides stalls
Output:
  --fail-if "during p95 > 50"
                          exit with 3 if a statistic of a class exceeds that many ms (repeat)
  --json FILE             every sample, the parameters, versions and machine
  --plot FILE             how long small requests waited, .png or .svg (needs matplotlib)

A warm-up (10 small, 1 large per upload at once) is not counted. Exit status: 0 all requests
succeeded, 1 some failed, 2 wrong usage, no server, or a warm-up without success, 3 a
--fail-if is true or cannot be told, 130 interrupted (statistics so far are printed).
"""

import asyncio
import contextlib
import gc
import importlib.metadata
import itertools
import json
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
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import IO, Any, NamedTuple, NoReturn

import h11
import httpx
import numpy as np
import orjson


class Failure(Exception):
    """What ends the run; its text tells the user what to do."""


SECRETS: list[str] = []  # values of --header


def mask(text: str) -> str:
    for secret in SECRETS:
        text = text.replace(secret, "***")
    return text


def say(message: str) -> None:
    erase = "\r\033[K" if sys.stderr.isatty() else ""  # the line of show_progress
    print(f"{erase}client.py: {mask(message)}", file=sys.stderr, flush=True)


# Requests: what is sent, and what a right answer is.


class Body(NamedTuple):
    content: bytes
    expected: dict[str, Any]


def make_body(name: str, size_bytes: int) -> Body:
    """A body of exactly `size_bytes` (up to 20 spaces at its end), always the same one.

    Raises ValueError if `size_bytes` is too small even for empty `data`.
    """
    content = bytearray(b'{"name":"%s","data":{' % name.encode())
    if size_bytes < (least_bytes := len(content) + 2):
        raise ValueError(f"a {name} body takes at least {least_bytes} bytes")
    rng, count, maxval = random.Random(0), 0, 0
    for key in map("".join, itertools.product(string.ascii_lowercase, repeat=10)):
        value = 1 + int(1_000_000 * rng.random())
        entry = f'"{key}":{value},'.encode()
        if len(content) + len(entry) + 1 > size_bytes:  # the last one loses its comma
            break
        content += entry
        count, maxval = count + 1, max(maxval, value)
    content = content.removesuffix(b",") + b"}}"
    expected = {"name": name, "count": count, "maxval": maxval}
    return Body(bytes(content.ljust(size_bytes)), expected)


class Call(NamedTuple):
    """One kind of request; without `expected` any 2xx is a right answer."""

    label: str  # what reports call it
    request: httpx.Request
    expected: dict[str, Any] | None


def classify(status: int, content: bytes, expected: Any = None) -> str | None:
    """What is wrong with an answer, or None."""
    if expected is None:
        return None if 200 <= status < 300 else f"status {status}"
    if status != 200:
        return f"status {status}"
    with contextlib.suppress(orjson.JSONDecodeError):
        if orjson.loads(content) == expected:
            return None
    return "wrong answer"


# Exchange: one HTTP request and its answer, stamped on arrival.

CHUNK_BYTES = 256 * 1024
KEPT_S = 1  # less than servers do, as a connection just closed looks like a fault


class Connection(asyncio.StreamReaderProtocol):
    """An HTTP/1.1 connection that notes when bytes arrive, not when a task reads them.

    In httpx's own transport tasks take many steps for an answer, and where many answers
    arrive together, they take them in turn: all seem to arrive with the last.
    """

    writer: asyncio.StreamWriter
    arrived_s = 0.0

    def __init__(self, turn: asyncio.Lock) -> None:
        self.reader, self.turn = asyncio.StreamReader(), turn
        super().__init__(self.reader)
        self.http = h11.Connection(h11.CLIENT)

    def data_received(self, data: bytes) -> None:
        self.arrived_s = time.perf_counter()
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(None)  # an answer before a reset can still be read

    async def exchange(self, request: httpx.Request) -> httpx.Response:
        method, target = request.method, request.url.raw_path
        head = h11.Request(method=method, target=target, headers=request.headers.raw)
        unsent, content = self.http.send(head) or b"", request.content
        for start in range(0, max(1, len(content)), CHUNK_BYTES):
            chunk = h11.Data(data=content[start : start + CHUNK_BYTES])
            self.writer.write(unsent + (self.http.send(chunk) or b""))
            unsent = b""
            await asyncio.sleep(0)  # small requests go in between
            try:
                await self.writer.drain()
            except ConnectionError:
                break  # refused half-way, perhaps with an answer
        else:
            self.http.send(h11.EndOfMessage())
        answer = bytearray()
        while not isinstance(event := self.http.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                data = await self.reader.read(CHUNK_BYTES)
                # One answer in each turn of the loop, which stamps others in between.
                async with self.turn:
                    self.http.receive_data(data)
                    await asyncio.sleep(0)
            elif isinstance(event, h11.Response):
                status, headers = event.status_code, event.headers.raw_items()
            elif isinstance(event, h11.Data):
                answer += event.data
        content, stamp = bytes(answer), {"arrived_s": self.arrived_s}
        return httpx.Response(
            status, headers=headers, content=content, extensions=stamp
        )


class StampingTransport(httpx.AsyncBaseTransport):
    """Connections of an httpx.AsyncClient to one server. `extensions["arrived_s"]` of an
    answer says when it arrived, in seconds of time.perf_counter(). Raises OSError and
    h11.ProtocolError.
    """

    def __init__(self, url: httpx.URL, keep_alive: bool) -> None:
        self.keep_alive, self.host = keep_alive, url.host
        self.options: dict[str, Any] = {"port": port_of(url)}
        if url.scheme == "https":
            context = httpx.create_ssl_context()
            self.options |= {"ssl": context, "server_hostname": url.host}
        self.kept: list[tuple[float, Connection]] = []
        self.turn = asyncio.Lock()

    async def acquire(self) -> Connection:
        while self.kept:
            since_s, kept = self.kept.pop()
            if time.perf_counter() - since_s < KEPT_S and not kept.reader.at_eof():
                return kept
            kept.writer.close()
        loop = asyncio.get_running_loop()
        transport, new = await loop.create_connection(
            lambda: Connection(self.turn), self.host, **self.options
        )
        new.writer = asyncio.StreamWriter(transport, new, new.reader, loop)
        self.host = transport.get_extra_info("peername")[0]  # a name is looked up once
        return new

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        connection = await self.acquire()
        http = connection.http
        try:
            response = await connection.exchange(request)
            if self.keep_alive and http.our_state is http.their_state is h11.DONE:
                http.start_next_cycle()
                self.kept.append((time.perf_counter(), connection))
            return response
        finally:
            if http.our_state is not h11.IDLE:
                connection.writer.transport.abort()

    async def aclose(self) -> None:
        for _, connection in self.kept:
            connection.writer.close()


class NewClientTransport(httpx.AsyncBaseTransport):
    """A new httpx client, and so a new TLS context, for every request."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport()) as client:
            return await client.send(request)


def port_of(url: httpx.URL) -> int:
    return url.port or {"http": 80, "https": 443}[url.scheme]


def open_client(url: httpx.URL, connections: str) -> httpx.AsyncClient:
    transport: httpx.AsyncBaseTransport = NewClientTransport()
    if connections != "new-client":
        transport = StampingTransport(url, connections == "keep-alive")
    return httpx.AsyncClient(transport=transport, timeout=None)


# Schedule: a pure function.


def due_offsets_s(rate_hz: float, duration_s: float) -> list[float]:
    """When requests are due, in seconds since the start of a phase: request i at a random
    moment of its own slot, (i + u) / rate with 0 <= u < 1, the same ones at every call.
    Evenly spaced ones could be in step with the server's stalls.
    """
    count = math.ceil(round(rate_hz * duration_s, 6))
    rng = random.Random(0)
    return [(i + rng.random()) / rate_hz for i in range(count)]


# Load: warm-up, idle phase, mixed phase; each request becomes a sample.

START_S, CONNECT_S = 30, 5  # for the first answer: of a server started here, of another


class Sample(NamedTuple):
    """One request; times in seconds since the start of the run, to the microsecond."""

    kind: str  # idle, small or large
    due_s: float
    sent_s: float
    done_s: float
    error: str | None
    stages_ms: dict[str, float]  # Server-Timing of a large request

    @property
    def latency_ms(self) -> float:
        return 1000 * (self.done_s - self.due_s)


@dataclass
class Load:
    """One run: `uploads` large requests at once, and small ones at `rate_hz`."""

    client: httpx.AsyncClient
    small: Call
    large: Call
    uploads: int
    duration_s: float
    idle_s: float
    rate_hz: float
    pause_s: float
    timeout_s: float
    closed_loop: bool
    samples: list[Sample] = field(default_factory=list)
    phase: str = "warm-up"
    in_flight: int = 0
    errors: int = 0
    last_error: dict[str, str] = field(default_factory=dict)  # by kind, in words
    origin_s: float = field(default_factory=time.perf_counter)

    def now_s(self) -> float:
        return round(time.perf_counter() - self.origin_s, 6)

    async def send(self, kind: str, due_s: float | None = None) -> Sample:
        """Send a request, and record what came of it, also when interrupted."""
        sent_s, done_s = self.now_s(), None
        call = self.large if kind == "large" else self.small
        error: str | None = "interrupted"
        stages_ms: dict[str, float] = {}
        self.in_flight += 1
        try:
            async with asyncio.timeout(self.timeout_s):
                response = await self.client.send(call.request)
            arrived_s = response.extensions.get("arrived_s", time.perf_counter())
            done_s = round(arrived_s - self.origin_s, 6)
            if error := classify(response.status_code, response.content, call.expected):
                self.last_error[kind] = " ".join(response.text[:200].split())
            elif kind == "large":
                timing = response.headers.get("Server-Timing", "")
                found = re.findall(r"([\w-]+)[^,]*?;dur=(\d+\.?\d*)", timing)
                stages_ms = {stage: float(ms) for stage, ms in found}
        except TimeoutError:
            error = self.last_error[kind] = "timeout"
        except (OSError, h11.ProtocolError, httpx.HTTPError) as exc:
            error, self.last_error[kind] = type(exc).__name__, str(exc)
        finally:
            self.in_flight -= 1
            self.errors += error is not None
            due_s = sent_s if due_s is None else round(due_s, 6)
            done_s = self.now_s() if done_s is None else done_s
            sample = Sample(kind, due_s, sent_s, done_s, error, stages_ms)
            self.samples.append(sample)
        return sample

    async def send_small(self, kind: str, duration_s: float) -> None:
        begun_s = self.now_s()
        async with asyncio.TaskGroup() as group:
            for offset_s in due_offsets_s(self.rate_hz, duration_s):
                due_s = begun_s + offset_s
                if self.closed_loop and self.now_s() > due_s:
                    continue  # was due while the last one waited
                await asyncio.sleep(due_s - self.now_s())
                task = group.create_task(self.send(kind, due_s))
                if self.closed_loop:
                    await task

    async def send_large(self) -> None:
        end_s = self.now_s() + self.duration_s
        while self.now_s() < end_s:
            sample = await self.send("large")
            # Even without a pause, a server that refuses at once is not hammered.
            pause_s = max(self.pause_s, 0.1 if sample.error else 0)
            await asyncio.sleep(min(pause_s, end_s - self.now_s()))

    async def warm_up(self, is_running: Callable[[], bool] | None) -> None:
        """Raises Failure if no HTTP answer comes, or no right one to small or to large.

        `is_running` tells of a server that is only just starting.
        """
        give_up_s = START_S if is_running else CONNECT_S
        while error := (await self.send("small")).error:
            if error.startswith(("status", "wrong")):
                break
            if self.now_s() > give_up_s or is_running and not is_running():
                why = f"{self.small.request.url}: {error}, {self.last_error['small']}"
                tls = " (SSL_CERT_FILE names a private CA)" if "certif" in why else ""
                raise Failure(f"no HTTP answer from {why}{tls}")
            await asyncio.sleep(0.1)
        for _ in range(10):
            if (await self.send("small")).error == "timeout":
                break
        await asyncio.gather(*[self.send("large") for _ in range(self.uploads)])
        for kind, call in (("small", self.small), ("large", self.large)):
            if not all(sample.error for sample in select(self.samples, kind)):
                continue
            # Once more: it may be that only every second one fails.
            if error := (await self.send(kind)).error:
                what = f"{call.request.method} {call.request.url}: {error}"
                raise Failure(f"no warm-up success: {what}, {self.last_error[kind]}")
        await asyncio.sleep(1)

    async def measure(self) -> None:
        self.samples.clear()
        self.phase, self.errors, self.origin_s = "idle", 0, time.perf_counter()
        await self.send_small("idle", self.idle_s)
        self.phase = "mixed"
        async with asyncio.TaskGroup() as group:
            group.create_task(self.send_small("small", self.duration_s))
            for _ in range(self.uploads):
                group.create_task(self.send_large())

    async def show_progress(self, name: str) -> None:
        """Keep a line on stderr up to date; none where stderr is no terminal."""
        while sys.stderr.isatty():
            past_s = 0 if self.phase == "warm-up" else self.now_s()
            left_s = max(0, self.idle_s + self.duration_s - past_s)
            text = f"{self.phase}: {left_s:.0f} s left, {self.in_flight} in flight, "
            text += f"{self.errors} errors: {name}"
            print(f"\r\033[K{text[:79]}", end="", file=sys.stderr, flush=True)
            await asyncio.sleep(0.25)


# Server: start it, and never leave it behind.

STOP_S = 10


class Server:
    """A server in a process group of its own, which never outlives this process."""

    peak_memory_mb: float | None = None  # of its largest process, once it has ended

    def __init__(self, command: list[str], cwd: Path | None, log: IO[bytes]) -> None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        how: dict[str, Any] = {"cwd": cwd, "env": os.environ | {"PATH": path}}
        how |= {"stdin": DEVNULL, "stdout": log, "stderr": log}
        try:
            self.process = Popen(command, start_new_session=True, **how)
        except OSError as exc:
            raise Failure(f"cannot start {command[0]}: {exc.strerror}") from None
        # Its input ends when stop() closes it or this process ends, even by SIGKILL: then
        # it kills the group, and where something was left, gives it time to free the port.
        guard = f"read end; kill -KILL -{self.process.pid} 2>/dev/null && sleep 0.5"
        self.guard = Popen(["sh", "-c", guard], stdin=PIPE, start_new_session=True)

    def is_running(self) -> bool:
        if self.process.returncode is None:
            pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
            if pid:
                self.process.returncode = os.waitstatus_to_exitcode(status)
                unit_bytes = 1 if sys.platform == "darwin" else 1024
                self.peak_memory_mb = round(usage.ru_maxrss * unit_bytes / 1e6, 1)
        return self.process.returncode is None

    def stop(self) -> None:
        if self.is_running():
            self.process.terminate()
        give_up_s = time.perf_counter() + STOP_S
        while self.is_running() and time.perf_counter() < give_up_s:
            time.sleep(0.02)
        self.guard.communicate()
        while self.is_running():  # until the guard has killed it
            time.sleep(0.02)


@contextlib.contextmanager
def server_at(
    url: httpx.URL, serve: str | None, may_start: bool
) -> Iterator[tuple[str, Server | None]]:
    """The name of the server to measure, and itself if it is started here."""
    try:
        socket.create_connection((url.host, port_of(url)), CONNECT_S).close()
    except OSError as exc:
        if not serve and not may_start:
            why = exc.strerror or exc
            raise Failure(f"no server at {url} ({why}): start it first") from None
    else:
        if serve:
            raise Failure(f"{url} is taken: stop that server or change --base-url")
        say(f"measuring the server at {url}")
        yield str(url), None
        return
    name, cwd = serve or "uvicorn server:app", None if serve else Path(__file__).parent
    command = shlex.split(name)
    if not serve:
        command = [sys.executable, "-m", *command, "--no-access-log"]
    say(f"nothing listens at {url}, starting: {shlex.join(command)}")
    with tempfile.TemporaryFile() as log:
        server = Server(command, cwd, log)
        try:
            yield name, server
        finally:
            # It ended by itself, or gave no answer.
            if not server.is_running() or sys.exc_info()[0] is Failure:
                log.seek(0)
                lines = log.read().decode(errors="replace").splitlines()[-10:]
                say("\n".join(["the server's log ends:", *lines]))
            server.stop()


# Statistics: pure functions of the samples.

CLASSES = ("idle", "small", "during", "large")
COLUMNS = ("min", "median", "mean", "p90", "p95", "p99", "max")
PERCENTILES = {  # which one, and the least number of samples that it takes
    "min": (0, 1),
    "median": (50, 1),
    "p90": (90, 10),
    "p95": (95, 20),
    "p99": (99, 100),
    "max": (100, 1),
}
LATE_MS = {"idle": 5, "small": 20}  # when to warn, of the kinds that have a schedule

Row = dict[str, float | None]


def summarize(
    latencies_ms: Sequence[float], errors: int = 0, waited_ms: Sequence[float] = ()
) -> Row:
    """Count, min, median, mean, percentiles and max in ms to one decimal, and errors.

    `waited_ms` is how long the timeouts among the errors waited, at least: it is in all
    figures but the count. Percentiles are interpolated linearly (numpy.percentile), and
    None without a sample beyond them: below 10 samples for p90, 20 for p95, 100 for p99.
    """
    values_ms = [*latencies_ms, *waited_ms]
    row: Row = dict.fromkeys(COLUMNS)
    if values_ms:
        row["mean"] = round(float(np.mean(values_ms)), 1)
    for column, (q, least) in PERCENTILES.items():
        if len(values_ms) >= least:
            row[column] = round(float(np.percentile(values_ms, q)), 1)
    return {"count": len(latencies_ms), **row, "errors": errors}


def select(samples: Iterable[Sample], name: str) -> list[Sample]:
    """The samples of one of the classes."""
    if name != "during":
        return [sample for sample in samples if sample.kind == name]
    small = select(samples, "small")
    due_s = np.array([sample.due_s for sample in small])
    hit = np.zeros(len(small), dtype=bool)
    for large in select(samples, "large"):
        hit |= (large.sent_s <= due_s) & (due_s < large.done_s)
    return [small[i] for i in np.flatnonzero(hit)]


def summarize_all(samples: Sequence[Sample]) -> dict[str, Row]:
    rows = {}
    for name in CLASSES:
        chosen = select(samples, name)
        right_ms = [s.latency_ms for s in chosen if not s.error]
        waited_ms = [s.latency_ms for s in chosen if s.error == "timeout"]
        rows[name] = summarize(right_ms, len(chosen) - len(right_ms), waited_ms)
    return rows


def lateness_ms(samples: Iterable[Sample], kind: str) -> float:
    """The p99 of a kind that has a schedule; 0 without samples."""
    late_ms = [1000 * (s.sent_s - s.due_s) for s in samples if s.kind == kind]
    return float(np.percentile(late_ms, 99)) if late_ms else 0.0


def warnings_about(samples: Sequence[Sample]) -> list[str]:
    """What makes the figures of a run doubtful."""
    return [
        f"{kind}: the client itself was late (p99 {late_ms:.1f} ms, over {limit_ms}), and "
        "the figures are too high: stop other programs, or lower --rate"
        for kind, limit_ms in LATE_MS.items()
        if (late_ms := lateness_ms(samples, kind)) > limit_ms
    ]


# Report.


@dataclass
class Run:
    """What was measured of one server, endpoint and number of uploads."""

    server: str
    endpoint: str
    small: str
    large: str
    uploads: int
    samples: list[Sample]
    started_s: float = 0  # since 1970
    peak_memory_mb: float | None = None

    @property
    def at_once(self) -> str:
        return f", {self.uploads} at once" if self.uploads > 1 else ""

    @property
    def title(self) -> str:
        return self.endpoint + self.at_once


def in_words(run: Run, rows: dict[str, Row]) -> str:
    def time_of(name: str, column: str) -> str:
        ms = rows[name][column] or 0
        return f"{ms:.1f} ms" if ms < 100 else f"{ms / 1000:.2f} s"

    if rows["during"]["max"] is None:
        return (
            "no small request was answered of those due while a large one was in flight"
        )
    large, small = run.large, run.small
    if run.endpoint.startswith("/"):  # of the demo
        large, small = "a large request", "a small one"
    text = f"while {large} was in flight {small} waited {time_of('during', 'median')} "
    text += f"(median), {time_of('during', 'max')} at most"
    if rows["idle"]["max"] is not None:
        text += f"; alone {time_of('idle', 'median')} (median)"
    return text


def report(run: Run) -> None:
    """Print the dict on stdout, and before that on stderr what its reader must know."""
    for name in ("idle", "small", "large"):
        errors = Counter(s.error for s in select(run.samples, name) if s.error)
        for error, count in errors.items():
            say(f"{run.title}, {name}: {count} x {error}")
    late = [f"{kind} {lateness_ms(run.samples, kind):.1f} ms" for kind in LATE_MS]
    say(f"{run.title}, lateness of the client (p99): {', '.join(late)}")
    for warning in warnings_about(run.samples):
        say(f"warning: {run.title}, {warning}")
    rows = summarize_all(run.samples)
    lines = [f"    {name!r}: {row},\n" for name, row in rows.items()]
    print(f"# {run.server}, {run.title}\n{{\n{''.join(lines)}}}")
    print(f"# {in_words(run, rows)}\n", flush=True)


def format_table(runs: Iterable[Run]) -> str:
    """The Markdown table, a row for each class of each run."""
    titles = ["Request", "Server", "Endpoint", "Count", "Errors"]
    titles += [name if name[0] == "p" else name.title() for name in COLUMNS]
    table = [titles, ["---"] * 3 + ["---:"] * (len(titles) - 3)]
    for run in runs:
        for name, row in summarize_all(run.samples).items():
            label = run.large + run.at_once if name == "large" else run.small
            values = [row[column] for column in ("count", "errors", *COLUMNS)]
            cells = [f"{name} ({label})", run.server, run.endpoint]
            cells += ["-" if value is None else str(value) for value in values]
            table.append([cell.replace("|", "\\|") for cell in cells])
    return "".join("| " + " | ".join(row) + " |\n" for row in table)


def to_json(runs: Sequence[Run], about: dict[str, Any]) -> str:
    """Everything about the runs; `statistics` follow from `samples`."""
    cpu = platform.processor()
    with contextlib.suppress(OSError, IndexError):  # only Linux tells the model so
        cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    host = {"cores": os.cpu_count(), "cpu": cpu, "os": platform.platform()}
    started = time.gmtime(runs[0].started_s)
    content = about | {
        "schema": 2,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", started),
        "client_versions": {
            d.name: d.version for d in importlib.metadata.distributions()
        },
        "machine": host | {"python": platform.python_version()},
        "columns": Sample._fields,
        "runs": [
            vars(run)
            | {
                "statistics": summarize_all(run.samples),
                "warnings": warnings_about(run.samples),
                "samples": list(map(list, run.samples)),
            }
            for run in runs
        ],
    }
    return json.dumps(content, default=str, separators=(",", ":"))


def plot(runs: Sequence[Run], file: Path) -> None:
    """How long small requests waited, by when they were due: a panel for each run."""
    from matplotlib.figure import Figure

    across = 1 if len(runs) == 1 else 2 if len(runs) <= 4 else 4
    down = math.ceil(len(runs) / across)
    figure = Figure(figsize=(3.8 * across, 1.2 + 2.3 * down), layout="constrained")
    axes = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    colors = "#d55e00", "#0072b2", "#cc79a7", "#009e73"  # safe for the colour-blind
    titles = list(dict.fromkeys(run.title for run in runs))
    legend: dict[str, Any] = {}
    for axis, run in itertools.zip_longest(axes.flat, runs):
        if not run:
            axis.remove()
            continue
        color = colors[titles.index(run.title) % len(colors)]
        small, large = select(run.samples, "small"), select(run.samples, "large")
        begun_s = min((s.due_s for s in (*small, *large)), default=0)
        for s in large:
            begin_s, end_s = s.sent_s - begun_s, s.done_s - begun_s
            span = axis.axvspan(begin_s, end_s, color="#b09a50", alpha=0.25, lw=0)
            legend[f"large request in flight ({run.large})"] = span
        for label, marker in ((f"small request ({run.small})", "."), ("error", "x")):
            shown = [s for s in small if (label == "error") == bool(s.error)]
            due_s = [s.due_s - begun_s for s in shown]
            waited_s = [s.latency_ms / 1000 for s in shown]
            if shown:
                dots = axis.plot(due_s, waited_s, marker, ms=4, color=color, zorder=3)
                legend.setdefault(label, dots[0])
        share = np.mean([s.latency_ms > 100 for s in small]) if small else 0
        place: dict[str, Any] = {"xycoords": "axes fraction", "zorder": 4}
        box = {"facecolor": axis.get_facecolor(), "alpha": 0.8, "lw": 0}
        text = f"{share:.0%} waited over 0.1 s"
        axis.annotate(text, (0.98, 0.88), **place, ha="right", weight="bold", bbox=box)
        axis.set_title(run.title, loc="left", pad=16, size=11, weight="bold")
        axis.annotate(run.server[:50], (0, 1.03), **place, size=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
        axis.margins(y=0.25)
        axis.set_ylim(bottom=0)
    figure.supxlabel("due time, in seconds since the load began", size=10)
    figure.supylabel("latency of small requests, in seconds", size=10)
    figure.legend(
        legend.values(), legend, loc="outside upper left", ncols=3, frameon=False
    )
    figure.savefig(file, dpi=175)


# Options and main: all that can be checked before a long run is.

LOCAL_URL = "http://127.0.0.1:8000"
ENDPOINTS = ["/ping", "/pong", "/pong?offload=process"]
MAX_REQUESTS, MAX_SIZE_MB = 10_000_000, 4000
REQUEST = r"([A-Z]+) (/\S*)(?: @(.+))?"
HEADER = r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~]*?)[ \t]*"
POSITIVE, POSITIVE_OR_0 = r"(?=.*[1-9])[0-9]*\.?[0-9]+", r"[0-9]*\.?[0-9]+"
CONDITION = rf"({'|'.join(CLASSES)}) ({'|'.join(COLUMNS)}) > ([0-9]+(?:\.[0-9]+)?)"


class Parser(ArgumentParser):
    def format_help(self) -> str:
        return __doc__

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"client.py: {message}; see --help\n")


def like(
    pattern: str, example: str, convert: Callable[[str], Any] = str
) -> Callable[[str], Any]:
    """A check for argparse. It does not repeat what is wrong: it may be a secret."""

    def check(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if re.fullmatch(pattern, text):
                return convert(text)
        raise ArgumentTypeError(f"must be like {example!r}")

    return check


def command(text: str) -> str:
    with contextlib.suppress(ValueError):
        if shlex.split(text):
            return text
    raise ArgumentTypeError("must be like 'uvicorn app:app'")


def base_url(text: str) -> str:
    with contextlib.suppress(httpx.InvalidURL, UnicodeError):
        url = httpx.URL(text)
        known = url.scheme in ("http", "https") and url.port != 0
        if known and url.host and not (url.query or url.fragment or url.userinfo):
            return text.rstrip("/")
    raise ArgumentTypeError(f"must be like {LOCAL_URL}")


def output(text: str) -> Path:
    file = Path(text)
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ArgumentTypeError(f"cannot write to {text}")
    return file


def picture(text: str) -> Path:
    if not text.endswith((".png", ".svg")):
        raise ArgumentTypeError(f"must end with .png or .svg, not {text!r}")
    try:
        import matplotlib  # noqa: F401  # is it there? plot() comes after a long run
    except ImportError:
        raise ArgumentTypeError("needs matplotlib: pip install matplotlib") from None
    return output(text)


def parse() -> Namespace:
    parser = Parser(allow_abbrev=False)
    add = parser.add_argument
    add("--endpoint", nargs="+", type=like(r"/\S*", "/ping"))
    for flag in ("--small", "--large"):
        add(flag, type=like(REQUEST, "POST /documents @big.json"))
    add("--header", action="append", default=[], type=like(HEADER, "Name: value"))
    add("--base-url", type=base_url)
    add("--serve", action="append", type=command)
    numbers = {"duration": 20, "rate": 50, "timeout": 60, "small-kb": 1, "large-mb": 25}
    for name, default in numbers.items():
        add(f"--{name}", type=like(POSITIVE, str(default), float), default=default)
    for name, default in {"idle": 3, "pause": 2}.items():
        add(f"--{name}", type=like(POSITIVE_OR_0, "2", float), default=default)
    add("--uploads", nargs="+", type=like("[1-9][0-9]{0,2}", "4", int), default=[1])
    ways = ["new", "keep-alive", "new-client"]
    add("--connections", choices=ways, default="new")
    add("--closed-loop", action="store_true")
    condition = like(CONDITION, "during p95 > 50")
    add("--fail-if", action="append", default=[], type=condition)
    add("--json", type=output)
    add("--plot", type=picture)
    options = parser.parse_args()
    own = bool(options.small)
    if own != bool(options.large) or own and options.endpoint:
        parser.error("use --endpoint, or --small and --large together")
    requests = options.rate * (options.idle + options.duration)
    size_mb = options.small_kb / 1000 + options.large_mb
    if requests > MAX_REQUESTS or size_mb > MAX_SIZE_MB:
        parser.error(f"more than {MAX_REQUESTS} requests, or {MAX_SIZE_MB} MB")
    return options


def size(size_bytes: int) -> str:
    for least, unit_bytes, unit in ((100_000, 1_000_000, "MB"), (1000, 1000, "kB")):
        if size_bytes >= least:
            return f"{size_bytes / unit_bytes:.4g} {unit}"
    return f"{size_bytes} B"


def calls_of(options: Namespace, url: str) -> list[tuple[str, Call, Call]]:
    """The name, the small and the large request of each endpoint."""
    headers = httpx.Headers([re.findall(f"^{HEADER}$", h)[0] for h in options.header])
    json_headers = httpx.Headers({"Content-Type": "application/json"})
    json_headers.update(headers)

    def call(
        method: str, path: str, content: bytes | None, expected: Any = None
    ) -> Call:
        what = [] if expected else [f"{method} {path}"]
        fields = headers
        if content is not None:
            what, fields = [*what, size(len(content))], json_headers
        request = httpx.Request(method, url + path, headers=fields, content=content)
        return Call(", ".join(what), request, expected)

    def own(text: str) -> Call:
        method, path, file = re.findall(f"^{REQUEST}$", text)[0]
        return call(method, path, Path(file).read_bytes() if file else None)

    if options.small:
        small, large = own(options.small), own(options.large)
        return [(f"{large.label}; {small.label}", small, large)]
    small_body = make_body("small", round(1000 * options.small_kb))
    large_body = make_body("large", round(1_000_000 * options.large_mb))
    return [
        (path, call("POST", path, *small_body), call("POST", path, *large_body))
        for path in options.endpoint or ENDPOINTS
    ]


async def measure_one(
    load: Load, run: Run, runs: list[Run], is_running: Callable[[], bool] | None
) -> None:
    """Add a run to `runs`, and report on it when it is over or interrupted."""
    name = f"{run.server}, {run.title}"
    progress = asyncio.create_task(load.show_progress(name))
    try:
        await load.warm_up(is_running)
        run.started_s = time.time()
        runs.append(run)
        try:
            await load.measure()
        finally:
            report(run)
    finally:
        progress.cancel()
        await load.client.aclose()


async def measure_all(options: Namespace, runs: list[Run]) -> None:
    task = asyncio.current_task()
    assert task
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, task.cancel)
    url = httpx.URL(options.base_url or LOCAL_URL)
    targets = list(itertools.product(calls_of(options, str(url)), options.uploads))
    how: list[Any] = [options.duration, options.idle, options.rate, options.pause]
    how += [options.timeout, options.closed_loop]
    gc.freeze()  # spares the collector all that is here to stay
    for serve in options.serve or [None]:
        first = len(runs)
        with server_at(url, serve, may_start=not options.base_url) as (name, server):
            for (endpoint, small, large), uploads in targets:
                client = open_client(url, options.connections)
                load = Load(client, small, large, uploads, *how)
                labels = mask(small.label), mask(large.label)
                run = Run(mask(name), mask(endpoint), *labels, uploads, load.samples)
                await measure_one(
                    load, run, runs, server.is_running if server else None
                )
        if server and (peak_mb := server.peak_memory_mb):
            say(f"peak memory of the largest server process: {peak_mb} MB")
            for run in runs[first:]:
                run.peak_memory_mb = peak_mb


def failed(conditions: Iterable[str], run: Run) -> Iterator[str]:
    """Which conditions are true of a run or cannot be told, with the measured value."""
    rows = summarize_all(run.samples)
    late = {kind for kind, ms in LATE_MS.items() if lateness_ms(run.samples, kind) > ms}
    for condition in conditions:
        name, column, limit_ms = re.findall(CONDITION, condition)[0]
        value_ms = rows[name][column]
        if value_ms is None:
            yield f"{name} {column} cannot be told: too few samples"
        elif ("idle" if name == "idle" else "small") in late:
            yield f"{name} {column} cannot be told: the client was late"
        elif value_ms > float(limit_ms):
            yield f"{name} {column} is {value_ms} ms, over {limit_ms} ms"


def report_all(options: Namespace, runs: Sequence[Run]) -> None:
    """Print the table, and write the files even where nobody reads stdout any more."""
    try:
        print("Latency in ms, smaller is better:\n")
        print(format_table(runs), end="", flush=True)
    finally:
        if options.json:
            shown = {text: text.partition(":")[0] + ": ***" for text in options.header}
            words = ["python", *sys.argv]
            for text, masked in shown.items():
                words = [word.replace(text, masked) for word in words]
            parameters = vars(options) | {"header": [*shown.values()]}
            about = {"command": shlex.join(words), "parameters": parameters}
            options.json.write_text(mask(to_json(runs, about)))
        if options.plot:
            plot(runs, options.plot)


def main() -> int:
    options = parse()
    for text in options.header:
        value = text.partition(":")[2].strip()
        for secret in (value, *value.split()[-1:]):  # the token without its "Bearer"
            if len(secret) > 3:  # or it would be found everywhere
                SECRETS.extend((secret, json.dumps(secret)[1:-1]))
    # Requests pile up behind a stalled server, and each holds a file descriptor.
    with contextlib.suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    runs: list[Run] = []
    try:
        try:
            asyncio.run(measure_all(options, runs))
        finally:
            if runs:
                report_all(options, runs)
        missed = [(run, why) for run in runs for why in failed(options.fail_if, run)]
        for run, why in missed:
            say(f"--fail-if: {run.server}, {run.title}: {why}")
        errors = any(sample.error for run in runs for sample in run.samples)
        return 3 if missed else int(errors)
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
