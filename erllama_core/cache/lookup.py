"""Finding the longest stored prefix of a prompt, to the token."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

import attrs

from erllama_core.cache.entry import Entry
from erllama_core.cache.index import Index
from erllama_core.cache.keys import ContextKeys, common_tokens
from erllama_core.cache.segment import Segment
from erllama_core.cache.tiers import TierStore
from erllama_core.interfaces.backend import KVClass
from erllama_core.interfaces.block import TOKEN_BYTES, ObjectId, ObjectKind


@attrs.frozen
class Piece:
    """Cells [entry.start, stop) of a stored block."""

    entry: Entry
    stop: int


@attrs.frozen
class Match:
    """What is stored of a prompt. Everything in it is in a tier that may be read."""

    covered: int = 0
    """Tokens of the prompt whose state is stored: where a save would go on."""
    length: int = 0
    """Tokens to restore; below ``covered`` when one must be computed to sample from."""
    pieces: tuple[Piece, ...] = ()
    """The ranges to import, in order, for ``length`` tokens."""
    snapshot: Entry | None = None
    """The snapshot at ``length``, for the classes that need one."""
    mark: Entry | None = None
    """The logits at ``length``; then ``length`` is the whole prompt."""

    @property
    def has_state(self) -> bool:
        """Whether there is anything to import, and not only logits."""
        return bool(self.pieces) or self.snapshot is not None

    def within(self, cells: int) -> Match:
        """The part that can be imported where so many cells are free.

        A block is imported whole before its end is cut off.
        """
        fitting = []
        for piece in self.pieces:
            if piece.entry.end > cells:
                break
            fitting.append(piece)
        if len(fitting) == len(self.pieces):
            return self
        if self.snapshot is not None:
            return Match(covered=self.covered)
        return Match(self.covered, fitting[-1].stop if fitting else 0, tuple(fitting))

    def first(self, count: int) -> Match:
        """What its first ``count`` pieces hold; with a snapshot all of it, or for 0 nothing."""
        if self.snapshot is not None:
            return self if count else Match(covered=self.covered)
        if count >= len(self.pieces):
            return self
        pieces = self.pieces[:count]
        return Match(self.covered, pieces[-1].stop if pieces else 0, pieces)


@attrs.frozen
class Divergence:
    """Where a prompt leaves what is stored."""

    at: int
    """Tokens of the prompt that are stored."""
    stored_next: bytes
    """Packed tokens with which the nearest stored context goes on; empty where it ends."""
    is_out_of_reach: bool = False
    """It goes on as the prompt does, in no tier that can be read now, or by this model."""


class Finder:
    """Walks an index for one model: its KV class and the tiers that it may read.

    The caller holds the cache's lock.
    """

    def __init__(self, index: Index, kv_class: KVClass, tiers: Collection[TierStore]) -> None:
        self._index: Final = index
        self._class: Final = kv_class
        self._tiers: Final = frozenset(tiers)

    def readable(self, entry: Entry) -> bool:
        """Whether the object can be had now, from one of this model's tiers or on its way there."""
        if entry.pages is not None and not self._tiers.isdisjoint(entry.writing):
            return True
        for copy in entry.copies:
            store = copy.tier
            if store in self._tiers and not (copy.rests_until_s or store.rests_until_s):
                return True
        return any(copy.tier in self._tiers and not copy.is_resting for copy in entry.copies)

    def find(self, keys: ContextKeys, may_sample: bool) -> Match:
        """The longest stored prefix of the whole context ``keys``.

        ``may_sample``: whether a mark would do for this request's sampling. Without one the
        last token is left to compute, as its logits are needed.
        """
        n = len(keys)
        covered, pieces = self.chain(keys, n)
        if self._class is KVClass.WHOLE:
            pieces = []  # they name tokens, and hold no state
        mark = self._mark(keys, n) if may_sample else None
        if self._class is KVClass.SPAN:
            if mark is not None and covered == n:
                return Match(n, n, tuple(pieces), None, mark)
            length = min(covered, n - 1)
            return Match(covered, length, _cut(pieces, length))
        reach = n if self._class is KVClass.WHOLE else covered
        stands_at = self._snapshot(keys, reach if mark is not None else min(reach, n - 1))
        if stands_at is None:
            return Match(covered=covered)
        length = stands_at.end
        at_end = mark if length == n else None
        return Match(covered, length, _cut(pieces, length), stands_at, at_end)

    def divergence(self, keys: ContextKeys, covered: int) -> Divergence:
        """What is stored at the place where the first ``covered`` tokens end."""
        start = keys.segment_start(covered + 1)
        segment = self._index.segment(keys.key(start))
        if segment is not None:
            tokens = keys.slice(start, start + keys.align_tokens)
            nearest = segment.nearest_block(tokens)
            if nearest is None and segment.blocks:
                nearest = segment.blocks[0], 0
            if nearest is not None and start + nearest[1] >= covered:
                entry, shared = nearest
                at = covered - start
                return Divergence(covered, entry.path[TOKEN_BYTES * at :], shared > at)
        return Divergence(covered, b"")

    def chain(self, keys: ContextKeys, n: int, start: int = 0) -> tuple[int, list[Piece]]:
        """How far blocks cover the first ``n`` tokens, from an aligned ``start`` on; by what."""
        pieces: list[Piece] = []
        position = start
        while position < n:
            known = self._index.segment_or_block(keys.key(position))
            if known is None:
                break
            tokens = keys.slice(position, min(n, position + keys.align_tokens))
            reached = self._walk_segment(known, position, tokens, keys, pieces)
            if reached < position + keys.align_tokens:
                return reached, pieces
            position = reached
        return position, pieces

    def _walk_segment(
        self,
        known: Segment | Entry,
        position: int,
        tokens: bytes,
        keys: ContextKeys,
        pieces: list[Piece],
    ) -> int:
        def usable(entry: Entry) -> bool:
            return self.readable(entry) and _belongs(entry, keys)

        if isinstance(known, Entry):
            shared = common_tokens(known.tokens, tokens)
            found = [(known, shared)] if shared and usable(known) else []
        else:
            found = known.cover(tokens, usable)
        for number, (entry, reach) in enumerate(found, 1):
            # A block gives way to the next one where that starts.
            stop = found[number][0].start if number < len(found) else position + reach
            pieces.append(Piece(entry, stop))
        return pieces[-1].stop if found else position

    def _mark(self, keys: ContextKeys, n: int) -> Entry | None:
        entry = self._index.get(ObjectId(ObjectKind.LOGITS, n, keys.key(n)))
        return entry if entry is not None and self.readable(entry) else None

    def _snapshot(self, keys: ContextKeys, reach: int) -> Entry | None:
        """The last readable snapshot along the context, at ``reach`` or before."""
        return next(filter(self.readable, self.snapshots(keys, reach)), None)

    def snapshots(self, keys: ContextKeys, reach: int) -> Iterator[Entry]:
        """All snapshots along the context, the last one at ``reach`` or before it first."""
        position = keys.segment_start(reach)
        while reach > 0:
            segment = self._index.segment_or_block(keys.key(position))
            if isinstance(segment, Segment):
                for entry in segment.nearest_snapshot(keys.slice(position, reach)):
                    if entry.object_id.key == keys.key(entry.end):
                        yield entry
            reach = position
            position = keys.segment_start(reach)


def entry_at(
    keys: ContextKeys, kind: ObjectKind, start: int, end: int, anchors: bytes = b""
) -> Entry:
    """The object that holds this part of a context; nothing says that it is stored."""
    segment_start = keys.segment_start(end)
    return Entry(
        ObjectId(kind, start, keys.key(end)),
        end,
        keys.namespace,
        keys.key(segment_start),
        keys.slice(segment_start, start),
        keys.slice(start, end),
        anchors,
    )


def _belongs(entry: Entry, keys: ContextKeys) -> bool:
    """Whether the block's name is what its tokens after this context's beginning make it.

    A header's checksum finds damage; this finds a block that stands in the wrong place.
    """
    if entry.tokens == keys.slice(entry.start, entry.end):
        return entry.object_id.key == keys.key(entry.end)
    return entry.object_id.key == keys.key_with(entry.start, entry.tokens)


def _cut(pieces: list[Piece], length: int) -> tuple[Piece, ...]:
    """The pieces of the first ``length`` tokens."""
    return tuple(
        piece if piece.stop <= length else Piece(piece.entry, length)
        for piece in pieces
        if piece.entry.start < length
    )
