"""The contract of client.py: its command line, its output and its pure functions."""

import fcntl
import importlib.metadata
import json
import os
import pty
import re
import select
import shlex
import signal
import statistics
import string
import struct
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import (
    ENV,
    ROOT,
    Run,
    Server,
    children,
    client_command,
    free_port,
    group_alive,
    is_open,
    run_client,
    started,
    wait_until,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from measure import (
    CLASSES,
    COLUMNS,
    GUNICORN,
    NAMES,
    SAMPLE,
    SHORT,
    STUB,
    latencies_ms,
    measure,
    reports,
    seen_by,
    table,
    together,
)
from stub import STALL_S, WARM_UP

import client

few = settings(max_examples=60, deadline=None, derandomize=True)


def run(url: str, arguments: str, cwd: Path = ROOT, **env: str) -> Run:
    words = shlex.split(f"{SHORT} {arguments}")
    return run_client("--base-url", url, *words, cwd=cwd, env=env)


def local(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def assert_reports(stdout: str, expected: list[str]) -> None:
    """A dict under each heading, consistent in itself and with the table, and in words."""
    assert list(reports(stdout)) == expected
    rows = []
    for heading, report in reports(stdout).items():
        assert tuple(report) == CLASSES
        server, endpoint, *at_once = heading.rsplit(", ", heading.count(" at once") + 1)
        for kind, row in report.items():
            assert tuple(row) == NAMES
            assert row["errors"] == 0 < row["count"] or kind == "during"
            values = [row[name] for name in COLUMNS if row[name] is not None]
            if values:
                low, median, mean, *high = values
                assert 0 < low <= median <= high[0] and high == sorted(high)
                assert low <= mean <= high[-1]
            for name, needed in {"p90": 10, "p95": 20, "p99": 100}.items():
                assert (row[name] is None) == (row["count"] < needed)
            cells = [row[name] for name in ("count", "errors", *COLUMNS)]
            shown = ["-" if value is None else str(value) for value in cells]
            size = ", ".join(["0.1 MB", *at_once]) if kind == "large" else "1 kB"
            rows.append([f"{kind} ({size})", server, endpoint, *shown])
    assert table(stdout) == rows
    waited = r"while a large request was in flight a small one waited .+ \(median\), .+"
    waited += r" at most; alone .+ \(median\)|no small request was answered .*"
    assert len(re.findall(f"^# (?:{waited})$", stdout, re.MULTILINE)) == len(expected)


# Runs to the end.


def test_starts_the_server_itself(tmp_path: Path) -> None:
    """With no server there the default command starts server.py, from any folder, and stops it."""
    if is_open(8000):
        pytest.skip("something listens on the default port")
    words = f"{SHORT} --json json".split()
    done = run_client(*words, cwd=tmp_path)
    assert done.status == 0, done.stderr
    paths = ("/ping", "/pong", "/pong?offload=process")
    assert_reports(done.stdout, [f"uvicorn server:app, {path}" for path in paths])
    assert "starting" in done.stderr and "uvicorn server:app" in done.stderr
    saved = json.loads((tmp_path / "json").read_text())["runs"]
    assert all(50 < run["peak_memory_mb"] < 1000 for run in saved)
    stages = [dict(zip(SAMPLE, row))["stages_ms"] for row in saved[1]["samples"]]
    assert ["read", "parse", "validate", "total"] in map(list, stages)
    assert not is_open(8000)


def test_an_explicit_url_never_starts_the_demo() -> None:
    """Where nothing answers at an explicit --base-url the client starts nothing: status 2."""
    port = free_port()
    done = run(local(port), "")
    assert (done.status, done.stdout) == (2, "")
    assert local(port) in done.stderr and "starting" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_serves_commands_in_turn() -> None:
    """Each --serve command is started, measured under its own text, and stopped before the next."""
    port = free_port()
    servers = [STUB.format(port=port), GUNICORN.format(port=port)]
    flags = " ".join(f"--serve {shlex.quote(server)}" for server in servers)
    done = run(local(port), f"{flags} --endpoint /a --uploads 2")
    assert done.status == 0, done.stderr
    assert_reports(done.stdout, [f"{server}, /a, 2 at once" for server in servers])
    assert not is_open(port)


@pytest.fixture(scope="module")
def outcome(stub: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All runs at once, as they mostly wait."""
    jobs: dict[str, Callable[[], Any]] = {}

    def job(name: str, flags: str) -> None:
        folder = tmp_path_factory.mktemp(name)
        jobs[name] = lambda: measure(
            folder, stub.url, f"{SHORT} {flags} --plot {folder}/{name}"
        )

    for way in ("new", "keep-alive", "new-client"):
        job(f"{way}.svg", f"--endpoint /{way}/chunked --rate 20 --connections {way}")
    job("open.png", "--endpoint /open/slow /open/flaky --uploads 2")
    job("closed.svg", "--endpoint /closed/slow --closed-loop")
    return together(jobs)


@pytest.mark.parametrize("way", ["new", "keep-alive", "new-client"])
def test_counts_what_the_server_saw(
    outcome: dict[str, Any], stub: Server, way: str
) -> None:
    """All requests but the warm-up's are counted, on as many connections as --connections says."""
    measured, path = outcome[f"{way}.svg"], f"/{way}/chunked"
    assert measured.run.status == 0, measured.run.stderr
    assert_reports(measured.run.stdout, [f"{stub.url}, {path}"])
    assert stub.url in measured.run.stderr and "starting" not in measured.run.stderr
    counts = {kind: row["count"] for kind, row in measured.statistics().items()}
    assert (counts["idle"], counts["small"]) == (10, 20)
    saw = seen_by(stub.url, path)
    assert saw["small"] - 10 - 20 == WARM_UP["small"]
    assert saw["large"] - counts["large"] == WARM_UP["large"]
    requests = saw["small"] + saw["large"]
    if way == "keep-alive":
        assert saw["connections"] < requests / 4
    else:  # the system may have used a port twice
        assert 0.9 * requests < saw["connections"] <= requests


def test_closed_loop_waits_for_the_answer(
    outcome: dict[str, Any], stub: Server
) -> None:
    """Only without --closed-loop is a small request sent before the last one's answer."""
    assert outcome["closed.svg"].run.status == 0
    assert seen_by(stub.url, "/closed/slow")["at_once"] == 1
    # 50 a second that take 0.1 s each make 5
    assert seen_by(stub.url, "/open/slow")["at_once"] > 2


def test_json(outcome: dict[str, Any], stub: Server) -> None:
    """--json has how the figures came about and all samples, from which they follow exactly."""
    measured = outcome["open.png"]
    saved = measured.saved
    assert (saved["schema"], tuple(saved["columns"])) == (2, SAMPLE)
    begun = datetime.strptime(saved["started"], "%Y-%m-%dT%H:%M:%SZ")
    age_s = (datetime.now(UTC) - begun.replace(tzinfo=UTC)).total_seconds()
    assert 3 < age_s < 120  # when the load began, and two such runs take over 3 s
    assert saved["parameters"]["rate"] == 50
    assert saved["parameters"]["large_mb"] == 0.1
    assert "--uploads 2 " in saved["command"]
    assert saved["client_versions"]["httpx"] == importlib.metadata.version("httpx")
    assert saved["machine"]["cores"] == os.cpu_count()
    for i, run in enumerate(saved["runs"]):
        assert (run["server"], run["uploads"]) == (stub.url, 2)
        assert run["endpoint"] == ("/open/slow", "/open/flaky")[i]
        assert run["peak_memory_mb"] is None and isinstance(run["warnings"], list)
        printed = list(reports(measured.run.stdout).values())[i]
        assert run["statistics"] == printed
        for kind in ("idle", "small", "large"):
            samples = measured.samples(kind, run=i)
            values_ms = latencies_ms(samples)
            errors = len(samples) - len(values_ms)
            assert printed[kind] == client.summarize(values_ms, errors)


def test_plot(outcome: dict[str, Any]) -> None:
    """--plot draws a panel for each run, with the share of those that waited."""
    command = outcome["open.png"].saved["parameters"]["plot"]
    assert Path(command).read_bytes().startswith(b"\x89PNG")
    text = Path(outcome["closed.svg"].saved["parameters"]["plot"]).read_text()
    assert len(re.findall(r'id="axes_\d', text)) == 1
    assert "waited over 0.1 s" in text and "<!-- error -->" not in text


def test_lateness(stub: Server, tmp_path: Path) -> None:
    """A client that is itself too slow says so, and in JSON."""
    flags = f"{SHORT} --idle 0.3 --duration 0.5 --rate 150 --connections new-client"
    measured = measure(tmp_path, stub.url, f"--endpoint /late {flags}")
    for kind, limit_ms in {"idle": 5, "small": 20}.items():
        samples = measured.samples(kind)
        late_ms = np.percentile(
            [1000 * (s["sent_s"] - s["due_s"]) for s in samples], 99
        )
        assert (
            late_ms > limit_ms
        )  # it takes 20 ms of work for each, and one is due every 7
        found = measured.saved["runs"][0]["warnings"]
        (warning,) = [text for text in found if text.startswith(kind)]
        assert "late" in warning and "--rate" in warning
        assert warning in measured.run.stderr


# Wrong usage, and no server.


WRONG = [
    *(f"--rate {value}" for value in ("0", "-1", "nan", "inf", "x", "9999999")),
    *(f"--base-url {url}" for url in ("foo", "http://[::1", "ftp://a", "http://a:b@c")),
    *("--duration 0", "--timeout 0", "--idle -1", "--pause nan", "--large-mb 0"),
    *("--endpoint ping", "--connections some", "--unknown", "--serve ''"),
    *("""--serve "'" """, "--json /missing/file", "--json /", "--plot x.pdf"),
    *("--uploads 0", "--uploads 1.5", "--large 'GET /x'", "--small 'GET /x'"),
    *("--small 'GET /x' --large 'POST x'", "--header x", "--header 'a b: c'"),
    "--small 'GET /x' --large 'GET /x' --endpoint /x",
    *("--fail-if 'during p98 > 5'", "--fail-if 'late p95 > 5'"),
]


def test_refuses_wrong_usage() -> None:
    """A bad argument ends the client before it measures: one line, status 2."""
    jobs = {text: partial(run_client, *shlex.split(text)) for text in WRONG}
    with ThreadPoolExecutor(4) as pool:
        outcomes = dict(zip(jobs, pool.map(lambda job: job(), jobs.values())))
    for text, done in outcomes.items():
        assert (done.status, done.stdout) == (2, ""), text
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "Traceback" not in done.stderr


def test_cannot_measure(stub: Server) -> None:
    """A body that is too small, no file, no server, or a taken port: why, and status 2."""
    nobody = local(free_port())
    hints = {
        "--small-kb 0.001": "bytes",
        "--small 'GET /' --large 'POST / @missing.json'": "missing.json",
        "--serve no-such-command": "no-such-command",
        "--serve \"sh -c 'echo cannot begin; exit 3'\"": "cannot begin",
        "--serve \"sh -c 'exit 3'\"": f"{nobody}/ping",
        f"--base-url {stub.url} --serve 'sleep 60'": str(stub.port),
    }
    for arguments, done in together(
        {text: partial(run, nobody, text) for text in hints}
    ).items():
        assert (done.status, done.stdout) == (2, "")
        assert hints[arguments] in done.stderr
        assert "Traceback" not in done.stderr


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


# Interrupted, killed, watched.


@contextmanager
def under_way(
    url: str, arguments: str, stderr: int, cwd: Path
) -> Iterator[subprocess.Popen[bytes]]:
    words = shlex.split(f"{SHORT} {arguments}")
    command = client_command("--base-url", url, *words)
    with started(command, subprocess.PIPE, stderr, cwd=cwd) as process:
        yield process


def end(folder: Path, signum: signal.Signals) -> tuple[int, str, str]:
    """Signal a client in mid-run: status, stdout, stderr, once all that it started is gone."""
    port, path = free_port(), "/x/stall"
    serve = shlex.quote(STUB.format(port=port))
    flags = f"--serve {serve} --endpoint {path} --duration 60 --pause 0 --json json"

    def is_under_load() -> bool:
        return is_open(port) and int(seen_by(local(port), path).get("large", 0)) > 2

    groups: list[int] = []
    try:
        with under_way(local(port), flags, subprocess.PIPE, folder) as process:
            wait_until(is_under_load)
            groups = [os.getpgid(pid) for pid in children(process.pid)]
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


def test_ended_by_a_signal(tmp_path: Path) -> None:
    """Whatever ends the client ends its server; on Ctrl-C or SIGTERM all so far is printed,
    with what was in flight as errors.
    """
    ends = {}
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
        (tmp_path / signum.name).mkdir()
        ends[signum.name] = partial(end, tmp_path / signum.name, signum)
    for name, (status, stdout, stderr) in together(ends).items():
        assert "Traceback" not in stderr
        if name in ("SIGHUP", "SIGKILL"):
            assert status == -signal.Signals[name]
            continue
        assert status == 130 and "interrupted" in stderr
        (report,) = reports(stdout).values()
        (saved,) = json.loads((tmp_path / name / "json").read_text())["runs"]
        assert saved["statistics"] == report and len(table(stdout)) == 4
        sent = Counter(sample[0] for sample in saved["samples"])
        for kind, count in sent.items():
            assert count == report[kind]["count"] + report[kind]["errors"]
        errors = {sample[4] for sample in saved["samples"] if sample[4]}
        assert errors == {"interrupted"}


def test_reader_of_stdout_is_gone(stub: Server, tmp_path: Path) -> None:
    """When nobody reads stdout any more (client.py | head -1), the client ends in order."""
    flags = "--endpoint /gone --json json"
    with under_way(stub.url, flags, subprocess.PIPE, tmp_path) as process:
        assert process.stdout and process.stderr
        process.stdout.readline()
        process.stdout.close()
        stderr = process.stderr.read().decode()
        assert process.wait(30) != 0
    assert "Traceback" not in stderr and (tmp_path / "json").exists()


def test_progress_only_in_a_terminal(stub: Server, tmp_path: Path) -> None:
    """A terminal shows phase, seconds left and requests in flight in one line of 80 columns."""
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with under_way(stub.url, "--endpoint /progress", stderr, tmp_path) as process:
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
    redrawn = re.findall(r"\r\x1b\[K([^\r\n]*)", output.decode())
    lines = [line for line in redrawn if "in flight" in line]
    assert any(
        re.match(r"mixed: \d+ s left, \d+ in flight, 0 errors: .*/prog", line)
        for line in lines
    )
    assert all(len(line) < 80 for line in lines)


# Pure functions.


@few
@given(st.sampled_from(["small", "large"]), st.integers(30, 30_000))
@example("large", 2_000_000)
def test_make_body(name: str, size_bytes: int) -> None:
    """A body has exactly the size asked for, keys of ten letters, and the answer given with it."""
    content, expected = client.make_body(name, size_bytes)
    assert len(content) == size_bytes
    document = json.loads(content)
    assert list(document) == ["name", "data"]
    data = document["data"]
    assert content.count(b":") == len(data) + 2
    assert all(len(key) == 10 and set(key) <= set(string.ascii_letters) for key in data)
    assert all(type(value) is int and 1 <= value <= 10**6 for value in data.values())
    maxval = max(data.values(), default=0)
    assert expected == {"name": name, "count": len(data), "maxval": maxval}
    assert client.make_body(name, size_bytes).content == content


@few
@given(st.integers(1, 1000), st.integers(1, 20))
def test_due_offsets(rate_hz: int, duration_s: int) -> None:
    """rate * duration requests are due, one at a random moment of each slot, always the same."""
    offsets_s = client.due_offsets_s(rate_hz, duration_s)
    assert len(offsets_s) == rate_hz * duration_s
    assert all(i <= rate_hz * s < i + 1 for i, s in enumerate(offsets_s))
    assert offsets_s == client.due_offsets_s(rate_hz, duration_s)
    places = [rate_hz * s % 1 for s in offsets_s]
    assert len(set(places)) == len(places)


def test_due_offsets_by_hand() -> None:
    """A part of a slot at the end is a slot; no time, no requests."""
    assert len(client.due_offsets_s(100, 0.07)) == 7  # 100 * 0.07 > 7 in floats
    assert len(client.due_offsets_s(2, 1.2)) == 3
    assert client.due_offsets_s(4, 0) == []


def test_summarize_by_hand() -> None:
    """Percentiles are interpolated, all is rounded to one decimal, timeouts wait and are errors."""
    none = dict.fromkeys(COLUMNS)
    found = client.summarize([40.0, 10.0, 30.04, 20.0], errors=2)
    values: dict[str, Any] = {"min": 10.0, "median": 25.0, "mean": 25.0, "max": 40.0}
    assert found == none | values | {"count": 4, "errors": 2}
    assert client.summarize([], errors=3) == none | {"count": 0, "errors": 3}
    late = client.summarize([1.0] * 10, errors=11, waited_ms=[200.0] * 10)
    assert late["count"] == 10 and late["errors"] == 11
    assert late["p95"] == late["max"] == 200.0 and late["median"] == 100.5


@few
@given(st.lists(st.floats(0, 1e5), min_size=2, max_size=150), st.integers(0, 9))
def test_summarize(values_ms: list[float], errors: int) -> None:
    """The standard library comes to the same, but for the rounding, and None where it is too few."""
    cuts_ms = statistics.quantiles(values_ms, n=100, method="inclusive")
    found = client.summarize(values_ms, errors)
    middle_ms = statistics.median(values_ms), statistics.fmean(values_ms)
    expected = [min(values_ms), *middle_ms, *(cuts_ms[q - 1] for q in (90, 95, 99))]
    for name, value in zip(COLUMNS, [*expected, max(values_ms)]):
        if len(values_ms) < {"p90": 10, "p95": 20, "p99": 100}.get(name, 1):
            assert found[name] is None
        else:
            assert found[name] == pytest.approx(value, abs=0.0501, rel=0)
    assert (found["count"], found["errors"]) == (len(values_ms), errors)


@pytest.mark.parametrize(
    ("status", "content", "expected", "error"),
    [
        (200, b'{"a": 1}', {"a": 1}, None),
        (200, b'{"a": 2}', {"a": 1}, "wrong answer"),
        (200, b"no JSON", {"a": 1}, "wrong answer"),
        (201, b'{"a": 1}', {"a": 1}, "status 201"),
        (201, b"anything", None, None),
        (404, b"", None, "status 404"),
    ],
)
def test_classify(
    status: int, content: bytes, expected: Any, error: str | None
) -> None:
    """An answer is right if it is the expected one, or any 2xx where none is expected."""
    assert client.classify(status, content, expected) == error
