"""What is stored, by content: a radix tree cut into segments.

Aligned positions (multiples of ``align_tokens``) cut every context into segments, and no kv
block crosses one. A segment is found by the key of its start, one dictionary look-up; within
it, blocks are sorted by their *path*, the tokens from the segment's start to the block's end.
The block that shares most with a prompt is then next to the place where the prompt itself
would stand, however many blocks begin alike. A block that starts inside a segment hangs on
the block in which its start lies; while that one is missing it is an orphan, which holds
nothing else, and it is attached again when any block with the same tokens comes. A look-up
asks which blocks can be had, and so goes by where blocks start, not by what they hang on.
Snapshots and marks hang on the block in which their position lies.

Each copy counts what stands on it in its own tier: one that nothing stands on is a leaf there,
and eviction takes leaves.

Most objects are whole blocks in a row, so what only other places need is made when they need
it: a segment of one block is that block, and a key is kept once, by the block that ends there
and by what follows it.

One lock, held for microseconds, is in the cache that owns the index; nothing here locks.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from erllama_core.cache.anchors import split_anchors
from erllama_core.cache.keys import common_tokens
from erllama_core.interfaces.block import TOKEN_BYTES, ObjectId, ObjectKind
from erllama_core.interfaces.tier import Pages

if TYPE_CHECKING:
    from erllama_core.cache.tiers import TierStore


_KV: Final = ObjectKind.KV
_MAX_NAMESPACES: Final = 1024
"""Namespaces that are remembered; every salt makes one."""

_MAX_SPELLINGS: Final = 8
"""Objects that one text anchor leads to: those that came last."""


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


def _path(entry: Entry) -> bytes:
    return entry.path


def _tokens(entry: Entry) -> bytes:
    return entry.tokens


class Segment:
    """The objects between two aligned positions of all contexts that begin alike."""

    __slots__ = ("_by_lead", "_leads", "blocks", "orphans", "snapshots")

    def __init__(self, *blocks: Entry) -> None:
        self.blocks: list[Entry] = list(blocks)
        """Attached kv blocks, sorted by path."""
        self.orphans: dict[Entry, None] = {}
        """What hangs on no block, in the order in which it came."""
        self.snapshots: list[Entry] = []
        """Sorted by path."""
        self._by_lead: dict[bytes, list[Entry]] = {}
        """All kv blocks, orphans too, by what is before them; each list sorted by tokens."""
        self._leads: dict[int, int] = {}
        """How many different leads there are of each length, in bytes."""
        for block in blocks:
            self.list_block(block)

    @property
    def is_empty(self) -> bool:
        return not (self.blocks or self.orphans or self.snapshots)

    def list_block(self, entry: Entry) -> None:
        """Have ``cover`` see a kv block."""
        alike = self._by_lead.get(entry.lead)
        if alike is None:
            self._by_lead[entry.lead] = [entry]
            self._leads[len(entry.lead)] = self._leads.get(len(entry.lead), 0) + 1
        else:
            bisect.insort(alike, entry, key=_tokens)

    def unlist_block(self, entry: Entry) -> None:
        """Have ``cover`` no longer see a kv block."""
        alike = self._by_lead[entry.lead]
        _remove_sorted(alike, entry, _tokens)
        if not alike:
            del self._by_lead[entry.lead]
            self._leads[len(entry.lead)] -= 1
            if not self._leads[len(entry.lead)]:
                del self._leads[len(entry.lead)]

    def cover(self, tokens: bytes, usable: Callable[[Entry], bool]) -> list[tuple[Entry, int]]:
        """The usable blocks that bring ``tokens`` furthest, in order, each with how far.

        Only what ``usable`` allows counts, so that a block which cannot be had now never hides
        one that can. Blocks are tried by where they start: one that starts beyond what those
        before it cover is of no use, nor is any after it.
        """
        found: list[tuple[Entry, int]] = []
        reach = 0
        for lead in sorted(self._leads):
            if lead > reach * TOKEN_BYTES:
                break
            alike = self._by_lead.get(tokens[:lead])
            if alike is not None:
                before = lead // TOKEN_BYTES
                best = _furthest(alike, tokens[lead:], reach - before, usable)
                if best is not None:
                    reach = before + best[1]
                    found.append((best[0], reach))
        return found

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

    def ending(self, key: bytes) -> tuple[Entry, ...]:
        """Every object that ends at ``key``."""
        return _each(self._ending.get(key, ()))

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

    def segment_or_block(self, key: bytes) -> Segment | Entry | None:
        """Like ``segment``; a block that is all of its segment stands for it."""
        return self._segments.get(key)

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
                segment.orphans[entry] = None
            segment.list_block(entry)
        elif entry.object_id.kind is ObjectKind.SNAPSHOT:
            segment = self._segment(entry.segment_key)
            bisect.insort(segment.snapshots, entry, key=_path)
            self._hang_or_wait(segment, entry)
        elif entry.object_id.kind is ObjectKind.LOGITS:
            known_segment = self.segment(entry.segment_key)
            if known_segment is None or not self._hang(known_segment, entry):
                self._segment(entry.segment_key).orphans[entry] = None
        return entry

    def remove(self, entry: Entry) -> list[Entry]:
        """Forget an object that no tier has; what hung on it, at whatever distance, is returned.

        That hangs on another block now, or is an orphan; and what hung on it in turn may hang
        elsewhere, so that nothing needs it any longer.
        """
        key = entry.object_id.key
        ending = _each(self._ending.get(key, ()))
        left = tuple(known for known in ending if known is not entry)
        if len(left) == len(ending):
            return []
        self._count -= 1
        if left:
            self._ending[key] = left[0] if len(left) == 1 else left
        else:
            del self._ending[key]
        self._drop_anchors(entry)
        segment_key = entry.segment_key
        if segment_key not in self._segments:
            return []
        loose: list[Entry] = []
        if entry.parent is not None and entry.parent.children is not None:
            del entry.parent.children[entry]
            entry.parent = None
        if entry.object_id.kind is _KV:
            segment = self._segment(segment_key)
            segment.unlist_block(entry)
            if entry in segment.orphans:
                del segment.orphans[entry]
            else:
                loose = self._detach(segment, entry)
                segment.orphans.update(dict.fromkeys(loose))
                self._adopt_orphans(segment)
                loose += self._followers(entry)
        else:
            known = self._segments[segment_key]
            if isinstance(known, Segment):
                known.orphans.pop(entry, None)
                if entry.object_id.kind is ObjectKind.SNAPSHOT:
                    _remove_sorted(known.snapshots, entry)
                    loose += left
        self._tidy(segment_key)
        return loose

    # --------------------------------------------------------- what stands on what

    def place(self, entry: Entry, copy: Copy) -> None:
        """A tier has the object now."""
        tier = copy.tier
        copy.needed = sum(other.copy_in(tier) is not None for other in self._standing_on(entry))
        for below in self.supports(entry):
            support = below.copy_in(tier)
            if support is not None:
                support.needed += 1
        entry.copies.append(copy)

    def displace(self, entry: Entry, copy: Copy) -> list[Entry]:
        """A tier has the object no longer; what only this one needed there."""
        entry.copies.remove(copy)
        freed = []
        for below in self.supports(entry):
            support = below.copy_in(copy.tier)
            if support is not None:
                support.needed -= 1
                if not support.needed:
                    freed.append(below)
        return freed

    def supports(self, entry: Entry) -> tuple[Entry, ...]:
        """The blocks without which this object is of no use: those directly before it."""
        if entry.parent is not None:
            return (entry.parent,)
        if entry.lead or not (entry.segment_key and entry.tokens):
            return ()
        return tuple(
            other
            for other in self.ending(entry.segment_key)
            # The position, too: headers that contradict one another must not make a circle.
            if other.object_id.kind is _KV and other.end == entry.start
        )

    def is_orphan(self, entry: Entry) -> bool:
        """Whether what this object stands on is nowhere, so that no look-up finds it.

        A snapshot may hold a whole state, and then needs nothing else.
        """
        kind = entry.object_id.kind
        if not entry.segment_key or kind is ObjectKind.SNAPSHOT or entry.parent is not None:
            return False
        if kind is ObjectKind.LOGITS:
            return not any(
                other.object_id.kind is ObjectKind.SNAPSHOT
                for other in self.ending(entry.object_id.key)
            )
        return bool(entry.lead or entry.start) and not self.supports(entry)

    def _standing_on(self, entry: Entry) -> Iterator[Entry]:
        yield from entry.children or ()
        if entry.object_id.kind is _KV and entry.segment_key:
            yield from self._followers(entry)

    def _followers(self, entry: Entry) -> list[Entry]:
        """Blocks that begin where this one ends, at an aligned position."""
        following = self._segments.get(entry.object_id.key)
        if following is None:
            return []
        blocks = (following,) if isinstance(following, Entry) else following.blocks
        return [block for block in blocks if not block.lead and block.start == entry.end]

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

    def _tidy(self, segment_key: bytes) -> None:
        """Keep no segment without objects, and a lone block without a segment."""
        known = self._segments.get(segment_key)
        if isinstance(known, Segment) and known.is_empty:
            del self._segments[segment_key]

    def _hang(self, segment: Segment, entry: Entry) -> bool:
        """Hang an object on the block in which its start lies; False when there is none."""
        parent = _holder(segment, entry.lead)
        if parent is None:
            return False
        entry.parent = parent
        if parent.children is None:
            parent.children = {}
        parent.children[entry] = None
        for copy in entry.copies:
            support = parent.copy_in(copy.tier)
            if support is not None:
                support.needed += 1
        return True

    def _hang_or_wait(self, segment: Segment, entry: Entry) -> None:
        if not self._hang(segment, entry):
            segment.orphans[entry] = None

    def _attach(self, segment: Segment, entry: Entry) -> bool:
        """Put an object into its place; False while what it stands on is missing."""
        if (entry.lead or entry.object_id.kind is not _KV) and not self._hang(segment, entry):
            return False
        if entry.object_id.kind is not _KV:
            return True
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
                    del segment.orphans[orphan]
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
            children, block.children = block.children or {}, None
            for child in children:
                child.parent = None
                for copy in child.copies:
                    support = block.copy_in(copy.tier)
                    if support is not None:
                        support.needed -= 1
                loose.append(child)
                if child.object_id.kind is _KV:
                    waiting.append(child)
        return loose


def _each(known: Entry | tuple[Entry, ...]) -> tuple[Entry, ...]:
    return (known,) if isinstance(known, Entry) else known


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


def _furthest(
    alike: list[Entry], tokens: bytes, least: int, usable: Callable[[Entry], bool]
) -> tuple[Entry, int] | None:
    """Of blocks with one lead, the usable one that shares most, if more than ``least``.

    On either side of the place of ``tokens``, a block further away shares no more.
    """
    at = bisect.bisect_left(alike, tokens, key=_tokens)
    best: Entry | None = None
    for side in (range(at, len(alike)), range(at - 1, -1, -1)):
        for number in side:
            shared = common_tokens(alike[number].tokens, tokens)
            if shared <= least:
                break
            if usable(alike[number]):
                best, least = alike[number], shared
                break
    return None if best is None else (best, least)


def _remove_sorted(
    entries: list[Entry], entry: Entry, key: Callable[[Entry], bytes] = _path
) -> None:
    at = bisect.bisect_left(entries, key(entry), key=key)
    while entries[at] is not entry:
        at += 1
    del entries[at]
