"""Which objects leave a tier first."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

import attrs

from erllama_core.cache.counters import Amount
from erllama_core.cache.entry import Copy, Entry
from erllama_core.cache.index import Index
from erllama_core.cache.tiers import TierStore
from erllama_core.interfaces.block import ObjectKind

HIT_WEIGHT_S: Final = 60.0
"""Seconds of recency that a doubling of an object's hits is worth.

On the public serving trace of Kimi (Mooncake, FAST '25) 60 to 300 does best in small tiers.
60 is never worse than plain LRU; from 90 on it is at 100,000 blocks, by less than 0.0001.
"""

ORPHAN_GRACE_S: Final = 600.0
"""How long an object whose ancestors are gone keeps its rank.

What was lost is computed and stored again by the next request of its context, which comes
within minutes or, mostly, not at all; and then the object is of use again.
"""

_GRACE_NS: Final = int(ORPHAN_GRACE_S * 1e9)
_SLACK: Final = 1000

_Item = tuple[int, int, Entry]
"""Score, ticket, object."""


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


@attrs.frozen
class Victim:
    """What is to leave a tier next."""

    entry: Entry
    copy: Copy
    orphan_since_ns: int | None = None
    """Since when it could not be found, if that is why it goes."""


class EvictionQueue:
    """The objects of one tier, least worth first. The cache's lock guards it.

    First go orphans whose grace is over, from the beginning of what they are a piece of; then
    the leaf of the lowest score, so that a context is taken from its end; pinned leaves only
    for who says so. What is in use, or what others in the tier stand on, is in no heap:
    it is offered again when the last use ends, or the last of those has left. So a victim
    costs the same however many objects cannot go.

    Marks have a heap of their own. They take part like all others, and besides can be asked to
    make room for one another.

    Scores are static: a use makes an object's place in its heap out of date, which is seen when
    its turn comes.
    """

    def __init__(self, store: TierStore, index: Index, is_pinned: Callable[[Entry], bool]) -> None:
        self._store: Final = store
        self._index: Final = index
        self._is_pinned: Final = is_pinned
        self._leaves: list[_Item] = []
        self._marks: list[_Item] = []
        self._pinned: list[_Item] = []
        self._orphans: OrderedDict[Entry, int] = OrderedDict()
        """Since when, the oldest first; those that are none any longer stay until their turn."""
        self._many_orphans = _SLACK
        self._pushed = 0
        self._live = 0
        """Objects in the tier; the heaps also hold some that have left it."""
        self.amounts: Final = {kind: Amount() for kind in ObjectKind}
        """What the tier holds of each kind."""

    # ----------------------------------------------------------- coming and going

    def add(self, entry: Entry, copy: Copy, now_ns: int) -> None:
        """The tier has a new object."""
        self._live += 1
        self.amounts[entry.object_id.kind].add(copy.size_bytes)
        self.offer(entry)
        if self._index.is_orphan(entry):
            self.orphaned(entry, now_ns)

    def discount(self, entry: Entry, copy: Copy) -> None:
        """An object has left the tier."""
        self._live -= 1
        self.amounts[entry.object_id.kind].subtract(copy.size_bytes)

    def offer(self, entry: Entry) -> None:
        """Nothing in the tier stands on this object any more, or its last use is over."""
        copy = entry.copy_in(self._store)
        if copy is not None and not (copy.ticket or copy.users or copy.needed):
            self._push(entry, copy)

    def rank_anew(self, entry: Entry) -> None:
        """The object has been pinned, or is not any longer."""
        copy = entry.copy_in(self._store)
        if copy is not None:
            copy.ticket = 0
            self.offer(entry)

    def orphaned(self, entry: Entry, now_ns: int, since_ns: int | None = None) -> None:
        """What this object stands on is nowhere; ``since_ns`` if that made no difference."""
        self._orphans[entry] = now_ns if since_ns is None else since_ns
        self._orphans.move_to_end(entry, last=since_ns is None)
        if len(self._orphans) > self._many_orphans:
            for other in [other for other in self._orphans if not self._is_lost(other)]:
                del self._orphans[other]
            self._many_orphans = 2 * len(self._orphans) + _SLACK

    # ------------------------------------------------------------------- choosing

    def next(
        self, now_ns: int, *, pinned: bool = False, below_ns: int | None = None
    ) -> Victim | None:
        """What is worth least; ``pinned``: of what is pinned if there is nothing else.

        With ``below_ns`` only what has a lower score, or is an orphan whose grace is over.
        """
        orphan = self._next_orphan(now_ns)
        if orphan is not None:
            return orphan
        heads = [heap for heap in (self._leaves, self._marks) if self._settle(heap, False)]
        if heads:
            return self._take(min(heads, key=lambda heap: heap[0][:2]), below_ns)
        if pinned and self._settle(self._pinned, True):
            return self._take(self._pinned, below_ns)
        return None

    def next_mark(self, below_ns: int | None = None) -> Victim | None:
        """The mark that is worth least and may go."""
        return self._take(self._marks, below_ns) if self._settle(self._marks, False) else None

    def _next_orphan(self, now_ns: int) -> Victim | None:
        while self._orphans:
            entry, since_ns = next(iter(self._orphans.items()))
            if since_ns > now_ns - _GRACE_NS:
                return None
            del self._orphans[entry]
            copy = entry.copy_in(self._store)
            if copy is None or not self._index.is_orphan(entry):
                continue
            if not (copy.users or self._is_pinned(entry)):
                return Victim(entry, copy, since_ns)
            self.orphaned(entry, now_ns)
        return None

    def _is_lost(self, entry: Entry) -> bool:
        return entry.copy_in(self._store) is not None and self._index.is_orphan(entry)

    def _settle(self, heap: list[_Item], pinned: bool) -> bool:
        """Bring what may go and is worth least to the head; False when there is nothing."""
        while heap:
            believed, ticket, entry = heap[0]
            copy = entry.copy_in(self._store)
            current = copy is not None and copy.ticket == ticket
            if (
                copy is not None
                and current
                and not (copy.users or copy.needed)
                and score_ns(copy) <= believed
                and self._is_pinned(entry) is pinned
            ):
                return True
            heapq.heappop(heap)
            if copy is not None and current:
                copy.ticket = 0
                self.offer(entry)
        return False

    def _take(self, heap: list[_Item], below_ns: int | None) -> Victim | None:
        score, _, entry = heap[0]
        if below_ns is not None and score >= below_ns:
            return None
        heapq.heappop(heap)
        copy = entry.copy_in(self._store)
        assert copy is not None
        copy.ticket = 0
        return Victim(entry, copy)

    def _push(self, entry: Entry, copy: Copy) -> None:
        self._pushed += 1
        copy.ticket = self._pushed
        heapq.heappush(self._heap_of(entry), (score_ns(copy), self._pushed, entry))
        heaps = self._leaves, self._marks, self._pinned
        if sum(map(len, heaps)) > 2 * self._live + _SLACK:
            for heap in heaps:
                heap[:] = [item for item in heap if self._is_current(item)]
                heapq.heapify(heap)

    def _heap_of(self, entry: Entry) -> list[_Item]:
        if self._is_pinned(entry):
            return self._pinned
        return self._marks if entry.object_id.kind is ObjectKind.LOGITS else self._leaves

    def _is_current(self, item: _Item) -> bool:
        copy = item[2].copy_in(self._store)
        return copy is not None and copy.ticket == item[1]
