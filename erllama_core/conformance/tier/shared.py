"""What a tier promises of a store that others use, too: tests of the kit."""

from __future__ import annotations

import pytest

from erllama_core.conformance.objects import make_object
from erllama_core.conformance.tier.looking import absent, read
from erllama_core.conformance.tier.subject import TierKit, TierSubject
from erllama_core.interfaces.tier import Gone, ScanFailure, ScannedObject, Shared


class SharedPromises(TierKit):
    """What a tier promises of a store that others use, too."""

    def test_what_others_did_to_an_object_is_seen(self, subject: TierSubject) -> None:
        """What is damaged in the store is read as it is; what is gone is a miss.

        If this fails: the tier serves from a memory of its own what the store does not hold,
        and damage is found only after a restart.
        """
        raw = subject.raw
        if raw is None:
            pytest.skip("the subject has no other way to its store")
        tier = subject.open(None)
        try:
            thing, other = make_object(1), make_object(2)
            tier.put(thing.object_id, [thing.data])
            assert raw.read(thing.object_id) == thing.data, "stored as it is, where raw looks"
            damaged = bytearray(thing.data)
            damaged[-1] ^= 1
            raw.write(thing.object_id, bytes(damaged))
            assert read(tier, thing.object_id) == bytes(damaged)
            raw.remove(thing.object_id)
            assert absent(tier, thing.object_id)
            assert tier.delete(thing.object_id) == 0
            raw.write(other.object_id, other.data)
            assert tier.contains(other.object_id)
            assert read(tier, other.object_id) == other.data
        finally:
            tier.close()

    def test_rubbish_in_the_store_ends_no_scan(self, subject: TierSubject) -> None:
        """What is no object is told of as a ScanFailure, or left out; the others are found.

        If this fails: one damaged object hides the whole cache after a restart.
        """
        raw = subject.raw
        if raw is None:
            pytest.skip("the subject has no other way to its store")
        tier = subject.open(None)
        try:
            good = [make_object(number) for number in range(5)]
            for thing in good:
                tier.put(thing.object_id, [thing.data])
            rubbish = {make_object(7).object_id: b"", make_object(8).object_id: b"not an object"}
            for object_id, data in rubbish.items():
                raw.write(object_id, data)
            found = list(tier.scan())
            wrong = [i for i in found if isinstance(i, ScannedObject) and i.object_id in rubbish]
            assert all(bytes(i.head) == rubbish[i.object_id] for i in wrong)
            assert all(i.reason and i.location for i in found if isinstance(i, ScanFailure))
            names = {item.object_id for item in found if isinstance(item, ScannedObject)}
            assert names >= {thing.object_id for thing in good}
        finally:
            tier.close()

    def test_a_shared_store_follows_others(self, subject: TierSubject) -> None:
        """Shared: what another tier on the store stores or removes is found, and rescanned.

        If this fails: processes on one store do not see each other's work, or two of them
        believe to be its janitor.
        """
        mine, theirs = subject.open(None), subject.open(None)
        try:
            if not isinstance(mine, Shared):
                return
            assert isinstance(theirs, Shared)
            assert mine.rescan_interval_s >= 0
            assert [*mine.scan()] == [*theirs.scan()] == []
            thing, other = make_object(1), make_object(2)
            theirs.put(thing.object_id, [thing.data])
            theirs.put(other.object_id, [other.data])
            found = mine.find(thing.object_id)
            assert found is not None
            assert found.size_bytes > 0
            assert mine.contains(thing.object_id)
            told = {i.object_id for i in mine.rescan() if isinstance(i, ScannedObject)}
            assert told == {thing.object_id, other.object_id}
            theirs.delete(other.object_id)
            gone = {i.object_id for i in mine.rescan() if isinstance(i, Gone)}
            assert gone == {other.object_id}
            assert mine.find(other.object_id) is None
            assert mine.find(make_object(3).object_id) is None
        finally:
            mine.close()
            theirs.close()
