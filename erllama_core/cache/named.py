"""Small objects under names of the caller's own, kept in the tiers like any other.

Unlike the state of a context they are not found by what is in them. Their name is all that is
needed, so one that another process stored is found as soon as it is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from erllama_core.cache.catalog import Catalog
from erllama_core.cache.entry import Entry
from erllama_core.cache.flow import Flow
from erllama_core.cache.keys import digest_fields
from erllama_core.cache.loader import Loader
from erllama_core.cache.passage import Draft, Route
from erllama_core.cache.scan import entry_of
from erllama_core.cache.tiers import TierStore
from erllama_core.errors import BlockNotFound, CacheError, CorruptBlock
from erllama_core.interfaces.block import ObjectId, ObjectKind, verify_object

_REASON: Final = "finish"
"""Why they are saved; it makes them durable."""


class NamedObjects:
    """The replay objects of one model. Thread-safe.

    Reads wait as long as restoring state may, and no longer, for a tier that hangs.
    """

    def __init__(self, catalog: Catalog, flow: Flow, loader: Loader, route: Route) -> None:
        self._catalog: Final = catalog
        self._flow: Final = flow
        self._loader: Final = loader
        self._route: Final = route

    def put(self, namespace: bytes, name: str, payload: bytes) -> bool:
        """Store a payload, unless it is there; it can be found at once, and is written soon.

        False when no tier has room for it on its way. Raises ValueError when the name stands
        for something else already.
        """
        known = self.get(namespace, [name]).get(name)
        if known is not None:
            if known != payload:
                raise ValueError(f"{name!r} names something else already; use another name")
            return True
        buffer = self._flow.reserve(len(payload), self._route, beyond_bound=False)
        if buffer is None:
            return False
        buffer.view[:] = payload
        entry = Entry(_object_id(namespace, name), 0, namespace, b"", b"", b"")
        self._flow.submit(Draft(entry, buffer, self._route, _REASON, None))
        return True

    def get(self, namespace: bytes, names: Sequence[str]) -> Mapping[str, bytes]:
        """The payloads of those names that are stored. May block."""
        found: dict[str, bytes] = {}
        missing: dict[str, ObjectId] = {}
        for name in names:
            object_id = _object_id(namespace, name)
            payload = self._in_memory(object_id)
            if payload is None:
                missing[name] = object_id
            else:
                found[name] = payload
        for store in self._route.tiers:
            if missing and store.keeps is None:
                read = self._read(store, namespace, missing)
                found.update(read)
                missing = {name: missing[name] for name in missing.keys() - read.keys()}
        return found

    def remove(self, namespace: bytes, name: str) -> None:
        """Forget a name, in every tier; unknown is a no-op. May block.

        Raises CacheError when a tier did not let go of it; the others have then.
        """
        object_id = _object_id(namespace, name)
        entry = self._catalog.get(object_id)
        if entry is not None and entry.writing:
            self._flow.flush(None)
        failed: CacheError | None = None
        for store in self._route.tiers:
            try:
                self._catalog.remove(store, object_id)
            except CacheError as error:
                failed = error
        if failed is not None:
            raise failed

    def _in_memory(self, object_id: ObjectId) -> bytes | None:
        with self._catalog.lock:
            entry = self._catalog.index.get(object_id)
            if entry is None:
                return None
            payload = None if entry.pages is None else bytes(entry.pages.view)
            for copy in entry.copies:
                if payload is None and copy.tier.keeps is not None:
                    try:
                        pages = copy.tier.keeps.borrow(object_id)
                    except BlockNotFound:
                        continue
                    payload = bytes(pages.view)
                    pages.release()
            if payload is not None:
                self._catalog.touch((entry,))
            return payload

    def _read(
        self, store: TierStore, namespace: bytes, wanted: Mapping[str, ObjectId]
    ) -> dict[str, bytes]:
        """Those that a tier has, in one go. What cannot be read is not there."""

        def read() -> dict[str, bytes]:
            found = {}
            for name, object_id in wanted.items():
                payload = self._read_one(store, namespace, object_id)
                if payload is not None:
                    found[name] = payload
            return found

        return self._loader.read(store, read) or {}

    def _read_one(self, store: TierStore, namespace: bytes, object_id: ObjectId) -> bytes | None:
        """On a thread of the tier's."""
        try:
            data = store.attempt(
                lambda: store.tier.read(object_id, lambda size: memoryview(bytearray(size))), "read"
            )
            header = verify_object(data, object_id)
            if header.namespace != namespace:
                raise CorruptBlock("it is of another namespace than its name")
        except CorruptBlock as error:
            self._catalog.discard_corrupt(store, object_id, error.reason)
            return None
        except CacheError as error:
            entry = self._catalog.get(object_id)
            if entry is not None and isinstance(error, BlockNotFound):
                self._catalog.forget_copy(store, entry)
            return None
        counters = self._catalog.counters
        counters.add("bytes_read", len(data))
        counters.hit_tier(store.name)
        # Another process may have stored it.
        entry = entry_of(header)
        self._catalog.add_copy(store, entry, len(data), self._catalog.clock(), _REASON)
        known = self._catalog.get(object_id)
        if known is not None:
            self._catalog.touch((known,))
        return bytes(data[header.header_bytes :])


def _object_id(namespace: bytes, name: str) -> ObjectId:
    key = digest_fields("replay", {"namespace": namespace, "name": name})
    return ObjectId(ObjectKind.REPLAY, 0, key)
