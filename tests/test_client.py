"""The contract of client.py: its command line, its output and its pure functions."""

import contextlib
import json
import os
import pty
import re
import runpy
import select
import shlex
import signal
import sys
import time
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from subprocess import PIPE
from typing import Any

import harness as h
import measure as m
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stub import STALL_S, WARM_UP

import client

WAYS = ("new", "keep-alive", "new-client")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
PORT, NOBODY = h.free_port(), f"http://127.0.0.1:{h.free_port()}"
SERVERS = [server.format(port=PORT) for server in (m.STUB, m.GUNICORN)]
WRONG = f"""
--rate 0 | --rate -1 | --rate nan | --rate inf | --rate x | --rate 9999999 | --duration 0
| --base-url foo | --base-url http://[::1 | --base-url ftp://a
| --timeout 0 | --idle -1 | --pause nan | --large-mb 0 | --endpoint ping | --serve ''
| --connections some | --unknown | --json /missing/file | --json /
| --plot x.pdf | --uploads 0 | --uploads 1.5 | --large 'GET /x' | --small 'GET /x'
| --small 'GET /x' --large 'POST x' | --small 'GET /x' --large 'GET /x' --endpoint /x
| --header x | --header 'a b: c' | --fail-if 'during p98 > 5' | --fail-if 'late p95 > 5'
| --base-url {NOBODY} --small 'GET /' --large 'POST / @missing.json' -> missing.json
| --base-url {NOBODY} --small-kb 0.001 | --plot x.png -> matplotlib
"""
REFUSED = {  # servers that cannot be measured, and what stderr says of it
    "--endpoint /explicit": NOBODY,
    "--serve no-such-command": "no-such-command",
    "--serve \"sh -c 'echo cannot begin; exit 3'\"": "cannot begin",
    "--serve \"sh -c 'exit 3'\"": "exit 3",
}


def under_way(url: str, flags: str, cwd: Path, stderr: int = PIPE) -> Any:
    words = shlex.split(f"{m.SHORT} --base-url {url} {flags}")
    return h.started([*m.CLIENT, *words], PIPE, stderr, cwd=cwd)


def served(port: int, *commands: str) -> str:
    """The flags for servers that the client starts."""
    serve = [f" --serve {shlex.quote(text.format(port=port))}" for text in commands]
    return f"--base-url http://127.0.0.1:{port}{''.join(serve)}"


def end(signum: signal.Signals, folder: Path) -> tuple[int, str, str]:
    """Signal a client in mid-run: status, stdout, stderr, once all that it started is gone."""
    port, path = h.free_port(), "/x/stall"
    url, groups = f"http://127.0.0.1:{port}", list[int]()
    flags = f"{served(port, m.STUB)} --endpoint {path}"
    flags += f" --duration 60 --pause 0 --json {signum.name}"
    try:
        with under_way(url, flags, folder) as process:
            h.wait_until(lambda: h.is_open(port) and m.seen_by(url, path)["large"] > 2)
            groups = [os.getpgid(pid) for pid in h.children(process.pid)]
            assert groups and process.pid not in groups
            time.sleep(STALL_S / 2)  # to the middle of the next large request
            process.send_signal(signum)
            stdout, stderr = process.communicate(timeout=30)
        h.wait_until(lambda: not any(map(h.group_alive, groups)), 10)
        assert not h.is_open(port)
    finally:
        for group in filter(h.group_alive, groups):
            os.killpg(group, signal.SIGKILL)
    return process.returncode, stdout.decode(), stderr.decode()


def leave(url: str, folder: Path) -> str:
    """Read one line of the client's stdout and no more: its stderr."""
    with under_way(url, "--endpoint /gone /on --json gone", folder) as process:
        process.stdout.readline()
        process.stdout.close()
        process.wait(30)
        return str(process.stderr.read(), "utf-8")


def watch(url: str, folder: Path) -> tuple[int, str]:
    """The client's status, and what it shows on a terminal."""
    terminal, stderr = pty.openpty()
    chunks = [b"."]
    with under_way(url, f"--endpoint /progress/{'x' * 40}", folder, stderr) as process:
        os.close(stderr)
        with contextlib.suppress(OSError):  # how Linux says that this was all
            while chunks[-1] and select.select([terminal], [], [], 30)[0]:
                chunks.append(os.read(terminal, 65536))  # empty: how macOS says so
        os.close(terminal)
        return process.wait(30), b"".join(chunks).decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("client")


@pytest.fixture(scope="module")
def outcome(stub: h.Server, folder: Path) -> m.Outcome:
    """All runs at once, as they mostly wait."""
    late = f"{served(h.free_port(), m.STUB)} --idle 0.1 --duration 0.3 --rate 4000"
    flags = {
        "serve": f"{served(PORT, *SERVERS)} --endpoint /a --uploads 2",
        "open": "--endpoint /open/slow /open/flaky --uploads 2 --plot open.svg",
        "closed": "--endpoint /closed/slow --closed-loop --plot closed.svg",
        "late": f"{late} --endpoint /late --fail-if 'small max > 99999'",
        "taken": "--serve 'sleep 60'",
    }
    for way in WAYS:
        flags[way] = f"--endpoint /{way}/chunked --rate 20 --connections {way}"
    flags["new"] += " --plot new.png"
    flags |= {text: f"--base-url {NOBODY} {text}" for text in REFUSED}
    jobs: dict[str, Any] = {}
    for name, text in flags.items():
        jobs[name] = m.measure, stub.url, f"{m.SHORT} {text}", folder
    jobs |= {signum.name: (end, signum, folder) for signum in SIGNALS}
    jobs |= {do.__name__: (do, stub.url, folder) for do in (leave, watch)}
    if not h.is_open(8000):
        demo = f"{m.SHORT} --idle 0.2 --duration 0.6"
        jobs = {"demo": (m.measure, "", demo, folder)} | jobs
    return m.together(jobs)


def assert_reports(stdout: str, expected: list[str]) -> None:
    """A dict under each heading, consistent in itself and with the table, and in words."""
    assert list(m.reports(stdout)) == expected
    rows = []
    for heading, report in m.reports(stdout).items():
        assert tuple(report) == m.CLASSES
        server, endpoint, *at_once = heading.rsplit(", ", heading.count(" at once") + 1)
        for kind, row in report.items():
            assert tuple(row) == ("count", *m.COLUMNS, "errors")
            assert row["errors"] == 0 < row["count"] or kind == "during"
            if values := [row[name] for name in m.COLUMNS if row[name] is not None]:
                low, median, mean, *high = values
                assert 0 < low <= median <= high[0] and high == sorted(high)
                assert low <= mean <= high[-1]
            for name, needed in m.NEEDED.items():
                assert (row[name] is None) == (row["count"] < needed)
            cells = [row[name] for name in ("count", "errors", *m.COLUMNS)]
            shown = ["-" if value is None else str(value) for value in cells]
            size = ", ".join(["0.1 MB", *at_once]) if kind == "large" else "1 kB"
            rows.append([f"{kind} ({size})", server, endpoint, *shown])
    assert m.table(stdout) == rows
    waited = "while a large request was in flight a small one waited .+ at most; alone "
    words = re.findall(f"(?m)^# (?:{waited}|no small request was answered )", stdout)
    assert len(words) == len(expected)


def test_starts_servers(outcome: m.Outcome) -> None:
    """The default command starts server.py, --serve commands in turn, and all are stopped."""
    done = outcome["serve"]
    assert done.status == 0, done.stderr
    assert_reports(done.stdout, [f"{server}, /a, 2 at once" for server in SERVERS])
    assert not h.is_open(PORT)
    if "demo" not in outcome:
        pytest.skip("something listens on the default port")
    done = outcome["demo"]
    assert done.status == 0, done.stderr
    paths = ("/ping", "/pong", "/pong?offload=process")
    assert_reports(done.stdout, [f"uvicorn server:app, {path}" for path in paths])
    assert "starting" in done.stderr and "uvicorn server:app" in done.stderr
    assert all(50 < run["peak_memory_mb"] < 1000 for run in done.saved["runs"])
    stages = [list(sample["stages_ms"]) for sample in done.samples("large", run=1)]
    assert ["read", "parse", "validate", "total"] in stages and not h.is_open(8000)


def test_counts_what_the_server_saw(outcome: m.Outcome, stub: h.Server) -> None:
    """All requests but the warm-up's are counted, on as many connections and at once as it says."""
    for way in WAYS:
        done, saw = outcome[way], m.seen_by(stub.url, f"/{way}/chunked")
        assert done.status == 0, done.stderr
        assert_reports(done.stdout, [f"{stub.url}, /{way}/chunked"])
        assert stub.url in done.stderr and "starting" not in done.stderr
        idle, small, _, large = (done.statistics(k)["count"] for k in m.CLASSES)
        assert (idle, small, saw["small"]) == (10, 20, 30 + WARM_UP["small"])
        assert saw["large"] - large == WARM_UP["large"]
        requests = saw["small"] + saw["large"]
        if way == "keep-alive":
            assert saw["connections"] < 0.75 * requests
        else:  # the system may have used a port twice
            assert 0.9 * requests < saw["connections"] <= requests
    assert outcome["closed"].status == 0
    assert m.seen_by(stub.url, "/closed/slow")["at_once"] == 1
    # 50 a second that take 0.1 s each make 5
    assert m.seen_by(stub.url, "/open/slow")["at_once"] > 2


def test_files(outcome: m.Outcome, stub: h.Server, folder: Path) -> None:
    """--json has all samples, from which the figures follow; --plot draws a panel for each run."""
    done, saved = outcome["open"], outcome["open"].saved
    assert (saved["schema"], tuple(saved["columns"])) == (2, m.SAMPLE)
    begun_s = datetime.fromisoformat(saved["started"]).timestamp()
    assert 4 < done.ended_s - begun_s < 120  # the load takes over 4 s
    assert [saved["parameters"][name] for name in ("rate", "large_mb")] == [50, 0.1]
    assert "--uploads 2 " in saved["command"]
    assert saved["client_versions"]["numpy"] == np.__version__
    assert saved["machine"]["cores"] == os.cpu_count()
    printed = m.reports(done.stdout).values()
    endpoints = ("/open/slow", "/open/flaky")
    for i, (run, report) in enumerate(zip(saved["runs"], printed, strict=True)):
        about = (run["server"], run["endpoint"], run["uploads"])
        assert about == (stub.url, endpoints[i], 2)
        assert run["peak_memory_mb"] is None and isinstance(run["warnings"], list)
        assert run["statistics"] == report
        kinds = {kind: done.samples(kind, run=i) for kind in ("idle", "small", "large")}
        spans = [(sample["sent_s"], sample["done_s"]) for sample in kinds["large"]]
        hits = [[a <= s["due_s"] < b for a, b in spans] for s in kinds["small"]]
        kinds["during"] = [s for s, hit in zip(kinds["small"], hits) if any(hit)]
        for kind, chosen in kinds.items():
            right = [s for s in chosen if not s["error"]]
            values_ms = [1000 * (s["done_s"] - s["due_s"]) for s in right]
            errors = len(chosen) - len(right)
            assert report[kind] == client.summarize(values_ms, errors)
    assert (folder / "new.png").read_bytes().startswith(b"\x89PNG")
    for name, panels in {"open": 2, "closed": 1}.items():
        text = (folder / f"{name}.svg").read_text()
        assert len(re.findall(r'id="axes_\d', text)) == panels
        assert text.count("waited over 0.1 s") == panels


def test_lateness(outcome: m.Outcome) -> None:
    """A client that is itself too slow says so, and in JSON, and no --fail-if can be told."""
    done = outcome["late"]
    for kind, limit_ms in {"idle": 5, "small": 20}.items():
        late_ms = [1000 * (s["sent_s"] - s["due_s"]) for s in done.samples(kind)]
        assert np.percentile(late_ms, 99) > limit_ms
        warnings = done.saved["runs"][0]["warnings"]
        (warning,) = [text for text in warnings if text.startswith(kind)]
        assert "late" in warning and "--rate" in warning and warning in done.stderr
    assert done.status == 3
    assert "small max cannot be told: the client was late" in done.stderr


def test_refuses_wrong_usage(monkeypatch: Any, capfd: Any) -> None:
    """Wrong usage, and a body, file or library that is missing: status 2, and one line why."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for text in WRONG.split("|"):
        flags, _, why = text.strip().partition(" -> ")
        monkeypatch.setattr("sys.argv", ["client.py", *shlex.split(flags)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(m.CLIENT[1], run_name="__main__")
        stdout, stderr = capfd.readouterr()
        assert (ended.value.code, stdout) == (2, ""), text
        assert why in stderr and len(stderr.strip().splitlines()) == 1, stderr


def test_refuses_servers(outcome: m.Outcome) -> None:
    """A server that is not there, does not start or has its port taken is status 2, and why."""
    for text, why in (REFUSED | {"taken": "http://127.0.0.1:"}).items():
        done = outcome[text]
        assert (done.status, done.stdout) == (2, "") and why in done.stderr
    assert "starting" not in outcome["--endpoint /explicit"].stderr


def test_ends_in_order(outcome: m.Outcome, folder: Path) -> None:
    """Signals end the server too, Ctrl-C and SIGTERM print all so far; `| head -1` does no harm."""
    for signum in SIGNALS:
        status, stdout, stderr = outcome[signum.name]
        assert "Traceback" not in stderr
        if signum in (signal.SIGHUP, signal.SIGKILL):
            assert status == -signum
            continue
        assert status == 130 and "interrupted" in stderr
        (report,) = m.reports(stdout).values()
        (saved,) = json.loads((folder / signum.name).read_text())["runs"]
        assert saved["statistics"] == report and len(m.table(stdout)) == 4
        kinds = [sample[0] for sample in saved["samples"]]
        for kind in set(kinds):
            assert kinds.count(kind) == report[kind]["count"] + report[kind]["errors"]
        errors = {sample[4] for sample in saved["samples"] if sample[4]}
        assert errors == {"interrupted"}
    assert "Traceback" not in outcome["leave"]
    assert (folder / "gone").exists()


def test_progress_only_in_a_terminal(outcome: m.Outcome) -> None:
    """A terminal shows phase, seconds left and requests in flight in one line of 80 columns."""
    status, shown = outcome["watch"]
    redrawn = re.findall(r"\r\x1b\[K([^\r\n]*)", shown)
    lines = [line for line in redrawn if "in flight" in line]
    wanted = r"mixed: \d+ s left, \d+ in flight, 0 errors: .*/prog"
    assert status == 0 and any(re.match(wanted, line) for line in lines)
    assert all(len(line) < 80 for line in lines)
    assert "in flight" not in outcome["new"].stderr


def test_schedule(outcome: m.Outcome) -> None:
    """Small ones are due once in each slot of 1/rate, large ones --pause apart, none while idle."""
    for name, uploads, rate_hz in (("new", 1, 20), ("open", 2, 50)):
        idle, small, large = map(outcome[name].samples, ("idle", "small", "large"))
        for samples, duration_s in ((idle, 0.5), (small, 1)):
            assert all(s["due_s"] <= s["sent_s"] <= s["done_s"] for s in samples)
            due_s = np.array(sorted(s["due_s"] for s in samples))
            shift = (due_s - due_s[0]) * rate_hz - np.arange(rate_hz * duration_s)
            assert (abs(shift) < 1).all() and np.std(np.diff(due_s)) > 0.001
        assert len(large) > uploads
        begun_s = min(s["sent_s"] for s in [*small, *large])
        assert max(s["done_s"] for s in idle) <= begun_s
        changes = [(s["sent_s"], 1) for s in large] + [(s["done_s"], -1) for s in large]
        assert np.cumsum([change for _, change in sorted(changes)]).max() == uploads
        gaps_s = [b["sent_s"] - a["done_s"] for a, b in pairwise(large)]
        assert uploads > 1 or all(gap_s >= 0.199 for gap_s in gaps_s)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(["small", "large"]), st.integers(30, 30_000))
@example("large", 2_000_000)
def test_make_body(name: str, size_bytes: int) -> None:
    """A body has exactly the size asked for, keys of ten letters, and the answer given with it."""
    content, expected = client.make_body(name, size_bytes)
    document = json.loads(content)
    data = document["data"]
    assert len(content) == size_bytes and list(document) == ["name", "data"]
    assert content.count(b":") == len(data) + 2
    assert all(len(k) == 10 and k.isascii() and k.isalpha() for k in data)
    assert all(type(value) is int and 1 <= value <= 10**6 for value in data.values())
    maxval = max(data.values(), default=0)
    assert expected == {"name": name, "count": len(data), "maxval": maxval}
    assert client.make_body(name, size_bytes).content == content


def test_by_hand() -> None:
    """One is due in each slot; percentiles, timeouts and right answers are as the help says."""
    for rate_hz, duration_s, count in ((100, 0.07, 7), (2, 1.2, 3), (50, 20, 1000)):
        offsets_s = client.due_offsets_s(rate_hz, duration_s)  # 100 * 0.07 > 7
        assert [int(rate_hz * s) for s in offsets_s] == list(range(count))
        assert len({rate_hz * s % 1 for s in offsets_s}) == count
        assert offsets_s == client.due_offsets_s(rate_hz, duration_s)
    none = dict.fromkeys(m.COLUMNS)
    found = client.summarize([40.0, 10.0, 30.04, 20.0], errors=2)
    values: dict[str, Any] = {"min": 10.0, "median": 25.0, "mean": 25.0, "max": 40.0}
    assert found == none | values | {"count": 4, "errors": 2}
    assert client.summarize([], errors=3) == none | {"count": 0, "errors": 3}
    late = client.summarize([1.0] * 10, errors=11, waited_ms=[200.0] * 10)
    assert late["count"] == 10 and late["errors"] == 11
    assert late["p95"] == late["max"] == 200.0 and late["median"] == 100.5
    for name, value in {"p90": 8.1, "p95": 18.1, "p99": 98.0}.items():  # 0.9 * 9 ...
        assert client.summarize(range(m.NEEDED[name]))[name] == value
        assert client.summarize(range(m.NEEDED[name] - 1))[name] is None
    answers = b'{"a": 1}', b'{"a": 2}', b"no JSON"
    found_wrong = [client.classify(200, answer, {"a": 1}) for answer in answers]
    found_wrong += [client.classify(status, b"") for status in (201, 404)]
    assert found_wrong == [None, "wrong answer", "wrong answer", None, "status 404"]
    assert client.classify(201, answers[0], {"a": 1}) == "status 201"
