"""What every part of the cache shares: the index, the tiers behind it, one lock, the counts."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final

import attrs

from erllama_core.cache.counters import CounterSet
from erllama_core.cache.entry import Copy, Entry
from erllama_core.cache.eviction import EvictionQueue, Use, Victim
from erllama_core.cache.index import Index
from erllama_core.cache.pages import PagePool
from erllama_core.cache.pins import TierPins
from erllama_core.cache.tiers import NamedTier, TierStore
from erllama_core.errors import CacheError, TierError, TierFull, unknown_name
from erllama_core.interfaces.block import ObjectId, ObjectKind
from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.telemetry import CacheAction, CacheEvent
from erllama_core.interfaces.tier import Pages
from erllama_core.results import CacheKey

log = get_logger("erllama.cache")


MARKS_SHARE: Final = 1 / 16
"""Of a tier's quota. A mark is 8 KB beside megabytes of state: this is room for all of them,
unless contexts are tiny or a model needs marks of its whole vocabulary."""


_PIECE: Final = 16 << 20


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

    def __init__(
        self, tiers: Sequence[NamedTier], pool: PagePool, marks_share: float = MARKS_SHARE
    ) -> None:
        names = [tier.name for tier in tiers]
        if len(set(names)) != len(names):
            raise ValueError(f"two tiers have one name: {', '.join(names)}")
        self.lock: Final = threading.RLock()
        self.index: Final = Index()
        self.counters: Final = CounterSet()
        self.pool: Final = pool
        pool.reclaim = self._reclaim
        self.stores: Final = {tier.name: TierStore(tier, self.counters) for tier in tiers}
        self.pins: Final = {store: TierPins(store, self.index) for store in self.stores.values()}
        self.queues: Final = {
            store: EvictionQueue(store, self.index, pins.protects)
            for store, pins in self.pins.items()
        }
        self.marks_share: Final = marks_share
        self.before_deletion: Callable[
            [TierStore, Sequence[tuple[Entry, Copy]], bool], Sequence[Callable[[], None]]
        ] = _pass_nothing_on
        """Called under the lock with what is evicted, which is in the tier still, and whether it
        must not go to another tier in memory; what it returns is called without the lock, before
        anything is deleted."""
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

    def put(
        self,
        store: TierStore,
        entry: Entry,
        head: bytes,
        payload: memoryview | Pages,
        save_reason: str,
        *,
        durable: bool = False,
        use: Use | None = None,
    ) -> None:
        """Store an object in a tier, making room first, and take note of it.

        Room for it is not made of what it goes on from. What is pinned gives way when the rest
        is not enough for the quota; never to a device that is full for other reasons. Pages
        are kept as they are by a tier that can. ``use``: of the copy in another tier that this
        one is made of; nothing that is worth more, or pinned, is evicted for it. Raises
        CacheError.
        """
        size = len(head) + len(payload if isinstance(payload, memoryview) else payload.view)
        supports = self._use_supports(store, entry)
        own: Pages | None = None
        try:
            self._make_room(store, entry, size, use)
            if isinstance(payload, memoryview) and store.keeps is not None:
                # Rows are counted and given back as pages, whoever they come from.
                own = payload = self._copied(payload)
            try:
                self._write(store, entry, head, payload, save_reason, durable, use)
            except TierFull:
                # Others filled it meanwhile, or the device is smaller than the quota.
                if not self.evict(store, 2 * size, worth_less_than=use).rows:
                    raise
                self._write(store, entry, head, payload, save_reason, durable, use)
        finally:
            if own is not None:
                own.release()
            with self.lock:
                for support, copy in supports:
                    self.let_go(support, copy)

    def _copied(self, payload: memoryview) -> Pages:
        """Pages with these bytes. Raises MemoryBudgetExceeded, TierError."""
        try:
            pages = self.pool.acquire(len(payload))
        except OSError as error:
            raise TierError(f"no memory for {len(payload)} bytes: {error}") from error
        pages.view[:] = payload.cast("B")
        return pages

    def _use_supports(self, store: TierStore, entry: Entry) -> list[tuple[Entry, Copy]]:
        with self.lock:
            supports = [(e, e.copy_in(store)) for e in self.index.supports(entry)]
            used = [(support, copy) for support, copy in supports if copy is not None]
            for _, copy in used:
                copy.users += 1
        return used

    def _make_room(self, store: TierStore, entry: Entry, size: int, use: Use | None) -> None:
        """Evict until an object fits into the quota, and a mark into the marks' share of it.

        A row in memory besides leaves room for the next buffers in the memory budget: nobody who
        saves should have to make it.
        """
        if store.keeps is not None:
            crowded = self.pool.budget.crowded(self.pool.idle_bytes)
            if crowded:
                self.evict(store, crowded, worth_less_than=use, pinned=use is None)
        usage = store.usage()
        quota = usage.quota_bytes
        if quota is None:
            return
        if size > quota:
            raise TierFull(f"{size} bytes in a tier of {quota}")
        if entry.object_id.kind is ObjectKind.LOGITS and store.leads():
            share = int(quota * self.marks_share)
            held = self.queues[store].amounts[ObjectKind.LOGITS].size_bytes
            freed = 0
            if size <= share < held + size:
                freed = self._remove_marks(store, held + size - share, use).bytes
            if held + size - freed > share:
                raise TierFull(f"{size} bytes beyond the marks' share of {share}")
            usage = store.usage()
        if usage.used_bytes + size > quota:
            self.make_room(
                store,
                usage.used_bytes + size - quota,
                worth_less_than=use,
                pinned=use is None,
            )

    def _write(
        self,
        store: TierStore,
        entry: Entry,
        head: bytes,
        payload: memoryview | Pages,
        save_reason: str,
        durable: bool,
        use: Use | None,
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
            used_ns, hits = (self.clock(), 0) if use is None else (use.last_used_ns, use.hits)
            self.add_copy(store, entry, size, used_ns, save_reason, hits)
        self.counters.add("bytes_written", size)
        self.report("stored", store, object_id, size, save_reason)

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
                self._take_out(store, entry, copy)

    def _take_out(
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

    def make_room(
        self,
        store: TierStore,
        n_bytes: int,
        *,
        worth_less_than: Use | None = None,
        pinned: bool = False,
    ) -> None:
        """Evict so much for a tier's quota, if that is for this process to do.

        What other processes have used since it was learned is worth more than was thought. The
        rest is as for :meth:`evict`.
        """
        if not store.leads():
            store.upkeep_due.set()
            return
        freed = 0
        while freed < n_bytes:
            spared: list[Entry] = []
            evicted = self.evict(
                store,
                n_bytes - freed,
                worth_less_than=worth_less_than,
                pinned=pinned,
                spared=spared,
            )
            freed += evicted.bytes
            if not (evicted.rows or spared):
                return

    def evict(
        self,
        store: TierStore,
        n_bytes: int,
        *,
        worth_less_than: Use | None = None,
        for_good: bool = False,
        out_of_memory: bool = False,
        pinned: bool = False,
        spared: list[Entry] | None = None,
    ) -> Evicted:
        """Free at least ``n_bytes`` in one tier, least worth first; less when no more can go.

        ``for_good``: what goes is not passed on to another tier; ``out_of_memory``: to none that
        is in memory. ``pinned``: of what is pinned, too, once there is nothing else. With
        ``spared``, objects that turn out to have been used by other processes stay, and are
        appended to it.
        """
        queue = self.queues[store]
        below_ns = None if worth_less_than is None else worth_less_than.score_ns
        return self._evict(
            store,
            n_bytes,
            lambda: queue.next(self.clock(), pinned=pinned, below_ns=below_ns),
            for_good,
            spared,
            out_of_memory,
        )

    def free_memory(self, n_bytes: int, stores: Iterable[TierStore]) -> Evicted:
        """Give memory back to the system: idle buffers, then what these tiers hold, in order.

        What goes is passed on to tiers that are no memory alone. Frees less when no more can go.
        """
        freed, rows = self.pool.clear(), 0
        for store in stores:
            while freed < n_bytes:
                # A piece at a time: the lock is held while victims are chosen.
                evicted = self.evict(store, min(n_bytes - freed, _PIECE), out_of_memory=True)
                freed += evicted.bytes
                rows += evicted.rows
                if not evicted.rows:
                    break
        self.pool.clear()
        return Evicted(rows, freed)

    def _reclaim(self, n_bytes: int) -> None:
        """The memory budget lacks so much for new pages: what is worth least gives way."""
        left = n_bytes
        for store in self.stores.values():
            if store.keeps is not None and left > 0:
                left -= self.evict(store, left, out_of_memory=True).bytes

    def _remove_marks(self, store: TierStore, n_bytes: int, use: Use | None) -> Evicted:
        queue = self.queues[store]
        below_ns = None if use is None else use.score_ns
        return self._evict(store, n_bytes, lambda: queue.next_mark(below_ns), for_good=False)

    def _evict(
        self,
        store: TierStore,
        n_bytes: int,
        choose: Callable[[], Victim | None],
        for_good: bool,
        spared: list[Entry] | None = None,
        out_of_memory: bool = False,
    ) -> Evicted:
        victims: list[Victim] = []
        reads: list[Callable[[], None]] = []
        chosen = 0
        with self.lock:
            while chosen < n_bytes and (victim := choose()) is not None:
                if not for_good:
                    reads += self.before_deletion(
                        store, ((victim.entry, victim.copy),), out_of_memory
                    )
                self._take_out(store, victim.entry, victim.copy, victim.orphan_since_ns)
                victims.append(victim)
                chosen += victim.copy.size_bytes
        for read in reads:
            read()
        rows = freed = 0
        for victim in victims:
            entry, copy = victim.entry, victim.copy
            if spared is not None and self._used_elsewhere(store, entry, copy):
                spared.append(entry)
                continue
            try:
                gone = self.delete_forgotten(store, entry.object_id)
            except CacheError:
                # It takes up room still, so it must stay known.
                self._put_back(entry, copy, copy.last_used_ns)
                continue
            rows += gone > 0
            freed += gone
            if gone:
                self.report("evicted", store, entry.object_id, gone, copy.save_reason)
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
        self._put_back(entry, copy, found.last_used_ns)
        return True

    def _put_back(self, entry: Entry, copy: Copy, last_used_ns: int) -> None:
        """A victim stays."""
        self.add_copy(
            copy.tier, entry, copy.size_bytes, last_used_ns, copy.save_reason, hits=copy.hits
        )

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


def _pass_nothing_on(
    _: TierStore, __: Sequence[tuple[Entry, Copy]], ___: bool
) -> Sequence[Callable[[], None]]:
    return ()
