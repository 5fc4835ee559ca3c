"""Bringing stored state back into memory: borrowed where it is there, read where it is not."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import attrs

from erllama_core.cache.catalog import Catalog
from erllama_core.cache.deadlines import Deadlines
from erllama_core.cache.entry import Copy, Entry
from erllama_core.cache.eviction import Use
from erllama_core.cache.gate import Line
from erllama_core.cache.lanes import Lane, Work
from erllama_core.cache.lookup import Match
from erllama_core.cache.marks import decode_mark
from erllama_core.cache.placement import Placement
from erllama_core.cache.reading import read_object
from erllama_core.cache.tiers import TierStore
from erllama_core.errors import (
    BlockNotFound,
    CacheError,
    CorruptBlock,
    MemoryBudgetExceeded,
)
from erllama_core.interfaces.backend import Mark, RangeImport
from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.tier import Pages

log = get_logger("erllama.cache")

_T = TypeVar("_T")

_REST_S: Final = 1.0
"""How long a copy that could not be read is left alone."""
_TIER_REST_S: Final = 30.0
"""How long a tier is left alone whose read got no answer in time, or until it answers."""


@attrs.define(eq=False)
class _Part:
    """One object of a fetch."""

    entry: Entry
    pages: Pages | None = None
    copy: Copy | None = None
    """The copy that is read, marked as in use."""
    head: bytes = b""
    line: Line | None = None
    """Where the cost of its read is taken note of, when it was read."""
    read_s: float = 0.0
    is_being_read: bool = False


class Fetch:
    """The state of a match, in memory. Release it when it was imported."""

    def __init__(self, match: Match, catalog: Catalog, done: Callable[[Fetch], None]) -> None:
        self.match: Final = match
        self.done: Final = done
        self.started_ns: Final = time.perf_counter_ns()
        self._catalog: Final = catalog
        self.parts = [_Part(entry) for entry in _entries(match)]
        self.lock = threading.Lock()
        self.waiting = 0
        self.given_up = False
        """It took too long; what is still read for it is nobody's."""
        self.failed = False
        """An object was gone or damaged; the index knows by now, so look up again."""
        self.n_bytes = 0
        self.sources: tuple[str, ...] = ()
        """Names of the tiers that the state came from."""
        self.mark: Mark | None = None

    def ranges(self) -> list[RangeImport]:
        """The blocks as the backend imports them. Raises BlockNotFound."""
        views = {part.entry: part.pages.view for part in self.parts if part.pages is not None}
        try:
            return [
                RangeImport(piece.entry.start, piece.entry.end, piece.stop, views[piece.entry])
                for piece in self.match.pieces
            ]
        except KeyError as error:
            raise BlockNotFound(f"{error.args[0].object_id} was not fetched") from None

    def snapshot(self) -> memoryview | None:
        """The snapshot's bytes, when the match has one."""
        return None if self.match.snapshot is None else self.view(self.match.snapshot)

    def release(self) -> None:
        """Let go of all pages. Idempotent."""
        parts, self.parts = self.parts, []
        _release(self._catalog, parts)

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
    """Reads and verifies; no read ever happens on a caller's thread.

    Each tier has threads of its own. A fetch that takes too long is given up, and what is
    still being read for it is released when it comes.
    """

    def __init__(
        self, catalog: Catalog, placement: Placement, *, threads: int, timeout_s: float
    ) -> None:
        self._catalog: Final = catalog
        self._placement: Final = placement
        self._timeout_s: Final = timeout_s
        self._hangs_s: Final = timeout_s / 2
        """A read that has lasted so long when a fetch is given up is why."""
        self._lanes: Final = {
            store: Lane(f"loader-{store.name}", threads=threads)
            for store in catalog.stores.values()
            if store.keeps is None
        }
        self._deadlines: Final = Deadlines(timeout_s, self._give_up, name="erllama-read-timer")

    def fetch(
        self,
        match: Match,
        tiers: tuple[TierStore, ...],
        promote_to: TierStore | None,
        done: Callable[[Fetch], None],
    ) -> Fetch | None:
        """Collect the objects of a match from the nearest tiers that have them.

        What is all in memory is returned at once; else ``done`` is called with it later, on
        another thread. What was read is kept in ``promote_to`` as well.
        """
        fetch = Fetch(match, self._catalog, done)
        tiers = tuple(store for store in tiers if self._answers(store))
        further = () if promote_to not in tiers else tiers[tiers.index(promote_to) + 1 :]
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
                    _unuse(self._catalog, part)
                reads.clear()
        if not reads:
            self._finish(fetch)
            return fetch
        fetch.waiting = len(reads)
        for part, _ in reads:
            part.is_being_read = True
        self._deadlines.add(fetch)
        for part, store in reads:
            target = promote_to if store in further else None
            self._lanes[store].submit(
                Work(
                    functools.partial(self._read, fetch, part, store, target),
                    functools.partial(self._read_is_over, fetch, part, ok=False),
                )
            )
        return None

    def read(self, store: TierStore, read: Callable[[], _T]) -> _T | None:
        """Run a read on one of a tier's threads, and wait for it as long as a fetch may last.

        None when the tier hangs. What ``read`` raises is raised here.
        """
        if store.rests_until_s > time.monotonic() or not self._answers(store):
            return None
        done: queue.SimpleQueue[_T | Exception | None] = queue.SimpleQueue()

        def run() -> None:
            try:
                done.put(read())
            except Exception as error:  # noqa: BLE001 - it is raised where it is waited for
                done.put(error)

        self._lanes[store].submit(Work(run, functools.partial(done.put, None)))
        try:
            result = done.get(timeout=self._timeout_s)
        except queue.Empty:
            self._catalog.counters.add("reads_given_up")
            store.rests_until_s = time.monotonic() + _TIER_REST_S
            store.note_hanging()
            return None
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> list[TierStore]:
        """Finish the reads under way and stop the threads; the tiers that hang."""
        hanging = [store for store, lane in self._lanes.items() if lane.close(self._timeout_s)]
        self._deadlines.close()
        return hanging

    def _answers(self, store: TierStore) -> bool:
        """Whether a tier has a thread left to read with; it rests on while it has none."""
        if store.keeps is not None or not self._lanes[store].is_stuck(self._hangs_s):
            return True
        store.rests_until_s = time.monotonic() + _TIER_REST_S
        return False

    def _take(self, part: _Part, tiers: tuple[TierStore, ...]) -> TierStore | None:
        """Borrow what is in memory; the tier to read from otherwise. Under the lock."""
        entry = part.entry
        if entry.pages is not None:
            entry.pages.retain()
            part.pages = entry.pages
            return None
        for copy in entry.copies_along(tiers):
            store = copy.tier
            if store.keeps is None:
                part.line = store.reads.line(copy.last_used_ns, self._catalog.clock())
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
        self, fetch: Fetch, part: _Part, store: TierStore, promote_to: TierStore | None
    ) -> None:
        """On a thread of the tier's lane."""
        copy = part.copy  # the fetch may be released, on another thread, once the read is over
        promoted: Pages | None = None
        ok = False
        try:
            if fetch.given_up:
                return
            stopwatch = self._catalog.stopwatch
            started = stopwatch()
            part.head, part.pages = read_object(self._catalog, store, part.entry)
            part.read_s = stopwatch() - started
            ok = True
            self._catalog.counters.hit_tier(store.name)
            if promote_to is not None:
                promoted = part.pages
                promoted.retain()
        except BlockNotFound:
            self._catalog.forget_copy(store, part.entry)
        except CorruptBlock as error:
            self._catalog.discard_corrupt(store, part.entry.object_id, error.reason)
        except CacheError as error:
            if isinstance(error, MemoryBudgetExceeded):
                self._catalog.counters.add("loads_over_budget")
            # It is there still: another attempt goes without it, a later request may try.
            if copy is not None:
                copy.rests_until_s = time.monotonic() + _REST_S
        except Exception:  # what is left is a bug; the request must still be answered
            log.exception("load.failed", tier=store.name)
        finally:
            self._read_is_over(fetch, part, ok=ok)
        if promoted is not None and promote_to is not None and copy is not None:
            self._promote(promote_to, part, copy, promoted)

    def _read_is_over(self, fetch: Fetch, part: _Part, *, ok: bool) -> None:
        with fetch.lock:
            part.is_being_read = False
            late = fetch.given_up
            last = False
            if not late:
                fetch.failed |= not ok
                fetch.waiting -= 1
                last = fetch.waiting == 0
        if late:
            if ok and part.copy is not None:
                part.copy.tier.rests_until_s = 0.0  # it answers again
                _take_note_of_costs([part])
            _release(self._catalog, (part,))
        elif last:
            self._deadlines.discard(fetch)
            self._deliver(fetch)

    def _give_up(self, fetch: Fetch) -> None:
        """A fetch has lasted too long: its request goes on without it. On the timer's thread."""
        with fetch.lock:
            if not fetch.waiting:
                return
            fetch.given_up = fetch.failed = True
            fetch.waiting = 0
            missing = [part for part in fetch.parts if part.is_being_read]
            # Those belong to their reads from now on.
            fetch.parts = [part for part in fetch.parts if not part.is_being_read]
        self._catalog.counters.add("reads_given_up")
        now = time.monotonic()
        late: dict[TierStore, None] = {}
        for part in missing:
            if part.copy is not None:
                part.copy.rests_until_s = now + _TIER_REST_S
                late[part.copy.tier] = None
        for store in late:
            # A tier that is only busy goes on; one that hangs is left alone for a while.
            if self._lanes[store].hanging(self._hangs_s):
                store.rests_until_s = now + _TIER_REST_S
                store.note_hanging()
        self._deliver(fetch)

    def _deliver(self, fetch: Fetch) -> None:
        self._catalog.counters.add("load_ns", time.perf_counter_ns() - fetch.started_ns)
        if not fetch.failed:
            _take_note_of_costs(fetch.parts)
        self._finish(fetch)
        fetch.done(fetch)

    def _promote(self, store: TierStore, part: _Part, copy: Copy, pages: Pages) -> None:
        """Keep what was read from ``copy`` in a nearer tier, too. Lets go of the pages."""
        try:
            if part.entry.copy_in(store) is None:
                use = Use(self._catalog.clock(), copy.hits)
                self._placement.put(store, part.entry, part.head, pages, copy.save_reason, use=use)
                self._catalog.counters.add("promotions")
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


def _release(catalog: Catalog, parts: Sequence[_Part]) -> None:
    """Let go of the pages and copies of these."""
    for part in parts:
        if part.pages is not None:
            part.pages.release()
    with catalog.lock:
        for part in parts:
            _unuse(catalog, part)


def _unuse(catalog: Catalog, part: _Part) -> None:
    if part.copy is not None:
        catalog.let_go(part.entry, part.copy)
        part.copy = None


def _take_note_of_costs(parts: list[_Part]) -> None:
    """One measurement for each kind of read: a slow moment of a disk is one outlier, not forty."""
    sums: dict[Line, tuple[int, int, float]] = {}
    for part in parts:
        if part.line is not None and part.copy is not None:
            count, size, seconds = sums.get(part.line, (0, 0, 0.0))
            sums[part.line] = (
                count + 1,
                size + part.copy.size_bytes,
                seconds + part.read_s,
            )
    for line, (count, size, seconds) in sums.items():
        line.observe(size / count, seconds / count)
