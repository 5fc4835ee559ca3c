"""What is stored, by content: a radix tree cut into segments.

Aligned positions (multiples of ``align_tokens``) cut every context into segments, and no kv
block crosses one. A segment is found by the key of its start, one dictionary look-up, and
:mod:`~erllama_core.cache.segment` says what is in it, however many blocks begin alike.

Each copy counts what stands on it in its own tier: one that nothing stands on is a leaf there,
and eviction takes leaves.

Most objects are whole blocks in a row, so what only other places need is made when they need
it: a segment of one block is that block, and a key is kept once, by the block that ends there
and by what follows it.

One lock, held for microseconds, is in the cache that owns the index; nothing here locks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from erllama_core.cache.anchors import split_anchors
from erllama_core.cache.entry import Copy, Entry
from erllama_core.cache.segment import Segment
from erllama_core.interfaces.block import TOKEN_BYTES, ObjectId, ObjectKind

_KV: Final = ObjectKind.KV
_MAX_NAMESPACES: Final = 1024
"""Namespaces that are remembered; every salt makes one."""

_MAX_SPELLINGS: Final = 8
"""Objects that one text anchor leads to: those that came last."""


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

        None when a part of it is not known.
        """
        paths = [entry.path]
        while entry.end > len(paths[-1]) // TOKEN_BYTES:
            position = entry.end - len(paths[-1]) // TOKEN_BYTES
            before = [
                known
                for known in _each(self._ending.get(entry.segment_key, ()))
                if known.object_id.kind is _KV and known.start < known.end == position
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
        if entry.object_id.kind is _KV:
            if not entry.lead and entry.segment_key not in self._segments:
                self._segments[entry.segment_key] = entry
                return entry
            self._segment(entry.segment_key).add_block(entry)
        elif entry.object_id.kind is ObjectKind.SNAPSHOT:
            self._segment(entry.segment_key).add_snapshot(entry)
        elif entry.object_id.kind is ObjectKind.LOGITS:
            known_segment = self.segment(entry.segment_key)
            if known_segment is None or not known_segment.hang(entry):
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
            was_attached = entry not in segment.orphans
            loose = segment.remove_block(entry)
            if was_attached:
                loose += self._followers(entry)
        else:
            known = self._segments[segment_key]
            if isinstance(known, Segment):
                if entry.object_id.kind is ObjectKind.SNAPSHOT:
                    known.remove_snapshot(entry)
                    loose += left
                else:
                    known.orphans.pop(entry, None)
        self._tidy(segment_key)
        return loose

    def clear(self) -> None:
        """Forget everything."""
        self._ending.clear()
        self._segments.clear()
        self._namespaces.clear()
        self._anchored.clear()
        self._count = 0

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

    # ------------------------------------------------------------------- inside

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
        if entry.object_id.kind is _KV:
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
        """Keep no segment without objects."""
        known = self._segments.get(segment_key)
        if isinstance(known, Segment) and known.is_empty:
            del self._segments[segment_key]


def _each(known: Entry | tuple[Entry, ...]) -> tuple[Entry, ...]:
    return (known,) if isinstance(known, Entry) else known
