"""A tier as the cache uses it: opened, named, and watched for trouble."""

from __future__ import annotations

import heapq
import math
import threading
from collections.abc import Callable
from typing import Final, TypeVar

import attrs

from erllama_core.cache.counters import CounterSet
from erllama_core.cache.index import Copy, Entry
from erllama_core.errors import BlockNotFound, CacheError, ErllamaError, TierError
from erllama_core.interfaces.log import get_logger
from erllama_core.interfaces.tier import KeepsPages, Tier

log = get_logger("erllama.cache")

_T = TypeVar("_T")

HIT_WEIGHT_S: Final = 120.0
"""Seconds of recency that a doubling of an object's hits is worth.

60 to 300 does best on the public serving trace of Kimi (Mooncake, FAST '25); much more does
worse than plain LRU.
"""


@attrs.frozen
class NamedTier:
    """An opened tier under the name that models and configurations call it by."""

    name: str
    kind: str
    tier: Tier


def score_ns(copy: Copy) -> int:
    """What a copy is worth keeping: later use and more hits are worth more."""
    return copy.last_used_ns + int(HIT_WEIGHT_S * 1e9 * math.log2(1 + copy.hits))


class TierStore:
    """One tier of a cache: its operations with errors in one shape, and its eviction heap.

    ``attempt`` may be called from any thread; the heap belongs to the cache's lock.
    """

    def __init__(self, named: NamedTier, counters: CounterSet) -> None:
        self.name: Final = named.name
        self.kind: Final = named.kind
        self.tier: Final = named.tier
        self.keeps: Final = named.tier if isinstance(named.tier, KeepsPages) else None
        self._counters: Final = counters
        self._lock = threading.Lock()
        self._in_trouble = False
        self._heap: list[tuple[int, int, Entry]] = []
        self._pushed = 0

    def attempt(self, operation: Callable[[], _T], what: str) -> _T:
        """Run a tier operation; whatever it raises becomes a CacheError.

        Trouble is logged when it starts and when it is over, not once per operation.
        """
        try:
            result = operation()
        except BlockNotFound:
            raise
        except CacheError as error:
            self._note_trouble(what, error)
            raise
        except (OSError, ErllamaError, ValueError, RuntimeError, MemoryError) as error:
            self._note_trouble(what, error)
            raise TierError(f"tier {self.name!r} could not {what}: {error}") from error
        if self._in_trouble:
            with self._lock:
                self._in_trouble = False
            log.info("tier.recovered", tier=self.name)
        return result

    def _note_trouble(self, what: str, error: Exception) -> None:
        self._counters.add("tier_errors")
        with self._lock:
            first, self._in_trouble = not self._in_trouble, True
        if first:
            log.warning("tier.failed", tier=self.name, doing=what, error=str(error))

    # -------------------------------------------------------------- eviction

    def consider(self, entry: Entry, copy: Copy) -> None:
        """Put an object among those that may be evicted. Under the cache's lock."""
        self._pushed += 1
        heapq.heappush(self._heap, (score_ns(copy), self._pushed, entry))

    def victims(self, n_bytes: int, is_needed: Callable[[Entry], bool]) -> list[Entry]:
        """Take this tier's copies of least worth out of their entries, for ``n_bytes``.

        Fewer when no more can go. A score in the heap may be out of date: a better one is put
        back before it is believed. An object that others in this tier need is passed over
        until they are gone; as using a context touches its blocks from the end to the start,
        that is rare. Under the cache's lock; the caller deletes the objects.
        """
        chosen: list[Entry] = []
        passed: list[Entry] = []
        freed = 0
        progress = True
        while progress and freed < n_bytes:
            progress = False
            while self._heap and freed < n_bytes:
                believed, _, entry = heapq.heappop(self._heap)
                copy = entry.copy_in(self)
                if copy is None:
                    continue
                if score_ns(copy) > believed:
                    self.consider(entry, copy)
                elif copy.users or is_needed(entry):
                    passed.append(entry)
                else:
                    entry.copies.remove(copy)
                    chosen.append(entry)
                    freed += copy.size_bytes
                    progress = True
            for entry in passed:
                copy = entry.copy_in(self)
                if copy is not None:
                    self.consider(entry, copy)
            passed.clear()
        return chosen
