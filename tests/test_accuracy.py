"""Whether client.py tells the truth: its figures against a log of when each answer left."""

import asyncio
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from harness import Server, serve
from measure import (
    RAW_STUB,
    SHORT,
    STUB,
    Measured,
    latencies_ms,
    measure,
    together,
)
from stub import HELD, PERIOD_S, STALL_S

PERCENTS = (50, 90, 95, 99, 100)
TINY = "--large-mb 0.01 --pause 99"


@pytest.fixture(scope="module")
def periodic() -> Iterator[Server]:
    """A server that is frozen for 0.4 s of every 1.5 s, and logs when answers leave."""
    with serve(f"{RAW_STUB} periodic") as server:
        yield server


def lags_ms(
    server: Server, samples: list[dict[str, Any]]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """By how much each arrival is later than the server's log, and the log's latencies.

    The log has no due times, so the clocks are set by the quickest answer.
    """
    samples = sorted(samples, key=lambda sample: float(sample["done_s"]))
    log = httpx.get(f"{server.url}/left").json()[-len(samples) :]
    left_s = np.array(log)
    done_s = np.array([sample["done_s"] for sample in samples])
    due_s = np.array([sample["due_s"] for sample in samples])
    offset_s = (done_s - left_s).min()
    lag_ms = 1000 * (done_s - left_s - offset_s)
    return lag_ms, 1000 * (left_s + offset_s - due_s)


@pytest.mark.parametrize("connections", ["new", "keep-alive"])
def test_latency_is_that_of_the_servers_log(
    periodic: Server, tmp_path: Path, connections: str
) -> None:
    """Percentiles are those of the log, to 8 ms and the machine's own hiccups."""
    flags = f"--idle 0 --duration {4 * PERIOD_S} {TINY} --connections {connections}"
    # How late a sleeping process wakes on this machine, at this time.
    hiccups_ms: list[float] = []

    def watch() -> None:
        end_s = time.perf_counter() + 4 * PERIOD_S
        while (begun_s := time.perf_counter()) < end_s:
            time.sleep(0.005)
            hiccups_ms.append(1000 * (time.perf_counter() - begun_s) - 5)

    measured = measure(tmp_path, periodic.url, f"--endpoint /a {flags}", watch)
    samples = measured.samples("small")
    assert len(samples) == 50 * 4 * PERIOD_S
    _, true_ms = lags_ms(periodic, samples)
    found = measured.statistics()["small"]
    columns = ("median", "p90", "p95", "p99", "max")
    for q, column in zip(PERCENTS, columns):
        allowed_ms = 8 + np.percentile(hiccups_ms, q)
        assert abs(found[column] - np.percentile(true_ms, q)) < allowed_ms, column
    # Arithmetic: P(latency > x) = (0.4 - x) / 1.5, so that p90 is 250 ms.
    assert found["p90"] > 1000 * STALL_S / 2


@pytest.mark.parametrize("connections", ["new", "keep-alive"])
def test_a_thousand_at_once(tmp_path: Path, connections: str) -> None:
    """1,000 requests that wait at once and are answered together are all stamped in time."""
    flags = f"--idle 0 --rate 500 --duration {HELD / 500} {TINY}"
    with serve(f"{RAW_STUB} held") as server:
        measured = measure(
            tmp_path, server.url, f"{flags} --connections {connections} --endpoint /a"
        )
        samples = measured.samples("small")
        assert len(samples) == HELD and not any(s["error"] for s in samples)
        lag_ms, _ = lags_ms(server, samples)
    assert np.percentile(lag_ms, 95) < 100


async def probe(port: int) -> list[float]:
    """Latencies in ms, 50 a second for 3 s, each on a new socket, from when it is due."""
    body = '{"name":"probe","data":{"a":1}}'
    head = "POST /probe HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n"
    message = f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()
    begun_s = time.perf_counter()

    async def once(due_s: float) -> float:
        await asyncio.sleep(due_s - time.perf_counter())
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(message)
        answer = await reader.read(1000)
        latency_s = time.perf_counter() - due_s
        writer.close()
        assert b"200 OK" in answer
        return 1000 * latency_s

    return await asyncio.gather(*[once(begun_s + i / 50) for i in range(150)])


def test_adds_little_of_its_own(stub: Server, tmp_path: Path) -> None:
    """An idle server's median is that of a raw-socket prober at the same time, and a little."""
    probed_ms: list[float] = []

    def meanwhile() -> None:
        time.sleep(2)  # past the warm-up
        probed_ms.extend(asyncio.run(probe(stub.port)))

    flags = f"--endpoint /idle --idle 5 --duration 0.1 {TINY}"
    idle = measure(tmp_path, stub.url, flags, meanwhile).statistics()["idle"]
    assert idle["median"] < np.median(probed_ms) + 8


def test_during_does_not_depend_on_the_pause(tmp_path: Path) -> None:
    """`during` has those due while a large one was in flight, however many others there are."""

    def run(pause_s: float) -> Measured:
        folder = tmp_path / str(pause_s)
        folder.mkdir()
        flags = f"--idle 0 --duration 3 --pause {pause_s} --large-mb 0.1 --rate 100"
        with serve(STUB) as server:
            return measure(folder, server.url, f"--endpoint /stall {flags}")

    runs = together({"0": lambda: run(0), "0.8": lambda: run(0.8)})
    for measured in runs.values():
        large = measured.samples("large")
        due = [
            sample
            for sample in measured.samples("small")
            if any(s["sent_s"] <= sample["due_s"] < s["done_s"] for s in large)
        ]
        during = measured.statistics()["during"]
        assert during["count"] == len(due) < len(measured.samples("small")) + 1
        assert during["max"] == round(max(latencies_ms(due)), 1)
        # Due evenly over a stall of 0.4 s, they wait for 0.2 s in the median.
        assert during["median"] == pytest.approx(200, rel=0.25)


def test_stalls_that_hide(periodic: Server, tmp_path: Path) -> None:
    """--closed-loop sends one request into each stall, so its p90 shows nothing of them; a
    timeout of 0.2 s is in the percentiles, so p90 is no less.
    """

    def run(name: str, flags: str) -> Measured:
        (tmp_path / name).mkdir()
        flags = f"--endpoint /{name} --idle 0 --duration {3 * PERIOD_S} {TINY} {flags}"
        return measure(tmp_path / name, periodic.url, flags)

    runs = together(
        {
            "closed": lambda: run("closed", "--closed-loop"),
            "late": lambda: run("late", "--timeout 0.2"),
        }
    )
    closed = runs["closed"].statistics()["small"]
    assert closed["p90"] < 1000 * STALL_S / 4
    assert closed["max"] > 1000 * STALL_S / 2
    late = runs["late"].statistics()["small"]
    assert late["errors"] > 10 and late["p90"] >= 200
    assert late["count"] + late["errors"] == 50 * 3 * PERIOD_S


def test_schedule(stub: Server, tmp_path: Path) -> None:
    """Small requests are due once in each slot of 1/rate; large ones are sent --pause apart,
    each stream on its own, and none while idle.
    """
    flags = f"--endpoint /schedule/slow {SHORT} --uploads 1 3"
    measured = measure(tmp_path, stub.url, flags)
    for run, uploads in enumerate((1, 3)):
        idle, small, large = (
            measured.samples(kind, run=run) for kind in ("idle", "small", "large")
        )
        for samples, count in ((idle, 25), (small, 50)):
            assert all(s["due_s"] <= s["sent_s"] <= s["done_s"] for s in samples)
            due_s = np.array(sorted(s["due_s"] for s in samples))
            slots = (due_s - due_s[0]) * 50
            assert len(slots) == count
            assert (abs(slots - np.arange(count)) < 1).all()
            assert np.std(np.diff(due_s)) > 0.001
        assert len(large) >= 3 * uploads
        begun_s = min(s["sent_s"] for s in [*small, *large])
        assert max(s["done_s"] for s in idle) <= begun_s
        events = sorted((s["sent_s"], 1) for s in large) + [
            (s["done_s"], -1) for s in large
        ]
        in_flight = np.cumsum([change for _, change in sorted(events)])
        assert in_flight.max() == uploads
        if uploads == 1:
            gaps_s = [b["sent_s"] - a["done_s"] for a, b in pairwise(large)]
            assert all(gap_s >= 0.199 for gap_s in gaps_s)
