"""Both sources keep what every pressure source promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from erllama_core.conformance import PressureConformance, PressureSubject
from erllama_core.host import PluginHost
from erllama_pressure_system.stalls import PsiPressure

HOST = PluginHost()


class TestSystem(PressureConformance):
    @pytest.fixture
    def subject(self) -> PressureSubject:
        provider = HOST.get("pressure", "system")
        return PressureSubject(lambda: provider.factory(provider.config()))


class TestPsi(PressureConformance):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> PressureSubject:
        options = HOST.registry.find("pressure", "psi").config()
        file = tmp_path / "memory"
        file.write_text("some avg10=1.50 avg60=1.00 avg300=0.50 total=123\n")

        def make(host: Path = file) -> PsiPressure:
            return PsiPressure(options, host=host, proc_self=tmp_path)

        return PressureSubject(make, broken=lambda: make(tmp_path / "missing"))
