"""The demo, run as a user runs it, on the real model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.real_model
def test_the_demo_shows_what_it_promises(demo_model_path: Path) -> None:
    """Five steps as JSON and nothing else on standard output; each hit is what it is called."""
    command = [sys.executable, "-m", "erllama_core", "demo", "--json"]
    result = subprocess.run(
        [*command, "--model", str(demo_model_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert set(figures) == {"model", "prompt_tokens", "steps"}
    assert 1900 < figures["prompt_tokens"] < 2100
    steps = {step["name"]: step for step in figures["steps"]}
    assert list(steps) == ["cold", "exact", "longer", "restart", "branch"]
    for step in steps.values():
        assert set(step) == {
            "name",
            "hit",
            "reused_tokens",
            "restored_bytes",
            "first_token_s",
            "restore_s",
            "reply",
        }
        assert step["reply"].strip()
    assert {name: step["hit"] for name, step in steps.items()} == {
        "cold": "cold",
        "exact": "exact",
        "longer": "partial",
        "restart": "exact",
        "branch": "partial",
    }
    n = figures["prompt_tokens"]
    reused = {name: step["reused_tokens"] for name, step in steps.items()}
    assert (reused["cold"], reused["exact"], reused["restart"]) == (0, n, n)
    assert reused["longer"] > n
    assert n - 40 < reused["branch"] < n
    assert reused["branch"] % 256, "cut inside a block"
    # 22.5 KiB a token: 30 layers of 3 heads of 64 values, keys and values, 2 bytes each.
    for name in ("exact", "longer", "restart", "branch"):
        assert steps[name]["restored_bytes"] >= reused[name] * 30 * 3 * 64 * 2 * 2
    assert steps["exact"]["reply"] == steps["restart"]["reply"]


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_the_demo_with_a_file_that_is_no_model(tmp_path: Path, flags: list[str]) -> None:
    """One line on standard error, exit code 1, no traceback, no empty table."""
    path = tmp_path / "not-a-model.gguf"
    path.write_bytes(b"x" * 1000)
    result = subprocess.run(
        [sys.executable, "-m", "erllama_core", "demo", *flags, "--model", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr
