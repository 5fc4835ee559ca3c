"""The architecture, held by tests: who may import whom, and what every distribution has."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "erllama_core"
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))

# What each part of the core may import of the core, besides itself. A part is a module or a
# package directly below erllama_core. Imports point up this table, never down; what third
# parties are written against is at its top.

FACTS = {"errors", "results", "prompt"}
CONTRACTS = FACTS | {"interfaces", "providers", "hookspecs"}
ROOMS = {"cache", "stream", "pressure"}

MAY_IMPORT = {
    "errors": {"results"},
    "results": set(),
    "prompt": set(),
    "user_cache": set(),
    "signing": set(),
    "interfaces": FACTS,
    "providers": {"interfaces"},
    "hookspecs": {"providers", "interfaces"},
    # The rooms know neither one another nor a model.
    "cache": CONTRACTS,
    "stream": CONTRACTS,
    "pressure": CONTRACTS,
    "grammar": CONTRACTS,
    # Plugins, the core's own among them, and the configuration that names them.
    "registry": CONTRACTS,
    "builtin": CONTRACTS | ROOMS,
    "telemetry": {"interfaces"},
    "compatibility": {"errors"},
    "host": CONTRACTS | {"registry", "builtin", "telemetry", "compatibility"},
    "config": CONTRACTS | {"registry", "host", "cache", "pressure", "signing"},
    "logs": {"interfaces", "config"},
    "conformance": CONTRACTS | {"stream"},
    # One loaded model; then all of them; then the command line.
    "model": CONTRACTS | ROOMS | {"config", "grammar", "user_cache"},
    "engine": CONTRACTS
    | ROOMS
    | {"config", "registry", "host", "model", "signing", "telemetry", "logs"},
    "cli": CONTRACTS
    | ROOMS
    | {"config", "registry", "host", "model", "engine", "user_cache", "logs"},
    "__main__": {"cli"},
    # The names that erllama_core itself exports.
    "__init__": CONTRACTS | ROOMS | {"config", "host", "model", "engine", "signing"},
}

PLUGIN_MAY_IMPORT = CONTRACTS

# Modules that `import erllama_core` must not load.
LAZY = {"llama_cpp", "numpy", "click", "rich", "jinja2", "psutil", "pynvml", "pytest"}


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a module imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def core_part(dotted: str) -> str | None:
    """The part of the core that an imported name belongs to; None for other packages."""
    package, *inner = dotted.split(".")
    if package != "erllama_core":
        return None
    if inner and ((CORE / inner[0]).is_dir() or (CORE / f"{inner[0]}.py").exists()):
        return inner[0]
    return "__init__"


@pytest.mark.parametrize("path", modules(CORE), ids=name_of)
def test_imports_of_the_core_point_one_way(path: Path) -> None:
    """Every module of the core imports only what the table above allows to its part."""
    part = path.relative_to(CORE).parts[0].removesuffix(".py")
    assert part in MAY_IMPORT, f"{part} is not in the table: say what it may import"
    for line, dotted in imports(path):
        other = core_part(dotted)
        if other is not None and other != part:
            assert other in MAY_IMPORT[part], f"{name_of(path)}:{line}: {part} imports {dotted}"


def test_the_table_has_no_cycle() -> None:
    """The parts can be put in an order in which each imports only earlier ones."""
    done: set[str] = set()
    left = dict(MAY_IMPORT)
    while left:
        free = {part for part, others in left.items() if others & left.keys() <= {part}}
        assert free, f"these import one another: {sorted(left)}"
        done |= free
        left = {part: others for part, others in left.items() if part not in free}


@pytest.mark.parametrize("path", modules(CORE), ids=name_of)
def test_the_core_knows_no_plugin(path: Path) -> None:
    """No module of the core imports a plugin's package, or what only a plugin needs."""
    foreign = {f"erllama_{plugin.name}" for plugin in PLUGINS} | {"llama_cpp", "numpy", "psutil"}
    for line, dotted in imports(path):
        assert dotted.partition(".")[0] not in foreign, f"{name_of(path)}:{line}: {dotted}"


@pytest.mark.parametrize(
    "path",
    [path for plugin in PLUGINS for path in modules(plugin / f"erllama_{plugin.name}")],
    ids=name_of,
)
def test_a_plugin_uses_the_contracts_alone(path: Path) -> None:
    """A plugin imports of the core what any third party may, and no other plugin."""
    if path.name == "pytest_plugin.py":
        return  # no part of the plugin: it is for applications, and uses what they use
    own = path.relative_to(ROOT / "plugins").parts[1]
    for line, dotted in imports(path):
        place = f"{name_of(path)}:{line}: {dotted}"
        part = core_part(dotted)
        if part is not None:
            assert part in PLUGIN_MAY_IMPORT, place
        elif dotted.startswith("erllama_"):
            assert dotted.partition(".")[0] == own, place


def test_importing_the_core_is_light() -> None:
    """``import erllama_core`` loads no plugin and no native or terminal library, and leaves
    logging as it was.
    """
    program = (
        "import json, logging, sys\n"
        "import attrs, cattrs, pluggy, structlog, xxhash\n"
        "before = set(sys.modules)  # structlog loads rich where it is installed\n"
        "import erllama_core\n"
        "assert not logging.root.handlers and not structlog.is_configured()\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = {module.partition(".")[0] for module in json.loads(run.stdout)}
    assert "erllama_core" in loaded
    assert not loaded & (LAZY | {f"erllama_{plugin.name}" for plugin in PLUGINS})


# --------------------------------------------------------------- distributions


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))


def test_the_plugins_are_there() -> None:
    """The glob that the tests, the set-up and the type check share finds the plugins."""
    assert {plugin.name for plugin in PLUGINS} >= {"backend_llama", "backend_stub", "tier_disk"}
    assert {path.name for path in (ROOT / "plugins").iterdir() if path.is_dir()} == {
        plugin.name for plugin in PLUGINS
    }


@pytest.mark.parametrize("plugin", PLUGINS, ids=name_of)
def test_a_plugin_is_a_whole_distribution(plugin: Path) -> None:
    """Each plugin has its metadata, a README, a typed package, tests and an entry point."""
    package = f"erllama_{plugin.name}"
    metadata = project(plugin)["project"]
    assert metadata["name"] == package.replace("_", "-")
    assert metadata["version"] == project(ROOT)["project"]["version"]
    assert metadata["requires-python"] == project(ROOT)["project"]["requires-python"]
    assert metadata["license"] == "MIT"
    assert any(need.startswith("erllama-core") for need in metadata["dependencies"])
    assert metadata["readme"] == "README.md"
    assert (plugin / "README.md").read_text("utf-8").startswith("# ")
    assert (plugin / package / "py.typed").exists()
    assert list((plugin / "tests").glob("test_*.py"))
    entries = metadata["entry-points"]["erllama"]
    assert set(entries.values()) == {f"{package}.plugin"}
    assert (plugin / package / "plugin.py").exists()


def test_the_core_is_typed() -> None:
    """The core tells type checkers that its annotations are to be used."""
    assert (CORE / "py.typed").exists()


@pytest.mark.parametrize(
    "path",
    [path for path in ROOT.glob("**/erllama_*/**/__init__.py") if ".venv" not in path.parts],
    ids=name_of,
)
def test_packages_hold_no_logic(path: Path) -> None:
    """An ``__init__.py`` holds imports, ``__all__`` and lazy attributes only."""
    for number, node in enumerate(ast.parse(path.read_bytes()).body):
        docstring = number == 0 and isinstance(node, ast.Expr)
        lazy = isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
        if isinstance(node, ast.Assign):
            assert [ast.unparse(target) for target in node.targets] == ["__all__"]
        else:
            assert docstring or lazy or isinstance(node, ast.Import | ast.ImportFrom), (
                f"{name_of(path)}:{node.lineno}"
            )


def test_test_modules_have_names_of_their_own() -> None:
    """No two test modules share a name, so that a report names one file."""
    found = [*ROOT.glob("tests/**/test_*.py"), *ROOT.glob("plugins/*/tests/**/test_*.py")]
    names = [path.name for path in found]
    assert sorted(set(names)) == sorted(names)


# ----------------------------------------------------------------- repository


def tracked() -> list[Path]:
    """The files that are, or would be, under version control."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git work tree")
    run = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    paths = [ROOT / name for name in run.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_package_index() -> None:
    """Where packages come from is each user's configuration, never this repository's."""
    hosts = [".".join(labels) for labels in (("pypi", "org"), ("pythonhosted", "org"))]
    options = [f"--{option}" for option in ("index-url", "extra-index-url", "find-links")]
    for path in tracked():
        text = path.read_text("utf-8", "replace")
        for forbidden in hosts if path == Path(__file__) else (*hosts, *options):
            assert forbidden not in text, f"{name_of(path)} names {forbidden}"


def test_no_model_is_in_the_repository() -> None:
    """Tracked files are sources: nothing above a megabyte, and nothing binary but small seeds.

    Seeds of model files are headers alone: the tensors are made when they are used.
    """
    seeds = ROOT / "fuzz" / "corpus"
    for path in tracked():
        is_seed = path.is_relative_to(seeds)
        assert path.stat().st_size < (32 << 10 if is_seed else 1 << 20), name_of(path)
        assert is_seed or b"\0" not in path.read_bytes(), name_of(path)
