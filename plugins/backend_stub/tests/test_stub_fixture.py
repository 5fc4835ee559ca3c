"""The fixture that applications test with, as the README shows it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from erllama_core import Engine
from erllama_core.errors import DecodeFailed

README = Path(__file__).parent.parent / "README.md"


def test_there_is_a_model(erllama_engine: Engine) -> None:
    """Without a marker it is the plain stub, and what was computed once is a hit."""
    prompt = "An application asks the same thing twice. " * 4
    first = erllama_engine.complete("stub", prompt, response_tokens=4)
    again = erllama_engine.complete("stub", prompt, response_tokens=4)
    assert first.generated == again.generated
    assert (first.cache_hit_kind, again.cache_hit_kind) == ("cold", "exact")


@pytest.mark.erllama_stub(model_id="assistant", faults={"fail_step": 1})
def test_faults_come_from_the_marker(erllama_engine: Engine) -> None:
    """What the application does about a failed step can be tested."""
    with pytest.raises(DecodeFailed):
        erllama_engine.complete("assistant", "a prompt", response_tokens=4)
    assert erllama_engine.complete("assistant", "a prompt", response_tokens=4).generated


def test_the_example_of_the_readme_passes(tmp_path: Path) -> None:
    """The README's test is a test, found and passed by pytest in an empty folder."""
    section = README.read_text("utf-8").partition("## In an application's tests")[2]
    found = re.search(r"```python[^\n]*\n(.*?)```", section, re.DOTALL)
    assert found is not None
    (tmp_path / "test_readme.py").write_text(found[1])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "--strict-markers", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert "1 passed" in run.stdout, run.stdout + run.stderr
