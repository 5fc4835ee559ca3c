"""What is stored, by content: a radix tree cut into segments.

Aligned positions (multiples of ``align_tokens``) cut every context into segments, and no kv
block crosses one. A segment is found by the key of its start, one dictionary look-up; within
it, blocks are sorted by their *path*, the tokens from the segment's start to the block's end.
The block that shares most with a prompt is then next to the place where the prompt itself
would stand, however many blocks begin alike. A block that starts inside a segment hangs on
the block in which its start lies; while that one is missing it is an orphan, which no look-up
sees, and it is attached again when any block with the same tokens comes.

One lock, held for microseconds, is in the cache that owns the index; nothing here locks.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from erllama_core.cache.keys import common_tokens
from erllama_core.interfaces.block import TOKEN_BYTES, ObjectId, ObjectKind
from erllama_core.interfaces.tier import Pages

if TYPE_CHECKING:
    from erllama_core.cache.tiers import TierStore


class Copy:
    """One tier's copy of an object."""

    __slots__ = (
        "hits",
        "last_used_ns",
        "rests_until_s",
        "save_reason",
        "size_bytes",
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
        self.rests_until_s = 0.0
        """After a failed read, on the monotonic clock: it is there, but not to be had now."""


class Entry:
    """A stored object, or one on its way to be stored."""

    __slots__ = (
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
    ) -> None:
        self.object_id: Final = object_id
        self.end: Final = end
        self.namespace: Final = namespace
        self.segment_key: Final = segment_key
        self.lead = lead
        self.tokens: Final = tokens
        self.copies: list[Copy] = []
        self.pages: Pages | None = None
        """The payload while it waits to be written."""
        self.writing: tuple[TierStore, ...] = ()
        """Tiers that it waits to be written to."""
        self.refusals = 0
        """How often a backend refused it."""
        self.parent: Entry | None = None
        self.children: list[Entry] = []

    @property
    def start(self) -> int:
        return self.object_id.start

    @property
    def path(self) -> bytes:
        """Tokens from the segment's start to the end of this object."""
        return self.lead + self.tokens if self.lead else self.tokens

    @property
    def path_start(self) -> int:
        """Position of the segment's start."""
        return self.start - len(self.lead) // TOKEN_BYTES

    def copy_in(self, tier: TierStore) -> Copy | None:
        for copy in self.copies:
            if copy.tier is tier:
                return copy
        return None


def _path(entry: Entry) -> bytes:
    return entry.path


class Segment:
    """The objects between two aligned positions of all contexts that begin alike."""

    __slots__ = ("blocks", "orphans", "snapshots")

    def __init__(self) -> None:
        self.blocks: list[Entry] = []
        """Attached kv blocks, sorted by path."""
        self.orphans: list[Entry] = []
        self.snapshots: list[Entry] = []
        """Sorted by path."""

    @property
    def is_empty(self) -> bool:
        return not (self.blocks or self.orphans or self.snapshots)

    def nearest_block(self, tokens: bytes) -> tuple[Entry, int] | None:
        """The block that shares most with ``tokens`` from the segment's start, and how much.

        None when nothing shares a token.
        """
        blocks = self.blocks
        at = bisect.bisect_left(blocks, tokens, key=_path)
        best: Entry | None = None
        shared = 0
        for entry in blocks[max(0, at - 1) : at + 1]:
            common = common_tokens(entry.path, tokens)
            if common > shared:
                best, shared = entry, common
        return None if best is None else (best, shared)

    def nearest_snapshot(self, tokens: bytes) -> Iterator[Entry]:
        """Snapshots at positions along ``tokens``, the last position first."""
        limit = tokens
        while limit:
            at = bisect.bisect_right(self.snapshots, limit, key=_path)
            if not at:
                return
            entry = self.snapshots[at - 1]
            shared = common_tokens(entry.path, limit) * TOKEN_BYTES
            if shared == len(entry.path):
                yield entry
                shared -= TOKEN_BYTES
            limit = limit[:shared]


class Index:
    """Every known object, by name and by place. Not thread-safe: its owner locks."""

    def __init__(self) -> None:
        self._objects: dict[ObjectId, Entry] = {}
        self._segments: dict[bytes, Segment] = {}

    def __len__(self) -> int:
        return len(self._objects)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._objects.values())

    def get(self, object_id: ObjectId) -> Entry | None:
        return self._objects.get(object_id)

    def segment(self, key: bytes) -> Segment | None:
        return self._segments.get(key)

    def add(self, entry: Entry) -> Entry:
        """Add an object, or find the one of the same name that is there already."""
        known = self._objects.get(entry.object_id)
        if known is not None:
            return known
        self._objects[entry.object_id] = entry
        if entry.object_id.kind is ObjectKind.KV and entry.segment_key:
            segment = self._segment(entry.segment_key)
            if self._attach(segment, entry):
                self._adopt_orphans(segment)
            else:
                segment.orphans.append(entry)
        elif entry.object_id.kind is ObjectKind.SNAPSHOT and entry.segment_key:
            bisect.insort(self._segment(entry.segment_key).snapshots, entry, key=_path)
        return entry

    def remove(self, entry: Entry) -> None:
        """Forget an object; blocks that hang on it become orphans, or find another block."""
        if self._objects.get(entry.object_id) is not entry:
            return
        del self._objects[entry.object_id]
        segment = self._segments.get(entry.segment_key)
        if segment is None:
            return
        if entry.object_id.kind is ObjectKind.SNAPSHOT:
            _remove_sorted(segment.snapshots, entry)
        elif entry in segment.orphans:
            segment.orphans.remove(entry)
        elif entry.object_id.kind is ObjectKind.KV:
            segment.orphans.extend(self._detach(segment, entry))
            self._adopt_orphans(segment)
        if segment.is_empty:
            del self._segments[entry.segment_key]

    def has_dependants(self, entry: Entry, tier: TierStore) -> bool:
        """Whether ``tier`` has blocks that are of no use without this one."""
        if any(_is_in(child, tier) for child in entry.children):
            return True
        if entry.object_id.kind is not ObjectKind.KV:
            return False
        following = self._segments.get(entry.object_id.key)
        return following is not None and any(
            not block.lead and _is_in(block, tier) for block in following.blocks
        )

    # ------------------------------------------------------------ attachment

    def _segment(self, key: bytes) -> Segment:
        segment = self._segments.get(key)
        if segment is None:
            segment = self._segments[key] = Segment()
        return segment

    def _attach(self, segment: Segment, entry: Entry) -> bool:
        if entry.lead:
            parent = _holder(segment, entry.lead)
            if parent is None:
                return False
            entry.parent = parent
            # Contexts that branch at one point share these bytes.
            entry.lead = next((c.lead for c in parent.children if c.lead == entry.lead), entry.lead)
            parent.children.append(entry)
        bisect.insort(segment.blocks, entry, key=_path)
        return True

    def _adopt_orphans(self, segment: Segment) -> None:
        attached = True
        while attached and segment.orphans:
            attached = False
            for orphan in list(segment.orphans):
                if self._attach(segment, orphan):
                    segment.orphans.remove(orphan)
                    attached = True

    def clear(self) -> None:
        """Forget everything."""
        self._objects.clear()
        self._segments.clear()

    def _detach(self, segment: Segment, entry: Entry) -> list[Entry]:
        """Take a block and all that hang on it out of the tree; those that hung on it."""
        loose: list[Entry] = []
        waiting = [entry]
        while waiting:
            block = waiting.pop()
            _remove_sorted(segment.blocks, block)
            if block.parent is not None and block is entry:
                block.parent.children.remove(block)
            block.parent = None
            waiting += block.children
            loose += block.children
            block.children = []
        return loose


def _is_in(entry: Entry, tier: TierStore) -> bool:
    """Whether a tier has the object, or will have it as soon as it is written."""
    return entry.copy_in(tier) is not None or tier in entry.writing


def _holder(segment: Segment, lead: bytes) -> Entry | None:
    """An attached block in which the run ``lead`` of the segment ends."""
    blocks = segment.blocks
    at = bisect.bisect_left(blocks, lead, key=_path)
    if at == len(blocks) or not blocks[at].path.startswith(lead):
        return None
    entry = blocks[at]
    while len(entry.lead) >= len(lead) and entry.parent is not None:
        entry = entry.parent
    return entry


def _remove_sorted(entries: list[Entry], entry: Entry) -> None:
    at = bisect.bisect_left(entries, entry.path, key=_path)
    while entries[at] is not entry:
        at += 1
    del entries[at]
