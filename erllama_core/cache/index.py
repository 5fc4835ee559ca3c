"""What is stored, by content: a radix tree cut into segments.

Aligned positions (multiples of ``align_tokens``) cut every context into segments, and no kv
block crosses one. A segment is found by the key of its start, one dictionary look-up; within
it, blocks are sorted by their *path*, the tokens from the segment's start to the block's end.
The block that shares most with a prompt is then next to the place where the prompt itself
would stand, however many blocks begin alike. A block that starts inside a segment hangs on
the block in which its start lies; while that one is missing it is an orphan, which no look-up
sees, and it is attached again when any block with the same tokens comes.

Most objects are whole blocks in a row, so what only other places need is made when they need
it: a segment of one block is that block, and a key is kept once, by the block that ends there
and by what follows it.

One lock, held for microseconds, is in the cache that owns the index; nothing here locks.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from erllama_core.cache.anchors import split_anchors
from erllama_core.cache.keys import common_tokens
from erllama_core.interfaces.block import TOKEN_BYTES, ObjectId, ObjectKind
from erllama_core.interfaces.tier import Pages

if TYPE_CHECKING:
    from erllama_core.cache.tiers import TierStore


_MAX_NAMESPACES: Final = 1024
"""Namespaces that are remembered; every salt makes one."""

_MAX_SPELLINGS: Final = 8
"""Objects that one text anchor leads to: those that came last."""


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
        """Blocks that start inside this one, in the order in which they came."""

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
            if copy is not None and copy.rests_until_s <= time.monotonic():
                yield copy


def _path(entry: Entry) -> bytes:
    return entry.path


class Segment:
    """The objects between two aligned positions of all contexts that begin alike."""

    __slots__ = ("blocks", "orphans", "snapshots")

    def __init__(self, *blocks: Entry) -> None:
        self.blocks: list[Entry] = list(blocks)
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
        self._ending: dict[bytes, Entry | tuple[Entry, ...]] = {}
        """By key(end): what ends there, which is mostly one object."""
        self._segments: dict[bytes, Segment | Entry] = {}
        """By key(start). A block stands for a segment of which it is all."""
        self._namespaces: dict[bytes, bytes] = {}
        """Those of late, so that their objects share them."""
        self._anchored: dict[bytes, Entry | tuple[Entry, ...]] = {}
        """By text anchor."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Entry]:
        for known in self._ending.values():
            yield from _each(known)

    def get(self, object_id: ObjectId) -> Entry | None:
        for entry in _each(self._ending.get(object_id.key, ())):
            if entry.object_id == object_id:
                return entry
        return None

    def anchored(self, anchor: bytes) -> tuple[Entry, ...]:
        """The objects in which a context stands that may read as the anchor says."""
        return _each(self._anchored.get(anchor, ()))

    def context_of(self, entry: Entry) -> bytes | None:
        """The packed tokens of the context that ends where ``entry`` does.

        None when a part of it is not known, or more than one is said to be.
        """
        paths = [entry.path]
        while entry.end > len(paths[-1]) // TOKEN_BYTES:
            position = entry.end - len(paths[-1]) // TOKEN_BYTES
            before = [
                known
                for known in _each(self._ending.get(entry.segment_key, ()))
                if known.object_id.kind is ObjectKind.KV and known.start < known.end == position
            ]
            if not before:
                return None
            entry = before[0]
            paths.append(entry.path)
        return b"".join(reversed(paths))

    def segment(self, key: bytes) -> Segment | None:
        """The segment that starts at ``key``, to be read only."""
        known = self._segments.get(key)
        return Segment(known) if isinstance(known, Entry) else known

    def add(self, entry: Entry) -> Entry:
        """Add an object, or find the one of the same name that is there already."""
        key = entry.object_id.key
        ending = _each(self._ending.get(key, ()))
        for known in ending:
            if known.object_id == entry.object_id:
                return known
        self._ending[key] = (*ending, entry) if ending else entry
        self._count += 1
        if not entry.segment_key:
            return entry
        for anchor in split_anchors(entry.anchors):
            others = self.anchored(anchor)[1 - _MAX_SPELLINGS :]
            self._anchored[anchor] = (*others, entry) if others else entry
        self._share_bytes(entry)
        if entry.object_id.kind is ObjectKind.KV:
            if not entry.lead and entry.segment_key not in self._segments:
                self._segments[entry.segment_key] = entry
                return entry
            segment = self._segment(entry.segment_key)
            if self._attach(segment, entry):
                self._adopt_orphans(segment)
            else:
                segment.orphans.append(entry)
        elif entry.object_id.kind is ObjectKind.SNAPSHOT:
            bisect.insort(self._segment(entry.segment_key).snapshots, entry, key=_path)
        return entry

    def remove(self, entry: Entry) -> None:
        """Forget an object; blocks that hang on it become orphans, or find another block."""
        key = entry.object_id.key
        ending = _each(self._ending.get(key, ()))
        left = tuple(known for known in ending if known is not entry)
        if len(left) == len(ending):
            return
        self._count -= 1
        if left:
            self._ending[key] = left[0] if len(left) == 1 else left
        else:
            del self._ending[key]
        self._drop_anchors(entry)
        segment = self._segments.get(entry.segment_key)
        if segment is None:
            return
        if segment is entry:
            del self._segments[entry.segment_key]
            return
        if isinstance(segment, Entry):
            return  # what is removed is a mark beside a lone block
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
        if any(_is_in(child, tier) for child in entry.children or ()):
            return True
        if entry.object_id.kind is not ObjectKind.KV:
            return False
        following = self._segments.get(entry.object_id.key)
        if following is None:
            return False
        blocks = (following,) if isinstance(following, Entry) else following.blocks
        return any(not block.lead and _is_in(block, tier) for block in blocks)

    # ------------------------------------------------------------ attachment

    def _drop_anchors(self, entry: Entry) -> None:
        for anchor in split_anchors(entry.anchors):
            left = tuple(other for other in self.anchored(anchor) if other is not entry)
            if left:
                self._anchored[anchor] = left[0] if len(left) == 1 else left
            else:
                self._anchored.pop(anchor, None)

    def _segment(self, key: bytes) -> Segment:
        known = self._segments.get(key)
        if isinstance(known, Segment):
            return known
        segment = self._segments[key] = Segment() if known is None else Segment(known)
        return segment

    def _share_bytes(self, entry: Entry) -> None:
        """Have an object and its neighbours hold equal keys, namespaces and positions once."""
        if len(self._namespaces) > _MAX_NAMESPACES:
            self._namespaces.clear()
        entry.namespace = self._namespaces.setdefault(entry.namespace, entry.namespace)
        for before in _each(self._ending.get(entry.segment_key, ()))[:1]:
            entry.segment_key = before.object_id.key
            if before.end == entry.start:
                before.end = entry.start
        if entry.object_id.kind is ObjectKind.KV:
            key = entry.object_id.key
            after = self._segments.get(key)
            if isinstance(after, Entry):
                # Removed first: assigning to a known key keeps the old bytes.
                del self._segments[key]
                self._segments[key] = after
                after.segment_key = key
                if entry.end == after.start:
                    entry.end = after.start

    def _attach(self, segment: Segment, entry: Entry) -> bool:
        if entry.lead:
            parent = _holder(segment, entry.lead)
            if parent is None:
                return False
            entry.parent = parent
            if parent.children is None:
                parent.children = {}
            parent.children[entry] = None
        blocks = segment.blocks
        at = bisect.bisect_right(blocks, entry.path, key=_path)
        for neighbour in blocks[max(0, at - 1) : at + 1]:
            # Contexts that branch at one point share these bytes.
            if neighbour.lead == entry.lead:
                entry.lead = neighbour.lead
        blocks.insert(at, entry)
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
        self._ending.clear()
        self._segments.clear()
        self._namespaces.clear()
        self._anchored.clear()
        self._count = 0

    def _detach(self, segment: Segment, entry: Entry) -> list[Entry]:
        """Take a block and all that hang on it out of the tree; those that hung on it."""
        loose: list[Entry] = []
        waiting = [entry]
        while waiting:
            block = waiting.pop()
            _remove_sorted(segment.blocks, block)
            if block is entry and block.parent is not None and block.parent.children is not None:
                del block.parent.children[block]
            block.parent = None
            children = block.children or ()
            waiting += children
            loose += children
            block.children = None
        return loose


def _each(known: Entry | tuple[Entry, ...]) -> tuple[Entry, ...]:
    return (known,) if isinstance(known, Entry) else known


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
