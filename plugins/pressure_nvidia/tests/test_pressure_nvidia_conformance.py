"""The source keeps what every pressure source promises.

In a process of its own: the driver's library is found when a process starts, and stays in it.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from erllama_core.conformance import PressureConformance

ROOT = Path(__file__).resolve().parents[3]
TESTS = [name for name, _ in inspect.getmembers(PressureConformance) if name.startswith("test_")]


def conformance(driver: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A run of the kit on the stand-in for a driver with two GPUs."""
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, Path(__file__).with_name("nvidia_conformance.py")],
        cwd=ROOT,
        env={**os.environ, "LD_LIBRARY_PATH": str(driver), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_source_conforms(driver: Path) -> None:
    """Every test of the kit passes, none is skipped."""
    done = conformance(driver)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = {line.rpartition("::")[2] for line in done.stdout.splitlines() if "PASSED" in line}
    assert passed == set(TESTS)


@pytest.mark.parametrize(
    ("variables", "caught_by"),
    [
        ({"FAKE_USED_1": "17"}, "test_readings_can_be_true"),
        ({"FAKE_COUNT": "0"}, "test_readings_are_a_tuple_of_readings"),
    ],
)
def test_what_does_not_conform_is_seen(
    driver: Path, variables: dict[str, str], caught_by: str
) -> None:
    """A driver that tells what cannot be, or nothing at all, fails that run: it does run."""
    done = conformance(driver, **variables)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"::{caught_by}" in done.stdout.partition("short test summary")[2]
