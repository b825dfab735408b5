"""The contract of client.py: its command line, its output and its pure functions."""

import ast
import fcntl
import json
import os
import pty
import re
import select
import shlex
import signal
import socket
import statistics
import string
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from harness import ENV, ROOT, Run, Server, free_port, group_alive, run_client, stop
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stub import STALL_S, WARM_UP

import client

TITLES = "Request Size, Server, Endpoint, Count, Min, Median, Mean, p90, p95, p99, Max"
NAMES = ("count", "min", "median", "mean", "p90", "p95", "p99", "max", "errors")
SHORT = "--idle 0.5 --duration 1 --large-mb 0.1 --pause 0.2"
STUB = f"uvicorn stub:app --app-dir {shlex.quote(str(ROOT / 'tests'))} --port"
GUNICORN = "gunicorn -k uvicorn_worker.UvicornWorker --chdir tests stub:app -b"

few = settings(max_examples=60, deadline=None, derandomize=True)


def run(url: str, arguments: str, cwd: Path = ROOT) -> Run:
    return run_client("--base-url", url, *shlex.split(f"{SHORT} {arguments}"), cwd=cwd)


def local(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def reports(stdout: str) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """The dicts on stdout by server and endpoint."""
    found = re.findall(r"^# (.+), (\S+)\n(\{\n(?: .*\n)+\})$", stdout, re.MULTILINE)
    return {(server, path): ast.literal_eval(text) for server, path, text in found}


def table(stdout: str) -> list[list[str]]:
    """The cells of the Markdown table, without its titles and rule."""
    lines = [line for line in stdout.splitlines() if line.startswith("|")]
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert cells[0] == TITLES.split(", ")
    assert set("".join(cells[1])) == set("-:")
    return cells[2:]


def assert_reports(stdout: str, expected: list[tuple[str, str]]) -> None:
    """A dict for each server and endpoint, consistent in itself and with the table."""
    assert list(reports(stdout)) == expected
    rows = []
    for (server, path), report in reports(stdout).items():
        assert list(report) == ["idle", "small", "large"]
        for kind, row in report.items():
            assert tuple(row) == NAMES
            values = [value for name, value in row.items() if name != "errors"]
            low, median, mean, *high = values[1:]
            assert 0 < low <= median <= high[0] and high == sorted(high)
            assert low <= mean <= high[-1]
            assert all(round(value, 1) == value for value in values)
            assert row["count"] > 0 == row["errors"]
            rows.append([kind, server, path, *map(str, values)])
    assert [[row[0].split()[0], *row[1:]] for row in table(stdout)] == rows


def wait_until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.05)


def seen_by(url: str, path: str) -> Counter[str]:
    """What a stub counted on a path."""
    return Counter(httpx.get(f"{url}/counts").json().get(path))


def is_open(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def child_pids(pid: int) -> list[int]:
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    rows = (map(int, line.split()) for line in listing.splitlines())
    return [child for child, parent in rows if parent == pid]


# Runs to the end.


def test_starts_the_server_itself(tmp_path: Path) -> None:
    """With no server there, from any folder, the client starts server.py, measures it and stops it."""
    port, name = free_port(), "uvicorn server:app"
    done = run(local(port), "", cwd=tmp_path)
    assert done.status == 0, done.stderr
    assert_reports(done.stdout, [(name, "/ping"), (name, "/pong")])
    assert name in done.stderr
    assert re.search(r"^# .*\bparse \d+\.\d", done.stdout, re.MULTILINE)
    assert not is_open(port)


def test_serves_commands_in_turn() -> None:
    """Each --serve command is started, measured under its own text, and stopped before the next."""
    port = free_port()
    servers = [f"{STUB} {port}", f"{GUNICORN} 127.0.0.1:{port}"]
    flags = " ".join(f"--serve {shlex.quote(server)}" for server in servers)
    done = run(local(port), f"{flags} --endpoint /a /b")
    assert done.status == 0, done.stderr
    expected = [(server, path) for server in servers for path in ("/a", "/b")]
    assert_reports(done.stdout, expected)
    assert not is_open(port)


@pytest.mark.parametrize("reuse", ["client", "connection", "none"])
def test_counts_what_the_server_saw(stub: Server, tmp_path: Path, reuse: str) -> None:
    """All requests but the warm-up's are counted, and came on as many connections as --reuse says."""
    path, file = f"/{reuse}", tmp_path / "json"
    flags = f"--endpoint {path} --rate 20 --reuse {reuse} --json {file}"
    done = run(stub.url, flags)
    assert done.status == 0, done.stderr
    assert_reports(done.stdout, [(stub.url, path)])
    assert stub.url in done.stderr and "uvicorn" not in done.stderr
    counts = {
        kind: row["count"] for kind, row in reports(done.stdout)[stub.url, path].items()
    }
    assert (counts["idle"], counts["small"]) == (10, 20)
    samples = json.loads(file.read_text())["runs"][0]["samples"]
    assert Counter(sample[0] for sample in samples) == counts
    saw = seen_by(stub.url, path)
    assert saw["small"] - 10 - 20 >= WARM_UP["small"]
    assert saw["large"] - counts["large"] == WARM_UP["large"]
    requests = saw["small"] + saw["large"]
    if reuse == "connection":
        assert saw["connections"] < requests / 4
    else:  # the system may have used a port twice
        assert 0.9 * requests < saw["connections"] <= requests


def test_closed_loop_waits_for_the_answer(stub: Server) -> None:
    """Only without --closed-loop is a small request sent before the last one's answer."""
    most = {}
    for path, flag in {"/open/slow": "", "/closed/slow": "--closed-loop"}.items():
        assert run(stub.url, f"--endpoint {path} {flag}").status == 0
        most[path] = seen_by(stub.url, path)["at_once"]
    assert most["/closed/slow"] == 1
    assert most["/open/slow"] > 2  # 50 a second that take 0.1 s each make 5


def test_piles_up_without_loss(stub: Server) -> None:
    """500 requests a second that get no answer are all sent, and counted as errors."""
    path = "/piled/never"
    flags = f"--endpoint {path} --rate 500 --timeout 3 --idle 0.1 --duration 4"
    done = run(stub.url, flags)
    assert done.status == 1, done.stderr
    report = reports(done.stdout)[stub.url, path]
    assert report["idle"] == {"count": 0, "errors": 50}
    assert report["small"] == {"count": 0, "errors": 2000}
    assert "2000 x timeout" in done.stderr
    assert seen_by(stub.url, path)["small"] == WARM_UP["small"] + 50 + 2000


# Wrong usage, and no server.


@pytest.mark.parametrize(
    "arguments",
    [
        *(f"--rate {value}" for value in ("0", "-1", "nan", "inf", "x")),
        *(f"--base-url {url}" for url in ("foo", "http://[::1", "ftp://127.0.0.1")),
        *("--duration 0", "--timeout 0", "--idle -1", "--pause nan", "--large-mb 0"),
        *("--endpoint ping", "--reuse sometimes", "--unknown", "--serve ''"),
        *('''--serve "'"''', "--json /missing/file", "--json /", "--plot x.pdf"),
    ],
)
def test_refuses_wrong_usage(arguments: str) -> None:
    """A bad argument ends the client before it measures: one line, status 2."""
    done = run_client(*shlex.split(arguments))
    assert (done.status, done.stdout) == (2, "")
    assert len(list(filter(str.strip, done.stderr.splitlines()))) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("--small-kb 0.001", "bytes"),
        ("--large-mb 0.000001", "bytes"),
        ("--serve no-such-command", "no-such-command"),
        ("--serve \"sh -c 'echo cannot begin; exit 3'\"", "cannot begin"),
        ("--base-url http://no-such-host.invalid:{port}", "no-such-host.invalid"),
        ("--base-url {stub.url} --serve 'sleep 60'", "{stub.port}"),
    ],
)
def test_cannot_measure(stub: Server, arguments: str, hint: str) -> None:
    """A body that is too small, no server, one that ends, or a taken port: why, and status 2."""
    port = free_port()
    done = run(local(port), arguments.format(port=port, stub=stub))
    assert (done.status, done.stdout) == (2, "")
    assert hint.format(stub=stub) in done.stderr
    assert "Traceback" not in done.stderr


# Interrupted, killed, watched.


@contextmanager
def started(
    url: str, arguments: str, cwd: Path, stdout: int, stderr: int
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "client.py"), "--base-url", url]
        + shlex.split(f"{SHORT} {arguments}"),
        cwd=cwd,
        env=ENV,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        stop(process)


def end(folder: Path, signum: signal.Signals) -> tuple[int, str, str]:
    """Signal a client in mid-run: its status, stdout and stderr, once all that it started is gone."""
    port, path = free_port(), "/x/stall"
    flags = f"--serve '{STUB} {port}' --endpoint {path} --duration 60 --pause 0"

    def is_under_load() -> bool:
        return is_open(port) and seen_by(local(port), path)["large"] > 2

    groups: list[int] = []
    pipe = subprocess.PIPE
    try:
        with started(
            local(port), f"{flags} --json json", folder, pipe, pipe
        ) as process:
            wait_until(is_under_load)
            groups = [os.getpgid(pid) for pid in child_pids(process.pid)]
            assert groups and process.pid not in groups
            time.sleep(STALL_S / 2)  # to the middle of the next large request
            process.send_signal(signum)
            stdout, stderr = process.communicate(timeout=30)
        wait_until(lambda: not any(map(group_alive, groups)), 10)
        assert not is_open(port)
    finally:
        for group in filter(group_alive, groups):
            os.killpg(group, signal.SIGKILL)
    return process.returncode, stdout.decode(), stderr.decode()


def test_interrupted(tmp_path: Path) -> None:
    """Ctrl-C ends the server, and what was measured is printed, with what was in the air as errors."""
    status, stdout, stderr = end(tmp_path, signal.SIGINT)
    assert status == 130
    assert "interrupted" in stderr and "Traceback" not in stderr
    assert len(table(stdout)) == 3
    (report,) = reports(stdout).values()
    (saved,) = json.loads((tmp_path / "json").read_text())["runs"]
    assert saved["statistics"] == report
    sent = Counter(sample[0] for sample in saved["samples"])
    assert sent == {kind: row["count"] + row["errors"] for kind, row in report.items()}
    assert all(row["count"] > 0 for row in report.values())
    errors = [sample[4] for sample in saved["samples"] if sample[4]]
    assert errors and set(errors) == {"interrupted"}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_the_server_does_not_outlive_the_client(
    tmp_path: Path, signum: signal.Signals
) -> None:
    """Whatever ends the client also ends the server that it started."""
    status, _, stderr = end(tmp_path, signum)
    assert status != 0
    assert "Traceback" not in stderr


def test_reader_of_stdout_is_gone(stub: Server, tmp_path: Path) -> None:
    """When nobody reads stdout any more (client.py | head -1), the client ends in order."""
    flags, pipe = "--endpoint /gone", subprocess.PIPE
    with started(stub.url, flags, tmp_path, pipe, pipe) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        stderr = process.stderr.read().decode()
        assert process.wait(30) != 0
    assert "Traceback" not in stderr


def test_progress_only_in_a_terminal(stub: Server, tmp_path: Path) -> None:
    """A bar that names the endpoint is drawn on a terminal, and none anywhere else."""
    flags, nowhere = "--endpoint /progress", subprocess.DEVNULL
    with started(stub.url, flags, tmp_path, nowhere, subprocess.PIPE) as process:
        assert b"\r" not in process.communicate(timeout=30)[1]
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with started(stub.url, flags, tmp_path, nowhere, stderr) as process:
        os.close(stderr)
        output = b""
        while select.select([terminal], [], [], 30)[0]:
            try:
                chunk = os.read(terminal, 65536)
            except OSError:  # how Linux says that this was all
                break
            if not chunk:  # how macOS says so
                break
            output += chunk
        assert process.wait(30) == 0
    os.close(terminal)
    lines = output.decode().split("\r\n")
    redrawn = [text for line in lines for text in line.split("\r")[:-1]]
    assert any("/progress" in text for text in redrawn)


# Pure functions.


@few
@given(st.sampled_from(["small", "large"]), st.integers(30, 30_000))
@example("large", 2_000_000)
def test_make_body(name: str, size_bytes: int) -> None:
    """A body has the size asked for, distinct keys of ten letters, and the answer given with it."""
    content, expected = client.make_body(name, size_bytes)
    assert abs(len(content) - size_bytes) <= size_bytes / 100
    document = json.loads(content)
    assert list(document) == ["name", "data"]
    data = document["data"]
    assert content.count(b":") == len(data) + 2
    assert all(len(key) == 10 and set(key) <= set(string.ascii_letters) for key in data)
    assert all(type(value) is int and 1 <= value <= 10**6 for value in data.values())
    maxval = max(data.values(), default=0)
    assert expected == {"name": name, "count": len(data), "maxval": maxval}


def test_make_body_is_always_the_same() -> None:
    """Another process with another hash seed makes the same body."""
    code = "import client, sys; sys.stdout.buffer.write(client.make_body('large', 9999)[0])"
    for seed in ("1", "2"):
        made = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=ENV | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        assert made == client.make_body("large", 9999)[0]


@pytest.mark.parametrize(
    ("rate_hz", "duration_s", "expected_s"),
    [
        (50, 0.1, [0, 0.02, 0.04, 0.06, 0.08]),
        (
            100,
            0.07,
            [0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06],
        ),  # 100 * 0.07 > 7 in floats
        (0.1, 30, [0, 10, 20]),
        (2, 1.2, [0, 0.5, 1]),
        (4, 0, []),
    ],
)
def test_due_offsets(
    rate_hz: float, duration_s: float, expected_s: list[float]
) -> None:
    """The schedule is what one computes by hand."""
    assert client.due_offsets_s(rate_hz, duration_s) == pytest.approx(expected_s)


@few
@given(st.integers(1, 1000), st.integers(1, 20))
def test_due_offsets_are_even(rate_hz: int, duration_s: int) -> None:
    """rate * duration requests are due, from 0 on, 1/rate apart, within the duration."""
    offsets_s = client.due_offsets_s(rate_hz, duration_s)
    assert len(offsets_s) == rate_hz * duration_s
    assert offsets_s[0] == 0 and offsets_s[-1] < duration_s
    gaps_s = [after - before for before, after in pairwise(offsets_s)]
    assert gaps_s == pytest.approx([1 / rate_hz] * len(gaps_s))


def test_statistics_by_hand() -> None:
    """Percentiles are interpolated linearly, and all is rounded to one decimal."""
    values = [4, 10.0, 25.0, 25.0, 37.0, 38.5, 39.7, 40.0, 2]
    expected = dict(zip(NAMES, values))
    assert client.statistics([40.0, 10.0, 30.04, 20.0], errors=2) == expected
    assert client.statistics([], errors=3) == {"count": 0, "errors": 3}


@few
@given(st.lists(st.floats(0, 1e5), min_size=2), st.integers(0, 9))
def test_statistics(latencies_ms: list[float], errors: int) -> None:
    """The standard library comes to the same, but for the rounding to one decimal."""
    cuts_ms = statistics.quantiles(latencies_ms, n=100, method="inclusive")
    middle_ms = statistics.median(latencies_ms), statistics.fmean(latencies_ms)
    low_ms, high_ms = min(latencies_ms), max(latencies_ms)
    high_cuts_ms = cuts_ms[89], cuts_ms[94], cuts_ms[98]
    values = [len(latencies_ms), low_ms, *middle_ms, *high_cuts_ms, high_ms, errors]
    found = client.statistics(latencies_ms, errors)
    assert found == pytest.approx(dict(zip(NAMES, values)), abs=0.0501, rel=0)
