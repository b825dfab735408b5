"""Make the two scripts importable, and serve one stub to all tests that want no other."""

import signal
import sys
from collections.abc import Iterator

import pytest
from harness import ROOT, Server, free_port, serve

sys.path.insert(0, str(ROOT))
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, for children as well


@pytest.fixture(scope="session")
def stub() -> Iterator[Server]:
    """stub.py without stalls; it counts by path, so each test uses a path of its own."""
    port = free_port()
    with serve(f"uvicorn stub:app --app-dir tests --port {port}", port) as server:
        yield server
