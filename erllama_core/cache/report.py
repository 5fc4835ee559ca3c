"""What a cache shows of what it holds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Final

import attrs

from erllama_core.cache.catalog import Catalog
from erllama_core.cache.counters import Amount
from erllama_core.cache.entry import Entry
from erllama_core.cache.tiers import TierStore
from erllama_core.errors import CacheError
from erllama_core.interfaces.block import ObjectId
from erllama_core.results import CacheKey

_AT_ONCE: Final = 256
"""Objects that are looked at in one hold of the lock."""


@attrs.frozen(kw_only=True)
class Row:
    """A stored object as :meth:`Cache.dump` shows it."""

    kind: str
    key: CacheKey
    tier: str
    """Empty while the object is only in a save buffer."""
    start: int
    end: int
    size_bytes: int
    last_used_ns: int
    refcount: int
    status: str
    """``stored``, or ``writing``."""
    hits: int
    pinned: bool
    save_reason: str
    location: str


@attrs.frozen(kw_only=True)
class Usage:
    """How full a tier is, and of what, as :meth:`Cache.usage` shows it."""

    tier: str
    quota_bytes: int | None
    """None: bounded only by the device."""
    used_bytes: int
    """As the tier counts."""
    by_kind: Mapping[str, Amount]
    """What is known of it: ``kv``, ``snapshot``, ``logits`` (the marks), ``replay``."""
    pinned_bytes: int


def rows_of(catalog: Catalog) -> list[Row]:
    """Every known object, one row per tier that has it, and those being written."""
    with catalog.lock:
        entries = list(catalog.index)
    rows: list[Row] = []
    for first in range(0, len(entries), _AT_ONCE):
        # Requests need the lock too, so it is held for some objects at a time.
        with catalog.lock:
            seen = [one for e in entries[first : first + _AT_ONCE] for one in _rows(catalog, e)]
        rows += [row(location=_location(store, object_id)) for row, store, object_id in seen]
    return rows


def usage_of(catalog: Catalog, store: TierStore) -> Usage:
    """How full a tier is; as far as is known here while it does not answer."""
    with catalog.lock:
        amounts = catalog.queues[store].amounts
        by_kind = {kind.value: attrs.evolve(amount) for kind, amount in amounts.items()}
        pinned_bytes = catalog.pins[store].size_bytes
    used, quota = sum(amount.size_bytes for amount in by_kind.values()), None
    try:
        usage = store.usage()
        used, quota = usage.used_bytes, usage.quota_bytes
    except CacheError:
        pass  # counted and logged
    return Usage(
        tier=store.name,
        quota_bytes=quota,
        used_bytes=used,
        by_kind=by_kind,
        pinned_bytes=pinned_bytes,
    )


def _rows(
    catalog: Catalog, entry: Entry
) -> list[tuple[Callable[..., Row], TierStore | None, ObjectId]]:
    """Rows that lack their location, and whose that is. Under the lock."""
    row = functools.partial(
        Row,
        kind=entry.object_id.kind.value,
        key=CacheKey(entry.object_id.key),
        start=entry.start,
        end=entry.end,
    )
    if not entry.copies and entry.pages is not None:
        writing = functools.partial(
            row,
            tier="",
            size_bytes=len(entry.pages.view),
            last_used_ns=time.time_ns(),
            refcount=1,
            status="writing",
            hits=0,
            pinned=False,
            save_reason="",
        )
        return [(writing, None, entry.object_id)]
    return [
        (
            functools.partial(
                row,
                tier=copy.tier.name,
                size_bytes=copy.size_bytes,
                last_used_ns=copy.last_used_ns,
                refcount=copy.users,
                status="stored",
                hits=copy.hits,
                pinned=catalog.pins[copy.tier].protects(entry),
                save_reason=copy.save_reason,
            ),
            copy.tier,
            entry.object_id,
        )
        for copy in entry.copies
    ]


def _location(store: TierStore | None, object_id: ObjectId) -> str:
    return "a save buffer" if store is None else store.tier.location(object_id)
