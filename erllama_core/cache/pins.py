"""Pinned contexts: which objects of a tier a pin protects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import attrs

from erllama_core.cache.entry import Entry
from erllama_core.cache.index import Index
from erllama_core.cache.keys import common_tokens
from erllama_core.cache.segment import Segment
from erllama_core.cache.tiers import TierStore
from erllama_core.interfaces.block import TOKEN_BYTES, ObjectKind

_KV: Final = ObjectKind.KV


@attrs.frozen
class Pinned:
    """What a pin protects in a tier now."""

    tier: str
    rows: int
    bytes: int


@attrs.frozen
class _Stretch:
    """A run of a pinned context from an aligned position on."""

    segment_key: bytes
    path: bytes
    """Its packed tokens."""
    start: int


@attrs.define(eq=False)
class _Pin:
    key: bytes
    stretches: list[_Stretch] = attrs.field(factory=list)
    """The context from its end to its beginning, as far as it is known; kept when objects go."""
    rows: list[Entry] = attrs.field(factory=list)
    whole: bool = False
    """Whether the tier has all that it takes to restore the context."""
    watched: set[bytes] = attrs.field(factory=set)


class TierPins:
    """The pins of one tier. The cache's lock guards it.

    A pin is a key of a context, and protects the blocks from the context's start to there, with
    the snapshot and the mark at its end. Pins may overlap, and outlive what they protect: while
    something is missing they protect what there is, and the rest as soon as it comes back.
    Methods that change what is protected return the objects for which that has changed.
    """

    def __init__(self, store: TierStore, index: Index) -> None:
        self._store: Final = store
        self._index: Final = index
        self._pins: Final[dict[bytes, _Pin]] = {}
        self._protected: Final[dict[Entry, list[_Pin]]] = {}
        self._watched: Final[dict[bytes, set[_Pin]]] = {}
        """Keys near which a new object may matter to a pin."""

    def __contains__(self, key: bytes) -> bool:
        return key in self._pins

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._pins)

    def protects(self, entry: Entry) -> bool:
        """Whether a pin covers this object."""
        return entry in self._protected

    def is_whole(self, key: bytes) -> bool:
        """Whether the tier has the whole context of a pin."""
        return key in self._pins and self._pins[key].whole

    def summary(self, key: bytes) -> Pinned:
        """What a pin protects now."""
        pin = self._pins.get(key)
        rows = pin.rows if pin is not None else []
        return Pinned(self._store.name, len(rows), self._size(rows))

    @property
    def size_bytes(self) -> int:
        """Of everything that is protected."""
        return self._size(self._protected)

    def add(self, key: bytes) -> Iterable[Entry]:
        """Pin a context."""
        if key in self._pins:
            return ()
        pin = self._pins[key] = _Pin(key)
        return self._resolve(pin)

    def remove(self, key: bytes) -> Iterable[Entry]:
        """Unpin a context; one that is not pinned is ignored."""
        pin = self._pins.pop(key, None)
        if pin is None:
            return ()
        self._watch(pin, set())
        return self._protect(pin, [])

    def came(self, entry: Entry) -> Iterable[Entry]:
        """The tier has a new object."""
        if not self._watched:
            return ()
        changed: dict[Entry, None] = {}
        for key in (entry.object_id.key, entry.segment_key):
            for pin in tuple(self._watched.get(key, ())):
                changed.update(dict.fromkeys(self._resolve(pin)))
        return changed

    def left(self, entry: Entry) -> Iterable[Entry]:
        """The tier has lost an object."""
        changed: dict[Entry, None] = {}
        for pin in tuple(self._protected.get(entry, ())):
            changed.update(dict.fromkeys(self._resolve(pin)))
        return changed

    # ------------------------------------------------------------------- inside

    def _size(self, entries: Iterable[Entry]) -> int:
        copies = (entry.copy_in(self._store) for entry in entries)
        return sum(copy.size_bytes for copy in copies if copy is not None)

    def _resolve(self, pin: _Pin) -> Iterable[Entry]:
        """Find what the pin covers."""
        at_end = [entry for entry in self._index.ending(pin.key) if self._has(entry)]
        self._learn(pin)
        rows = [e for e in at_end if e.object_id.kind is not _KV or not e.segment_key]
        gap = not pin.stretches or pin.stretches[-1].start > 0
        for stretch in pin.stretches:
            segment = self._index.segment(stretch.segment_key)
            covering, covered = ([], 0) if segment is None else self._cover(segment, stretch.path)
            rows += covering
            gap = gap or covered < len(stretch.path)
        alone = (e for e in at_end if not e.segment_key or _holds_all(e))
        pin.whole = not gap or any(alone)
        watched = {pin.key}
        if not pin.whole:
            watched.update(stretch.segment_key for stretch in pin.stretches)
        self._watch(pin, watched)
        return self._protect(pin, rows)

    def _learn(self, pin: _Pin) -> None:
        """Follow the context from its end to its beginning, through objects of any tier."""
        stretches = pin.stretches
        key = stretches[-1].segment_key if stretches else pin.key
        while not stretches or stretches[-1].start > 0:
            known = next((s for e in self._index.ending(key) if (s := _stretch(e))), None)
            if known is None or (stretches and not _joins(known, stretches[-1])):
                return
            stretches.append(known)
            key = known.segment_key

    def _cover(self, segment: Segment, path: bytes) -> tuple[list[Entry], int]:
        """Blocks of the tier that cover a run of tokens, and how many bytes of it they cover."""
        found = segment.cover(path, self._has)
        if found and found[-1][1] * TOKEN_BYTES == len(path):
            return [entry for entry, _ in found], len(path)
        return self._cover_with_gaps(segment, path)

    def _has(self, entry: Entry) -> bool:
        return entry.copy_in(self._store) is not None

    def _cover_with_gaps(self, segment: Segment, path: bytes) -> tuple[list[Entry], int]:
        """The same where a block is missing."""
        runs: list[tuple[int, int, Entry]] = []
        for entry in (*segment.blocks, *segment.orphans):
            if entry.object_id.kind is _KV and self._has(entry):
                shared = common_tokens(entry.path, path) * TOKEN_BYTES
                if shared > len(entry.lead):
                    runs.append((len(entry.lead), shared, entry))
        found: list[Entry] = []
        reach = covered = 0
        while left := [run for run in runs if run[1] > reach]:
            begin = max(reach, min(run[0] for run in left))
            _, end, entry = max((run for run in left if run[0] <= begin), key=lambda run: run[1])
            found.append(entry)
            covered += end - begin
            reach = end
        return found, covered

    def _protect(self, pin: _Pin, rows: list[Entry]) -> Iterable[Entry]:
        """Have a pin protect these objects and no others; those that are or were pinned by it."""
        before, pin.rows = pin.rows, rows
        changed = dict.fromkeys(before) | dict.fromkeys(rows)
        for entry in before:
            pins = self._protected[entry]
            pins.remove(pin)
            if not pins:
                del self._protected[entry]
        for entry in rows:
            self._protected.setdefault(entry, []).append(pin)
        return changed

    def _watch(self, pin: _Pin, keys: set[bytes]) -> None:
        for key in pin.watched - keys:
            self._watched[key].discard(pin)
            if not self._watched[key]:
                del self._watched[key]
        for key in keys - pin.watched:
            self._watched.setdefault(key, set()).add(pin)
        pin.watched = keys


def _stretch(entry: Entry) -> _Stretch | None:
    """The run of tokens that leads to an object's end, where it tells."""
    path = entry.path
    start = entry.end - len(path) // TOKEN_BYTES
    if not entry.segment_key or not path or start < 0:
        return None
    return _Stretch(entry.segment_key, path, start)


def _joins(before: _Stretch, after: _Stretch) -> bool:
    """Whether one run ends where another starts, as headers in order say."""
    return before.start + len(before.path) // TOKEN_BYTES == after.start


def _holds_all(entry: Entry) -> bool:
    """Whether a snapshot is a whole state, as far as is known: no block leads to it."""
    return entry.object_id.kind is ObjectKind.SNAPSHOT and entry.parent is None
