"""The two streams of client.py from as many machines as it takes, with Locust.

    locust -f distributed/locustfile.py --headless --processes 2 -u 2 -t 60 -s 60 -H URL

Of the users (-u) half are small, half are large. A small one sends --rate requests per
second, open loop: each in a greenlet of its own, its response time counted from when it was
due, so that a stall counts for everybody whom it delayed. A large one sends one body at a
time, and pauses for --pause seconds. Every answer is checked.
"""

import random
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Group
from locust import FastHttpUser, constant, events, task

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from client import Body, classify, make_body

cached_body = cache(make_body)


# Locust does not annotate the decorator.
@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_arguments(parser: Any) -> None:
    add = parser.add_argument
    add("--endpoint", default="/ping", help="path to measure")
    add("--rate", type=float, default=50, help="requests per second of a small user")
    add("--pause", type=float, default=2, help="seconds between two large requests")
    add("--small-kb", type=float, default=1, help="size of a small body, in 1000 bytes")
    add("--large-mb", type=float, default=25, help="size of a large body, in 1000 kB")


class Sender(FastHttpUser):
    abstract = True
    concurrency = 10_000  # connections: no request waits for another one's

    def on_start(self) -> None:
        self.options = self.environment.parsed_options
        # Both at once: to make the large one takes seconds, when no small one may be due.
        self.small = cached_body("small", round(1000 * self.options.small_kb))
        self.large = cached_body("large", round(1_000_000 * self.options.large_mb))

    def send(self, body: Body, due_s: float) -> None:
        path, name = self.options.endpoint, body.expected["name"]
        headers = {"Content-Type": "application/json", "Connection": "close"}
        content: Any = body.content  # Locust's annotation has no bytes
        with self.client.post(
            path, name=name, data=content, headers=headers, catch_response=True
        ) as response:
            if error := classify(response.status_code, response.content, body.expected):
                response.failure(getattr(response, "error", None) or error)
            latency_ms = 1000 * (time.perf_counter() - due_s)
            response.request_meta["response_time"] = latency_ms


class Small(Sender):
    wait_time = constant(0)

    def on_start(self) -> None:
        super().on_start()
        self.sent = Group()
        # Not all users at the same instants, which would meet a stall or miss it together.
        self.due_s = time.perf_counter() + random.random() / self.options.rate

    @task
    def send_next(self) -> None:
        gevent.sleep(max(0, self.due_s - time.perf_counter()))
        self.sent.spawn(self.send, self.small, self.due_s)
        self.due_s += 1 / self.options.rate

    def on_stop(self) -> None:
        self.sent.join()


class Large(Sender):
    @task
    def send_one(self) -> None:
        self.send(self.large, time.perf_counter())

    def wait_time(self) -> Any:
        return self.options.pause
