"""What a tier promises that records pins: tests of the kit."""

from __future__ import annotations

from erllama_core.conformance.objects import make_object
from erllama_core.conformance.tier.subject import TierKit, TierSubject
from erllama_core.interfaces.tier import RecordsPins


class PinPromises(TierKit):
    """What a tier promises that records pins."""

    def test_pins_are_recorded(self, subject: TierSubject) -> None:
        """RecordsPins: pins are listed, also by a tier that is opened later, until erased.

        If this fails: what a person pinned is evicted after the next restart.
        """
        tier = subject.open(None)
        one, other = make_object(1).object_id.key, make_object(2).object_id.key
        try:
            if not isinstance(tier, RecordsPins):
                return
            for key in (one, other, one):
                tier.record_pin(key)
            assert sorted(map(bytes, tier.pins())) == sorted([one, other])
            tier.erase_pin(other)
            tier.erase_pin(other)
        finally:
            tier.close()
        again = subject.open(None)
        try:
            assert isinstance(again, RecordsPins)
            assert [*map(bytes, again.pins())] == ([one] if subject.survives_close else [])
        finally:
            again.close()
