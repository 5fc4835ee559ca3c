"""The core's own providers, registered through the same hooks as anybody's."""

from __future__ import annotations

from collections.abc import Sequence

from erllama_core.cache.ram_options import RamOptions, default_quota_bytes
from erllama_core.hookspecs import hookimpl
from erllama_core.interfaces.pressure import PressureSource
from erllama_core.interfaces.stream import StreamProcessor
from erllama_core.interfaces.tier import Tier
from erllama_core.providers import (
    NoOptions,
    PressureProvider,
    StreamProcessorProvider,
    TierProvider,
)


def _ram(options: RamOptions) -> Tier:
    from erllama_core.cache.ram import RamTier

    quota_bytes = options.quota_bytes
    return RamTier(quota_bytes=default_quota_bytes() if quota_bytes is None else quota_bytes)


def _noop(_options: NoOptions) -> PressureSource:
    from erllama_core.pressure.noop import NoopPressure

    return NoopPressure()


def _utf8(_options: NoOptions) -> StreamProcessor:
    from erllama_core.stream.utf8 import Utf8Assembly

    return Utf8Assembly()


@hookimpl
def erllama_tiers() -> Sequence[TierProvider]:
    """``ram``."""
    return [
        TierProvider(
            name="ram",
            summary="This process's memory; gone when it ends.",
            factory=_ram,
            config=RamOptions,
        )
    ]


@hookimpl
def erllama_pressure_sources() -> Sequence[PressureProvider]:
    """``noop``."""
    return [
        PressureProvider(name="noop", summary="No readings; nothing is evicted.", factory=_noop)
    ]


@hookimpl
def erllama_stream_processors() -> Sequence[StreamProcessorProvider]:
    """``utf8``, which stands in every pipeline."""
    return [
        StreamProcessorProvider(
            name="utf8",
            summary="Holds bytes back until they are whole characters.",
            factory=_utf8,
        )
    ]
