"""The profile of the hot paths runs, and says what each takes beside its floor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hot_paths_part import Part

SCRIPT = Path(__file__).parents[1] / "bench" / "hot_paths.py"


def run(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    written = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--json", str(written), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(written.read_text("utf-8"))
    assert all(rate > 0 for rate in figures["bytes_per_s"].values())
    for name, parts in figures["sections"].items():
        assert f"\n{name} (" in done.stdout
        assert all(part["name"] in done.stdout for part in parts)
    return figures


def check(parts: list[dict[str, Any]]) -> None:
    """Every section has a part with a floor, and says what the floor is."""
    floors = [part for part in parts if part["floor_s"] is not None]
    assert floors
    for part in floors:
        assert part["floor"]
        assert part["ratio"] == pytest.approx(part["seconds"] / part["floor_s"])


def test_sections_without_a_model_run(tmp_path: Path) -> None:
    """Tokens and look-ups are profiled without a model."""
    sections = run(tmp_path, "--only", "token", "lookup")["sections"]
    assert set(sections) == {"token", "lookup"}
    for parts in sections.values():
        check(parts)


@pytest.mark.real_model
def test_every_section_runs_with_a_model(tmp_path: Path, demo_model_path: Path) -> None:
    """Steps, restores, saves and loading are profiled with the model that is given."""
    names = {"tick", "restore", "save", "load"}
    model = str(demo_model_path)
    sections = run(tmp_path, "--only", *sorted(names), "--model", model)["sections"]
    assert set(sections) == names
    for parts in sections.values():
        check(parts)
    tick = [part["seconds"] for part in sections["tick"]]
    assert all(seconds > 0 for seconds in tick)
    assert tick[0] > tick[1], "a tick is longer than the decode in it"


def test_a_part_is_printed_beside_its_floor() -> None:
    """Milliseconds from one on, microseconds below, and how often the floor goes into it."""
    part = Part(name="a copy", seconds=0.003, floor_s=0.0015, floor="bytes moved")
    assert part.ratio == 2.0
    assert str(part).split() == ["a", "copy", "3.00", "ms", "1.50", "ms", "2.00", "bytes", "moved"]
    alone = Part(name="the rest", seconds=12e-6)
    assert alone.ratio is None
    assert str(alone).split() == ["the", "rest", "12.00", "us"]
