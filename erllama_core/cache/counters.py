"""What the cache counts; one lock, never held while anything else is done."""

from __future__ import annotations

import threading
from typing import Literal

import attrs

SaveReason = Literal["cold", "continued", "finish", "evict", "shutdown"]


@attrs.define
class Amount:
    """A number of objects and the bytes that they take."""

    objects: int = 0
    size_bytes: int = 0

    def add(self, size_bytes: int) -> None:
        """Count one object."""
        self.objects += 1
        self.size_bytes += size_bytes

    def subtract(self, size_bytes: int) -> None:
        """Count one object less."""
        self.objects -= 1
        self.size_bytes -= size_bytes


@attrs.frozen(kw_only=True)
class Counters:
    """A copy of the counters at one moment. Durations are totals in nanoseconds."""

    hits_exact: int = 0
    """Look-ups that found all they asked for; loads that found their object."""
    hits_longest_prefix: int = 0
    """Look-ups that found a part."""
    hits_resume: int = 0
    """Look-ups that went on from the context that ``parent_key`` names."""
    misses: int = 0
    saves_cold: int = 0
    """Objects handed over for writing, by the reason of the save."""
    saves_continued: int = 0
    saves_finish: int = 0
    saves_evict: int = 0
    saves_shutdown: int = 0
    saves_dropped: int = 0
    """Objects that no tier took: too many bytes on their way, no room, or trouble."""
    saves_over_budget: int = 0
    """Of these, the ones for which ``memory_budget_bytes`` had no room."""
    promotions: int = 0
    """Objects read from one tier that are kept in a nearer one as well."""
    demotions: int = 0
    """Objects that were handed to the tier below when they were evicted from one."""
    evictions: int = 0
    thinned: int = 0
    """Snapshots that were removed since others of their context do as well."""
    corrupt: int = 0
    """Objects that were not what they claimed to be; they were dropped."""
    tier_errors: int = 0
    """Failed tier operations."""
    reads_given_up: int = 0
    """Loads that took longer than ``read_timeout_ms``; the prompt was computed instead."""
    loads_over_budget: int = 0
    """Objects that were not read because ``memory_budget_bytes`` had no room for them; the prompt
    was computed instead."""
    state_rejected: int = 0
    """Restores that the backend refused."""
    gated: int = 0
    """Requests for which stored state was computed again, as that was expected to be sooner."""
    lookup_ns: int = 0
    load_ns: int = 0
    """From the first read to the last checksum, of loads that read from a tier."""
    pack_ns: int = 0
    """Copying state out of a context."""
    tier_hits: dict[str, int] = attrs.field(factory=dict)
    """Objects taken from each tier."""
    tier_drops: dict[str, int] = attrs.field(factory=dict)
    """Objects that each tier did not take, whether or not another one did."""
    bytes_written: int = 0
    bytes_read: int = 0


_NAMES = {field.name for field in attrs.fields(Counters)} - {"tier_hits", "tier_drops"}


class CounterSet:
    """The live counters; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = dict.fromkeys(_NAMES, 0)
        self._tier_hits: dict[str, int] = {}
        self._tier_drops: dict[str, int] = {}

    def add(self, name: str, amount: int = 1) -> None:
        """Count. ``name`` is a field of :class:`Counters`."""
        with self._lock:
            self._values[name] += amount

    def hit_tier(self, name: str) -> None:
        with self._lock:
            self._tier_hits[name] = self._tier_hits.get(name, 0) + 1

    def drop_in_tier(self, name: str) -> None:
        with self._lock:
            self._tier_drops[name] = self._tier_drops.get(name, 0) + 1

    def snapshot(self) -> Counters:
        with self._lock:
            return Counters(
                tier_hits=dict(self._tier_hits),
                tier_drops=dict(self._tier_drops),
                **self._values,
            )
