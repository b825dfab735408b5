"""The two streams of client.py from as many machines as it takes; see README.md here.

Of the users (-u) half are small, half are large. A small one sends --rate requests per
second, open loop: each in a greenlet of its own, its response time counted from when it was
due, so that a stall counts against every request that it delays. A large one sends one
request at a time, and pauses for --pause seconds. Answers are checked as in client.py.
"""

import random
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Group
from locust import FastHttpUser, constant, events, task
from locust.env import Environment

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import client

calls: list[client.Call] = []  # small and large: made once, before any is due


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]  # Locust leaves it untyped
def add_arguments(parser: Any) -> None:
    add = parser.add_argument
    add("--endpoint", default="/ping", help="path of the demo to measure")
    add("--small", default="", help="your own small request: METHOD PATH [@FILE]")
    add("--large", default="", help="your own large request")
    text = "'Name: value' for your own requests; may be repeated"
    secret = {"is_secret": True, "include_in_web_ui": False}
    add("--header", action="append", default=[], help=text, **secret)
    add("--rate", type=float, default=50, help="requests per second of a small user")
    add("--pause", type=float, default=2, help="seconds between two large requests")
    add("--small-kb", type=float, default=1, help="size of a small body, in 1000 bytes")
    add("--large-mb", type=float, default=25, help="size of a large body, in 1000 kB")


@events.test_start.add_listener  # type: ignore[untyped-decorator]  # Locust leaves it untyped
def make_calls(environment: Environment, **_: Any) -> None:
    given = vars(environment.parsed_options)
    options = Namespace(**given | {"endpoint": [given["endpoint"]]})
    url = environment.host or "http://localhost"
    calls[:] = client.calls_of(options, url)[0][1:]


class Sender(FastHttpUser):
    abstract = True
    concurrency = 10_000  # connections: no request waits for another one's

    def send(self, name: str, due_s: float) -> None:
        call = calls[name == "large"]
        request, expected = call.request, call.expected
        # Locust takes bytes, whatever its annotation says.
        content: Any = request.content
        headers = {"Connection": "close", **request.headers}
        del headers["host"]
        with self.client.request(
            request.method,
            request.url.raw_path.decode(),
            name=name,
            data=content,
            headers=headers,
            catch_response=True,
        ) as response:
            answer = response.content or b""
            if error := client.classify(response.status_code, answer, expected):
                response.failure(getattr(response, "error", None) or error)
            latency_ms = 1000 * (time.perf_counter() - due_s)
            response.request_meta["response_time"] = latency_ms


class Small(Sender):
    wait_time = constant(0)

    def on_start(self) -> None:
        self.sent = Group()
        self.begun_s, self.slot = time.perf_counter(), 0
        self.rate_hz = self.environment.parsed_options.rate

    @task
    def send_next(self) -> None:
        due_s = self.begun_s + (self.slot + random.random()) / self.rate_hz
        self.slot += 1
        gevent.sleep(max(0, due_s - time.perf_counter()))
        self.sent.spawn(self.send, "small", due_s)

    def on_stop(self) -> None:
        self.sent.join()


class Large(Sender):
    @task
    def send_one(self) -> None:
        self.send("large", time.perf_counter())

    def wait_time(self) -> Any:
        return self.environment.parsed_options.pause
