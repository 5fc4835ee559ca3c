"""Bringing stored state back into memory: borrowed where it is there, read where it is not."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import attrs

from erllama_core.cache.catalog import Catalog
from erllama_core.cache.index import Copy, Entry
from erllama_core.cache.lookup import Match
from erllama_core.cache.marks import decode_mark
from erllama_core.cache.pages import PooledPages
from erllama_core.cache.tiers import TierStore
from erllama_core.errors import BlockNotFound, CacheError, CorruptBlock
from erllama_core.interfaces.backend import Mark, RangeImport
from erllama_core.interfaces.block import verify_object
from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.tier import Pages

log = get_logger("erllama.cache")

_REST_S: Final = 1.0
"""How long a copy that could not be read is left alone."""


class PayloadPages:
    """The payload part of pages that hold a whole object; implements Pages."""

    def __init__(self, pages: PooledPages, header_bytes: int) -> None:
        self._pages: Final = pages
        self._header_bytes: Final = header_bytes

    @property
    def view(self) -> memoryview:
        return self._pages.view[self._header_bytes :]

    def retain(self) -> None:
        self._pages.retain()

    def release(self) -> None:
        self._pages.release()


@attrs.define(eq=False)
class _Part:
    """One object of a fetch."""

    entry: Entry
    pages: Pages | None = None
    copy: Copy | None = None
    """The copy that is read, marked as in use."""
    head: bytes = b""


class Fetch:
    """The state of a match, in memory. Release it when it was imported."""

    def __init__(self, match: Match, catalog: Catalog) -> None:
        self.match: Final = match
        self._catalog: Final = catalog
        self.parts = [_Part(entry) for entry in _entries(match)]
        self.lock = threading.Lock()
        self.waiting = 0
        self.failed = False
        """An object was gone or damaged; the index knows by now, so look up again."""
        self.n_bytes = 0
        self.sources: tuple[str, ...] = ()
        """Names of the tiers that the state came from."""
        self.mark: Mark | None = None

    def ranges(self) -> list[RangeImport]:
        """The blocks as the backend imports them."""
        return [
            RangeImport(piece.entry.start, piece.entry.end, piece.stop, self.view(piece.entry))
            for piece in self.match.pieces
        ]

    def snapshot(self) -> memoryview | None:
        """The snapshot's bytes, when the match has one."""
        return None if self.match.snapshot is None else self.view(self.match.snapshot)

    def release(self) -> None:
        """Let go of all pages. Idempotent."""
        parts, self.parts = self.parts, []
        for part in parts:
            if part.pages is not None:
                part.pages.release()
        with self._catalog.lock:
            for part in parts:
                if part.copy is not None:
                    part.copy.users -= 1

    def view(self, entry: Entry) -> memoryview:
        """The payload of one of the match's objects."""
        for part in self.parts:
            if part.entry is entry and part.pages is not None:
                return part.pages.view
        raise BlockNotFound(f"{entry.object_id} was not fetched")


def _entries(match: Match) -> list[Entry]:
    entries = [piece.entry for piece in match.pieces]
    if match.snapshot is not None:
        entries.append(match.snapshot)
    if match.mark is not None:
        entries.append(match.mark)
    return entries


class Loader:
    """A pool of threads that read and verify; no read ever happens on a caller's thread."""

    def __init__(self, catalog: Catalog, *, threads: int) -> None:
        self._catalog: Final = catalog
        self._pool: Final = ThreadPoolExecutor(threads, thread_name_prefix="erllama-loader")

    def fetch(
        self,
        match: Match,
        tiers: tuple[TierStore, ...],
        promote_to: TierStore | None,
        done: Callable[[Fetch], None],
    ) -> Fetch | None:
        """Collect the objects of a match from the nearest tiers that have them.

        What is all in memory is returned at once; else ``done`` is called with it later, on
        a loader thread. What was read is kept in ``promote_to`` as well.
        """
        fetch = Fetch(match, self._catalog)
        reads: list[tuple[_Part, TierStore]] = []
        with self._catalog.lock:
            for part in fetch.parts:
                store = self._take(part, tiers)
                if store is not None:
                    reads.append((part, store))
                elif part.pages is None:
                    fetch.failed = True
            if fetch.failed:
                for part, _ in reads:
                    _unuse(part)
                reads.clear()
        if not reads:
            self._finish(fetch)
            return fetch
        fetch.waiting = len(reads)
        started = time.perf_counter_ns()
        for part, store in reads:
            self._pool.submit(self._read, fetch, part, store, promote_to, started, done)
        return None

    def submit(self, work: Callable[[], object]) -> None:
        """Run something that blocks on a thread of the pool, some time."""
        with contextlib.suppress(RuntimeError):  # the pool is closed
            self._pool.submit(work)

    def close(self) -> None:
        """Finish the reads under way and stop the threads."""
        self._pool.shutdown(wait=True, cancel_futures=False)

    def _take(self, part: _Part, tiers: tuple[TierStore, ...]) -> TierStore | None:
        """Borrow what is in memory; the tier to read from otherwise. Under the lock."""
        entry = part.entry
        if entry.pages is not None:
            entry.pages.retain()
            part.pages = entry.pages
            return None
        for store in tiers:
            copy = entry.copy_in(store)
            if copy is None or copy.rests_until_s > time.monotonic():
                continue
            if store.keeps is None:
                part.copy = copy
                copy.users += 1
                return store
            try:
                part.pages = store.keeps.borrow(entry.object_id)
            except BlockNotFound:
                self._catalog.forget_copy(store, entry)
                continue
            part.copy = copy
            copy.users += 1
            self._catalog.counters.hit_tier(store.name)
            return None
        return None

    def _read(
        self,
        fetch: Fetch,
        part: _Part,
        store: TierStore,
        promote_to: TierStore | None,
        started: int,
        done: Callable[[Fetch], None],
    ) -> None:
        promoted: Pages | None = None
        try:
            self._read_part(part, store)
            promoted = part.pages
            if promoted is not None and promote_to is not None:
                promoted.retain()
        except BlockNotFound:
            fetch.failed = True
            self._catalog.forget_copy(store, part.entry)
        except CorruptBlock as error:
            fetch.failed = True
            self._catalog.discard_corrupt(store, part.entry.object_id, error.reason)
        except CacheError:
            # It is there still: another attempt goes without it, a later request may try.
            fetch.failed = True
            if part.copy is not None:
                part.copy.rests_until_s = time.monotonic() + _REST_S
        except Exception:  # what is left is a bug; the request must still be answered
            fetch.failed = True
            log.exception("load.failed", tier=store.name)
        finally:
            self._read_is_over(fetch, started, done)
        if promoted is not None and promote_to is not None:
            self._promote(promote_to, part, promoted)

    def _read_is_over(self, fetch: Fetch, started: int, done: Callable[[Fetch], None]) -> None:
        with fetch.lock:
            fetch.waiting -= 1
            last = fetch.waiting == 0
        if last:
            self._catalog.counters.add("load_ns", time.perf_counter_ns() - started)
            self._finish(fetch)
            done(fetch)

    def _read_part(self, part: _Part, store: TierStore) -> None:
        entry = part.entry
        taken: list[PooledPages] = []

        def allocate(size: int) -> memoryview:
            taken.append(self._catalog.pool.acquire(size))
            return taken[-1].view

        try:
            data = store.attempt(lambda: store.tier.read(entry.object_id, allocate), "read")
            header = verify_object(data, entry.object_id)
            if (header.namespace, header.tokens) != (entry.namespace, entry.tokens):
                raise CorruptBlock("tokens differ from those that were indexed")
            if header.lead_tokens != entry.lead:
                # The same content under the same name: of no use here, and no damage either.
                raise BlockNotFound(f"{entry.object_id} was cut at other aligned positions")
            if len(taken) != 1 or taken[0].size != len(data):
                raise CorruptBlock("the tier did not return the buffer that it was given")
        except BaseException:
            for pages in taken:
                pages.release()
            raise
        part.head = bytes(data[: header.header_bytes])
        part.pages = PayloadPages(taken[0], header.header_bytes)
        self._catalog.counters.hit_tier(store.name)
        self._catalog.counters.add("bytes_read", len(data))

    def _promote(self, store: TierStore, part: _Part, pages: Pages) -> None:
        try:
            if part.entry.copy_in(store) is None:
                reason = part.copy.save_reason if part.copy is not None else ""
                self._catalog.put(store, part.entry, part.head, pages, reason)
        except CacheError:
            return  # the tier is full of what is worth more, or in trouble, which was logged
        finally:
            pages.release()

    def _finish(self, fetch: Fetch) -> None:
        """Everything is there, or something failed: settle what the worker will see."""
        if fetch.failed:
            fetch.release()
            return
        names = ("save buffer" if p.copy is None else p.copy.tier.name for p in fetch.parts)
        fetch.sources = tuple(dict.fromkeys(names))
        fetch.n_bytes = sum(len(part.pages.view) for part in fetch.parts if part.pages is not None)
        entry = fetch.match.mark
        if entry is not None:
            try:
                fetch.mark = decode_mark(fetch.view(entry))
            except CorruptBlock as error:
                fetch.failed = True
                with self._catalog.lock:
                    stores = [copy.tier for copy in entry.copies]
                for store in stores:
                    self._catalog.discard_corrupt(store, entry.object_id, error.reason)
                fetch.release()


def _unuse(part: _Part) -> None:
    if part.copy is not None:
        part.copy.users -= 1
        part.copy = None
