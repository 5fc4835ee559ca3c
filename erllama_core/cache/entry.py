"""A stored object and its copies in tiers, as the index knows them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from erllama_core.interfaces.block import ObjectId
from erllama_core.interfaces.tier import Pages

if TYPE_CHECKING:
    from erllama_core.cache.tiers import TierStore


class Copy:
    """One tier's copy of an object."""

    __slots__ = (
        "hits",
        "last_used_ns",
        "needed",
        "rests_until_s",
        "save_reason",
        "size_bytes",
        "ticket",
        "tier",
        "users",
    )

    def __init__(
        self, tier: TierStore, size_bytes: int, last_used_ns: int, save_reason: str
    ) -> None:
        self.tier: Final = tier
        self.size_bytes: Final = size_bytes
        self.last_used_ns = last_used_ns
        self.save_reason: Final = save_reason
        self.hits = 0
        self.users = 0
        """Reads going on; a copy in use is not evicted."""
        self.needed = 0
        """Objects in the same tier that stand on this one; the index counts."""
        self.ticket = 0
        """Its place in the eviction queue; 0 while it has none."""
        self.rests_until_s = 0.0
        """After a failed read, on the monotonic clock: it is there, but not to be had now."""

    @property
    def is_resting(self) -> bool:
        """Whether it is left alone for now, or its whole tier is."""
        return max(self.rests_until_s, self.tier.rests_until_s) > time.monotonic()


class Entry:
    """A stored object, or one on its way to be stored."""

    __slots__ = (
        "anchors",
        "children",
        "copies",
        "end",
        "lead",
        "namespace",
        "object_id",
        "pages",
        "parent",
        "refusals",
        "segment_key",
        "tokens",
        "writing",
    )

    def __init__(
        self,
        object_id: ObjectId,
        end: int,
        namespace: bytes,
        segment_key: bytes,
        lead: bytes,
        tokens: bytes,
        anchors: bytes = b"",
    ) -> None:
        self.object_id: Final = object_id
        self.end = end
        self.namespace = namespace
        self.segment_key = segment_key
        self.lead = lead
        self.tokens: Final = tokens
        self.anchors: Final = anchors
        """Digests of the text up to positions in this object; see ``anchors``."""
        self.copies: list[Copy] = []
        self.pages: Pages | None = None
        """The payload while it waits to be written."""
        self.writing: tuple[TierStore, ...] = ()
        """Tiers that it waits to be written to."""
        self.refusals = 0
        """How often a backend refused it."""
        self.parent: Entry | None = None
        self.children: dict[Entry, None] | None = None
        """What starts inside this block or at its end: blocks, snapshots, marks."""

    @property
    def start(self) -> int:
        return self.object_id.start

    @property
    def path(self) -> bytes:
        """Tokens from the segment's start to the end of this object."""
        return self.lead + self.tokens if self.lead else self.tokens

    def copy_in(self, tier: TierStore) -> Copy | None:
        for copy in self.copies:
            if copy.tier is tier:
                return copy
        return None

    def copies_along(self, tiers: Iterable[TierStore]) -> Iterator[Copy]:
        """The copies to be had now, in the order of ``tiers``."""
        for tier in tiers:
            copy = self.copy_in(tier)
            if copy is not None and not copy.is_resting:
                yield copy
