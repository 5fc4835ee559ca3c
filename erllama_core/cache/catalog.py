"""What every part of the cache shares: the index, the tiers behind it, one lock, the counts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import attrs

from erllama_core.cache.counters import CounterSet
from erllama_core.cache.eviction import EvictionQueue
from erllama_core.cache.index import Copy, Entry, Index
from erllama_core.cache.pages import PagePool
from erllama_core.cache.tiers import NamedTier, TierStore
from erllama_core.errors import CacheError, TierFull, unknown_name
from erllama_core.interfaces.block import ObjectId
from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.tier import Pages

log = get_logger("erllama.cache")


@attrs.frozen
class Evicted:
    """What an eviction removed."""

    rows: int
    bytes: int


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
        self.queues: Final = {store: EvictionQueue(store) for store in self.stores.values()}
        self.clock: Callable[[], int] = time.time_ns
        """When objects are used, in nanoseconds; another one replays what was recorded."""

    def store(self, name: str) -> TierStore:
        """The tier of that name. ValueError names the ones there are."""
        store = self.stores.get(name)
        if store is None:
            raise ValueError(unknown_name("tier", name, self.stores))
        return store

    def get(self, object_id: ObjectId) -> Entry | None:
        with self.lock:
            return self.index.get(object_id)

    def put(
        self,
        store: TierStore,
        entry: Entry,
        head: bytes,
        payload: memoryview | Pages,
        save_reason: str,
        *,
        durable: bool = False,
    ) -> None:
        """Store an object in a tier, making room first, and take note of it.

        Pages are kept as they are by a tier that can. Raises CacheError.
        """
        size = len(head) + len(payload if isinstance(payload, memoryview) else payload.view)
        usage = store.usage()
        if usage.quota_bytes is not None:
            if size > usage.quota_bytes:
                raise TierFull(f"{size} bytes in a tier of {usage.quota_bytes}")
            if usage.used_bytes + size > usage.quota_bytes:
                self.make_room(store, usage.used_bytes + size - usage.quota_bytes)
        try:
            self._write(store, entry, head, payload, save_reason, durable)
        except TierFull:
            # Others filled it meanwhile, or the device is smaller than the quota.
            if not self.evict(store, 2 * size).rows:
                raise
            self._write(store, entry, head, payload, save_reason, durable)

    def _write(
        self,
        store: TierStore,
        entry: Entry,
        head: bytes,
        payload: memoryview | Pages,
        save_reason: str,
        durable: bool,
    ) -> None:
        object_id = entry.object_id

        def write() -> int:
            if isinstance(payload, memoryview):
                store.tier.put(object_id, (head, payload), durable=durable)
                return len(head) + len(payload)
            if store.keeps is not None:
                store.keeps.keep(object_id, head, payload)
            else:
                store.tier.put(object_id, (head, payload.view), durable=durable)
            return len(head) + len(payload.view)

        with store.changing(object_id):
            size = store.attempt(write, "write")
            self.add_copy(store, entry, size, self.clock(), save_reason)
        self.counters.add("bytes_written", size)

    def add_copy(
        self, store: TierStore, entry: Entry, size: int, last_used_ns: int, save_reason: str
    ) -> None:
        """Take note that a tier has an object."""
        with self.lock:
            entry = self.index.add(entry)
            if entry.copy_in(store) is None:
                copy = Copy(store, size, last_used_ns, save_reason)
                entry.copies.append(copy)
                self.queues[store].add(entry, copy)

    def forget_copy(self, store: TierStore, entry: Entry) -> None:
        """A copy turned out to be gone: take it out, so that none looks again."""
        with self.lock:
            copy = entry.copy_in(store)
            if copy is not None:
                entry.copies.remove(copy)
                self.queues[store].discount()
                self.drop_if_gone(entry)

    def discard_corrupt(self, store: TierStore, object_id: ObjectId, reason: str) -> None:
        """A copy is not what it claims to be: count it, forget it, remove it from its tier."""
        self.counters.add("corrupt")
        log.warning("object.corrupt", tier=store.name, object=str(object_id), reason=reason)
        self.remove(store, object_id)

    def remove(self, store: TierStore, object_id: ObjectId) -> None:
        """Take an object out of a tier, as far as the tier lets go of it."""
        entry = self.get(object_id)
        with store.changing(object_id):
            if entry is not None:
                self.forget_copy(store, entry)
            try:
                store.attempt(lambda: store.tier.delete(object_id), "delete")
            except CacheError:
                return

    def remove_unused(self, store: TierStore, entry: Entry) -> None:
        """Remove an object from a tier unless it is being read. Raises CacheError."""
        with self.lock:
            copy = entry.copy_in(store)
            if copy is None or copy.users:
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

    def drop_if_gone(self, entry: Entry) -> None:
        """Forget an object that is nowhere any more. Under the lock."""
        if not entry.copies and entry.pages is None:
            self.index.remove(entry)

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

    def make_room(self, store: TierStore, n_bytes: int) -> None:
        """Evict so much for a tier's quota, if that is for this process to do.

        What other processes have used since it was learned is worth more than was thought.
        """
        if not store.leads():
            store.upkeep_due.set()
            return
        freed = 0
        while freed < n_bytes:
            spared: list[Entry] = []
            evicted = self.evict(store, n_bytes - freed, spared)
            freed += evicted.bytes
            if not (evicted.rows or spared):
                return

    def evict(self, store: TierStore, n_bytes: int, spared: list[Entry] | None = None) -> Evicted:
        """Free at least ``n_bytes`` in one tier, least worth first; less when no more can go.

        With ``spared``, objects that turn out to have been used by other processes stay, and
        are appended to it.
        """
        with self.lock:
            victims = self.queues[store].take(
                n_bytes, lambda entry: self.index.has_dependants(entry, store)
            )
            for entry, _ in victims:
                self.drop_if_gone(entry)
        rows = freed = 0
        for entry, copy in victims:
            if spared is not None and self._used_elsewhere(store, entry, copy):
                spared.append(entry)
                continue
            try:
                gone = self.delete_forgotten(store, entry.object_id)
            except CacheError:
                # It takes up room still, so it must stay known.
                self.add_copy(store, entry, copy.size_bytes, copy.last_used_ns, copy.save_reason)
                continue
            rows += gone > 0
            freed += gone
        if rows:
            self.counters.add("evictions", rows)
            log.debug("tier.evicted", tier=store.name, rows=rows, bytes=freed)
        return Evicted(rows, freed)

    def _used_elsewhere(self, store: TierStore, entry: Entry, copy: Copy) -> bool:
        """Put a victim back that another process has used since this one learned of it."""
        shared = store.shared
        if shared is None:
            return False
        try:
            found = store.attempt(lambda: shared.find(entry.object_id), "look for an object")
        except CacheError:
            return False
        # A time in the future is a clock's that was set back, and says nothing.
        if found is None or not copy.last_used_ns < found.last_used_ns <= self.clock():
            return False
        self.add_copy(store, entry, copy.size_bytes, found.last_used_ns, copy.save_reason)
        return True

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

    def close(self) -> None:
        """Forget everything and close the tiers."""
        with self.lock:
            self.index.clear()
        for store in self.stores.values():
            try:
                store.attempt(store.tier.close, "close")
            except CacheError:
                continue
        self.pool.clear()
