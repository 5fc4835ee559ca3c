"""Which objects leave a tier first."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from typing import Final

import attrs

from erllama_core.cache.index import Copy, Entry
from erllama_core.cache.tiers import TierStore

HIT_WEIGHT_S: Final = 60.0
"""Seconds of recency that a doubling of an object's hits is worth.

On the public serving trace of Kimi (Mooncake, FAST '25) 60 to 300 does best in small tiers.
60 is never worse than plain LRU; from 90 on it is at 100,000 blocks, by less than 0.0001.
"""

_SLACK: Final = 1000


@attrs.frozen
class Use:
    """How much a copy was used: what it is worth, and what one that is made of it begins with."""

    last_used_ns: int
    hits: int

    @property
    def score_ns(self) -> int:
        """What it is worth keeping: later use and more hits are worth more."""
        return _score_ns(self.last_used_ns, self.hits)


def score_ns(copy: Copy) -> int:
    """What a copy is worth keeping: later use and more hits are worth more."""
    return _score_ns(copy.last_used_ns, copy.hits)


def _score_ns(last_used_ns: int, hits: int) -> int:
    return last_used_ns + int(HIT_WEIGHT_S * 1e9 * math.log2(1 + hits))


class EvictionQueue:
    """The objects of one tier, least worth first. The cache's lock guards it.

    Scores are static: a use makes an object's place in the queue out of date, which is seen
    when its turn comes.
    """

    def __init__(self, store: TierStore) -> None:
        self._store: Final = store
        self._heap: list[tuple[int, int, Entry]] = []
        self._pushed = 0
        self._live = 0
        """Objects in the tier; the heap also holds some that have left it."""

    def add(self, entry: Entry, copy: Copy) -> None:
        """The tier has a new object."""
        self._live += 1
        self._push(entry, copy)
        if len(self._heap) > 2 * self._live + _SLACK:
            self._heap = [item for item in self._heap if item[2].copy_in(self._store) is not None]
            heapq.heapify(self._heap)

    def discount(self) -> None:
        """An object left the tier in another way than by eviction."""
        self._live -= 1

    def take(
        self, n_bytes: int, is_needed: Callable[[Entry], bool], below_ns: int | None = None
    ) -> list[tuple[Entry, Copy]]:
        """Take copies of ``n_bytes`` out of their entries; fewer when no more can go.

        With ``below_ns`` only what has a lower score goes.

        An object that others in this tier need is kept aside until the last of those has
        gone: a context is taken from its end. The caller deletes the objects.
        """
        taken: list[tuple[Entry, Copy]] = []
        kept: dict[bytes, list[Entry]] = {}
        freed = 0
        while self._heap and freed < n_bytes:
            believed, _, entry = heapq.heappop(self._heap)
            copy = entry.copy_in(self._store)
            if copy is None:
                continue
            if below_ns is not None and believed >= below_ns:
                self._push(entry, copy)
                break
            if score_ns(copy) > believed:
                self._push(entry, copy)
            elif copy.users or is_needed(entry):
                kept.setdefault(entry.object_id.key, []).append(entry)
            else:
                entry.copies.remove(copy)
                taken.append((entry, copy))
                freed += copy.size_bytes
                above = entry.segment_key if entry.parent is None else entry.parent.object_id.key
                self._put_back(kept.pop(above, []))
        for entries in kept.values():
            self._put_back(entries)
        self._live -= len(taken)
        return taken

    def _put_back(self, entries: list[Entry]) -> None:
        for entry in entries:
            copy = entry.copy_in(self._store)
            if copy is not None:
                self._push(entry, copy)

    def _push(self, entry: Entry, copy: Copy) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (score_ns(copy), self._pushed, entry))
