"""Pins, marks and orphans: what stays, what goes first, and what it costs to find out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from cache_contexts import CLASSES, MARK, RecordingTier, space_of, store
from erllama_core import BlockMeta, Cache, CacheKey, NamedTier, Pinned
from erllama_core.cache import eviction
from erllama_core.cache.loader import Fetch
from erllama_core.cache.ram import RamTier
from erllama_core.cache.space import ModelSpace
from erllama_core.errors import BlockNotFound, TierError
from erllama_core.interfaces.backend import KVClass
from erllama_core.interfaces.block import ObjectKind
from stub_engine import load_stub, make_engine

CONTEXT = list(range(100, 142))
OTHER = list(range(200, 230))


def ram(name: str = "ram", quota_bytes: int = 1 << 24) -> NamedTier:
    return NamedTier(name, "ram", RamTier(quota_bytes))


@pytest.fixture
def cache() -> Iterator[Cache]:
    with Cache([ram("near"), ram("far")]) as opened:
        yield opened


def saved(cache: Cache, tokens: list[int], *tiers: str, kv_class: KVClass = KVClass.SPAN) -> bytes:
    """Store a context and wait for it; its key."""
    keys = store(space_of(cache, tiers, kv_class=kv_class), tokens)
    assert cache.flush(10)
    return keys.key(len(tokens))


def covered(cache: Cache, tokens: list[int], *tiers: str) -> int:
    """Tokens of a span model's context that these tiers have."""
    space = space_of(cache, tiers)
    keys = space.keys(bytearray(b"".join(t.to_bytes(4, "little") for t in tokens)), None)
    return space.find(keys, may_sample=False).covered


def meta(*tokens: int) -> BlockMeta:
    return BlockMeta(
        save_reason="cold",
        fingerprint=bytes(32),
        quant_type="f16",
        quant_bits=16,
        ctx_params_hash=bytes(32),
        tokens=tokens,
        context_size=100,
    )


# ------------------------------------------------------------------------- pins


@pytest.mark.parametrize("kv_class", CLASSES)
def test_a_pinned_context_stays_whole(cache: Cache, kv_class: KVClass) -> None:
    """Explicit eviction takes everything but the pinned context, in the pinned tier only."""
    key = saved(cache, CONTEXT, "near", "far", kv_class=kv_class)
    saved(cache, OTHER, "near", "far", kv_class=kv_class)
    pinned = cache.pin(key)
    mine = [row for row in cache.dump() if row.pinned]
    assert pinned == Pinned("near", len(mine), sum(row.size_bytes for row in mine))
    assert {row.tier for row in mine} == {"near"}
    assert cache.pins() == {key: (pinned,)}
    cache.evict_bytes(1 << 40)
    cache.gc()
    left = cache.dump()
    assert {(row.kind, row.key, row.start) for row in left} == {
        (row.kind, row.key, row.start) for row in mine
    }
    assert cache.usage()[0].pinned_bytes == pinned.bytes == cache.usage()[0].used_bytes
    for _ in range(2):
        cache.unpin(key)
    assert cache.pins() == {}
    cache.gc()
    assert cache.dump() == []


def test_pins_that_overlap_hold_each_for_itself(cache: Cache) -> None:
    """What two contexts share stays until both are unpinned, to the end of the last such block."""
    one, two = CONTEXT, [*CONTEXT[:20], *OTHER]
    first, second = saved(cache, one, "near"), saved(cache, two, "near")
    cache.pin(first)
    cache.pin(second)
    cache.unpin(first)
    cache.gc()
    assert (covered(cache, one, "near"), covered(cache, two, "near")) == (24, len(two))


def test_only_a_whole_context_is_pinned(cache: Cache) -> None:
    """What is not stored cannot be pinned, and the message says where it was looked for."""
    key = saved(cache, CONTEXT, "far")
    with pytest.raises(BlockNotFound, match="no tier has the whole context 0000"):
        cache.pin(bytes(32))
    with pytest.raises(BlockNotFound, match="tier 'near' does not have"):
        cache.pin(key, tier="near")
    with pytest.raises(ValueError, match="32 bytes"):
        cache.pin(b"short")
    with pytest.raises(ValueError, match="did you mean 'near'"):
        cache.pin(key, tier="nearr")
    assert cache.pins() == {}
    cache.unpin(bytes(32))
    assert cache.pin(key).tier == "far"


def test_a_pin_waits_for_what_is_being_written() -> None:
    """A context that was just handed over can be pinned."""
    gate = threading.Event()

    class Late(RamTier):
        def keep(self, *arguments: Any) -> None:
            gate.wait()
            super().keep(*arguments)

    with Cache([NamedTier("ram", "ram", Late(1 << 20))]) as cache:
        space = space_of(cache, ("ram",))
        keys = store(space, CONTEXT)
        pinned: list[Pinned] = []
        thread = threading.Thread(target=lambda: pinned.append(cache.pin(keys.key(len(CONTEXT)))))
        thread.start()
        gate.set()
        thread.join(10)
        assert pinned[0].rows == len(cache.dump())


def test_a_pinned_end_is_not_absorbed(cache: Cache) -> None:
    """The short end of a pinned context stays beside the block that extends it."""
    key = saved(cache, CONTEXT[:11], "near", "far")
    cache.pin(key, tier="near")
    saved(cache, CONTEXT[:15], "near", "far")
    ends = {(row.tier, row.start, row.end) for row in cache.dump() if row.kind == "kv"}
    assert ("near", 8, 11) in ends
    assert ("far", 8, 11) not in ends
    cache.gc()
    assert covered(cache, CONTEXT[:11], "near") == 11


def test_what_was_absorbed_is_found_by_its_mark(cache: Cache) -> None:
    """A context whose last block became part of a longer one can still be pinned."""
    key = saved(cache, CONTEXT[:11], "near")
    saved(cache, CONTEXT[:15], "near")
    assert not [row for row in cache.dump() if row.kind == "kv" and row.key == key]
    cache.pin(key)
    cache.gc()
    assert covered(cache, CONTEXT, "near") == 15


def test_a_pin_outlives_what_it_protects(cache: Cache) -> None:
    """Objects that are lost and saved again are protected again, and so is the rest meanwhile."""
    key = saved(cache, CONTEXT, "near")
    cache.pin(key)
    near = cache.catalog.store("near")
    [middle] = [e for e in cache.catalog.index if e.start == 16 and e.tokens]
    cache.catalog.remove(near, middle.object_id)
    cache.gc()
    assert covered(cache, CONTEXT, "near") == 16
    assert max(row.start for row in cache.dump()) == len(CONTEXT)
    saved(cache, CONTEXT, "near")
    cache.gc()
    assert covered(cache, CONTEXT, "near") == len(CONTEXT)


def test_an_explicit_save_can_be_pinned(cache: Cache) -> None:
    """A payload of the caller's own is pinned by its key, also when it is saved anew."""
    key, _, _ = cache.save("near", meta(1, 2), b"one")
    cache.pin(key)
    cache.save("near", meta(1, 2), b"two")
    cache.gc()
    assert cache.load("near", key)[1] == b"two"


def test_a_write_takes_what_is_pinned_last() -> None:
    """Where everything else is gone, room for a write is made of pinned ends; never else."""
    with Cache([ram(quota_bytes=40_000)]) as cache:
        space = space_of(cache, ("ram",), align=64)
        key = saved_filling(cache, space, 1)
        before = cache.pin(key).bytes
        saved_filling(cache, space, 2)
        assert cache.pins()[key][0].bytes == before  # that was room enough
        cache.save("ram", meta(1), bytes(39_000 - before))
        assert cache.pins()[key][0].bytes == before  # and so was the rest
        assert len(cache.dump()) == cache.pins()[key][0].rows + 1
        with cache.catalog.lock:
            for entry in cache.catalog.index:
                if entry.end == 1:
                    entry.copies[0].users += 1
        cache.save("ram", meta(3), bytes(9_000))
        after = cache.pins()[key][0]
        assert 0 < after.bytes < before
        starts = sorted(row.start for row in cache.dump() if row.pinned)
        assert starts == [64 * n for n in range(after.rows)]


def saved_filling(cache: Cache, space: ModelSpace, token: int) -> CacheKey:
    keys = space.keys(bytearray(token.to_bytes(4, "little") * 256), None)
    position = 0
    while block := space.next_block(keys, position, 256):
        pages = space.reserve(4_000)
        assert pages is not None
        space.submit_block(keys, block, pages, "cold")
        position = block.end
    assert cache.flush(10)
    return CacheKey(keys.key(256))


# ---------------------------------------------------------------- recorded pins


def test_recorded_pins_hold_after_a_restart(tmp_path: Path) -> None:
    """A tier that records pins comes before a nearer one, and its pins outlive the process."""
    root = tmp_path / "kvc"
    with Cache([ram("near"), NamedTier("disk", "disk", RecordingTier(root))]) as cache:
        key = saved(cache, CONTEXT, "near", "disk")
        saved(cache, OTHER, "near", "disk")
        assert cache.pin(key).tier == "disk"
    with Cache([NamedTier("disk", "disk", RecordingTier(root))]) as cache:
        assert cache.wait_scanned(10)
        cache.gc()
        assert (covered(cache, CONTEXT, "disk"), covered(cache, OTHER, "disk")) == (len(CONTEXT), 0)
        cache.unpin(key)
    with Cache([NamedTier("disk", "disk", RecordingTier(root))]) as cache:
        assert cache.wait_scanned(10)
        assert cache.pins() == {}
        cache.gc()
        assert cache.dump() == []


def test_what_cannot_be_recorded_is_not_pinned(tmp_path: Path) -> None:
    """A pin that would not last is an error; one that cannot be erased comes back."""
    tier = RecordingTier(tmp_path / "kvc")
    with capture_logs(), Cache([NamedTier("disk", "disk", tier)]) as cache:
        key = saved(cache, CONTEXT, "disk")
        tier.refuses = True
        with pytest.raises(TierError, match="no room"):
            cache.pin(key)
        assert cache.pins() == {}
        tier.refuses = False
        cache.pin(key)
        tier.refuses = True
        with pytest.raises(TierError, match="held"):
            cache.unpin(key)
        cache.unpin(bytes(32))
        assert list(cache.pins()) == [key]


def test_pins_that_are_not_known_yet_are_remembered(tmp_path: Path) -> None:
    """A pin may be recorded before its context comes, and holds from then on."""
    tier = RecordingTier(tmp_path / "kvc")
    with Cache([NamedTier("disk", "disk", tier)]) as cache:
        space = space_of(cache, ("disk",))
        packed = bytearray(b"".join(t.to_bytes(4, "little") for t in CONTEXT))
        key = CacheKey(space.keys(packed, None).key(len(CONTEXT)))
        tier.record_pin(key)
        tier.record_pin(b"no key")
    with Cache([NamedTier("disk", "disk", RecordingTier(tmp_path / "kvc"))]) as cache:
        assert cache.wait_scanned(10)
        assert [(p.rows, p.bytes) for p in cache.pins()[key]] == [(0, 0)]
        saved(cache, CONTEXT, "disk")
        cache.gc()
        assert covered(cache, CONTEXT, "disk") == len(CONTEXT)


# ------------------------------------------------------------------------ marks


def test_marks_make_room_for_one_another() -> None:
    """Beyond their share the oldest marks go, and no state does."""
    with Cache([ram(quota_bytes=100_000)], marks_share=0.02) as cache:
        kept = [saved(cache, [n, *CONTEXT], "ram") for n in range(20)]
        [usage] = cache.usage()
        assert 0 < usage.by_kind["logits"].size_bytes <= 2_000
        marks = [row.key for row in cache.dump() if row.kind == "logits"]
        assert sorted(marks) == sorted(kept[-len(marks) :])
        assert all(covered(cache, [n, *CONTEXT], "ram") == 43 for n in range(20))
        assert usage.by_kind["kv"].objects == 20 * 6
        assert sum(amount.size_bytes for amount in usage.by_kind.values()) == usage.used_bytes


def test_no_share_keeps_no_marks() -> None:
    """With a share of 0 the state is kept, and no mark."""
    with Cache([ram()], marks_share=0.0) as cache:
        saved(cache, CONTEXT, "ram")
        assert {row.kind for row in cache.dump()} == {"kv"}
        assert cache.counters().saves_dropped == 1


def test_marks_do_not_outlive_their_state(cache: Cache) -> None:
    """At no point of an eviction is there a mark without the block that it stands on."""
    for n in range(1, 30, 4):
        saved(cache, CONTEXT[:n], "near")
    near = cache.catalog.store("near")
    while cache.evictor.evict(near, 1).rows:
        for entry in cache.catalog.index:
            if entry.object_id.kind is ObjectKind.LOGITS:
                assert covered(cache, CONTEXT[: entry.end], "near") == entry.end


# -------------------------------------------------------------- orphans and use


def test_orphans_go_first_after_their_grace(cache: Cache) -> None:
    """What cannot be found keeps its rank for a while, then goes before everything else."""
    now = [10**18]
    cache.catalog.clock = lambda: now[0]
    saved(cache, CONTEXT[:16], "near")
    now[0] += 10**9
    saved(cache, OTHER, "near")
    near = cache.catalog.store("near")
    [root] = [e for e in cache.catalog.index if e.start == 0 and e.tokens[:4] == b"\xc8\0\0\0"]
    cache.catalog.remove(near, root.object_id)
    orphans = {e for e in cache.catalog.index if e.end > 16 or e.path[:4] == b"\xd0\0\0\0"}
    assert len(orphans) == 4  # three blocks and a mark
    now[0] += int(eviction.ORPHAN_GRACE_S * 1e9) - 1
    cache.evictor.evict(near, 1)
    assert orphans <= set(cache.catalog.index)
    now[0] += 1
    for left in (3, 2, 1, 0):
        cache.evictor.evict(near, 1)
        assert len(orphans & set(cache.catalog.index)) == left
    assert covered(cache, CONTEXT, "near") == 16


def test_an_ancestor_in_another_tier_will_do(cache: Cache) -> None:
    """What goes on from a block of another tier is no orphan."""
    saved(cache, CONTEXT[:16], "near", "far")
    saved(cache, CONTEXT[:24], "near", "far")
    far = cache.catalog.store("far")
    [root] = [e for e in cache.catalog.index if e.start == 0 and e.tokens]
    cache.catalog.remove(far, root.object_id)
    assert not any(cache.catalog.index.is_orphan(entry) for entry in cache.catalog.index)


def test_nothing_is_pulled_from_under_a_reader(tmp_path: Path) -> None:
    """While state is fetched and held, gc on other threads leaves it; afterwards it goes."""
    disk = NamedTier("disk", "disk", RecordingTier(tmp_path))
    with Cache([disk]) as cache:
        space = space_of(cache, ("disk",))
        keys = store(space, CONTEXT)
        saved(cache, OTHER, "disk")
        fetched: list[Fetch] = []
        done = threading.Event()
        match = space.find(keys, may_sample=True)

        def arrived(fetch: Fetch) -> None:
            fetched.append(fetch)
            done.set()

        assert space.fetch(match, arrived) is None
        collectors = [threading.Thread(target=cache.gc) for _ in range(4)]
        for collector in collectors:
            collector.start()
        for collector in collectors:
            collector.join(10)
        assert done.wait(10)
        [fetch] = fetched
        assert not fetch.failed
        assert fetch.mark == MARK
        assert {row.refcount for row in cache.dump()} == {1}
        assert len(cache.dump()) == len(fetch.parts)
        assert cache.gc().rows == 0
        fetch.release()
        assert cache.gc().rows == 7
        assert cache.dump() == []


def test_a_victim_costs_the_same_whatever_cannot_go(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Objects of the lowest score that are pinned or used are passed over once, not each time."""
    for n in range(500):
        key = saved(cache, [n, 1, 2], "near")
        if n % 2:
            cache.pin(key)
    held = [(e, c) for e in cache.catalog.index for c in e.copies]
    for _, copy in held:
        copy.users += 1
    for n in range(500, 700):
        saved(cache, [n, 1, 2], "near")
    near = cache.catalog.store("near")
    assert cache.evictor.evict(near, 1).rows == 1
    looks = 0
    plain = eviction.score_ns

    def counting(*arguments: Any) -> int:
        nonlocal looks
        looks += 1
        return plain(*arguments)

    monkeypatch.setattr(eviction, "score_ns", counting)
    for _ in range(100):
        assert cache.evictor.evict(near, 1).rows == 1
    assert looks <= 6 * 100
    for entry, copy in held:
        cache.catalog.let_go(entry, copy)
    cache.gc()
    assert len(cache.dump()) == 500


# -------------------------------------------------------------------- in an engine


@pytest.mark.parametrize("kv_class", ["span", "checkpoint", "whole"])
def test_a_finished_context_can_be_pinned(kv_class: str) -> None:
    """The key that a reply ends with names a context that then survives gc, and hits."""
    with make_engine() as engine:
        model = load_stub(engine, kv_class=kv_class)
        first = model.complete(
            "The lamp was lit for the first time in autumn. " * 3, response_tokens=9
        )
        model.complete("And then it was not. " * 9, response_tokens=4)
        engine.flush()
        assert first.finish_key is not None
        engine.cache.pin(first.finish_key)
        engine.cache.gc()
        longer = model.complete([*first.context_tokens, 65], response_tokens=2)
        assert longer.cache_delta.read == len(first.context_tokens)
