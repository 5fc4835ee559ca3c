"""What a cache shows of what it holds."""

from __future__ import annotations

import time
from collections.abc import Mapping

import attrs

from erllama_core.cache.catalog import Catalog
from erllama_core.cache.counters import Amount
from erllama_core.cache.index import Entry
from erllama_core.cache.tiers import TierStore
from erllama_core.errors import CacheError
from erllama_core.results import CacheKey


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
        return [row for entry in catalog.index for row in _rows(catalog, entry)]


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


def _rows(catalog: Catalog, entry: Entry) -> list[Row]:
    def row(
        tier: str,
        size: int,
        used_ns: int,
        users: int,
        status: str,
        hits: int,
        pinned: bool,
        why: str,
        where: str,
    ) -> Row:
        return Row(
            kind=entry.object_id.kind.value,
            key=CacheKey(entry.object_id.key),
            tier=tier,
            start=entry.start,
            end=entry.end,
            size_bytes=size,
            last_used_ns=used_ns,
            refcount=users,
            status=status,
            hits=hits,
            pinned=pinned,
            save_reason=why,
            location=where,
        )

    if not entry.copies and entry.pages is not None:
        size = len(entry.pages.view)
        return [row("", size, time.time_ns(), 1, "writing", 0, False, "", "a save buffer")]
    return [
        row(
            copy.tier.name,
            copy.size_bytes,
            copy.last_used_ns,
            copy.users,
            "stored",
            copy.hits,
            catalog.pins[copy.tier].protects(entry),
            copy.save_reason,
            copy.tier.tier.location(entry.object_id),
        )
        for copy in entry.copies
    ]
