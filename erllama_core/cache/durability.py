"""What a power cut could still take from a tier that could keep it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

from erllama_core.cache.tiers import TierStore
from erllama_core.errors import CacheError
from erllama_core.interfaces.block import ObjectId
from erllama_core.interfaces.tier import MakesDurable

_MAX_REMEMBERED: Final = 1 << 16
"""Objects; those written long before have reached the device by the system's own doing."""


class Unsynced:
    """The objects of one tier that were written without ``durable``; thread-safe.

    Blocks are written as a prompt is computed, before anybody knows that the context will be
    finished. When it is, ``sync`` makes them durable too, and those that are still on their
    way as soon as they are written.
    """

    def __init__(self, store: TierStore, durable: MakesDurable) -> None:
        self._store: Final = store
        self._durable: Final = durable
        self._lock: Final = threading.Lock()
        self._coming: dict[ObjectId, bool] = {}
        """Handed over, not written yet; whether they were asked for meanwhile."""
        self._written: dict[ObjectId, None] = {}

    def expect(self, object_id: ObjectId) -> None:
        """An object was handed over, to be written without ``durable``."""
        with self._lock:
            self._coming[object_id] = False

    def settle(self, object_id: ObjectId, *, stored: bool) -> None:
        """What was expected is written, or will not be. May block."""
        with self._lock:
            asked = self._coming.pop(object_id, False)
            if stored:
                self._written[object_id] = None
                if len(self._written) > _MAX_REMEMBERED:
                    del self._written[next(iter(self._written))]
        if stored and asked:
            self.sync((object_id,))

    def sync(self, object_ids: Sequence[ObjectId]) -> None:
        """Make durable what is not. Blocks."""
        with self._lock:
            for object_id in object_ids:
                if object_id in self._coming:
                    self._coming[object_id] = True
            late = [object_id for object_id in object_ids if object_id in self._written]
            for object_id in late:
                del self._written[object_id]
        if not late:
            return
        try:
            self._store.attempt(lambda: self._durable.make_durable(late), "make durable")
        except CacheError:  # counted and logged; the next one tries again
            with self._lock:
                self._written.update(dict.fromkeys(late))
