"""The hooks that a plugin may implement.

Hooks discover, objects work: each is called once, when a plugin host is made, on the thread
that makes it, before any model is loaded. A hook must return quickly and must not start
native libraries; that is for a provider's ``factory``, at first use. A hook that raises, or
returns something else than told here, takes only its own plugin out: the failure is kept
and listed by ``erllama plugins``. A plugin implements any subset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pluggy

from erllama_core.providers import (
    BackendProvider,
    PressureProvider,
    StreamProcessorProvider,
    TierProvider,
)

PROJECT: Final = "erllama"
"""Name of the pluggy project and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a plugin's functions as implementations of the hooks below."""


@hookspec
def erllama_backends() -> Sequence[BackendProvider]:  # type: ignore[empty-body]
    """Ways to run models, chosen by a model's ``backend``."""


@hookspec
def erllama_tiers() -> Sequence[TierProvider]:  # type: ignore[empty-body]
    """Kinds of cache tiers, chosen by a tier's ``kind``."""


@hookspec
def erllama_pressure_sources() -> Sequence[PressureProvider]:  # type: ignore[empty-body]
    """Memory-pressure sources, chosen by ``pressure.source``."""


@hookspec
def erllama_stream_processors() -> Sequence[StreamProcessorProvider]:  # type: ignore[empty-body]
    """Stream processors, chosen and ordered by a model's ``processors``."""
