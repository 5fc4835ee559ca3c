"""A tier whose operations wait until a test lets them go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

from erllama_core import Engine, load_config
from erllama_core.cache.ram import RamTier
from erllama_core.hookspecs import hookimpl
from erllama_core.host import PluginHost
from erllama_core.interfaces.block import Bytes, ObjectId
from erllama_core.interfaces.tier import Allocate, ScanFailure, ScannedObject
from erllama_core.providers import TierProvider


class HeldTier:
    """Objects in memory, written and read as on a disk; it outlives its engines."""

    outlives_power = True

    def __init__(self, quota_bytes: int = 1 << 30) -> None:
        self.inner = RamTier(quota_bytes)
        self.delete = self.inner.delete
        self.contains = self.inner.contains
        self.usage = self.inner.usage
        self.location = self.inner.location
        self.writes = threading.Event()
        self.reads = threading.Event()
        self.writes.set()
        self.reads.set()
        self.asked = threading.Semaphore(0)
        """Released when an operation begins to wait."""
        self.durable: set[ObjectId] = set()

    def put(self, object_id: ObjectId, parts: Sequence[Bytes], *, durable: bool = False) -> None:
        self._wait(self.writes)
        self.inner.put(object_id, parts)
        if durable:
            self.durable.add(object_id)

    def read(self, object_id: ObjectId, allocate: Allocate) -> memoryview:
        self._wait(self.reads)
        return self.inner.read(object_id, allocate)

    def make_durable(self, object_ids: Sequence[ObjectId]) -> None:
        self.durable.update(o for o in object_ids if self.inner.contains(o))

    def scan(self) -> Iterator[ScannedObject | ScanFailure]:
        return self.inner.scan()

    def ids(self) -> set[ObjectId]:
        """What it holds."""
        return {found.object_id for found in self.inner.scan() if isinstance(found, ScannedObject)}

    def close(self) -> None:
        """Stay as it is, for the next engine."""

    def _wait(self, event: threading.Event) -> None:
        if not event.is_set():
            self.asked.release()
            event.wait()


def engine_with(held: dict[str, Any], **sections: Any) -> Engine:
    """An engine whose tiers of these names are these objects; and ``ram``."""

    class Plugin:
        @hookimpl
        def erllama_tiers(self) -> list[TierProvider]:
            return [
                TierProvider(name, "", lambda _, tier=tier: tier)  # type: ignore[misc]
                for name, tier in held.items()
            ]

    host = PluginHost()
    host.register(Plugin())
    tiers = sections.pop("tiers", []) + [{"name": name, "kind": name} for name in held]
    return Engine(load_config({"tiers": tiers, **sections}, environ={}), plugins=host)
