"""The hooks that a plugin may implement.

Hooks discover, objects work: those that return providers are called once, when a plugin host is
made, on the thread that makes it, before any model is loaded. Such a hook must return quickly
and must not start native libraries; that is for a provider's ``factory``, at first use. One that
raises, or returns something else than told here, takes only its own plugin out: the failure is
kept and listed by ``erllama plugins``.

Those that are told of something are called by an engine whenever it happens, on one thread of
the engine's own that does nothing else, one after another in the order of what happened. They
may block, which delays the other listeners and no request; while too many notifications wait,
further ones are dropped and counted. What they return is ignored; what they raise is logged, and
the next notification comes as usual.

A plugin implements any subset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pluggy

from erllama_core.interfaces.telemetry import (
    CacheEvent,
    ModelLoaded,
    PressureSampled,
    RequestFinished,
)
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


@hookspec
def erllama_model_loaded(event: ModelLoaded) -> None:
    """A model can take requests."""


@hookspec
def erllama_request_finished(event: RequestFinished) -> None:
    """A request's caller was answered."""


@hookspec
def erllama_cache_event(event: CacheEvent) -> None:
    """A stored object came into a tier, did not, or left it. One call for each object and tier."""


@hookspec
def erllama_pressure_sampled(event: PressureSampled) -> None:
    """The pressure monitor has read its sources, and acted on what it read."""
