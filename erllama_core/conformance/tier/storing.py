"""What a tier promises of what is stored and deleted: tests of the kit."""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import strategies as st

from erllama_core.conformance.kit import random_walks
from erllama_core.conformance.objects import make_object
from erllama_core.conformance.tier.looking import absent, read
from erllama_core.conformance.tier.subject import TierKit, TierSubject
from erllama_core.errors import BlockNotFound
from erllama_core.interfaces.block import Bytes, ObjectId, ObjectKind
from erllama_core.interfaces.tier import ScannedObject, Tier

_LARGE: Final = 3 << 20


class StoringPromises(TierKit):
    """What a tier promises of what is stored and deleted."""

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
