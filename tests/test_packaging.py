"""The distributions: what is in them, and that a clean environment is all they need."""

from __future__ import annotations

import email
import json
import os
import random
import shutil
import subprocess
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import attrs
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "docs" / "template_plugin"
FOLDERS = [ROOT, *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml")), TEMPLATE]

pytestmark = pytest.mark.packaging


@attrs.frozen
class Built:
    """A distribution's files, built from what git has of it."""

    name: str
    folder: Path
    wheel: Path
    sdist: Path

    @property
    def package(self) -> str:
        return self.name.replace("-", "_")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """What a command printed; it must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= variables
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def new_environment(folder: Path, *requirements: str | Path, wheels: Path | None = None) -> Path:
    """A virtual environment with these installed, ``wheels`` before others; its interpreter."""
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    local = {} if wheels is None else {"PIP_FIND_LINKS": str(wheels)}
    run(*pip, *requirements, cwd=folder, **local)
    return python


def tracked(folder: Path) -> list[str]:
    """The files of a folder that are, or are to be, in the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip("not a git checkout: what belongs to a distribution is not known")
    return [name for name in found.stdout.splitlines() if (folder / name).exists()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Built]:
    """Every distribution, built as a package index would have it."""
    folder = tmp_path_factory.mktemp("built")
    python = new_environment(folder / "venv", "setuptools>=77")
    code = (
        "import sys; from setuptools import build_meta as build; out = sys.argv[1]\n"
        "print(build.build_sdist(out)); print(build.build_wheel(out))"
    )
    found = []
    for number, source in enumerate(FOLDERS):
        copy = folder / str(number)
        for name in tracked(source):
            if source != ROOT or not name.startswith(("plugins/", "docs/template_plugin/")):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / name, copy / name)
        out = folder / f"dist{number}"
        out.mkdir()
        run(python, "-c", code, out, cwd=copy)
        (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
        name = tomllib.loads((source / "pyproject.toml").read_text("utf-8"))["project"]["name"]
        found.append(Built(name, source, wheel, sdist))
    return found


def test_wheels_hold_the_package_and_nothing_else(built: list[Built]) -> None:
    """Every module and data file of the package, its metadata; no tests, no other package."""
    for one in built:
        with zipfile.ZipFile(one.wheel) as wheel:
            names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        package = one.folder / one.package
        expected = {f"{one.package}/{name}" for name in tracked(package)}
        assert names == expected, one.name
        assert f"{one.package}/py.typed" in names


def test_sdists_hold_what_a_build_needs(built: list[Built]) -> None:
    """The package, its metadata and README; nothing of the rest of the repository."""
    for one in built:
        with tarfile.open(one.sdist) as sdist:
            names = {name.partition("/")[2] for name in sdist.getnames()} - {""}
        top = {name.partition("/")[0] for name in names}
        allowed = {one.package, f"{one.package}.egg-info", "tests"}
        allowed |= {"pyproject.toml", "README.md", "PKG-INFO", "setup.cfg", "LICENSE"}
        assert top <= allowed, f"{one.name}: {top - allowed}"
        assert {"pyproject.toml", "README.md", f"{one.package}/py.typed"} <= names


def test_versions_and_ranges_agree(built: list[Built]) -> None:
    """All have the core's version, and ask for a core that this one is."""
    metadata = {}
    for one in built:
        with zipfile.ZipFile(one.wheel) as wheel:
            (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
            metadata[one.name] = email.message_from_bytes(wheel.read(name))
    core = metadata["erllama-core"]["Version"]
    for name, fields in metadata.items():
        assert fields["Version"] == core, name
        needs = [Requirement(line) for line in fields.get_all("Requires-Dist", [])]
        if name != "erllama-core":
            (need,) = (n for n in needs if n.name == "erllama-core" and n.marker is None)
            assert need.specifier.contains(core), name
            assert not need.specifier.contains("0.2.0"), f"{name}: interfaces are the minor's"


def test_a_clean_environment_is_all_they_need(built: list[Built], tmp_path: Path) -> None:
    """Installed together in any order, every plugin is listed, and the template's tests pass."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for one in built:
        shutil.copy(one.wheel, wheels)
    names = [one.name for one in built]
    random.Random(0).shuffle(names)
    names[names.index("erllama-core")] += "[cli,conformance]"
    python = new_environment(tmp_path / "venv", *names, wheels=wheels)
    erllama = tmp_path / "venv" / "bin" / "erllama"
    listed = json.loads(run(erllama, "plugins", "--json", cwd=tmp_path))
    assert {row["distribution"] for row in listed} == {one.name for one in built}
    assert not [row for row in listed if row["state"] in {"failed", "blocked"}], listed
    (row,) = (row for row in listed if row["name"] == "sqlite")
    assert (row["kind"], row["state"]) == ("tier", "ok")
    _template_works_in(python, erllama, tmp_path)


def _template_works_in(python: Path, erllama: Path, folder: Path) -> None:
    tests = folder / "tests"
    shutil.copytree(TEMPLATE / "tests", tests, ignore=shutil.ignore_patterns("__pycache__"))
    printed = run(python, "-m", "pytest", "-q", "-W", "error", tests, cwd=tests)
    assert " passed" in printed
    assert "skipped" not in printed
    config = folder / "erllama.toml"
    config.write_text('[[tiers]]\nname = "mine"\nkind = "sqlite"\npath = "kv.sqlite"\n')
    run(erllama, "check", config, cwd=folder)
    config.write_text('[[tiers]]\nname = "mine"\nkind = "sqlite"\npaht = "kv.sqlite"\n')
    refused = subprocess.run(
        [erllama, "check", config], capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert "paht" in refused.stdout + refused.stderr


def test_the_core_alone_has_no_extra(built: list[Built], tmp_path: Path) -> None:
    """Without extras the core imports, and the command says what it lacks."""
    (core,) = (one.wheel for one in built if one.name == "erllama-core")
    python = new_environment(tmp_path / "venv", core)
    run(python, "-c", "import erllama_core; erllama_core.Engine().close()", cwd=tmp_path)
    erllama = tmp_path / "venv" / "bin" / "erllama"
    done = subprocess.run([erllama, "plugins"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "erllama-core[cli]" in done.stderr
    assert "Traceback" not in done.stderr
