"""Writing objects to tiers, each on a lane of its own."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Final

from erllama_core.cache.catalog import Catalog
from erllama_core.cache.durability import Unsynced
from erllama_core.cache.lanes import Lane, Work
from erllama_core.cache.passage import Passage, is_in
from erllama_core.cache.placement import Placement
from erllama_core.cache.tiers import TierStore
from erllama_core.errors import CacheError
from erllama_core.interfaces.block import ObjectId
from erllama_core.interfaces.log import get_logger

log = get_logger("erllama.cache")


class Writer:
    """One lane for each tier, and what is on its way there. Thread-safe.

    A tier that is slow or hangs keeps back what it was to store itself and nothing else. An
    object stays in memory, and findable, until the last tier that it is on its way to has it.
    """

    def __init__(
        self,
        catalog: Catalog,
        placement: Placement,
        *,
        max_bytes: int,
        threads: int,
        patience_s: float,
    ) -> None:
        self._catalog: Final = catalog
        self._placement: Final = placement
        self.patience_s: Final = patience_s
        stores = tuple(catalog.stores.values())
        self._lanes: Final = {
            store: Lane(f"writer-{store.name}", threads=threads, max_bytes=max_bytes)
            for store in stores
        }
        self._unsynced: Final = {
            store: Unsynced(store, store.durable) for store in stores if store.durable is not None
        }

    # ------------------------------------------------------------------ on a lane

    def reserve(self, store: TierStore, size: int, *, beyond_bound: bool = False) -> bool:
        """Room on a tier's lane for so many bytes; see :meth:`Lane.reserve`."""
        return self._lanes[store].reserve(size, beyond_bound=beyond_bound)

    def unreserve(self, store: TierStore, size: int) -> None:
        """Give back what :meth:`reserve` gave."""
        self._lanes[store].unreserve(size)

    def run(
        self, store: TierStore, act: Callable[[], None], given_up: Callable[[], None] | None = None
    ) -> None:
        """Do something on a tier's own thread; ``given_up`` instead, when that never comes."""
        self._lanes[store].submit(Work(act, given_up or _nothing))

    def delete_soon(self, store: TierStore, object_id: ObjectId) -> None:
        """Delete what was forgotten, on the tier's own thread."""
        delete = functools.partial(self._catalog.delete_forgotten, store, object_id)
        self.run(store, functools.partial(_quietly, delete))

    def sync(self, store: TierStore, object_ids: Sequence[ObjectId]) -> None:
        """See to it that a power cut takes none of what a tier has. Blocks."""
        if store in self._unsynced:
            self._unsynced[store].sync(object_ids)

    def has_unsynced(self, store: TierStore) -> bool:
        """Whether a power cut could take what a tier that lasts has."""
        return store in self._unsynced

    def drop(self, store: TierStore) -> None:
        """Count that an object finds no room on its way to a tier."""
        self._catalog.counters.drop_in_tier(store.name)
        self._catalog.counters.add("saves_dropped")

    # -------------------------------------------------------------------- writing

    def send(self, stores: tuple[TierStore, ...], passage: Passage) -> None:
        """Mark an object as being written to tiers, and hand it to them. Under the lock.

        Each tier holds the pages until it is done, ``Entry.pages`` for as long as any does.
        """
        entry = passage.entry
        if entry.pages is not None:
            passage.pages = entry.pages
        for store in stores:
            passage.pages.retain()
            entry.pages = passage.pages
            entry.writing += (store,)
            self._hand_over(store, passage)

    def _hand_over(self, store: TierStore, passage: Passage) -> None:
        if store in self._unsynced and not passage.durable:
            self._unsynced[store].expect(passage.entry.object_id)
        self._lanes[store].submit(
            Work(
                functools.partial(self.write, store, passage),
                functools.partial(self.is_over, store, passage, stored=False),
                passage.size,
            )
        )

    def write(self, store: TierStore, passage: Passage) -> None:
        """On a thread of the tier's lane."""
        stored = False
        try:
            if not self._is_reachable(passage):
                passage.otherwise = ()
                return
            self._placement.put(
                store,
                passage.entry,
                passage.head(),
                passage.pages,
                passage.save_reason,
                durable=passage.durable,
                use=passage.use,
            )
            stored = True
            if passage.absorbs is not None:
                self._catalog.remove_unused(store, passage.absorbs)
        except CacheError:
            return  # counted and logged where it was raised
        finally:
            self.is_over(store, passage, stored=stored)

    def _is_reachable(self, passage: Passage) -> bool:
        """Whether the block that this one goes on from is still there.

        A context that is larger than its tiers loses its end, not its beginning.
        """
        with self._catalog.lock:
            after = passage.after
            return after is None or bool(after.copies) or after.pages is not None

    def is_over(self, store: TierStore, passage: Passage, *, stored: bool) -> None:
        """A tier has the object, or will not have it."""
        entry = passage.entry
        if store in self._unsynced and not passage.durable:
            self._unsynced[store].settle(entry.object_id, stored=stored)
        if not stored:
            self._catalog.counters.drop_in_tier(store.name)
            self._catalog.report(
                "dropped", store, entry.object_id, passage.size, passage.save_reason
            )
        with self._catalog.lock:
            entry.writing = tuple(other for other in entry.writing if other is not store)
            passage.is_stored |= stored
            if not stored and self._try_next(passage):
                return  # with these pages
            passage.waiting -= 1
            if not (passage.waiting or passage.is_stored or entry.copies or entry.writing):
                self._catalog.counters.add("saves_dropped")
            if not entry.writing:
                entry.pages = None
            self._catalog.drop_if_gone(entry)
        passage.pages.release()

    def _try_next(self, passage: Passage) -> bool:
        """Hand an object that a tier did not take to one further down."""
        while passage.otherwise:
            store, *further = passage.otherwise
            passage.otherwise = tuple(further)
            if is_in(passage.entry, store):
                passage.is_stored = True
                return False
            if self._lanes[store].reserve(passage.size):
                passage.entry.writing += (store,)
                self._hand_over(store, passage)
                return True
        return False

    # ------------------------------------------------------------------ lifecycle

    def flush(self, timeout_s: float | None) -> bool:
        """Wait until all that was handed over is written; False when time ran out.

        A tier that hangs is waited for no longer than the cache's patience.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        waited_for = set(self._lanes)
        for _ in self._lanes:  # what one tier does not take may go to the next one
            for store in self._lanes:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if store in waited_for and not self._lanes[store].wait_done(left, self.patience_s):
                    if deadline is not None and time.monotonic() >= deadline:
                        return False
                    waited_for.discard(store)
                    log.warning("tier.hangs", tier=store.name, doing="write")
        return len(waited_for) == len(self._lanes)

    def close(self) -> list[TierStore]:
        """Write what waits; the tiers that hang."""
        self.flush(None)
        hanging = []
        for store, lane in self._lanes.items():
            given_up = lane.close(self.patience_s)
            if given_up:
                hanging.append(store)
                log.warning("tier.abandoned", tier=store.name, unwritten=given_up)
        return hanging


def _quietly(act: Callable[[], object]) -> None:
    try:
        act()
    except CacheError:
        return  # counted and logged where it was raised


def _nothing() -> None:
    """What giving up takes where nothing is held."""
