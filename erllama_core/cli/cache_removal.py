"""Taking objects out of tiers, in the order in which a running engine would."""

from __future__ import annotations

import attrs

from erllama_core.cache.cache import Cache
from erllama_core.cache.tiers import NamedTier
from erllama_core.cli.cache_source import Source
from erllama_core.cli.cache_survey import survey
from erllama_core.interfaces.tier import ScanFailure


@attrs.frozen(kw_only=True)
class Removal:
    """What ``erllama cache gc`` and ``evict`` did, and with these keys their JSON."""

    asked_bytes: int | None
    """None: everything."""
    removed: int
    removed_bytes: int
    damaged: int
    """Objects with damaged headers, which go first; not among ``removed``."""
    left: int
    """Objects that were found and are still there."""
    pinned: int
    """Of these, those that pins protect."""
    failures: int
    """Operations that a tier refused; warnings say why."""

    @property
    def ok(self) -> bool:
        """Whether what was asked for was done."""
        if self.asked_bytes is None:
            return self.left == self.pinned and not self.failures
        return self.removed_bytes >= self.asked_bytes


@attrs.frozen
class Held:
    """What a tier holds, whatever state it is in."""

    objects: int
    size_bytes: int


def held(named: NamedTier) -> Held:
    """Count the objects of a tier. Raises TierError."""
    sizes = [found.size_bytes for found in survey(named) if not isinstance(found, ScanFailure)]
    return Held(len(sizes), sum(sizes))


def remove(source: Source, names: list[str], n_bytes: int | None) -> Removal:
    """Free at least ``n_bytes``, or everything, from the tiers of these names; pins hold.

    A tier that holds nothing is better left out: opening one for writing may make its folders.
    Raises TierError when one cannot be opened for writing.
    """
    with source.opened_to_change(names) as tiers, Cache(tiers, upkeep=False) as cache:
        cache.wait_scanned()
        evicted = cache.gc() if n_bytes is None else cache.evict_bytes(n_bytes)
        counters = cache.counters()
        left = cache.dump()
        return Removal(
            asked_bytes=n_bytes,
            removed=evicted.rows,
            removed_bytes=evicted.bytes,
            damaged=counters.corrupt,
            left=len(left),
            pinned=sum(row.pinned for row in left),
            failures=counters.tier_errors,
        )
