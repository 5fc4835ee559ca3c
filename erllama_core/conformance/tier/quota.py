"""What a tier promises of the room that it has: tests of the kit."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import pytest

from erllama_core.conformance.objects import StoredObject, make_object
from erllama_core.conformance.tier.looking import absent, read
from erllama_core.conformance.tier.subject import TierKit, TierSubject
from erllama_core.errors import TierFull
from erllama_core.interfaces.tier import ChangesQuota

_PATIENCE_S: Final = 30.0
_WRITERS: Final = 8


class QuotaPromises(TierKit):
    """What a tier promises of the room that it has."""

    def test_a_full_tier_says_so(self, subject: TierSubject) -> None:
        """Beyond the quota ``put`` raises TierFull, and stores nothing of the object.

        If this fails: the store outgrows the memory or the disk that it was given, or the core
        never learns that it has to evict.
        """
        if not subject.enforces_quota:
            pytest.skip("the subject says that its store has no quota of its own")
        things = [make_object(number, 1000) for number in range(40)]
        quota = 10 * things[0].size
        tier = subject.open(quota)
        stored: list[StoredObject] = []
        try:
            assert tier.usage().quota_bytes == quota
            for thing in things:
                try:
                    tier.put(thing.object_id, [thing.head, thing.payload])
                except TierFull:
                    assert absent(tier, thing.object_id)
                    break
                stored.append(thing)
                assert tier.usage().used_bytes <= quota
            assert 0 < len(stored) <= 10, "as many as fit, and no more"
            assert all(read(tier, thing.object_id) == thing.data for thing in stored)
            tier.delete(stored.pop().object_id)
            tier.put(things[-1].object_id, [things[-1].data])
            assert read(tier, things[-1].object_id) == things[-1].data
        finally:
            tier.close()

    def test_what_can_never_fit_is_refused_whole(self, subject: TierSubject) -> None:
        """An object larger than the quota raises TierFull, and what is stored stays.

        If this fails: one long prompt empties the tier, or a part of it is left behind.
        """
        if not subject.enforces_quota:
            pytest.skip("the subject says that its store has no quota of its own")
        small, large = make_object(1, 100), make_object(2, 100_000)
        tier = subject.open(10_000)
        try:
            tier.put(small.object_id, [small.data])
            used = tier.usage().used_bytes
            with pytest.raises(TierFull):
                tier.put(large.object_id, [large.head, large.payload])
            assert absent(tier, large.object_id)
            assert tier.usage().used_bytes == used
            assert read(tier, small.object_id) == small.data
        finally:
            tier.close()

    def test_writers_share_one_quota(self, subject: TierSubject) -> None:
        """Threads that store at once do not each find the same room: what is there fits.

        If this fails: between looking for room and taking it another writer takes it too, and
        the store outgrows its quota when the cache is busiest.
        """
        if not subject.enforces_quota:
            pytest.skip("the subject says that its store has no quota of its own")
        things = [make_object(number, 1000) for number in range(_WRITERS)]
        quota = (_WRITERS // 2) * things[0].size
        together = threading.Barrier(_WRITERS)
        tier = subject.open(quota)

        def store(thing: StoredObject) -> None:
            together.wait(_PATIENCE_S)
            with contextlib.suppress(TierFull):
                tier.put(thing.object_id, [thing.head, thing.payload])

        try:
            for _ in range(5):
                with ThreadPoolExecutor(_WRITERS) as threads:
                    list(threads.map(store, things))
                stored = [thing for thing in things if not absent(tier, thing.object_id)]
                assert sum(thing.size for thing in stored) <= quota
                assert 0 < tier.usage().used_bytes <= quota
                for thing in stored:
                    tier.delete(thing.object_id)
        finally:
            tier.close()

    def test_the_quota_changes(self, subject: TierSubject) -> None:
        """ChangesQuota: another quota holds from the next ``put`` on, and removes nothing itself.

        If this fails: a quota that was changed in a service's file is not kept, or objects go
        of which the core believes that they are there.
        """
        tier = subject.open(100_000)
        try:
            if not isinstance(tier, ChangesQuota):
                return
            things = [make_object(number, 1000) for number in range(4)]
            for thing in things[:2]:
                tier.put(thing.object_id, [thing.data])
            tier.set_quota(things[0].size)
            assert tier.usage().quota_bytes == things[0].size
            assert all(read(tier, thing.object_id) == thing.data for thing in things[:2])
            if subject.enforces_quota:
                with pytest.raises(TierFull):
                    tier.put(things[2].object_id, [things[2].data])
            tier.set_quota(100_000)
            for thing in things[2:]:
                tier.put(thing.object_id, [thing.data])
                assert read(tier, thing.object_id) == thing.data
        finally:
            tier.close()
