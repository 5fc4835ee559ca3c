"""The source keeps what every pressure source promises."""

from __future__ import annotations

import pytest

from erllama_core.conformance import PressureConformance, PressureSubject
from erllama_core.host import PluginHost


class TestSystem(PressureConformance):
    @pytest.fixture
    def subject(self) -> PressureSubject:
        provider = PluginHost().get("pressure", "system")
        return PressureSubject(lambda: provider.factory(provider.config()))
