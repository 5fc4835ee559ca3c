"""Adapters: files that stand for weights, and change what every cell holds."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from erllama_core.errors import AdapterLoadError

MAGIC: Final = b"stub adapter\n"
"""What an adapter's file begins with; whatever follows stands for its weights."""


class StubAdapter:
    """An adapter in memory."""

    def __init__(self, content: bytes) -> None:
        self.digest: Final = hashlib.blake2b(content, digest_size=32).digest()
        self.is_closed = False

    @classmethod
    def read(cls, path: Path) -> StubAdapter:
        """Raises AdapterLoadError for a file that is none of the stub's adapters."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise AdapterLoadError(f"{path} cannot be read", reason=str(error)) from error
        if not content.startswith(MAGIC):
            raise AdapterLoadError(
                f"{path} is no adapter of the stub", reason=f"it does not begin with {MAGIC!r}"
            )
        return cls(content)

    def close(self) -> None:
        """Nothing computes with it from now on. Idempotent."""
        self.is_closed = True


def adapted_key(key: bytes, adapters: Iterable[tuple[StubAdapter, float]]) -> bytes:
    """The key of cells that are computed with adapters, in any order; without any, ``key``."""
    parts = sorted(adapter.digest + struct.pack("<f", scale) for adapter, scale in adapters)
    return hashlib.blake2b(b"".join(parts), key=key, digest_size=16).digest() if parts else key
