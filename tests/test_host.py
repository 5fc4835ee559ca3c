"""The plugin host, on real distributions written to a folder on ``sys.path``."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from structlog.testing import capture_logs

from erllama_core.cli.app import app
from erllama_core.compatibility import refuse_other_core
from erllama_core.errors import PluginDuplicate, PluginFailed, PluginMissing
from erllama_core.host import PluginHost, PluginListing
from erllama_core.registry import PluginFailure

GOOD = """
from erllama_core.hookspecs import hookimpl
from erllama_core.providers import PressureProvider, TierProvider

@hookimpl
def erllama_tiers():
    return [TierProvider(name={name!r}, summary="A store.", factory=lambda options: None)]
"""

HEAD = """
import attrs
from erllama_core.hookspecs import hookimpl
from erllama_core.providers import BackendProvider, PressureProvider, TierProvider

def make(options):
    return None
"""


class Site:
    """A folder of installed distributions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: list[str] = []

    def install(
        self,
        distribution: str,
        code: str,
        *,
        point: str | None = None,
        version: str = "1.2",
        value: str | None = None,
        requires: Sequence[str] = (),
    ) -> None:
        """A distribution whose entry point leads to a module with ``code``."""
        module = distribution.replace("-", "_").replace(".", "_").lower()
        (self.folder / f"{module}.py").write_text(code)
        self.modules.append(module)
        self.metadata(
            distribution,
            f"[erllama]\n{point or module} = {value or module}\n",
            version=version,
            requires=requires,
        )
        importlib.invalidate_caches()

    def metadata(
        self,
        distribution: str,
        entry_points: str,
        *,
        version: str = "1.2",
        requires: Sequence[str] = (),
    ) -> None:
        stem = distribution.replace("-", "_")
        info = self.folder / f"{stem}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
            + "".join(f"Requires-Dist: {line}\n" for line in requires)
        )
        (info / "entry_points.txt").write_bytes(entry_points.encode("utf-8", "surrogateescape"))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.syspath_prepend(tmp_path)
    # Modules that a test imports are forgotten after it.
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    return Site(tmp_path)


def failure_of(host: PluginHost, distribution: str) -> PluginFailure:
    (failure,) = (f for f in host.failures if f.origin.distribution == distribution)
    return failure


def row_of(host: PluginHost, name: str) -> PluginListing:
    (row,) = (row for row in host.listing() if row.name == name)
    return row


# -------------------------------------------------------------------------- good


def test_core_providers_without_discovery() -> None:
    """A host without discovery has the core's own providers, and nothing else."""
    host = PluginHost(discover=False)
    assert [(row.kind, row.name, row.state) for row in host.listing()] == [
        ("tier", "ram", "ok"),
        ("pressure", "noop", "ok"),
        ("processor", "thinking", "ok"),
        ("processor", "tool_calls", "ok"),
        ("processor", "stop_sequences", "ok"),
        ("processor", "utf8", "ok"),
    ]
    assert {row.distribution for row in host.listing()} == {"erllama-core"}
    assert host.failures == ()


def test_discovered_plugin(site: Site) -> None:
    """An installed distribution's provider is found, with where it comes from."""
    site.install("acme-tier", GOOD.format(name="acme"))
    host = PluginHost()
    assert host.get("tier", "acme").summary == "A store."
    assert row_of(host, "acme") == PluginListing(
        name="acme",
        kind="tier",
        distribution="acme-tier",
        version="1.2",
        state="ok",
        reason=None,
        summary="A store.",
    )


def test_entry_point_may_name_an_object(site: Site) -> None:
    """An object with hook methods is as good as a module."""
    code = HEAD + (
        "class Plugin:\n"
        "    @hookimpl\n"
        "    def erllama_tiers(self):\n"
        "        return [TierProvider('acme', 'x', make)]\n"
        "plugin = Plugin()\n"
    )
    site.install("acme-tier", code, value="acme_tier:plugin")
    assert PluginHost().get("tier", "acme").name == "acme"


def test_each_host_is_its_own(site: Site) -> None:
    """What one host registers, another one does not have."""
    site.install("acme-tier", GOOD.format(name="acme"))
    first = PluginHost()
    assert "acme" in first.registry.names("tier")
    assert "acme" not in PluginHost(discover=False).registry.names("tier")


def test_import_of_the_core_loads_nothing() -> None:
    """Importing the host imports no plugin, no llama.cpp, no numpy; nor does making one."""
    code = (
        "import sys, erllama_core.host as host\n"
        "loaded = [m for m in sys.modules if m.startswith('erllama_') "
        "and not m.startswith('erllama_core')]\n"
        "assert not loaded, loaded\n"
        "host.PluginHost()\n"
        "heavy = {'llama_cpp', 'numpy', 'psutil', 'pynvml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------ broken

BROKEN = {
    "raises on import": ("raise RuntimeError('no such luck')", "import", "no such luck"),
    "misses a dependency": ("import not_installed_at_all", "import", "not_installed_at_all"),
    "is no Python": ("def (:", "import", "SyntaxError"),
    "exits on import": ("import sys\nsys.exit('bye')", "import", "SystemExit: bye"),
    "raises in a hook": (
        HEAD + "@hookimpl\ndef erllama_tiers():\n    raise OSError('disk on fire')\n",
        "hook",
        "disk on fire",
    ),
    "exits in a hook": (
        HEAD + "@hookimpl\ndef erllama_tiers():\n    raise SystemExit(3)\n",
        "hook",
        "SystemExit: 3",
    ),
    "misspells a hook": (
        HEAD + "@hookimpl\ndef erllama_teirs():\n    return []\n",
        "register",
        "there is no hook 'erllama_teirs'; did you mean 'erllama_tiers'?",
    ),
    "forgets the marker": (
        HEAD + "def erllama_tiers():\n    return []\n",
        "register",
        "not marked",
    ),
    "has no hooks": ("x = 1\n", "register", "no hook"),
    "takes arguments": (
        HEAD + "@hookimpl\ndef erllama_tiers(config):\n    return []\n",
        "register",
        "config",
    ),
    "wraps": (
        HEAD + "@hookimpl(wrapper=True)\ndef erllama_tiers():\n    return (yield)\n",
        "register",
        "wrapper",
    ),
    "is a coroutine": (
        HEAD + "@hookimpl\nasync def erllama_tiers():\n    return []\n",
        "validate",
        "returned a coroutine",
    ),
    "returns None": (
        HEAD + "@hookimpl\ndef erllama_tiers():\n    return None\n",
        "validate",
        "returned a NoneType; it must return a list of TierProvider",
    ),
    "returns a record of another kind": (
        HEAD + "@hookimpl\ndef erllama_tiers():\n    return [PressureProvider('p', 's', make)]\n",
        "validate",
        "PressureProvider in its list",
    ),
    "has an empty name": (
        HEAD + "@hookimpl\ndef erllama_tiers():\n    return [TierProvider('', 's', make)]\n",
        "validate",
        "name ''",
    ),
    "has a name with a colon": (
        HEAD + "@hookimpl\ndef erllama_tiers():\n    return [TierProvider('a:b', 's', make)]\n",
        "validate",
        "colon",
    ),
    "has a config that is no attrs class": (
        HEAD + "@hookimpl\ndef erllama_tiers():\n"
        "    return [TierProvider('t', 's', make, config=dict)]\n",
        "validate",
        "config is dict, which is not an attrs class",
    ),
    "has an instance as its config": (
        HEAD + "@attrs.frozen\nclass C: pass\n\n@hookimpl\ndef erllama_tiers():\n"
        "    return [TierProvider('t', 's', make, config=C())]\n",
        "validate",
        "not an attrs class",
    ),
    "has a factory that is not callable": (
        HEAD + "@hookimpl\ndef erllama_tiers():\n    return [TierProvider('t', 's', 5)]\n",
        "validate",
        "factory is a int",
    ),
    "returns one name twice": (
        HEAD + "@hookimpl\ndef erllama_tiers():\n"
        "    return [TierProvider('t', 's', make), TierProvider('t', 's', make)]\n",
        "validate",
        "two providers named 't'",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_plugin_takes_only_itself_out(site: Site, what: str) -> None:
    """A plugin that is broken in this way is listed with stage and cause; others work."""
    code, stage, words = BROKEN[what]
    site.install("aaa-good", GOOD.format(name="before"))
    site.install("broken-dist", code, version="0.3", point="thing")
    site.install("zzz-good", GOOD.format(name="after"))
    with capture_logs() as logs:
        host = PluginHost()
    assert host.get("tier", "before").name == "before"
    assert host.get("tier", "after").name == "after"
    failure = failure_of(host, "broken-dist")
    assert (failure.stage, failure.origin.version) == (stage, "0.3")
    row = row_of(host, "thing")
    assert (row.state, row.kind, row.distribution) == ("failed", None, "broken-dist")
    assert row.reason is not None
    assert words in row.reason
    assert row.reason.startswith(f"{stage}: ")
    assert "\n" not in row.reason
    assert [log["stage"] for log in logs if log["event"] == "plugin.failed"] == [stage]


def test_one_failing_hook_takes_the_whole_plugin_out(site: Site) -> None:
    """Nothing of a plugin is used when one of its hooks fails; its names say why."""
    code = HEAD + (
        "@hookimpl\ndef erllama_tiers():\n    return [TierProvider('half', 's', make)]\n"
        "@hookimpl\ndef erllama_pressure_sources():\n    raise ValueError('broken half')\n"
    )
    site.install("half-dist", code)
    host = PluginHost()
    with pytest.raises(PluginFailed, match="broken half") as caught:
        host.get("tier", "half")
    assert isinstance(caught.value.__cause__, ValueError)


def test_failed_plugin_is_told_when_its_name_is_asked_for(site: Site) -> None:
    """A plugin that failed on import is found by its entry point's name."""
    site.install("acme-tier", "raise RuntimeError('no luck')", point="acme")
    with pytest.raises(PluginFailed, match=r"acme-tier 1\.2 failed at stage 'import'.*no luck"):
        PluginHost().get("tier", "acme")


def test_damaged_metadata_of_one_distribution(site: Site) -> None:
    """A damaged entry_points.txt, which importlib.metadata refuses, hides no other plugin."""
    site.install("acme-tier", GOOD.format(name="acme"))
    site.metadata("damaged-dist", "[erllama]\nthis line has no equals sign\n")
    site.metadata("binary-dist", "[erllama]\n\udcff\udcfe = x\n")
    host = PluginHost()
    assert host.get("tier", "acme").name == "acme"
    assert failure_of(host, "damaged-dist").stage == "metadata"


def test_shadowed_distribution_is_not_loaded(site: Site, tmp_path: Path) -> None:
    """Of two versions on the path the one that imports see is loaded, once."""
    site.install("acme-tier", GOOD.format(name="acme"))
    # This one's first version on the path has no plugin any more.
    site.metadata("other-dist", "[console_scripts]\nx = y:z\n", version="2")
    later = tmp_path / "later"
    later.mkdir()
    sys.path.append(str(later))
    shadowed = Site(later)
    shadowed.metadata("acme-tier", "[erllama]\nacme_tier = acme_tier\n", version="0.1")
    shadowed.metadata("other-dist", "[erllama]\nother = not_there\n", version="1")
    host = PluginHost()
    assert host.failures == ()
    assert row_of(host, "acme").version == "1.2"


# ------------------------------------------------------------------ another core

BOOM = "raise AssertionError('this plugin must not be imported')"
CORE = importlib.metadata.version("erllama-core")

OTHER_CORES = {
    "a later one": ["attrs>=24", "erllama-core>=7.1,<8"],
    "an earlier one": ["erllama-core<0.0.5"],
    "written in another way": ["Erllama_Core (>=7.1)"],
    "with an extra": ["erllama-core[cli]>=7.1"],
    "for this Python": ["erllama-core>=7.1; python_version >= '3'"],
    "one of two lines": ["erllama-core>=0.0.1", "erllama-core!=" + CORE],
}


@pytest.mark.parametrize("requires", OTHER_CORES.values(), ids=OTHER_CORES)
def test_a_plugin_for_another_core_is_not_imported(site: Site, requires: list[str]) -> None:
    """One whose distribution requires another core is listed with both versions and what to do,
    in the table and as JSON, and everything else works.
    """
    site.install("aaa-good", GOOD.format(name="before"))
    site.install("acme-tier", BOOM, point="acme", requires=requires)
    site.install("zzz-good", GOOD.format(name="after"))
    host = PluginHost()
    assert host.get("tier", "before").name == "before"
    assert host.get("tier", "after").name == "after"
    assert failure_of(host, "acme-tier").stage == "version"
    row = row_of(host, "acme")
    assert (row.kind, row.state, row.distribution, row.version) == (
        None,
        "failed",
        "acme-tier",
        "1.2",
    )
    assert row.reason is not None
    assert row.reason.startswith("version: PluginFailed: acme-tier 1.2 is built for erllama-core")
    assert f"this is erllama-core {CORE}" in row.reason
    assert f"pip install --upgrade acme-tier erllama-core=={CORE}" in row.reason
    with pytest.raises(PluginFailed, match=r"'acme' is missing because .* is built for"):
        host.get("tier", "acme")
    listed = CliRunner().invoke(app, ["plugins", "--json"])
    (told,) = (row for row in json.loads(listed.stdout) if row["name"] == "acme")
    assert (told["state"], told["reason"]) == ("failed", row.reason)
    table = CliRunner().invoke(app, ["plugins"]).stdout
    assert "acme-tier 1.2 is built for" in " ".join(table.split())


@pytest.mark.parametrize(
    "requires",
    [
        [],
        ["attrs>=24"],
        ["erllama-core"],
        [f"erllama-core>={CORE},<{CORE}.1"],
        ["erllama-core>=7.1; extra == 'later'"],
        ["erllama-core>=7.1; python_version < '3'"],
        ["erllama-core-tools>=7.1", "erllama-core-tools what is this"],
        ["not a requirement at all"],
    ],
)
def test_a_plugin_for_this_core(site: Site, requires: list[str]) -> None:
    """A range that this core is in, none, and what is said of others or does not apply here."""
    site.install("acme-tier", GOOD.format(name="acme"), requires=requires)
    host = PluginHost()
    assert host.failures == ()
    assert host.get("tier", "acme").name == "acme"


def test_a_pre_release_of_the_core_is_one_of_its_versions() -> None:
    """Whoever tries a core before its release can use the plugins that are for it."""
    requires = ["erllama-core>=0.1,<0.2"]
    refuse_other_core("erllama-core", "0.1.1rc1", "acme", "1", requires)
    with pytest.raises(PluginFailed, match=r"this is erllama-core 0\.2\.0rc1"):
        refuse_other_core("erllama-core", "0.2.0rc1", "acme", "1", requires)


def test_a_core_that_is_not_installed_has_no_version_to_compare() -> None:
    """From a mere source tree, whose version nobody knows, every plugin is loaded."""
    refuse_other_core("erllama-core", None, "acme", "1", ["erllama-core>=7"])


def test_a_range_that_cannot_be_read(site: Site) -> None:
    """What is said of the core and makes no sense is quoted, and the plugin is left out."""
    site.install("acme-tier", BOOM, requires=["erllama-core ~> 0.1"])
    failure = failure_of(PluginHost(), "acme-tier")
    assert failure.stage == "version"
    assert "'Requires-Dist: erllama-core ~> 0.1', which cannot be read" in str(failure)


def test_a_blocked_plugin_for_another_core_is_blocked(site: Site) -> None:
    """What was left out on purpose is no failure."""
    site.install("acme-tier", BOOM, point="acme", requires=["erllama-core>=7"])
    host = PluginHost(block=["acme-tier"])
    assert host.failures == ()
    assert row_of(host, "acme").state == "blocked"


# -------------------------------------------------------------------- duplicates


def test_two_distributions_claim_one_name(site: Site) -> None:
    """Neither is used, both are named when it is asked for, both are listed as failed."""
    site.install("first-dist", GOOD.format(name="same"))
    site.install("second-dist", GOOD.format(name="same"))
    host = PluginHost()
    with pytest.raises(PluginDuplicate) as caught:
        host.get("tier", "same")
    assert "first-dist 1.2" in str(caught.value)
    assert "second-dist 1.2" in str(caught.value)
    assert "same" not in host.registry.names("tier")
    rows = [row for row in host.listing() if row.name == "same"]
    assert {(row.distribution, row.state) for row in rows} == {
        ("first-dist", "failed"),
        ("second-dist", "failed"),
    }
    assert all("PluginDuplicate" in (row.reason or "") for row in rows)


def test_claiming_a_name_of_the_core(site: Site) -> None:
    """The core's own names are no exception: a silent replacement would be worse."""
    site.install("acme-tier", GOOD.format(name="ram"))
    with pytest.raises(PluginDuplicate, match=r"erllama-core .* and acme-tier"):
        PluginHost().get("tier", "ram")


def test_blocking_one_resolves_a_duplicate(site: Site) -> None:
    """The remaining distribution's provider is used."""
    site.install("first-dist", GOOD.format(name="same"))
    site.install("second-dist", GOOD.format(name="same"))
    host = PluginHost(block=["first-dist"])
    assert host.get("tier", "same").name == "same"
    assert row_of(host, "same").distribution == "second-dist"


def test_same_entry_point_name_in_two_distributions(site: Site) -> None:
    """Entry points may be called alike; only provider names must differ."""
    site.install("first-dist", GOOD.format(name="one"), point="plugin")
    site.install("second-dist", GOOD.format(name="two"), point="plugin")
    host = PluginHost()
    assert host.failures == ()
    assert {"one", "two"} <= set(host.registry.names("tier"))


def test_one_name_in_two_kinds_is_no_duplicate(site: Site) -> None:
    """A tier and a pressure source may be called alike."""
    code = HEAD + (
        "@hookimpl\ndef erllama_pressure_sources():\n"
        "    return [PressureProvider('acme', 's', make)]\n"
    )
    site.install("first-dist", GOOD.format(name="acme"))
    site.install("second-dist", code)
    host = PluginHost()
    assert host.get("tier", "acme").name == host.get("pressure", "acme").name


# --------------------------------------------------------------- allow and block


@pytest.mark.parametrize("name", ["bad-dist", "BAD_Dist", "bad.dist", "its-point", "Its_Point"])
def test_blocked_plugin_is_not_imported(site: Site, name: str) -> None:
    """A blocked plugin is listed and not imported, whichever name and spelling blocks it."""
    site.install("bad-dist", BOOM, point="its_point")
    host = PluginHost(block=[name])
    assert host.failures == ()
    row = row_of(host, "its_point")
    assert (row.state, row.reason) == ("blocked", "blocked by plugins.block")
    with pytest.raises(PluginMissing, match=r"bad-dist 1\.2 is blocked by plugins\.block"):
        host.get("tier", "its_point")


def test_allow_leaves_the_others_out(site: Site) -> None:
    """With a list of allowed plugins, no other one is imported; the core stays."""
    site.install("good-dist", GOOD.format(name="good"))
    site.install("bad-dist", BOOM)
    host = PluginHost(allow=["good_dist"])
    assert host.get("tier", "good").name == "good"
    assert row_of(host, "bad_dist").reason == "not in plugins.allow"
    assert host.failures == ()
    assert "ram" in host.registry.names("tier")


def test_block_wins_over_allow(site: Site) -> None:
    """What is both allowed and blocked is blocked."""
    site.install("bad-dist", BOOM)
    host = PluginHost(allow=["bad-dist"], block=["bad-dist"])
    assert row_of(host, "bad_dist").state == "blocked"


def test_a_string_is_no_list_of_names() -> None:
    """allow="name" is refused: it would allow its letters."""
    with pytest.raises(TypeError, match="sequences of names"):
        PluginHost(allow="stub", discover=False)


# ----------------------------------------------------------- explicit registration


def test_register_a_module(site: Site) -> None:
    """A module without an entry point is registered by a call."""
    (site.folder / "mine.py").write_text(GOOD.format(name="mine"))
    host = PluginHost(discover=False)
    host.register(importlib.import_module("mine"))
    assert host.get("tier", "mine").name == "mine"
    row = row_of(host, "mine")
    assert (row.distribution, row.version, row.state) == (None, None, "ok")


def test_register_twice(site: Site) -> None:
    """Registering one object again raises, and what was registered stays."""
    (site.folder / "mine.py").write_text(GOOD.format(name="mine"))
    module = importlib.import_module("mine")
    host = PluginHost(discover=False)
    host.register(module)
    with pytest.raises(PluginFailed, match="already registered"):
        host.register(module)
    assert host.get("tier", "mine").name == "mine"


def test_failed_registration_leaves_nothing_behind(site: Site) -> None:
    """What fails to register raises, is listed, and can be registered once it is repaired."""

    class Plugin:
        def erllama_tiers(self) -> list[object]:
            return []

    from erllama_core.hookspecs import hookimpl

    broken = True

    class Late:
        @hookimpl
        def erllama_tiers(self) -> list[object]:
            if broken:
                raise OSError("not yet")
            return []

    host = PluginHost(discover=False)
    with pytest.raises(PluginFailed, match="not marked"):
        host.register(Plugin(), name="plain")
    late = Late()
    with pytest.raises(PluginFailed, match="not yet") as caught:
        host.register(late, name="late")
    assert isinstance(caught.value.__cause__, OSError)
    assert row_of(host, "late").state == "failed"
    broken = False
    host.register(late, name="late")


def test_a_class_is_no_plugin() -> None:
    """A class whose instance was meant is refused in words."""

    class Plugin:
        pass

    with pytest.raises(PluginFailed, match="neither a module nor an object"):
        PluginHost(discover=False).register(Plugin)
