"""The objects between two aligned positions, and what hangs on what there.

A block that starts inside a segment hangs on the block in which its start lies, snapshots and
marks on the one in which their position lies; what finds none is an orphan until it comes.
Blocks stand sorted by their *path*, the tokens from the segment's start to the block's end: the
one that shares most with a prompt is next to the place where the prompt itself would stand.
A look-up asks which blocks can be had, and so goes by where they start, not by what they hang on.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from typing import Final

from erllama_core.cache.entry import Entry
from erllama_core.cache.keys import common_tokens
from erllama_core.interfaces.block import TOKEN_BYTES, ObjectKind

_KV: Final = ObjectKind.KV


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
            self._list(block)

    @property
    def is_empty(self) -> bool:
        return not (self.blocks or self.orphans or self.snapshots)

    def add_block(self, entry: Entry) -> None:
        """Put a kv block into its place, and what waited for it; or have it wait."""
        if self._attach(entry):
            self._adopt_orphans()
        else:
            self.orphans[entry] = None
        self._list(entry)

    def remove_block(self, entry: Entry) -> list[Entry]:
        """Take a kv block out; what hung on it, at whatever distance, is returned.

        That hangs on another block now, or is an orphan.
        """
        self._unlist(entry)
        if entry in self.orphans:
            del self.orphans[entry]
            return []
        loose = self._detach(entry)
        self.orphans.update(dict.fromkeys(loose))
        self._adopt_orphans()
        return loose

    def add_snapshot(self, entry: Entry) -> None:
        """Put a snapshot into its place, hanging on the block there or waiting for it."""
        bisect.insort(self.snapshots, entry, key=_path)
        if not self.hang(entry):
            self.orphans[entry] = None

    def remove_snapshot(self, entry: Entry) -> None:
        """Take a snapshot out."""
        self.orphans.pop(entry, None)
        _remove_sorted(self.snapshots, entry, _path)

    def hang(self, entry: Entry) -> bool:
        """Hang an object on the block in which its start lies; False when there is none."""
        parent = self._holder(entry.lead)
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

    # ------------------------------------------------------------------- inside

    def _list(self, entry: Entry) -> None:
        """Have ``cover`` see a kv block."""
        alike = self._by_lead.get(entry.lead)
        if alike is None:
            self._by_lead[entry.lead] = [entry]
            self._leads[len(entry.lead)] = self._leads.get(len(entry.lead), 0) + 1
        else:
            bisect.insort(alike, entry, key=_tokens)

    def _unlist(self, entry: Entry) -> None:
        """Have ``cover`` no longer see a kv block."""
        alike = self._by_lead[entry.lead]
        _remove_sorted(alike, entry, _tokens)
        if not alike:
            del self._by_lead[entry.lead]
            self._leads[len(entry.lead)] -= 1
            if not self._leads[len(entry.lead)]:
                del self._leads[len(entry.lead)]

    def _attach(self, entry: Entry) -> bool:
        """Put an object into its place; False while what it stands on is missing."""
        if (entry.lead or entry.object_id.kind is not _KV) and not self.hang(entry):
            return False
        if entry.object_id.kind is not _KV:
            return True
        blocks = self.blocks
        at = bisect.bisect_right(blocks, entry.path, key=_path)
        for neighbour in blocks[max(0, at - 1) : at + 1]:
            # Contexts that branch at one point share these bytes.
            if neighbour.lead == entry.lead:
                entry.lead = neighbour.lead
        blocks.insert(at, entry)
        return True

    def _adopt_orphans(self) -> None:
        attached = True
        while attached and self.orphans:
            attached = False
            for orphan in list(self.orphans):
                if self._attach(orphan):
                    del self.orphans[orphan]
                    attached = True

    def _detach(self, entry: Entry) -> list[Entry]:
        """Take a block and all that hang on it out of the tree; those that hung on it."""
        loose: list[Entry] = []
        waiting = [entry]
        while waiting:
            block = waiting.pop()
            _remove_sorted(self.blocks, block, _path)
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

    def _holder(self, lead: bytes) -> Entry | None:
        """An attached block in which the run ``lead`` of the segment ends."""
        blocks = self.blocks
        at = bisect.bisect_left(blocks, lead, key=_path)
        if at == len(blocks) or not blocks[at].path.startswith(lead):
            return None
        entry = blocks[at]
        while len(entry.lead) >= len(lead) and entry.parent is not None:
            entry = entry.parent
        return entry


def _path(entry: Entry) -> bytes:
    return entry.path


def _tokens(entry: Entry) -> bytes:
    return entry.tokens


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


def _remove_sorted(entries: list[Entry], entry: Entry, key: Callable[[Entry], bytes]) -> None:
    at = bisect.bisect_left(entries, key(entry), key=key)
    while entries[at] is not entry:
        at += 1
    del entries[at]
