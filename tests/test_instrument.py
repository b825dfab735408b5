"""Whether client.py tells the truth: its figures about servers whose behaviour is known."""

import ast
import asyncio
import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import ENV, ROOT, Server, free_port, run_client, serve
from stub import PERIOD_S, STALL_S, WARM_UP
from test_client import GUNICORN, NAMES, SHORT, STUB, child_pids, seen_by, wait_until

import client

RATE_HZ = 50
CYCLES_S = 6 * PERIOD_S
PERCENTS = (90, 95, 99)
# A stall of s in every p seconds means for requests spread evenly over time that
# P(latency > x) = (s - x) / p. So percentile q is s - (1 - q/100) p: 250, 325, 385 ms.
TRUTH_MS = [1000 * (STALL_S - (1 - q / 100) * PERIOD_S) for q in PERCENTS]
WHOLE_CYCLES = (
    f"--rate {RATE_HZ} --duration {CYCLES_S} --idle 0 --pause 99 --large-mb 0.01"
)
COLUMNS = ["kind", "due_s", "sent_s", "done_s", "error", "stages_ms"]
RAW_STUB = f"{shlex.quote(sys.executable)} tests/stub.py"


@dataclass
class Measured:
    """What a run of the client left."""

    status: int
    stdout: str
    stderr: str
    saved: dict[str, Any]

    def samples(self, *kinds: str, run: int = 0) -> list[dict[str, Any]]:
        rows = self.saved["runs"][run]["samples"]
        return [dict(zip(COLUMNS, row)) for row in rows if row[0] in kinds]

    def printed(self, run: int = 0) -> dict[str, dict[str, float]]:
        found = re.findall(r"^\{\n(?: .*\n)+\}$", self.stdout, re.MULTILINE)
        report: dict[str, dict[str, float]] = ast.literal_eval(found[run])
        return report


def measure(
    folder: Path, url: str, flags: str, meanwhile: Callable[[], None] | None = None
) -> Measured:
    file = folder / "json"
    arguments = ["--base-url", url, "--json", str(file), *shlex.split(flags)]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run_client, *arguments)
        if meanwhile:
            meanwhile()
        run = future.result()
    assert run.status in (0, 1) and "Traceback" not in run.stderr, run.stderr
    return Measured(run.status, run.stdout, run.stderr, json.loads(file.read_text()))


def latencies_ms(samples: Iterable[dict[str, Any]]) -> list[float]:
    """Of those that succeeded, from when they were due."""
    return [1000 * (s["done_s"] - s["due_s"]) for s in samples if not s["error"]]


def assert_close(measure_both: Callable[[], tuple[Any, Any]], share: float) -> None:
    """In one of three runs, found and expected percentiles agree within a share and 10 ms.

    A server that was frozen works off what piled up one by one, some 20 ms that are true
    but in no formula; and whatever else the machine is busy with adds to that.
    """
    tried = []
    for _ in range(3):
        found_ms, expected_ms = map(np.array, measure_both())
        if (abs(found_ms - expected_ms) <= share * expected_ms + 10).all():
            return
        tried.append(f"{found_ms.round()} instead of {expected_ms.round()}")
    raise AssertionError(tried)


# Known stalls.


@pytest.fixture(scope="module")
def periodic() -> Iterator[Server]:
    """A server that is frozen for 0.4 s of every 1.5 s."""
    port = free_port()
    with serve(f"{STUB} {port}", port, {"STALL": "periodic"}) as server:
        yield server


def test_stalls_of_the_server_itself(periodic: Server, tmp_path: Path) -> None:
    """A stall counts for all whom it delayed, and for as long as it delayed them."""

    def found_and_true() -> tuple[Any, Any]:
        flags = f"--endpoint /open {WHOLE_CYCLES}"
        small = measure(tmp_path, periodic.url, flags).printed()["small"]
        assert small["count"] == RATE_HZ * CYCLES_S
        assert small["median"] < 50
        return [small[f"p{q}"] for q in PERCENTS], TRUTH_MS

    assert_close(found_and_true, 0.12)


def test_closed_loop_hides_stalls(periodic: Server, tmp_path: Path) -> None:
    """--closed-loop sends one request into each stall, and so its p90 shows nothing of them."""
    flags = f"--endpoint /closed {WHOLE_CYCLES} --duration 4.5 --closed-loop"
    small = measure(tmp_path, periodic.url, flags).printed()["small"]
    assert small["p90"] < TRUTH_MS[0] / 2
    assert small["max"] > 1000 * STALL_S / 2


async def probe(port: int, path: str) -> list[float]:
    """Latencies in ms at RATE_HZ from when each was due, from a socket for each."""
    body = '{"name":"small","data":{"a":1}}'
    head = f"POST {path} HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n"
    message = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    begun_s = time.perf_counter()

    async def once(offset_s: float) -> float:
        await asyncio.sleep(begun_s + offset_s - time.perf_counter())
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(message)
        answer = await reader.read()
        latency_s = time.perf_counter() - begun_s - offset_s
        writer.close()
        assert b" 200 " in answer and b'"maxval":1' in answer
        return 1000 * latency_s

    offsets_s = np.arange(0, CYCLES_S, 1 / RATE_HZ)
    return await asyncio.gather(*map(once, offsets_s))


def test_agrees_with_a_raw_probe(periodic: Server, tmp_path: Path) -> None:
    """A prober that shares no code with the client has the same percentiles at the same time."""

    def found_and_probed() -> tuple[Any, Any]:
        probed_ms: list[float] = []
        path = f"/both/{time.monotonic_ns()}"

        def meanwhile() -> None:
            warm_up = WARM_UP["small"]
            wait_until(lambda: seen_by(periodic.url, path)["small"] > warm_up)
            probed_ms.extend(asyncio.run(probe(periodic.port, "/probe")))

        flags = f"--endpoint {path} {WHOLE_CYCLES}"
        measured = measure(tmp_path, periodic.url, flags, meanwhile)
        found_ms = latencies_ms(measured.samples("small"))
        return np.percentile(found_ms, PERCENTS), np.percentile(probed_ms, PERCENTS)

    assert_close(found_and_probed, 0.15)


def test_stalls_by_large_requests(stub: Server, tmp_path: Path) -> None:
    """What the large requests cost the small ones is in their percentiles, no more, no less."""

    def found_and_true() -> tuple[Any, Any]:
        flags = "--endpoint /sum/stall --idle 0 --duration 6 --pause 1 --large-mb 2"
        measured = measure(tmp_path, stub.url, flags)
        small, large = measured.samples("small"), measured.samples("large")
        assert len(large) >= 4
        # The stub answers a large request when its stall of 0.4 s is over, so whoever is
        # due within the last 0.4 s of one waits for its end: P(latency > x) = n (0.4 - x)
        # / D with n stalls in D seconds. As the end of the load may cut the last stall,
        # the percentiles are taken not from that but from due times on a grid of 1 ms.
        due_s = small[0]["due_s"] + np.arange(0, 6, 0.001)
        wait_s = np.array([sample["done_s"] - due_s for sample in large])
        wait_s = np.where((wait_s > 0) & (wait_s <= STALL_S), wait_s, 0).max(axis=0)
        found_ms = np.percentile(latencies_ms(small), PERCENTS)
        return found_ms, 1000 * np.percentile(wait_s, PERCENTS)

    assert_close(found_and_true, 0.15)


# Faults.


def assert_nothing_lost(measured: Measured, sent: dict[str, int]) -> None:
    """Every request is an answer or an error, and stderr has the number of each kind."""
    assert measured.status == 1
    for kind, row in measured.printed().items():
        samples = measured.samples(kind)
        errors = Counter(sample["error"] for sample in samples if sample["error"])
        assert row["errors"] == errors.total()
        assert row["count"] + row["errors"] == len(samples)
        assert len(samples) == sent.get(kind, len(samples)) > 0
        for error, count in errors.items():
            shown = rf"\b{kind}\b.*\b{count} x {error}\b"
            assert re.search(shown, measured.stderr, re.MULTILINE)


def assert_faults(
    measured: Measured, url: str, path: str, every: int, expected: set[str]
) -> None:
    """Of what the stub saw of each size, the n-th, the 2n-th and so on failed as expected."""
    assert_nothing_lost(measured, {"idle": 25, "small": 50})
    saw = seen_by(url, path)
    for name, kinds in {"small": ("idle", "small"), "large": ("large",)}.items():
        samples = measured.samples(*kinds)
        warm_up = saw[name] - len(samples)  # which stops at the first error
        assert (name == "small") <= warm_up <= WARM_UP[name]
        errors = [sample["error"] for sample in samples if sample["error"]]
        assert len(errors) == saw[name] // every - warm_up // every > 0
        assert set(errors) <= expected


@pytest.mark.parametrize(
    ("fault", "every", "error"),
    [
        ("status500", 1, "status 500"),
        ("flaky", 3, "status 500"),
        ("wrong", 1, "wrong answer"),
        ("notjson", 1, "wrong answer"),
    ],
)
def test_bad_answers(
    stub: Server, tmp_path: Path, fault: str, every: int, error: str
) -> None:
    """An answer other than the right one is an error, and the others still count."""
    path = f"/bad/{fault}"
    measured = measure(tmp_path, stub.url, f"--endpoint {path} {SHORT}")
    assert_faults(measured, stub.url, path, every, {error})


@pytest.mark.parametrize("fault", ["cut", "reset"])
def test_broken_connections(tmp_path: Path, fault: str) -> None:
    """An answer cut short or a connection that is reset is an error, and the others still count."""
    port, path = free_port(), "/broken"
    with serve(f"{RAW_STUB} {port} {fault}", port) as server:
        measured = measure(tmp_path, server.url, f"--endpoint {path} {SHORT}")
        expected = {"RemoteProtocolError", "ReadError"}
        assert_faults(measured, server.url, path, 2, expected)


def test_timeouts(stub: Server, tmp_path: Path) -> None:
    """A request without an answer becomes an error after --timeout, and holds up no other."""
    flags = f"--endpoint /late/never --timeout 1 {SHORT}"
    measured = measure(tmp_path, stub.url, flags)
    assert_nothing_lost(measured, {"idle": 25, "small": 50})
    samples = measured.samples("idle", "small", "large")
    assert {sample["error"] for sample in samples} == {"timeout"}
    assert all(sample["done_s"] - sample["sent_s"] > 0.99 for sample in samples)


@pytest.mark.parametrize("fault", ["silent", "garbage"])
def test_no_http(fault: str) -> None:
    """What listens but speaks no HTTP is no server: no figures, status 2."""
    port = free_port()
    with serve(f"{RAW_STUB} {port} {fault}", port) as server:
        run = run_client("--base-url", server.url, "--timeout", "2", "--large-mb", "1")
    assert (run.status, run.stdout) == (2, "")
    assert server.url in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize("command", [STUB, f"{GUNICORN} 127.0.0.1:{{}}"])
def test_killed_server(tmp_path: Path, command: str) -> None:
    """SIGKILL of the server, or of a worker that is replaced, costs errors but loses no request."""
    port, path = free_port(), "/killed/stall"
    command = command if "{}" in command else f"{command} {{}}"
    with serve(command.format(port), port) as server:

        def kill() -> None:
            wait_until(lambda: seen_by(server.url, path)["large"] > WARM_UP["large"])
            for _ in range(3):  # once, the worker might just have nothing to do
                time.sleep(STALL_S * 1.5)
                for pid in child_pids(server.process.pid) or [server.process.pid]:
                    os.kill(pid, signal.SIGKILL)

        flags = f"--endpoint {path} {SHORT} --duration 5 --pause 0"
        measured = measure(tmp_path, server.url, flags, kill)
    assert_nothing_lost(measured, {"idle": 25, "small": 250})
    failed = [bool(sample["error"]) for sample in measured.samples("small")]
    assert not any(failed[:10])
    assert all(failed[-10:]) == command.startswith("uvicorn")


# What it writes, and what it says of itself.


def test_json(stub: Server, tmp_path: Path) -> None:
    """--json has how the figures came about and all samples, from which they follow exactly."""
    paths = ["/json", "/json/flaky"]
    measured = measure(tmp_path, stub.url, f"--endpoint {' '.join(paths)} {SHORT}")
    saved = measured.saved
    assert (saved["schema"], saved["columns"]) == (1, COLUMNS)
    assert saved["parameters"]["rate"] == RATE_HZ
    assert saved["parameters"]["endpoint"] == paths
    assert saved["versions"]["httpx"] == importlib.metadata.version("httpx")
    assert saved["machine"]["cores"] == os.cpu_count()
    for i, (run, path) in enumerate(zip(saved["runs"], paths, strict=True)):
        assert (run["server"], run["endpoint"]) == (stub.url, path)
        assert run["statistics"] == measured.printed(i)
        for kind, row in measured.printed(i).items():
            samples = measured.samples(kind, run=i)
            values_ms = latencies_ms(samples)
            errors = len(samples) - len(values_ms)
            assert row == client.statistics(values_ms, errors)
            low, median, *high = np.percentile(values_ms, [0, 50, *PERCENTS, 100])
            values = [round(v, 1) for v in (low, median, np.mean(values_ms), *high)]
            assert row == dict(zip(NAMES, [len(values_ms), *values, errors]))


def test_schedule(stub: Server, tmp_path: Path) -> None:
    """Small requests are due 1/rate apart, large ones sent --pause apart and none while idle."""
    measured = measure(tmp_path, stub.url, f"--endpoint /schedule/slow {SHORT}")
    idle, small, large = map(measured.samples, ("idle", "small", "large"))
    for samples in (idle, small):
        assert all(s["due_s"] <= s["sent_s"] <= s["done_s"] for s in samples)
        due_s = sorted(s["due_s"] for s in samples)
        grid_s = due_s[0] + np.arange(len(due_s)) / RATE_HZ
        assert due_s == pytest.approx(list(grid_s), abs=1e-5)
    assert len(large) >= 3
    assert all(b["sent_s"] - a["done_s"] >= 0.199 for a, b in pairwise(large))
    begun_s = min(s["sent_s"] for s in [*small, *large])
    assert max(s["done_s"] for s in idle) <= begun_s


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plot(stub: Server, tmp_path: Path, suffix: str, start: bytes) -> None:
    """--plot draws a picture in the format of its suffix, with a panel for each endpoint."""
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    file = tmp_path / f"plot.{suffix}"
    flags = f"--endpoint /plot /plot/flaky {SHORT} --duration 0.5 --plot {file}"
    assert measure(tmp_path, stub.url, flags).status == 1
    assert file.read_bytes().startswith(start)
    if suffix == "svg":
        assert len(re.findall(r'id="axes_\d', file.read_text())) == 2


def test_plot_without_matplotlib(tmp_path: Path) -> None:
    """Where matplotlib cannot be imported, --plot says so at once: one line, status 2."""
    # None in sys.modules is how the import system itself marks what is not to be found.
    code = "import runpy, sys; sys.modules['matplotlib'] = None; del sys.argv[0]\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    arguments = [str(ROOT / "client.py"), "--plot", str(tmp_path / "x.png")]
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "matplotlib" in done.stderr


@pytest.mark.parametrize("flags", ["--reuse client", "--reuse none --rate 200"])
def test_lateness(stub: Server, tmp_path: Path, flags: str) -> None:
    """The client calls itself the bottleneck if the p99 of its lateness passes 5 ms while idle, else not."""
    flags = f"--endpoint /lateness {SHORT} --idle 0.3 --duration 0.1 {flags}"
    measured = measure(tmp_path, stub.url, flags)
    idle = measured.samples("idle")
    late_ms = np.percentile([1000 * (s["sent_s"] - s["due_s"]) for s in idle], 99)
    assert ("bottleneck" in measured.stderr) == (late_ms > 5)
    if "none" in flags:  # which takes 20 ms of work for each, and one is due every 5 ms
        assert late_ms > 5
