"""What a tier promises of its scans: tests of the kit."""

from __future__ import annotations

import time
from typing import Final

from erllama_core.conformance.kit import no_leaks
from erllama_core.conformance.objects import make_object
from erllama_core.conformance.tier.subject import TierKit
from erllama_core.interfaces.block import ObjectId, ObjectKind, header_length
from erllama_core.interfaces.tier import ScannedObject, Tier

_LARGE: Final = 3 << 20
_YEAR_NS: Final = 365 * 24 * 3600 * 10**9


class ScanningPromises(TierKit):
    """What a tier promises of its scans."""

    def test_a_scan_tells_of_each_object_once(self, tier: Tier) -> None:
        """With its header, its size, and a time of last use that can be true.

        If this fails: after a restart a part of the cache is not found, or eviction removes
        what was used last.
        """
        things = {
            thing.object_id: thing
            for thing in (
                *(make_object(number, 50 * number) for number in range(20)),
                make_object(20, _LARGE),
                *(make_object(21, kind=kind) for kind in ObjectKind),
            )
        }
        for thing in things.values():
            tier.put(thing.object_id, [thing.data])
        seen: set[ObjectId] = set()
        for item in tier.scan():
            assert isinstance(item, ScannedObject), f"not an object: {item}"
            thing = things[item.object_id]
            assert item.object_id not in seen, "an object is told of once"
            seen.add(item.object_id)
            length = header_length(item.head)
            assert len(item.head) >= length, "head holds the whole header"
            assert bytes(item.head) == thing.data[: len(item.head)]
            assert item.size_bytes > 0
            assert abs(time.time_ns() - item.last_used_ns) < _YEAR_NS
        assert seen == set(things)

    def test_scans_do_not_mind_changes(self, tier: Tier) -> None:
        """Objects come and go while a scan is under way: it ends, and tells of what stayed.

        If this fails: the scan at start breaks off as soon as a request is saved meanwhile.
        """
        stay = [make_object(number) for number in range(30)]
        go = [make_object(number) for number in range(100, 130)]
        for thing in (*stay, *go):
            tier.put(thing.object_id, [thing.data])
        seen = set()
        for number, item in enumerate(tier.scan()):
            if isinstance(item, ScannedObject):
                seen.add(item.object_id)
            if number < len(go):
                tier.delete(go[number].object_id)
                for added in (make_object(200 + number), make_object(300 + number)):
                    tier.put(added.object_id, [added.data])
        assert seen >= {thing.object_id for thing in stay}

    def test_a_scan_can_be_left(self, tier: Tier) -> None:
        """Two scans can be under way, and one that is given up leaves nothing behind.

        If this fails: closing an engine during its first scan leaks a descriptor or a lock.
        """
        for number in range(10):
            thing = make_object(number)
            tier.put(thing.object_id, [thing.data])
        with no_leaks():
            first, second = tier.scan(), tier.scan()
            next(first)
            assert len([*second]) == 10
            del first, second
        tier.delete(make_object(0).object_id)

    def test_places_are_for_a_person(self, tier: Tier) -> None:
        """``location`` names a place for any object, there or not.

        If this fails: ``erllama cache ls`` cannot list the tier.
        """
        one, other = make_object(1), make_object(2)
        tier.put(one.object_id, [one.data])
        places = [tier.location(thing.object_id) for thing in (one, other)]
        assert all(places)
        assert places[0] != places[1]
