"""What was measured over time, as the report of the benchmarks reads it and draws it.

.venv/bin/python bench/report.py .torture/seed-7/curves.json --plots FOLDER
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from torture.record import Round

_X: Final = {"name": "requests", "unit": "", "scale": "linear"}
_PLOTS: Final = (
    ("torture_memory", "Memory of one engine", "memory", "MiB", ("resident MiB",)),
    ("torture_handles", "Threads and open files", "number", "", ("threads", "open files")),
    ("torture_waits", "Waiting times", "wait", "ms", ("median wait ms", "99th percentile ms")),
)


def runs_of(rounds: Sequence[Round]) -> list[list[dict[str, float]]]:
    """Points, process by process: a call that goes on begins with an engine that is new."""
    runs: list[list[dict[str, float]]] = []
    for point in (one.tally.point for one in rounds):
        if not point:
            continue
        if not runs or point["requests"] <= runs[-1][-1]["requests"]:
            runs.append([])
        runs[-1].append(point)
    return runs


def curves(name: str, title: str, rounds: Sequence[Round]) -> dict[str, Any] | None:
    """A section with plots, where there is anything to draw."""
    runs = runs_of(rounds)
    if not runs:
        return None
    plots = [
        {
            "name": plot,
            "title": plot_title,
            "x": _X,
            "y": {"name": y, "unit": unit, "scale": "linear"},
            "series": [
                {
                    "who": key if len(runs) == 1 else f"{key}, process {number}",
                    "x": [point["requests"] for point in run],
                    "y": [point[key] for point in run],
                    "least": None,
                    "most": None,
                }
                for key in keys
                for number, run in enumerate(runs, 1)
            ],
        }
        for plot, plot_title, y, unit, keys in _PLOTS
    ]
    return {"name": name, "title": title, "figures": [], "plots": plots, "notes": []}
