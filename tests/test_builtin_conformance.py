"""The core's own providers keep what every plugin promises."""

from __future__ import annotations

import pytest

from erllama_core.conformance import (
    PressureConformance,
    PressureSubject,
    ProcessorConformance,
    ProcessorSubject,
    TierConformance,
    TierSubject,
)
from erllama_core.host import PluginHost
from erllama_core.interfaces.markers import ThinkingMarkers, ToolCallMarkers

HOST = PluginHost(discover=False)


class TestRamTier(TierConformance):
    @pytest.fixture
    def subject(self) -> TierSubject:
        provider = HOST.get("tier", "ram")
        return TierSubject(
            lambda quota: provider.factory(provider.config(quota_bytes=quota)),
            survives_close=False,
        )


class TestNoop(PressureConformance):
    @pytest.fixture
    def subject(self) -> PressureSubject:
        provider = HOST.get("pressure", "noop")
        return PressureSubject(lambda: provider.factory(provider.config()), is_silent=True)


class TestStopSequences(ProcessorConformance):
    @pytest.fixture
    def subject(self) -> ProcessorSubject:
        return ProcessorSubject(
            HOST.get("processor", "stop_sequences").factory,
            request={"stop_sequences": ("STOP", "日本", "\n\n")},
            pieces=[b"STOP", "日本".encode(), b"\n\n"],
            quiet_request={},
        )


class TestThinking(ProcessorConformance):
    @pytest.fixture
    def subject(self) -> ProcessorSubject:
        markers = ThinkingMarkers(start="<think>", end="</think>")
        return ProcessorSubject(
            HOST.get("processor", "thinking").factory,
            request={"thinking": True, "thinking_markers": markers},
            pieces=[b"<think>", b"</think>"],
            quiet_request={"thinking_markers": markers},
        )


class TestToolCalls(ProcessorConformance):
    @pytest.fixture
    def subject(self) -> ProcessorSubject:
        markers = ToolCallMarkers(start="<c>", end="</c>", payload_start="(", payload_end=")")
        return ProcessorSubject(
            HOST.get("processor", "tool_calls").factory,
            request={"tool_call_markers": markers},
            pieces=[b"<c>", b"</c>", b"(", b")"],
            quiet_request={},
        )


class TestUtf8(ProcessorConformance):
    @pytest.fixture
    def subject(self) -> ProcessorSubject:
        return ProcessorSubject(HOST.get("processor", "utf8").factory, quiet_request={})
