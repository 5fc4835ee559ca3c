"""Sums over what a tier holds."""

from __future__ import annotations

from typing import Final

import attrs

from erllama_core.cache.counters import Amount
from erllama_core.cache.tiers import NamedTier
from erllama_core.cli.cache_pins import protected_objects
from erllama_core.cli.cache_survey import survey
from erllama_core.interfaces.block import Header, ObjectKind
from erllama_core.interfaces.tier import ScanFailure


@attrs.frozen(kw_only=True)
class TierStats:
    """One tier in ``erllama cache stats``, and with these keys of its JSON."""

    tier: str
    kind: str
    objects: int
    """Every object, damaged ones too."""
    size_bytes: int
    by_kind: dict[str, Amount]
    used_bytes: int
    """As the tier itself counts, after it was read."""
    quota_bytes: int | None
    pins: int
    """Pinned contexts, as far as the tier keeps a record."""
    pinned_bytes: int
    context_ends: int
    damaged: int
    """Objects whose header contradicts itself, their name or their size."""
    unknown_format: int
    scan_failures: tuple[ScanFailure, ...]


def tier_stats(named: NamedTier) -> TierStats:
    """Read all headers of a tier. Raises TierError."""
    by_kind = {kind.value: Amount() for kind in ObjectKind}
    ends = ContextEnds()
    states = {"ok": 0, "damaged": 0, "unknown_format": 0}
    failures = []
    protected = protected_objects(named)
    pinned_bytes = 0
    for found in survey(named):
        if isinstance(found, ScanFailure):
            failures.append(found)
            continue
        by_kind[found.object_id.kind.value].add(found.size_bytes)
        states[found.state] += 1
        pinned_bytes += found.size_bytes * (found.object_id in protected.objects)
        if found.header is not None:
            ends.add(found.header)
    usage = named.tier.usage()
    return TierStats(
        tier=named.name,
        kind=named.kind,
        objects=sum(amount.objects for amount in by_kind.values()),
        size_bytes=sum(amount.size_bytes for amount in by_kind.values()),
        by_kind=by_kind,
        used_bytes=usage.used_bytes,
        quota_bytes=usage.quota_bytes,
        pins=protected.pins,
        pinned_bytes=pinned_bytes,
        context_ends=ends.count(),
        damaged=states["damaged"],
        unknown_format=states["unknown_format"],
        scan_failures=tuple(failures),
    )


class ContextEnds:
    """Counts the contexts that no stored one is known to go on from.

    Aligned positions cut contexts into segments, and an object says in which it is and what
    tokens lead to its end there (``docs/format.md``). A context goes on where another path of
    the segment begins with its own, or where a segment begins at its end. State that is stored
    whole says nothing of earlier segments: there, each segment of a conversation has an end of
    its own.
    """

    def __init__(self) -> None:
        self._segments: Final[dict[bytes, dict[bytes, bytes]]] = {}
        """Per segment, by its key: the keys of the ends, by the path to them."""
        self._explicit: Final[set[bytes]] = set()

    def add(self, header: Header) -> None:
        """Take an object into account, if it holds state."""
        if header.kind not in {ObjectKind.KV, ObjectKind.SNAPSHOT}:
            return
        if header.align_tokens:
            paths = self._segments.setdefault(header.segment_key, {})
            paths[header.lead_tokens + header.tokens] = header.key
        else:
            self._explicit.add(header.key)

    def count(self) -> int:
        """How many there are among the objects so far."""
        ends = len(self._explicit)
        for paths in self._segments.values():
            ordered = sorted(paths)
            # In this order, whatever begins with a path follows it directly.
            for path, following in zip(ordered, [*ordered[1:], None], strict=True):
                goes_on = following is not None and following.startswith(path)
                ends += not goes_on and paths[path] not in self._segments
        return ends
