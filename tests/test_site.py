"""The documentation as a site."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.packaging
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """Every page is there and in the navigation, and no link leads nowhere."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    built = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    pages = {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    plugins = {f"plugins/{path.parent.name}.html" for path in ROOT.glob("plugins/*/README.md")}
    assert built >= pages | plugins | {"readme.html", "changelog.html", "bench.html"}
    # What tells the tests how to treat a block is not for readers, and nothing comes from afar.
    text = (tmp_path / "plugins.html").read_text("utf-8")
    assert "norun" not in text
    assert not re.search(r'(src|href)="https?://[^"]*\.(js|css|woff2?)', text)
