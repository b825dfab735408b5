"""README.md and README.md here: tables and figures are computed again from the raw files."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
sys.path[:0] = [str(ROOT), str(FOLDER)]
import tables

import client

PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "results/README.md")}
RAW = sorted(FOLDER.glob("*.json"))
# What is chosen or defined, not measured.
CHOSEN = "25 MB|21 MB|27 MB|27.5 MB|5 MB|100 MB|0.4 s|1.5 s|1 s|2 s|5 s|12 s|15 s|20 s|28.8 s"


@pytest.mark.parametrize("file", RAW, ids=lambda file: file.name)
def test_raw_files(file: Path) -> None:
    """Statistics in a raw file are those of its samples, no run is doubtful, all are named."""
    for run in json.loads(file.read_text())["runs"]:
        samples = [client.Sample(*row) for row in run["samples"]]
        assert run["statistics"] == client.summarize_all(samples)
        # A new httpx client for each request takes more time than there is.
        assert run["warnings"] == [] or file.stem.endswith("_new-client")
    family = re.sub("_.*", "_*", file.stem)
    assert re.search(
        rf"`({file.stem}|{re.escape(family)})\.json`", PAGES["results/README.md"]
    )


def test_figures_are_those_of_the_raw_files() -> None:
    """Each table and each sentence with figures is computed, and no other figure is left."""
    texts = tables.tables() | tables.sentences()
    for name, text in texts.items():
        assert any(text in page for page in PAGES.values()), name
    for page in PAGES.values():
        rest = re.sub(r"```[^`]*```|`[^`\n]*`|\n> [^\n]*", "", page)
        for text in texts.values():
            rest = rest.replace(re.sub(r"`[^`\n]*`", "", text), "")
        figures = re.findall(r"\d[\d.,]* ?(?:ms|MB|%|s)\b", rest)
        assert set(figures) <= set(CHOSEN.split("|"))


def test_printed_output_is_verbatim() -> None:
    """What README.md quotes of the client's output for an own API is what it printed."""
    printed = (FOLDER / "own_documents.txt").read_text()
    (quoted,) = re.findall("^> (.*)$", PAGES["README.md"], re.MULTILINE)
    assert f"\n# {quoted}\n" in printed


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", "".join(PAGES.values()), re.DOTALL)
    text = re.sub(r"\$(\w+|\{.*?\})", "1", "\n".join(blocks))  # $path, ${server%% *}
    lines = text.replace("\\\n", " ").splitlines()
    found = [re.search(r"client\.py(.*)", line) for line in lines]
    return [match[1].partition(" > ")[0] for match in found if match]


def test_documents_agree(monkeypatch: Any) -> None:
    """Commands parse, links lead somewhere, flags are the same in help, prompt and pages."""
    monkeypatch.chdir(ROOT)
    assert len(commands()) > 10
    for command in commands():
        monkeypatch.setattr("sys.argv", ["client.py", *shlex.split(command)])
        client.parse()
    for name, page in PAGES.items():
        for target in re.findall(
            r"\]\((?!http|#)([^)#]+)\)|(?:src|srcset)=\"([^\"]+)\"", page
        ):
            assert (ROOT / name).parent.joinpath("".join(target)).exists(), target
    flags = set(re.findall(r"--[a-z-]{4,}", client.__doc__ or ""))
    prompt = (ROOT / "prompt.md").read_text()
    assert flags == {
        flag for flag in flags if f"`{flag}" in prompt or f" {flag}" in prompt
    }
