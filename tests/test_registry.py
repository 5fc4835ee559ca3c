"""Names to providers: what is missing, what is unusable, and the words for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erllama_core.builtin import erllama_pressure_sources, erllama_tiers
from erllama_core.cache.ram_options import RamOptions, default_quota_bytes
from erllama_core.errors import PluginFailed, PluginMissing, PluginUnavailable
from erllama_core.hookspecs import hookimpl
from erllama_core.host import PluginHost
from erllama_core.providers import Available, ByteSize, NoOptions, TierProvider, Unavailable
from erllama_core.registry import OFFICIAL


def make(options: Any) -> Any:
    raise AssertionError("no test opens a tier")


REFERENCED = TierProvider("by-reference", "x", make)
UNUSABLE = TierProvider("", "x", make)


class Tiers:
    """A plugin with one tier."""

    def __init__(self, probe: Callable[[], Any], name: str = "probed") -> None:
        self.provider = TierProvider(name, "x", make, probe=probe)

    @hookimpl
    def erllama_tiers(self) -> list[TierProvider]:
        return [self.provider]


@pytest.fixture
def host() -> PluginHost:
    return PluginHost(discover=False)


# ----------------------------------------------------------------------- missing


def test_mistyped_name(host: PluginHost) -> None:
    """The nearest name is told."""
    with pytest.raises(PluginMissing, match=r"unknown pressure source 'nop'.*mean 'noop'\?"):
        host.get("pressure", "nop")


def test_known_names_are_told(host: PluginHost) -> None:
    """Where nothing is near, all names are told."""
    with pytest.raises(PluginMissing, match="unknown tier kind 'zzz'; known: ram"):
        host.get("tier", "zzz")


@pytest.mark.parametrize(("kind", "name"), OFFICIAL)
def test_official_plugin_that_is_not_installed(host: PluginHost, kind: Any, name: str) -> None:
    """The distribution to install is told, for every one that this project publishes."""
    with pytest.raises(PluginMissing, match=f"pip install {OFFICIAL[kind, name]}"):
        host.get(kind, name)


def test_mistyped_official_name(host: PluginHost) -> None:
    """A near miss of something not installed tells the name and the distribution."""
    with pytest.raises(PluginMissing, match=r"pip install erllama-backend-llama.*mean 'llama'"):
        host.get("backend", "lama")


def test_official_distributions_are_in_this_repository() -> None:
    """Every distribution named for installation exists, and provides the name."""
    plugins = Path(__file__).parents[1] / "plugins"
    for (_, name), distribution in OFFICIAL.items():
        folder = plugins / distribution.removeprefix("erllama-").replace("-", "_")
        assert f'name = "{distribution}"' in (folder / "pyproject.toml").read_text()
        sources = folder.glob("erllama_*/plugin.py")
        assert any(f'"{name}"' in source.read_text() for source in sources), name


# ------------------------------------------------------------------------ probes


def test_probe_runs_once_and_late(host: PluginHost) -> None:
    """Registering runs no probe; asking for the provider runs it, once."""
    calls: list[int] = []

    def probe() -> Available:
        calls.append(1)
        return Available()

    host.register(Tiers(probe))
    assert calls == []
    assert host.get("tier", "probed") is host.get("tier", "probed")
    host.listing()
    assert calls == [1]


def _raises() -> Available:
    raise RuntimeError("probe is broken")


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        (lambda: Unavailable("no such device"), "no such device"),
        (_raises, "its probe raised RuntimeError: probe is broken"),
        (lambda: sys.exit(1), "its probe raised SystemExit: 1"),
        (lambda: True, "its probe returned True, neither Available nor Unavailable"),
    ],
    ids=["unavailable", "raises", "exits", "returns-nonsense"],
)
def test_unavailable(host: PluginHost, probe: Callable[[], Any], reason: str) -> None:
    """Whatever a probe does but say Available makes the provider unavailable, with a reason."""
    host.register(Tiers(probe))
    with pytest.raises(PluginUnavailable, match="cannot be used on this machine") as caught:
        host.get("tier", "probed")
    assert reason in str(caught.value)
    (row,) = (row for row in host.listing() if row.name == "probed")
    assert (row.state, row.reason) == ("unavailable", reason)
    assert "probed" in host.registry.names("tier")


# -------------------------------------------------------------------- references


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """This module under a name that can be imported."""
    monkeypatch.setitem(sys.modules, "registry_samples", sys.modules[__name__])


@pytest.mark.usefixtures("importable")
def test_reference(host: PluginHost) -> None:
    """``package.module:attribute`` stands wherever a name does."""
    assert host.get("tier", "registry_samples:REFERENCED") is REFERENCED


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(
    ("kind", "reference", "words"),
    [
        ("tier", "no_such_module:x", "No module named 'no_such_module'"),
        ("tier", "registry_samples:nothing", "nothing"),
        ("tier", "registry_samples:make", "is a function; a tier kind is given by an instance"),
        ("backend", "registry_samples:REFERENCED", "is a TierProvider; a backend is given by"),
        ("tier", "registry_samples:UNUSABLE", "not a usable provider"),
        ("tier", ":x", "cannot be loaded"),
        ("tier", "x:", "cannot be loaded"),
    ],
)
def test_bad_reference(host: PluginHost, kind: Any, reference: str, words: str) -> None:
    """A reference that leads to no provider of the kind says what is there instead."""
    with pytest.raises(PluginFailed) as caught:
        host.get(kind, reference)
    assert words in str(caught.value)
    assert reference in str(caught.value)


# ----------------------------------------------------------------- the core's own


def test_ram_quota_default() -> None:
    """The RAM tier takes a tenth of memory, 2 GiB at most."""
    quota = default_quota_bytes()
    assert 0 < quota <= 2 << 30


@pytest.mark.parametrize(
    ("pages", "expected"), [(1 << 40, 2 << 30), (1 << 18, (1 << 30) // 10), (-1, 256 << 20)]
)
def test_ram_quota_by_memory(monkeypatch: pytest.MonkeyPatch, pages: int, expected: int) -> None:
    """Much memory: 2 GiB. Little: a tenth of it. Unknown: a fixed, small size."""
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": pages}
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)
    assert default_quota_bytes() == expected


def test_ram_tier_is_made_with_its_quota() -> None:
    """The factory passes the quota on, or the default."""
    (provider,) = erllama_tiers()
    assert provider.config is RamOptions
    tier = provider.factory(RamOptions(ByteSize(12345)))
    assert tier.usage().quota_bytes == 12345
    tier.close()
    tier = provider.factory(RamOptions())
    assert tier.usage().quota_bytes == default_quota_bytes()
    tier.close()


def test_noop_source() -> None:
    """The noop source never reads anything."""
    (provider,) = erllama_pressure_sources()
    source = provider.factory(NoOptions())
    assert source.sample() == ()
    source.close()
    source.close()
