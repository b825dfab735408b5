"""Under every fault requests sent are answers plus errors, and the client ends in order."""

import os
import re
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from harness import Run, Server, children, run_client, serve, wait_until
from measure import (
    GUNICORN,
    RAW_STUB,
    SHORT,
    STUB,
    Measured,
    Row,
    measure,
    seen_by,
    together,
)
from stub import STALL_S, WARM_UP


def assert_nothing_lost(measured: Measured, sent: dict[str, int]) -> None:
    """Every request is an answer or an error, and stderr has the number of each kind."""
    assert measured.run.status == 1
    for kind in ("idle", "small", "large"):
        row = measured.statistics()[kind]
        samples = measured.samples(kind)
        errors = Counter(sample["error"] for sample in samples if sample["error"])
        assert row["errors"] == errors.total()
        assert row["count"] + row["errors"] == len(samples)
        assert len(samples) == sent.get(kind, len(samples)) > 0
        for error, count in errors.items():
            shown = rf"\b{kind}\b.*\b{count} x {error}\b"
            assert re.search(shown, measured.run.stderr)


def faults(measured: Measured, saw: Row, every: int) -> set[str]:
    """Of what the stub saw of each size, the n-th, the 2n-th and so on failed; how."""
    assert_nothing_lost(measured, {"idle": 25, "small": 50})
    found = set()
    for name, kinds in {"small": ("idle", "small"), "large": ("large",)}.items():
        samples = measured.samples(*kinds)
        warm_up = saw[name] - len(samples)
        assert warm_up == WARM_UP[name]
        errors = [sample["error"] for sample in samples if sample["error"]]
        assert len(errors) == saw[name] // every - warm_up // every > 0
        found.update(errors)
    return found


def killed(folder: Path, command: str) -> Measured:
    """A run in which the server, or its workers, are killed twice."""
    path = "/killed/stall"
    with serve(command) as server:

        def kill() -> None:
            def warm() -> bool:
                return int(seen_by(server.url, path).get("large", 0)) > WARM_UP["large"]

            wait_until(warm)
            for _ in range(2):  # once, the worker might just have nothing to do
                time.sleep(STALL_S * 1.5)
                for pid in children(server.process.pid) or [server.process.pid]:
                    os.kill(pid, signal.SIGKILL)

        flags = f"--endpoint {path} {SHORT} --duration 3 --pause 0"
        return measure(folder, server.url, flags, kill)


def broken(folder: Path, fault: str) -> tuple[Measured, Row]:
    with serve(f"{RAW_STUB} {fault}") as server:
        measured = measure(folder, server.url, f"--endpoint /broken {SHORT}")
        return measured, seen_by(server.url, "/broken")


def without_http(fault: str) -> Run:
    with serve(f"{RAW_STUB} {fault}") as server:
        flags = f"--timeout 2 --large-mb 1 --base-url {server.url}"
        done = run_client(*flags.split())
        assert server.url in done.stderr
        return done


@pytest.fixture(scope="module")
def outcome(stub: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All runs at once, as they mostly wait."""
    folder = tmp_path_factory.mktemp

    def refused(path: str) -> Run:
        flags = f"--base-url {stub.url} --endpoint {path} {SHORT}"
        return run_client(*flags.split())

    slow = f"{SHORT} --rate 500 --timeout 2 --idle 0.1 --duration 2"
    return together(
        {
            "flaky": lambda: measure(
                folder("a"), stub.url, f"--endpoint /bad/flaky {SHORT}"
            ),
            "cut": lambda: broken(folder("b"), "cut"),
            "reset": lambda: broken(folder("c"), "reset"),
            "never": lambda: measure(
                folder("d"), stub.url, f"--endpoint /late/never {slow}"
            ),
            "server": lambda: killed(folder("e"), STUB),
            "worker": lambda: killed(folder("f"), GUNICORN),
            "status500": lambda: refused("/x/status500"),
            "wrong": lambda: refused("/x/wrong"),
            "notjson": lambda: refused("/x/notjson"),
            "silent": lambda: without_http("silent"),
            "garbage": lambda: without_http("garbage"),
        }
    )


def test_bad_answers(outcome: dict[str, Any], stub: Server) -> None:
    """A status other than 200 is an error, and the others still count."""
    saw = seen_by(stub.url, "/bad/flaky")
    assert faults(outcome["flaky"], saw, 3) == {"status 500"}


@pytest.mark.parametrize("fault", ["cut", "reset"])
def test_broken_connections(outcome: dict[str, Any], fault: str) -> None:
    """An answer cut short or a connection that is reset is an error, and the others still count."""
    measured, saw = outcome[fault]
    errors = faults(measured, saw, 2)
    assert errors <= {"RemoteProtocolError", "ReadError", "ConnectionResetError"}


def test_timeouts(outcome: dict[str, Any]) -> None:
    """500 requests a second without an answer are all sent, and time out after --timeout."""
    measured = outcome["never"]
    assert_nothing_lost(measured, {"idle": 50, "small": 1000})
    samples = measured.samples("idle", "small", "large")
    assert {sample["error"] for sample in samples} == {"timeout"}
    assert all(2 <= sample["done_s"] - sample["sent_s"] < 5 for sample in samples)
    assert measured.statistics()["small"]["p90"] >= 2000


@pytest.mark.parametrize("which", ["server", "worker"])
def test_killed(outcome: dict[str, Any], which: str) -> None:
    """SIGKILL of the server, or of a worker that is replaced, costs errors but loses no request."""
    assert_nothing_lost(outcome[which], {"idle": 25, "small": 150})
    failed = [bool(sample["error"]) for sample in outcome[which].samples("small")]
    assert not any(failed[:10])
    assert all(failed[-10:]) == (which == "server")


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("status500", r'status 500.*"maxval":'),
        ("wrong", r'wrong answer.*"maxval":'),
        ("notjson", "wrong answer.*all well"),
        ("silent", "no HTTP answer.*timeout"),
        ("garbage", "no HTTP answer.*RemoteProtocolError"),
    ],
)
def test_no_success_in_the_warm_up(
    outcome: dict[str, Any], fault: str, why: str
) -> None:
    """Where no request succeeds the run stops: status 2, the error and the start of the answer."""
    done = outcome[fault]
    assert (done.status, done.stdout) == (2, "")
    assert re.search(why, done.stderr) and "http://127.0.0.1:" in done.stderr
    assert len(done.stderr.splitlines()) == 2
