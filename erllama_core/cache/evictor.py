"""Eviction carried out: room is made in tiers, and what goes is passed on where it may be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import attrs

from erllama_core.cache.catalog import Catalog
from erllama_core.cache.entry import Copy, Entry
from erllama_core.cache.eviction import Use, Victim
from erllama_core.cache.tiers import TierStore
from erllama_core.errors import CacheError
from erllama_core.interfaces.log import get_logger

log = get_logger("erllama.cache")

_PIECE: Final = 16 << 20


@attrs.frozen
class Evicted:
    """What an eviction removed."""

    rows: int
    bytes: int


class Evictor:
    """Makes room, of what is worth least. Thread-safe.

    Victims are chosen and forgotten under the catalog's lock, and deleted without it.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog: Final = catalog
        self.before_deletion: Callable[
            [TierStore, Sequence[tuple[Entry, Copy]], bool], Sequence[Callable[[], None]]
        ] = _pass_nothing_on
        """Called under the lock with what is evicted, which is in the tier still, and whether it
        must not go to another tier in memory; what it returns is called without the lock, before
        anything is deleted."""
        catalog.pool.reclaim = self._reclaim

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
        queue = self._catalog.queues[store]
        below_ns = None if worth_less_than is None else worth_less_than.score_ns
        return self._evict(
            store,
            n_bytes,
            lambda: queue.next(self._catalog.clock(), pinned=pinned, below_ns=below_ns),
            for_good,
            spared,
            out_of_memory,
        )

    def evict_marks(self, store: TierStore, n_bytes: int, worth_less_than: Use | None) -> Evicted:
        """:meth:`evict` of marks alone."""
        queue = self._catalog.queues[store]
        below_ns = None if worth_less_than is None else worth_less_than.score_ns
        return self._evict(store, n_bytes, lambda: queue.next_mark(below_ns), for_good=False)

    def free_memory(self, n_bytes: int, stores: Iterable[TierStore]) -> Evicted:
        """Give memory back to the system: idle buffers, then what these tiers hold, in order.

        What goes is passed on to tiers that are no memory alone. Frees less when no more can go.
        """
        freed, rows = self._catalog.pool.clear(), 0
        for store in stores:
            while freed < n_bytes:
                # A piece at a time: the lock is held while victims are chosen.
                evicted = self.evict(store, min(n_bytes - freed, _PIECE), out_of_memory=True)
                freed += evicted.bytes
                rows += evicted.rows
                if not evicted.rows:
                    break
        self._catalog.pool.clear()
        return Evicted(rows, freed)

    def _reclaim(self, n_bytes: int) -> None:
        """The memory budget lacks so much for new pages: what is worth least gives way."""
        left = n_bytes
        for store in self._catalog.stores.values():
            if store.keeps is not None and left > 0:
                left -= self.evict(store, left, out_of_memory=True).bytes

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
        with self._catalog.lock:
            while chosen < n_bytes and (victim := choose()) is not None:
                if not for_good:
                    reads += self.before_deletion(
                        store, ((victim.entry, victim.copy),), out_of_memory
                    )
                self._catalog.take_out(store, victim.entry, victim.copy, victim.orphan_since_ns)
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
                gone = self._catalog.delete_forgotten(store, entry.object_id)
            except CacheError:
                # It takes up room still, so it must stay known.
                self._put_back(entry, copy, copy.last_used_ns)
                continue
            rows += gone > 0
            freed += gone
            if gone:
                self._catalog.report("evicted", store, entry.object_id, gone, copy.save_reason)
        if rows:
            self._catalog.counters.add("evictions", rows)
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
        if found is None or not copy.last_used_ns < found.last_used_ns <= self._catalog.clock():
            return False
        self._put_back(entry, copy, found.last_used_ns)
        return True

    def _put_back(self, entry: Entry, copy: Copy, last_used_ns: int) -> None:
        """A victim stays."""
        self._catalog.add_copy(
            copy.tier, entry, copy.size_bytes, last_used_ns, copy.save_reason, hits=copy.hits
        )


def _pass_nothing_on(
    _: TierStore, __: Sequence[tuple[Entry, Copy]], ___: bool
) -> Sequence[Callable[[], None]]:
    return ()
