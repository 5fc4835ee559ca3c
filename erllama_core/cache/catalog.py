"""What every part of the cache shares: the index, the tiers behind it, one lock, the counts."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final

from erllama_core.cache.counters import CounterSet
from erllama_core.cache.entry import Copy, Entry
from erllama_core.cache.eviction import EvictionQueue
from erllama_core.cache.index import Index
from erllama_core.cache.pages import PagePool
from erllama_core.cache.pins import TierPins
from erllama_core.cache.tiers import NamedTier, TierStore
from erllama_core.errors import CacheError, unknown_name
from erllama_core.interfaces.block import ObjectId
from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.telemetry import CacheAction, CacheEvent
from erllama_core.results import CacheKey

log = get_logger("erllama.cache")


class Catalog:
    """Which tier has which object. Thread-safe.

    ``lock`` guards the index and every entry; it is held for microseconds, never during I/O.
    A tier is changed outside it, so an entry may for a moment promise a copy that is gone:
    reading it is then a miss like any other.
    """

    def __init__(self, tiers: Sequence[NamedTier], pool: PagePool) -> None:
        names = [tier.name for tier in tiers]
        if len(set(names)) != len(names):
            raise ValueError(f"two tiers have one name: {', '.join(names)}")
        self.lock: Final = threading.RLock()
        self.index: Final = Index()
        self.counters: Final = CounterSet()
        self.pool: Final = pool
        self.stores: Final = {tier.name: TierStore(tier, self.counters) for tier in tiers}
        self.pins: Final = {store: TierPins(store, self.index) for store in self.stores.values()}
        self.queues: Final = {
            store: EvictionQueue(store, self.index, pins.protects)
            for store, pins in self.pins.items()
        }
        self.on_event: Callable[[CacheEvent], None] | None = None
        """Told of objects that come into tiers, do not, and leave them; must not wait."""
        self.clock: Callable[[], int] = time.time_ns
        """When objects are used, in nanoseconds; another one replays what was recorded."""
        self.stopwatch: Callable[[], float] = time.perf_counter
        """What reads are measured with, in seconds."""

    def store(self, name: str) -> TierStore:
        """The tier of that name. ValueError names the ones there are."""
        store = self.stores.get(name)
        if store is None:
            raise ValueError(unknown_name("tier", name, self.stores))
        return store

    def get(self, object_id: ObjectId) -> Entry | None:
        with self.lock:
            return self.index.get(object_id)

    def report(
        self,
        action: CacheAction,
        store: TierStore,
        object_id: ObjectId,
        size: int,
        save_reason: str = "",
    ) -> None:
        """Tell whoever wants to know what became of an object. Under no lock."""
        if self.on_event is not None:
            self.on_event(
                CacheEvent(
                    action=action,
                    tier=store.name,
                    kind=object_id.kind.value,
                    key=CacheKey(object_id.key),
                    size_bytes=size,
                    save_reason=save_reason,
                )
            )

    def add_copy(
        self,
        store: TierStore,
        entry: Entry,
        size: int,
        last_used_ns: int,
        save_reason: str,
        hits: int = 0,
    ) -> None:
        """Take note that a tier has an object."""
        with self.lock:
            entry = self.index.add(entry)
            if entry.copy_in(store) is None:
                copy = Copy(store, size, last_used_ns, save_reason)
                copy.hits = hits
                self.index.place(entry, copy)
                self.queues[store].add(entry, copy, self.clock())
                self.rank_anew(store, self.pins[store].came(entry))

    def forget_copy(self, store: TierStore, entry: Entry) -> None:
        """A copy turned out to be gone: take it out, so that none looks again."""
        with self.lock:
            copy = entry.copy_in(store)
            if copy is not None:
                self.take_out(store, entry, copy)

    def take_out(
        self, store: TierStore, entry: Entry, copy: Copy, orphan_since_ns: int | None = None
    ) -> None:
        """A tier has an object no longer, or is about to lose it. Under the lock."""
        freed = self.index.displace(entry, copy)
        self.queues[store].discount(entry, copy)
        for below in freed:
            self.queues[store].offer(below)
        self.drop_if_gone(entry, orphan_since_ns)
        self.rank_anew(store, self.pins[store].left(entry))

    def rank_anew(self, store: TierStore, entries: Iterable[Entry]) -> None:
        """Objects of a tier have been pinned or unpinned. Under the lock."""
        for entry in entries:
            self.queues[store].rank_anew(entry)

    def let_go(self, entry: Entry, copy: Copy) -> None:
        """A use of a copy is over. Under the lock."""
        copy.users -= 1
        if not copy.users:
            self.queues[copy.tier].offer(entry)

    def discard_corrupt(self, store: TierStore, object_id: ObjectId, reason: str) -> None:
        """A copy is not what it claims to be: count it, forget it, remove it from its tier."""
        entry = self.get(object_id)
        copy = None if entry is None else entry.copy_in(store)
        with contextlib.suppress(
            CacheError
        ):  # it is forgotten, and a scan that finds it checks it again
            self.remove(store, object_id)
        self.note_corrupt(store, object_id, copy, reason)

    def note_corrupt(
        self, store: TierStore, object_id: ObjectId, copy: Copy | None, reason: str
    ) -> None:
        """Count and tell that a copy, as far as one was known, was not what it claimed to be."""
        self.counters.add("corrupt")
        log.warning("object.corrupt", tier=store.name, object=str(object_id), reason=reason)
        size, why = (0, "") if copy is None else (copy.size_bytes, copy.save_reason)
        self.report("corrupt", store, object_id, size, why)

    def remove(self, store: TierStore, object_id: ObjectId) -> None:
        """Forget an object of a tier and delete it. Raises CacheError if the tier does not."""
        entry = self.get(object_id)
        with store.changing(object_id):
            if entry is not None:
                self.forget_copy(store, entry)
            store.attempt(lambda: store.tier.delete(object_id), "delete")

    def remove_unused(self, store: TierStore, entry: Entry) -> None:
        """Remove an object from a tier unless it is being read or pinned. Raises CacheError.

        A pin is a key, and is found again by the object that ends there.
        """
        with self.lock:
            copy = entry.copy_in(store)
            if copy is None or copy.users or self.pins[store].protects(entry):
                return
            self.forget_copy(store, entry)
        self.delete_forgotten(store, entry.object_id)

    def forget_gone(self, store: TierStore, object_id: ObjectId) -> None:
        """Another process removed an object, unless it is there again. Raises CacheError."""
        entry = self.get(object_id)
        if entry is None or entry.copy_in(store) is None:
            return
        with store.changing(object_id):
            there = store.attempt(lambda: store.tier.contains(object_id), "look for an object")
            if not there:
                self.forget_copy(store, entry)

    def drop_if_gone(self, entry: Entry, orphan_since_ns: int | None = None) -> None:
        """Forget an object that is nowhere any more. Under the lock.

        ``orphan_since_ns``: since when what stands on it could not be found anyway.
        """
        if not entry.copies and entry.pages is None:
            for moved in self.index.remove(entry):
                is_orphan = self.index.is_orphan(moved)
                for copy in moved.copies:
                    queue = self.queues[copy.tier]
                    if is_orphan:
                        queue.orphaned(moved, self.clock(), orphan_since_ns)
                    queue.offer(moved)

    def touch(self, entries: Sequence[Entry]) -> None:
        """Note that a context's objects, in its order, were used.

        The later ones count as used a little earlier, so that eviction takes a context from
        its end.
        """
        now = self.clock()
        with self.lock:
            for back, entry in enumerate(entries):
                for copy in entry.copies:
                    copy.last_used_ns = now - back
                    copy.hits += 1

    def delete_forgotten(self, store: TierStore, object_id: ObjectId) -> int:
        """Delete what was forgotten, unless it was stored again meanwhile; the bytes freed.

        Raises CacheError.
        """
        with store.changing(object_id):
            with self.lock:
                known = self.index.get(object_id)
                if known is not None and known.copy_in(store) is not None:
                    return 0
            return store.attempt(lambda: store.tier.delete(object_id), "delete")

    def close(self, hanging: Collection[TierStore] = ()) -> None:
        """Forget everything and close the tiers; those that hang without waiting for them."""
        with self.lock:
            self.index.clear()
        for store in self.stores.values():
            if store in hanging:
                threading.Thread(
                    target=_close, args=(store,), name=f"erllama-close-{store.name}", daemon=True
                ).start()
            else:
                _close(store)
        self.pool.clear()


def _close(store: TierStore) -> None:
    try:
        store.attempt(store.tier.close, "close")
    except CacheError:
        return  # counted and logged
