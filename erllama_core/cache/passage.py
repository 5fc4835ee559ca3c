"""An object on its way to tiers, and the way that a model's objects take."""

from __future__ import annotations

import functools
import threading
import time
from typing import Any, Final

import attrs

from erllama_core.cache.entry import Entry
from erllama_core.cache.eviction import Use
from erllama_core.cache.pages import PooledPages
from erllama_core.cache.tiers import TierStore
from erllama_core.interfaces.block import KEY_BYTES, encode_header
from erllama_core.interfaces.tier import Pages

DURABLE_REASONS: Final = frozenset({"finish", "shutdown"})


@attrs.frozen
class Route:
    """A model's tiers, nearest first, and how its objects are spread over them."""

    tiers: tuple[TierStore, ...]
    write_back: bool
    """The first tier that takes an object has it; the next one when it leaves that."""
    align_tokens: int

    @functools.cached_property
    def lasting(self) -> tuple[TierStore, ...]:
        """The tiers that a restart leaves alone; of the process, if no other is there."""
        tiers = tuple(store for store in self.tiers if not store.is_volatile)
        return tiers or tuple(store for store in self.tiers if store.keeps is None)

    def below(self, store: TierStore) -> tuple[TierStore, ...]:
        """The tiers that are further away."""
        return self.tiers[self.tiers.index(store) + 1 :] if store in self.tiers else ()


@attrs.frozen(eq=False)
class SaveBuffer:
    """Pages for one object, and the tiers that have room for it on its way."""

    pages: PooledPages
    tiers: tuple[TierStore, ...]

    @property
    def view(self) -> memoryview:
        """The bytes to write the payload to."""
        return self.pages.view


@attrs.frozen(eq=False)
class Draft:
    """A new object. Owns its buffer."""

    entry: Entry
    buffer: SaveBuffer
    route: Route
    save_reason: str
    after: Entry | None
    """The block that this one goes on from; without it, it would be of no use."""
    absorbs: Entry | None = None
    """A block that this one holds too; it goes when this one is stored."""


@attrs.define(eq=False)
class Passage:
    """An object on its way to one or more tiers, each of which holds its pages."""

    entry: Entry
    pages: Pages
    size: int
    """As it was reserved on every lane."""
    save_reason: str
    align_tokens: int
    waiting: int
    """Tiers that have not got it yet."""
    durable: bool = False
    after: Entry | None = None
    absorbs: Entry | None = None
    use: Use | None = None
    """Of the copy that it is made of; it is stored only in place of what is worth less."""
    otherwise: tuple[TierStore, ...] = ()
    """Where it goes when the tier does not take it."""
    is_stored: bool = False
    _head: bytes = b""
    _lock: threading.Lock = attrs.field(factory=threading.Lock)

    def head(self) -> bytes:
        """The header; its checksum is computed once, by the first tier's thread."""
        entry = self.entry
        with self._lock:
            if not self._head:
                self._head = encode_header(
                    kind=entry.object_id.kind,
                    start=entry.start,
                    end=entry.end,
                    namespace=entry.namespace,
                    key=entry.object_id.key,
                    segment_key=entry.segment_key or bytes(KEY_BYTES),
                    lead_tokens=entry.lead,
                    tokens=entry.tokens,
                    # What stands in no tree of blocks was not cut anywhere.
                    align_tokens=self.align_tokens if entry.segment_key else 0,
                    payload=self.pages.view,
                    info=self._info(),
                )
            return self._head

    def _info(self) -> dict[str, Any]:
        """What is written of the object beside its names."""
        info: dict[str, Any] = {"save_reason": self.save_reason, "created_ns": time.time_ns()}
        if self.entry.anchors:
            info["anchors"] = self.entry.anchors.hex()
        return info


def is_in(entry: Entry, store: TierStore) -> bool:
    """Whether a tier has an object, or will have it."""
    return store in entry.writing or entry.copy_in(store) is not None
