"""No provider of this repository is without the kit: each has a conformance class of its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from erllama_core.host import PluginHost
from erllama_core.registry import OFFICIAL

ROOT = Path(__file__).resolve().parent.parent
KITS = {
    "backend": "BackendConformance",
    "tier": "TierConformance",
    "pressure": "PressureConformance",
    "processor": "ProcessorConformance",
}
PLUGINS = {
    f"erllama-{path.parent.name}".replace("_", "-")
    for path in ROOT.glob("plugins/*/pyproject.toml")
}
Provider = tuple[str, str]


def conformance_files() -> list[Path]:
    folders = [ROOT / "tests", *ROOT.glob("plugins/*/tests")]
    found = [path for folder in folders for path in folder.glob("*_conformance.py")]
    return [path for path in found if "Conformance" in path.read_text("utf-8")]


def subjects_of(path: Path) -> Iterator[Provider]:
    """The providers that the file's conformance classes take their subjects from.

    That is where a class of the kind's kit asks a plugin host for the provider, by its name.
    """
    classes = [n for n in ast.parse(path.read_bytes()).body if isinstance(n, ast.ClassDef)]
    bases = {one.name: [ast.unparse(base) for base in one.bases] for one in classes}

    def kit_of(name: str) -> str:
        above = bases.get(name)
        return name if above is None else kit_of(above[0])

    for one in classes:
        for node in ast.walk(one):
            match node:
                case ast.Call(
                    func=ast.Attribute(attr="get" | "find"),
                    args=[ast.Constant(str(kind)), ast.Constant(str(name))],
                ) if kit_of(one.name) == KITS.get(kind):
                    yield kind, name


def test_every_provider_has_its_conformance_class() -> None:
    """What the core and the plugins of this repository provide is what the kit is run on."""
    ours = {"erllama-core", *PLUGINS}
    rows = [row for row in PluginHost().listing() if row.distribution in ours]
    assert {row.distribution for row in rows} == ours, "a plugin of the repository is not installed"
    provided = {(str(row.kind), row.name) for row in rows if row.kind in KITS}
    tested = {provider for path in conformance_files() for provider in subjects_of(path)}
    assert tested == provided


def test_the_host_knows_what_to_install() -> None:
    """A name that a plugin of this repository provides is in the table of what to install."""
    rows = [row for row in PluginHost().listing() if row.kind in KITS]
    found = {(row.kind, row.name): row.distribution for row in rows if row.distribution in PLUGINS}
    assert found == OFFICIAL
