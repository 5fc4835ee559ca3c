"""Which snapshots along one context are kept, when all of them would take too much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import attrs

from erllama_core.cache.catalog import Catalog
from erllama_core.cache.entry import Copy, Entry
from erllama_core.cache.tiers import TierStore
from erllama_core.interfaces.block import ObjectId, ObjectKind

KEPT_ENDS: Final = 3
"""The last ones along a context are kept in any case: where a turn opened its reply, where its
prompt ended, and where its reply did."""
_NEAR: Final = 64
"""Tokens from either end of a context within which one position is as good as another."""
_HEADER_BYTES: Final = 512
"""Of an object without its tokens, about; it is known exactly once it is written."""


@attrs.frozen
class Held:
    """A snapshot in a tier, with the logits beside it if there are any."""

    position: int
    size_bytes: int
    hits: int
    may_go: bool


def superfluous(held: Sequence[Held], end: int, most_bytes: int) -> list[int]:
    """Numbers of the snapshots to remove until what is left takes ``most_bytes``.

    ``held`` ascends by position, ``end`` is the context's length. Without a snapshot, whoever
    would have gone on from it goes on from the one before, and computes what lies between. Others
    are likely to leave a context shortly after its beginning, which many share, or to go on
    shortly before its end; so gaps are let grow in the middle.
    """
    left = list(range(len(held)))
    total = sum(item.size_bytes for item in held)
    gone: list[int] = []
    while total > most_bytes:
        best: int | None = None
        least = math.inf
        for place, number in enumerate(left[:-KEPT_ENDS]):
            if held[number].may_go:
                before = held[left[place - 1]].position if place else 0
                worth = _worth(held[number], before, end)
                if worth < least:
                    best, least = place, worth
        if best is None:
            break
        number = left.pop(best)
        gone.append(number)
        total -= held[number].size_bytes
    return gone


def _worth(item: Held, before: int, end: int) -> float:
    likely = 1 / (item.position + _NEAR) + 1 / (max(0, end - item.position) + _NEAR)
    return (item.position - before) * likely * (1 + math.log2(1 + item.hits))


def thin(
    catalog: Catalog, store: TierStore, snapshots: Sequence[Entry], end: int, most_bytes: int
) -> list[tuple[Entry, Copy]]:
    """Forget what is superfluous in a tier of the snapshots along a context, which ascend.

    With each goes the mark at its position. What is pinned, in use or on its way to the tier
    stays. Under the lock; the caller has what was forgotten deleted.
    """
    there = [parts for entry in snapshots if (parts := _beside(catalog, store, entry))]
    gone = superfluous([_held(catalog, store, parts) for parts in there], end, most_bytes)
    forgotten = []
    for number in gone:
        for entry in there[number]:
            copy = entry.copy_in(store)
            assert copy is not None
            catalog.forget_copy(store, entry)
            forgotten.append((entry, copy))
    if gone:
        catalog.counters.add("thinned", len(gone))
    return forgotten


def _beside(catalog: Catalog, store: TierStore, snapshot: Entry) -> list[Entry]:
    """What a tier has, or will have, at a snapshot's position; empty without the snapshot."""
    mark = catalog.index.get(ObjectId(ObjectKind.LOGITS, snapshot.end, snapshot.object_id.key))
    here = [
        entry
        for entry in (snapshot, mark)
        if entry is not None and (store in entry.writing or entry.copy_in(store) is not None)
    ]
    return here if snapshot in here else []


def _held(catalog: Catalog, store: TierStore, parts: Sequence[Entry]) -> Held:
    size_bytes = hits = 0
    may_go = True
    for entry in parts:
        copy = entry.copy_in(store)
        if copy is None:  # on its way
            payload = 0 if entry.pages is None else len(entry.pages.view)
            size_bytes += payload + len(entry.lead) + _HEADER_BYTES
        else:
            size_bytes += copy.size_bytes
            hits = max(hits, copy.hits)
        is_used = copy is None or copy.users > 0 or bool(entry.writing)
        may_go = may_go and not is_used and not catalog.pins[store].protects(entry)
    return Held(parts[0].end, size_bytes, hits, may_go)
