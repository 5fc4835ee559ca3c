"""The RAM tier: rows are the very pages that state was copied into."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Final

from erllama_core.cache.ram_options import default_quota_bytes
from erllama_core.errors import BlockNotFound, TierError, TierFull
from erllama_core.interfaces.block import Bytes, ObjectId, header_length
from erllama_core.interfaces.tier import Allocate, Pages, ScanFailure, ScannedObject, TierUsage


class _OwnPages:
    """Payload bytes that came through ``put``; plain memory, freed by the interpreter."""

    def __init__(self, data: bytes) -> None:
        self.view: Final = memoryview(data)

    def retain(self) -> None:
        """Nothing to count: the view keeps the bytes."""

    def release(self) -> None:
        """Nothing to count: the view keeps the bytes."""


class RamTier:
    """Objects in this process's memory; a Tier that keeps pages."""

    def __init__(self, quota_bytes: int) -> None:
        self._quota = quota_bytes
        self._lock = threading.Lock()
        self._rows: dict[ObjectId, tuple[bytes, Pages]] = {}
        self._used = 0
        self._closed = False

    def put(self, object_id: ObjectId, parts: Sequence[Bytes], *, durable: bool = False) -> None:
        del durable  # memory is never durable, and nobody expects it of this tier
        self.keep(object_id, b"", _OwnPages(b"".join(parts)))

    def keep(self, object_id: ObjectId, head: bytes, pages: Pages) -> None:
        size = len(head) + len(pages.view)
        with self._lock:
            if self._closed:
                raise TierError("the RAM tier is closed")
            if object_id in self._rows:
                return
            if self._used + size > self._quota:
                raise TierFull(
                    f"{size} bytes do not fit: {self._used} of {self._quota} bytes are used"
                )
            pages.retain()
            self._rows[object_id] = (head, pages)
            self._used += size

    def borrow(self, object_id: ObjectId) -> Pages:
        with self._lock:
            row = self._rows.get(object_id)
            if row is None:
                raise BlockNotFound(f"{object_id} is not in the RAM tier")
            row[1].retain()
            return row[1]

    def read(self, object_id: ObjectId, allocate: Allocate) -> memoryview:
        with self._lock:
            row = self._rows.get(object_id)
            if row is None:
                raise BlockNotFound(f"{object_id} is not in the RAM tier")
            head, pages = row
            pages.retain()
        try:
            buffer = allocate(len(head) + len(pages.view))
            buffer[: len(head)] = head
            buffer[len(head) :] = pages.view
            return buffer
        finally:
            pages.release()

    def delete(self, object_id: ObjectId) -> int:
        with self._lock:
            row = self._rows.pop(object_id, None)
            if row is None:
                return 0
            head, pages = row
            size = len(head) + len(pages.view)
            self._used -= size
        pages.release()
        return size

    def contains(self, object_id: ObjectId) -> bool:
        return object_id in self._rows

    def scan(self) -> Iterator[ScannedObject | ScanFailure]:
        with self._lock:
            rows = list(self._rows.items())
        for object_id, (head, pages) in rows:
            if head:
                size = len(head) + len(pages.view)
                yield ScannedObject(object_id, head, size, time.time_ns())
            else:  # came through put: header and payload in one piece
                data = bytes(pages.view)
                yield ScannedObject(
                    object_id, data[: header_length(data)], len(data), time.time_ns()
                )

    def usage(self) -> TierUsage:
        return TierUsage(self._used, self._quota)

    def set_quota(self, quota_bytes: int | None) -> None:
        with self._lock:
            self._quota = default_quota_bytes() if quota_bytes is None else quota_bytes

    def location(self, object_id: ObjectId) -> str:
        return f"memory:{object_id}"

    def close(self) -> None:
        with self._lock:
            self._closed = True
            rows = list(self._rows.values())
            self._rows.clear()
            self._used = 0
        for _, pages in rows:
            pages.release()
