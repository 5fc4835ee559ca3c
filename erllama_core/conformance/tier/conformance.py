"""All that a tier promises, ability by ability.

::

    from erllama_core.conformance import TierConformance, TierSubject

    class TestMyTier(TierConformance):
        @pytest.fixture
        def subject(self, tmp_path):
            return TierSubject(lambda quota: MyTier(tmp_path, quota), survives_close=True)
"""

from __future__ import annotations

from erllama_core.conformance.tier.abilities import AbilityPromises
from erllama_core.conformance.tier.lasting import LastingPromises
from erllama_core.conformance.tier.pages import PagesPromises
from erllama_core.conformance.tier.pins import PinPromises
from erllama_core.conformance.tier.quota import QuotaPromises
from erllama_core.conformance.tier.scanning import ScanningPromises
from erllama_core.conformance.tier.shared import SharedPromises
from erllama_core.conformance.tier.storing import StoringPromises
from erllama_core.conformance.tier.threads import ThreadPromises


class TierConformance(
    StoringPromises,
    QuotaPromises,
    ScanningPromises,
    ThreadPromises,
    LastingPromises,
    SharedPromises,
    PagesPromises,
    PinPromises,
    AbilityPromises,
):
    """Derive, and say with a fixture ``subject`` what is tested."""
