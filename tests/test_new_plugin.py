"""``erllama new-plugin`` writes plugins that pass, and the template plugin is a whole one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from click.testing import CliRunner

from erllama_core.cli.app import app
from erllama_core.cli.new_plugin import KINDS

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "docs" / "template_plugin"


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tier", "2fast"], "begins with a letter"),
        (["tier", "../up"], "letters, digits and underscores"),
        (["cache", "mine"], "'cache' is not one of"),
        (["tier", "mine", "--directory", "."], "is not empty"),
    ],
)
def test_what_cannot_be_written(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that is none, an unknown kind, and a folder with something in it are refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").write_text("here")
    result = CliRunner().invoke(app, ["new-plugin", *arguments])
    assert result.exit_code != 0
    assert words in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


@pytest.mark.packaging
def test_the_template_plugin_is_a_whole_distribution(tmp_path: Path) -> None:
    """Its wheel, installed into a new environment beside the core's, passes its tests there, is
    listed by ``erllama plugins``, and is taken by a configuration.
    """
    wheels, environment = tmp_path / "wheels", tmp_path / "venv"
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    # Of copies: building leaves folders beside the sources.
    for name, source in (
        ("core", ROOT),
        ("stub", ROOT / "plugins/backend_stub"),
        ("own", TEMPLATE),
    ):
        copy = tmp_path / name
        run("cp", "-r", *_sources(source), _made(copy), cwd=ROOT)
        run(*pip, "wheel", "--no-deps", "--wheel-dir", wheels, copy, cwd=tmp_path)
    venv.create(environment, with_pip=True, symlinks=True)
    python = environment / "bin" / "python"
    (core,) = wheels.glob("erllama_core-*.whl")
    (stub,) = wheels.glob("erllama_backend_stub-*.whl")
    (own,) = wheels.glob("erllama_tier_sqlite-*.whl")
    run(
        *(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
        *(f"{core}[cli,conformance]", stub, own),
        cwd=tmp_path,
    )
    tests = tmp_path / "tests"
    run("cp", "-r", TEMPLATE / "tests", tests, cwd=ROOT)
    printed = run(python, "-m", "pytest", "-q", "-W", "error", tests, cwd=tests)
    assert " passed" in printed
    assert "skipped" not in printed
    erllama = environment / "bin" / "erllama"
    listed = json.loads(run(erllama, "plugins", "--json", cwd=tmp_path))
    (row,) = (row for row in listed if row["name"] == "sqlite")
    assert (row["kind"], row["state"]) == ("tier", "ok")
    assert row["distribution"] == "erllama-tier-sqlite"
    config = tmp_path / "erllama.toml"
    config.write_text('[[tiers]]\nname = "mine"\nkind = "sqlite"\npath = "kv.sqlite"\n')
    run(erllama, "check", config, cwd=tmp_path)
    config.write_text('[[tiers]]\nname = "mine"\nkind = "sqlite"\npaht = "kv.sqlite"\n')
    refused = subprocess.run(
        [erllama, "check", config], capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert "paht" in refused.stdout + refused.stderr


def _sources(folder: Path) -> list[Path]:
    """What a wheel is built from, without what tools have left there."""
    package = "erllama_core" if folder == ROOT else next(folder.glob("erllama_*/py.typed")).parent
    names = ["pyproject.toml", "README.md", package, *(["LICENSE"] if folder == ROOT else [])]
    return [folder / name for name in names]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
