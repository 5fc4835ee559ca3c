"""How objects get to the tiers: from a save buffer to the last tier of a model.

The :class:`~erllama_core.cache.writer.Writer` has a lane for each tier; what is passed on from one
tier to the next is the :class:`~erllama_core.cache.descent.Descent`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from erllama_core.cache.catalog import Catalog
from erllama_core.cache.descent import Descent
from erllama_core.cache.entry import Entry
from erllama_core.cache.evictor import Evictor
from erllama_core.cache.passage import DURABLE_REASONS, Draft, Passage, Route, SaveBuffer, is_in
from erllama_core.cache.placement import Placement
from erllama_core.cache.tiers import TierStore
from erllama_core.cache.writer import Writer
from erllama_core.errors import MemoryBudgetExceeded
from erllama_core.interfaces.block import ObjectId


class Flow:
    """Saves, and has objects passed down and made durable; thread-safe. No call but ``flush`` and
    ``close`` blocks: the lanes' threads do what does.
    """

    def __init__(
        self,
        catalog: Catalog,
        placement: Placement,
        evictor: Evictor,
        *,
        max_bytes: int,
        threads: int,
        patience_s: float,
    ) -> None:
        self._catalog: Final = catalog
        self._writer: Final = Writer(
            catalog, placement, max_bytes=max_bytes, threads=threads, patience_s=patience_s
        )
        self._descent: Final = Descent(catalog, evictor, self._writer)

    def register(self, namespace: bytes, route: Route) -> None:
        """See :meth:`Descent.register`."""
        self._descent.register(namespace, route)

    # --------------------------------------------------------------------- saves

    def reserve(self, size: int, route: Route, *, beyond_bound: bool) -> SaveBuffer | None:
        """Pages for an object to be saved; None, and counted, when no tier has room for it."""
        tiers = []
        for store in route.tiers:
            if self._writer.reserve(store, size, beyond_bound=beyond_bound):
                tiers.append(store)
                if route.write_back:
                    break
            else:
                self._catalog.counters.drop_in_tier(store.name)
        if tiers:
            try:
                return SaveBuffer(self._catalog.pool.acquire(size), tuple(tiers))
            except BaseException as error:
                self._unreserve(tiers, size)
                if isinstance(error, MemoryBudgetExceeded):
                    self._catalog.counters.add("saves_over_budget")
                elif not isinstance(error, OSError):
                    raise
        self._catalog.counters.add("saves_dropped")
        return None

    def forgo(self, buffer: SaveBuffer) -> None:
        """Give back what ``reserve`` gave, unsaved."""
        size = buffer.pages.size
        buffer.pages.release()
        self._unreserve(buffer.tiers, size)

    def submit(self, draft: Draft) -> None:
        """Make a new object findable, and hand it to the tiers that it was reserved for."""
        pages, reason = draft.buffer.pages, draft.save_reason
        size = pages.size
        with self._catalog.lock:
            entry = self._catalog.index.add(draft.entry)
            missing = tuple(store for store in draft.buffer.tiers if not is_in(entry, store))
            self._writer.send(
                missing,
                Passage(
                    entry,
                    pages,
                    size,
                    reason,
                    draft.route.align_tokens,
                    len(missing),
                    durable=reason in DURABLE_REASONS,
                    after=draft.after,
                    absorbs=draft.absorbs,
                    otherwise=draft.route.below(missing[0])
                    if missing and draft.route.write_back
                    else (),
                ),
            )
        pages.release()
        self._unreserve([store for store in draft.buffer.tiers if store not in missing], size)
        if missing:  # else the same content is there, or on its way
            self._catalog.counters.add(f"saves_{reason}")

    def make_durable(self, entries: Iterable[Entry], route: Route) -> None:
        """See :meth:`Descent.make_durable`."""
        self._descent.make_durable(entries, route)

    def delete_soon(self, store: TierStore, object_id: ObjectId) -> None:
        """See :meth:`Writer.delete_soon`."""
        self._writer.delete_soon(store, object_id)

    # ----------------------------------------------------------------- lifecycle

    def flush(self, timeout_s: float | None) -> bool:
        """See :meth:`Writer.flush`."""
        return self._writer.flush(timeout_s)

    def close(self) -> list[TierStore]:
        """Write what waits and what only this process's memory holds; the tiers that hang."""
        self._descent.rescue()
        return self._writer.close()

    def _unreserve(self, stores: Iterable[TierStore], size: int) -> None:
        for store in stores:
            self._writer.unreserve(store, size)
