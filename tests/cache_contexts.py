"""Contexts in a cache without a model, and a tier of files that keeps a record of pins."""

from __future__ import annotations

from pathlib import Path

from erllama_core import Cache
from erllama_core.cache.keys import ContextKeys
from erllama_core.cache.space import ModelSpace
from erllama_core.errors import TierError
from erllama_core.interfaces.backend import KVClass, Mark
from erllama_core.prompt import pack
from erllama_tier_disk.store import FileTier

CLASSES = (KVClass.SPAN, KVClass.CHECKPOINT, KVClass.WHOLE)
MARK = Mark(pack([7]), bytes(4), 0.5, 1)


class RecordingTier(FileTier):
    """Records pins as files beside its root."""

    def __init__(self, root: Path, *, quota_bytes: int | None = None) -> None:
        super().__init__(root, quota_bytes=quota_bytes)
        self._records = root.with_name(f"{root.name}.pins")
        self.refuses = False

    def record_pin(self, key: bytes) -> None:
        if self.refuses:
            raise TierError("no room for a record")
        self._records.mkdir(exist_ok=True)
        (self._records / key.hex()).touch()

    def erase_pin(self, key: bytes) -> None:
        if self.refuses:
            raise TierError("the record is held")
        (self._records / key.hex()).unlink(missing_ok=True)

    def pins(self) -> list[bytes]:
        return [bytes.fromhex(path.name) for path in self._records.glob("*")]


def space_of(
    cache: Cache, tiers: tuple[str, ...], *, kv_class: KVClass = KVClass.SPAN, align: int = 8
) -> ModelSpace:
    """A model's view of these tiers; models of one class share what is stored."""
    namespace = bytes([CLASSES.index(kv_class)]) * 32
    return ModelSpace(
        cache, namespace=namespace, kv_class=kv_class, tiers=tiers, align_tokens=align
    )


def store(space: ModelSpace, tokens: list[int], *, mark: bool = True) -> ContextKeys:
    """Save a context as a worker would."""
    keys = space.keys(bytearray(pack(tokens)), None)
    n, position = len(tokens), 0
    while block := space.next_block(keys, position, n):
        holds_state = space.kv_class is not KVClass.WHOLE
        pages = space.reserve(4 * (block.end - block.start) if holds_state else 0)
        assert pages is not None
        space.submit_block(keys, block, pages, "cold")
        position = block.end
    if space.kv_class is not KVClass.SPAN and not space.has_snapshot(keys, n):
        pages = space.reserve(4 * n)
        assert pages is not None
        space.submit_snapshot(keys, n, pages, "cold")
    if mark and not space.has_mark(keys, n):
        space.submit_mark(keys, n, MARK, "cold")
    return keys
