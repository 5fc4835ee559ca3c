"""Finding on a miss what other processes have stored since a tier was last scanned.

An object's name is made from content, so a prompt itself tells under which name its next block
would be. One ``stat`` says whether it is there; what is in it is verified when it is read.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from erllama_core.cache.catalog import Catalog
from erllama_core.cache.entry import Entry
from erllama_core.cache.keys import ContextKeys
from erllama_core.cache.lookup import Match, entry_at
from erllama_core.cache.tiers import TierStore
from erllama_core.errors import CacheError
from erllama_core.interfaces.backend import KVClass
from erllama_core.interfaces.block import ObjectKind
from erllama_core.interfaces.log import get_logger

log = get_logger("erllama.cache")

PATIENCE_S: Final = 0.5
"""A request waits no longer than this; a ``stat`` takes microseconds, or a disk's seek."""
_REST_S: Final = 5.0
"""How long a tier is left alone after it failed."""

Wanted = Sequence[Sequence[Entry]]
"""Steps in the order in which they are made, each of no use without those before. The objects of
one are alternatives."""


def wanted_after(keys: ContextKeys, match: Match, kv_class: KVClass) -> Wanted | None:
    """What would go on from a match, or None.

    Whole blocks, and what a request for the same prompt leaves at its end. The first block may
    begin where the match ends, as another process's branch from the same context does, or at
    the aligned position before, if that process did not have this context. Nothing is looked
    for if less than a block is left of the prompt.
    """
    n = len(keys)
    align = keys.align_tokens
    mark = [entry_at(keys, ObjectKind.LOGITS, n, n)]
    snapshot = [entry_at(keys, ObjectKind.SNAPSHOT, n, n)]
    if kv_class is KVClass.WHOLE:  # of which the blocks hold nothing that is needed
        return [snapshot, mark] if n >= align else None
    covered = match.covered
    start = covered // align * align
    if n - start < align:
        return None
    steps = []
    for at in range(start, n, align):
        end = min(at + align, n)
        begins = (covered, at) if covered > at else (at,)
        steps.append([entry_at(keys, ObjectKind.KV, begin, end) for begin in begins])
    if kv_class is KVClass.CHECKPOINT:
        steps.append(snapshot)
    steps.append(mark)
    return steps


class _Search:
    """One request's search. Its caller is called back once: when it ends, or is overdue."""

    def __init__(
        self, wanted: Wanted, stores: Sequence[TierStore], then: Callable[[], None]
    ) -> None:
        self.wanted: Final = wanted
        self.stores: Final = stores
        self.deadline_s: Final = time.monotonic() + PATIENCE_S
        self.ended: Final = threading.Event()
        self._then: Callable[[], None] | None = then
        self._lock: Final = threading.Lock()

    def answer(self) -> bool:
        """Call back; False when that was done before."""
        with self._lock:
            then, self._then = self._then, None
        if then is None:
            return False
        then()
        return True


class Discovery:
    """Searches, one after another, on a thread of their own; a second one watches the time.

    Both start with the first search. While a search is overdue, the tier hangs, and no other is
    begun: a request then does without.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog: Final = catalog
        self._lock: Final = threading.Lock()
        self._queue: Final[queue.SimpleQueue[_Search | None]] = queue.SimpleQueue()
        self._watched: Final[queue.SimpleQueue[_Search | None]] = queue.SimpleQueue()
        self._threads: tuple[threading.Thread, ...] = ()
        self._overdue = 0
        """Searches whose callers were answered and that have not come back."""
        self._resting: Final[dict[TierStore, float]] = {}
        self._closed = False

    def start(self, wanted: Wanted, stores: Sequence[TierStore], then: Callable[[], None]) -> bool:
        """Look for objects in the tiers given; False when that is not worth it now.

        Otherwise ``then`` is called later on another thread, within :data:`PATIENCE_S` or
        little more. What was found is in the index then.
        """
        now = time.monotonic()
        stores = [store for store in stores if self._resting.get(store, 0.0) <= now]
        for entry in wanted[0]:
            known = self._catalog.get(entry.object_id)
            if known is not None:  # it is there and cannot be read, which a stat does not mend
                stores = [store for store in stores if known.copy_in(store) is None]
        with self._lock:
            if not stores or self._overdue or self._closed:
                return False
            if not self._threads:
                self._threads = tuple(
                    threading.Thread(target=run, name=f"erllama-discovery-{name}", daemon=True)
                    for name, run in (("search", self._run), ("watch", self._watch))
                )
                for thread in self._threads:
                    thread.start()
            search = _Search(wanted, stores, then)
            self._watched.put(search)
            self._queue.put(search)
        return True

    def close(self) -> None:
        """Answer everybody and stop the threads; one that hangs in a tier is left behind."""
        with self._lock:
            self._closed = True
            threads, self._threads = self._threads, ()
            self._queue.put(None)
            self._watched.put(None)
        for thread in threads:
            thread.join(2 * PATIENCE_S)
            if thread.is_alive():
                log.warning("discovery.abandoned", thread=thread.name)

    def _run(self) -> None:
        while (search := self._queue.get()) is not None:
            try:
                if not (self._closed or self._overdue):
                    self._look(search)
            except Exception:  # what is left is a bug; the request must still be answered
                log.exception("discovery.failed")
            finally:
                in_time = search.answer()
                search.ended.set()
                if not in_time:
                    with self._lock:
                        self._overdue -= 1
            del search

    def _watch(self) -> None:
        while (search := self._watched.get()) is not None:
            if not search.ended.wait(max(0.0, search.deadline_s - time.monotonic())):
                with self._lock:
                    self._overdue += 1
                if not search.answer():
                    with self._lock:
                        self._overdue -= 1
            del search

    def _look(self, search: _Search) -> None:
        stores = search.stores
        for entries in search.wanted:
            if not any(self._is_in(store, entry) for entry in entries for store in stores):
                return

    def _is_in(self, store: TierStore, entry: Entry) -> bool:
        """Whether the tier has the object; it is in the index then."""
        shared = store.shared
        if shared is None:
            return False
        known = self._catalog.get(entry.object_id)
        if known is not None and known.copy_in(store) is not None:
            return True
        try:
            found = store.attempt(lambda: shared.find(entry.object_id), "look for an object")
        except CacheError:
            self._resting[store] = time.monotonic() + _REST_S
            return False
        if found is None:
            return False
        used_ns = min(found.last_used_ns, self._catalog.clock())
        self._catalog.add_copy(store, entry, found.size_bytes, used_ns, "")
        store.upkeep_due.set()  # whoever stored this may have stored more
        return True
