"""The file tiers keep what every tier promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from erllama_core.conformance import TierConformance, TierSubject
from erllama_core.host import PluginHost
from erllama_core.interfaces.block import ObjectId
from erllama_tier_disk.store import FileTier

HOST = PluginHost()


class Files:
    """The store, as a file manager sees it."""

    def __init__(self, root: Path) -> None:
        self._places = FileTier(root)

    def _path(self, object_id: ObjectId) -> Path:
        return Path(self._places.location(object_id))

    def read(self, object_id: ObjectId) -> bytes | None:
        path = self._path(object_id)
        return path.read_bytes() if path.exists() else None

    def write(self, object_id: ObjectId, data: bytes) -> None:
        path = self._path(object_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def remove(self, object_id: ObjectId) -> None:
        self._path(object_id).unlink()


class TestDisk(TierConformance):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> TierSubject:
        provider = HOST.get("tier", "disk")
        return TierSubject(
            lambda quota: provider.factory(provider.config(root=tmp_path, quota_bytes=quota)),
            survives_close=True,
            raw=Files(tmp_path),
        )


class TestRamFile(TierConformance):
    @pytest.fixture
    def subject(self, tmp_path: Path) -> TierSubject:
        provider = HOST.get("tier", "ram_file")
        return TierSubject(
            lambda quota: provider.factory(provider.config(root=tmp_path, quota_bytes=quota)),
            survives_close=True,
            raw=Files(tmp_path),
        )
