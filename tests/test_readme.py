"""README.md shows what was measured and what the scripts say, to the letter."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from harness import ENV, ROOT

from client import KINDS, statistics

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "results"
RAW = sorted(RESULTS.glob("*.json"))
SMALL_COLUMNS = ("median", "p95", "p99")


def test_help_is_verbatim() -> None:
    """README.md has the whole of `python client.py --help`."""
    command = [sys.executable, "client.py", "--help"]
    text = subprocess.run(
        command, cwd=ROOT, env=ENV, capture_output=True, text=True, check=True
    ).stdout
    assert text in README


def test_first_output_is_verbatim() -> None:
    """The output under the first command is the recorded output of that command."""
    assert (RESULTS / "first.txt").read_text() in README


@pytest.mark.parametrize("file", RAW, ids=lambda file: file.name)
def test_statistics_follow_from_samples(file: Any) -> None:
    """The statistics in each raw file are those of its samples."""
    for run in json.loads(file.read_text())["runs"]:
        for kind in KINDS:
            samples = [sample for sample in run["samples"] if sample[0] == kind]
            good = [1000 * (s[3] - s[1]) for s in samples if s[4] is None]
            expected = statistics(good, len(samples) - len(good))
            assert run["statistics"][kind] == expected


def statistics_of(name: str) -> list[dict[str, dict[str, float]]]:
    """The statistics of each run in a raw file."""
    runs = json.loads((RESULTS / f"{name}.json").read_text())["runs"]
    return [run["statistics"] for run in runs]


def size_rows() -> list[str]:
    """The cost of large requests in ms per MB: a row per size, a column per endpoint."""
    rows = []
    for size_mb in (1, 5, 25, 100):
        costs_ms = [
            s["large"]["median"] / size_mb for s in statistics_of(f"size_{size_mb}")
        ]
        rows.append(
            f"| {size_mb} | " + " | ".join(f"{ms:.1f}" for ms in costs_ms) + " |"
        )
    return rows


def result_rows() -> list[str]:
    """Each server and endpoint, with the figures of the run and of its repetition."""
    runs = json.loads((RESULTS / "servers.json").read_text())["runs"]
    rows = []
    for run, second in zip(runs, statistics_of("servers_again"), strict=True):
        row = run["statistics"]
        cells = [run["server"], run["endpoint"], row["idle"]["p95"]]
        cells += [row["small"][name] for name in SMALL_COLUMNS] + [
            row["large"]["median"]
        ]
        cells += [second["small"]["p95"], second["large"]["median"]]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return rows


def raw_figures() -> set[str]:
    """All statistics and all medians of server stages of all raw files, as printed."""
    texts = [(RESULTS / name).read_text() for name in ("truth.md", "invalid.txt")]
    figures = set(re.findall(r"\d+\.\d", "".join([*texts, *size_rows()])))
    for file in RAW:
        for run in json.loads(file.read_text())["runs"]:
            for row in run["statistics"].values():
                figures |= {str(value) for value in row.values()}
            stages = [sample[5] for sample in run["samples"] if sample[5]]
            for stage in stages[0] if stages else ():
                median_ms = np.median([sample[stage] for sample in stages])
                figures.add(f"{median_ms:.1f}")
    return figures


def test_every_figure_was_measured() -> None:
    """Each time with a decimal in README.md stands in, or follows from, a raw file."""
    own = README.replace((RESULTS / "first.txt").read_text(), "")
    # Not versions, addresses or seconds.
    shown = re.findall(r"(?<![\d.])\d+\.\d(?![\d.]|\+| s\b)", own)
    assert len(shown) > 60
    assert set(shown) <= raw_figures(), set(shown) - raw_figures()


@pytest.mark.parametrize("rows", [size_rows, result_rows])
def test_tables_follow_from_raw_files(rows: Callable[[], list[str]]) -> None:
    """The tables have the figures of the recorded runs, all of them and in their places."""
    assert "\n".join(rows()) in README


@pytest.mark.parametrize("name", ["truth.md", "invalid.txt"])
def test_tables_are_verbatim(name: str) -> None:
    """The tables of other programs' output are what these printed."""
    assert (RESULTS / name).read_text() in README


def test_commands() -> None:
    """The command that made the table of results stands above it."""
    raw = json.loads((RESULTS / "servers.json").read_text())
    assert raw["command"] in README
    assert raw["parameters"]["duration"] >= 60
