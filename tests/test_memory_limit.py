"""A served model under a real memory limit, with memory pressure watched and without."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "memory_limit.py"

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(sys.platform != "linux", reason="control groups and /proc"),
]


@pytest.mark.parametrize(
    "limit",
    ["cgroup", pytest.param("address-space", marks=pytest.mark.soak)],
)
def test_a_limit_kills_without_pressure_and_not_with_it(demo_model_path: Path, limit: str) -> None:
    """While RAM fills beyond the limit, a watched engine gives way and answers every request.

    Without it the same child is killed in its control group, or, where only the address space can
    be limited, refused memory: what it computes is not saved any more.
    """
    command = [sys.executable, str(SCRIPT), "--model", str(demo_model_path), "--json"]
    done = subprocess.run(
        [*command, "--limit", limit], capture_output=True, text=True, check=True, timeout=600
    )
    on, off = (json.loads(line) for line in done.stdout.splitlines())
    assert on["returncode"] == 0, on
    assert on["answered"] == on["requests"]
    assert on["releases"] > 0
    assert on["most_stored_bytes"] < on["margin_bytes"]
    assert off["releases"] == 0
    if off["limit"] == "cgroup":
        assert (off["returncode"], off["oom_kills"]) == (-9, 1), off
        assert off["answered"] < off["requests"]
    else:
        assert off["saves_dropped"] > on["saves_dropped"] or off["returncode"] != 0, off
