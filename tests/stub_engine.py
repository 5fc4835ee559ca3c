"""An engine with the stub backend, for tests."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from erllama_core import Engine, Model, PluginHost, load_config

KV_CLASSES = ("span", "checkpoint", "whole")


@functools.cache
def installed_plugins() -> PluginHost:
    """What is installed, looked for once: that takes longer than all else of an engine."""
    return PluginHost()


def make_engine(root: Path | None = None, **sections: Any) -> Engine:
    """An engine with a RAM tier and, with a root, a disk tier named ``disk``."""
    config: dict[str, Any] = {**sections}
    tiers = list(config.pop("tiers", []))
    if root is not None:
        tiers.append({"name": "disk", "kind": "disk", "root": str(root)})
    plugins = None if "plugins" in config else installed_plugins()
    return Engine(load_config({**config, "tiers": tiers}, environ={}), plugins=plugins)


def load_stub(
    engine: Engine,
    model_id: str = "stub",
    *,
    tier: tuple[str, ...] | list[str] = ("ram",),
    context_opts: dict[str, Any] | None = None,
    policy: dict[str, Any] | None = None,
    adapters: Sequence[Path | dict[str, Any]] = (),
    **model_opts: Any,
) -> Model:
    """A stub model; keyword arguments are its ``model_opts``.

    It keeps no residents unless told to: what is reused comes from the tiers.
    """
    return engine.load_model(
        model_id,
        backend="stub",
        tier=list(tier),
        context_opts={"n_ctx": 1024, "n_seq_max": 2, "resident_cells_max": 0}
        | (context_opts or {}),
        policy={"boundary_align_tokens": 32, "min_tokens": 8, "cold_min_tokens": 8}
        | (policy or {}),
        model_opts=model_opts,
        adapters=[one if isinstance(one, dict) else {"path": one} for one in adapters],
    )
