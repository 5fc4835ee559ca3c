"""Whether a tier keeps its promises: see :mod:`erllama_core.interfaces.tier`.

::

    from erllama_core.conformance import TierConformance, TierSubject

    class TestMyTier(TierConformance):
        @pytest.fixture
        def subject(self, tmp_path):
            return TierSubject(lambda quota: MyTier(tmp_path, quota), survives_close=True)
"""

from __future__ import annotations

import abc
import contextlib
import os
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, NoReturn, Protocol, overload

import attrs
import pytest
from hypothesis import strategies as st

from erllama_core.conformance.kit import ConformanceKit, no_leaks, random_walks
from erllama_core.conformance.objects import StoredObject, make_object
from erllama_core.errors import BlockNotFound, TierFull
from erllama_core.interfaces.block import Bytes, ObjectId, ObjectKind, header_length, verify_object
from erllama_core.interfaces.tier import (
    ChangesQuota,
    Gone,
    KeepsPages,
    MakesDurable,
    RecordsPins,
    ScanFailure,
    ScannedObject,
    Shared,
    Tier,
)

_LARGE: Final = 3 << 20
_YEAR_NS: Final = 365 * 24 * 3600 * 10**9
_PATIENCE_S: Final = 30.0
_GLANCE_S: Final = 0.1
_WRITERS: Final = 8

_ABILITIES: Final[dict[type, tuple[str, ...]]] = {
    ChangesQuota: ("set_quota",),
    KeepsPages: ("keep", "borrow"),
    RecordsPins: ("record_pin", "erase_pin", "pins"),
    MakesDurable: ("outlives_power", "make_durable"),
    Shared: ("rescan_interval_s", "lead", "find", "rescan"),
}


class RawStore(Protocol):
    """A way to a tier's store that goes past the tier, as other programs have one."""

    def read(self, object_id: ObjectId) -> bytes | None:
        """What is stored under a name; None when nothing is."""
        ...

    def write(self, object_id: ObjectId, data: bytes) -> None:
        """Store something, or put it in place of what is there."""
        ...

    def remove(self, object_id: ObjectId) -> None:
        """Take it away."""
        ...


@attrs.frozen(kw_only=True)
class TierSubject:
    """A tier to be tested."""

    open: Callable[[int | None], Tier] = attrs.field(kw_only=False)
    """Opens the store, with a quota in bytes or none: the same store each time within one test,
    empty at first. The test closes what it has opened."""
    survives_close: bool
    """Whether another tier that is opened on the store later finds what was stored."""
    enforces_quota: bool = True
    """Whether the store keeps to the quota it is opened with by itself."""
    raw: RawStore | None = None
    """Another way to the same store; without one, what goes behind the tier is not tested."""


@attrs.frozen
class _Given:
    """Buffers that the tier has asked for."""

    sizes: list[int] = attrs.field(factory=list)

    def allocate(self, size: int) -> memoryview:
        self.sizes.append(size)
        return memoryview(bytearray(size))


def read(tier: Tier, object_id: ObjectId) -> bytes:
    """All bytes of an object; checks how the tier asks for a buffer."""
    given_out = _Given()
    buffer = tier.read(object_id, given_out.allocate)
    assert given_out.sizes == [len(buffer)], "allocate is called once, with the object's size"
    return bytes(buffer)


def absent(tier: Tier, object_id: ObjectId) -> bool:
    """Whether the tier says in every way that it has no such object."""
    given_out = _Given()
    try:
        tier.read(object_id, given_out.allocate)
    except BlockNotFound:
        missing = True
    else:
        missing = False
    assert not (missing and given_out.sizes), "allocate is for objects that exist"
    scanned = {item.object_id for item in tier.scan() if isinstance(item, ScannedObject)}
    answers = {missing, not tier.contains(object_id), object_id not in scanned}
    assert len(answers) == 1, "read, contains and scan agree"
    return missing


class TierConformance(ConformanceKit, abc.ABC):
    """Derive, and say with a fixture ``subject`` what is tested."""

    @pytest.fixture
    @abc.abstractmethod
    def subject(self) -> TierSubject:
        """What is tested."""

    @pytest.fixture
    def tier(self, subject: TierSubject) -> Iterator[Tier]:
        tier = subject.open(None)
        yield tier
        tier.close()

    # ------------------------------------------------------------ round trips

    @pytest.mark.parametrize("size", [0, 1, 63, 4096, _LARGE])
    def test_what_is_stored_comes_back(self, tier: Tier, size: int) -> None:
        """An object is read as exactly the bytes that were stored, whatever its size.

        If this fails: bytes are lost, added or changed on the way; every model would compute
        again what it has saved, or count it as corrupt.
        """
        thing = make_object(1, size)
        tier.put(thing.object_id, [thing.head, thing.payload])
        assert read(tier, thing.object_id) == thing.data
        assert tier.contains(thing.object_id)

    def test_parts_are_joined_whatever_they_are(self, tier: Tier) -> None:
        """``put`` takes bytes, bytearrays and memoryviews, any number of them, empty ones too.

        If this fails: the writer hands over a header and a view of pages, and loses one.
        """
        thing = make_object(2)
        data = thing.data
        parts: list[Bytes] = [data[:7], bytearray(data[7:50]), b"", memoryview(data)[50:]]
        tier.put(thing.object_id, parts)
        assert read(tier, thing.object_id) == data

    def test_parts_are_not_kept(self, tier: Tier) -> None:
        """What becomes of the parts after ``put`` has returned does not matter.

        If this fails: save buffers are used again at once, and stored objects change with them.
        """
        thing = make_object(3)
        buffer = bytearray(thing.data)
        tier.put(thing.object_id, [memoryview(buffer)])
        buffer[:] = bytes(len(buffer))
        assert read(tier, thing.object_id) == thing.data

    def test_what_is_read_is_the_callers(self, tier: Tier) -> None:
        """Writing into a buffer that was read changes nothing that is stored.

        If this fails: a context that is restored in place destroys the stored copy.
        """
        thing = make_object(4)
        tier.put(thing.object_id, [thing.data])
        buffer = tier.read(thing.object_id, lambda size: memoryview(bytearray(size)))
        buffer[:] = bytes(len(buffer))
        assert read(tier, thing.object_id) == thing.data

    def test_names_differ_in_every_part(self, tier: Tier) -> None:
        """Kind, start and key together name an object: none is mistaken for another.

        If this fails: a block is handed out for another one that ends at the same place.
        """
        things = [make_object(5, kind=kind, start=start) for kind in ObjectKind for start in (0, 7)]
        things.append(make_object(6))
        for thing in things:
            tier.put(thing.object_id, [thing.data])
        for thing in things:
            assert read(tier, thing.object_id) == thing.data
        tier.delete(things[0].object_id)
        assert absent(tier, things[0].object_id)
        assert all(tier.contains(thing.object_id) for thing in things[1:])

    def test_storing_twice_is_harmless(self, tier: Tier) -> None:
        """The same object again changes neither the store nor its usage.

        If this fails: several processes that compute one prompt fill the quota with copies.
        """
        thing = make_object(7)
        tier.put(thing.object_id, [thing.data])
        used = tier.usage().used_bytes
        tier.put(thing.object_id, [thing.data], durable=True)
        assert tier.usage().used_bytes == used
        assert read(tier, thing.object_id) == thing.data
        assert tier.delete(thing.object_id) > 0
        assert absent(tier, thing.object_id)

    # --------------------------------------------------------------- deleting

    def test_what_is_not_there_is_not_found(self, tier: Tier) -> None:
        """Reading it raises BlockNotFound before a buffer is asked for; deleting it frees 0.

        If this fails: a vanished object is an error, or a block of zeros, and not a miss.
        """
        thing = make_object(8)
        assert absent(tier, thing.object_id)
        assert tier.delete(thing.object_id) == 0

    def test_deleting_frees_what_storing_took(self, tier: Tier) -> None:
        """``delete`` says how much was freed, ``usage`` agrees, and the object is gone.

        If this fails: eviction believes that it made room, and the quota is overrun or never
        filled again.
        """
        things = [make_object(number, 100 * number) for number in range(1, 6)]
        before = tier.usage().used_bytes
        for thing in things:
            tier.put(thing.object_id, [thing.data])
        sizes = {
            item.object_id: item.size_bytes
            for item in tier.scan()
            if isinstance(item, ScannedObject)
        }
        assert tier.usage().used_bytes == before + sum(sizes.values())
        for thing in things:
            used = tier.usage().used_bytes
            assert tier.delete(thing.object_id) == sizes[thing.object_id] > 0
            assert tier.usage().used_bytes == used - sizes[thing.object_id]
            assert absent(tier, thing.object_id)
            assert tier.delete(thing.object_id) == 0
        assert tier.usage().used_bytes == before

    def test_a_deleted_object_can_be_stored_again(self, tier: Tier) -> None:
        """After it was deleted, a name is like any other.

        If this fails: what was evicted once is never cached again.
        """
        thing = make_object(9)
        for _ in range(3):
            tier.put(thing.object_id, [thing.data])
            assert read(tier, thing.object_id) == thing.data
            tier.delete(thing.object_id)
            assert absent(tier, thing.object_id)

    # ------------------------------------------------------------------ quota

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

    # --------------------------------------------------------------- scanning

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

    # ------------------------------------------------------------ concurrency

    def test_many_threads_at_once(self, tier: Tier) -> None:
        """Threads store, read and delete the same few objects: each read is whole, or a miss.

        If this fails: a reader sees half an object, or the tier's own books break, as soon as
        two requests run together.
        """
        things = [make_object(number, 20_000) for number in range(6)]
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            rng = random.Random(seed)
            try:
                for _ in range(60):
                    thing = rng.choice(things)
                    match rng.randrange(4):
                        case 0:
                            tier.put(thing.object_id, [thing.head, thing.payload])
                        case 1:
                            tier.delete(thing.object_id)
                        case 2:
                            tier.contains(thing.object_id)
                            tier.usage()
                        case _:
                            try:
                                assert read(tier, thing.object_id) == thing.data
                            except BlockNotFound:
                                continue
            except BaseException as error:  # noqa: BLE001 - handed to the test's thread
                failures.append(error)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(work, range(8)))
        assert not failures, failures[0]
        present = [thing for thing in things if tier.contains(thing.object_id)]
        for thing in present:
            assert read(tier, thing.object_id) == thing.data
            tier.delete(thing.object_id)
        assert tier.usage().used_bytes == 0

    def test_an_object_is_there_whole_or_not_at_all(self, tier: Tier) -> None:
        """Who looks while an object is being stored finds nothing yet, or waits.

        If this fails: a block is restored of which a part was not yet written.
        """
        thing = make_object(1, 5000)
        looked: list[bytes | None] = []

        def look() -> None:
            try:
                looked.append(read(tier, thing.object_id))
            except BlockNotFound:
                looked.append(None)

        with ThreadPoolExecutor(1) as thread:
            parts = _Watched([thing.head, thing.payload], lambda: thread.submit(look))
            tier.put(thing.object_id, parts)
        assert set(looked) <= {None, thing.data}
        assert read(tier, thing.object_id) == thing.data

    def test_one_that_waits_holds_up_no_other(self, tier: Tier) -> None:
        """While one read has not got its buffer yet, other objects are stored and read.

        If this fails: one slow reader stops every request of the process.
        """
        slow, other = make_object(1), make_object(2)
        tier.put(slow.object_id, [slow.data])
        reached, go_on = threading.Event(), threading.Event()

        def allocate(size: int) -> memoryview:
            reached.set()
            go_on.wait(_PATIENCE_S)
            return memoryview(bytearray(size))

        with ThreadPoolExecutor(2) as threads:
            try:
                waiting = threads.submit(tier.read, slow.object_id, allocate)
                assert reached.wait(_PATIENCE_S)

                def use() -> bytes:
                    tier.put(other.object_id, [other.data])
                    return read(tier, other.object_id)

                assert threads.submit(use).result(_PATIENCE_S / 2) == other.data
            finally:
                go_on.set()
            assert bytes(waiting.result(_PATIENCE_S)) == slow.data

    # --------------------------------------------------------- closing, dying

    def test_closing_twice_is_harmless(self, subject: TierSubject) -> None:
        """``close`` is idempotent, and gives back threads and descriptors.

        If this fails: an engine that is closed twice, or opened again and again, breaks.
        """
        thing = make_object(1)
        with no_leaks():
            for _ in range(3):
                tier = subject.open(None)
                tier.put(thing.object_id, [thing.data])
                tier.close()
                tier.close()

    def test_what_survives_closing(self, subject: TierSubject) -> None:
        """A store that outlives its tier has everything, with the same usage; another nothing.

        If this fails: a restart is cold where the subject promises otherwise, or it says less
        than it does.
        """
        things = [make_object(number, 10 * number) for number in range(8)]
        tier = subject.open(None)
        for thing in things:
            tier.put(thing.object_id, [thing.data])
        tier.delete(things[0].object_id)
        used = tier.usage().used_bytes
        tier.close()
        again = subject.open(None)
        try:
            found = {item.object_id for item in again.scan() if isinstance(item, ScannedObject)}
            if not subject.survives_close:
                assert not found
                return
            assert found == {thing.object_id for thing in things[1:]}
            assert again.usage().used_bytes == used
            assert all(read(again, thing.object_id) == thing.data for thing in things[1:])
        finally:
            again.close()

    def test_a_killed_writer_leaves_whole_objects(self, subject: TierSubject) -> None:
        """A process that is killed while it stores leaves whole objects and nothing else.

        If this fails: after a crash the store holds torn objects, lacks what ``put`` had returned
        for, or cannot be opened.
        """
        if not subject.survives_close:
            pytest.skip("the store ends with its process")
        for attempt in range(4):
            stored = _store_until_killed(subject, attempt)
            tier = subject.open(None)
            try:
                assert all(tier.contains(thing.object_id) for thing in stored)
                for item in list(tier.scan()):
                    assert isinstance(item, ScannedObject), f"left behind: {item}"
                    verify_object(read(tier, item.object_id), item.object_id)
                fresh = make_object(attempt)
                tier.put(fresh.object_id, [fresh.data])
                assert read(tier, fresh.object_id) == fresh.data
            finally:
                tier.close()

    # -------------------------------------------------- behind the tier's back

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

    # ---------------------------------------------------------------- abilities

    def test_abilities_are_whole(self, tier: Tier) -> None:
        """An optional ability is there with all of its methods, or with none.

        If this fails: a misspelt method makes the core believe that the ability is missing.
        """
        for ability, names in _ABILITIES.items():
            present = [name for name in names if hasattr(tier, name)]
            assert present in ([], list(names)), f"{ability.__name__} lacks some of {names}"
            assert isinstance(tier, ability) == bool(present)

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

    def test_pages_are_kept_uncopied(self, subject: TierSubject) -> None:
        """KeepsPages: pages are retained while they are stored, and lent to whoever borrows.

        If this fails: memory is freed under a restore, or never given back to the system.
        """
        tier = subject.open(50_000)
        try:
            if not isinstance(tier, KeepsPages):
                return
            thing = make_object(1, 1000)
            pages = CountedPages(thing.payload)
            tier.keep(thing.object_id, thing.head, pages)
            assert pages.references == 2, "the tier has a reference of its own"
            tier.keep(thing.object_id, thing.head, pages)
            assert pages.references == 2, "keeping it again is harmless"
            borrowed = tier.borrow(thing.object_id)
            assert pages.references == 3
            assert bytes(borrowed.view) == thing.payload
            assert read(tier, thing.object_id) == thing.data
            assert tier.delete(thing.object_id) == thing.size
            assert pages.references == 2, "what is borrowed outlives the object"
            borrowed.release()
            assert pages.references == 1
            with pytest.raises(BlockNotFound):
                tier.borrow(thing.object_id)
            too_large = CountedPages(bytes(100_000))
            with pytest.raises(TierFull):
                tier.keep(make_object(2).object_id, thing.head, too_large)
            assert too_large.references == 1, "what was refused is not retained"
            tier.keep(thing.object_id, thing.head, pages)
        finally:
            tier.close()
        assert pages.references == 1, "closing gives back everything"

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

    def test_objects_are_made_durable(self, tier: Tier) -> None:
        """MakesDurable: it returns for what is there, and skips what is gone.

        If this fails: finishing a context fails because one of its blocks was evicted.
        """
        if not isinstance(tier, MakesDurable):
            return
        thing, gone = make_object(1), make_object(2)
        tier.put(thing.object_id, [thing.data])
        assert isinstance(tier.outlives_power, bool)
        tier.make_durable([thing.object_id, gone.object_id, thing.object_id])
        tier.make_durable([])
        assert read(tier, thing.object_id) == thing.data
        assert absent(tier, gone.object_id)

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

    # ------------------------------------------------------------- random walks

    def test_any_sequence_of_calls(self, subject: TierSubject) -> None:
        """After any calls the tier holds what a dictionary would.

        If this fails: Hypothesis prints the shortest sequence of calls that goes wrong.
        """

        @random_walks
        def walk(data: st.DataObject) -> None:
            _walk(subject, data)

        walk()


def _walk(subject: TierSubject, data: st.DataObject) -> None:
    things = [make_object(number, 40 * number) for number in range(4)]
    held: dict[ObjectId, bytes] = {}
    tier = subject.open(None)
    try:
        for thing in things:  # what an earlier walk has left
            tier.delete(thing.object_id)
        steps = ["put", "put again", "read", "delete", "contains", "scan", "reopen"]
        for step in data.draw(st.lists(st.sampled_from(steps), max_size=25)):
            thing = data.draw(st.sampled_from(things))
            object_id = thing.object_id
            if step.startswith("put"):
                tier.put(object_id, [thing.head, thing.payload], durable=step == "put")
                held[object_id] = thing.data
            elif step == "read":
                if object_id in held:
                    assert read(tier, object_id) == held[object_id]
                else:
                    with pytest.raises(BlockNotFound):
                        read(tier, object_id)
            elif step == "delete":
                assert bool(tier.delete(object_id)) is (object_id in held)
                held.pop(object_id, None)
            elif step == "contains":
                assert tier.contains(object_id) is (object_id in held)
            elif step == "scan":
                scanned = [i for i in tier.scan() if isinstance(i, ScannedObject)]
                assert sorted(str(i.object_id) for i in scanned) == sorted(map(str, held))
                assert sum(i.size_bytes for i in scanned) == tier.usage().used_bytes
            else:
                tier.close()
                tier = subject.open(None)
                if not subject.survives_close:
                    held.clear()
    finally:
        tier.close()


class _Watched(Sequence[Bytes]):
    """Parts of an object; somebody looks at the tier each time one is taken."""

    def __init__(self, parts: Sequence[Bytes], look: Callable[[], Future[None]]) -> None:
        self._parts = parts
        self._look = look

    @overload
    def __getitem__(self, index: int) -> Bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Bytes]: ...
    def __getitem__(self, index: int | slice) -> Bytes | Sequence[Bytes]:
        if isinstance(index, slice):
            return self._parts[index]
        part = self._parts[index]
        # A tier that has locked the object lets the other thread wait.
        wait([self._look()], timeout=_GLANCE_S)
        return part

    def __len__(self) -> int:
        return len(self._parts)


class CountedPages:
    """Pages that know how many references there are."""

    def __init__(self, data: bytes) -> None:
        self.view: Final = memoryview(data)
        self.references = 1

    def retain(self) -> None:
        """One more."""
        self.references += 1

    def release(self) -> None:
        """One less."""
        self.references -= 1


def _store_until_killed(subject: TierSubject, attempt: int) -> list[StoredObject]:
    """Have a child process store objects, and kill it while it does; what it had stored."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # The child opens a store of its own and uses nothing that threads of the parent hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        _store_and_tell(subject, attempt, writer)
    try:
        with os.fdopen(reader, "rb", buffering=0) as progress:
            os.close(writer)
            for _ in range(3 + attempt):
                assert progress.read(1), "the child could not store"
            os.kill(child, signal.SIGKILL)
    finally:
        os.waitpid(child, 0)
    return [_large_object(attempt, number) for number in range(3 + attempt)]


def _store_and_tell(subject: TierSubject, attempt: int, writer: int) -> NoReturn:
    """In the child: store one object after another, and say so."""
    try:
        tier = subject.open(None)
        for number in range(500):
            thing = _large_object(attempt, number)
            tier.put(thing.object_id, [thing.head, thing.payload], durable=number % 2 == 0)
            os.write(writer, b".")
    finally:
        os._exit(1)


def _large_object(attempt: int, number: int) -> StoredObject:
    return make_object(1000 * (attempt + 1) + number, 200_000)
