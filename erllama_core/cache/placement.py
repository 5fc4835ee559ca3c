"""Objects put into tiers, and the room that is made for them."""

from __future__ import annotations

from typing import Final

from erllama_core.cache.catalog import Catalog
from erllama_core.cache.entry import Copy, Entry
from erllama_core.cache.eviction import Use
from erllama_core.cache.evictor import Evictor
from erllama_core.cache.tiers import TierStore
from erllama_core.errors import TierError, TierFull
from erllama_core.interfaces.block import ObjectKind
from erllama_core.interfaces.tier import Pages

MARKS_SHARE: Final = 1 / 16
"""Of a tier's quota. A mark is 8 KB beside megabytes of state: this is room for all of them,
unless contexts are tiny or a model needs marks of its whole vocabulary."""


class Placement:
    """Puts objects into tiers. Thread-safe.

    ``marks_share``: what part of a tier's quota marks may take.
    """

    def __init__(
        self, catalog: Catalog, evictor: Evictor, marks_share: float = MARKS_SHARE
    ) -> None:
        self._catalog: Final = catalog
        self._evictor: Final = evictor
        self._marks_share: Final = marks_share

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
                if not self._evictor.evict(store, 2 * size, worth_less_than=use).rows:
                    raise
                self._write(store, entry, head, payload, save_reason, durable, use)
        finally:
            if own is not None:
                own.release()
            with self._catalog.lock:
                for support, copy in supports:
                    self._catalog.let_go(support, copy)

    def _copied(self, payload: memoryview) -> Pages:
        """Pages with these bytes. Raises MemoryBudgetExceeded, TierError."""
        try:
            pages = self._catalog.pool.acquire(len(payload))
        except OSError as error:
            raise TierError(f"no memory for {len(payload)} bytes: {error}") from error
        pages.view[:] = payload.cast("B")
        return pages

    def _use_supports(self, store: TierStore, entry: Entry) -> list[tuple[Entry, Copy]]:
        with self._catalog.lock:
            supports = [(e, e.copy_in(store)) for e in self._catalog.index.supports(entry)]
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
            crowded = self._catalog.pool.budget.crowded(self._catalog.pool.idle_bytes)
            if crowded:
                self._evictor.evict(store, crowded, worth_less_than=use, pinned=use is None)
        usage = store.usage()
        quota = usage.quota_bytes
        if quota is None:
            return
        if size > quota:
            raise TierFull(f"{size} bytes in a tier of {quota}")
        if entry.object_id.kind is ObjectKind.LOGITS and store.leads():
            share = int(quota * self._marks_share)
            held = self._catalog.queues[store].amounts[ObjectKind.LOGITS].size_bytes
            freed = 0
            if size <= share < held + size:
                freed = self._evictor.evict_marks(store, held + size - share, use).bytes
            if held + size - freed > share:
                raise TierFull(f"{size} bytes beyond the marks' share of {share}")
            usage = store.usage()
        if usage.used_bytes + size > quota:
            self._evictor.make_room(
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
        catalog, object_id = self._catalog, entry.object_id

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
            used = Use(catalog.clock(), 0) if use is None else use
            catalog.add_copy(store, entry, size, used.last_used_ns, save_reason, used.hits)
        catalog.counters.add("bytes_written", size)
        catalog.report("stored", store, object_id, size, save_reason)
