"""``erllama new-plugin`` writes plugins that pass."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.version import Version

from erllama_core.cli.app import app
from erllama_core.cli.new_plugin import KINDS, skeleton


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command printed; it must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_a_skeleton_passes_as_written(kind: str, tmp_path: Path) -> None:
    """Each kind's skeleton, uninstalled, passes its own tests, and has nothing left to replace."""
    folder = tmp_path / "plugin"
    command = ["new-plugin", kind, "My-Thing", "--directory", str(folder)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    package = folder / f"erllama_{kind}_my_thing"
    assert (package / "py.typed").exists()
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    text = "".join(path.read_text("utf-8") for path in folder.rglob("*.*") if path.is_file())
    assert "acme" not in (text + "".join(names)).lower()
    printed = run(
        *(sys.executable, "-m", "pytest", "-q", "-W", "error", "tests"),
        cwd=folder,
        PYTHONPATH=str(folder),
    )
    assert " passed" in printed


@pytest.mark.parametrize("kind", KINDS)
def test_a_skeleton_is_for_this_core(kind: str) -> None:
    """What a skeleton requires of the core is this minor version: interfaces are the minor's."""
    running = Version(importlib.metadata.version("erllama-core"))
    metadata = tomllib.loads(dict(skeleton(kind, "mine"))["pyproject.toml"])["project"]
    needs = map(Requirement, metadata["dependencies"])
    (need,) = (need for need in needs if need.name == "erllama-core")
    major, minor = running.release[:2]
    assert need.specifier.contains(running, prereleases=True)
    assert need.specifier.contains(f"{major}.{minor}.99")
    assert not need.specifier.contains(f"{major}.{minor + 1}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tier", "2fast"], "begins with a letter"),
        (["tier", "../up"], "letters, digits and underscores"),
        (["cache", "mine"], "'cache' is not one of"),
        (["tier", "mine", "--directory", "."], "is not empty"),
        (["tier", "mine", "--directory", "something/in"], "cannot be written: "),
    ],
)
def test_what_cannot_be_written(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is none, an unknown kind, and a folder that is none or not empty are refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").write_text("here")
    result = CliRunner().invoke(app, ["new-plugin", *arguments])
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), "no traceback"
    assert words in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["something"]
