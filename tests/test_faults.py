"""Under every fault requests sent are answers plus errors, and the client ends in order."""

import os
import re
import signal
import time
from collections import Counter
from typing import Any

import harness as h
import measure as m
import pytest
from stub import STALL_S, WARM_UP


def assert_nothing_lost(done: m.Measured, idle: int, small: int) -> None:
    """Every request is an answer or an error, and stderr has the number of each kind."""
    assert done.status == 1
    for kind, sent in {"idle": idle, "small": small, "large": None}.items():
        row, samples = done.statistics(kind), done.samples(kind)
        errors = Counter(sample["error"] for sample in samples if sample["error"])
        count = len(samples)
        assert row["errors"] == errors.total() == count - row["count"]
        assert count == (sent or count) > 0
        for error, count in errors.items():
            assert re.search(rf"\b{kind}\b.*\b{count} x {error}\b", done.stderr)


def kill(server: h.Server) -> None:
    """Kill a server, or its workers, twice: once, a worker might just have nothing to do."""
    h.wait_until(lambda: m.seen_by(server.url, "/a/stall")["large"] > WARM_UP["large"])
    for _ in range(2):
        time.sleep(STALL_S * 1.5)
        for pid in h.children(server.process.pid) or [server.process.pid]:
            os.kill(pid, signal.SIGKILL)


def killed(command: str) -> Any:
    flags = f"--endpoint /a/stall {m.SHORT} --duration 3 --pause 0"
    with h.serve(command) as server:
        jobs = {"run": (m.measure, server.url, flags), "kill": (kill, server)}
        return m.together(jobs)["run"]


def broken(fault: str, flags: str = "") -> m.Measured:
    with h.serve(f"{m.RAW_STUB} {fault}") as server:
        return m.measure(server.url, f"--endpoint /broken {m.SHORT} {flags}")


@pytest.fixture(scope="module")
def outcome(stub: h.Server) -> m.Outcome:
    """All runs at once, as they mostly wait."""
    flags = dict.fromkeys(("flaky", "status500", "wrong"), "")
    flags["never"] = "--rate 500 --timeout 2 --idle 0.1 --duration 2"
    flags["nosmall"] = "--timeout 1"
    jobs: dict[str, Any] = {}
    for name, text in flags.items():
        jobs[name] = m.measure, stub.url, f"--endpoint /bad/{name} {m.SHORT} {text}"
    jobs |= {fault: (broken, fault) for fault in ("cut", "reset", "garbage")}
    jobs["silent"] = (broken, "silent", "--timeout 5.1")
    jobs |= {"server": (killed, m.STUB), "worker": (killed, m.GUNICORN)}
    return m.together(jobs)


def test_every_nth_fails(outcome: m.Outcome) -> None:
    """Bad statuses, answers cut short and connections reset are errors, and the others count."""
    lost = {"RemoteProtocolError", "ReadError", "ConnectionResetError"}
    kinds = {"flaky": (3, {"status 500"}), "cut": (2, lost), "reset": (2, lost)}
    for fault, (every, allowed) in kinds.items():
        done = outcome[fault]
        assert_nothing_lost(done, 25, 50)
        for name, samples in {
            "small": done.samples("idle", "small"),
            "large": done.samples("large"),
        }.items():
            errors = [sample["error"] for sample in samples if sample["error"]]
            warm_up = WARM_UP[name]
            seen = warm_up + len(samples)
            assert len(errors) == seen // every - warm_up // every > 0
            assert set(errors) <= allowed


def test_timeouts(outcome: m.Outcome) -> None:
    """500 requests a second without an answer are all sent and time out; uploads do not wait."""
    done = outcome["never"]
    assert_nothing_lost(done, 50, 1000)
    samples = done.samples("idle", "small", "large")
    assert {sample["error"] for sample in samples} == {"timeout"}
    assert all(2 <= sample["done_s"] - sample["sent_s"] < 5 for sample in samples)
    assert done.statistics("small")["p90"] >= 2000
    assert_nothing_lost(outcome["nosmall"], 25, 50)
    small, large = (outcome["nosmall"].samples(kind) for kind in ("small", "large"))
    assert {sample["error"] for sample in small} == {"timeout"}
    first_s = min(sample["done_s"] for sample in small)
    assert sum(not s["error"] and s["done_s"] < first_s for s in large) >= 3


def test_killed(outcome: m.Outcome) -> None:
    """SIGKILL of the server, or of a worker that is replaced, costs errors but loses no request."""
    for which in ("server", "worker"):
        assert_nothing_lost(outcome[which], 25, 150)
        failed = [bool(sample["error"]) for sample in outcome[which].samples("small")]
        assert not any(failed[:10]) and all(failed[-10:]) == (which == "server")


def test_no_success_in_the_warm_up(outcome: m.Outcome) -> None:
    """Where no request succeeds the run stops: status 2, the error and the start of the answer."""
    for fault, why in {
        "status500": "status 500",
        "wrong": '"maxval":',
        "silent": "timeout",
        "garbage": "RemoteProtocolError",
    }.items():
        done = outcome[fault]
        assert (done.status, done.stdout) == (2, "")
        assert why in done.stderr and "http://127.0.0.1:" in done.stderr
