"""Tests of the cache alone

What an application keeps in the cache by itself can be tested without any model: a cache on a
temporary folder is opened and closed in milliseconds. Run with pytest, or as it stands.
"""

import sys
from pathlib import Path

import pytest

from erllama_core import BlockMeta, Cache, TierConfig, open_tier
from erllama_core.host import PluginHost


def meta(tokens: list[int]) -> BlockMeta:
    return BlockMeta(
        save_reason="cold",
        fingerprint=bytes([0xAA]) * 32,
        fingerprint_mode="safe",
        quant_type="f16",
        quant_bits=16,
        ctx_params_hash=bytes([0xBB]) * 32,
        tokens=tokens,
        context_size=4096,
    )


def open_cache(root: Path) -> Cache:
    config = TierConfig(name="t", kind="disk", options={"root": str(root)})
    return Cache([open_tier(PluginHost(), config)])


def test_round_trip(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        key, _, _ = cache.save("t", meta([1, 2, 3]), b"data")
    with open_cache(tmp_path) as cache:  # as after a restart
        _, payload = cache.load("t", key)
    assert payload == b"data"


def test_another_context_has_another_key(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        one, _, _ = cache.save("t", meta([1, 2, 3]), b"data")
        other, _, _ = cache.save("t", meta([1, 2, 4]), b"data")
    assert one != other


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", __file__]))
