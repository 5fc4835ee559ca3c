"""The tier: one row for each object."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from erllama_core.errors import BlockNotFound, TierError, TierFull
from erllama_core.interfaces.block import Bytes, ObjectId
from erllama_core.interfaces.tier import Allocate, ScanFailure, ScannedObject, TierUsage

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS objects (
    number INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    size INTEGER NOT NULL,
    used_ns INTEGER NOT NULL,
    data BLOB NOT NULL
)
"""
_HEAD_BYTES: Final = 1 << 20
"""The longest header that there is (``block.MAX_HEADER_BYTES``)."""
_BATCH: Final = 100
"""Objects that a scan reads at once. It holds no cursor in between, so that others can write."""


class SqliteTier:
    """Objects in a database. Thread-safe: one connection, one lock around each statement.

    The core calls from several threads at once: writers, readers, a scan. Nothing is done under
    the lock but one transaction; above all not ``allocate``, which may wait.
    """

    def __init__(self, path: Path, *, quota_bytes: int | None = None) -> None:
        self._path: Final = path
        self._quota: Final = quota_bytes
        self._lock: Final = threading.Lock()
        with self._as_tier_error("open"):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Transactions are begun by hand, as `with self._connection` would not begin one.
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute(_SCHEMA)
            (self._used,) = self._connection.execute(
                "SELECT coalesce(sum(size), 0) FROM objects"
            ).fetchone()

    def put(self, object_id: ObjectId, parts: Sequence[Bytes], *, durable: bool = False) -> None:
        data = b"".join(parts)  # a copy: the parts are the core's, and change after this call
        name = str(object_id)
        with self._lock, self._as_tier_error("store an object in"):
            before = self._size_of(name)
            if self._quota is not None and self._used - before + len(data) > self._quota:
                raise TierFull(
                    f"{len(data)} bytes do not fit into {self._path}: {self._used} of "
                    f"{self._quota} bytes are used"
                )
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._connection.execute(
                "INSERT OR REPLACE INTO objects (name, size, used_ns, data) VALUES (?, ?, ?, ?)",
                (name, len(data), time.time_ns(), data),
            )
            self._used += len(data) - before

    def read(self, object_id: ObjectId, allocate: Allocate) -> memoryview:
        with self._lock, self._as_tier_error("read an object of"):
            row = self._connection.execute(
                "UPDATE objects SET used_ns = ? WHERE name = ? RETURNING data",
                (time.time_ns(), str(object_id)),
            ).fetchone()
        if row is None:
            raise BlockNotFound(f"{object_id} is not in {self._path}")
        data: bytes = row[0]
        buffer = allocate(len(data))
        buffer[:] = data
        return buffer

    def delete(self, object_id: ObjectId) -> int:
        with self._lock, self._as_tier_error("delete an object of"):
            row = self._connection.execute(
                "DELETE FROM objects WHERE name = ? RETURNING size", (str(object_id),)
            ).fetchone()
            freed = 0 if row is None else int(row[0])
            self._used -= freed
        return freed

    def contains(self, object_id: ObjectId) -> bool:
        with self._lock, self._as_tier_error("look for an object in"):
            return self._size_of(str(object_id)) > 0

    def scan(self) -> Iterator[ScannedObject | ScanFailure]:
        last = -1
        while True:
            try:
                with self._lock, self._as_tier_error("scan"):
                    rows = self._connection.execute(
                        "SELECT number, name, size, used_ns, coalesce(substr(data, 1, ?), x'') "
                        "FROM objects WHERE number > ? ORDER BY number LIMIT ?",
                        (_HEAD_BYTES, last, _BATCH),
                    ).fetchall()
            except TierError as error:
                yield ScanFailure(str(self._path), str(error))
                return
            for number, name, size, used_ns, head in rows:
                last = number
                try:
                    object_id = ObjectId.parse(name)
                except ValueError as error:
                    yield ScanFailure(f"{self._path}: {name}", str(error))
                else:
                    yield ScannedObject(object_id, head, size, used_ns)
            if len(rows) < _BATCH:
                return

    def usage(self) -> TierUsage:
        return TierUsage(self._used, self._quota)

    def location(self, object_id: ObjectId) -> str:
        return f"{self._path}: {object_id}"

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _size_of(self, name: str) -> int:
        """Bytes of an object, 0 when it is not there. Under the lock."""
        row = self._connection.execute(
            "SELECT size FROM objects WHERE name = ?", (name,)
        ).fetchone()
        return 0 if row is None else int(row[0])

    @contextlib.contextmanager
    def _as_tier_error(self, action: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            message = f"cannot {action} {self._path}: {error}"
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise TierFull(f"{message}; free space on its device") from error
            raise TierError(message) from error
