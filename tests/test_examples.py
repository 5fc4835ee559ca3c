"""Every example runs as it stands, and prints what stands beside it."""

from __future__ import annotations

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PATTERNS = sorted((ROOT / "examples" / "patterns").glob("[0-9]*.py"))


def needs_model(path: Path) -> bool:
    return "model.gguf" in path.read_text("utf-8")


def run(path: Path, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = path.with_suffix(".out").read_text("utf-8")
    same = doctest.OutputChecker().check_output(expected, done.stdout, doctest.ELLIPSIS)
    assert same, f"expected:\n{expected}\nprinted:\n{done.stdout}"


@pytest.mark.parametrize(
    "path", [path for path in PATTERNS if not needs_model(path)], ids=lambda path: path.stem
)
def test_a_pattern_runs(path: Path, tmp_path: Path) -> None:
    """In an empty folder, with warnings as errors, an example prints what it should."""
    run(path, tmp_path)


@pytest.mark.real_model
@pytest.mark.parametrize(
    "path", [path for path in PATTERNS if needs_model(path)], ids=lambda path: path.stem
)
def test_a_pattern_runs_with_a_model(path: Path, tmp_path: Path, demo_model_path: Path) -> None:
    """The same with ``model.gguf`` in the folder."""
    (tmp_path / "model.gguf").symlink_to(demo_model_path)
    run(path, tmp_path)


def test_the_page_is_made_from_the_examples() -> None:
    """docs/patterns.md is what scripts/patterns_page.py writes now."""
    script = ROOT / "scripts" / "patterns_page.py"
    done = subprocess.run([sys.executable, str(script), "--check"], check=False)
    assert done.returncode == 0, "run scripts/patterns_page.py"
