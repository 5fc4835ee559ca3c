"""The core's own providers, registered through the same hooks as anybody's."""

from __future__ import annotations

from collections.abc import Sequence

from erllama_core.cache.ram_options import RamOptions, default_quota_bytes
from erllama_core.hookspecs import hookimpl
from erllama_core.interfaces.pressure import PressureSource
from erllama_core.interfaces.stream import ProcessorRequest, StreamProcessor
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


def _thinking(request: ProcessorRequest) -> StreamProcessor | None:
    from erllama_core.stream.thinking import Thinking

    return Thinking.for_request(request)


def _tool_calls(request: ProcessorRequest) -> StreamProcessor | None:
    from erllama_core.stream.tool_calls import ToolCalls

    return ToolCalls.for_request(request)


def _stop_sequences(request: ProcessorRequest) -> StreamProcessor | None:
    from erllama_core.stream.stop_sequences import StopSequences

    return StopSequences.for_request(request)


def _utf8(request: ProcessorRequest) -> StreamProcessor | None:
    from erllama_core.stream.utf8 import Utf8Assembly

    return Utf8Assembly.for_request(request)


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
    """``thinking``, ``tool_calls``, ``stop_sequences``; ``utf8``, which ends every pipeline."""
    return [
        StreamProcessorProvider(
            name="thinking",
            summary="Makes events of what a model thinks, between thinking_markers.",
            factory=_thinking,
        ),
        StreamProcessorProvider(
            name="tool_calls",
            summary="Makes events of tool calls, between tool_call_markers.",
            factory=_tool_calls,
        ),
        StreamProcessorProvider(
            name="stop_sequences",
            summary="Ends a reply where one of the request's stop_sequences begins.",
            factory=_stop_sequences,
        ),
        StreamProcessorProvider(
            name="utf8",
            summary="Holds bytes back until they are whole characters.",
            factory=_utf8,
        ),
    ]
