"""Objects to store, and a store to put them in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from erllama_core.interfaces.block import ObjectId, ObjectKind, encode_header
from erllama_tier_disk.store import FileTier

MakeObject = Callable[..., tuple[ObjectId, bytes]]


def make_object(number: int, size: int = 100) -> tuple[ObjectId, bytes]:
    """Object ``number`` with a payload of ``size`` bytes: its name and all of its bytes."""
    payload = hashlib.shake_128(f"{number}".encode()).digest(size)
    key = hashlib.sha256(f"key {number}".encode()).digest()
    head = encode_header(
        kind=ObjectKind.KV,
        start=number,
        end=number + 2,
        namespace=hashlib.sha256(b"namespace").digest(),
        key=key,
        segment_key=hashlib.sha256(b"segment").digest(),
        lead_tokens=b"",
        tokens=bytes(8),
        align_tokens=256,
        payload=payload,
        info={"save_reason": "cold"},
    )
    return ObjectId(ObjectKind.KV, number, key), head + payload


@pytest.fixture
def make() -> MakeObject:
    return make_object


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def tier(root: Path) -> Iterator[FileTier]:
    tier = FileTier(root)
    yield tier
    tier.close()
