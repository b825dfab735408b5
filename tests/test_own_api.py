"""The client on somebody's own API: any requests, secret headers, TLS, limits; and the fix."""

import json
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from harness import ROOT, Run, Server, run_client, serve
from measure import reports, table, together

OWN_API = "uvicorn own_api:app --app-dir tests --port {port} --no-access-log"
TOKEN = "a-secret"
QUICK = ["--idle", "0.5", "--duration", "2", "--pause", "0.3", "--small", "GET /health"]


def batch(records: int) -> bytes:
    """A body of nested records, some 40 bytes each."""
    rows = [{"id": i, "tags": ["red", "green", f"t{i}"]} for i in range(records)]
    return json.dumps({"records": rows}).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    (folder / "big.json").write_bytes(batch(2_000))
    (folder / "huge.json").write_bytes(batch(200_000))  # about 9 MB
    return folder


@pytest.fixture(scope="module")
def api() -> Iterator[Server]:
    with serve(OWN_API) as server:
        yield server


def run(folder: Path, url: str, *arguments: str, token: str = TOKEN, **env: str) -> Run:
    header = ("--header", f"Authorization: Bearer {token}") if token else ()
    words = ("--base-url", url, *QUICK, *header, *arguments)
    return run_client(*words, cwd=folder, env=env)


def test_measures_any_requests(api: Server, folder: Path) -> None:
    """--small and --large are sent as they are, any 2xx is right, and reports name them."""
    large = "POST /documents @big.json"
    done = run(folder, api.url, "--large", large, "--json", "own.json")
    assert done.status == 0, done.stderr
    size = f"{(folder / 'big.json').stat().st_size / 1000:.3g} kB"
    heading = f"{api.url}, POST /documents, {size}; GET /health"
    (report,) = reports(done.stdout).values()
    assert list(reports(done.stdout)) == [heading]
    assert all(row["errors"] == 0 for row in report.values())
    requests = [row[0] for row in table(done.stdout)]
    assert requests[0] == "idle (GET /health)"
    assert requests[-1] == f"large (POST /documents, {size})"
    saved = json.loads((folder / "own.json").read_text())
    assert saved["parameters"]["large"] == large
    assert saved["parameters"]["header"] == ["Authorization: ***"]


def test_no_secret_in_any_output(api: Server, folder: Path) -> None:
    """A header's value is in no output, be it the command, an error or an answer that echoes it."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.listen()
        silent = f"http://127.0.0.1:{sock.getsockname()[1]}"
        large, plot = ("--large", "POST /documents @big.json"), folder / "own.svg"
        serve = ("--serve", f"sh -c 'echo {TOKEN}; exit 3'")
        runs = together(
            {
                "right": lambda: run(
                    folder, api.url, *large, "--json", "s.json", "--plot", str(plot)
                ),
                "wrong": lambda: run(
                    folder, api.url, "--large", f"POST /no/{TOKEN} @big.json"
                ),
                "silent": lambda: run(folder, silent, *large, "--timeout", "1"),
                "log": lambda: run(folder, "http://127.0.0.1:9", *large, *serve),
                "malformed": lambda: run(folder, api.url, f"--header={TOKEN}"),
            }
        )
    assert [done.status for done in runs.values()] == [0, 2, 2, 2, 2]
    texts = [done.stdout + done.stderr for done in runs.values()]
    texts += [(folder / "s.json").read_text(), plot.read_text()]
    assert not [text for text in texts if TOKEN in text]


def test_without_the_token(api: Server, folder: Path) -> None:
    """Where the large requests are all refused the run stops: 2, the 401, and what it says."""
    large = ("--large", "POST /documents @big.json")
    for token, why in {"": "Not authenticated", "other": "wrong token"}.items():
        done = run(folder, api.url, *large, token=token)
        assert (done.status, done.stdout) == (2, "")
        assert re.search(f"POST .*/documents: status 40[13].*{why}", done.stderr)


def test_content_type(tmp_path: Path) -> None:
    """A file is sent byte for byte as JSON, or as the type that --header says."""
    heads = []
    (tmp_path / "body").write_bytes(b"\xff\x00 any bytes")

    def serve_one(sock: socket.socket) -> None:
        for _ in range(2):
            peer, _ = sock.accept()
            with peer:
                heads.append(peer.recv(65536))
                peer.sendall(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n")

    def exchange(*flags: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            words = ["--base-url", url, "--small", "PUT /x @body", "--timeout", "1"]
            words += ["--large", "PUT /x @body", *flags]
            serving = threading.Thread(target=serve_one, args=[sock])
            serving.start()
            assert run_client(*words, cwd=tmp_path).status == 2
            serving.join()

    exchange()
    exchange("--header", "content-type: text/csv; a=b")
    assert b"\r\ncontent-type: application/json\r\n" in heads[1].lower()
    assert b"\r\ncontent-type: text/csv; a=b\r\n" in heads[-1].lower()
    assert all(head.endswith(b"\r\n\r\n\xff\x00 any bytes") for head in heads[1::2])


def test_tls(folder: Path) -> None:
    """https works with a private CA in SSL_CERT_FILE; without, the certificate is named."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    cert = authority.issue_cert("127.0.0.1")
    cert.private_key_and_cert_chain_pem.write_to_path(str(folder / "cert.pem"))
    with serve(f"{OWN_API} --ssl-certfile {folder}/cert.pem", tls="yes") as server:
        large = ("--large", "POST /documents @big.json")
        keep = ("--connections", "keep-alive")
        ca = str(folder / "ca.pem")
        runs = together(
            {
                "new": lambda: run(folder, server.url, *large, SSL_CERT_FILE=ca),
                "kept": lambda: run(
                    folder, server.url, *large, *keep, SSL_CERT_FILE=ca
                ),
                "unknown": lambda: run(folder, server.url, *large),
            }
        )
    assert [done.status for done in runs.values()] == [0, 0, 2]
    for name in ("new", "kept"):
        (report,) = reports(runs[name].stdout).values()
        assert all(row["errors"] == 0 for row in report.values())
    assert "certificate verify failed" in runs["unknown"].stderr
    assert "SSL_CERT_FILE" in runs["unknown"].stderr


def test_the_readme_fixes_it(folder: Path) -> None:
    """The README's app, copied as it stands: /fixed keeps p95 of GET /health low during 9 MB, where
    /documents has it far higher; --fail-if tells them apart, and fails where it cannot tell.
    """
    code = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    assert (ROOT / "tests" / "own_api.py").read_text() in code
    shutil.copy(ROOT / "tests" / "own_api.py", folder / "main.py")
    limits = ("--fail-if", "during p95 > 100", "--rate", "100")

    def one(path: str, *more: str) -> Run:
        large = ("--large", f"POST {path} @huge.json")
        return run(folder, server.url, *large, *limits, *more)

    with serve("uvicorn main:app --port {port} --no-access-log", cwd=folder) as server:
        before, after = one("/documents"), one("/fixed", "--duration", "3")
        untold = one(
            "/fixed", "--fail-if", "idle p99 > 99", "--fail-if", "large p90 > 1"
        )
    rows: list[Any] = [
        *reports(before.stdout).values(),
        *reports(after.stdout).values(),
    ]
    assert rows[0]["during"]["p95"] > 3 * rows[1]["during"]["p95"]
    assert before.status == 3
    value = rows[0]["during"]["p95"]
    assert f"during p95 is {value} ms, over 100 ms" in before.stderr
    assert after.status == 0, after.stderr
    assert untold.status == 3
    assert len(re.findall("cannot be told: too few", untold.stderr)) == 2
