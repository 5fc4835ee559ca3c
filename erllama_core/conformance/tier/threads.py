"""What a tier promises to threads that use it at once: tests of the kit."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, overload

from erllama_core.conformance.objects import make_object
from erllama_core.conformance.tier.looking import read
from erllama_core.conformance.tier.subject import TierKit
from erllama_core.errors import BlockNotFound
from erllama_core.interfaces.block import Bytes
from erllama_core.interfaces.tier import Tier

_PATIENCE_S: Final = 30.0
_GLANCE_S: Final = 0.1


class ThreadPromises(TierKit):
    """What a tier promises to threads that use it at once."""

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
