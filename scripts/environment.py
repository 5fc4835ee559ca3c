# ruff: noqa: INP001 - a script, run by make
"""Make ``.venv`` hold this repository and its tools, ready to use; quick when it does already.

    python3 scripts/environment.py

The environment is made with nothing but ``venv`` and ``pip``: the core with its extras ``cli``
and ``dev``, and every distribution under ``plugins``, all editable. ``.venv/.ready`` records
what it was made from. One that was made from other ``pyproject.toml`` files is brought up to
date; one in which anything is missing is made anew.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
READY = VENV / ".ready"
PYTHON = VENV / "bin" / "python"

MODULES = ("erllama_core", "llama_cpp", "pip")
"""Imported by the check, besides the plugins' packages."""


def say(text: str) -> None:
    """Tell the person at the terminal."""
    sys.stderr.write(f"erllama: {text}\n")


def plugins() -> list[Path]:
    """The folders of the plugins' distributions."""
    return sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))


def sources() -> str:
    """A digest of all that decides what belongs into the environment."""
    digest = hashlib.sha256()
    for folder in (ROOT, *plugins()):
        digest.update(str(folder.relative_to(ROOT)).encode() + b"\0")
        digest.update((folder / "pyproject.toml").read_bytes() + b"\0")
    return digest.hexdigest()


def main() -> int:
    """Bring the environment up to date; the exit code."""
    if not is_whole():
        shutil.rmtree(VENV, ignore_errors=True)
        say(f"making {VENV.name}")
        try:
            venv.create(VENV, with_pip=True, symlinks=True)
        except (subprocess.CalledProcessError, OSError) as error:
            say(f"{sys.executable} cannot make a virtual environment: {error}")
            say("On Debian and Ubuntu the package python3-venv is missing.")
            return 1
    elif recorded().get("sources") == sources():
        return 0
    return install()


def recorded() -> dict[str, object]:
    """What ``.ready`` says; empty when the environment was never finished."""
    try:
        found = json.loads(READY.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_whole() -> bool:
    """Whether the environment was finished once, and nothing is missing since."""
    if recorded().get("root") != str(ROOT):
        # Never finished; or moved, and its scripts name the old folder.
        return False
    try:
        check = subprocess.run(
            [PYTHON, "-I", __file__, "--check"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        say(f"{VENV.name} is broken: {error}")
        return False
    if check.returncode != 0:
        reason = (check.stderr.strip() or "unknown reason").splitlines()[-1]
        say(f"{VENV.name} is broken: {reason}")
    return check.returncode == 0


def install() -> int:
    """Install everything and record it; the exit code."""
    READY.unlink(missing_ok=True)
    say("installing this repository, its plugins and its tools")
    if not any(VENV.glob("lib/python*/site-packages/llama_cpp")):
        say("the first time compiles llama.cpp, which takes about five minutes")
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--editable", f"{ROOT}[cli,dev,docs]"]
    for plugin in plugins():
        command += ["--editable", str(plugin)]
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        say("pip could not install everything; see its messages above, then run this again")
        return status
    return subprocess.run([PYTHON, "-I", __file__, "--record"], check=False).returncode


# ------------------------------------------------- inside the environment


def installed() -> set[str]:
    """The names of the distributions of the running Python."""
    return {found.name for found in importlib.metadata.distributions()}


def check() -> None:
    """Raise when a distribution, one of its files, or an importable module is missing."""
    known = recorded()["distributions"]
    assert isinstance(known, list)
    lost = set(known) - installed()
    if lost:
        raise ModuleNotFoundError(f"no longer installed: {', '.join(sorted(lost))}")
    for distribution in importlib.metadata.distributions():
        for file in distribution.files or ():
            path = Path(str(file.locate()))
            # Compiled files come and go, and .. leaves site-packages, for bin/.
            if "__pycache__" not in path.parts and not path.exists():
                raise FileNotFoundError(f"{distribution.name} lost {file}")
    packages = [found.parent.name for folder in plugins() for found in folder.glob("*/py.typed")]
    for module in (*MODULES, *packages):
        importlib.import_module(module)


def record() -> None:
    """Write ``.ready``, last of all."""
    content = {"root": str(ROOT), "sources": sources(), "distributions": sorted(installed())}
    READY.write_text(json.dumps(content, indent=1), "utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        check()
    elif sys.argv[1:] == ["--record"]:
        record()
    else:
        sys.exit(main())
