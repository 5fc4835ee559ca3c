"""The tier keeps what every tier promises, on a real server."""

from __future__ import annotations

from typing import Any

import pytest
import redis

from erllama_core.conformance import TierConformance, TierSubject
from erllama_core.host import PluginHost
from erllama_core.interfaces.block import ObjectId
from erllama_tier_redis.names import Names

HOST = PluginHost()


class Strings:
    """The server's own strings."""

    def __init__(self, client: Any, prefix: str) -> None:
        self._client = client
        self._names = Names(prefix)

    def read(self, object_id: ObjectId) -> bytes | None:
        found: bytes | None = self._client.get(self._names.object(object_id))
        return found

    def write(self, object_id: ObjectId, data: bytes) -> None:
        self._client.set(self._names.object(object_id), data)

    def remove(self, object_id: ObjectId) -> None:
        self._client.delete(self._names.object(object_id))


class TestRedis(TierConformance):
    @pytest.fixture
    def subject(self, shared_server: Any, client: redis.Redis, prefix: str) -> TierSubject:
        provider = HOST.get("tier", "redis")
        return TierSubject(
            lambda quota: provider.factory(
                provider.config(url=shared_server.url, prefix=prefix, quota_bytes=quota)
            ),
            survives_close=True,
            raw=Strings(client, prefix),
        )
