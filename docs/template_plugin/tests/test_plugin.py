"""What the plugin is for: an engine that finds its state again after a restart."""

from __future__ import annotations

from pathlib import Path

import pytest
from erllama_tier_sqlite import plugin

from erllama_core import Engine, PluginHost, load_config
from erllama_core.errors import ConfigError

PROMPT = "What was computed once is read from the database the next time. " * 4


def engine_with(**tier: object) -> Engine:
    # An installed plugin is found by its entry point; registering works without.
    host = PluginHost(block=["erllama-tier-sqlite"])
    host.register(plugin)
    table = {"name": "mine", "kind": "sqlite", **tier}
    return Engine(load_config({"tiers": [table]}, environ={}), plugins=host)


def test_a_restart_reads_from_the_database(tmp_path: Path) -> None:
    """The second engine computes nothing of the prompt."""
    pytest.importorskip("erllama_backend_stub", reason="the stub backend is not installed")
    kinds = []
    for _ in range(2):
        with engine_with(path=str(tmp_path / "kv.sqlite"), quota_bytes="64MiB") as engine:
            model = engine.load_model(backend="stub", tier=["mine"])
            kinds.append(model.complete(PROMPT, response_tokens=4).cache_hit_kind)
    assert kinds == ["cold", "exact"]


def test_mistakes_in_the_table_are_told() -> None:
    """A missing path and a quota of nothing are named with their place."""
    with pytest.raises(ConfigError, match=r"tiers\[\d\].path"):
        engine_with()
    with pytest.raises(ConfigError, match=r"tiers\[\d\].quota_bytes"):
        engine_with(path="kv.sqlite", quota_bytes=0)
