"""The tier keeps what every tier promises."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest
from erllama_tier_sqlite.store import SqliteTier

from erllama_core.conformance import TierConformance, TierSubject
from erllama_core.interfaces.block import ObjectId


class Database:
    """The same database without the tier: what others could do to it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def _run(self, statement: str, *values: object) -> list[tuple[bytes]]:
        with contextlib.closing(sqlite3.connect(self._path)) as connection, connection:
            return connection.execute(statement, values).fetchall()

    def read(self, object_id: ObjectId) -> bytes | None:
        rows = self._run("SELECT data FROM objects WHERE name = ?", str(object_id))
        return rows[0][0] if rows else None

    def write(self, object_id: ObjectId, data: bytes) -> None:
        self._run(
            "INSERT OR REPLACE INTO objects (name, size, used_ns, data) VALUES (?, ?, 0, ?)",
            str(object_id),
            max(1, len(data)),
            data,
        )

    def remove(self, object_id: ObjectId) -> None:
        self._run("DELETE FROM objects WHERE name = ?", str(object_id))


class TestSqliteTier(TierConformance):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> TierSubject:
        path = tmp_path / "kv.sqlite"
        return TierSubject(
            lambda quota: SqliteTier(path, quota_bytes=quota),
            survives_close=True,
            raw=Database(path),
        )
