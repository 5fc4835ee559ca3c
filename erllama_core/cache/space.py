"""The cache as one model sees it: its namespace, its tiers, its way of cutting state."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

import attrs

from erllama_core.cache.cache import Cache
from erllama_core.cache.discovery import wanted_after
from erllama_core.cache.index import Entry
from erllama_core.cache.keys import ContextKeys, salted
from erllama_core.cache.loader import Fetch
from erllama_core.cache.lookup import Divergence, Finder, Match, entry_at
from erllama_core.cache.marks import MARK_SIZE, encode_mark
from erllama_core.cache.pages import PooledPages
from erllama_core.cache.writer import Draft
from erllama_core.interfaces.backend import KVClass, Mark
from erllama_core.interfaces.block import ObjectId, ObjectKind

ABSORBED_TOKENS: Final = 16
"""Longer blocks are not stored again for being extended."""


@attrs.frozen
class NewBlock:
    """A block to be stored: the cells [start, end)."""

    start: int
    end: int
    absorbs: Entry | None
    """A block that is of no use beside the new one."""


class ModelSpace:
    """Look-ups and saves of one model. Called by its worker; nothing here does I/O."""

    def __init__(
        self,
        cache: Cache,
        *,
        namespace: bytes,
        kv_class: KVClass,
        tiers: Sequence[str],
        align_tokens: int,
    ) -> None:
        self._cache: Final = cache
        self._catalog: Final = cache.catalog
        self._namespace: Final = namespace
        self._tiers: Final = tuple(cache.catalog.store(name) for name in tiers)
        self._finder: Final = Finder(cache.catalog.index, kv_class, self._tiers)
        nearest = self._tiers[0] if self._tiers else None
        self._promote_to: Final = (
            nearest if nearest is not None and nearest.keeps is not None else None
        )
        self.kv_class: Final = kv_class
        self.align_tokens: Final = align_tokens
        self.mark_size: Final = MARK_SIZE if kv_class is KVClass.SPAN else None
        """Logits kept of a mark. All of them where no token can be computed again."""

    @property
    def has_tiers(self) -> bool:
        """Whether there is anywhere to save to."""
        return bool(self._tiers)

    def keys(self, tokens: bytearray, salt: str | None) -> ContextKeys:
        """The keys of a context that will grow; ``tokens`` stays the caller's."""
        return ContextKeys(salted(self._namespace, salt), tokens, self.align_tokens)

    # ------------------------------------------------------------------ finding

    def find(self, keys: ContextKeys, *, may_sample: bool) -> Match:
        """The longest stored prefix of a prompt, counted as a hit or a miss.

        ``may_sample``: whether the request could sample its first token from a mark.
        """
        started = time.perf_counter_ns()
        with self._catalog.lock:
            match = self._finder.find(keys, may_sample)
        self._catalog.counters.add("lookup_ns", time.perf_counter_ns() - started)
        return match

    def count(self, match: Match | None, n: int, parent_key: bytes | None) -> None:
        """Count what a request ended up with: ``match`` restored, of ``n`` tokens, or None.

        ``parent_key`` is a hint, and one that is never waited for: look-up by content finds
        that context, or a longer one, by itself.
        """
        if match is None or not match.length:
            self._catalog.counters.add("misses")
            return
        used = _used(match)
        if any(entry.object_id.key == parent_key for entry in used):
            self._catalog.counters.add("hits_resume")
        else:
            self._catalog.counters.add("hits_exact" if match.length == n else "hits_longest_prefix")
        self._catalog.touch(used)

    def divergence(self, keys: ContextKeys, covered: int) -> Divergence:
        """Where a prompt of which ``covered`` tokens are stored leaves what is stored."""
        with self._catalog.lock:
            return self._finder.divergence(keys, covered)

    def fetch(self, match: Match, done: Callable[[Fetch], None]) -> Fetch | None:
        """The state of a match; at once, or later through ``done`` on another thread."""
        return self._cache.fetch(match, self._tiers, self._promote_to, done)

    @property
    def is_scanned(self) -> bool:
        """Whether what this model's tiers held at opening is known, or not worth waiting for."""
        return self._cache.is_scanned(self._tiers)

    def when_scanned(self, then: Callable[[], None]) -> None:
        """Call ``then`` on another thread when it is."""
        self._cache.when_scanned(self._tiers, then)

    def discover(self, keys: ContextKeys, match: Match, then: Callable[[], None]) -> bool:
        """Look for more of a prompt than a look-up found, in what other processes stored since.

        False when there is nothing to look for. Otherwise ``then`` is called on another thread,
        soon in any case; what was found is then known to a look-up.
        """
        shared = [store for store in self._tiers if store.shared is not None]
        if not shared:
            return False
        wanted = wanted_after(keys, match, self.kv_class)
        return wanted is not None and self._cache.discover(wanted, shared, then)

    def refused(self, match: Match) -> None:
        """The backend refused what was stored: a second time, it is not kept any longer."""
        self._catalog.counters.add("state_rejected")
        for entry in _used(match):
            entry.refusals += 1
            if entry.refusals > 1:
                self._cache.disown(entry, "refused by the backend twice")

    # ------------------------------------------------------------------- saving

    def next_block(self, keys: ContextKeys, start: int, end: int) -> NewBlock | None:
        """The first run in [start, end) that no block covers; None when all is covered.

        Everything before ``start`` must be covered. A short block in which the run begins, and
        which nothing else hangs on, becomes part of the new one: the ends of many turns would
        otherwise each leave a block of a few tokens behind.
        """
        with self._catalog.lock:
            aligned = start // self.align_tokens * self.align_tokens
            covered, pieces = self._finder.chain(keys, end, aligned)
            position = max(start, covered)
            if position >= end:
                return None
            limit = (position // self.align_tokens + 1) * self.align_tokens
            stop = min(limit, end)
            last = pieces[-1].entry if pieces else None
            if last is not None and position % self.align_tokens and _is_small_leaf(last, position):
                return NewBlock(last.start, stop, last)
            return NewBlock(position, stop, None)

    def has_snapshot(self, keys: ContextKeys, position: int) -> bool:
        return self._has(ObjectKind.SNAPSHOT, keys, position)

    def has_mark(self, keys: ContextKeys, position: int) -> bool:
        return self._has(ObjectKind.LOGITS, keys, position)

    def _has(self, kind: ObjectKind, keys: ContextKeys, position: int) -> bool:
        object_id = ObjectId(kind, position, keys.key(position))
        with self._catalog.lock:
            entry = self._catalog.index.get(object_id)
            return entry is not None and self._finder.readable(entry)

    def reserve(self, size: int, *, beyond_bound: bool = False) -> PooledPages | None:
        """Pages to copy state into; None when too much is on its way already."""
        return self._cache.reserve(size, beyond_bound=beyond_bound)

    def forgo(self, pages: PooledPages) -> None:
        """Give pages back, unsaved."""
        self._cache.forgo(pages)

    def submit_block(
        self, keys: ContextKeys, block: NewBlock, pages: PooledPages, reason: str
    ) -> None:
        """Store a block whose cells were copied into ``pages``, which are handed over."""
        self._submit(ObjectKind.KV, keys, block.start, block.end, pages, reason, block.absorbs)

    def submit_snapshot(
        self, keys: ContextKeys, position: int, pages: PooledPages, reason: str
    ) -> None:
        """Store the snapshot at ``position``, copied into ``pages``, which are handed over."""
        self._submit(ObjectKind.SNAPSHOT, keys, position, position, pages, reason)

    def submit_mark(self, keys: ContextKeys, position: int, mark: Mark, reason: str) -> None:
        """Store the logits after the first ``position`` tokens."""
        payload = encode_mark(mark)
        pages = self._cache.reserve(len(payload))
        if pages is not None:
            pages.view[:] = payload
            self._submit(ObjectKind.LOGITS, keys, position, position, pages, reason)

    def count_unsaved(self) -> None:
        """Count a save that failed before it came to anything."""
        self._catalog.counters.add("saves_dropped")

    def touch(self, keys: ContextKeys, n: int) -> None:
        """Note that the first ``n`` tokens of a context were in use until now."""
        with self._catalog.lock:
            _, pieces = self._finder.chain(keys, n)
            self._catalog.touch([piece.entry for piece in pieces])

    def add_pack_time(self, nanoseconds: int) -> None:
        """Account for copying state out of a context."""
        self._catalog.counters.add("pack_ns", nanoseconds)

    def _submit(
        self,
        kind: ObjectKind,
        keys: ContextKeys,
        start: int,
        end: int,
        pages: PooledPages,
        reason: str,
        absorbs: Entry | None = None,
    ) -> None:
        after = self._block_before(keys, start)
        if after is None and start and self.kv_class is not KVClass.WHOLE:
            self._cache.forgo(pages)  # what it goes on from was evicted meanwhile
            self._catalog.counters.add("saves_dropped")
            return
        entry = entry_at(keys, kind, start, end)
        draft = Draft(entry, pages, self._tiers, reason, self.align_tokens, after, absorbs)
        self._cache.submit(draft)

    def _block_before(self, keys: ContextKeys, position: int) -> Entry | None:
        """The block that covers the token before ``position``."""
        if not position or self.kv_class is KVClass.WHOLE:
            return None
        with self._catalog.lock:
            covered, pieces = self._finder.chain(keys, position, keys.segment_start(position))
        return pieces[-1].entry if covered >= position and pieces else None


def _used(match: Match) -> list[Entry]:
    entries = [piece.entry for piece in match.pieces]
    entries.extend(e for e in (match.snapshot, match.mark) if e is not None)
    return entries


def _is_small_leaf(entry: Entry, end: int) -> bool:
    """Whether a block ends at ``end``, is short, and nothing goes on from it."""
    return (
        entry.end == end
        and end - entry.start <= ABSORBED_TOKENS
        and not entry.children
        and not entry.writing
    )
