"""Pinning: finding the tier, and recording there what is to outlive the process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from erllama_core.cache.catalog import Catalog
from erllama_core.cache.pins import Pinned
from erllama_core.cache.tiers import TierStore
from erllama_core.errors import BlockNotFound, CacheError
from erllama_core.interfaces.block import KEY_BYTES
from erllama_core.results import CacheKey


class Pinning:
    """Pins in all tiers of a cache. Thread-safe; what records a pin may block."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog: Final = catalog
        self._recording: Final = {store: threading.Lock() for store in catalog.stores.values()}
        """Held while a tier's record of pins and what is known of it may differ."""

    def pin(
        self, key: bytes, stores: Sequence[TierStore], settle: Callable[[], object]
    ) -> Pinned | None:
        """Pin a context in the first of these tiers that has it whole; None if none has.

        Tiers that record pins come before those that forget them. ``settle`` waits for what is
        on its way to the tiers. Raises CacheError when the pin cannot be recorded.
        """
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
        ordered = sorted(stores, key=lambda store: store.records is None)
        for patience in (settle, None):
            for store in ordered:
                pinned = self._pin_in(store, key)
                if pinned is not None:
                    return pinned
            if patience is not None:
                patience()
        return None

    def unpin(self, key: bytes) -> None:
        """Unpin a context in every tier. Raises CacheError when one cannot erase its record."""
        trouble: CacheError | None = None
        for store in self._recording:
            try:
                self._unpin_and_erase(store, key)
            except CacheError as error:
                trouble = error
        if trouble is not None:
            raise trouble

    def learn(self, store: TierStore) -> None:
        """Take over the pins that a tier has recorded, and drop those that it has not.

        Called before a scan, and whenever other processes may have changed them.
        """
        records = store.records
        if records is None:
            return
        with self._recording[store]:
            try:
                recorded = store.attempt(
                    lambda: {bytes(key) for key in records.pins()}, "list pins"
                )
            except CacheError:
                return  # counted and logged; what is known stays
            pins = self._catalog.pins[store]
            with self._catalog.lock:
                known = set(pins)
            for key in known - recorded:
                self._unpin_in(store, key)
            for key in recorded - known:
                if len(key) == KEY_BYTES:
                    with self._catalog.lock:
                        self._catalog.rank_anew(store, pins.add(key))

    def listed(self) -> dict[CacheKey, tuple[Pinned, ...]]:
        """Every pin, with what it protects now in each tier that has it."""
        listed: dict[CacheKey, tuple[Pinned, ...]] = {}
        with self._catalog.lock:
            for pins in self._catalog.pins.values():
                for key in pins:
                    name = CacheKey(key)
                    listed[name] = (*listed.get(name, ()), pins.summary(key))
        return listed

    def _pin_in(self, store: TierStore, key: bytes) -> Pinned | None:
        catalog, pins, records = self._catalog, self._catalog.pins[store], store.records
        with self._recording[store]:
            with catalog.lock:
                was_there = key in pins
                catalog.rank_anew(store, pins.add(key))
                whole, pinned = pins.is_whole(key), pins.summary(key)
            if whole and records is not None:
                try:
                    store.attempt(lambda: records.record_pin(key), "record a pin")
                except CacheError:
                    if not was_there:
                        self._unpin_in(store, key)
                    raise
            elif not whole and not was_there:
                self._unpin_in(store, key)
            return pinned if whole else None

    def _unpin_and_erase(self, store: TierStore, key: bytes) -> None:
        self.learn(store)
        records = store.records
        with self._recording[store]:
            if self._unpin_in(store, key) and records is not None:
                store.attempt(lambda: records.erase_pin(key), "erase a pin")

    def _unpin_in(self, store: TierStore, key: bytes) -> bool:
        """Forget a pin; whether it was known."""
        catalog, pins = self._catalog, self._catalog.pins[store]
        with catalog.lock:
            known = key in pins
            catalog.rank_anew(store, pins.remove(key))
        return known


def not_whole(key: bytes, tier: str | None) -> BlockNotFound:
    """What is raised when a context to be pinned is not stored."""
    where = "no tier has" if tier is None else f"tier {tier!r} does not have"
    return BlockNotFound(
        f"{where} the whole context {key.hex()}, so it cannot be pinned; save it first"
    )
