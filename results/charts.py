"""Draw the README's pictures again from the raw files, each light and dark.

python results/charts.py
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))
import client

CURVES = {  # how the server's command begins, the endpoint, the color
    "one worker, /pong": ("uvicorn", "/pong", "#d55e00"),
    "four workers, /pong": ("gunicorn", "/pong", "#0072b2"),
    "one worker, offload=process": ("uvicorn", "/pong?offload=process", "#009e73"),
}


def runs_in(file: str) -> list[client.Run]:
    runs: list[client.Run] = []
    for run in json.loads((FOLDER / file).read_text())["runs"]:
        del run["statistics"], run["warnings"]
        run["samples"] = [client.Sample(*row) for row in run["samples"]]
        runs.append(client.Run(**run))
    return runs


def p95_ms(file: str, server: str, endpoint: str) -> dict[int, Any]:
    """By uploads at once, of all small requests."""
    return {
        run.uploads: client.summarize_all(run.samples)["small"]["p95"]
        for run in runs_in(file)
        if run.server.startswith(server) and run.endpoint == endpoint
    }


def draw_uploads(file: Path) -> None:
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    axis = figure.subplots()
    for label, (*which, color) in CURVES.items():
        for raw, style in (("uploads.json", "o-"), ("uploads_again.json", "o:")):
            points = p95_ms(raw, *which)
            axis.plot([*points], [*points.values()], style, color=color, label=label)
            label = "_"  # matplotlib shows no such label
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xticks([1, 2, 4, 8])
    axis.set_xlabel("25 MB uploads in flight at once (dotted: the second run)")
    axis.set_ylabel("p95 of small requests, ms")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    figure.savefig(file, dpi=150)


DARK = dict.fromkeys(("figure.facecolor", "axes.facecolor"), "#0d1117")
STYLES: dict[str, Any] = {"": ["default"], "_dark": ["dark_background", DARK]}

if __name__ == "__main__":
    for suffix, style in STYLES.items():
        with matplotlib.style.context(style):
            client.plot(runs_in("picture.json"), FOLDER / f"picture{suffix}.png")
            draw_uploads(FOLDER / f"uploads{suffix}.png")
