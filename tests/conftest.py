"""Make the two scripts importable, and share one server of a kind among the tests."""

import signal
import sys
from collections.abc import Iterator

import pytest
from harness import ROOT, Server, connected, serve
from httpx import Client
from measure import STUB

sys.path.insert(0, str(ROOT))
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, for children as well


@pytest.fixture(scope="session")
def api() -> Iterator[Client]:
    with connected() as (_, client):
        yield client


@pytest.fixture(scope="session")
def stub() -> Iterator[Server]:
    """stub.py without stalls; it counts by path, so each test uses a path of its own."""
    with serve(STUB) as server:
        yield server
