"""The kit's tests of the source; run by test_pressure_nvidia_conformance.py, beside a driver."""

from __future__ import annotations

import pytest

from erllama_core.conformance import PressureConformance, PressureSubject
from erllama_core.host import PluginHost
from erllama_core.interfaces.pressure import PressureSource


class TestNvidia(PressureConformance):
    @pytest.fixture
    def subject(self, monkeypatch: pytest.MonkeyPatch) -> PressureSubject:
        provider = PluginHost().get("pressure", "nvidia")

        def make() -> PressureSource:
            return provider.factory(provider.config())

        def broken() -> PressureSource:
            monkeypatch.setenv("FAKE_MEMORY_0", "15")  # both GPUs are lost
            monkeypatch.setenv("FAKE_MEMORY_1", "15")
            return make()

        return PressureSubject(make, broken=broken)
