"""README.md shows what was measured and what the scripts say, to the letter."""

import json
import re
import subprocess
import sys
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


def raw_figures() -> set[str]:
    """All statistics and all medians of server stages of all raw files, as printed."""
    figures = set(re.findall(r"\d+\.\d", (RESULTS / "truth.md").read_text()))
    figures |= set(re.findall(r"\d+\.\d", (RESULTS / "invalid.txt").read_text()))
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


def test_result_rows() -> None:
    """Each row of the results table has the figures of one recorded run."""
    recorded = set()
    for file in RAW:
        for run in json.loads(file.read_text())["runs"]:
            row = run["statistics"]
            values = [row["idle"]["p95"], *[row["small"][k] for k in SMALL_COLUMNS]]
            cells = [run["server"], run["endpoint"], *values, row["large"]["median"]]
            recorded.add(tuple(map(str, cells)))
    lines = re.findall(r"^\| ((?:uvicorn|gunicorn) .*) \|$", README, re.MULTILINE)
    rows = [tuple(line.split(" | ")) for line in lines]
    shown = [row for row in rows if len(row) == 4 + len(SMALL_COLUMNS)]
    assert len(shown) >= 8
    assert set(shown) <= recorded
