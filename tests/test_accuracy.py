"""Whether client.py tells the truth: its figures against a log of when each answer left."""

import socket
import time
from collections.abc import Iterator
from typing import Any

import harness as h
import httpx
import measure as m
import numpy as np
import pytest
from stub import HELD, PERIOD_S, STALL_S

PERCENTS = {"median": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
DURATION_S = 3 * PERIOD_S
ONCE = f"--endpoint /a --idle 0 --duration {DURATION_S} --large-mb 0.01 --pause 99"
PROBE = b"POST /probe HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n"
PROBE += b'Content-Length: 31\r\n\r\n{"name":"probe","data":{"a":1}}'


@pytest.fixture(scope="module")
def periodic() -> Iterator[h.Server]:
    """A server that is frozen for 0.4 s of every 1.5 s, and logs when answers leave."""
    with h.serve(f"{m.RAW_STUB} periodic") as server:
        yield server


def lags_ms(server: h.Server, samples: list[m.Row]) -> tuple[Any, Any]:
    """By how much each arrival is later than the server's log, and the log's latencies.

    The log has no due times, so the clocks are set by the quickest answer.
    """
    times = sorted((sample["done_s"], sample["due_s"]) for sample in samples)
    done_s, due_s = np.array(times).T
    left_s = np.array(httpx.get(f"{server.url}/left").json()[-len(samples) :])
    offset_s = (done_s - left_s).min()
    return 1000 * (done_s - left_s - offset_s), 1000 * (left_s + offset_s - due_s)


def hiccups_ms() -> list[float]:
    """How late a sleeping process wakes on this machine, at this time."""
    late_ms, end_s = [], time.perf_counter() + DURATION_S
    while (begun_s := time.perf_counter()) < end_s:
        time.sleep(0.005)
        late_ms.append(1000 * (time.perf_counter() - begun_s) - 5)
    return late_ms


@pytest.mark.parametrize("way", ["new", "keep-alive"])
def test_latency_is_that_of_the_servers_log(periodic: h.Server, way: str) -> None:
    """Percentiles are those of the log, to 8 ms and the machine's own hiccups."""
    run = (m.measure, periodic.url, f"{ONCE} --connections {way}")
    done, late_ms = m.together({"run": run, "hiccups": (hiccups_ms,)}).values()
    samples, found = done.samples("small"), done.statistics("small")
    assert len(samples) == 50 * DURATION_S
    _, true_ms = lags_ms(periodic, samples)
    for column, q in PERCENTS.items():
        allowed_ms = 8 + np.percentile(late_ms, q)
        assert abs(found[column] - np.percentile(true_ms, q)) < allowed_ms, column
    # Arithmetic: P(latency > x) = (0.4 - x) / 1.5, so that p90 is 250 ms.
    assert found["p90"] > 1000 * STALL_S / 2


def test_a_thousand_at_once() -> None:
    """1,000 requests that wait at once and are answered together are all stamped in time."""
    with h.serve(f"{m.RAW_STUB} held") as server:
        for way in ("new", "keep-alive"):
            flags = f"{ONCE} --rate 1000 --duration {HELD / 1000} --endpoint /{way}"
            done = m.measure(server.url, f"{flags} --connections {way}")
            samples = done.samples("small")
            assert len(samples) == HELD and not any(s["error"] for s in samples)
            assert np.percentile(lags_ms(server, samples)[0], 95) < 100


def probe(port: int) -> list[float]:
    """Latencies in ms, 50 a second for 2 s, each on a new socket, from when it is due."""
    latencies_ms, due_s = [], time.perf_counter() + 2  # past the client's warm-up
    for _ in range(100):
        time.sleep(max(0, due_s - time.perf_counter()))
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(PROBE)
            assert b"200 OK" in sock.recv(1000)
        latencies_ms.append(1000 * (time.perf_counter() - due_s))
        due_s += 1 / 50
    return latencies_ms


def test_adds_little_of_its_own(stub: h.Server) -> None:
    """An idle server's median is that of a raw-socket prober at the same time, and a little."""
    run = (m.measure, stub.url, f"{ONCE} --idle 3 --duration 0.1")
    done, probed_ms = m.together({"run": run, "probe": (probe, stub.port)}).values()
    assert done.statistics("idle")["median"] < np.median(probed_ms) + 8


def test_closed_loop_hides_stalls(periodic: h.Server) -> None:
    """With --closed-loop one request meets each stall, and p90 hides it."""
    small = m.measure(periodic.url, f"{ONCE} --closed-loop").statistics("small")
    assert small["p90"] < 1000 * STALL_S / 4
    assert small["max"] > 1000 * STALL_S / 2
