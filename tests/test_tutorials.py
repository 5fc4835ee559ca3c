"""What the tutorials build is what they say: each program passes the kit of its kind."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from erllama_core.conformance import (
    BackendConformance,
    BackendSubject,
    PressureConformance,
    PressureSubject,
    ProcessorConformance,
    ProcessorSubject,
    TierConformance,
    TierSubject,
)
from erllama_core.interfaces.block import ObjectId

DOCS = Path(__file__).resolve().parent.parent / "docs"


def program_of(kind: str) -> Any:
    """The page's program but for its last part, which runs an engine (test_docs.py does)."""
    text = (DOCS / f"writing-a-{kind}.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    program = [block for block in blocks if "import Engine" not in block and "Engine(" not in block]
    assert len(program) >= 2, kind
    module = ModuleType(f"tutorial_{kind}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)  # attrs looks annotations up there
        exec(compile("\n".join(program), f"writing-a-{kind}.md", "exec"), vars(module))
    return module


class Rows:
    """The tier's table, as another program sees it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def _rows(self, statement: str, *values: object) -> Iterator[list[tuple[bytes]]]:
        with contextlib.closing(sqlite3.connect(self._path)) as database, database:
            yield database.execute(statement, values).fetchall()

    def read(self, object_id: ObjectId) -> bytes | None:
        with self._rows("SELECT data FROM objects WHERE name = ?", str(object_id)) as rows:
            return rows[0][0] if rows else None

    def write(self, object_id: ObjectId, data: bytes) -> None:
        with self._rows("INSERT OR REPLACE INTO objects VALUES (?, ?, 0)", str(object_id), data):
            pass

    def remove(self, object_id: ObjectId) -> None:
        with self._rows("DELETE FROM objects WHERE name = ?", str(object_id)):
            pass


class TestTier(TierConformance):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> TierSubject:
        page, path = program_of("tier"), tmp_path / "kv.sqlite"
        return TierSubject(
            lambda quota: page.open_sqlite(page.SqliteOptions(path=path, quota_bytes=quota)),
            survives_close=True,
            raw=Rows(path),
        )


class TestBackend(BackendConformance):
    @pytest.fixture
    def subject(self) -> BackendSubject:
        page = program_of("backend")
        return BackendSubject(load=page.Model)


class TestPressureSource(PressureConformance):
    @pytest.fixture
    def subject(self) -> PressureSubject:
        page = program_of("pressure-source")
        return PressureSubject(
            lambda: page.FileSystem("/"), broken=lambda: page.FileSystem("/not/there")
        )


class TestStreamProcessor(ProcessorConformance):
    @pytest.fixture
    def subject(self) -> ProcessorSubject:
        page = program_of("stream-processor")
        return ProcessorSubject(
            page.make_replace,
            options=page.ReplaceOptions(old="colour", new="color"),
            pieces=[b"colour", b"col"],
        )
