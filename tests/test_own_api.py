"""The client on somebody's own API: any requests, secret headers, TLS, limits; and the fix."""

import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import harness as h
import measure as m
import pytest
import trustme

OWN_API = "uvicorn own_api:app --app-dir tests --port {port} --no-access-log"
TOKEN = "a-secret"
BEARER = f"--header 'Authorization: Bearer {TOKEN}'"
QUICK = "--idle 0.5 --duration 1 --pause 0.3 --small 'GET /health'"
ECHO = f"{QUICK} {BEARER} --large 'PUT /x/echo @any'"
LARGE = f"{QUICK} --large 'POST /documents @big.json'"
RIGHT = f"{LARGE} {BEARER}"
UNTOLD = ("idle p99 > 99", "large p90 > 1", "idle max > 1")  # too few samples, and none


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    rows = [{"id": i, "tags": ["red", "green", f"t{i}"]} for i in range(200_000)]
    for name, count, size in (("big", 2_000, 97_000), ("huge", 200_000, 9_300_000)):
        body = json.dumps({"records": rows[:count]})
        (folder / f"{name}.json").write_text(body.ljust(size))
    (folder / "any").write_bytes(b"\xff\x00 any bytes " + TOKEN.encode())
    authority = trustme.CA()
    authority.cert_pem.write_to_path(f"{folder}/ca.pem")
    cert = authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem
    cert.write_to_path(f"{folder}/cert.pem")
    return folder


@pytest.fixture(scope="module")
def outcome(stub: h.Server, folder: Path) -> m.Outcome:
    """All runs at once, as they mostly wait."""
    kept = f"{RIGHT} --connections keep-alive --idle 0"
    kept += "".join(f" --fail-if '{condition}'" for condition in UNTOLD)
    ca = {"SSL_CERT_FILE": f"{folder}/ca.pem"}
    tls_api = f"{OWN_API} --ssl-certfile {folder}/cert.pem"
    with (
        h.serve(OWN_API) as api,
        h.serve(tls_api) as tls,
        socket.create_server(("127.0.0.1", 0)) as sock,
    ):
        silent = f"http://127.0.0.1:{sock.getsockname()[1]}"
        nobody = f"http://127.0.0.1:{h.free_port()}"
        csv, no = "content-type: text/csv; a=b", f"--large 'POST /no/{TOKEN} @big.json'"
        log = f"--serve \"sh -c 'echo {TOKEN}$((40 + 2)); exit 3'\""
        runs: dict[str, tuple[Any, ...]] = {
            "right": (api.url, f"{RIGHT} --plot own.svg", folder),
            "echo": (stub.url, ECHO, folder),
            "typed": (stub.url, f"{ECHO} --header '{csv}'", folder),
            "path": (api.url, f"{RIGHT} {no}", folder),
            "silent": (silent, f"{RIGHT} --timeout 5.1", folder),
            "log": (nobody, f"{RIGHT} {log}", folder),
            "malformed": (api.url, f"{LARGE} --header={TOKEN}", folder),
            "none": (api.url, LARGE, folder),
            "unknown CA": (tls.url, RIGHT, folder),
            "tls": (tls.url, RIGHT, folder, ca),
            "tls kept": (tls.url, kept, folder, ca),
        }
        return m.together({name: (m.measure, *run) for name, run in runs.items()})


def test_measures_any_requests(outcome: m.Outcome) -> None:
    """--small and --large are sent as they are, also over TLS, any 2xx is right, reports tell."""
    for name, status in {"right": 0, "tls": 0, "tls kept": 3}.items():
        done = outcome[name]
        assert done.status == status, done.stderr
        ((heading, report),) = m.reports(done.stdout).items()
        server = done.saved["runs"][0]["server"]
        assert heading == f"{server}, POST /documents, 97 kB; GET /health"
        assert all(row["errors"] == 0 for row in report.values())
        requests = [row[0] for row in m.table(done.stdout)]
        assert requests[0] == "idle (GET /health)"
        assert requests[-1] == "large (POST /documents, 97 kB)"
        assert done.saved["parameters"]["large"].startswith("POST /documents")
        assert done.saved["parameters"]["header"] == ["Authorization: ***"]
    for text in (condition.partition(" >")[0] for condition in UNTOLD):
        assert f"{text} cannot be told: too few samples" in outcome["tls kept"].stderr


def test_without_success(outcome: m.Outcome, folder: Path) -> None:
    """The run stops with 2 and what the server says, a file is sent as it is, no secret shown."""
    for name, parts in {
        "none": ("/documents", "status 401", "wrong token"),
        "path": ("/no/***", "status 404", "Not Found"),
        "echo": (r"APPLICATION/JSON b'\xff\x00 any bytes ***'",),
        "typed": (r"TEXT/CSV; A=B b'\xff\x00 any bytes ***'",),
        "silent": ("timeout",),
        "log": ("***42",),
        "malformed": ("--header",),
        "unknown CA": ("certificate", "SSL_CERT_FILE"),
    }.items():
        done = outcome[name]
        assert (done.status, done.stdout) == (2, "")
        assert all(part in done.stderr for part in parts), done.stderr
    texts = [f"{done.stdout}{done.stderr}{done.saved}" for done in outcome.values()]
    texts.append((folder / "own.svg").read_text())
    assert not [text for text in texts if TOKEN in text]


def test_the_readme_fixes_it(folder: Path) -> None:
    """The README's app: /fixed keeps `during` low where /documents does not; --fail-if tells."""
    file, readme = h.ROOT / "tests" / "own_api.py", (h.ROOT / "README.md").read_text()
    assert file.read_text() in re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    shutil.copy(file, folder / "main.py")
    flags = f"{QUICK} {BEARER} --idle 0 --pause 0 --fail-if 'during p95 > "
    before_flags = f"{flags}0.1' --large 'POST /documents @huge.json'"
    after_flags = f"{flags}30000' --large 'POST /fixed @huge.json'"
    with h.serve("uvicorn main:app --port {port}", cwd=folder) as server:
        before = m.measure(server.url, before_flags, folder)
        after = m.measure(server.url, after_flags, folder)
    p95_ms = before.statistics("during")["p95"]
    assert p95_ms > 3 * after.statistics("during")["p95"]
    late = "the client was late"  # on a busy machine nothing can be told
    assert before.status == 3 and (after.status == 0 or late in after.stderr)
    assert late in before.stderr or f"{p95_ms} ms, over 0.1 ms" in before.stderr
