"""What an entry of a JSON object costs as the object grows, in ns: medians of five.

    python results/per_entry.py

Prints a Markdown table: strings are orjson.loads of the keys as a list, insertion is
dict.fromkeys of these strings, which are new, so that it has to hash them.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import client


def ns(work: Callable[[Any], Any], make: Callable[[], Any], entries: int) -> str:
    times_s = []
    for _ in range(5):
        argument = make()
        begun_s = time.perf_counter()
        result = work(argument)
        times_s.append(time.perf_counter() - begun_s)
        del result
    return f"{1e9 * statistics.median(times_s) / entries:.0f}"


def row(size_mb: int) -> list[str]:
    body = client.make_body("large", size_mb * 1_000_000).content
    data = orjson.loads(body)["data"]
    entries, keys = len(data), orjson.dumps(list(data))
    del data
    return [
        f"{size_mb}",
        f"{entries}",
        ns(orjson.loads, lambda: keys, entries),
        ns(dict.fromkeys, lambda: orjson.loads(keys), entries),
        ns(orjson.loads, lambda: body, entries),
        ns(json.loads, lambda: body, entries),
    ]


def main() -> None:
    print("| MB | entries | strings | insertion | orjson.loads | json.loads |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for size_mb in (1, 5, 25, 100):
        print("| " + " | ".join(row(size_mb)) + " |", flush=True)


if __name__ == "__main__":
    main()
